"""The interface of a matmul kernel."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lmcompress.kernels.matrix import Inputs, Matrix, Prepacked

UNAVAILABLE = (RuntimeError, AttributeError, TypeError, IndexError)
"""What a torch without an operation raises, or with another signature of it."""


def unavailable(error: Exception) -> str:
    """The reason why a kernel does not work, of an error that its first matmul raised.

    Args:
        error: one of :data:`UNAVAILABLE`, or another.
    """
    return f"not in this torch, or not for this device: {(str(error) or repr(error)).splitlines()[0]}"


class Kernel(Protocol):
    """A matmul kernel."""

    @property
    def name(self) -> str:
        """Its name in settings and logs."""

    def refusal(self, matrix: Matrix, inputs: Inputs | None, dtype: torch.dtype, few: bool = False) -> str | None:
        """Why this kernel does not accept a matrix, or few or more tokens of this dtype; ``None`` if it does."""

    def prepack(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> Prepacked:
        """A matrix in the kernel's own layout: unpacked, and widened if necessary."""
