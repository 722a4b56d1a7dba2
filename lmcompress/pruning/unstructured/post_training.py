"""Unstructured pruning without training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lmcompress.activations.batches import batches_for
from lmcompress.errors import LmcompressError
from lmcompress.families import inner_model
from lmcompress.model import CompressedModel, unwrapped
from lmcompress.pruning.unstructured.config import SparsityConfig
from lmcompress.pruning.unstructured.method import Batch, Sparsity
from lmcompress.pruning.unstructured.report import SparsityReport
from lmcompress.schedules import Iterative


def prune_weights(
    model: nn.Module | CompressedModel, config: SparsityConfig, batches: Iterable[Batch] | None = None
) -> SparsityReport:
    """Set single weights to zero without training: the schedules one_shot and iterative.

    With ``iterative``, each round scores the model with pruned weights at 0.

    Args:
        model: a ``PreTrainedModel`` or any other module; its weights are modified in place.
        config: the configuration; shares of training in its schedule are ignored.
        batches: model inputs, for criteria and compensation that need data; with labels for gradients; any form that
            :func:`~lmcompress.activations.batches.as_batches` takes.

    Returns:
        The result.

    Raises:
        LmcompressError: If the schedule needs training, data are missing, the criterion is a custom one without a
            name, or as :func:`~lmcompress.pruning.unstructured.planning.plan`; the model is then unchanged.
    """
    inner = inner_model(unwrapped(model))
    if config.trains:
        raise LmcompressError(
            f"the schedule {config.schedule.kind} needs training: use SparsityTrainer, or choose one_shot or iterative"
        )
    method = Sparsity(config, calibration=None if batches is None else batches_for(inner, batches))
    method.attach(inner)
    kept = [one.weight.detach().clone() for one in method.planned]
    rounds = config.schedule.rounds if isinstance(config.schedule, Iterative) else 1
    try:
        return method.prune_now(rounds)
    except BaseException:
        with torch.no_grad():
            for one, values in zip(method.planned, kept, strict=True):
                one.weight.copy_(values)
        raise
