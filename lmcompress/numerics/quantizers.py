r"""Weights on a few levels, as pure functions whose gradients go straight through.

Every quantizer is a function of the weight and, where it has one, of a state: what it has learned, or a range that was
chosen at the start. States and scales are matrices, ``granularity.scale_shape(weight.shape)``; all arithmetic is
float32 whatever the weight's dtype and the autocast. With n = 2^(b-1) - 1, m the mean of the magnitudes \|w\|, and
Q(u) = round(n·clip(u, ±1)) / n:

=================== ========================= ============================================ ===================== =======
quantizer           paper                     formula                                      state: its start      bits
=================== ========================= ============================================ ===================== =======
``dynamic_scaling`` Tao et al. 2022           α Q(w/α), α = γ·m; all weights teach γ       γ learned: 1          2 to 8
                    (QuantGPT), section 4.2
``pact``            Choi et al. 2018,         α Q(w/α); only weights that are cut teach α  α learned: max \|w\|  2 to 8
                    section 3
``lsq``             Esser et al. 2020,        s·round(clip(w/s, -n - 1, n))                s learned: 2m/√n      2 to 8
                    eq. 1-3
``elastic``         Liu et al. 2025           α times ±2/3, 0 (ternary); ±1/4, ±3/4 (2     α learned: max \|w\|, 1 to 4
                    (ParetoQ)                 bits); ±1 (1 bit); 3, 4 bits: ``lsq``        at 1 bit m
``laq``             Hou & Kwok 2018,          α b, with α and b in turn of the least       none                  1 to 8
                    section 3                 Σ d (w - αb)²
``twn``             Li et al. 2016,           ±(mean of the \|w\| > 0.7 m), or 0           none                  ternary
                    section 2
``tbt``             Liu et al. 2023           α Q(w/α), α = 4/3·m                          none                  ternary
``binary``          Rastegari et al. 2016,    m·sign(w)                                    none                  1
                    section 3.1
``symmetric``       Zafrir et al. 2019        α Q(w/α), α = max \|w\| now (``minmax``),   none, or α fixed:     2 to 8
                                              or given                                     ``percentile_clip``,
                                                                                           ``mse_clip``
``asymmetric``      Jacob et al. 2018,        s·(clip(round(w/s) + z, 0, 2^b - 1) - z)     none, or a range      2 to 8
                    eq. 1                                                                  fixed: ``…_limits``
=================== ========================= ============================================ ===================== =======

*2 to 8* is 2, 3, 4, 8 and ternary, which for the grids around 0 is the same as 2. Every quantizer takes every
granularity: :class:`PerTensor`, :class:`PerRow`, :class:`PerGroup`. The papers' own: QuantGPT one γ for each matrix and
for each row of the embedding; PACT, LSQ, LAQ, TWN the tensor; TBT, ParetoQ, binary the row.

**Packing is exact.** What comes back holds ``values`` and the codes, scales and zero points that they are made of;
:func:`lmcompress.numerics.packing.dequantize` gives the values again to the bit.

**NaN and infinite weights** pass into the values unseen, since to look costs a pass over every weight in every step and
a wait for the GPU; they are an error where a state is made and where codes are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError, nearest
from lmcompress.numerics._straight_through import Inside, Rule, at_least, fake_quantize, straight_through
from lmcompress.numerics.grids import (
    BINARY_GRID,
    PER_TENSOR,
    STRETCHED_GRID,
    Bits,
    Granularity,
    Grid,
    check_bits,
    extremes,
    max_abs,
    mean_abs,
    reduced,
    signed_grid,
    symmetric_grid,
    unsigned_grid,
)

_WITH_ZERO: tuple[Bits, ...] = ("ternary", 2, 3, 4, 8)
_TERNARY: tuple[Bits, ...] = ("ternary", 2)


@dataclass(frozen=True, eq=False)
class Quantized:
    """What a quantizer gives: the numbers, and what they are made of.

    Attributes:
        values: of the shape that came, float32, with gradient.
        scales: ``granularity.scale_shape(shape)`` float32, >= 0, without gradient.
        zero_points: the same shape, uint8, or ``None`` where the code 0 is the number 0.
        grid: what codes may be.
        granularity: which numbers share a scale.
        levels: the codes as floats, shaped as the granularity splits them; :attr:`codes` are these as bytes.
        source: what came, without gradient.
    """

    values: Tensor
    scales: Tensor
    zero_points: Tensor | None
    grid: Grid
    granularity: Granularity
    levels: Tensor
    source: Tensor

    @property
    def codes(self) -> Tensor:
        """The codes: the shape that came, int8 where some are negative, else uint8.

        Raises:
            LmcompressError: what came, or a scale, is NaN or infinite.
        """
        check_finite(self.source)
        if not bool(torch.isfinite(self.scales).all()):
            raise LmcompressError(
                "scales must be finite, got one that is not: a learned scale has diverged; lower the learning rate of "
                "the scales"
            )
        return self.levels.to(self.grid.dtype).reshape(self.values.shape)


def check_finite(x: Tensor, name: str = "weights") -> None:
    """Refuses NaN and infinity.

    Args:
        x: any floating tensor.
        name: what to call it in the error.

    Raises:
        LmcompressError: there are some.
    """
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        wrong = int((~finite).sum())
        raise LmcompressError(
            f"{name} must be finite to be quantized, got {wrong} of {x.numel()} that are NaN or infinite; "
            "has the training diverged, or the checkpoint overflowed in float16?"
        )


def dynamic_scaling(
    weight: Tensor, gamma: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR, pass_outside: bool = True
) -> Quantized:
    r"""Module-wise dynamic scaling: a clip that is a learned multiple of the mean magnitude.

    .. math:: w_q = \alpha\, Q(\mathrm{clip}(w, -\alpha, \alpha) / \alpha), \quad \alpha = \gamma \cdot \|w\|_1 / N,
        \quad Q(u) = \mathrm{round}(n u) / n, \quad n = 2^{b-1} - 1

    .. math:: \frac{\partial \ell}{\partial \gamma} = \frac{\|w\|_1}{N} \sum_i \frac{\partial \ell}{\partial w_{q,i}}
        \begin{cases} Q(u_i) & |w_i| \ge \alpha \\ Q(u_i) - w_i / \alpha & |w_i| < \alpha \end{cases}

    so all weights teach γ, in proportion to how great the module's weights are. The mean magnitude is data: it gives no
    gradient to the weight. 2 bits is ternary, with its thresholds at ±α/2.

    Args:
        weight: ``(out, in)`` or any other shape, floating.
        gamma: the state, float; γ counts as 1e-5 where it is less.
        bits: 2, 3, 4, 8 or ``"ternary"``.
        granularity: which weights share a γ.
        pass_outside: whether weights beyond ±α get the gradient of their quantized value, as those within; else they
            get none, as with :func:`pact`.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: other bits, a state of another shape, or a group size that does not divide.

    Note:
        The paper says no more of the weight's gradient than that it is the quantized weight's, which is the default
        here. Public code of others (TSLD's) cuts it beyond ±α, and lets a little through mean\|w\|.

    Reference:
        Tao, Hou, Zhang, Shang, Jiang, Liu, Luo & Wong, *Compression of Generative Pre-trained Language Models via
        Quantization*, ACL 2022, https://arxiv.org/abs/2203.10705, section 4.2.

    Example:
        >>> w = torch.tensor([[0.5, -1.5, 0.25, 1.75]])  # mean magnitude 1
        >>> dynamic_scaling(w, initial_gamma(w), bits=2).values
        tensor([[ 0., -1.,  0.,  1.]])
    """
    check_bits(bits, _WITH_ZERO)
    alpha = at_least(_checked(gamma, weight, granularity, "gamma")) * mean_abs(weight, granularity)
    return _clipped(weight, alpha, symmetric_grid(bits), granularity, inside="rounding", pass_outside=pass_outside)


def initial_gamma(weight: Tensor, *, bits: Bits | None = None, granularity: Granularity = PER_TENSOR) -> Tensor:
    """Ones: the clip of :func:`dynamic_scaling` starts at the mean magnitude.

    Args:
        weight: whose scales they are.
        bits: without effect, here so that all states are made alike.
        granularity: which weights share a γ.

    Returns:
        ``granularity.scale_shape(weight.shape)`` float32.

    Raises:
        LmcompressError: weights that are NaN or infinite, or a group size that does not divide.
    """
    check_finite(weight)
    return torch.ones(granularity.scale_shape(weight.shape), dtype=torch.float32, device=weight.device)


def pact(weight: Tensor, clip: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR) -> Quantized:
    r"""A learned clip that only the weights it cuts teach.

    .. math:: \frac{\partial \ell}{\partial \alpha} = \sum_{|w_i| \ge \alpha}
        \frac{\partial \ell}{\partial w_{q,i}} \mathrm{sign}(w_i)

    Weights that are cut get no gradient, the others that of their quantized value. The grid is that of
    :func:`dynamic_scaling`.

    Args:
        weight: any shape, floating.
        clip: the state α, float; counts as 1e-5 where it is less.
        bits: 2, 3, 4, 8 or ``"ternary"``.
        granularity: which weights share a clip.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: as :func:`dynamic_scaling`.

    Note:
        The paper's is for activations that are not negative; this is its symmetric form, which QuantGPT compares with.
        It puts a penalty on α, which is not here.

    Reference:
        Choi, Wang, Venkataramani, Chuang, Srinivasan & Gopalakrishnan, *PACT: Parameterized Clipping Activation for
        Quantized Neural Networks*, 2018, https://arxiv.org/abs/1805.06085, section 3.

    Example:
        >>> pact(torch.tensor([[0.4, -3.0]]), torch.tensor([[0.5]]), bits=2).values
        tensor([[ 0.5000, -0.5000]])
    """
    check_bits(bits, _WITH_ZERO)
    alpha = at_least(_checked(clip, weight, granularity, "the clip"))
    return _clipped(weight, alpha, symmetric_grid(bits), granularity, inside="zero", pass_outside=False)


def initial_clip(weight: Tensor, *, bits: Bits | None = None, granularity: Granularity = PER_TENSOR) -> Tensor:
    """The greatest magnitude: :func:`pact` starts with nothing cut but the greatest weight, which teaches the clip.

    Args:
        weight: any shape, floating.
        bits: without effect, here so that all states are made alike.
        granularity: which weights share a clip.

    Returns:
        ``granularity.scale_shape(weight.shape)`` float32.

    Raises:
        LmcompressError: weights that are NaN or infinite, or a group size that does not divide.
    """
    check_finite(weight)
    return max_abs(weight, granularity)


def lsq(weight: Tensor, step: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR) -> Quantized:
    r"""Learned step size.

    .. math:: w_q = s \cdot \mathrm{round}(\mathrm{clip}(w / s, -Q_N, Q_P)), \quad Q_N = 2^{b-1}, Q_P = 2^{b-1} - 1

    .. math:: \frac{\partial w_q}{\partial s} = \frac{1}{\sqrt{N Q_P}} \begin{cases} -Q_N & w/s \le -Q_N \\
        \mathrm{round}(w/s) - w/s & -Q_N < w/s < Q_P \\ Q_P & w/s \ge Q_P \end{cases}

    The weight's gradient is that of its quantized value within the range, 0 without.

    Args:
        weight: any shape, floating.
        step: the state s, float; counts as 1e-5 where it is less.
        bits: 2, 3, 4, 8, or ``"ternary"`` ({-1, 0, 1}).
        granularity: which weights share a step.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: as :func:`dynamic_scaling`.

    Note:
        N is the number of weights that share the step, so that the factor does for rows and groups what it does for
        tensors in the paper; ParetoQ's code has the whole tensor's there. The levels at 2 bits are -2, -1, 0, 1 times
        the step, as the paper has them: bad for weights, use :func:`elastic`.

    Reference:
        Esser, McKinstry, Bablani, Appuswamy & Modha, *Learned Step Size Quantization*, ICLR 2020,
        https://arxiv.org/abs/1902.08153, equations 1 to 3, section 2.2 for the factor.

    Example:
        >>> lsq(torch.tensor([[0.7, -9.0]]), torch.tensor([[0.5]]), bits=3).values
        tensor([[ 0.5000, -2.0000]])
    """
    check_bits(bits, _WITH_ZERO)
    grid = signed_grid(bits)
    rule = Rule(grid, 1.0, low=grid.low, high=grid.high, factor=_lsq_factor(weight, granularity, grid.high))
    return _learned(weight, at_least(_checked(step, weight, granularity, "the step")), rule, granularity)


def initial_step(weight: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR) -> Tensor:
    r"""The paper's first step for :func:`lsq`: :math:`2 \cdot \mathrm{mean}|w| / \sqrt{Q_P}`.

    Args:
        weight: any shape, floating.
        bits: 2, 3, 4, 8 or ``"ternary"``; a step belongs to its bits.
        granularity: which weights share a step.

    Returns:
        ``granularity.scale_shape(weight.shape)`` float32.

    Raises:
        LmcompressError: other bits, weights that are NaN or infinite, or a group size that does not divide.

    Reference:
        Esser et al. 2020, https://arxiv.org/abs/1902.08153, section 2.1.
    """
    check_bits(bits, _WITH_ZERO)
    check_finite(weight)
    return mean_abs(weight, granularity) * (2 / math.sqrt(signed_grid(bits).high))


def elastic(weight: Tensor, alpha: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR) -> Quantized:
    r"""ParetoQ's quantizer for each width: a sign, stretched grids around 0, then LSQ.

    .. math:: w_q = \alpha \frac{\mathrm{round}(k \cdot \mathrm{clip}(w / \alpha, -0.99, 0.99) - h) + h}{k}

    ternary: :math:`k = 3/2, h = 0`, levels ±2/3 and 0 of α; 2 bits: :math:`k = 2, h = 1/2`, levels ±1/4 and ±3/4. At 1
    bit α·sign(w), with ±1 for the range. The gradient of α is that of :func:`lsq`, with :math:`Q_P = 1` in the factor;
    at 1 bit it is the sign alone. At 3 and 4 bits this *is* :func:`lsq`, the state its step, with another start.

    Args:
        weight: any shape, floating.
        alpha: the state, float; counts as 1e-5 where it is less.
        bits: 1, ``"ternary"``, 2, 3 or 4.
        granularity: which weights share an α.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: as :func:`dynamic_scaling`; 8 bits, for which the paper has none.

    Note:
        The factor counts the weights that share α, see :func:`lsq`. A weight of exactly 0 counts as positive at 1 bit,
        where the authors' code makes a third level of it.

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
    unit = at_least(_checked(alpha, weight, granularity, "alpha"))
    factor = _lsq_factor(weight, granularity, 1)
    if bits == 1:
        rule = Rule(BINARY_GRID, 1.0, low=-1.0, high=1.0, inside="level", factor=factor)
    elif bits == 2:
        rule = Rule(STRETCHED_GRID, 4.0, low=-0.99, high=0.99, factor=factor)
    else:
        rule = Rule(symmetric_grid("ternary"), 1.5, low=-0.99, high=0.99, factor=factor)
    return _learned(weight, unit, rule, granularity)


def initial_elastic(weight: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR) -> Tensor:
    """ParetoQ's start: mean magnitude at 1 bit, the greatest at ternary and 2, over the greatest code at 3 and 4.

    Args:
        weight: any shape, floating.
        bits: 1, ``"ternary"``, 2, 3 or 4; a state belongs to its bits.
        granularity: which weights share one.

    Returns:
        ``granularity.scale_shape(weight.shape)`` float32.

    Raises:
        LmcompressError: other bits, weights that are NaN or infinite, or a group size that does not divide.

    Reference:
        The authors' code, https://github.com/facebookresearch/ParetoQ, ``train.py``.
    """
    check_bits(bits, (1, "ternary", 2, 3, 4))
    check_finite(weight)
    if bits == 1:
        return mean_abs(weight, granularity)
    greatest = max_abs(weight, granularity)
    return greatest / signed_grid(bits).high if bits in (3, 4) else greatest


def laq(
    weight: Tensor,
    state: None = None,
    *,
    bits: Bits,
    granularity: Granularity = PER_TENSOR,
    curvature: Tensor | None = None,
    iterations: int = 10,
) -> Quantized:
    r"""Loss-aware quantization: the scale and codes with the least (weighted) squared error, found in turns.

    .. math:: \min_{\alpha, b} \sum_i d_i (w_i - \alpha b_i)^2: \quad
        b = Q(w / \alpha), \quad \alpha = \frac{\sum_i d_i b_i w_i}{\sum_i d_i b_i^2}

    from :math:`b = \mathrm{sign}(w)`, until α moves by less than a thousandth. At 1 bit that is the first step alone.
    From 3 bits on, where ten turns from there do not arrive, they start at the best of eight between mean and greatest
    magnitude. The gradient goes straight through.

    Args:
        weight: any shape, floating.
        state: none.
        bits: 1, 2, 3, 4, 8 or ``"ternary"``.
        granularity: which weights share a scale.
        curvature: d, ``weight``'s shape, >= 0, such as the square root of Adam's second moments; ``None`` is 1
            everywhere, as in the public code.
        iterations: at most so many turns.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: other bits, a curvature of another shape or negative, or a group size that does not divide.

    Note:
        The public code (BinaryBERT's) divides by Σ d\|b\|. Where codes are only -1, 0 and 1 that is the same; with more
        levels it is no least-squares solution, and α shrinks turn by turn.

    Reference:
        Hou & Kwok, *Loss-aware Weight Quantization of Deep Networks*, ICLR 2018, https://arxiv.org/abs/1802.08635,
        section 3; 1 bit: Hou, Yao & Kwok, *Loss-aware Binarization of Deep Networks*, ICLR 2017,
        https://arxiv.org/abs/1611.01600.

    Example:
        >>> laq(torch.tensor([[2.0, -4.0, 0.5]]), bits=2).values
        tensor([[ 3., -3.,  0.]])
    """
    check_bits(bits, (1, *_WITH_ZERO))
    grid = BINARY_GRID if bits == 1 else symmetric_grid(bits)
    split = granularity.split(weight.float())
    w, d = split.detach(), None if curvature is None else _curvature(curvature, weight, granularity)
    axes = granularity.axes(w.dim())

    def total(x: Tensor) -> Tensor:
        return (x if d is None else d * x).sum(dim=axes, keepdim=True)

    # of all zeros, or of none, the mean is no number; their scale is 0
    alpha = (total(w.abs()) / total(torch.ones_like(w))).nan_to_num(nan=0.0)
    if grid.levels > 3:
        alpha = _best_start(w, alpha, granularity.spread(max_abs(weight, granularity), weight.shape), grid, total)
    for _ in range(0 if bits == 1 else iterations):
        b = _levels(w, alpha / grid.high, grid)
        square = total(b.square())
        better = torch.where(square > 0, total(b * w) / square * grid.high, alpha)
        settled = bool(((better - alpha).abs() <= 1e-3 * alpha).all())
        alpha = better
        if settled:
            break
    return _given(weight, split, _levels(w, alpha / grid.high, grid), alpha / grid.high, grid, granularity)


def twn(
    weight: Tensor, state: None = None, *, bits: Bits = "ternary", granularity: Granularity = PER_TENSOR
) -> Quantized:
    r"""Ternary weight networks: a threshold at 0.7 times the mean magnitude, and the mean of what is above.

    .. math:: \Delta = 0.7\, \mathrm{mean}|w|, \quad \alpha = \mathrm{mean}\{|w_i| : |w_i| > \Delta\}, \quad
        w_q \in \{-\alpha, 0, \alpha\}

    The gradient goes straight through.

    Args:
        weight: any shape, floating.
        state: none.
        bits: ``"ternary"``, or 2, which is the same.
        granularity: which weights share threshold and scale.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: other bits, or a group size that does not divide.

    Reference:
        Li, Zhang & Liu, *Ternary Weight Networks*, 2016, https://arxiv.org/abs/1605.04711, section 2.

    Example:
        >>> twn(torch.tensor([[2.0, -4.0, 0.0]])).values
        tensor([[ 3., -3.,  0.]])
    """
    check_bits(bits, _TERNARY)
    split = granularity.split(weight.float())
    w = split.detach()
    threshold = granularity.spread(0.7 * mean_abs(w.reshape(weight.shape), granularity), weight.shape)
    # for NaN neither holds; it must not turn into a 0
    levels = torch.where(w.isnan(), w, (w > threshold).float() - (w < -threshold).float())
    axes = granularity.axes(w.dim())
    count = levels.abs().sum(dim=axes, keepdim=True)
    scale = (levels * w).sum(dim=axes, keepdim=True) / count.clamp(min=1)
    return _given(weight, split, levels, scale, symmetric_grid("ternary"), granularity)


def tbt(
    weight: Tensor, state: None = None, *, bits: Bits = "ternary", granularity: Granularity = PER_TENSOR
) -> Quantized:
    r"""Ternary with a scale of 4/3 of the mean magnitude, and nothing to learn.

    .. math:: w_q = \alpha \cdot \mathrm{round}(\mathrm{clip}(w / \alpha, -1, 1)), \quad
        \alpha = \tfrac{4}{3}\, \mathrm{mean}|w|

    so thresholds lie at 2/3 of the mean: for weights spread evenly over a range, those of the least squared error. The
    gradient goes straight through.

    Args:
        weight: any shape, floating.
        state: none.
        bits: ``"ternary"``, or 2, which is the same.
        granularity: which weights share a scale; the paper's is :class:`PerRow`.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: other bits, or a group size that does not divide.

    Reference:
        Liu, Oguz, Pappu, Shi & Krishnamoorthi, *Binary and Ternary Natural Language Generation*, ACL 2023,
        https://arxiv.org/abs/2306.01841, and the authors' code,
        https://github.com/facebookresearch/Ternary_Binary_Transformer.

    Example:
        >>> tbt(torch.tensor([[1.5, -0.625, 0.125]])).values  # mean magnitude 3/4
        tensor([[ 1., -1.,  0.]])
    """
    check_bits(bits, _TERNARY)
    grid = symmetric_grid("ternary")
    split = granularity.split(weight.float())
    scale = granularity.spread(mean_abs(weight, granularity) * (4 / 3), weight.shape)
    return _given(weight, split, _levels(split.detach(), scale, grid), scale, grid, granularity)


def binary(weight: Tensor, state: None = None, *, bits: Bits = 1, granularity: Granularity = PER_TENSOR) -> Quantized:
    r"""The sign, times the mean magnitude: the scale of the least squared error. The gradient goes straight through.

    Args:
        weight: any shape, floating; 0 counts as positive.
        state: none.
        bits: 1.
        granularity: which weights share a scale.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: other bits, or a group size that does not divide.

    Reference:
        Rastegari, Ordonez, Redmon & Farhadi, *XNOR-Net*, ECCV 2016, https://arxiv.org/abs/1603.05279, section 3.1.

    Example:
        >>> binary(torch.tensor([[1.0, -3.0]])).values
        tensor([[ 2., -2.]])
    """
    check_bits(bits, (1,))
    split = granularity.split(weight.float())
    scale = granularity.spread(mean_abs(weight, granularity), weight.shape)
    return _given(weight, split, _levels(split.detach(), scale, BINARY_GRID), scale, BINARY_GRID, granularity)


def symmetric(
    weight: Tensor, clip: Tensor | None = None, *, bits: Bits, granularity: Granularity = PER_TENSOR
) -> Quantized:
    r"""Levels spaced evenly between ±α, which is the greatest magnitude now, or given.

    .. math:: w_q = s \cdot \mathrm{clip}(\mathrm{round}(w / s), -n, n), \quad s = \alpha / n, \quad n = 2^{b-1} - 1

    The gradient goes straight through, but for weights beyond a given clip. A clip is not learned: :func:`pact` learns.

    Args:
        weight: any shape, floating.
        clip: α, >= 0, such as :func:`percentile_clip` or :func:`mse_clip` gave it; ``None`` takes the greatest
            magnitude of this very weight (min-max).
        bits: 2, 3, 4, 8 or ``"ternary"``.
        granularity: which weights share a scale.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: other bits, a clip of another shape, or a group size that does not divide.

    Reference:
        Zafrir, Boudoukh, Izsak & Wasserblat, *Q8BERT*, 2019, https://arxiv.org/abs/1910.06188, section 2.

    Example:
        >>> symmetric(torch.tensor([[0.25, -1.4, 3.5]]), bits=4).values
        tensor([[ 0.0000, -1.5000,  3.5000]])
    """
    check_bits(bits, _WITH_ZERO)
    if clip is None:
        alpha, pass_outside = max_abs(weight, granularity), True
    else:
        alpha, pass_outside = _checked(clip, weight, granularity, "the clip").detach().float(), False
    return _clipped(weight, alpha, symmetric_grid(bits), granularity, inside="rounding", pass_outside=pass_outside)


def percentile_clip(
    weight: Tensor, *, bits: Bits | None = None, granularity: Granularity = PER_TENSOR, percentile: float = 99.9
) -> Tensor:
    """The least of the weights' magnitudes that ``percentile`` % of them do not exceed: a clip for :func:`symmetric`.

    Args:
        weight: any shape, floating.
        bits: without effect, here so that all states are made alike.
        granularity: which weights share a clip.
        percentile: above 0, at most 100, which is the greatest magnitude.

    Returns:
        ``granularity.scale_shape(weight.shape)`` float32.

    Raises:
        LmcompressError: a percentile that is none, weights that are NaN or infinite, or a group size that does not
            divide.

    Reference:
        McKinstry et al., *Discovering Low-Precision Networks Close to Full-Precision Networks*, 2018,
        https://arxiv.org/abs/1809.04191.

    Example:
        >>> percentile_clip(torch.tensor([[1.0, -2.0, 3.0, 100.0]]), percentile=75)
        tensor([[3.]])
    """
    check_percentile(percentile)
    check_finite(weight)
    return _per_scale(weight, granularity, lambda rows: _rank(rows.abs(), percentile))


def mse_clip(weight: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR) -> Tensor:
    """The clip with the least squared error: for :func:`symmetric`.

    Looks at shares of the greatest magnitude from 1 down to 1/64, each 16 % below the last, until errors rise, then at
    four on either side of the best, 4 % apart.

    Args:
        weight: any shape, floating.
        bits: 2, 3, 4, 8 or ``"ternary"``; a clip belongs to its bits.
        granularity: which weights share a clip.

    Returns:
        ``granularity.scale_shape(weight.shape)`` float32, never worse than the greatest magnitude.

    Raises:
        LmcompressError: other bits, weights that are NaN or infinite, or a group size that does not divide.

    Reference:
        Sung, Shin & Hwang, *Resiliency of Deep Neural Networks under Quantization*, 2015,
        https://arxiv.org/abs/1511.06488 (L2-error minimisation).
    """
    check_bits(bits, _WITH_ZERO)
    check_finite(weight)
    greatest = max_abs(weight, granularity)
    grid, split = symmetric_grid(bits), granularity.split(weight.detach().float())

    def error(share: Tensor) -> Tensor:
        scale = granularity.spread(greatest * share / grid.high, weight.shape)
        difference = _levels(split, scale, grid).mul_(scale).sub_(split).square_()
        return difference.mean(dim=granularity.axes(split.dim())).reshape(greatest.shape)

    return greatest * search_shares(error, torch.ones_like(greatest)) if weight.numel() else greatest


def asymmetric(
    weight: Tensor, limits: Tensor | None = None, *, bits: Bits, granularity: Granularity = PER_TENSOR
) -> Quantized:
    r"""Levels spaced evenly over a range that need not be centred, with a whole zero point.

    .. math:: w_q = s \cdot (\mathrm{clip}(\mathrm{round}(w / s) + z, 0, m) - z), \quad s = \frac{h - l}{m}, \quad
        z = \mathrm{round}(-l / s), \quad m = 2^b - 1

    The range is widened to hold 0, so that 0 stays 0 and products need whole numbers only. The gradient goes straight
    through, but for weights beyond a given range.

    Args:
        weight: any shape, floating.
        limits: ``(2, *granularity.scale_shape(weight.shape))``, l and h; ``None`` takes the least and greatest weight.
        bits: 2, 3, 4, 8 or ``"ternary"`` (three levels).
        granularity: which weights share a scale.

    Returns:
        Values, codes and zero points.

    Raises:
        LmcompressError: other bits, limits of another shape, or a group size that does not divide.

    Reference:
        Jacob et al., *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*,
        CVPR 2018, https://arxiv.org/abs/1712.05877, equation 1, section 3.

    Example:
        >>> asymmetric(torch.tensor([[-1.0, 0.1, 2.0]]), bits=2).values
        tensor([[-1.,  0.,  2.]])
    """
    check_bits(bits, _WITH_ZERO)
    if limits is None:
        low, high = extremes(weight, granularity)
        return affine(weight, low, high, unsigned_grid(bits), granularity, cut=False)
    expected = (2, *granularity.scale_shape(weight.shape))
    if tuple(limits.shape) != expected:
        raise LmcompressError(
            f"limits of weights of shape {tuple(weight.shape)} must have shape {expected}, got {tuple(limits.shape)}"
        )
    low, high = limits.detach().float()
    return affine(weight, low, high, unsigned_grid(bits), granularity, cut=True)


def percentile_limits(
    weight: Tensor, *, bits: Bits | None = None, granularity: Granularity = PER_TENSOR, percentile: float = 99.9
) -> Tensor:
    """A range for :func:`asymmetric`: of ``100 - percentile`` % of the weights one half lies below, one half above.

    Args:
        weight: any shape, floating.
        bits: without effect, here so that all states are made alike.
        granularity: which weights share a range.
        percentile: above 0, at most 100, which is least and greatest.

    Returns:
        ``(2, *granularity.scale_shape(weight.shape))`` float32.

    Raises:
        LmcompressError: as :func:`percentile_clip`.
    """
    check_percentile(percentile)
    check_finite(weight)
    each = 50 + percentile / 2
    low = _per_scale(weight, granularity, lambda rows: -_rank(-rows, each))
    return torch.stack([low, _per_scale(weight, granularity, lambda rows: _rank(rows, each))])


def mse_limits(weight: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR) -> Tensor:
    """The range for :func:`asymmetric` with the least squared error, among those that shrink both ends alike.

    Args:
        weight: any shape, floating.
        bits: 2, 3, 4, 8 or ``"ternary"``.
        granularity: which weights share a range.

    Returns:
        ``(2, *granularity.scale_shape(weight.shape))`` float32.

    Raises:
        LmcompressError: as :func:`mse_clip`.
    """
    check_bits(bits, _WITH_ZERO)
    check_finite(weight)
    limits = torch.stack(extremes(weight, granularity))

    def error(share: Tensor) -> Tensor:
        quantized = asymmetric(weight.detach(), limits * share, bits=bits, granularity=granularity)
        return reduced(
            quantized.values - weight.detach().float(), granularity, lambda split, axes: split.square().mean(dim=axes)
        )

    return limits * search_shares(error, torch.ones_like(limits[0]))


def nearest_codes(
    weight: Tensor,
    scales: Tensor,
    *,
    grid: Grid,
    granularity: Granularity = PER_TENSOR,
    zero_points: Tensor | None = None,
) -> Tensor:
    """Codes of weights on a grid whose scales are settled, for methods that round one column after another.

    Args:
        weight: any shape, floating.
        scales: ``granularity.scale_shape(weight.shape)``, >= 0.
        grid: what codes may be.
        granularity: which weights share a scale.
        zero_points: of ``scales``'s shape, or ``None``.

    Returns:
        ``weight``'s shape, int8 or uint8: of weights that :func:`~lmcompress.numerics.packing.dequantize` gave, the
        codes that it was given.

    Raises:
        LmcompressError: scales of another shape, weights that are NaN or infinite, or a group size that does not
            divide.

    Example:
        >>> nearest_codes(torch.tensor([[0.9, -0.2]]), torch.tensor([[0.5]]), grid=Grid(low=-3, levels=4, stride=2))
        tensor([[ 1, -1]], dtype=torch.int8)
    """
    check_finite(weight)
    scale = granularity.spread(_checked(scales, weight, granularity, "scales").float(), weight.shape)
    split = granularity.split(weight.detach().float())
    if zero_points is None:
        levels = _levels(split, scale, grid)
    else:
        zero = granularity.spread(_checked(zero_points, weight, granularity, "zero points").float(), weight.shape)
        levels = _affine_levels(split, scale, zero, grid)
    return levels.to(grid.dtype).reshape(weight.shape)


Quantizer = Callable[..., Quantized]
"""``(weight, state, *, bits, granularity) -> Quantized``."""

InitialState = Callable[..., Tensor]
"""``(weight, *, bits, granularity) -> state``."""


@dataclass(frozen=True)
class WeightQuantizer:
    """A quantizer and what it needs.

    Attributes:
        function: ``(weight, state, *, bits, granularity) -> Quantized``.
        initial: makes the first state from a weight; ``None`` where there is no state.
        learned: whether the state is a parameter; else it stays as it was made.
        bits: the widths it has.
    """

    function: Quantizer
    initial: InitialState | None
    learned: bool
    bits: tuple[Bits, ...]


QUANTIZERS: dict[str, WeightQuantizer] = {
    "dynamic_scaling": WeightQuantizer(dynamic_scaling, initial_gamma, True, _WITH_ZERO),
    "pact": WeightQuantizer(pact, initial_clip, True, _WITH_ZERO),
    "lsq": WeightQuantizer(lsq, initial_step, True, _WITH_ZERO),
    "elastic": WeightQuantizer(elastic, initial_elastic, True, (1, "ternary", 2, 3, 4)),
    "laq": WeightQuantizer(laq, None, False, (1, *_WITH_ZERO)),
    "twn": WeightQuantizer(twn, None, False, _TERNARY),
    "tbt": WeightQuantizer(tbt, None, False, _TERNARY),
    "binary": WeightQuantizer(binary, None, False, (1,)),
    "minmax": WeightQuantizer(symmetric, None, False, _WITH_ZERO),
    "percentile": WeightQuantizer(symmetric, percentile_clip, False, _WITH_ZERO),
    "mse": WeightQuantizer(symmetric, mse_clip, False, _WITH_ZERO),
    "asymmetric_minmax": WeightQuantizer(asymmetric, None, False, _WITH_ZERO),
    "asymmetric_percentile": WeightQuantizer(asymmetric, percentile_limits, False, _WITH_ZERO),
    "asymmetric_mse": WeightQuantizer(asymmetric, mse_limits, False, _WITH_ZERO),
}
"""The weight quantizers by name, for recipes."""


def quantizer_for(name: str, bits: Bits) -> WeightQuantizer:
    """The quantizer of a name, where it has those bits.

    Args:
        name: a key of :data:`QUANTIZERS`.
        bits: the width wanted.

    Returns:
        The quantizer.

    Raises:
        LmcompressError: an unknown name, or bits that this quantizer does not have.

    Example:
        >>> quantizer_for("lsq", 4).learned
        True
    """
    if name not in QUANTIZERS:
        raise LmcompressError(f"unknown weight quantizer {name!r}{nearest(name, QUANTIZERS)}")
    quantizer = QUANTIZERS[name]
    if isinstance(bits, (bool, float)) or bits not in quantizer.bits:
        others = sorted(other for other, q in QUANTIZERS.items() if bits in q.bits)
        instead = f"; at {bits} there are {', '.join(others)}" if others else ""
        raise LmcompressError(
            f"the quantizer {name!r} has bits {', '.join(map(str, quantizer.bits))}, got {bits!r}{instead}"
        )
    return quantizer


def affine(x: Tensor, low: Tensor, high: Tensor, grid: Grid, granularity: Granularity, *, cut: bool) -> Quantized:
    """Numbers on an unsigned grid over given ranges, widened to hold 0.

    Args:
        x: any shape, floating.
        low: ``granularity.scale_shape(x.shape)`` float32.
        high: the same.
        grid: from 0 up.
        granularity: which numbers share a range.
        cut: whether numbers beyond the range get no gradient.

    Returns:
        Values, codes and zero points.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    # each end by itself: their difference may overflow
    scales = high / grid.high - low / grid.high
    zero_points = torch.where(scales > 0, grid.nearest(-low / scales), 0.0)
    scale, zero = granularity.spread(scales, x.shape), granularity.spread(zero_points, x.shape)
    split = granularity.split(x.float())
    levels = _affine_levels(split.detach(), scale, zero, grid)
    outside = None
    if cut:
        outside = (split < granularity.spread(low, x.shape)) | (split > granularity.spread(high, x.shape))
    values = straight_through(split, (levels - zero) * scale, outside)
    # a zero point that is NaN is no byte; `codes` says why
    whole = zero_points.nan_to_num(nan=0.0).to(torch.uint8)
    return Quantized(values.reshape(x.shape), scales, whole, grid, granularity, levels, x.detach())


def search_shares(error: Callable[[Tensor], Tensor], ones: Tensor) -> Tensor:
    """For each scale the share of its range, in [1/64, 1], whose error is least.

    Args:
        error: ``shares -> errors``, tensors of the shape of ``ones``.
        ones: of the shape wanted.

    Returns:
        The shares; 1 where no other is better.
    """
    best, least = ones, error(ones)
    for power in range(1, 25):
        now = error(ones * 2 ** (-power / 4))
        best, least = torch.where(now < least, ones * 2 ** (-power / 4), best), torch.minimum(now, least)
        # what is cut grows as ranges shrink, and is by now more than the whole error of the best
        if bool((now > 2 * least).all()):
            break
    coarse = best
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        shares = (coarse * 2 ** (step / 16)).clamp(max=1.0)
        now = error(shares)
        best, least = torch.where(now < least, shares, best), torch.minimum(now, least)
    return best


def check_percentile(percentile: float) -> None:
    """Refuses what is not above 0 and at most 100.

    Args:
        percentile: in per cent.

    Raises:
        LmcompressError: it is not.
    """
    if not 0 < percentile <= 100:
        raise LmcompressError(
            f"percentile must be above 0 and at most 100, got {percentile}; it counts per cent, so 99.9, not 0.999"
        )


def _clipped(
    weight: Tensor, alpha: Tensor, grid: Grid, granularity: Granularity, *, inside: Inside, pass_outside: bool
) -> Quantized:
    """On a symmetric grid between ±alpha."""
    rule = Rule(grid, float(grid.high), -1.0, 1.0, inside, pass_outside)
    return _learned(weight, alpha, rule, granularity)


def _learned(weight: Tensor, unit: Tensor, rule: Rule, granularity: Granularity) -> Quantized:
    split = granularity.split(weight.float())
    values, levels = fake_quantize(split, granularity.spread(unit, weight.shape), rule)
    scales = unit.detach() / rule.per_unit
    return Quantized(values.reshape(weight.shape), scales, None, rule.grid, granularity, levels, weight.detach())


def _given(
    weight: Tensor, split: Tensor, levels: Tensor, scale: Tensor, grid: Grid, granularity: Granularity
) -> Quantized:
    """From codes and scales (broadcasting over them) that are settled."""
    values = straight_through(split, levels * scale).reshape(weight.shape)
    scales = scale.reshape(granularity.scale_shape(weight.shape))
    return Quantized(values, scales, None, grid, granularity, levels, weight.detach())


def _levels(split: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    # x / infinity is 0: where the scale is 0 all is 0
    return grid.nearest(split / torch.where(scale > 0, scale, torch.inf))


def _affine_levels(split: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    levels = (split / torch.where(scale > 0, scale, torch.inf)).round_().add_(zero)
    return levels.clamp_(grid.low, grid.high).add_(0.0)


def _lsq_factor(weight: Tensor, granularity: Granularity, greatest: int) -> float:
    sharing = weight.numel() / max(1, math.prod(granularity.scale_shape(weight.shape)))
    return 1 / math.sqrt(max(1.0, sharing) * greatest)


def _best_start(w: Tensor, low: Tensor, high: Tensor, grid: Grid, total: Callable[[Tensor], Tensor]) -> Tensor:
    """The clip of the least error among eight, evenly spaced in their logarithms, from ``low`` to ``high``."""
    best, least = low, torch.full_like(low, torch.inf)
    for step in range(8):
        alpha = low ** (1 - step / 7) * high ** (step / 7)
        now = total((_levels(w, alpha / grid.high, grid) * (alpha / grid.high) - w).square())
        best, least = torch.where(now < least, alpha, best), torch.minimum(now, least)
    return best


def _checked(state: Tensor, weight: Tensor, granularity: Granularity, name: str) -> Tensor:
    expected = granularity.scale_shape(weight.shape)
    if tuple(state.shape) != expected:
        raise LmcompressError(
            f"{name} of weights of shape {tuple(weight.shape)} must have shape {expected} ({granularity}), "
            f"got {tuple(state.shape)}"
        )
    return state


def _curvature(curvature: Tensor, weight: Tensor, granularity: Granularity) -> Tensor:
    if curvature.shape != weight.shape:
        raise LmcompressError(
            f"the curvature must have the weight's shape {tuple(weight.shape)}, got {tuple(curvature.shape)}"
        )
    if not bool((curvature >= 0).all()):
        raise LmcompressError(
            f"the curvature must be >= 0 everywhere, got one of {float(curvature.min())}; take the square root of "
            "Adam's second moments"
        )
    return granularity.split(curvature.detach().float())


def _per_scale(weight: Tensor, granularity: Granularity, f: Callable[[Tensor], Tensor]) -> Tensor:
    """A statistic ``(rows, numbers) -> (rows,)`` of the numbers that share a scale; 0 where there are none."""
    shape = granularity.scale_shape(weight.shape)
    if weight.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=weight.device)
    return f(weight.detach().float().reshape(math.prod(shape), -1)).reshape(shape)


def _rank(rows: Tensor, percentile: float) -> Tensor:
    """The least number of each row that ``percentile`` % of it do not exceed."""
    # kthvalue and not quantile, which refuses more than 16 million numbers
    count = rows.shape[-1]
    # 99.9 / 100 * 1000 is a little more than 999
    place = math.ceil(percentile * count / 100 - 1e-6)
    return rows.kthvalue(min(max(place, 1), count), dim=-1).values
