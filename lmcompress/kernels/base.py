"""The interface of a matmul kernel."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lmcompress.kernels.matrix import Inputs, Matrix, Prepacked


class Kernel(Protocol):
    """A matmul kernel."""

    @property
    def name(self) -> str:
        """Its name in settings and logs."""

    def refusal(self, matrix: Matrix, inputs: Inputs | None, dtype: torch.dtype) -> str | None:
        """Why this kernel does not accept a matrix, or an input of this dtype; ``None`` if it does."""

    def prepack(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> Prepacked:
        """A matrix in the kernel's own layout: unpacked, and widened if necessary."""
