"""Weight quantizers whose scale is a parameter: dynamic scaling, PACT, LSQ and ParetoQ's elastic grids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmcompress.numerics._straight_through import Rule, at_least
from lmcompress.numerics.grids import (
    BINARY_GRID,
    PER_TENSOR,
    STRETCHED_GRID,
    Bits,
    Granularity,
    check_bits,
    max_abs,
    mean_abs,
    signed_grid,
    symmetric_grid,
)
from lmcompress.numerics.quantizers.base import WITH_ZERO, Quantized, by_rule, check_finite, check_state, clipped


def dynamic_scaling(
    weight: Tensor, gamma: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR, pass_outside: bool = True
) -> Quantized:
    r"""Module-wise dynamic scaling: a clip that is a learned multiple of the mean magnitude.

    .. math:: w_q = \alpha\, Q(\mathrm{clip}(w, -\alpha, \alpha) / \alpha), \quad \alpha = \gamma \cdot \|w\|_1 / N,
        \quad Q(u) = \mathrm{round}(n u) / n, \quad n = 2^{b-1} - 1

    .. math:: \frac{\partial \ell}{\partial \gamma} = \frac{\|w\|_1}{N} \sum_i \frac{\partial \ell}{\partial w_{q,i}}
        \begin{cases} Q(u_i) & |w_i| \ge \alpha \\ Q(u_i) - w_i / \alpha & |w_i| < \alpha \end{cases}

    so all weights contribute to γ's gradient, in proportion to the module's mean magnitude, which is constant: it has
    no gradient to the weight. 2 bits is ternary, with its thresholds at ±α/2.

    Args:
        weight: ``(out, in)`` or any other shape, floating.
        gamma: the state, float; values below 1e-5 count as 1e-5.
        bits: 2, 3, 4, 8 or ``"ternary"``.
        granularity: which weights share a γ.
        pass_outside: whether weights beyond ±α get the gradient of their quantized value, like those within; otherwise
            they get none, as with :func:`pact`.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: If bits are not supported, the state has another shape, or the group size does not divide the
            rows.

    Note:
        The paper only states that the weight's gradient is the quantized weight's, which is the default
        here. Public code of others (TSLD's) zeroes it beyond ±α, and passes a little through mean\|w\|.

    Reference:
        Tao, Hou, Zhang, Shang, Jiang, Liu, Luo & Wong, *Compression of Generative Pre-trained Language Models via
        Quantization*, ACL 2022, https://arxiv.org/abs/2203.10705, section 4.2.

    Example:
        >>> w = torch.tensor([[0.5, -1.5, 0.25, 1.75]])  # mean magnitude 1
        >>> dynamic_scaling(w, initial_gamma(w), bits=2).values
        tensor([[ 0., -1.,  0.,  1.]])
    """
    check_bits(bits, WITH_ZERO)
    alpha = at_least(check_state(gamma, weight, granularity, "gamma")) * mean_abs(weight, granularity)
    return clipped(weight, alpha, symmetric_grid(bits), granularity, inside="rounding", pass_outside=pass_outside)


def initial_gamma(weight: Tensor, *, bits: Bits | None = None, granularity: Granularity = PER_TENSOR) -> Tensor:
    """Ones: the clip of :func:`dynamic_scaling` starts at the mean magnitude.

    Args:
        weight: the weight.
        bits: unused, for a signature shared by all initial states.
        granularity: which weights share a γ.

    Returns:
        ``granularity.scale_shape(weight.shape)`` float32.

    Raises:
        LmcompressError: If weights are NaN or infinite, or the group size does not divide the rows.
    """
    check_finite(weight)
    return torch.ones(granularity.scale_shape(weight.shape), dtype=torch.float32, device=weight.device)


def pact(weight: Tensor, clip: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR) -> Quantized:
    r"""A learned clip whose gradient comes only from the weights it clips.

    .. math:: \frac{\partial \ell}{\partial \alpha} = \sum_{|w_i| \ge \alpha}
        \frac{\partial \ell}{\partial w_{q,i}} \mathrm{sign}(w_i)

    Clipped weights get no gradient, the others that of their quantized value. The grid is that of
    :func:`dynamic_scaling`.

    Args:
        weight: any shape, floating.
        clip: the state α, float; values below 1e-5 count as 1e-5.
        bits: 2, 3, 4, 8 or ``"ternary"``.
        granularity: which weights share a clip.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: If bits are not supported, the state has another shape, or the group size does not divide the
            rows.

    Note:
        The paper's is for non-negative activations; this is its symmetric form, which QuantGPT compares with.
        The paper's penalty on α is omitted.

    Reference:
        Choi, Wang, Venkataramani, Chuang, Srinivasan & Gopalakrishnan, *PACT: Parameterized Clipping Activation for
        Quantized Neural Networks*, 2018, https://arxiv.org/abs/1805.06085, section 3.

    Example:
        >>> pact(torch.tensor([[0.4, -3.0]]), torch.tensor([[0.5]]), bits=2).values
        tensor([[ 0.5000, -0.5000]])
    """
    check_bits(bits, WITH_ZERO)
    alpha = at_least(check_state(clip, weight, granularity, "the clip"))
    return clipped(weight, alpha, symmetric_grid(bits), granularity, inside="zero", pass_outside=False)


def initial_clip(weight: Tensor, *, bits: Bits | None = None, granularity: Granularity = PER_TENSOR) -> Tensor:
    """The largest magnitude: :func:`pact` starts with only the largest weight clipped, which gives the clip a gradient.

    Args:
        weight: any shape, floating.
        bits: unused, for a signature shared by all initial states.
        granularity: which weights share a clip.

    Returns:
        ``granularity.scale_shape(weight.shape)`` float32.

    Raises:
        LmcompressError: If weights are NaN or infinite, or the group size does not divide the rows.
    """
    check_finite(weight)
    return max_abs(weight, granularity)


def lsq(weight: Tensor, step: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR) -> Quantized:
    r"""Learned step size.

    .. math:: w_q = s \cdot \mathrm{round}(\mathrm{clip}(w / s, -Q_N, Q_P)), \quad Q_N = 2^{b-1}, Q_P = 2^{b-1} - 1

    .. math:: \frac{\partial w_q}{\partial s} = \frac{1}{\sqrt{N Q_P}} \begin{cases} -Q_N & w/s \le -Q_N \\
        \mathrm{round}(w/s) - w/s & -Q_N < w/s < Q_P \\ Q_P & w/s \ge Q_P \end{cases}

    The weight's gradient is that of its quantized value within the range, 0 outside.

    Args:
        weight: any shape, floating.
        step: the state s, float; values below 1e-5 count as 1e-5.
        bits: 2, 3, 4, 8, or ``"ternary"`` ({-1, 0, 1}).
        granularity: which weights share a step.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: If bits are not supported, the state has another shape, or the group size does not divide the
            rows.

    Note:
        N is the number of weights that share the step, so that the factor has the same effect for rows and groups as
        for tensors in the paper; ParetoQ's code uses the whole tensor's. The levels at 2 bits are -2, -1, 0, 1 times
        the step, as in the paper: bad for weights, use :func:`elastic`.

    Reference:
        Esser, McKinstry, Bablani, Appuswamy & Modha, *Learned Step Size Quantization*, ICLR 2020,
        https://arxiv.org/abs/1902.08153, equations 1 to 3, section 2.2 for the factor.

    Example:
        >>> lsq(torch.tensor([[0.7, -9.0]]), torch.tensor([[0.5]]), bits=3).values
        tensor([[ 0.5000, -2.0000]])
    """
    check_bits(bits, WITH_ZERO)
    grid = signed_grid(bits)
    rule = Rule(grid, 1.0, low=grid.low, high=grid.high, factor=_lsq_factor(weight, granularity, grid.high))
    return by_rule(weight, at_least(check_state(step, weight, granularity, "the step")), rule, granularity)


def initial_step(weight: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR) -> Tensor:
    r"""The paper's initial step for :func:`lsq`: :math:`2 \cdot \mathrm{mean}|w| / \sqrt{Q_P}`.

    Args:
        weight: any shape, floating.
        bits: 2, 3, 4, 8 or ``"ternary"``; a step belongs to its bits.
        granularity: which weights share a step.

    Returns:
        ``granularity.scale_shape(weight.shape)`` float32.

    Raises:
        LmcompressError: If bits are not supported, weights are NaN or infinite, or the group size does not divide the
            rows.

    Reference:
        Esser et al. 2020, https://arxiv.org/abs/1902.08153, section 2.1.
    """
    check_bits(bits, WITH_ZERO)
    check_finite(weight)
    return mean_abs(weight, granularity) * (2 / math.sqrt(signed_grid(bits).high))


def elastic(weight: Tensor, alpha: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR) -> Quantized:
    r"""ParetoQ's quantizer for each bit-width: a sign, stretched grids around 0, then LSQ.

    .. math:: w_q = \alpha \frac{\mathrm{round}(k \cdot \mathrm{clip}(w / \alpha, -0.99, 0.99) - h) + h}{k}

    ternary: :math:`k = 3/2, h = 0`, levels ±2/3 and 0 of α; 2 bits: :math:`k = 2, h = 1/2`, levels ±1/4 and ±3/4. At 1
    bit α·sign(w), with ±1 for the range. The gradient of α is that of :func:`lsq`, with :math:`Q_P = 1` in the factor;
    at 1 bit it is the sign only. At 3 and 4 bits this *is* :func:`lsq`, the state its step, initialized differently.

    Args:
        weight: any shape, floating.
        alpha: the state, float; values below 1e-5 count as 1e-5.
        bits: 1, ``"ternary"``, 2, 3 or 4.
        granularity: which weights share an α.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: If bits are not supported (the paper has no 8 bits), the state has another shape, or the group
            size does not divide the rows.

    Note:
        The factor counts the weights that share α, see :func:`lsq`. A weight of exactly 0 counts as positive at 1 bit,
        where the authors' code has a third level for it.

    Reference:
        Liu et al., *ParetoQ: Scaling Laws in Extremely Low-bit LLM Quantization*, 2025,
        https://arxiv.org/abs/2502.02631, stretched elastic quantization (SEQ); 1 bit: Liu et al., *BiT: Robustly
        Binarized Multi-distilled Transformer*, 2022, https://arxiv.org/abs/2205.13016, elastic binarization.

    Example:
        >>> elastic(torch.tensor([[0.1, -0.6, 2.0]]), torch.tensor([[1.0]]), bits=2).values
        tensor([[ 0.2500, -0.7500,  0.7500]])
    """
    check_bits(bits, (1, "ternary", 2, 3, 4))
    if bits in (3, 4):
        return lsq(weight, alpha, bits=bits, granularity=granularity)
    unit = at_least(check_state(alpha, weight, granularity, "alpha"))
    factor = _lsq_factor(weight, granularity, 1)
    if bits == 1:
        rule = Rule(BINARY_GRID, 1.0, low=-1.0, high=1.0, inside="level", factor=factor)
    elif bits == 2:
        rule = Rule(STRETCHED_GRID, 4.0, low=-0.99, high=0.99, factor=factor)
    else:
        rule = Rule(symmetric_grid("ternary"), 1.5, low=-0.99, high=0.99, factor=factor)
    return by_rule(weight, unit, rule, granularity)


def initial_elastic(weight: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR) -> Tensor:
    """ParetoQ's initial state: mean magnitude at 1 bit, the largest at ternary and 2, over the highest code at 3 and 4.

    Args:
        weight: any shape, floating.
        bits: 1, ``"ternary"``, 2, 3 or 4; a state belongs to its bits.
        granularity: which weights share a state.

    Returns:
        ``granularity.scale_shape(weight.shape)`` float32.

    Raises:
        LmcompressError: If bits are not supported, weights are NaN or infinite, or the group size does not divide the
            rows.

    Reference:
        The authors' code, https://github.com/facebookresearch/ParetoQ, ``train.py``.
    """
    check_bits(bits, (1, "ternary", 2, 3, 4))
    check_finite(weight)
    if bits == 1:
        return mean_abs(weight, granularity)
    greatest = max_abs(weight, granularity)
    return greatest / signed_grid(bits).high if bits in (3, 4) else greatest


def _lsq_factor(weight: Tensor, granularity: Granularity, greatest: int) -> float:
    sharing = weight.numel() / max(1, math.prod(granularity.scale_shape(weight.shape)))
    return 1 / math.sqrt(max(1.0, sharing) * greatest)
