"""Losses between distributions over two vocabularies: one value per row, unreduced, float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcompress.distillation.losses.distributions import check_temperature
from lmcompress.errors import LmcompressError


def universal_logit_distance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    scale_by_temperature: bool = True,
) -> Tensor:
    r"""Distance of the sorted probabilities of two vocabularies (ULD), times ``temperature ** 2``.

    .. math:: T^2 \sum_i |p_{(i)} - q_{(i)}|, \quad p = \mathrm{softmax}(z^t / T), q = \mathrm{softmax}(z^s / T)

    with both sorted in descending order and the shorter one padded with zeros: the Wasserstein distance under a
    uniform cost, whichever tokens the probabilities belong to. It does not see which token is likely, only how
    likely the likeliest are; the labels say the rest.

    Args:
        student_logits: ``(..., C)``, any floating dtype; gradients flow here only.
        teacher_logits: ``(..., D)``, the other axes as the student's.
        temperature: above 1 spreads both distributions; a float, or a tensor ``(...)`` with one per row.
        scale_by_temperature: whether to multiply by ``temperature ** 2``, the scale of the gradient.

    Returns:
        ``(...)`` float32 in [0, 2] times the factor, 0 where the sorted probabilities agree.

    Raises:
        LmcompressError: If the axes before the last differ, or a temperature is not > 0.

    Reference:
        Boizard et al., *Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs*, 2024,
        https://arxiv.org/abs/2402.12030, section 3. The temperature is ours; the paper's is 1.

    Example:
        >>> universal_logit_distance(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.25, 0.25]]).log())
        tensor([0.5000])
    """
    _check_rows(student_logits, teacher_logits)
    divisor = check_temperature(temperature, student_logits)
    per_class = divisor if isinstance(divisor, float) else divisor.unsqueeze(-1)
    mine = (student_logits.float() / per_class).softmax(-1).sort(dim=-1, descending=True).values
    theirs = (teacher_logits.detach().float() / per_class).softmax(-1).sort(dim=-1, descending=True).values
    size = max(mine.shape[-1], theirs.shape[-1])
    mine, theirs = (F.pad(sorted_, (0, size - sorted_.shape[-1])) for sorted_ in (mine, theirs))
    return (mine - theirs).abs().sum(-1) * (divisor**2 if scale_by_temperature else 1.0)


def over_shared_tokens(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    *,
    temperature: float = 1.0,
    rest: bool = True,
) -> tuple[Tensor, Tensor]:
    """Logits of both over the tokens that their vocabularies share, for a loss at temperature 1.

    Args:
        student_logits: ``(..., C)``, any floating dtype.
        teacher_logits: ``(..., D)``, the other axes as the student's.
        student_ids: ``(shared,)`` int64, the student's ids of the shared tokens.
        teacher_ids: ``(shared,)`` int64, the teacher's ids of the same tokens.
        temperature: divisor of all logits.
        rest: whether the tokens that are not shared become one class more, with their probability; else both
            distributions are renormalized over the shared tokens. Where all tokens of one vocabulary are shared there
            is no such class.

    Returns:
        ``(..., shared)`` or ``(..., shared + 1)`` float32 of the student and of the teacher, with gradient to the
        student.

    Raises:
        LmcompressError: If the axes before the last differ.

    Example:
        >>> logits = torch.tensor([0.5, 0.25, 0.25]).log()
        >>> mine, theirs = over_shared_tokens(logits, logits, torch.tensor([0]), torch.tensor([0]))
        >>> mine.softmax(-1)
        tensor([0.5000, 0.5000])
    """
    _check_rows(student_logits, teacher_logits)
    sides = (student_logits.float() / temperature, student_ids), (teacher_logits.float() / temperature, teacher_ids)
    kept = [logits[..., ids] for logits, ids in sides]
    if rest and all(logits.shape[-1] > len(ids) for logits, ids in sides):
        others = [logits.index_fill(-1, ids, -torch.inf).logsumexp(-1, keepdim=True) for logits, ids in sides]
        kept = [torch.cat(pair, dim=-1) for pair in zip(kept, others, strict=True)]
    return kept[0], kept[1]


def _check_rows(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise LmcompressError(
            f"student and teacher logits must have the same rows, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}; only the last axis, the vocabulary, may differ"
        )
