"""What a head says: the logits of its outputs, of both ends for a head that answers by spans."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def head_logits(outputs: Any) -> Tensor | None:
    """The logits in a model's outputs, in one tensor.

    Args:
        outputs: of a model, by name.

    Returns:
        ``logits``; for a head of question answering, whose logits have two names, ``(batch, length, 2)`` with start and
        end; None if there are neither.
    """
    named = outputs if hasattr(outputs, "get") else {}
    logits = named.get("logits")
    if isinstance(logits, Tensor):
        return logits
    start, end = named.get("start_logits"), named.get("end_logits")
    if isinstance(start, Tensor) and isinstance(end, Tensor):
        return torch.stack((start, end), dim=-1)
    return None
