"""A linear layer factored into two thinner ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmcompress.errors import LmcompressError
from lmcompress.nn.base import Compact, check_sizes, sizes


class LowRankLinear(Compact):
    r"""``y = U (V x) + b``: a matrix whose rank is fixed by its two factors.

    .. math:: W \approx U V, \quad U \in R^{out \times r}, \; V \in R^{r \times in}

    It costs ``r (in + out)`` multiply-accumulates for each token instead of ``in · out``. A bottleneck
    without a non-linearity. The factors are ordinary ``nn.Linear`` modules: whatever works on these works on them.

    Args:
        in_features: input width.
        out_features: output width.
        rank: from 1 to the smaller width.
        bias: whether there is a bias.
        device: device of the tensors.
        dtype: dtype of the parameters.

    Raises:
        LmcompressError: If the rank is out of range.

    Reference:
        Denil et al., *Predicting Parameters in Deep Learning*, 2013, https://arxiv.org/abs/1306.0543, section 2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        most = min(in_features, out_features)
        if not 1 <= rank <= most:
            raise LmcompressError(
                f"the rank of a {out_features}×{in_features} matrix must be 1 to {most}, got {rank}; a matrix has no "
                "higher one"
            )
        self.rank = rank
        self.reduce = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.expand = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", sizes(in_features, rank, out_features, device=device))

    @property
    def bias(self) -> Tensor | None:
        """The bias of the second factor."""
        return self.expand.bias

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return self.rank * (self.in_features + self.out_features)

    def matrix(self) -> Tensor:
        """``U V``, ``(out, in)``, with gradient."""
        return self.expand.weight @ self.reduce.weight

    def check(self, name: str) -> None:
        """Refuse sizes that differ from the factors'.

        Args:
            name: name of the module in the error.

        Raises:
            CheckpointError: If the checkpoint has other sizes.
        """
        check_sizes(self.weight, (self.in_features, self.rank, self.out_features), f"{name}.weight")

    def forward(self, x: Tensor) -> Tensor:
        """The output of both factors.

        Args:
            x: ``(..., in)``.

        Returns:
            ``(..., out)``.
        """
        y: Tensor = self.expand(self.reduce(x))
        return y

    def extra_repr(self) -> str:
        """Widths and rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
