"""Straight-through gradients of rounding, and the gradients of scales.

Without a gradient, and in graphs that are recorded for other runtimes, the same arithmetic runs as plain operations:
exporters drop outputs of autograd functions, and a traced graph with one cannot be saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmcompress.numerics.graphs import recording
from lmcompress.numerics.grids import Grid

SMALLEST_SCALE = 1e-5
"""Lower bound of a learned scale, as in BiT's and ParetoQ's code; an optimizer may step below 0."""

Inside = Literal["rounding", "level", "zero"]
"""The gradient that a number within the range gives its unit: see :class:`Rule`."""


@dataclass(frozen=True)
class Rule:
    """The mapping of numbers onto a grid whose unit is learned, and its gradient.

    With u = x / unit, the code is the nearest to ``per_unit * u`` and the result ``(unit / per_unit) * code``. A number
    is *outside* where u <= low or u >= high.

    Attributes:
        grid: the codes.
        per_unit: number of codes per unit.
        low: lowest u that is not clipped, itself counted as outside.
        high: highest.
        inside: the derivative of the result by the unit for numbers inside, where q = code / per_unit:
            ``rounding`` q - u (straight through), ``level`` q (u counts as constant), ``zero`` none.
            Outside it is q.
        pass_outside: whether x gets the gradient of numbers outside as well.
        factor: multiplies the gradient of the unit.
    """

    grid: Grid
    per_unit: float
    low: float
    high: float
    inside: Inside = "rounding"
    pass_outside: bool = False
    factor: float = 1.0


class _FakeQuantize(torch.autograd.Function):
    """``(x, unit) -> (unit / per_unit * codes, codes)``; saves only its inputs and recomputes the codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, unit)
        ctx.rule = rule
        values, levels = _on_grid(x, unit, rule)
        ctx.mark_non_differentiable(levels)
        return values, levels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, unit = ctx.saved_tensors
        rule: Rule = ctx.rule
        u = x / _divisor(unit)
        outside = u.abs() >= rule.high if rule.low == -rule.high else (u <= rule.low) | (u >= rule.high)
        of_x = of_unit = None
        if ctx.needs_input_grad[0]:
            of_x = gradient if rule.pass_outside else gradient.masked_fill(outside, 0.0)
        if ctx.needs_input_grad[1]:
            slope = rule.grid.nearest(u * rule.per_unit).div_(rule.per_unit)
            if rule.inside == "rounding":
                slope = slope.sub_(u.masked_fill_(outside, 0.0))
            elif rule.inside == "zero":
                slope = slope.masked_fill_(~outside, 0.0)
            of_unit = slope.mul_(gradient).sum_to_size(unit.shape) * rule.factor
        return of_x, of_unit, None


class _StraightThrough(torch.autograd.Function):
    """``(x, result, outside) -> result``, whose gradient goes to ``x`` where it is not outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, result: Tensor, outside: Tensor | None) -> Tensor:
        ctx.save_for_backward(outside)
        return result.view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (outside,) = ctx.saved_tensors
        return (gradient if outside is None else gradient.masked_fill(outside, 0.0)), None, None


class _AtLeast(torch.autograd.Function):
    """``max(x, floor)`` whose gradient is 1 everywhere: with 0 below, a scale that fell would never rise again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, floor: float) -> Tensor:
        return x.clamp(min=floor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _LearnedAffine(torch.autograd.Function):
    """``(x, step, offset) -> (step * (codes - zero), codes, zero)`` with ``zero = -offset / step`` to the nearest."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, offset: Tensor, grid: Grid, factor: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, levels, zero = _on_affine_grid(x, step, offset, grid)
        ctx.save_for_backward(x, step, zero)
        ctx.grid, ctx.factor = grid, factor
        ctx.mark_non_differentiable(levels, zero)
        return values, levels, zero

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, step, zero = ctx.saved_tensors
        u = x / step
        below, above = u + zero <= ctx.grid.low, u + zero >= ctx.grid.high
        outside = below | above
        of_x = gradient.masked_fill(outside, 0.0) if ctx.needs_input_grad[0] else None
        of_step = of_offset = None
        if ctx.needs_input_grad[1]:
            end = above * float(ctx.grid.high) + below * float(ctx.grid.low)
            slope = torch.where(outside, end, u.round() - u)
            of_step = slope.mul_(gradient).sum_to_size(step.shape) * ctx.factor
        if ctx.needs_input_grad[2]:
            of_offset = (gradient * outside).sum_to_size(step.shape) * ctx.factor
        return of_x, of_step, of_offset, None, None


def fake_quantize(x: Tensor, unit: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Numbers on a grid, differentiable by them and by the unit.

    Args:
        x: float32.
        unit: float32 that broadcasts over ``x``; where it is 0 every result is 0.
        rule: the mapping.

    Returns:
        The results, and the codes as floats, without gradient.
    """
    return _FakeQuantize.apply(x, unit, rule) if _differentiable(x, unit) else _on_grid(x, unit, rule)


def straight_through(x: Tensor, result: Tensor, outside: Tensor | None = None) -> Tensor:
    """``result``, bit-exact, with the gradient passed to ``x`` except where ``outside`` (bool) is true."""
    return _StraightThrough.apply(x, result, outside) if _differentiable(x, result) else result


def at_least(x: Tensor, floor: float = SMALLEST_SCALE) -> Tensor:
    """``x`` as float32, no less than ``floor``, with a gradient of 1 everywhere."""
    return _AtLeast.apply(x.float(), floor) if _differentiable(x) else x.float().clamp(min=floor)


def learned_affine(x: Tensor, step: Tensor, offset: Tensor, grid: Grid, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers on an unsigned grid with a zero point, differentiable by numbers, step and offset.

    Args:
        x: float32.
        step: float32 > 0 that broadcasts over ``x``.
        offset: the number that the lowest code stands for; of ``step``'s shape.
        grid: the codes.
        factor: multiplies the gradients of step and offset.

    Returns:
        The results; codes and zero points as floats, without gradient.
    """
    if not _differentiable(x, step, offset):
        return _on_affine_grid(x, step, offset, grid)
    return _LearnedAffine.apply(x, step, offset, grid, factor)


def _divisor(unit: Tensor) -> Tensor:
    """The unit, or infinity where it is 0: then 0 / unit is 0, not NaN."""
    return torch.where(unit > 0, unit, torch.inf)


def _differentiable(*tensors: Tensor) -> bool:
    """Whether a gradient is needed, and may be."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors) and not recording()


def _on_grid(x: Tensor, unit: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    levels = rule.grid.nearest((x / _divisor(unit)).mul_(rule.per_unit), overwrite=True)
    return levels * (unit / rule.per_unit), levels


def _on_affine_grid(x: Tensor, step: Tensor, offset: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    zero = grid.nearest(-offset / step)
    levels = (x / step).round_().add_(zero).clamp_(grid.low, grid.high).add_(0.0)
    return (levels - zero).mul_(step), levels, zero
