r"""Quantized activations: ranges computed in every forward pass, learned, or calibrated in advance.

============ ============================== ============================== ===================== =====================
function     paper                          range                          state                 granularity
============ ============================== ============================== ===================== =====================
``dynamic``  Zhang et al. 2020              minimum and maximum of each    none                  tensor, or each token
             (TernaryBERT), section 3.1     input
``learned``  Esser et al. 2020 (LSQ);       symmetric: a step; asymmetric: step learned, or step tensor
             Bhalgat et al. 2020 (LSQ+)     a step and an offset           and offset learned
``static``   Jacob et al. 2018, section 3   calibrated by an observer      a range, fixed        tensor
============ ============================== ============================== ===================== =====================

Symmetric activations have the codes -n to n (for ``learned`` -n - 1 to n) with n = 2^(b-1) - 1, int8; asymmetric ones 0
to 2^b - 1 with an integer zero point, uint8: for values mostly on one side of 0, such as attention probabilities and
the outputs of a GELU. Ranges are widened to include 0, so that a masked probability stays exactly 0.

Arithmetic is float32 whatever the input's dtype and the autocast; the values are returned as float32.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.numerics._straight_through import Rule, at_least, fake_quantize, learned_affine, straight_through
from lmcompress.numerics.grids import (
    PER_TENSOR,
    Grid,
    PerTensor,
    PerToken,
    check_bits,
    extremes,
    signed_grid,
    symmetric_grid,
    unsigned_grid,
)
from lmcompress.numerics.quantizers.base import Quantized
from lmcompress.numerics.quantizers.uniform import affine

ActivationBits = Literal[4, 8]
"""Bit-widths of activations."""

BITS: tuple[ActivationBits, ...] = (4, 8)


def dynamic(
    x: Tensor,
    *,
    bits: ActivationBits = 8,
    symmetric: bool = True,
    granularity: PerTensor | PerToken = PER_TENSOR,
    clip: float | None = None,
    mask: Tensor | None = None,
    check: bool = True,
) -> Quantized:
    r"""Activations quantized over their current range.

    .. math:: x_q = s \cdot \mathrm{round}(x / s), \quad s = \frac{\max|x|}{2^{b-1} - 1}

    or, not symmetric, with whole zero points as in :func:`~lmcompress.numerics.quantizers.uniform.asymmetric`, over the
    least and greatest value. The range is data: the gradient goes straight through to what is not clipped. An input of
    zeros only gives zeros.

    Args:
        x: any shape, floating.
        bits: 8 or 4.
        symmetric: whether levels are symmetric around 0.
        granularity: one range for the tensor, or for each vector along the last axis.
        clip: values beyond ±clip are clipped first and get no gradient; ``None`` does not clip.
        mask: bool, broadcasts over ``x``: numbers where it is false do not count in ranges, and are clipped to them.
        check: whether to refuse NaN and infinity, for which the host waits for a GPU; otherwise they make all values
            NaN that share their range (infinity is clipped by a clip).

    Returns:
        Values and codes.

    Raises:
        LmcompressError: If bits are neither 8 nor 4, the clip is not above 0, or the input has NaN or infinity.

    Note:
        TernaryBERT's code has a zero point that is not an integer, the minimum itself, and clips to 2.5.

    Reference:
        Zhang, Hou, Yin, Shang, Chen, Jiang & Liu, *TernaryBERT: Distillation-aware Ultra-low Bit BERT*, EMNLP 2020,
        https://arxiv.org/abs/2009.12812, section 3.1.

    Example:
        >>> dynamic(torch.tensor([[-7.0, 0.4, 1.6]]), bits=4).codes
        tensor([[-7,  0,  2]], dtype=torch.int8)
    """
    check_bits(bits, BITS)
    cut, outside = x.float(), None
    if clip is not None:
        if not clip > 0:
            raise LmcompressError(f"clip must be > 0, got {clip}; leave it out for no clipping")
        # NaN survives clipping, infinity does not
        if check:
            refuse_unless(bool(torch.isfinite(x).all()))
        # a number at the end itself is not inside either, as in the paper's code
        outside = cut.abs() >= clip
        cut = straight_through(cut, cut.detach().clamp(-clip, clip), outside)
    # zeros widen no range
    low, high = extremes(cut if mask is None else cut.masked_fill(~mask, 0.0), granularity)
    if check:
        refuse_unless(bool((torch.isfinite(low) & torch.isfinite(high)).all()))
    if not symmetric:
        return affine(cut, low, high, unsigned_grid(bits), granularity, cut=False)
    return _symmetric(cut, torch.maximum(high, -low), symmetric_grid(bits), granularity, pass_outside=True)


def static(x: Tensor, low: float, high: float, *, bits: ActivationBits = 8, symmetric: bool = True) -> Quantized:
    r"""Activations quantized over a calibrated range; values beyond it are clipped and get no gradient.

    Args:
        x: any shape, floating.
        low: minimum.
        high: maximum; symmetric levels end at the larger magnitude of the two.
        bits: 8 or 4.
        symmetric: whether levels are symmetric around 0.

    Returns:
        Values and codes. NaN stays NaN.

    Raises:
        LmcompressError: If bits are neither 8 nor 4, or the range is empty, reversed or not finite.

    Reference:
        Jacob et al., *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*,
        CVPR 2018, https://arxiv.org/abs/1712.05877, section 3.

    Example:
        >>> static(torch.tensor([0.5, 9.0]), 0.0, 1.5, bits=4, symmetric=False).values
        tensor([0.5000, 1.5000])
    """
    check_bits(bits, BITS)
    check_range(low, high)
    ends = torch.tensor([low, high], dtype=torch.float32, device=x.device)
    if not symmetric:
        return affine(x, ends[:1, None], ends[1:, None], unsigned_grid(bits), PER_TENSOR, cut=True)
    return _symmetric(x, ends.abs().max().reshape(1, 1), symmetric_grid(bits), PER_TENSOR, pass_outside=False)


def learned(x: Tensor, step: Tensor, offset: Tensor | None = None, *, bits: ActivationBits = 8) -> Quantized:
    r"""Activations quantized over a learned range: LSQ around 0, or LSQ+ with an offset.

    .. math:: x_q = s \cdot \mathrm{clip}(\mathrm{round}(x / s), -2^{b-1}, 2^{b-1} - 1)

    .. math:: x_q = s \cdot (\mathrm{clip}(\mathrm{round}(x / s) + z, 0, 2^b - 1) - z), \quad
        z = \mathrm{round}(-\beta / s)

    The gradient of s is as for weights (:func:`~lmcompress.numerics.quantizers.learned.lsq`), that of β is 1 for
    numbers beyond the range and 0 within; both times :math:`1 / \sqrt{N Q_P}` with N the numbers of one example's
    vector (last axis), so that neither batch nor length changes it.

    Args:
        x: any shape, floating.
        step: the state s, ``(1, 1)``; values below 1e-5 count as 1e-5.
        offset: the state β, ``(1, 1)``, for an asymmetric range; clipped so that the range includes 0.
        bits: 8 or 4; a step belongs to its bits.

    Returns:
        Values and codes. NaN stays NaN.

    Raises:
        LmcompressError: If bits are neither 8 nor 4, or the state has another shape.

    Note:
        LSQ's N is the number of features of a layer. LSQ+ uses β directly; here it is rounded to an integer zero point,
        straight through.

    Reference:
        Esser et al. 2020 (LSQ), https://arxiv.org/abs/1902.08153, section 2; Bhalgat, Lee, Nagel, Blankevoort & Kwak,
        *LSQ+: Improving low-bit quantization through learnable offsets and better initialization*, 2020,
        https://arxiv.org/abs/2004.09576, section 3.

    Example:
        >>> learned(torch.tensor([0.9, -9.0]), torch.tensor([[0.5]]), bits=4).values
        tensor([ 1., -4.])
    """
    check_bits(bits, BITS)
    for name, state in (("the step", step), ("the offset", offset)):
        if state is not None and tuple(state.shape) != (1, 1):
            raise LmcompressError(f"{name} of activations must have shape (1, 1), got {tuple(state.shape)}")
    s = at_least(step)
    features = max(1, x.shape[-1] if x.dim() else 1)
    if offset is None:
        grid = signed_grid(bits)
        rule = Rule(grid, 1.0, low=grid.low, high=grid.high, factor=1 / math.sqrt(features * grid.high))
        values, levels = fake_quantize(x.float(), PER_TENSOR.spread(s, x.shape), rule)
        return Quantized(values, s.detach(), None, grid, PER_TENSOR, levels, x.detach())
    grid = unsigned_grid(bits)
    values, levels, zero = learned_affine(
        x.float(),
        PER_TENSOR.spread(s, x.shape),
        PER_TENSOR.spread(offset.float(), x.shape),
        grid,
        1 / math.sqrt(features * grid.high),
    )
    zero_points = zero.reshape(1, 1).nan_to_num(nan=0.0).to(torch.uint8)
    return Quantized(values, s.detach(), zero_points, grid, PER_TENSOR, levels, x.detach())


def initial_step(x: Tensor, *, bits: ActivationBits = 8) -> Tensor:
    r"""The initial step of symmetric :func:`learned`, from a batch: :math:`2\, \mathrm{mean}|x| / \sqrt{2^{b-1} - 1}`.

    Args:
        x: activations, without padding.
        bits: 8 or 4.

    Returns:
        ``(1, 1)`` float32.

    Raises:
        LmcompressError: If bits are neither 8 nor 4, or there are no activations, or they are all zero, NaN or
            infinite.

    Reference:
        Esser et al. 2020, https://arxiv.org/abs/1902.08153, section 2.1.
    """
    check_bits(bits, BITS)
    refuse_unless(bool(torch.isfinite(x).all()))
    mean = x.detach().float().abs().mean().reshape(1, 1)
    if not bool(mean > 0):
        raise LmcompressError(
            f"activations must not all be zero to initialize a step, got {x.numel()} of them; calibrate "
            "on real batches, or leave this input unquantized"
        )
    return mean * (2 / math.sqrt(signed_grid(bits).high))


def initial_range(low: float, high: float, *, bits: ActivationBits = 8) -> tuple[Tensor, Tensor]:
    """The initial step and offset of asymmetric :func:`learned`, from a calibrated range.

    Args:
        low: minimum.
        high: maximum.
        bits: 8 or 4.

    Returns:
        Step and offset, ``(1, 1)`` float32 each: the range widened to include 0.

    Raises:
        LmcompressError: If bits are neither 8 nor 4, or the range is empty, reversed or not finite.

    Reference:
        Bhalgat et al. 2020 (LSQ+), https://arxiv.org/abs/2004.09576, section 3.2.
    """
    check_bits(bits, BITS)
    check_range(low, high)
    low, high = min(low, 0.0), max(high, 0.0)
    return torch.tensor([[(high - low) / unsigned_grid(bits).high]]), torch.tensor([[low]])


def check_range(low: float, high: float) -> None:
    """Refuses an invalid range of activations.

    Args:
        low: minimum.
        high: maximum.

    Raises:
        LmcompressError: If the range is not finite, reversed, or zero wide at 0.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise LmcompressError(f"an activation range must be finite, got [{low}, {high}]; calibrate again on valid data")
    if low > high:
        raise LmcompressError(f"an activation range must go from low to high, got [{low}, {high}]")
    if low == high == 0:
        raise LmcompressError(
            "an activation range must be wider than zero, got [0, 0]: calibration saw only zeros here; give it "
            "real batches, use dynamic ranges, or leave this input unquantized"
        )


def refuse_unless(finite: bool) -> None:
    """Refuse activations that are not finite.

    Args:
        finite: whether they are finite.

    Raises:
        LmcompressError: If they are not.
    """
    if not finite:
        raise LmcompressError(
            "activations must be finite to be quantized, got NaN or infinity; are they finite in this "
            "dtype? float16 overflows beyond 65504"
        )


def _symmetric(
    x: Tensor, alpha: Tensor, grid: Grid, granularity: PerTensor | PerToken, *, pass_outside: bool
) -> Quantized:
    rule = Rule(grid, float(grid.high), -1.0, 1.0, pass_outside=pass_outside)
    values, levels = fake_quantize(x.float(), granularity.spread(alpha, x.shape), rule)
    return Quantized(values, alpha / grid.high, None, grid, granularity, levels, x.detach())
