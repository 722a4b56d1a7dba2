"""Losses between the softened distributions of a student and a teacher: one value per row, unreduced, float32."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcompress.errors import LmcompressError


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    scale_by_temperature: bool = True,
) -> Tensor:
    r"""KL(teacher ‖ student) of the softened distributions, times ``temperature ** 2``.

    .. math:: T^2 \sum_c p_c (\log p_c - \log q_c), \quad p = \mathrm{softmax}(z^t / T), q = \mathrm{softmax}(z^s / T)

    The factor :math:`T^2` keeps gradients at the scale of the hard loss as ``temperature`` changes; as
    :math:`T \to \infty` the value tends to half of :func:`logit_mse` of centred logits.

    Args:
        student_logits: ``(..., C)``, any floating dtype; gradients flow here only.
        teacher_logits: same shape.
        temperature: above 1 spreads both distributions; a float, or a tensor ``(...)`` with one per row.
        scale_by_temperature: whether to multiply by ``temperature ** 2``.

    Returns:
        ``(...)`` float32, in nats, >= 0 and 0 where the two agree. Neither masked nor reduced.

    Raises:
        LmcompressError: If the shapes differ, there is only one class (the KL is then always 0), or a temperature
            is not > 0.

    Reference:
        Hinton, Vinyals & Dean, *Distilling the Knowledge in a Neural Network*, 2015,
        https://arxiv.org/abs/1503.02531, section 2.

    Example:
        >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log())
        tensor([0.1308])
    """
    log_q, log_p, factor = _log_distributions(student_logits, teacher_logits, temperature, scale_by_temperature)
    return factor * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    scale_by_temperature: bool = True,
) -> Tensor:
    r"""Cross-entropy of the student under the teacher's softened distribution, times ``temperature ** 2``.

    .. math:: -T^2 \sum_c p_c \log q_c, \quad p = \mathrm{softmax}(z^t / T), q = \mathrm{softmax}(z^s / T)

    Its gradient is that of :func:`kl_divergence`; its value is larger by the teacher's entropy, so it is not 0
    where the two agree.

    Args:
        student_logits: ``(..., C)``, any floating dtype; gradients flow here only.
        teacher_logits: same shape.
        temperature: above 1 spreads both distributions; a float, or a tensor ``(...)`` with one per row.
        scale_by_temperature: whether to multiply by ``temperature ** 2`` (TextBrewer's ``ce`` does not).

    Returns:
        ``(...)`` float32, in nats.

    Raises:
        LmcompressError: If :func:`kl_divergence` would raise it.

    Reference:
        Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531, section 2.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[3.0, -1.0]]))  # log 2 whatever the teacher
        tensor([0.6931])
    """
    log_q, log_p, factor = _log_distributions(student_logits, teacher_logits, temperature, scale_by_temperature)
    return -factor * (log_p.exp() * log_q).sum(dim=-1)


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    scale_by_temperature: bool = True,
) -> Tensor:
    r"""KL(student ‖ teacher) of the softened distributions, times ``temperature ** 2``.

    .. math:: T^2 \sum_c q_c (\log q_c - \log p_c), \quad p = \mathrm{softmax}(z^t / T), q = \mathrm{softmax}(z^s / T)

    Mode-seeking: it penalizes the student for mass where the teacher has none, which suits students too small
    to cover every mode.

    Args:
        student_logits: ``(..., C)``, any floating dtype; gradients flow here only.
        teacher_logits: same shape.
        temperature: above 1 spreads both distributions; a float, or a tensor ``(...)`` with one per row.
        scale_by_temperature: whether to multiply by ``temperature ** 2``.

    Returns:
        ``(...)`` float32, in nats, >= 0 and 0 where the two agree.

    Raises:
        LmcompressError: If :func:`kl_divergence` would raise it.

    Reference:
        Gu, Dong, Wei & Huang, *MiniLLM*, 2023, https://arxiv.org/abs/2306.08543, section 2. Theirs is over whole
        sequences that the student samples; this is the same divergence per token of given text.

    Example:
        >>> reverse_kl(torch.tensor([[0.25, 0.75]]).log(), torch.zeros(1, 2))
        tensor([0.1308])
    """
    log_q, log_p, factor = _log_distributions(student_logits, teacher_logits, temperature, scale_by_temperature)
    return factor * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=-1)


def js_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    scale_by_temperature: bool = True,
    beta: float = 0.5,
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence of the softened distributions, times ``temperature ** 2``.

    .. math:: T^2 [\beta\, \mathrm{KL}(p \| m) + (1 - \beta)\, \mathrm{KL}(q \| m)], \quad m = \beta p + (1 - \beta) q

    with :math:`p` the teacher's and :math:`q` the student's distribution. Bounded by :math:`T^2 \ln 2`. As ``beta``
    approaches 0 or 1 the value tends to 0; divided by ``beta`` or ``1 - beta`` it tends to
    :func:`kl_divergence` or :func:`reverse_kl`.

    Args:
        student_logits: ``(..., C)``, any floating dtype; gradients flow here only.
        teacher_logits: same shape.
        temperature: above 1 spreads both distributions; a float, or a tensor ``(...)`` with one per row.
        scale_by_temperature: whether to multiply by ``temperature ** 2``.
        beta: the teacher's share of the mixture, strictly between 0 and 1.

    Returns:
        ``(...)`` float32, in nats, >= 0 and 0 where the two agree.

    Raises:
        LmcompressError: If :func:`kl_divergence` would raise it, or ``beta`` is not between 0 and 1.

    Reference:
        Agarwal et al., *On-Policy Distillation of Language Models* (GKD), 2023, https://arxiv.org/abs/2306.13649,
        section 2 (generalised JSD).

    Example:
        >>> js_divergence(torch.tensor([[50.0, -50.0]]), torch.tensor([[-50.0, 50.0]]))  # disjoint: log 2
        tensor([0.6931])
    """
    if not 0 < beta < 1:
        raise LmcompressError(
            f"beta must be between 0 and 1, both excluded, got {beta}; at the ends the divergence is 0 everywhere, "
            "use kl_divergence or reverse_kl instead"
        )
    log_q, log_p, factor = _log_distributions(student_logits, teacher_logits, temperature, scale_by_temperature)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    teacher_part = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(dim=-1)
    student_part = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(dim=-1)
    return factor * (beta * teacher_part + (1 - beta) * student_part)


