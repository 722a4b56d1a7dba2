"""Scores of the weights of a model, from weights, gradients or inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcompress.activations.gradients import class_gradients, example_gradients
from lmcompress.activations.running import evaluating
from lmcompress.activations.walking import without_padding
from lmcompress.errors import LmcompressError
from lmcompress.pruning.unstructured.criteria import CRITERIA, Criterion
from lmcompress.pruning.unstructured.planning import Planned

Batch = Mapping[str, Tensor]
Take = Callable[[Tensor], None]
"""Called with a module's inputs: vectors ``(count, in)``, without padding; for an embedding ids ``(count,)``."""


def score(
    model: nn.Module,
    planned: Sequence[Planned],
    criterion: str | Criterion,
    batches: Iterable[Batch] | None,
    *,
    seed: int = 0,
) -> list[Tensor]:
    """Scores of the weights of some matrices.

    Args:
        model: the model.
        planned: its matrices to score.
        criterion: a name in :data:`~lmcompress.pruning.unstructured.criteria.CRITERIA`, ``module:attribute`` of a
            custom one, or a :class:`~lmcompress.pruning.unstructured.criteria.Criterion`; not ``sparsegpt``.
        batches: model inputs; with labels for criteria that need ``examples``.
        seed: seed of random scores.

    Returns:
        For each matrix ``(out, in)`` float32, on its device.

    Raises:
        LmcompressError: If data that the criterion needs are missing, its scores do not have the weights' shapes, or it
            has no scores in advance (``sparsegpt``).
    """
    chosen = CRITERIA.resolve(criterion)
    if chosen.needs_data and chosen.needs != "moments" and batches is None:
        raise LmcompressError(f"the criterion {chosen.name} must have data, got none; pass batches")
    generator = torch.Generator().manual_seed(seed)
    given: Iterable[Batch] = () if batches is None else batches
    if chosen.needs == "inputs":
        found = _by_inputs(model, planned, chosen, given)
    elif chosen.needs in ("examples", "classes"):
        found = _by_gradients(model, planned, chosen, given)
    else:
        arguments = (generator,) if chosen.needs == "nothing" else ()
        found = [one.matrix(chosen.function(one.weight.detach(), *arguments)) for one in planned]
    for one, scores in zip(planned, found, strict=True):
        if scores.shape != one.matrix(one.weight).shape:
            raise LmcompressError(
                f"scores by {chosen.name} of {one.path} must be {tuple(one.matrix(one.weight).shape)}, got "
                f"{tuple(scores.shape)}"
            )
    return found


def _by_gradients(
    model: nn.Module, planned: Sequence[Planned], criterion: Criterion, batches: Iterable[Batch]
) -> list[Tensor]:
    weights = [one.weight for one in planned]
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    by_class = criterion.needs == "classes"
    found = class_gradients(model, weights, batches) if by_class else _unweighted(model, weights, batches)
    for factor, gradients in found:
        for total, weight, gradient in zip(totals, weights, gradients, strict=True):
            total.add_(criterion.function(weight.detach(), gradient), alpha=factor)
    if (finish := criterion.finish) is not None:
        totals = [finish(weight.detach(), total) for weight, total in zip(weights, totals, strict=True)]
    return [one.matrix(total) for one, total in zip(planned, totals, strict=True)]


def _unweighted(
    model: nn.Module, weights: Sequence[nn.Parameter], batches: Iterable[Batch]
) -> Iterable[tuple[float, list[Tensor]]]:
    return ((1.0, gradients) for gradients in example_gradients(model, weights, batches))


def _by_inputs(
    model: nn.Module, planned: Sequence[Planned], criterion: Criterion, batches: Iterable[Batch]
) -> list[Tensor]:
    squares = [_Squares(one) for one in planned]
    look(model, {one.at.module: own.take for one, own in zip(planned, squares, strict=True)}, batches)
    return [
        criterion.function(one.matrix(one.weight.detach()), own.total.sqrt())
        for one, own in zip(planned, squares, strict=True)
    ]


class _Squares:
    """Sums of squares of a module's inputs; for an embedding, the number of occurrences of each token."""

    def __init__(self, planned: Planned) -> None:
        matrix = planned.matrix(planned.weight.detach())
        self._embedding = isinstance(planned.at.module, nn.Embedding)
        shape = (len(matrix), 1) if self._embedding else (matrix.shape[1],)
        self.total = torch.zeros(shape, device=matrix.device)

    def take(self, x: Tensor) -> None:
        if self._embedding:
            self.total += torch.bincount(x, minlength=len(self.total))[:, None]
        else:
            self.total += x.float().square().sum(dim=0)


def look(model: nn.Module, takes: Mapping[nn.Module, Take], batches: Iterable[Batch]) -> None:
    """Run a model in evaluation mode and pass on the inputs of modules.

    Args:
        model: any model.
        takes: receivers by module.
        batches: model inputs; labels are ignored, and so is padding if there is an
            ``attention_mask``.

    Raises:
        LmcompressError: If there are no batches.
    """
    device = next(model.parameters()).device
    mask: Tensor | None = None

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        takes[module](vectors(module, args[0].detach(), mask))

    handles = [module.register_forward_pre_hook(hook) for module in takes]
    seen = 0
    try:
        with evaluating(model):
            for batch in batches:
                tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
                mask = tensors["attention_mask"].bool() if "attention_mask" in tensors else None
                model(**tensors)
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise LmcompressError("calibration data must have at least one batch, got none; was a generator used up?")


def vectors(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """A module's input, as the vectors that its matrix is multiplied by.

    Args:
        module: a ``Linear``, ``Conv1D``, ``Embedding`` or ``Conv2d`` of one group.
        x: its input.
        mask: ``(rows, length)``, or None.

    Returns:
        ``(count, in)``; for a convolution its patches; for an embedding ids ``(count,)``.
    """
    if isinstance(module, nn.Embedding):
        return x[mask] if mask is not None and x.shape == mask.shape else x.reshape(-1)
    if isinstance(module, nn.Conv2d):
        if isinstance(module.padding, str):
            raise LmcompressError(f"the padding of a convolution must be numbers here, got {module.padding!r}")
        patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return x.reshape(-1, x.shape[-1]) if mask is None else without_padding(x, mask)
