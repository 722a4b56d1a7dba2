"""Weights of classes in the loss on the labels, for classes that are not equally frequent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lmcompress.data import TaskData, TaskKind
from lmcompress.data.columns import arrow_column
from lmcompress.errors import LmcompressError, argument
from lmcompress.evaluation.metrics import IGNORED_LABEL

UNBALANCED = 3.0
"""Classes are unbalanced if the most frequent one has this many times the rows of the rarest, or more."""

_OF_CLASSES = (TaskKind.CLASSIFICATION, TaskKind.TOKEN_CLASSIFICATION)


class WeightedLoss:
    """Cross-entropy in which every label counts by the weight of its class, as ``compute_loss_func`` of a trainer.

    It is the sum over the micro-batch divided by the number of labels of the optimizer step, not by the sum of their
    weights as in :class:`torch.nn.CrossEntropyLoss`: the same for every division into micro-batches, and a step
    without the rare class is not scaled up. On all rows the two are equal, as the weights are scaled to a mean of 1
    over the labels of the training rows.

    Args:
        weights: one for each class.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = torch.tensor(list(weights), dtype=torch.float32)

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a micro-batch.

        Args:
            outputs: of a model, with ``logits`` ``(..., classes)``.
            labels: ``(...)`` int64; -100 is left out.
            num_items_in_batch: labels of the optimizer step; None: those of this batch.

        Returns:
            0-d float32.
        """
        logits = outputs["logits"].float()
        flat = labels.to(logits.device).reshape(-1)
        total = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            flat,
            weight=self.weights.to(logits.device),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        )
        count = (flat != IGNORED_LABEL).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def class_weights(data: TaskData, asked: Literal["balanced"] | Sequence[float] | None) -> tuple[float, ...] | None:
    """The weight of each class, scaled to a mean of 1 over the labels of the training rows.

    Args:
        data: rows of a task with one class for each row or word.
        asked: ``"balanced"``: in inverse proportion to how often a class occurs; or one for each class.

    Returns:
        None if none are asked for.

    Raises:
        LmcompressError: If the task has no classes, there is not one weight for each, or no label has one above 0.
    """
    if asked is None:
        return None
    where, task = argument("task.class_weights"), data.task
    if task.kind not in _OF_CLASSES:
        raise LmcompressError(f"{where} are for classes; {task.name} is a {task.kind} task: leave them out")
    counts = label_counts(data)
    if asked == "balanced":
        # a class without rows has no loss that could be weighted
        weights = np.where(counts > 0, 1 / np.maximum(counts, 1), 0.0)
    else:
        weights = np.asarray(asked, dtype=np.float64)
        if len(weights) != task.num_labels:
            names = ", ".join(task.label_names or ())
            raise LmcompressError(
                f"{where} must be one for each of the {task.num_labels} classes ({names[:200]}), got {len(weights)}"
            )
    total = float(weights @ counts)
    if not (total > 0 and math.isfinite(total)):
        raise LmcompressError(f"{where} must be above 0 for a class that occurs in the training rows, got {asked}")
    return tuple((weights * counts.sum() / total).tolist())


def is_unbalanced(data: TaskData) -> bool:
    """Whether the classes of a task differ much in frequency, so that accuracy alone says little.

    Args:
        data: rows of any task; those of others than classes never are.
    """
    if data.task.kind not in _OF_CLASSES or data.task.label_column not in data.train.column_names:
        return False
    counts = label_counts(data)
    found = counts[counts > 0]
    return len(found) > 1 and float(found.max()) >= UNBALANCED * float(found.min())


def label_counts(data: TaskData) -> NDArray[np.int64]:
    """How often each class occurs in the training rows.

    Args:
        data: rows of a task with one class for each row or word.

    Returns:
        ``(classes,)``.
    """
    labels = arrow_column(data.train, str(data.task.label_column))
    if pa.types.is_list(labels.type) or pa.types.is_large_list(labels.type):
        labels = pc.list_flatten(labels)
    values = np.asarray(labels.to_numpy(), dtype=np.int64)
    return np.bincount(values[values >= 0], minlength=data.task.num_labels).astype(np.int64)
