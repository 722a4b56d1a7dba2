"""The number of weights each matrix loses, decided and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmcompress.errors import LmcompressError
from lmcompress.families import is_conv1d, refuse_foreign
from lmcompress.families.foreign import refuse_packed
from lmcompress.families.weights import Weighted, rules_by_path, weighted_modules
from lmcompress.pruning.unstructured.config import SparsityConfig
from lmcompress.pruning.unstructured.patterns import Blocks, NOfM, Unstructured, keep_in_rows, masks_of


@dataclass(frozen=True, eq=False)
class Planned:
    """A matrix that will lose weights.

    Attributes:
        at: its location.
        weight: the parameter, as stored.
        sparsity: share to prune, or None if ``quality`` determines it.
        quality: threshold in standard deviations.
        pooled: whether it is compared with all other pooled matrices.
    """

    at: Weighted
    weight: nn.Parameter
    sparsity: float | None
    quality: float | None
    pooled: bool

    @property
    def path(self) -> str:
        """Path of its module."""
        return self.at.path

    def matrix(self, stored: Tensor) -> Tensor:
        """The stored weight as ``(out, in)``; for a convolution ``(filters, channels × height × width)``.

        Args:
            stored: tensor of the parameter's shape.

        Returns:
            A view if possible.
        """
        return stored.t() if is_conv1d(self.at.module) else stored.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`.

        Args:
            matrix: ``(out, in)``.

        Returns:
            Same shape as the parameter, contiguous.
        """
        turned = matrix.t() if is_conv1d(self.at.module) else matrix
        return turned.reshape(self.weight.shape).contiguous()


def plan(model: nn.Module, config: SparsityConfig) -> tuple[list[Planned], dict[str, str]]:
    """Decide the share each matrix loses; nothing is changed.

    Args:
        model: a ``PreTrainedModel`` or any other module; one on ``meta`` is checked except for its values.
        config: the configuration.

    Returns:
        The matrices to prune, in the order of the model, and path to reason for the others.

    Raises:
        LmcompressError: If a rule matches nothing, a matrix is packed or computed by another module, the pattern does
            not divide one, a weight is NaN or infinite, or nothing would be pruned.
    """
    refuse_packed(model, "prune the weights of")
    refuse_foreign(model, "prune the weights of")
    candidates = weighted_modules(model)
    rules = rules_by_path(candidates, config.rules)
    by_pattern = isinstance(config.pattern, NOfM)
    planned: list[Planned] = []
    untouched: dict[str, str] = {}
    for candidate in candidates:
        own = rules.get(candidate.path)
        if own is None and not candidate.default:
            untouched[candidate.path] = "not chosen by default; a rule that names it would prune it"
            continue
        asked = config if own is None else own
        if asked.sparsity is None and asked.quality is None and not (by_pattern and own is None):
            untouched[candidate.path] = "the config leaves it as it is"
            continue
        pooled = own is None and scope_of(config) == "global" and asked.quality is None and not by_pattern
        sparsity = 1.0 if by_pattern else asked.sparsity
        one = Planned(candidate, _weight(candidate), sparsity, asked.quality, pooled)
        _check(one, config)
        planned.append(one)
    if not any(one.quality is not None or _removed(one) for one in planned):
        if planned and all(one.sparsity == 0 for one in planned):
            return planned, untouched
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(untouched.items())[:4])
        reasons = reasons or "it has no matrices, or small ones"
        raise LmcompressError(f"no weight of this {type(model).__name__} would be removed: {reasons}")
    return planned, untouched


def scope_of(config: SparsityConfig) -> str:
    """The scope of the comparison, including the default.

    Args:
        config: the configuration.

    Returns:
        ``global``, ``layer`` or ``row``.
    """
    if config.scope is None and not isinstance(config.pattern, Unstructured):
        return "layer" if config.chosen_criterion.scope == "row" else config.chosen_criterion.scope
    return config.scope or config.chosen_criterion.scope


def pools(planned: Sequence[Planned]) -> list[list[int]]:
    """Numbers of the matrices that are compared with one another.

    Args:
        planned: all matrices.

    Returns:
        Lists of their numbers; each matrix is in one.
    """
    together = [number for number, one in enumerate(planned) if one.pooled]
    return [*([together] if together else []), *([n] for n, one in enumerate(planned) if not one.pooled)]


def choose(planned: Sequence[Planned], config: SparsityConfig, scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """Masks from scores, for matrices whose share is given.

    Args:
        planned: the matrices.
        config: configuration with pattern and scope.
        scores: scores of each, ``(out, in)``.
        share: share of the way to the target.

    Returns:
        For each a bool ``(out, in)``, True where the weight is kept.

    Raises:
        LmcompressError: If a score is NaN.
    """
    masks: list[Tensor] = [torch.empty(0)] * len(planned)
    by_row = scope_of(config) == "row"
    for numbers in pools(planned):
        wanted = (planned[numbers[0]].sparsity or 0.0) * share
        chosen = [scores[number] for number in numbers]
        try:
            if by_row and isinstance(config.pattern, Unstructured):
                # rows of one matrix at once: every row loses the same number
                found = [_by_rows(one, wanted) for one in chosen]
            else:
                found = masks_of(chosen, wanted, config.pattern)
        except LmcompressError as error:
            raise LmcompressError(f"{planned[numbers[0]].path}: {error}") from error
        for number, mask in zip(numbers, found, strict=True):
            masks[number] = mask
    return masks


def _by_rows(scores: Tensor, sparsity: float) -> Tensor:
    return keep_in_rows(scores, scores.shape[1] - round(sparsity * scores.shape[1]))


def _weight(candidate: Weighted) -> nn.Parameter:
    # the parameter itself, even if the attribute returns something computed from it, such as quantized values
    stored = candidate.module._parameters.get("weight")
    return candidate.weight if stored is None else stored


def _check(one: Planned, config: SparsityConfig) -> None:
    weight, module = one.weight.detach(), one.at.module
    if not weight.is_floating_point():
        raise LmcompressError(f"{one.path} must have numbers to remove, got {weight.dtype}: it is packed already")
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise LmcompressError(f"weights of {one.path} must be finite, got NaN or infinity")
    out, inputs = one.matrix(weight).shape
    pattern = config.pattern
    rows, columns = (pattern.rows, pattern.columns) if isinstance(pattern, Blocks) else (1, 1)
    columns = pattern.m if isinstance(pattern, NOfM) else columns
    if out % rows or inputs % columns:
        raise LmcompressError(
            f"{one.path} must consist of groups of {rows} × {columns}, got {out} × {inputs}; leave it out by a rule"
        )
    looks_at_inputs = config.compensation or config.chosen_criterion.needs == "inputs"
    if looks_at_inputs and isinstance(module, nn.Conv2d) and module.groups > 1:
        raise LmcompressError(
            f"{one.path} must have one group for a criterion that uses inputs, got {module.groups}; leave it out "
            "by a rule"
        )


def _removed(one: Planned) -> int:
    return round((one.sparsity or 0.0) * one.weight.numel())
