"""Matches that compare relations: between two layers, between positions, between relation heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcompress.distillation.matches.features import (
    as_attention,
    as_states,
    check_positions,
    log_softmax,
    pairs_of,
    sum_over_queries,
    unequal_heads,
)
from lmcompress.errors import LmcompressError


def gram(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    r"""Flow between two layers: distance of their Gram matrices over features (FSP matrices).

    .. math:: \frac{1}{d^2} \sum_{kl} (G^S_{kl} - G^T_{kl})^2, \quad G = \frac{1}{n} \sum_i m_i\, a_i b_i^\top

    with :math:`a, b` the states of the two layers and :math:`n` the example's number of real tokens.

    Args:
        student: two of ``(batch, length, d)``, projected to the teacher's width if theirs differ.
        teacher: two of the same shape.
        mask: ``(batch, length)``, 1 = real token.

    Returns:
        ``(batch,)`` float32, one value for each example.

    Raises:
        LmcompressError: If the shapes differ.

    Reference:
        Yim, Joo, Bae & Kim, *A Gift from Knowledge Distillation*, CVPR 2017,
        https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html, equations 1 and 2;
        TextBrewer's ``gram``/``fsp``.
    """
    first_student, first_teacher, valid = as_states("gram", student[0], teacher[0], mask)
    second_student, second_teacher, _ = as_states("gram", student[1], teacher[1], mask)
    count = valid.sum(dim=-1).clamp(min=1)[:, None, None]
    student_gram = _matmul(first_student.transpose(1, 2), second_student) / count
    teacher_gram = _matmul(first_teacher.transpose(1, 2), second_teacher) / count
    return (student_gram - teacher_gram).square().mean(dim=(1, 2))


def nst(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor, *, causal: bool = False
) -> Tensor:
    r"""Similarity between positions of two layers: distance of their Gram matrices over positions.

    .. math:: \sum_{ij} m_i m_j (G^S_{ij} - G^T_{ij})^2, \quad G_{ij} = \frac{1}{d} a_i^\top b_j

    with :math:`a, b` the states of the two layers and :math:`d` each model's own width: no projection is needed.

    Args:
        student: two of ``(batch, length, d_s)``; one layer given twice relates it to itself.
        teacher: two of ``(batch, length, d_t)``.
        mask: ``(batch, length)``, 1 = real token.
        causal: count only ``j <= i``.

    Returns:
        ``(batch,)`` float32 sums over pairs.

    Raises:
        LmcompressError: If batches or lengths differ.

    Reference:
        Huang & Wang, *Like What You Like: Knowledge Distill via Neuron Selectivity Transfer*, 2017,
        https://arxiv.org/abs/1707.01219.

    Note:
        This is TextBrewer's ``mmd``/``nst``: a match of linear Gram matrices, element by element, not the paper's
        maximum mean discrepancy, which compares sets of neurons without their order.
    """
    first_student, first_teacher, valid = as_states("nst", student[0], teacher[0], mask, same_width=False)
    second_student, second_teacher, _ = as_states("nst", student[1], teacher[1], mask, same_width=False)
    student_gram = _matmul(first_student, second_student.transpose(1, 2)) / first_student.shape[-1]
    teacher_gram = _matmul(first_teacher, second_teacher.transpose(1, 2)) / first_teacher.shape[-1]
    return (student_gram - teacher_gram).square().masked_fill(~pairs_of(valid, causal), 0).sum(dim=(1, 2))


def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor, *, causal: bool = False) -> Tensor:
    r"""KL(teacher ‖ student) of attention distributions, head by head (MiniLM's attention transfer).

    .. math:: \frac{1}{H} \sum_h \sum_i m_i \mathrm{KL}(T_{hi} \| S_{hi}), \quad T_{hi}, S_{hi} = \mathrm{softmax}_j

    Args:
        student: ``(batch, heads, length, length)`` scores; their softmax over real keys is computed here.
        teacher: same shape.
        mask: ``(batch, length)``, 1 = real token.
        causal: only keys ``j <= i``.

    Returns:
        ``(batch,)`` float32 sums over query tokens of the mean over heads, in nats.

    Raises:
        LmcompressError: If the shapes differ; unequal heads need ``minilmv2_query``, ``_key`` and ``_value``.

    Reference:
        Wang et al., *MiniLM*, 2020, https://arxiv.org/abs/2002.10957, section 3.1 (``L_AT``, of the last layers).
    """
    student, teacher, pairs = as_attention("minilm_attention", student, teacher, mask, causal)
    return _relation_divergence(student, teacher, pairs)


def value_relation_kl(student: Tensor, teacher: Tensor, mask: Tensor, *, causal: bool = False) -> Tensor:
    r"""KL(teacher ‖ student) of the relations between values, head by head (MiniLM's value relation).

    .. math:: \frac{1}{H} \sum_h \sum_i m_i \mathrm{KL}(R^T_{hi} \| R^S_{hi}), \quad
        R_h = \mathrm{softmax}(V_h V_h^\top / \sqrt{k})

    Args:
        student: ``(batch, heads, length, k_s)`` values.
        teacher: ``(batch, heads, length, k_t)``; head sizes may differ.
        mask: ``(batch, length)``, 1 = real token.
        causal: only keys ``j <= i``.

    Returns:
        ``(batch,)`` float32 sums over query tokens of the mean over heads, in nats.

    Raises:
        LmcompressError: If batches, lengths or numbers of heads differ.

    Reference:
        Wang et al., *MiniLM*, 2020, https://arxiv.org/abs/2002.10957, section 3.2 (``L_VR``, of the last layers).
    """
    _check_vectors("minilm_value", student, teacher, mask)
    if student.shape[1] != teacher.shape[1]:
        raise LmcompressError(unequal_heads("minilm_value", student.shape[1], teacher.shape[1]))
    valid = mask.bool()
    return _relation_divergence(
        _relations(student, valid, student.shape[1]),
        _relations(teacher.detach(), valid, teacher.shape[1]),
        pairs_of(valid, causal).unsqueeze(1),
    )


def relation_kl(
    student: Tensor, teacher: Tensor, mask: Tensor, *, relation_heads: int | None = None, causal: bool = False
) -> Tensor:
    r"""KL(teacher ‖ student) of self-attention relations over regrouped heads (MiniLMv2).

    .. math:: \frac{1}{R} \sum_r \sum_i m_i \mathrm{KL}(R^T_{ri} \| R^S_{ri}), \quad
        R_r = \mathrm{softmax}(A_r A_r^\top / \sqrt{d_r})

    with :math:`A` the queries, keys or values of all heads side by side, split into :math:`R` relation heads of width
    :math:`d_r`. Numbers of heads and widths of student and teacher may differ.

    Args:
        student: ``(batch, heads_s, length, k_s)`` queries, keys or values.
        teacher: ``(batch, heads_t, length, k_t)``, of the same kind.
        mask: ``(batch, length)``, 1 = real token.
        relation_heads: :math:`R`, a divisor of both ``heads * k``; default the teacher's number of heads. The paper
            uses more (48 for 12 heads), which helps.
        causal: only keys ``j <= i``.

    Returns:
        ``(batch,)`` float32 sums over query tokens of the mean over relation heads, in nats.

    Raises:
        LmcompressError: If batches or lengths differ, or a width cannot be split into ``relation_heads``.

    Reference:
        Wang et al., *MiniLMv2*, 2021, https://arxiv.org/abs/2012.15828, section 3.
    """
    _check_vectors("minilmv2", student, teacher, mask)
    heads = teacher.shape[1] if relation_heads is None else relation_heads
    for side, vectors in (("student", student), ("teacher", teacher)):
        width = vectors.shape[1] * vectors.shape[3]
        if heads < 1 or width % heads:
            raise LmcompressError(
                f"relation_heads must be >= 1 and divide the {side}'s width {width} ({vectors.shape[1]} heads of "
                f"{vectors.shape[3]}), got {heads}; choose a common divisor of both widths"
            )
    valid = mask.bool()
    return _relation_divergence(
        _relations(student, valid, heads),
        _relations(teacher.detach(), valid, heads),
        pairs_of(valid, causal).unsqueeze(1),
    )


def attention_transfer(
    student: Tensor, teacher: Tensor, mask: Tensor, *, power: float = 2.0, eps: float = 1e-6
) -> Tensor:
    r"""Distance of normalised saliency maps of hidden states, which show the active positions.

    .. math:: \frac{1}{n} \sum_i m_i \left( \frac{Q^S_i}{\|Q^S\|_2} - \frac{Q^T_i}{\|Q^T\|_2} \right)^2, \quad
        Q_i = \frac{1}{d} \sum_k |h_{ik}|^p

    with norms over the :math:`n` real tokens of the example. No projection is needed when widths differ.

    Args:
        student: ``(batch, length, d_s)``.
        teacher: ``(batch, length, d_t)``.
        mask: ``(batch, length)``, 1 = real token.
        power: :math:`p`, >= 1; larger values emphasize the most active neurons.
        eps: lower bound of the norm that a map is divided by.

    Returns:
        ``(batch,)`` float32, one value for each example.

    Raises:
        LmcompressError: If batches or lengths differ, or ``power`` < 1.

    Reference:
        Zagoruyko & Komodakis, *Paying More Attention to Attention*, 2017, https://arxiv.org/abs/1612.03928,
        equation 2, with the mean of squares of the authors' code in place of the norm. Values are small: the
        authors weigh this by 1000.
    """
    if not power >= 1:
        raise LmcompressError(f"power must be >= 1, got {power}")
    student, teacher, valid = as_states("attention_transfer", student, teacher, mask, same_width=False)
    maps = [F.normalize(h.abs().pow(power).mean(dim=-1), dim=-1, eps=eps) for h in (student, teacher)]
    return (maps[0] - maps[1]).square().sum(dim=-1) / valid.sum(dim=-1).clamp(min=1)


def _check_vectors(name: str, student: Tensor, teacher: Tensor, mask: Tensor) -> None:
    if student.dim() != 4 or teacher.dim() != 4:
        raise LmcompressError(
            f"{name} needs vectors of heads (batch, heads, length, size), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    check_positions(name, student.shape[0], teacher.shape[0], student.shape[2], teacher.shape[2], mask)


def _relation_divergence(student: Tensor, teacher: Tensor, pairs: Tensor) -> Tensor:
    log_q, log_p = log_softmax(student, pairs), log_softmax(teacher, pairs)
    # both are 0 outside the pairs, hence their difference
    return sum_over_queries(log_p.exp() * (log_p - log_q))


def _relations(vectors: Tensor, valid: Tensor, heads: int) -> Tensor:
    """``(batch, H, length, k)`` to scaled dot products ``(batch, heads, length, length)``."""
    batch, _, length, _ = vectors.shape
    states = vectors.float().transpose(1, 2).reshape(batch, length, -1).masked_fill(~valid.unsqueeze(-1), 0)
    split = states.view(batch, length, heads, -1).transpose(1, 2)
    return _matmul(split, split.transpose(2, 3)) / math.sqrt(split.shape[-1])


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    # autocast would multiply in bfloat16
    with torch.autocast(left.device.type, enabled=False):
        return left @ right
