"""Contrastive losses of tokens or sequences: pure functions, one value per token or sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcompress.errors import LmcompressError

# lower bound of the norm that a vector is divided by
EPS = 1e-6


def info_nce(
    anchors: Tensor, positives: Tensor, candidates: Tensor, allowed: Tensor, *, temperature: float = 0.1
) -> Tensor:
    r"""InfoNCE: cross-entropy of picking each anchor's positive among the candidates.

    .. math:: -\log \frac{e^{\cos(a_i, p_i) / \tau}}
        {e^{\cos(a_i, p_i) / \tau} + \sum_{k \in S_i} e^{\cos(a_i, c_k) / \tau}}

    Args:
        anchors: ``(batch, n, d)``, any floating dtype.
        positives: same shape.
        candidates: ``(batch, m, d)``, or ``(1, m, d)`` to share them between rows.
        allowed: ``(batch, n, m)`` booleans, which candidates are negatives of which anchor; may be broadcast.
        temperature: :math:`\tau`, > 0; low values weight the nearest negatives only.

    Returns:
        ``(batch, n)`` float32, in nats, > 0; exactly 0 for an anchor without negatives. Gradients flow into all three.

    Raises:
        LmcompressError: If the shapes do not fit together, or ``temperature`` is not > 0.

    Reference:
        van den Oord, Li & Vinyals, *Representation Learning with Contrastive Predictive Coding*, 2018,
        https://arxiv.org/abs/1807.03748, equation 4, with cosines as in Tao et al. 2022 (:func:`token_contrast`).

    Example:
        >>> one, other = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> info_nce(one, one, other, torch.ones(1, 1, 1, dtype=torch.bool), temperature=1.0)  # log(1 + 1/e)
        tensor([[0.3133]])
    """
    if not temperature > 0:
        raise LmcompressError(f"temperature must be > 0, got {temperature}")
    if anchors.dim() != 3 or anchors.shape != positives.shape or candidates.shape[-1] != anchors.shape[-1]:
        raise LmcompressError(
            "anchors and positives must have one shape (batch, n, width) and candidates that width, got "
            f"{tuple(anchors.shape)}, {tuple(positives.shape)} and {tuple(candidates.shape)}; a projection brings "
            "different widths together"
        )
    # autocast would multiply in bfloat16, which leaves two digits for a cosine
    with torch.autocast(anchors.device.type, enabled=False):
        a, p, c = (F.normalize(part.float(), dim=-1, eps=EPS) for part in (anchors, positives, candidates))
        positive = (a * p).sum(dim=-1, keepdim=True) / temperature
        # the lowest finite number, not -inf: an anchor without negatives would get the gradient 0 * inf
        others = ((a @ c.transpose(1, 2)) / temperature).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return (torch.logsumexp(torch.cat([positive, others], dim=-1), dim=-1, keepdim=True) - positive).squeeze(-1)


def other_tokens(mask: Tensor, input_ids: Tensor | None = None) -> Tensor:
    """The tokens of a sequence that may be negatives of each other: real ones, except the token itself.

    Args:
        mask: ``(batch, length)``, 1 = real token.
        input_ids: ``(batch, length)``; if given, tokens with the same id are excluded too.

    Returns:
        ``(batch, length, length)`` booleans, row *i* for the token *i*.

    Example:
        >>> other_tokens(torch.ones(1, 3), torch.tensor([[5, 6, 5]])).int()
        tensor([[[0, 1, 0],
                 [1, 0, 1],
                 [0, 1, 0]]], dtype=torch.int32)
    """
    valid = mask.bool()
    pairs = valid.unsqueeze(2) & valid.unsqueeze(1)
    if input_ids is not None:
        return pairs & (input_ids.unsqueeze(2) != input_ids.unsqueeze(1))
    return pairs & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)


def sampled(allowed: Tensor, count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """At most ``count`` allowed entries in each row, sampled uniformly without replacement.

    Args:
        allowed: ``(..., m)`` booleans.
        count: maximum number kept.
        generator: default: the global one of the device.

    Returns:
        The same shape.

    Raises:
        LmcompressError: If ``count`` is less than 1.
    """
    if count < 1:
        raise LmcompressError(f"the number of negatives must be at least 1, got {count}")
    if count >= allowed.shape[-1]:
        return allowed
    drawn = torch.rand(allowed.shape, device=allowed.device, generator=generator).masked_fill(~allowed, -1.0)
    chosen = torch.zeros_like(allowed).scatter(-1, drawn.topk(count, dim=-1).indices, True)
    return chosen & allowed


def token_contrast(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    temperature: float = 0.1,
    negatives: Tensor | None = None,
    input_ids: Tensor | None = None,
    num_negatives: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Contrast of every token with the other tokens of its sequence.

    .. math:: \ell_i = -\log \frac{e^{\cos(q_i, t_i) / \tau}}{\sum_{j \in \{i\} \cup S_i} e^{\cos(q_i, t_j) / \tau}}

    with :math:`q_i` the student's state of token *i* (perhaps smoothed, see :class:`MemoryBank`), :math:`t_j` the
    teacher's, and :math:`S_i` other real tokens of the same sequence.

    Args:
        student: ``(batch, length, d)``, any floating dtype.
        teacher: same shape; passed without gradient unless a projection of it is trained.
        mask: ``(batch, length)``, 1 = real token; values at padding are ignored.
        temperature: :math:`\tau`, > 0.
        negatives: source of the negatives, shaped as ``teacher``, the default; the student's own
            states for the ablation.
        input_ids: ``(batch, length)``; if given, tokens with the same id are not negatives.
        num_negatives: number sampled for each token; default: all.
        generator: random generator of the sampling; default: the global one of the device.

    Returns:
        ``(batch, length)`` float32, in nats, >= 0; 0 at padding and for a token without negatives.

    Raises:
        LmcompressError: If the shapes do not fit together, or a number is out of range.

    Reference:
        Tao et al., *Compression of Generative Pre-trained Language Models via Quantization*, 2022,
        https://arxiv.org/abs/2203.10705, section 4.1.

    Note:
        The paper does not say whether another occurrence of the same token may be a negative: both are possible here.
        Its number of negatives is not a default here; all other tokens of the sequence are.

    Example:
        >>> states = torch.eye(2).unsqueeze(0)
        >>> token_contrast(states, states, torch.ones(1, 2), temperature=1.0)  # log(1 + 1/e)
        tensor([[0.3133, 0.3133]])
    """
    _check_states("token_contrast", student, teacher, mask)
    padding = ~mask.bool().unsqueeze(-1)
    # filled, not multiplied: NaN at padding times 0 is NaN
    student, teacher = student.masked_fill(padding, 0), teacher.masked_fill(padding, 0)
    candidates = teacher if negatives is None else negatives.masked_fill(padding, 0)
    allowed = other_tokens(mask, input_ids)
    if num_negatives is not None:
        allowed = sampled(allowed, num_negatives, generator=generator)
    loss = info_nce(student, teacher, candidates, allowed, temperature=temperature)
    return loss.masked_fill(padding.squeeze(-1), 0)


