"""Trains each case of ``CASES`` once and writes what came out; run by ``test_distributed.py`` in two processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from families import make, set_dropout
from ragged import ALL_UNITS, arguments, ragged_rows
from torch.utils.data import default_collate

from lmcompress.distillation import Contrast, Distillation, DistillationConfig, Match
from lmcompress.trainers import (
    DistillationTrainer,
    MultiTaskDistillation,
    MultiTaskStudent,
    MultiTaskTrainer,
)

PROJECTED = Match(
    loss="hidden_mse", student=2, teacher=3, projection="linear", projection_learning_rate=0.1, weight=10.0
)
CONFIGS = {
    "classification": DistillationConfig(matches=(*ALL_UNITS, PROJECTED), max_projection_norm=0.5),
    "causal": DistillationConfig(matches=(*ALL_UNITS, PROJECTED), chunk_tokens=5),
    "contrast": DistillationConfig(contrast=Contrast(weight=1.0, projection=8)),
    # nothing above the first block is reached: DDP would wait for those gradients for ever
    "lowest-layer": DistillationConfig(
        matches=[Match(loss="hidden_mse", student=1, teacher=1)], weight=0.0, label_weight=0.0
    ),
    "tasks": DistillationConfig(matches=[PROJECTED]),
}


def models(case: str):
    made = [
        make("gpt2", "language", seed=seed) if case == "causal" else make("bert", "classification", seed=seed)
        for seed in (1, 2)
    ]
    for model in made:
        set_dropout(model, 0.0)
    return made


def train(case: str, folder: Path, batch_size: int):
    """The trainer, after three optimizer steps of two micro-batches."""
    args = arguments(
        folder, max_steps=3, per_device_train_batch_size=batch_size, gradient_accumulation_steps=2, max_grad_norm=1.0,
        logging_steps=3, **({"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}),
    )  # fmt: skip
    student, teacher = models(case)
    config = CONFIGS[case]
    if case != "tasks":
        rows = ragged_rows("causal" if case == "causal" else "classification", 48)
        trainer = DistillationTrainer(student, args, teacher=teacher, distillation=config, train_dataset=rows)
    else:
        students = {"a": student, "b": make("bert", seed=5)}
        set_dropout(students["b"], 0.0)
        trainer = MultiTaskTrainer(
            MultiTaskStudent(students),
            args,
            methods=[MultiTaskDistillation({task: Distillation(config, models(case)[1]) for task in students})],
            train_datasets={task: ragged_rows("c", 24, seed) for seed, task in enumerate(students)},
            collators=dict.fromkeys(students, default_collate),
        )
    trainer.train()
    return trainer


def outcome(trainer) -> dict:
    modules = trainer.methods[0].modules()
    return {
        "student": trainer.student.state_dict(),
        "projections": {name: module.state_dict() for name, module in modules.items()},
        "logs": {k: v for k, v in trainer.state.log_history[0].items() if k.startswith("loss_")},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name in CONFIGS:
        trained = train(name, folder, batch_size=2)
        assert trained.args.world_size == 2
        torch.save(outcome(trained), folder / f"{name}-{trained.args.process_index}.pt")
