"""Losses between the logits of a student and those of a teacher: pure, one value per row, unreduced, float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcompress.errors import LmcompressError, nearest

LogitLoss = Callable[..., Tensor]
"""``(student_logits (..., C), teacher_logits (..., C), *, temperature, scale_by_temperature) -> (...)`` float32."""


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
        LmcompressError: the shapes differ, there is only one class (the KL is then always 0), or a temperature
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

    Its gradient is that of :func:`kl_divergence`; its value is greater by the teacher's entropy, so it is not 0
    where the two agree.

    Args:
        student_logits: ``(..., C)``, any floating dtype; gradients flow here only.
        teacher_logits: same shape.
        temperature: above 1 spreads both distributions; a float, or a tensor ``(...)`` with one per row.
        scale_by_temperature: whether to multiply by ``temperature ** 2`` (TextBrewer's ``ce`` does not).

    Returns:
        ``(...)`` float32, in nats.

    Raises:
        LmcompressError: as :func:`kl_divergence`.

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

    Mode-seeking: it punishes the student for mass where the teacher has none, which suits students too small
    to cover every mode.

    Args:
        student_logits: ``(..., C)``, any floating dtype; gradients flow here only.
        teacher_logits: same shape.
        temperature: above 1 spreads both distributions; a float, or a tensor ``(...)`` with one per row.
        scale_by_temperature: whether to multiply by ``temperature ** 2``.

    Returns:
        ``(...)`` float32, in nats, >= 0 and 0 where the two agree.

    Raises:
        LmcompressError: as :func:`kl_divergence`.

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
    nears 0 or 1 the value itself tends to 0; divided by ``beta`` or ``1 - beta`` it tends to
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
        LmcompressError: as :func:`kl_divergence`, or ``beta`` is not between 0 and 1.

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


def logit_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    scale_by_temperature: bool = True,
) -> Tensor:
    r"""Mean over classes of the squared difference of logits divided by the temperature, times ``temperature ** 2``.

    .. math:: T^2 \frac{1}{C} \sum_c (z^s_c / T - z^t_c / T)^2

    With the factor (the default) that is the plain squared difference, and the temperature has no effect.

    Args:
        student_logits: ``(..., C)``, any floating dtype; gradients flow here only.
        teacher_logits: same shape.
        temperature: a float, or a tensor ``(...)`` with one per row; matters only without the factor.
        scale_by_temperature: whether to multiply by ``temperature ** 2`` (TextBrewer's ``mse`` does not).

    Returns:
        ``(...)`` float32, >= 0 and 0 where the two agree.

    Raises:
        LmcompressError: the shapes differ or a temperature is not > 0.

    Reference:
        Ba & Caruana, *Do Deep Nets Really Need to be Deep?*, 2014, https://arxiv.org/abs/1312.6184, equation 1
        (L2 on logits); Hinton et al. 2015, section 2.1, gives it as the high-temperature limit of the KL.

    Example:
        >>> logit_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([2.])
    """
    _check_shapes(student_logits, teacher_logits)
    divisor = _temperature(temperature, student_logits)
    mean = (student_logits.float() - teacher_logits.detach().float()).square().mean(dim=-1)
    return mean if scale_by_temperature else mean / divisor**2


def binary_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    scale_by_temperature: bool = True,
) -> Tensor:
    r"""KL(teacher ‖ student) of one Bernoulli per label, averaged over labels, times ``temperature ** 2``.

    .. math:: T^2 \frac{1}{C} \sum_c p_c \log \frac{p_c}{q_c} + (1 - p_c) \log \frac{1 - p_c}{1 - q_c}, \quad
        p = \sigma(z^t / T), q = \sigma(z^s / T)

    For multi-label heads, whose labels are independent yes/no questions.

    Args:
        student_logits: ``(..., C)``, any floating dtype; gradients flow here only.
        teacher_logits: same shape.
        temperature: above 1 draws both towards 1/2; a float, or a tensor ``(...)`` with one per row.
        scale_by_temperature: whether to multiply by ``temperature ** 2``.

    Returns:
        ``(...)`` float32, in nats per label, >= 0 and 0 where the two agree.

    Raises:
        LmcompressError: the shapes differ or a temperature is not > 0.

    Reference:
        Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531, section 2, with the sigmoid (a softmax over
        ``(z, 0)``) in the place of the softmax.

    Example:
        >>> binary_kl(torch.zeros(1, 1), torch.tensor([[3.0]]).log())  # teacher 3/4, student 1/2
        tensor([0.1308])
    """
    _check_shapes(student_logits, teacher_logits)
    divisor = _temperature(temperature, student_logits)
    per_class = divisor if isinstance(divisor, float) else divisor.unsqueeze(-1)
    student = student_logits.float() / per_class
    teacher = teacher_logits.detach().float() / per_class
    yes = F.kl_div(F.logsigmoid(student), F.logsigmoid(teacher), reduction="none", log_target=True)
    no = F.kl_div(F.logsigmoid(-student), F.logsigmoid(-teacher), reduction="none", log_target=True)
    mean = (yes + no).mean(dim=-1)
    return mean * divisor**2 if scale_by_temperature else mean


def regression_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    scale_by_temperature: bool = True,
) -> Tensor:
    r"""Mean over outputs of the squared difference, for regression heads.

    .. math:: \frac{1}{C} \sum_c (z^s_c - z^t_c)^2

    A regression head's output is no distribution: the softmax of its one logit is 1 whatever the logit, so every
    loss of softened distributions has a gradient of exactly zero.

    Args:
        student_logits: ``(..., C)`` (usually ``C = 1``), any floating dtype; gradients flow here only.
        teacher_logits: same shape.
        temperature: without effect, here so that all logit losses are called alike.
        scale_by_temperature: without effect.

    Returns:
        ``(...)`` float32, in squared units of the target, >= 0 and 0 where the two agree.

    Raises:
        LmcompressError: the shapes differ or a temperature is not > 0.

    Example:
        >>> regression_mse(torch.tensor([[3.0]]), torch.tensor([[1.0]]), temperature=8.0)
        tensor([4.])
    """
    return logit_mse(student_logits, teacher_logits, temperature=temperature)


LOGIT_LOSSES: dict[str, LogitLoss] = {
    "kl_divergence": kl_divergence,
    "soft_cross_entropy": soft_cross_entropy,
    "reverse_kl": reverse_kl,
    "js_divergence": js_divergence,
    "logit_mse": logit_mse,
    "binary_kl": binary_kl,
    "regression_mse": regression_mse,
}
"""The logit losses by name, for recipes."""

_OF_DISTRIBUTIONS = ("kl_divergence", "soft_cross_entropy", "reverse_kl", "js_divergence", "logit_mse")

# The first of each is the problem type's default.
_FITTING: dict[str, tuple[str, ...]] = {
    "single_label_classification": _OF_DISTRIBUTIONS,
    "token_classification": _OF_DISTRIBUTIONS,
    "causal_lm": _OF_DISTRIBUTIONS,
    "multi_label_classification": ("binary_kl", "logit_mse"),
    # logit_mse at its default is the same function, so asking for it is no mistake
    "regression": ("regression_mse", "logit_mse"),
}


def loss_for(problem_type: str, name: str | None = None) -> LogitLoss:
    """The logit loss for a kind of head: the one asked for where it makes sense there, else an error.

    Args:
        problem_type: ``single_label_classification``, ``token_classification``, ``causal_lm``,
            ``multi_label_classification`` or ``regression``.
        name: a key of :data:`LOGIT_LOSSES`; ``None`` takes the default of the problem type (``kl_divergence``,
            ``binary_kl`` for many labels, ``regression_mse`` for regression).

    Returns:
        The function; for ``regression`` always :func:`regression_mse`.

    Raises:
        LmcompressError: an unknown problem type or name, or a loss that would teach that head nothing or the wrong
            thing (a softmax over one regression output has zero gradient; labels of a multi-label head are not
            alternatives).

    Example:
        >>> loss_for("regression").__name__, loss_for("causal_lm", "reverse_kl").__name__
        ('regression_mse', 'reverse_kl')
    """
    if problem_type not in _FITTING:
        raise LmcompressError(f"unknown problem type {problem_type!r}{nearest(problem_type, _FITTING)}")
    if name is not None and name not in LOGIT_LOSSES:
        raise LmcompressError(f"unknown logit loss {name!r}{nearest(name, LOGIT_LOSSES)}")
    fitting = _FITTING[problem_type]
    if name is not None and name not in fitting:
        reasons = {
            "regression": "the softmax of one output is 1 whatever the output, so the gradient would be exactly zero",
            "multi_label_classification": "its labels are independent, not alternatives of one softmax",
        }
        why = reasons.get(problem_type, "its classes are alternatives of one softmax")
        raise LmcompressError(
            f"the logit loss {name!r} does not fit the problem type {problem_type!r}: {why}. "
            f"Use {' or '.join(fitting)}, or leave the loss out to get {fitting[0]}."
        )
    return regression_mse if problem_type == "regression" else LOGIT_LOSSES[name or fitting[0]]


def probability_shift(teacher_logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Corrects a teacher that is wrong: swaps the logit of the true class with the greatest one.

    The multiset of logits, hence the entropy of the teacher's distribution, stays; rows where the teacher is right
    are unchanged, as are rows whose label is ``ignore_index``.

    Args:
        teacher_logits: ``(..., C)``, any floating dtype; left as it is.
        labels: ``(...)`` integer classes, or ``ignore_index``.
        ignore_index: the label of rows to leave alone.

    Returns:
        ``(..., C)`` a new tensor of the same dtype, without gradient.

    Raises:
        LmcompressError: the labels are not integers, do not have one value per row, or lie outside the classes.

    Reference:
        Wen, Lai & Qian, *Preparing Lessons: Improve Knowledge Distillation with Better Supervision*, 2019,
        https://arxiv.org/abs/1911.07471, knowledge adjustment by probability shift.

    Example:
        >>> probability_shift(torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), torch.tensor([1, -100]))
        tensor([[1., 3., 2.],
                [3., 1., 2.]])
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise LmcompressError(
            f"probability_shift needs integer class labels, got {labels.dtype}; it has no meaning for regression "
            "or multi-label heads"
        )
    if labels.shape != teacher_logits.shape[:-1]:
        raise LmcompressError(
            f"probability_shift needs one label per row of logits: labels must have shape "
            f"{tuple(teacher_logits.shape[:-1])}, got {tuple(labels.shape)}"
        )
    logits = teacher_logits.detach()
    ignored = labels == ignore_index
    outside = ~ignored & ((labels < 0) | (labels >= logits.shape[-1]))
    if outside.any():
        raise LmcompressError(
            f"labels must be in [0, {logits.shape[-1]}) or {ignore_index}, got {int(labels[outside][0])}; "
            "is the teacher fine-tuned for another set of labels?"
        )
    label = labels.long().masked_fill(ignored, 0).unsqueeze(-1)
    greatest, predicted = logits.max(dim=-1, keepdim=True)
    shifted = logits.scatter(-1, predicted, logits.gather(-1, label)).scatter(-1, label, greatest)
    return torch.where(ignored.unsqueeze(-1), logits, shifted)


def _log_distributions(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor, scale_by_temperature: bool
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Student's and teacher's log probabilities ``(..., C)`` and the factor of the result, checked."""
    _check_shapes(student_logits, teacher_logits)
    if student_logits.shape[-1] == 1:
        raise LmcompressError(
            "logits must have at least 2 classes for a loss of distributions, got 1: the softmax of one logit is 1 "
            "whatever the logit, so the gradient would be exactly zero. Use regression_mse for a regression head, "
            "binary_kl for a yes/no label."
        )
    divisor = _temperature(temperature, student_logits)
    per_class = divisor if isinstance(divisor, float) else divisor.unsqueeze(-1)
    # float32: the sum over a 100k vocabulary loses digits in bfloat16
    log_q = torch.log_softmax(student_logits.float() / per_class, dim=-1)
    log_p = torch.log_softmax(teacher_logits.detach().float() / per_class, dim=-1)
    return log_q, log_p, divisor**2 if scale_by_temperature else 1.0


def _check_shapes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise LmcompressError(
            f"student and teacher logits must have one shape, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}; a different last axis means different vocabularies or numbers of labels"
        )


def _temperature(temperature: float | Tensor, logits: Tensor) -> float | Tensor:
    """The temperature as a float, or as a float32 tensor without gradient of the shape of the result, checked."""
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
