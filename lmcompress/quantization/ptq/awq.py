"""Activation-aware scaling: important inputs get finer steps, and the preceding operation absorbs the inverse scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lmcompress.activations.hessian import output_error
from lmcompress.errors import LmcompressError
from lmcompress.families import Block, is_conv1d, out_features
from lmcompress.families.norms import is_norm, scaled_parameters
from lmcompress.quantization.ptq.gptq import Rounding

_LEAST_SHARE = 1e-4


def awq_scales(
    weights: Sequence[Tensor], magnitudes: Tensor, hessian: Tensor, roundings: Sequence[Rounding], *, steps: int = 20
) -> Tensor:
    r"""A scale for each input, for matrices that read the same inputs.

    .. math:: \min_\alpha \| (Q(W \mathrm{diag}(s)) \mathrm{diag}(s)^{-1} - W) X \|^2, \quad
        s_j = (\mathrm{mean} |x_j|)^\alpha, \quad \alpha \in \{0, 1/n, \ldots, 1\}

    α = 0 is plain rounding, so that on these inputs the result is never worse. The error is computed from H = XᵀX.

    Args:
        weights: each ``(out, in)``, floating.
        magnitudes: ``(in,)``, mean of the inputs' magnitudes; inputs of magnitude 0 keep scale 1. A lower bound is a
            ten thousandth of the largest.
        hessian: ``(in, in)``, Σ x xᵀ over the same inputs.
        roundings: rounding of each weight.
        steps: n.

    Returns:
        ``(in,)`` float32, > 0; largest times smallest is 1. Multiply the columns of the weights by it, and divide the
        inputs by it.

    Raises:
        LmcompressError: If there are no weights or no steps, or magnitudes have another shape, are negative or not
            finite.

    Note:
        The authors measure the error at the output of the whole sub-layer; here it is that of the matrices themselves.

    Reference:
        Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan & Han, *AWQ: Activation-aware Weight Quantization for LLM
        Compression and Acceleration*, MLSys 2024, https://arxiv.org/abs/2306.00978, section 3.2, equations 4 and 5.

    Example:
        >>> from lmcompress.numerics.quantizers.uniform import symmetric
        >>> weight, x = torch.tensor([[1.0, 0.1]]), torch.tensor([[0.1, 10.0]])
        >>> s = awq_scales([weight], x.abs()[0], x.T @ x, [lambda w: symmetric(w, bits=3)])
        >>> (symmetric(weight * s, bits=3).values / s * x).sum() - (weight * x).sum() < 0.01
        tensor(True)
    """
    if not weights or steps < 1:
        raise LmcompressError(f"there must be weights and at least one step, got {len(weights)} and {steps}")
    width = weights[0].shape[1]
    if magnitudes.shape != (width,) or not bool((magnitudes >= 0).all() & torch.isfinite(magnitudes).all()):
        raise LmcompressError(
            f"magnitudes must be {width} finite numbers >= 0, one of each input, got shape {tuple(magnitudes.shape)} "
            f"from {float(magnitudes.min()) if magnitudes.numel() else 'nothing'}"
        )
    sizes = magnitudes.detach().float()
    alive = sizes > 0
    if not bool(alive.any()):
        return torch.ones_like(sizes)
    sizes = torch.where(alive, sizes.clamp(min=_LEAST_SHARE * float(sizes.max())), 1.0)
    best, least = torch.ones_like(sizes), torch.inf
    for step in range(steps + 1):
        scales = _centred(sizes ** (step / steps), alive)
        error = sum(
            float(output_error(weight, rounding(weight.detach().float() * scales).values / scales, hessian).sum())
            for weight, rounding in zip(weights, roundings, strict=True)
        )
        if error < least:
            best, least = scales, error
    return best


Change = Callable[[nn.Parameter, Tensor], None]
"""``(parameter, new values)``: writes the values, float32 and of its shape, in the parameter's dtype."""


@dataclass(frozen=True)
class Scaling:
    """Matrices of a block with the same input, and the operation before them that can absorb its inverse scale.

    Attributes:
        parts: the family's names of the matrices.
        divide: divides their input, and nothing else, by scales ``(in,)``.
    """

    parts: tuple[str, ...]
    divide: Callable[[Tensor], None]