def _log_distributions(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor, scale_by_temperature: bool
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Log probabilities ``(..., C)`` of student and teacher and the factor of the result, checked."""
    check_shapes(student_logits, teacher_logits)
    if student_logits.shape[-1] == 1:
        raise LmcompressError(
            "logits must have at least 2 classes for a loss of distributions, got 1: the softmax of one logit is 1 "
            "whatever the logit, so the gradient would be exactly zero. Use regression_mse for a regression head, "
            "binary_kl for a yes/no label."
        )
    divisor = check_temperature(temperature, student_logits)
    per_class = divisor if isinstance(divisor, float) else divisor.unsqueeze(-1)
    # float32: the sum over a 100k vocabulary loses digits in bfloat16
    log_q = torch.log_softmax(student_logits.float() / per_class, dim=-1)
    log_p = torch.log_softmax(teacher_logits.detach().float() / per_class, dim=-1)
    return log_q, log_p, divisor**2 if scale_by_temperature else 1.0


def check_shapes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuse logits of different shapes."""
    if student_logits.shape != teacher_logits.shape:
        raise LmcompressError(
            f"student and teacher logits must have one shape, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}; a different last axis means different vocabularies or numbers of labels"
        )


def check_temperature(temperature: float | Tensor, logits: Tensor) -> float | Tensor:
    """The temperature as a float, or as a float32 tensor without gradient in the shape of the result, checked."""
    if not isinstance(temperature, Tensor):
        # not `<= 0`: NaN must fail too
        if not temperature > 0:
            raise LmcompressError(f"temperature must be > 0, got {temperature}")
        return float(temperature)
    if temperature.dim() > 0 and temperature.shape != logits.shape[:-1]:
        raise LmcompressError(
            f"temperature must be one number or one per row, of shape {tuple(logits.shape[:-1])}, "
            f"got {tuple(temperature.shape)}"
        )
    if not bool((temperature > 0).all()):
        raise LmcompressError(
            f"temperature must be > 0, got one of {float(temperature.min())}; clamp per-row temperatures, a negative "
            "one turns the teacher upside down"
        )
    return temperature.detach().to(device=logits.device, dtype=torch.float32).expand(logits.shape[:-1])
