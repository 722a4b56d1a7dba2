"""A model's logits on a data set, in row order, and their metrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.activations.running import batches_by_length, evaluating, with_progress
from lmcompress.data.windows import SPAN_LABELS
from lmcompress.errors import LmcompressError
from lmcompress.evaluation.metrics import Array, Ragged, compute_metrics, predictions_from_logits
from lmcompress.families import head_logits

Row: TypeAlias = Mapping[str, Any]
_LABELS = ("labels", *SPAN_LABELS)
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
    logits, labels = _predicted(model, dataset, collator, batch_size, progress, labelled=True)
    return logits, cast(Ragged, labels)


def predict_logits(
    model: PreTrainedModel, dataset: Rows, collator: Collator, batch_size: int = 32, progress: bool = True
) -> Ragged:
    """The logits of :func:`predict`, of rows that need no labels.

    Args:
        model: a model with logits in its output; those of a head of question answering are ``(batch, length, 2)``.
        dataset: see :func:`predict`.
        collator: see :func:`predict`.
        batch_size: rows per forward pass.
        progress: whether to show a bar, on a terminal.

    Returns:
        the logits, as :func:`predict` returns them.
    """
    return _predicted(model, dataset, collator, batch_size, progress, labelled=False)[0]


def _predicted(
    model: PreTrainedModel, dataset: Rows, collator: Collator, batch_size: int, progress: bool, *, labelled: bool
) -> tuple[Ragged, Ragged | None]:
    if len(dataset) == 0:
        raise LmcompressError("the data set must have rows, got none")
    batches = batches_by_length([len(dataset[index]["input_ids"]) for index in range(len(dataset))], batch_size)
    logits: list[Array] = []
    labels: list[Array] = []
    ragged = False
    accepted = set(inspect.signature(model.forward).parameters)
    with evaluating(model):
        for indices in with_progress(batches, "predict", enabled=progress):
            batch = {name: value.to(model.device) for name, value in collator([dataset[i] for i in indices]).items()}
            if labelled and "labels" not in batch:
                raise LmcompressError(f"the collator's batches must have 'labels', got {sorted(batch)}")
            batch_logits = _forward(model, batch, accepted)
            ragged = batch_logits.dim() == 3
            mask = batch.get("attention_mask") if ragged else None
            logits.extend(_rows(batch_logits.float(), mask))
            if labelled:
                labels.extend(_rows(batch["labels"], mask))
    back = np.argsort([index for indices in batches for index in indices]).tolist()
    return _in_order(logits, back, ragged), _in_order(labels, back, ragged) if labelled else None


def _in_order(values: Sequence[Array], order: Sequence[int], ragged: bool) -> Ragged:
    restored = [values[index] for index in order]
    return restored if ragged else np.stack(restored)


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


def _forward(model: PreTrainedModel, batch: dict[str, Tensor], accepted: set[str]) -> Tensor:
    # with labels the model would compute an unused loss, and fail on GLUE's hidden -1
    inputs = {name: value for name, value in batch.items() if name in accepted and name not in _LABELS}
    logits = head_logits(model(**inputs))
    if logits is None:
        raise LmcompressError(f"{type(model).__name__} does not return logits; load the model with its head")
    return logits


def _rows(values: Tensor, mask: Tensor | None) -> Sequence[Array]:
    if mask is None:
        return list(values.cpu().numpy())
    return [row[keep].cpu().numpy() for row, keep in zip(values, mask.bool(), strict=True)]
