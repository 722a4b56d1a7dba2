"""What all compact modules have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lmcompress.errors import CheckpointError


class Compact(nn.Module, ABC):
    """A module in the place of one with a matrix, which it does not have.

    ``weight`` is in every one of them a tensor of another shape than the matrix that it replaces, so that a loader that
    knows nothing of this refuses the file instead of leaving random weights in place.

    Args:
        in_features: width of the input; of an embedding, the number of tokens.
        out_features: width of the output.
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
        """Refuse tensors that are no parameters and that nothing here writes.

        Args:
            name: of the module, for the error.

        Raises:
            CheckpointError: If some are NaN or infinite.
        """


def sizes(*numbers: int, device: torch.device | str | None = None) -> Tensor:
    """What lies under the name ``weight`` where there are factors: their sizes.

    Args:
        *numbers: the sizes.
        device: of the tensor.

    Returns:
        ``(len(numbers),)`` int64.
    """
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def check_sizes(found: Tensor, expected: tuple[int, ...], name: str) -> None:
    """Refuse sizes that are not those of the module.

    Args:
        found: as loaded.
        expected: of the module.
        name: of the tensor, for the error.

    Raises:
        CheckpointError: If they differ.
    """
    if found.is_floating_point() or found.tolist() != list(expected):
        raise CheckpointError(
            f"tensor {name} must say the sizes {list(expected)}, got {found.tolist()[:8]}: config.json and the weights "
            "do not belong together; fetch or copy both again"
        )
