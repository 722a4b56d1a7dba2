"""Vectors of sentences out of the vectors of their tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError, nearest


def pooled(states: Tensor, mask: Tensor, pooling: str = "mean") -> Tensor:
    """One vector for each sentence.

    Args:
        states: ``(batch, length, width)``, the last hidden states.
        mask: ``(batch, length)``, 1 = real token; what is at padding is ignored.
        pooling: one of :data:`POOLINGS`: ``mean`` over tokens, the first token (``cls``), or ``max`` in each dimension.

    Returns:
        ``(batch, width)`` in the dtype of the states.

    Raises:
        LmcompressError: If the pooling is unknown.

    Reference:
        Reimers & Gurevych, *Sentence-BERT*, 2019, https://arxiv.org/abs/1908.10084, section 3.

    Example:
        >>> pooled(torch.tensor([[[1.0, 4.0], [3.0, 0.0], [9.0, 9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2., 2.]])
    """
    if pooling not in POOLINGS:
        raise LmcompressError(f"unknown pooling {pooling!r}{nearest(str(pooling), POOLINGS)}")
    return POOLINGS[pooling](states, mask.unsqueeze(-1) == 0)


def _mean(states: Tensor, padding: Tensor) -> Tensor:
    count = (~padding).to(states.dtype).sum(dim=1)
    return states.masked_fill(padding, 0.0).sum(dim=1) / count.clamp(min=1.0)


def _first(states: Tensor, padding: Tensor) -> Tensor:
    del padding
    return states[:, 0]


def _max(states: Tensor, padding: Tensor) -> Tensor:
    return states.masked_fill(padding, torch.finfo(states.dtype).min).amax(dim=1)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "cls": _first, "max": _max}
"""``(states, padding (batch, length, 1)) -> (batch, width)`` by name."""
