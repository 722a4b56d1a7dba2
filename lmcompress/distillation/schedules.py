"""Schedules of loss weights and temperatures: factors over training, and temperatures for each example."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcompress.distillation.losses.distributions import check_shapes
from lmcompress.errors import LmcompressError
from lmcompress.registry import Registry

WeightSchedule = Callable[[float], float]
"""``progress in [0, 1] -> factor in [0, 1]``, by which the configured weight is multiplied."""


def constant(progress: float) -> float:
    """The configured weight throughout.

    Args:
        progress: share of training done, in [0, 1].

    Returns:
        1.0.

    Raises:
        LmcompressError: If ``progress`` is outside [0, 1].
    """
    _check_progress(progress)
    return 1.0


def linear_decay(progress: float) -> float:
    """Linear decay from the configured weight to 0: ``1 - progress``.

    Args:
        progress: share of training done, in [0, 1].

    Returns:
        The factor, in [0, 1].

    Raises:
        LmcompressError: If ``progress`` is outside [0, 1].

    Example:
        >>> 5.0 * linear_decay(0.25)
        3.75
    """
    return 1.0 - _check_progress(progress)


def linear_growth(progress: float) -> float:
    """Linear growth from 0 to the configured weight: ``progress``.

    Args:
        progress: share of training done, in [0, 1].

    Returns:
        The factor, in [0, 1].

    Raises:
        LmcompressError: If ``progress`` is outside [0, 1].

    Example:
        >>> 5.0 * linear_growth(0.25)
        1.25
    """
    return _check_progress(progress)


def cosine_decay(progress: float) -> float:
    """Cosine decay from the configured weight to 0: ``(1 + cos(pi * progress)) / 2``.

    Args:
        progress: share of training done, in [0, 1].

    Returns:
        The factor, in [0, 1].

    Raises:
        LmcompressError: If ``progress`` is outside [0, 1].

    Example:
        >>> round(cosine_decay(0.5), 6)
        0.5
    """
    return 0.5 * (1.0 + math.cos(math.pi * _check_progress(progress)))


WEIGHT_SCHEDULES: Registry[WeightSchedule] = Registry(
    "weight schedule",
    {"constant": constant, "linear_decay": linear_decay, "linear_growth": linear_growth, "cosine_decay": cosine_decay},
    callable,
    "a function of the share of training done",
)
"""The weight schedules by name, for configurations and recipes."""


def flsw(
    student_logits: Tensor,
    teacher_logits: Tensor,
    base: float,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    minimum: float = 1.0,
    maximum: float = 16.0,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Focal-loss-style temperatures: lower (sharper) where student and teacher disagree more than on average.

    .. math:: \tau_i = \mathrm{clamp}(\tau_0 + \beta (\bar w - w_i)), \quad w_i = (1 - \cos(z^s_i, z^t_i))^\gamma

    Args:
        student_logits: ``(..., C)``, any floating dtype.
        teacher_logits: same shape.
        base: :math:`\tau_0`, between ``minimum`` and ``maximum``.
        beta: spread of the temperatures, >= 0; 0 gives ``base`` everywhere.
        gamma: > 0; values above 1 spare rows that nearly agree.
        minimum: lowest temperature, > 0.
        maximum: highest temperature.
        mask: ``(...)``, which rows count in the mean (1 = yes); default all. Give it for token logits, whose padding
            would otherwise shift every temperature.

    Returns:
        ``(...)`` float32 within ``[minimum, maximum]``, without gradient.

    Raises:
        LmcompressError: If the shapes differ, or an option is out of range.

    Reference:
        Wen, Lai & Qian, *Preparing Lessons*, 2019, https://arxiv.org/abs/1911.07471, dynamic temperature
        distillation, FLSW.

    Note:
        The mean :math:`\bar w` is over the given micro-batch, as in TextBrewer; hence temperatures depend on
        how a batch is split, and 8 x 1 is *not* 1 x 8 with this schedule. The clamp is ours: without it TextBrewer's
        formula reaches negative temperatures, which invert the teacher's distribution.
    """
    _check_options(base, beta, minimum, maximum)
    if not gamma > 0:
        raise LmcompressError(f"gamma must be > 0, got {gamma}")
    check_shapes(student_logits, teacher_logits)
    cosine = F.cosine_similarity(student_logits.detach().float(), teacher_logits.detach().float(), dim=-1)
    # rounding puts the cosine of equal vectors slightly above 1, and a fractional power of that is NaN
    weights = (1 - cosine).clamp(min=0).pow(gamma)
    return _spread(weights, base, beta, minimum, maximum, mask)


def cwsm(
    student_logits: Tensor,
    base: float,
    *,
    beta: float = 1.0,
    minimum: float = 1.0,
    maximum: float = 16.0,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Confidence-weighted temperatures: lower (sharper) where the student is less certain than on average.

    .. math:: \tau_i = \mathrm{clamp}(\tau_0 + \beta (\bar w - w_i)), \quad
        w_i = 1 / (\max_c \mathrm{softmax}(z^s_i)_c + 10^{-3})

    Args:
        student_logits: ``(..., C)``, any floating dtype.
        base: :math:`\tau_0`, between ``minimum`` and ``maximum``.
        beta: spread of the temperatures, >= 0; 0 gives ``base`` everywhere.
        minimum: lowest temperature, > 0.
        maximum: highest temperature.
        mask: ``(...)``, which rows count in the mean (1 = yes); default all.

    Returns:
        ``(...)`` float32 within ``[minimum, maximum]``, without gradient.

    Raises:
        LmcompressError: If an option is out of range.

    Reference:
        Wen, Lai & Qian, *Preparing Lessons*, 2019, https://arxiv.org/abs/1911.07471, dynamic temperature
        distillation, CWSM.

    Note:
        The mean is over the micro-batch, and the clamp is ours; see :func:`flsw`.
    """
    _check_options(base, beta, minimum, maximum)
    confidence = torch.softmax(student_logits.detach().float(), dim=-1).amax(dim=-1)
    return _spread(1 / (confidence + 1e-3), base, beta, minimum, maximum, mask)


def _spread(weights: Tensor, base: float, beta: float, minimum: float, maximum: float, mask: Tensor | None) -> Tensor:
    if mask is None:
        mean = weights.mean()
    elif mask.shape != weights.shape:
        raise LmcompressError(
            f"the mask must have one value per row of logits, shape {tuple(weights.shape)}, got {tuple(mask.shape)}"
        )
    else:
        valid = mask.bool()
        mean = weights.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)
    return (base + beta * (mean - weights)).clamp(minimum, maximum)


def _check_options(base: float, beta: float, minimum: float, maximum: float) -> None:
    if not 0 < minimum <= base <= maximum:
        raise LmcompressError(
            f"temperatures must satisfy 0 < minimum <= base <= maximum, got minimum {minimum}, base {base}, "
            f"maximum {maximum}"
        )
    if not beta >= 0:
        raise LmcompressError(f"beta must be >= 0, got {beta}")


def _check_progress(progress: float) -> float:
    if not 0 <= progress <= 1:
        raise LmcompressError(f"progress must be the share of training done, in [0, 1], got {progress}")
    return float(progress)
