"""A model's logits on a data set, in row order, and their metrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.activations.running import evaluating, with_progress
from lmcompress.errors import LmcompressError
from lmcompress.evaluation.metrics import Array, Ragged, compute_metrics, predictions_from_logits

Row: TypeAlias = Mapping[str, Any]
Collator: TypeAlias = Callable[[list[Any]], Mapping[str, Tensor]]
"""``rows -> batch``, padded, with ``labels``."""


class Rows(Protocol):
    """The data sets accepted here: rows with ``input_ids``, accessed by number."""

    def __len__(self) -> int:
        """The number of rows."""

    def __getitem__(self, index: int, /) -> Any:
        """The row of that number."""


def predict(
    model: PreTrainedModel, dataset: Rows, collator: Collator, batch_size: int = 32, progress: bool = True
) -> tuple[Ragged, Ragged]:
    """Logits and labels of all rows, in order; rows of similar length share a batch, which saves padding.

    The model runs on its device, in evaluation mode; its modules' modes are restored afterwards.

    Args:
        model: a model with ``.logits`` in its output.
        dataset: rows for the collator, with ``input_ids``.
        collator: makes a batch of rows. The model receives the entries that its ``forward`` names, as in ``Trainer``,
            except ``labels``.
        batch_size: rows per forward pass.
        progress: whether to show a bar, on a terminal.

    Returns:
        ``(logits, labels)`` as arrays with a first axis of rows, logits in float32 ``(rows, classes)``. For logits of
        tokens, ``(batch, length, classes)`` in the model, both are lists with one array per row, without its padding.

    Raises:
        LmcompressError: If the data set is empty, batches have no labels, or the model returns no logits.
    """
    if len(dataset) == 0:
        raise LmcompressError("the data set must have rows, got none")
    if batch_size < 1:
        raise LmcompressError(f"batch_size must be >= 1, got {batch_size}")
    # longest first: a model that does not fit into memory fails at once
    order = sorted(range(len(dataset)), key=lambda index: -len(dataset[index]["input_ids"]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    logits: list[Array] = []
    labels: list[Array] = []
    ragged = False
    accepted = set(inspect.signature(model.forward).parameters)
    with evaluating(model):
        for indices in with_progress(batches, "predict", enabled=progress):
            batch = {name: value.to(model.device) for name, value in collator([dataset[i] for i in indices]).items()}
            batch_logits, batch_labels = _forward(model, batch, accepted)
            ragged = batch_logits.dim() == 3
            mask = batch.get("attention_mask") if ragged else None
            logits.extend(_rows(batch_logits.float(), mask))
            labels.extend(_rows(batch_labels, mask))
    back = np.argsort(order).tolist()
    restored = [logits[i] for i in back], [labels[i] for i in back]
    return restored if ragged else (np.stack(restored[0]), np.stack(restored[1]))


def evaluate_classifier(
    model: PreTrainedModel,
    dataset: Rows,
    collator: Collator,
    kind: str,
    metric_names: Iterable[str],
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, float]:
    """Metrics of a model on a data set: :func:`predict`, ``predictions_from_logits``, ``compute_metrics``.

    Args:
        model: see :func:`predict`.
        dataset: see :func:`predict`.
        collator: see :func:`predict`.
        kind: determines the predictions; see :func:`~lmcompress.evaluation.metrics.predictions_from_logits`.
        metric_names: see :func:`~lmcompress.evaluation.metrics.compute_metrics`.
        batch_size: rows per forward pass.
        progress: whether to show a bar, on a terminal.

    Returns:
        name to value.
    """
    logits, labels = predict(model, dataset, collator, batch_size, progress)
    return compute_metrics(metric_names, predictions_from_logits(logits, kind), labels)


def _forward(model: PreTrainedModel, batch: dict[str, Tensor], accepted: set[str]) -> tuple[Tensor, Tensor]:
    if "labels" not in batch:
        raise LmcompressError(f"the collator's batches must have 'labels', got {sorted(batch)}")
    # with labels the model would compute an unused loss, and fail on GLUE's hidden -1
    inputs = {name: value for name, value in batch.items() if name in accepted and name != "labels"}
    logits = getattr(model(**inputs), "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise LmcompressError(f"{type(model).__name__} does not return logits; load the model with its head")
    return logits, batch["labels"]


def _rows(values: Tensor, mask: Tensor | None) -> Sequence[Array]:
    if mask is None:
        return list(values.cpu().numpy())
    return [row[keep].cpu().numpy() for row, keep in zip(values, mask.bool(), strict=True)]
