"""Losses between the outputs themselves, and between independent labels: one value per row, unreduced, float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcompress.distillation.losses.distributions import check_shapes, check_temperature
from lmcompress.errors import LmcompressError


def logit_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    scale_by_temperature: bool = True,
) -> Tensor:
    r"""Mean over classes of the squared difference of logits divided by the temperature, times ``temperature ** 2``.

    .. math:: T^2 \frac{1}{C} \sum_c (z^s_c / T - z^t_c / T)^2

    With the factor (the default) this is the plain squared difference, and the temperature has no effect.

    Args:
        student_logits: ``(..., C)``, any floating dtype; gradients flow here only.
        teacher_logits: same shape.
        temperature: a float, or a tensor ``(...)`` with one per row; matters only without the factor.
        scale_by_temperature: whether to multiply by ``temperature ** 2`` (TextBrewer's ``mse`` does not).

    Returns:
        ``(...)`` float32, >= 0 and 0 where the two agree.

    Raises:
        LmcompressError: If the shapes differ or a temperature is not > 0.

    Reference:
        Ba & Caruana, *Do Deep Nets Really Need to be Deep?*, 2014, https://arxiv.org/abs/1312.6184, equation 1
        (L2 on logits); Hinton et al. 2015, section 2.1, gives it as the high-temperature limit of the KL.

    Example:
        >>> logit_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([2.])
    """
    check_shapes(student_logits, teacher_logits)
    divisor = check_temperature(temperature, student_logits)
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
        LmcompressError: If the shapes differ or a temperature is not > 0.

    Reference:
        Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531, section 2, with the sigmoid (a softmax over
        ``(z, 0)``) in place of the softmax.

    Example:
        >>> binary_kl(torch.zeros(1, 1), torch.tensor([[3.0]]).log())  # teacher 3/4, student 1/2
        tensor([0.1308])
    """
    check_shapes(student_logits, teacher_logits)
    divisor = check_temperature(temperature, student_logits)
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

    A regression head's output is not a distribution: the softmax of its one logit is 1 whatever the logit, so every
    loss of softened distributions has a gradient of exactly zero.

    Args:
        student_logits: ``(..., C)`` (usually ``C = 1``), any floating dtype; gradients flow here only.
        teacher_logits: same shape.
        temperature: without effect, for a signature shared by all logit losses.
        scale_by_temperature: without effect.

    Returns:
        ``(...)`` float32, in squared units of the target, >= 0 and 0 where the two agree.

    Raises:
        LmcompressError: If the shapes differ or a temperature is not > 0.

    Example:
        >>> regression_mse(torch.tensor([[3.0]]), torch.tensor([[1.0]]), temperature=8.0)
        tensor([4.])
    """
    return logit_mse(student_logits, teacher_logits, temperature=temperature)


def probability_shift(teacher_logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Corrects a teacher that is wrong: swaps the logit of the true class with the largest one.

    The multiset of logits, hence the entropy of the teacher's distribution, is unchanged; so are rows where the teacher
    is right and rows whose label is ``ignore_index``.

    Args:
        teacher_logits: ``(..., C)``, any floating dtype; not modified.
        labels: ``(...)`` integer classes, or ``ignore_index``.
        ignore_index: the label of rows to skip.

    Returns:
        ``(..., C)`` a new tensor of the same dtype, without gradient.

    Raises:
        LmcompressError: If the labels are not integers, do not have one value per row, or lie outside the classes.

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


def token_scaling(cross_entropy: Tensor, mask: Tensor, *, temperature: float = 10.0) -> Tensor:
    r"""Token weights of the loss on logits: larger where the teacher is less certain of the label.

    .. math:: w_i = n \cdot \mathrm{softmax}_i(\ell_i / T)

    with :math:`\ell_i` the teacher's cross-entropy for the label of token *i* and *n* the number of tokens that count.

    Args:
        cross_entropy: ``(batch, length)``, cross-entropy of the teacher, in nats.
        mask: ``(batch, length)``, which tokens count.
        temperature: T, > 0; high values make all weights equal.

    Returns:
        ``(batch, length)`` float32 without gradient, 0 where ``mask`` is; the mean over counted tokens is 1.

    Raises:
        LmcompressError: If the shapes differ, or ``temperature`` is not > 0.

    Reference:
        Kim et al., *Token-Scaled Logit Distillation for Ternary Weight Generative Language Models*, 2023,
        https://arxiv.org/abs/2308.06744, section 4.2.

    Note:
        The authors' weights sum to 1 in each sequence, and sequences are averaged. Here they sum to the number of
        tokens, so that losses with and without them have the same scale, and a longer sequence counts more. With
        sequences of one length, the two are the same.

    Example:
        >>> token_scaling(torch.tensor([[3.0, 2.0, 1.0]]).log(), torch.ones(1, 3), temperature=1.0)
        tensor([[1.5000, 1.0000, 0.5000]])
    """
    if not temperature > 0:
        raise LmcompressError(f"temperature must be > 0, got {temperature}")
    if cross_entropy.shape != mask.shape:
        raise LmcompressError(
            f"the mask must have the shape of the cross-entropies {tuple(cross_entropy.shape)}, got {tuple(mask.shape)}"
        )
    valid = mask.bool()
    scaled = cross_entropy.detach().float() / temperature
    share = torch.softmax(scaled.masked_fill(~valid, torch.finfo(torch.float32).min), dim=-1).masked_fill(~valid, 0)
    return share * valid.sum(dim=-1, keepdim=True)


def token_weights(surprise: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """:func:`token_scaling` of concatenated tokens.

    Args:
        surprise: ``(n,)``, cross-entropies of the teacher.
        rows: ``(batch, length)`` booleans, the positions of the tokens.
        temperature: T, > 0.

    Returns:
        ``(n,)`` float32.
    """
    table = surprise.new_zeros(rows.shape).masked_scatter(rows, surprise)
    return token_scaling(table, rows, temperature=temperature)[rows]
