"""Matches that compare features position by position: hidden states, attention scores and probabilities."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcompress.errors import LmcompressError

AttentionFeature = Literal["scores", "probabilities"]


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    r"""Squared distance of hidden states: :math:`\sum_i m_i \frac{1}{d} \sum_k (s_{ik} - t_{ik})^2`.

    Args:
        student: ``(batch, length, d)``, projected to the teacher's width if theirs differ.
        teacher: same shape.
        mask: ``(batch, length)``, 1 = real token.

    Returns:
        ``(batch,)`` float32 sums over tokens.

    Raises:
        LmcompressError: If the shapes differ.

    Reference:
        Jiao et al., *TinyBERT*, 2020, https://arxiv.org/abs/1909.10351, equation 8.

    Example:
        >>> hidden_mse(torch.ones(1, 3, 2), torch.zeros(1, 3, 2), torch.tensor([[1, 1, 0]]))
        tensor([2.])
    """
    student, teacher, _ = as_states("hidden_mse", student, teacher, mask)
    return (student - teacher).square().mean(dim=-1).sum(dim=-1)


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor, *, eps: float = 1e-6) -> Tensor:
    r"""Angle of hidden states: :math:`\sum_i m_i (1 - \cos(s_i, t_i))`.

    Args:
        student: ``(batch, length, d)``, projected to the teacher's width if theirs differ.
        teacher: same shape.
        mask: ``(batch, length)``, 1 = real token.
        eps: lower bound of the norm that a vector is divided by.

    Returns:
        ``(batch,)`` float32 sums over tokens, each term in [0, 2].

    Raises:
        LmcompressError: If the shapes differ.

    Reference:
        Sanh et al., *DistilBERT*, 2019, https://arxiv.org/abs/1910.01108, section 2 (``L_cos``).
    """
    student, teacher, valid = as_states("hidden_cosine", student, teacher, mask)
    distance = 1 - F.cosine_similarity(student, teacher, dim=-1, eps=eps)
    return distance.masked_fill(~valid, 0).sum(dim=-1)


def pkd(student: Tensor, teacher: Tensor, mask: Tensor, *, position: int = 0, eps: float = 1e-6) -> Tensor:
    r"""Patient distillation: squared distance of the normalised states of one token, ``[CLS]`` by default.

    .. math:: \left\| \frac{s}{\|s\|_2} - \frac{t}{\|t\|_2} \right\|_2^2

    Args:
        student: ``(batch, length, d)``, projected to the teacher's width if theirs differ.
        teacher: same shape.
        mask: ``(batch, length)``, 1 = real token.
        position: which of the example's *real* tokens, counted from 0; negative from the end (-1, the last, for
            causal models). An example with too few tokens contributes 0.
        eps: lower bound of the norm that a vector is divided by.

    Returns:
        ``(batch,)`` float32, one value in [0, 4] for each example.

    Raises:
        LmcompressError: If the shapes differ.

    Reference:
        Sun et al., *Patient Knowledge Distillation for BERT Model Compression*, 2019,
        https://arxiv.org/abs/1908.09355, equation 7.

    Example:
        >>> pkd(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]]), torch.ones(1, 1))
        tensor([2.])
    """
    student, teacher, valid = as_states("pkd", student, teacher, mask)
    # positions among real tokens, so that padding on the left does not move them
    place = valid.long().cumsum(dim=-1) - 1
    wanted = position if position >= 0 else valid.sum(dim=-1, keepdim=True) + position
    chosen = (valid & (place == wanted)).unsqueeze(-1)
    student_state = student.masked_fill(~chosen, 0).sum(dim=1)
    teacher_state = teacher.masked_fill(~chosen, 0).sum(dim=1)
    difference = F.normalize(student_state, dim=-1, eps=eps) - F.normalize(teacher_state, dim=-1, eps=eps)
    return difference.square().sum(dim=-1)


def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor, *, causal: bool = False) -> Tensor:
    r"""Squared distance of attention, head by head: :math:`\frac{1}{H} \sum_h \sum_{ij} m_i m_j (S_{hij} - T_{hij})^2`.

    Args:
        student: ``(batch, heads, length, length)`` scores or probabilities.
        teacher: same shape, same feature.
        mask: ``(batch, length)``, 1 = real token.
        causal: count only ``j <= i``.

    Returns:
        ``(batch,)`` float32 sums over pairs of the mean over heads.

    Raises:
        LmcompressError: If the shapes differ; unequal heads need :func:`attention_mse_mean`.

    Reference:
        Jiao et al., *TinyBERT*, 2020, https://arxiv.org/abs/1909.10351, equation 7 (on scores, which they found
        better than probabilities).

    Note:
        TextBrewer's, without a mask, ignores every negative score; here only padding is left out.
    """
    student, teacher, pairs = as_attention("attention_mse", student, teacher, mask, causal)
    return _pair_distance(student, teacher, pairs)


def attention_mse_mean(student: Tensor, teacher: Tensor, mask: Tensor, *, causal: bool = False) -> Tensor:
    """Squared distance of attention averaged over heads, so that numbers of heads may differ.

    :func:`attention_mse` of the means over heads (TextBrewer's ``attention_mse_sum``, with means for sums).

    Args:
        student: ``(batch, heads_s, length, length)`` scores or probabilities.
        teacher: ``(batch, heads_t, length, length)``, same feature.
        mask: ``(batch, length)``, 1 = real token.
        causal: count only ``j <= i``.

    Returns:
        ``(batch,)`` float32 sums over pairs.

    Raises:
        LmcompressError: If batches or lengths differ.
    """
    student, teacher, pairs = as_attention("attention_mse_mean", student, teacher, mask, causal, same_heads=False)
    return _pair_distance(student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True), pairs)


def attention_ce(
    student: Tensor, teacher: Tensor, mask: Tensor, *, on: AttentionFeature, causal: bool = False, eps: float = 1e-12
) -> Tensor:
    r"""Cross-entropy of the student's attention under the teacher's, head by head.

    .. math:: -\frac{1}{H} \sum_h \sum_i m_i \sum_j T_{hij} \log S_{hij}

    The teacher's entropy is not subtracted: the value at the teacher is that entropy, not 0 (``minilm_attention`` has
    the same gradient and is 0 there).

    Args:
        student: ``(batch, heads, length, length)``.
        teacher: same shape.
        mask: ``(batch, length)``, 1 = real token.
        on: the feature: ``"scores"``, whose softmax over real keys is computed here, or ``"probabilities"``, which are
            used as they are (TextBrewer takes the softmax of probabilities, and the signal almost vanishes).
        causal: scores only of keys ``j <= i``.
        eps: lower bound of the student's probability inside the logarithm, for ``"probabilities"``.

    Returns:
        ``(batch,)`` float32 sums over query tokens of the mean over heads, in nats.

    Raises:
        LmcompressError: If the shapes differ (unequal heads need :func:`attention_ce_mean`), or ``on`` is neither.
    """
    student, teacher, pairs = as_attention("attention_ce", student, teacher, mask, causal)
    return _attention_cross_entropy(student, teacher, pairs, on, eps)


def attention_ce_mean(
    student: Tensor, teacher: Tensor, mask: Tensor, *, on: AttentionFeature, causal: bool = False, eps: float = 1e-12
) -> Tensor:
    """Cross-entropy of attention averaged over heads (scores before the softmax), so that numbers of heads may differ.

    :func:`attention_ce` of the means over heads.

    Args:
        student: ``(batch, heads_s, length, length)``.
        teacher: ``(batch, heads_t, length, length)``.
        mask: ``(batch, length)``, 1 = real token.
        on: ``"scores"`` or ``"probabilities"``, as in :func:`attention_ce`.
        causal: scores only of keys ``j <= i``.
        eps: lower bound of the student's probability inside the logarithm, for ``"probabilities"``.

    Returns:
        ``(batch,)`` float32 sums over query tokens, in nats; at the teacher its entropy, not 0.

    Raises:
        LmcompressError: If batches or lengths differ, or ``on`` is neither.
    """
    student, teacher, pairs = as_attention("attention_ce_mean", student, teacher, mask, causal, same_heads=False)
    student, teacher = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
    return _attention_cross_entropy(student, teacher, pairs, on, eps)


def as_states(
    name: str, student: Tensor, teacher: Tensor, mask: Tensor, same_width: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states in float32 with zeros at padding, the teacher's without gradient, and the boolean mask."""
    if student.dim() != 3 or teacher.dim() != 3:
        raise LmcompressError(
            f"{name} needs hidden states (batch, length, width), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    check_positions(name, student.shape[0], teacher.shape[0], student.shape[1], teacher.shape[1], mask)
    if same_width and student.shape[-1] != teacher.shape[-1]:
        raise LmcompressError(
            f"{name} needs states of one width, got student {student.shape[-1]} and teacher {teacher.shape[-1]}; "
            "add a projection (linear, relu or tanh) from the student's width to the teacher's"
        )
    valid = mask.bool()
    # filled, not multiplied: NaN at padding times 0 is NaN
    padding = ~valid.unsqueeze(-1)
    return student.float().masked_fill(padding, 0), teacher.detach().float().masked_fill(padding, 0), valid


def as_attention(
    name: str, student: Tensor, teacher: Tensor, mask: Tensor, causal: bool, same_heads: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention in float32, the teacher's without gradient, and the pairs (batch, 1, length, length)."""
    for side, given in (("student", student), ("teacher", teacher)):
        if given.dim() != 4 or given.shape[2] != given.shape[3]:
            raise LmcompressError(
                f"{name} needs attention (batch, heads, length, length), got {tuple(given.shape)} from the {side}"
            )
    check_positions(name, student.shape[0], teacher.shape[0], student.shape[2], teacher.shape[2], mask)
    if same_heads and student.shape[1] != teacher.shape[1]:
        raise LmcompressError(unequal_heads(name, student.shape[1], teacher.shape[1]))
    return student.float(), teacher.detach().float(), pairs_of(mask.bool(), causal).unsqueeze(1)


def check_positions(
    name: str, student_batch: int, teacher_batch: int, student_length: int, teacher_length: int, mask: Tensor
) -> None:
    """Refuse features of different batches or lengths, and a mask of another shape."""
    if student_batch != teacher_batch:
        raise LmcompressError(f"{name} needs one batch, got {student_batch} examples and the teacher's {teacher_batch}")
    if student_length != teacher_length:
        raise LmcompressError(
            f"{name} compares position by position, got student length {student_length} and teacher length "
            f"{teacher_length}; different lengths mean different tokenisations, of which only logits can be matched"
        )
    if mask.shape != (student_batch, student_length):
        raise LmcompressError(
            f"the mask must have shape (batch, length) = {(student_batch, student_length)}, got {tuple(mask.shape)}"
        )


def unequal_heads(name: str, student_heads: int, teacher_heads: int) -> str:
    """The message for unequal numbers of heads, with the matches that allow them."""
    mean = f"{name}_mean or " if name in ("attention_mse", "attention_ce") else ""
    return (
        f"{name} compares head by head, got {student_heads} heads of the student and {teacher_heads} of the teacher; "
        f"use {mean}minilmv2_query, minilmv2_key and minilmv2_value, which allow different numbers of heads"
    )


def pairs_of(valid: Tensor, causal: bool) -> Tensor:
    """``(batch, length, length)`` booleans: the query/key pairs that count."""
    pairs = valid.unsqueeze(2) & valid.unsqueeze(1)
    return pairs.tril() if causal else pairs


def _pair_distance(student: Tensor, teacher: Tensor, pairs: Tensor) -> Tensor:
    # each side is filled before the difference: a padded score may be infinite on both
    difference = student.masked_fill(~pairs, 0) - teacher.masked_fill(~pairs, 0)
    return difference.square().mean(dim=1).sum(dim=(1, 2))


def _attention_cross_entropy(student: Tensor, teacher: Tensor, pairs: Tensor, on: str, eps: float) -> Tensor:
    if on == "scores":
        log_q, p = log_softmax(student, pairs), log_softmax(teacher, pairs).exp()
    elif on == "probabilities":
        log_q, p = student.masked_fill(~pairs, 1).clamp(min=eps).log(), teacher.masked_fill(~pairs, 0)
    else:
        raise LmcompressError(f"on must be 'scores' or 'probabilities', got {on!r}")
    # log_q is 0 outside the pairs
    return sum_over_queries(-p * log_q)


def sum_over_queries(per_pair: Tensor) -> Tensor:
    """``(batch, heads, length, length)``, 0 outside the pairs, to ``(batch,)``: mean over heads, sum over tokens."""
    return per_pair.mean(dim=1).sum(dim=(1, 2))


def log_softmax(scores: Tensor, pairs: Tensor) -> Tensor:
    """Log softmax over the keys that count; 0 at the others."""
    # the lowest finite number, not -inf: a row of padding has no key at all, and would become NaN
    filled = scores.masked_fill(~pairs, torch.finfo(scores.dtype).min)
    return torch.log_softmax(filled, dim=-1).masked_fill(~pairs, 0)
