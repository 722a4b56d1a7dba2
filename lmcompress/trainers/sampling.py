"""Rows of similar length in one batch, batches in random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments

POOL_BATCHES = 50


class LengthGroupedSampler(Sampler[int]):
    """An order of rows in which the rows of a batch are of similar length and the batches are in random order.

    Rows are shuffled, pooled by :data:`POOL_BATCHES` batches, sorted by length within the pool, split into batches, and
    the batches are shuffled. ``transformers``' sampler of the same purpose leaves the batches of a pool in descending
    order of length: short and long rows then alternate with a period of some fifty steps, and a BERT trained from
    scratch on short texts does not learn at all.

    The order depends only on the seed and the epoch, so a resumed run sees the same rows.

    Args:
        lengths: lengths of the rows, in tokens.
        batch_size: rows of one batch.
        seed: seed of the order.

    Raises:
        ValueError: If ``batch_size`` is below 1.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; accelerate calls this before each one.

        Args:
            epoch: counted from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # epochs and seeds must not share orders: seed 0, epoch 1 is not seed 1, epoch 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows = torch.randperm(len(self.lengths), generator=generator)
        pools = rows.split(POOL_BATCHES * self.batch_size)
        batches = [
            batch
            for pool in pools
            for batch in pool[self.lengths[pool].argsort(descending=True, stable=True)].split(self.batch_size)
        ]
        # only the last batch of the last pool can be short: it stays last, or all later ones would be misaligned
        short = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        order = torch.randperm(len(batches), generator=generator).tolist()
        for batch in [*(batches[i] for i in order), *short] if order else short:
            yield from batch.tolist()


def length_grouped(rows: Any, args: TrainingArguments) -> LengthGroupedSampler:
    """The sampler of a run's training rows, in batches of an optimizer step on one process.

    Args:
        rows: with ``input_ids``; a data set or a sequence of dictionaries.
        args: arguments of the run.
    """
    columns = getattr(rows, "column_names", None)
    ids = rows["input_ids"] if columns and "input_ids" in columns else (row["input_ids"] for row in rows)
    step_rows = args.train_batch_size * args.gradient_accumulation_steps
    return LengthGroupedSampler([len(row) for row in ids], step_rows, args.seed)
