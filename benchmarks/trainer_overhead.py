"""What does a distillation step cost beyond what it cannot avoid?

The baseline is a step of plain ``Trainer`` on the student plus a forward pass of the teacher without gradient, in
the same process, in rounds of random order, medians of pairs, CPU time on one thread. BERT: MiniLM's shape, 6 layers
teaching 3, a batch of 16 × 64, logits and three hidden states. GPT-2: the full vocabulary of 50,257. Peak memory of
the GPT-2 step is measured in a process of its own for each of: plain student step with the teacher's forward, our
step, and a naive step that computes both logit matrices and the KL in float32 at once.

    python benchmarks/trainer_overhead.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import asked, write
from speeds import add_threads, on
from steps import StepByStep, overhead
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from lmcompress.distillation import DistillationConfig, Match
from lmcompress.distillation.losses.distributions import kl_divergence
from lmcompress.students.layers import by_layers
from lmcompress.trainers import DistillationTrainer

# GPT-2 small's width and vocabulary; fewer layers, so that it fits the hour of a small machine
GPT2 = {"n_embd": 768, "n_layer": 6, "n_head": 12}
ROWS, LENGTH = {"bert": 16, "gpt2": 4}, {"bert": 64, "gpt2": 64}


def make_teacher(kind: str) -> Any:
    """A random model: arithmetic costs the same whatever the weights."""
    set_seed(0)
    if kind == "bert":
        sizes = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        return BertForSequenceClassification(BertConfig(**sizes))
    return GPT2LMHeadModel(GPT2Config(**GPT2))


def make_batch(kind: str, device: Any) -> dict[str, torch.Tensor]:
    """One batch without padding."""
    ids = torch.randint(5, 30000, (ROWS[kind], LENGTH[kind]))
    labels = torch.randint(0, 2, (ROWS[kind],)) if kind == "bert" else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def arguments(folder: str, *, bf16: bool = False) -> TrainingArguments:
    """Everything that is not measured is off."""
    return TrainingArguments(
        folder,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        max_steps=1000,
        bf16=bf16,
    )


class NaiveTrainer(Trainer):
    """What one writes in ten lines: both logit matrices whole, in float32."""

    teacher: Any

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Labels and KL of all tokens at once."""
        outputs = model(**inputs)
        with torch.no_grad():
            teacher = self.teacher(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        soft = kl_divergence(outputs.logits[:, :-1], teacher[:, :-1], temperature=2.0).mean()
        return outputs.loss + soft


def make_step(kind: str, way: str, folder: str) -> StepByStep:
    """Optimizer steps in one of three ways: ``baseline``, ``lmcompress``, ``naive``."""
    teacher = make_teacher(kind)
    student = by_layers(teacher, 3).model
    args = arguments(folder)
    if way == "lmcompress":
        matches = [Match(loss="hidden_mse", student=i, teacher=2 * i) for i in (1, 2, 3)] if kind == "bert" else []
        config = DistillationConfig(temperature=2.0, matches=tuple(matches))
        trainer: Trainer = DistillationTrainer(student, args, teacher=teacher, distillation=config)
    elif way == "naive":
        trainer = NaiveTrainer(student, args)
        trainer.teacher = teacher.eval().to(args.device)
    else:
        trainer = Trainer(student, args)
    return StepByStep(trainer, make_batch(kind, args.device), teacher if way == "baseline" else None)


def ratio(kind: str, repeats: int, threads: int) -> list[dict[str, Any]]:
    """Our steps over the baseline, and the baseline over itself."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {way: make_step(kind, way, folder) for way in ("baseline", "lmcompress")}
        return [{"model": kind, **row} for row in overhead(steps, repeats, threads)]


def peak_memory(way: str) -> float:
    """Peak of resident memory in MiB during two GPT-2 steps, above what it was before the first; in a fresh process."""
    output = subprocess.run(
        [sys.executable, __file__, "--memory-of", way],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    ).stdout
    return float(json.loads(output.splitlines()[-1])["mib"])


def measure_memory(way: str) -> None:
    """In the process of its own: print the peak."""
    with tempfile.TemporaryDirectory() as folder:
        step = make_step("gpt2", way, folder)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step.step(), step.step()
            print(json.dumps({"mib": (torch.cuda.max_memory_allocated() - before) / 2**20}))
            return
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step.step(), step.step()
        print(json.dumps({"mib": (_status("VmHWM") - before) / 1024}))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="three repeats")
    add_threads(parser, default=(1,))
    parser.add_argument("--memory-of", choices=("baseline", "lmcompress", "naive"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    if options.memory_of:
        measure_memory(options.memory_of)
        return
    repeats = 3 if options.quick else options.repeats
    rows = [row for n in options.threads for kind in ("bert", "gpt2") for row in ratio(kind, repeats, n)]
    wanted = [
        asked(
            f"{row['model']}: step over baseline, {on(row['threads'])}", "<= 1.10", row["ratio"],
            row["ratio"] <= 1.10, busy=row["busy"],
        )
        for row in rows
        if row["kind"] == "other"
    ]  # fmt: skip
    memory = {way: peak_memory(way) for way in ("baseline", "lmcompress", "naive")}
    rows.append({"model": "gpt2", "peak_memory_mib": memory})
    saved = memory["lmcompress"] / memory["naive"]
    wanted.append(asked("gpt2: peak memory over naive", "reported", saved, True))
    for line in rows + wanted:
        print(line)
    shapes = {"gpt2": {**GPT2, "vocab_size": 50257}}
    print(write("trainer_overhead", rows, wanted, quick=options.quick, setting=shapes))


if __name__ == "__main__":
    main()
