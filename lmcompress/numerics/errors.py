"""The relative error of approximated numbers."""

from __future__ import annotations

from torch import Tensor


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
    before, after = before.detach().float(), after.detach().float()
    norm = float(before.square().sum())
    return float((before - after).square().sum()) / norm if norm > 0 else 0.0
