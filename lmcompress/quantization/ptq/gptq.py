"""Rounding whose error the weights not yet rounded compensate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmcompress.activations.hessian import check_hessian, exact, inverse_factor, output_error
from lmcompress.numerics.grids import Granularity, PerGroup
from lmcompress.numerics.packing import dequantize
from lmcompress.numerics.quantizers.base import Quantized

# columns whose errors reach one another at once
_FEW = 16

Rounding = Callable[[Tensor], Quantized]
"""``weight (out, in) -> Quantized``: a quantizer with its bits, granularity and state fixed."""


def gptq(
    weight: Tensor,
    hessian: Tensor,
    rounding: Rounding,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    order: bool = True,
) -> Quantized:
    r"""Rounds column by column; the remaining columns compensate the effect of each rounding on the output.

    With H = XᵀX of the inputs, :math:`H^{-1} = U^T U` and U upper triangular, for each column j in turn

    .. math:: e = (w_j - q_j) / U_{jj}, \qquad w_k \leftarrow w_k - e\, U_{jk} \quad (k > j)

    which is the update that minimizes :math:`\mathrm{tr}((W - Q) H (W - Q)^T)`. Columns of a block
    are fixed first, then all that follow at once.

    Rows for which plain rounding is better are rounded plainly, so that the result is never worse than
    ``rounding(weight)`` in the error of :func:`output_error`.

    Args:
        weight: ``(out, in)``, floating.
        hessian: ``(in, in)``, Σ x xᵀ over the module's inputs, any scale.
        rounding: returns grid, scales and zero points. With groups and no ``order`` it is called for each group, with
            weights that compensate earlier ones; otherwise once, for all.
        damping: fraction of the mean of H's diagonal that is added to the diagonal, > 0. It is multiplied by 10 until H
            is no longer singular.
        block_size: columns of a block; affects only speed. Whole groups, at least one.
        order: whether to begin with the largest inputs, which is better at few bits; scales are then those of the whole
            weight.

    Returns:
        Values and codes on ``rounding``'s grid.

    Raises:
        LmcompressError: If the Hessian has another shape, is not finite or is all zero, weights are NaN or infinite,
            or damping or block size is not above 0.

    Note:
        The authors set weights of inputs that are always 0 to 0; here they are rounded, since other data may have such
        inputs. They keep rows whose error grows, and compute the scales of a group that begins within a block from
        weights that are not up to date.

    Reference:
        Frantar, Ashkboos, Hoefler & Alistarh, *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
        Transformers*, ICLR 2023, https://arxiv.org/abs/2210.17323, algorithm 1, section 3.3; ``order`` is ``act-order``
        of https://github.com/IST-DASLab/gptq.

    Example:
        >>> from lmcompress.numerics.quantizers.uniform import symmetric
        >>> both = torch.ones(2, 2)  # two inputs that are always the same
        >>> gptq(torch.tensor([[1.0, 0.4, 0.4]]), torch.ones(3, 3), lambda w: symmetric(w, bits=2)).values.sum()
        tensor(2.)
    """
    check_hessian(weight, hessian, damping, block_size)
    plain = rounding(weight)
    columns = weight.shape[1]
    if weight.numel() == 0:
        return plain
    h = exact(hessian)
    ranked = torch.argsort(h.diagonal(), descending=True, stable=True) if order else torch.arange(columns).to(h.device)
    upper = inverse_factor(h[ranked][:, ranked], damping)
    state = _Columns(plain, rounding, exact(weight)[:, ranked], ranked, fresh=not order)
    size = state.block(block_size)
    for start in range(0, columns, size):
        end = min(start + size, columns)
        errors = state.round(start, end, upper)
        state.left[:, end:] -= errors @ upper[start:end, end:]
    return _better_rows(weight, h, plain, state.result())


class _Columns:
    """The columns in the order of rounding: the compensated weights, and the codes fixed so far."""

    def __init__(self, plain: Quantized, rounding: Rounding, left: Tensor, ranked: Tensor, *, fresh: bool) -> None:
        self.left = left
        self._plain, self._rounding, self._ranked = plain, rounding, ranked
        self._places = ranked.tolist()
        group = plain.granularity.size if isinstance(plain.granularity, PerGroup) else 0
        self._group, self._fresh = group, bool(group) and fresh
        self._scales = plain.scales.to(left.device).clone()
        self._zeros = None if plain.zero_points is None else plain.zero_points.to(left.device).clone()
        self._levels = torch.empty_like(left)
        self._steps = [self._step(group) for group in range(self._scales.shape[1])]

    def block(self, size: int) -> int:
        """Number of columns per block: whole groups, because their scales come from weights that are up to date."""
        return max(self._group, size // self._group * self._group) if self._fresh else size

    def round(self, start: int, end: int, upper: Tensor) -> Tensor:
        """Round columns from start to end; the errors, each over its U_jj, ``(out, end - start)``."""
        # transposed, so that a column is read from consecutive memory
        block = self.left[:, start:end].t().contiguous()
        errors, levels = torch.empty_like(block), torch.empty_like(block)
        for first in range(start, end, self._group if self._fresh else end - start):
            last = min(end, first + self._group) if self._fresh else end
            if self._fresh:
                self._rescale(first, block[first - start : last - start].t())
            # errors reach the columns behind these few in one product
            for few in range(first, last, _FEW):
                behind = min(few + _FEW, last)
                for j in range(few, behind):
                    at = j - start
                    levels[at], values = self._nearest(block[at], self._places[j])
                    errors[at] = (block[at] - values) / upper[j, j]
                    block[at + 1 : behind - start] -= torch.outer(upper[j, j + 1 : behind], errors[at])
                block[behind - start :] -= upper[few:behind, behind:end].t() @ errors[few - start : behind - start]
        self._levels[:, start:end] = levels.t()
        return errors.t()

    def result(self) -> Quantized:
        """The codes in the weight's order."""
        plain, device = self._plain, self._plain.scales.device
        levels = torch.empty_like(self._levels)
        levels[:, self._ranked] = self._levels
        return _quantized(
            plain,
            levels.float().to(device),
            self._scales.to(device),
            None if self._zeros is None else self._zeros.to(device),
        )

    def _rescale(self, start: int, weights: Tensor) -> None:
        group = self._rounding(weights.float().contiguous())
        place = start // self._group
        self._scales[:, place] = group.scales[:, 0].to(self._scales.device)
        if self._zeros is not None and group.zero_points is not None:
            self._zeros[:, place] = group.zero_points[:, 0].to(self._zeros.device)
        self._steps[place] = self._step(place)

    def _step(self, group: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scales, what to divide by, and zero points of one group."""
        # float32 scales, or the compensated error is not the error of the stored values
        scale = self._scales[:, group].contiguous()
        zero = None if self._zeros is None else self._zeros[:, group].double()
        return scale, torch.where(scale > 0, scale, torch.inf).double(), zero

    def _nearest(self, column: Tensor, place: int) -> tuple[Tensor, Tensor]:
        grid = self._plain.grid
        scale, divisor, zero = self._steps[place // self._group if self._group else 0]
        steps = column / divisor
        if zero is None:
            levels = grid.nearest(steps, overwrite=True)
            return levels, (levels.float() * scale).double()
        levels = steps.round_().add_(zero).clamp_(grid.low, grid.high)
        return levels, ((levels - zero).float() * scale).double()


def _better_rows(weight: Tensor, h: Tensor, plain: Quantized, compensated: Quantized) -> Quantized:
    """For each row the better of two, whose scales are either all per row or shared by all rows."""
    before, after = (output_error(weight, quantized.values, h) for quantized in (plain, compensated))
    keep = (after <= before).to(plain.scales.device)[:, None]
    per_row = len(plain.scales) == len(keep)
    zeros = compensated.zero_points
    return _quantized(
        plain,
        torch.where(keep, _flat(compensated), _flat(plain)),
        torch.where(keep, compensated.scales, plain.scales) if per_row else plain.scales,
        torch.where(keep, zeros, plain.zero_points) if per_row and zeros is not None else plain.zero_points,  # type: ignore[arg-type]
    )


def _flat(quantized: Quantized) -> Tensor:
    return quantized.levels.detach().reshape(quantized.values.shape)


def _quantized(like: Quantized, levels: Tensor, scales: Tensor, zero_points: Tensor | None) -> Quantized:
    granularity: Granularity = like.granularity
    values = dequantize(levels, scales, granularity=granularity, zero_points=zero_points)
    return Quantized(values, scales, zero_points, like.grid, granularity, granularity.split(levels), like.source)
