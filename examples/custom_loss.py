"""A distillation loss of your own: as an object in Python, and by its name in a recipe.

    python examples/custom_loss.py

It runs offline, on a CPU, in less than a minute: a small BERT from scratch learns some intents of CLINC150, and a
student of one block learns from it by this loss, by a built-in one, and without a teacher.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from lmcompress.data import collator, load_task, tokenize
from lmcompress.distillation import DistillationConfig, LogitLoss
from lmcompress.evaluation import evaluate_classifier
from lmcompress.recipes import parse_recipe, run
from lmcompress.students import by_layers
from lmcompress.trainers import DistillationTrainer


def correlation_distance(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor, scale_by_temperature: bool
) -> Tensor:
    """One minus the correlation of the softened probabilities, as DIST has it between classes (arXiv:2205.10536).

    Args:
        student_logits: ``(..., C)``, float32.
        teacher_logits: same shape.
        temperature: above 1 spreads both distributions; a number, or one per row.
        scale_by_temperature: not used: the correlation knows no scale.

    Returns:
        ``(...)``, between 0 and 2.
    """
    scale = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    both = [(logits / scale).softmax(dim=-1) for logits in (student_logits, teacher_logits)]
    return 1 - F.cosine_similarity(*(p - p.mean(dim=-1, keepdim=True) for p in both), dim=-1)


# its name in messages, the function, and (by default) heads with one softmax
correlation = LogitLoss("correlation", correlation_distance)

TRAINING = '{max_steps: 150, learning_rate: 1.5e-3, warmup_steps: 40, save_strategy: "no"}'
RECIPE = f"""\
name: custom-loss
model: {{family: bert, hidden_size: 64, layers: 2, num_heads: 4, positions: 32,
        tokenizer: {{kind: wordpiece, vocab_size: 2000}}}}
task: {{name: embedded/clinc150, max_length: 24}}
stages:
  - {{name: teacher, training: {TRAINING}}}
  - name: correlation
    start: teacher
    student: {{layers: 1}}
    distillation: {{teachers: [teacher], loss: "custom_loss:correlation", temperature: 2}}
    control: true
    training: {TRAINING}
evaluation: {{latency_batches: []}}
"""


def by_object(folder: Path, loss: LogitLoss | str, steps: int) -> float:
    """Accuracy of a student that learns by a loss.

    Args:
        folder: of the teacher.
        loss: an object, or the name of a built-in one.
        steps: optimizer steps.
    """
    teacher = AutoModelForSequenceClassification.from_pretrained(folder)
    student = by_layers(teacher, 1).model
    data, tokenizer = load_task("embedded/clinc150"), AutoTokenizer.from_pretrained(folder)
    rows, collate = tokenize(data, tokenizer, max_length=24), collator(data.task, tokenizer)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=1.5e-3, warmup_steps=40, weight_decay=0.01, seed=0,
        per_device_train_batch_size=32, save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    config = DistillationConfig(loss=loss, temperature=2)
    trainer = DistillationTrainer(
        student, args, teacher=teacher, distillation=config, train_dataset=rows.train, data_collator=collate
    )
    trainer.train()
    return evaluate_classifier(student, rows.validation, collate, data.task.kind.value, ("accuracy",), 64)["accuracy"]


def main() -> None:
    """Both ways, and what they come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="Steps of a student; five times as many of the teacher.")
    parser.add_argument("--output", type=Path, default=Path("runs/custom-loss"), help="Folder of the run.")
    options = parser.parse_args()
    # a recipe finds modules where Python does, and in the current folder
    sys.path.insert(0, str(Path(__file__).parent))
    console = Console()
    recipe = parse_recipe(
        RECIPE, [f"training.max_steps={options.steps}", f"stages.teacher.training.max_steps={5 * options.steps}"]
    )
    rows = run(recipe, options.output, overwrite=True, console=console).report["rows"]
    found = {row["name"]: row["metrics"]["validation"]["accuracy"] for row in rows}
    table = Table(title="students of one block")
    for title in ("loss", "accuracy"):
        table.add_column(title)
    table.add_row("(the teacher, two blocks)", f"{found['teacher']:.3f}")
    table.add_row("custom_loss:correlation, in a recipe", f"{found['correlation']:.3f}")
    for loss, name in ((correlation, "correlation, an object"), ("kl", "kl")):
        table.add_row(name, f"{by_object(options.output / 'teacher', loss, options.steps):.3f}")
    table.add_row("labels alone", f"{found['correlation-control']:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
