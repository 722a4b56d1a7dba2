"""The common base of all compact modules."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lmcompress.errors import CheckpointError


class Compact(nn.Module, ABC):
    """A replacement of a module with a full matrix.

    In each of them ``weight`` is a tensor of another shape than the matrix it replaces, so that a loader without
    support for it refuses the file instead of leaving random weights in place.

    Args:
        in_features: input width; for an embedding, the number of tokens.
        out_features: output width.
    """

    weight: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-accumulates for one token."""

    def check(self, name: str) -> None:
        """Refuse buffers with values that this library never writes.

        Args:
            name: name of the module in the error.

        Raises:
            CheckpointError: If there are NaN or infinite values.
        """


def sizes(*numbers: int, device: torch.device | str | None = None) -> Tensor:
    """The tensor stored under the name ``weight`` for factors: their sizes.

    Args:
        *numbers: the sizes.
        device: device of the tensor.

    Returns:
        ``(len(numbers),)`` int64.
    """
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def check_sizes(found: Tensor, expected: tuple[int, ...], name: str) -> None:
    """Refuse sizes that differ from the module's.

    Args:
        found: sizes as loaded.
        expected: sizes of the module.
        name: name of the tensor in the error.

    Raises:
        CheckpointError: If they differ.
    """
    if found.is_floating_point() or found.tolist() != list(expected):
        raise CheckpointError(
            f"tensor {name} must hold sizes {list(expected)}, got {found.tolist()[:8]}: config.json and the weights "
            "do not belong together; fetch or copy both again"
        )
