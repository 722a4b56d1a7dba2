"""The learned projection from a student's hidden width to its teacher's, for matches of different widths."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcompress.errors import LmcompressError, nearest

Activation = Literal["linear", "relu", "tanh"]
Initialisation = Literal["normal", "identity"]

_ACTIVATIONS = {"linear": lambda x: x, "relu": torch.relu, "tanh": torch.tanh}


class Projection(nn.Module):
    """An affine map ``(..., student_dim) -> (..., teacher_dim)``, optionally followed by an activation.

    Applied to the student's side of a match and trained with the student; not saved with it.
    Computed in float32 outside autocast, like all arithmetic of losses.

    Args:
        student_dim: input width.
        teacher_dim: output width.
        activation: ``"linear"`` (none), ``"relu"`` or ``"tanh"``.
        initialisation: ``"normal"``: weight N(0, 0.02) as in TextBrewer; ``"identity"``: the weight is the identity,
            so that training starts as if there were no projection (CoFi); needs equal widths.
        seed: seed of the normal weight; the global generator is unaffected. ``None`` uses the global one.

    Raises:
        LmcompressError: If a width is < 1, an activation or initialisation is unknown, or the
            identity is requested for unequal widths.

    Reference:
        Jiao et al., *TinyBERT*, 2020, https://arxiv.org/abs/1909.10351, equations 8 and 9 (``W_h``, ``W_e``); Xia,
        Zhong & Chen, *CoFi*, 2022, https://arxiv.org/abs/2204.00408, section 3.2 (``W_layer``, from the identity).

    Example:
        >>> Projection(2, 3, seed=0)(torch.zeros(4, 2)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        activation: Activation = "linear",
        *,
        initialisation: Initialisation = "normal",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if student_dim < 1 or teacher_dim < 1:
            raise LmcompressError(f"a projection's widths must be >= 1, got {student_dim} and {teacher_dim}")
        if activation not in _ACTIVATIONS:
            raise LmcompressError(f"unknown activation {activation!r}{nearest(activation, _ACTIVATIONS)}")
        if initialisation not in ("normal", "identity"):
            raise LmcompressError(
                f"unknown initialisation {initialisation!r}{nearest(initialisation, ('normal', 'identity'))}"
            )
        if initialisation == "identity" and student_dim != teacher_dim:
            raise LmcompressError(
                f"the identity needs equal widths, got student {student_dim} and teacher {teacher_dim}; "
                "use initialisation='normal'"
            )
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.activation = activation
        if initialisation == "identity":
            weight = torch.eye(student_dim)
        else:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            weight = 0.02 * torch.randn(teacher_dim, student_dim, generator=generator)
        self.weight = nn.Parameter(weight.float())
        self.bias = nn.Parameter(torch.zeros(teacher_dim, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """Projects the student's states.

        Args:
            hidden: ``(..., student_dim)``, any floating dtype.

        Returns:
            ``(..., teacher_dim)`` float32.

        Raises:
            LmcompressError: If the last axis is not ``student_dim``.
        """
        if hidden.shape[-1] != self.student_dim:
            raise LmcompressError(
                f"this projection takes states of width {self.student_dim}, got shape {tuple(hidden.shape)}"
            )
        with torch.autocast(hidden.device.type, enabled=False):
            projected = F.linear(hidden.float(), self.weight.float(), self.bias.float())
            return _ACTIVATIONS[self.activation](projected)

    def extra_repr(self) -> str:
        """Widths and activation, for ``print``."""
        return f"{self.student_dim}, {self.teacher_dim}, activation={self.activation!r}"