def scalings(block: Block, change: Change) -> list[Scaling]:
    """The inputs in a block that can be scaled without changing its output.

    Norms whose output nothing else reads (pre-LN) are divided in weight and bias, for all matrices that read it. The
    value projection is divided for the projection that reads the heads' output, in every family: each channel of that
    output is a weighted sum, over positions, of one row of the projection. In a gated feed-forward network the matrix
    that the gate multiplies is divided for the second one. If norms come last (post-LN), their output is the residual
    stream too, and no scale passes through an activation such as GELU: see :func:`why_unscaled`.

    Args:
        block: with heads and neurons, or cut.
        change: applies the changes.

    Returns:
        Those of norms first, in families that have them, then those of ``attention_out`` and ``ffn_out``.
    """
    offset = block.family.norm_offset
    found = []
    for norm, parts in _normalised(block):
        if norm is not None and parts and out_features(block.get(parts[0])):
            found.append(Scaling(parts, partial(_divide_norm, norm, offset, change)))
    if block.has("attention_out") and block.num_heads and block.queries == 1:
        part, rows = block.rows("value")
        found.append(Scaling(("attention_out",), partial(_divide_rows, block.get(part), rows, change)))
    if block.family.gated and block.ffn_width:
        # of a fused gate, what it multiplies comes last
        rows = torch.arange(block.ffn_width) + (block.family.ffn_in_copies - 1) * block.ffn_width
        found.append(Scaling(("ffn_out",), partial(_divide_rows, block.get("ffn_in"), rows, change)))
    return found


def why_unscaled(block: Block) -> dict[str, str]:
    """The parts of a block whose input gets no scale.

    Args:
        block: any block.

    Returns:
        Part to reason.
    """
    reasons = {} if block.family.gated else {"ffn_out": "no scale passes through the activation before it"}
    if block.has("attention_out") and block.queries > 1:
        reasons["attention_out"] = "several query heads read one value, whose scales would have to be equal"
    for norm, parts in _normalised(block):
        if norm is None:
            reasons |= dict.fromkeys(parts, "its input is the residual stream too, which cannot take a scale")
    return reasons


def multiply_columns(module: nn.Module, scales: Tensor, change: Change) -> None:
    """Multiply the weights of a ``Linear`` or ``Conv1D`` by input scales.

    Args:
        module: any of the two.
        scales: ``(in,)``.
        change: applies the change.
    """
    weight = module.get_parameter("weight")
    change(weight, weight.detach().float() * (scales[:, None] if is_conv1d(module) else scales))


def _normalised(block: Block) -> list[tuple[nn.Module | None, tuple[str, ...]]]:
    """For attention and the feed-forward network: the norm that nothing else reads, and the matrices that read it.

    None where there is no such norm, or one without a scale that could be divided.
    """
    family, found = block.family, []
    for path, parts in ((family.attention_norm, block.readers("attention")), (family.ffn_norm, block.readers("ffn"))):
        norm = block.module.get_submodule(path) if path else None
        there = norm is not None and is_norm(norm) and norm._parameters.get("weight") is not None
        found.append((norm if there else None, parts))
    return found


def _divide_norm(norm: nn.Module, offset: float, change: Change, scales: Tensor) -> None:
    for parameter, values in scaled_parameters(norm, lambda values: values / scales, offset):
        change(parameter, values)


def _divide_rows(module: nn.Module, rows: Tensor, change: Change, scales: Tensor) -> None:
    factors = scales.new_ones(out_features(module))
    factors[rows.to(scales.device)] = scales
    weight = module.get_parameter("weight")
    change(weight, weight.detach().float() / (factors if is_conv1d(module) else factors[:, None]))
    if module.bias is not None:
        bias = module.get_parameter("bias")
        change(bias, bias.detach().float() / factors)


def _centred(sizes: Tensor, alive: Tensor) -> Tensor:
    """Scales whose largest times smallest is 1, and 1 for inputs that are always 0."""
    some = sizes[alive]
    return torch.where(alive, sizes / (some.max() * some.min()).sqrt(), 1.0)
