"""Matches of sentences' embeddings: what is compared is pooled over the tokens first."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lmcompress.activations.pooling import pooled
from lmcompress.distillation.matches.features import as_states


def embedding_mse(
    student: Tensor, teacher: Tensor, mask: Tensor, *, pooling: str = "mean", normalize: bool = True
) -> Tensor:
    r"""Squared distance of sentence embeddings: :math:`\left\| \frac{u}{\|u\|_2} - \frac{v}{\|v\|_2} \right\|_2^2`.

    ``u`` and ``v`` are pooled over the tokens of the sentence. Of unit vectors it is twice :func:`embedding_cosine`;
    without ``normalize`` the lengths are learned too.

    Args:
        student: ``(batch, length, d)``, projected to the teacher's width if theirs differ.
        teacher: same shape.
        mask: ``(batch, length)``, 1 = real token.
        pooling: ``mean``, ``cls`` or ``max``; see :func:`lmcompress.activations.pooling.pooled`.
        normalize: whether both vectors are divided by their lengths.

    Returns:
        ``(batch,)`` float32, one value for each sentence, in [0, 4] if normalized.

    Raises:
        LmcompressError: If the shapes differ, or the pooling is unknown.

    Reference:
        Reimers & Gurevych, *Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation*, 2020,
        https://arxiv.org/abs/2004.09813, equation 1 (there without ``normalize``, and a mean over dimensions).

    Example:
        >>> import torch
        >>> embedding_mse(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]]), torch.ones(1, 1))
        tensor([2.])
    """
    mine, theirs = _embeddings("embedding_mse", student, teacher, mask, pooling)
    if normalize:
        mine, theirs = F.normalize(mine, dim=-1), F.normalize(theirs, dim=-1)
    return (mine - theirs).square().sum(dim=-1)


def embedding_cosine(student: Tensor, teacher: Tensor, mask: Tensor, *, pooling: str = "mean") -> Tensor:
    r"""Angle of sentence embeddings: :math:`1 - \cos(u, v)`.

    Args:
        student: ``(batch, length, d)``, projected to the teacher's width if theirs differ.
        teacher: same shape.
        mask: ``(batch, length)``, 1 = real token.
        pooling: as for :func:`embedding_mse`.

    Returns:
        ``(batch,)`` float32, one value in [0, 2] for each sentence, 0 for one of padding alone.

    Raises:
        LmcompressError: If the shapes differ, or the pooling is unknown.

    Example:
        >>> import torch
        >>> embedding_cosine(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]]), torch.ones(1, 1))
        tensor([1.])
    """
    mine, theirs = _embeddings("embedding_cosine", student, teacher, mask, pooling)
    # a row of padding alone has no angle
    return (1 - F.cosine_similarity(mine, theirs, dim=-1)).masked_fill(~mask.bool().any(dim=-1), 0)


def _embeddings(name: str, student: Tensor, teacher: Tensor, mask: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    student, teacher, valid = as_states(name, student, teacher, mask)
    return pooled(student, valid, pooling), pooled(teacher, valid, pooling)
