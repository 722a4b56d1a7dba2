"""The relative error of approximated numbers."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 18


def relative_error(before: Tensor, after: Tensor) -> float:
    """Squared error over squared norm, in float32; 0 if all values are 0.

    Args:
        before: any shape, floating.
        after: the same shape.

    Example:
        >>> import torch
        >>> relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0]))
        0.04
    """
    norm, error = torch.zeros((), device=before.device), torch.zeros((), device=before.device)
    rows = max(1, _BLOCK * before.shape[0] // max(1, before.numel())) if before.dim() else 1
    # block by block: no copies as long as a matrix, and both are read from the cache
    for old, new in zip(*(torch.atleast_1d(x.detach()).split(rows) for x in (before, after)), strict=True):
        old, new = old.float(), new.float()
        norm += old.square().sum()
        error += (old - new).square_().sum()
    return float(error) / float(norm) if norm > 0 else 0.0
