"""Rows of unequal length, matches of every unit, and plain gradient descent: what shows a wrong denominator."""

from __future__ import annotations

import torch
from torch import Tensor
from training import tiny_arguments
from transformers import TrainingArguments

from lmcompress.distillation import Match

ALL_UNITS = (
    Match(loss="hidden_mse", student=-1, teacher=-1),
    Match(loss="nst", student=(1, 1), teacher=(2, 2)),
    Match(loss="pkd", student=2, teacher=2),
    Match(loss="attention_ce", student=1, teacher=2, on="scores"),
)


def ragged_rows(kind: str, rows: int = 16, seed: int = 0) -> list[dict[str, Tensor]]:
    """Padded rows of unequal length and unequal numbers of labels: equal rows would hide a wrong denominator."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(rows):
        length = 3 + row % 6
        ids = torch.randint(5, 60, (10,), generator=generator)
        mask = (torch.arange(10) < length).long()
        item = {"input_ids": ids * mask, "attention_mask": mask}
        if kind == "causal":
            item["labels"] = torch.where(mask.bool(), ids, -100)
        elif kind == "regression":
            item["labels"] = torch.rand((), generator=generator)
        else:
            item["labels"] = torch.randint(0, 3, (), generator=generator)
        made.append(item)
    return made


def arguments(tmp_path, **changes) -> TrainingArguments:
    plain = dict(max_steps=2, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0)
    return tiny_arguments(tmp_path, **(plain | changes))
