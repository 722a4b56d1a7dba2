"""Calibration data in any of the usual forms as a list of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcompress.activations.documents import documents_of
from lmcompress.errors import LmcompressError

Batch = Mapping[str, Any]
"""Tensors by name, from a collator: ``input_ids``, ``attention_mask``, optionally ``labels``."""

ROWS_OF_A_BATCH = 8
"""Rows of a data set that are padded to one batch."""

_EXPECTED = (
    "a list of batches, each {'input_ids': (rows, length), 'attention_mask': (rows, length), ...}, one such batch "
    "(what a tokenizer returns), a DataLoader of them, or a tokenized datasets.Dataset"
)


def as_batches(given: Any) -> list[Batch]:
    """Batches from whatever holds them.

    Rows of a data set are padded on the right, :data:`ROWS_OF_A_BATCH` together, with an attention mask and labels of
    -100 there; columns that are not numbers are dropped.

    Args:
        given: a list or any iterable of batches, a ``DataLoader``, one batch (``BatchEncoding`` or dictionary), a
            ``datasets.Dataset`` or other data set of tokenized rows, or a list of such rows.

    Returns:
        The batches; those given as tensors are unchanged.

    Raises:
        LmcompressError: If it is none of these; the message says what is expected.
    """
    named = isinstance(given, Mapping) and bool(given) and all(hasattr(v, "column_names") for v in given.values())
    if isinstance(given, (Tensor, str, bytes)) or named or not _holds_many(given):
        raise LmcompressError(f"batches must be {_EXPECTED}; got {_described(given)}")
    if isinstance(given, Mapping):
        given = [given]
    elif not hasattr(given, "__iter__"):
        # a data set of torch, which is indexed up to its length
        given = [given[index] for index in range(len(given))]
    tabular = hasattr(given, "column_names")
    items = list(given)
    for item in items:
        if not isinstance(item, Mapping):
            raise LmcompressError(f"batches must be {_EXPECTED}; got {type(given).__name__} of {_described(item)}")
    if items and (tabular or _is_row(items[0])):
        return [_collated(items[i : i + ROWS_OF_A_BATCH]) for i in range(0, len(items), ROWS_OF_A_BATCH)]
    return [_tensors(item) for item in items]


def _holds_many(given: Any) -> bool:
    return hasattr(given, "__iter__") or (hasattr(given, "__len__") and hasattr(given, "__getitem__"))


def _is_row(item: Mapping[str, Any]) -> bool:
    ids = item.get("input_ids")
    if isinstance(ids, Tensor):
        return ids.dim() == 1
    return isinstance(ids, Sequence) and bool(ids) and not isinstance(ids[0], (Sequence, Tensor))


def _tensors(batch: Mapping[str, Any]) -> Batch:
    """A batch whose lists and arrays are tensors."""
    ids = batch.get("input_ids")
    if isinstance(ids, Sequence) and ids and isinstance(ids[0], Sequence):
        # what a tokenizer returns without return_tensors="pt"
        columns = {
            name: value for name, value in batch.items() if isinstance(value, Sequence) and len(value) == len(ids)
        }
        return _collated([{name: value[row] for name, value in columns.items()} for row in range(len(ids))])
    if all(isinstance(value, Tensor) for value in batch.values()):
        return batch
    return {name: value if (tensor := _tensor(value)) is None else tensor for name, value in batch.items()}


def _collated(rows: Sequence[Mapping[str, Any]]) -> Batch:
    if "text" in rows[0] and "input_ids" not in rows[0]:
        raise LmcompressError(f"batches must be {_EXPECTED}; got rows of text: tokenize them first (dataset.map)")
    read = [{name: tensor for name, value in row.items() if (tensor := _tensor(value)) is not None} for row in rows]
    names = [name for name in read[0] if all(name in row for row in read)]
    if not names:
        raise LmcompressError(f"batches must be {_EXPECTED}; got rows without numbers: {', '.join(rows[0])}")
    if "input_ids" in names and "attention_mask" not in names:
        read = [row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in read]
        names.append("attention_mask")
    return {name: _stacked([row[name] for row in read], -100 if name == "labels" else 0) for name in names}


def _stacked(tensors: Sequence[Tensor], fill: int) -> Tensor:
    """One tensor of all; those of several lengths are padded on the right of their last axis."""
    if tensors[0].dim() == 0 or len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(list(tensors))
    longest = max(tensor.shape[-1] for tensor in tensors)
    return torch.stack([F.pad(tensor, (0, longest - tensor.shape[-1]), value=fill) for tensor in tensors])


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (str, bytes)) or value is None:
        return None
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _described(thing: Any) -> str:
    if isinstance(thing, Tensor):
        return f"a tensor {tuple(thing.shape)}: pass {{'input_ids': tensor, 'attention_mask': mask}}"
    if isinstance(thing, Mapping):
        return f"data sets by name ({', '.join(thing)}): pass one of them"
    return type(thing).__name__ if not isinstance(thing, str) else "text: tokenize it first"


def batches_for(model: nn.Module, given: Any) -> list[Batch]:
    """The same for a model, with one document in each row.

    Args:
        model: the model that will run; if it keeps packed documents apart (``position_ids`` that start again), each
            gets a row of its own.
        given: as for :func:`as_batches`.

    Returns:
        The batches.

    Raises:
        LmcompressError: As :func:`as_batches`.
    """
    found = as_batches(given)
    packed = [documents_of(model, batch) for batch in found]
    return [batch if one is None else one.of_inputs(batch) for batch, one in zip(found, packed, strict=True)]