def sequence_contrast(
    student: Tensor, teacher: Tensor, mask: Tensor, *, temperature: float = 0.1, teacher_mask: Tensor | None = None
) -> Tensor:
    """Contrast of every sequence, as the mean of its tokens, with the other sequences of the batch.

    Args:
        student: ``(batch, length, d)``.
        teacher: ``(batch, other length, d)``.
        mask: ``(batch, length)`` of the student, 1 = real token.
        temperature: > 0.
        teacher_mask: mask of the teacher; default: ``mask``.

    Returns:
        ``(batch,)`` float32, in nats; 0 in a batch of one.

    Raises:
        LmcompressError: If the shapes do not fit together, or ``temperature`` is not > 0.

    Reference:
        Tao et al. 2022, https://arxiv.org/abs/2203.10705, section 5 (the ablation of token against sequence level).

    Note:
        The negatives are those of the micro-batch, so that a batch of 8 × 1 is *not* 1 × 8.
    """
    teacher_mask = mask if teacher_mask is None else teacher_mask
    for side, states, valid in (("student", student, mask), ("teacher", teacher, teacher_mask)):
        if states.dim() != 3 or valid.shape != states.shape[:2] or len(states) != len(mask):
            raise LmcompressError(
                f"sequence_contrast needs states (batch, length, width) of one batch and a mask (batch, length), got "
                f"{tuple(states.shape)} and {tuple(valid.shape)} of the {side}"
            )
    mine, theirs = _mean_token(student, mask).unsqueeze(0), _mean_token(teacher, teacher_mask).unsqueeze(0)
    others = ~torch.eye(len(student), dtype=torch.bool, device=student.device).unsqueeze(0)
    return info_nce(mine, theirs, theirs, others, temperature=temperature).squeeze(0)


def homogeneity(states: Tensor, mask: Tensor) -> Tensor:
    r"""Homogeneity of the tokens of a sequence: the mean cosine of two of them, 1 if all have the same direction.

    .. math:: \frac{1}{n (n - 1)} \sum_{i \neq j} \cos(h_i, h_j)
        = \frac{\| \sum_i \hat h_i \|^2 - n}{n (n - 1)}, \quad \hat h = h / \|h\|

    Args:
        states: ``(batch, length, d)``, any floating dtype.
        mask: ``(batch, length)``, 1 = real token.

    Returns:
        ``(batch,)`` float32 in [-1, 1], without gradient; 0 for fewer than two tokens.

    Reference:
        Tao et al. 2022, https://arxiv.org/abs/2203.10705, section 3: the effect of low bits on a language model.

    Example:
        >>> homogeneity(torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]]), torch.ones(1, 3))
        tensor([0.3333])
    """
    valid = mask.bool()
    unit = F.normalize(states.detach().float().masked_fill(~valid.unsqueeze(-1), 0), dim=-1, eps=EPS)
    count = valid.sum(dim=-1).float()
    # a zero vector has no direction, and no cosine of 1 with itself
    total = unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(dim=(1, 2))
    return total / (count * (count - 1)).clamp(min=1)


def _check_states(name: str, student: Tensor, teacher: Tensor, mask: Tensor) -> None:
    if student.dim() != 3 or student.shape[:2] != teacher.shape[:2]:
        raise LmcompressError(
            f"{name} needs states (batch, length, width) of the same tokens, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; different lengths mean different tokenisations"
        )
    if mask.shape != student.shape[:2]:
        raise LmcompressError(
            f"the mask must have shape (batch, length) = {tuple(student.shape[:2])}, got {tuple(mask.shape)}"
        )


def _mean_token(states: Tensor, mask: Tensor) -> Tensor:
    valid = mask.bool()
    total = states.float().masked_fill(~valid.unsqueeze(-1), 0).sum(dim=1)
    return total / valid.sum(dim=1, keepdim=True).clamp(min=1)
