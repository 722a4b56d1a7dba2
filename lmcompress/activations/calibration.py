"""Calibration batches in the form that criteria and repairs read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.activations.batches import Batch, batches_for
from lmcompress.activations.running import with_progress
from lmcompress.errors import LmcompressError

__all__ = ["Batch", "CalibrationData", "on_device", "rows_of", "without_padding_rows"]


def without_padding_rows(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a batch on a device, without rows that are padding throughout.

    Args:
        batch: ``input_ids`` or another input, optionally ``attention_mask`` and ``labels``; other types are dropped.
        device: the device.

    Returns:
        The batch, possibly without rows.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    mask = tensors.get("attention_mask")
    if mask is not None:
        real = mask.bool().flatten(1).any(dim=1)
        if not bool(real.all()):
            tensors = {k: v[real.to(v.device)] if v.dim() and len(v) == len(real) else v for k, v in tensors.items()}
    return {name: value.to(device) for name, value in tensors.items()}


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The tensors of a batch on a device.

    Args:
        batch: a batch; entries that are not tensors are dropped.
        device: the device.
    """
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}


def rows_of(batch: Mapping[str, Tensor]) -> int:
    """Number of examples in a batch, from its first tensor that has rows."""
    return next((len(value) for value in batch.values() if value.dim()), 0)


class CalibrationData:
    """Calibration batches on a model's device, without rows of padding, one document in each row; refuses empty data.

    Args:
        model: determines the device.
        batches: as for :func:`~lmcompress.activations.batches.batches_for`.
        progress: whether to show a bar, on a terminal.

    Raises:
        LmcompressError: If ``batches`` are of no known form.
    """

    def __init__(self, model: PreTrainedModel, batches: Iterable[Batch], progress: bool = False) -> None:
        self.model = model
        self.batches = batches_for(model, batches)
        self.progress = progress

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        real = 0
        for batch in with_progress(self.batches, "score", enabled=self.progress):
            kept = without_padding_rows(batch, self.model.device)
            if rows := rows_of(kept):
                real += rows
                yield kept
        if not self.batches:
            raise LmcompressError("calibration data must have at least one batch, got none; was a generator used up?")
        if not real:
            raise LmcompressError(
                f"calibration data must have tokens, got {len(self.batches)} batches of padding only; is "
                "attention_mask 1 for real tokens?"
            )
