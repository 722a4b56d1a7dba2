"""A task of 24 rows and a recipe of seconds."""

from __future__ import annotations

import random
from pathlib import Path

RECIPE = """\
name: tiny
model:
  family: bert
  hidden_size: 16
  layers: 4
  num_heads: 2
  positions: 32
  tokenizer: {kind: wordpiece, vocab_size: 80}
task:
  name: DATA
  max_length: 12
stages:
  - name: teacher
    training: {max_steps: 4, save_strategy: steps, save_steps: 2, per_device_train_batch_size: 4, learning_rate: 1e-3}
  - name: student
    start: teacher
    student: {layers: 2}
    distillation:
      teachers: [teacher]
      layer_map: uniform
      losses: [hidden_mse, {loss: attention_mse, on: scores}]
    control: true
    training: {max_steps: 4, save_strategy: steps, save_steps: 2, per_device_train_batch_size: 4, learning_rate: 1e-3}
evaluation: {repeats: 3, latency_batches: [1]}
"""


def write_task(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(0)
    words = {"bad": ["awful", "dull", "poor"], "good": ["fine", "great", "bright"]}
    for split, rows in (("train", 24), ("validation", 12)):
        lines = ["text,label"]
        for index in range(rows):
            label = ("bad", "good")[index % 2]
            lines.append(f"a {drawn.choice(words[label])} {drawn.choice(words[label])} film,{label}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def head(*, layers: int) -> str:
    """A recipe up to its stages: a BERT of 16 numbers for a task that is put in the place of ``DATA``."""
    return f"""\
name: tiny
model:
  family: bert
  hidden_size: 16
  layers: {layers}
  num_heads: 4
  positions: 32
  tokenizer: {{kind: wordpiece, vocab_size: 80}}
task: {{name: DATA, max_length: 12}}
stages:
"""
