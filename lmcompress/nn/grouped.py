"""A block-diagonal linear layer, with permutations of channels before or after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmcompress.errors import CheckpointError, LmcompressError
from lmcompress.nn.base import Compact


def channel_shuffle(width: int, groups: int) -> Tensor:
    """ShuffleNet's channel order between two grouped layers: ``(groups, n)`` transposed, flattened.

    Every group that reads the shuffled channels reads equally many of each group that wrote them, as far as
    divisibility allows.

    Args:
        width: number of channels.
        groups: groups of the layer that wrote them; a divisor of the width.

    Returns:
        ``(width,)`` int64: source index of each channel.

    Raises:
        LmcompressError: If the groups do not divide the width.

    Reference:
        Zhang et al., *ShuffleNet*, CVPR 2018, https://arxiv.org/abs/1707.01083, section 3.1.

    Example:
        >>> channel_shuffle(6, 2)
        tensor([0, 3, 1, 4, 2, 5])
    """
    check_groups(groups, width)
    return torch.arange(width).view(groups, -1).t().flatten()


def check_groups(groups: int, *widths: int) -> None:
    """Refuse a number of groups that does not divide the widths.

    Args:
        groups: number of groups.
        *widths: input and output width.

    Raises:
        LmcompressError: If there is not at least one group, or the groups do not divide a width; the message lists
            numbers that do.
    """
    if groups < 1 or any(width % groups for width in widths):
        fitting = [n for n in range(2, min(widths) + 1) if all(width % n == 0 for width in widths)][:8]
        raise LmcompressError(
            f"groups must divide the widths {' and '.join(map(str, widths))}, got {groups}; "
            + (f"these do: {', '.join(map(str, fitting))}" if fitting else "no number above 1 does")
        )


class GroupedLinear(Compact):
    """``groups`` matrices side by side: each reads its part of the input and writes its part of the output.

    It has ``1 / groups`` of a full matrix's parameters and cost. Channels may be permuted on the way in and out; the
    permutations are tensors of the checkpoint.

    Args:
        in_features: input width.
        out_features: output width.
        groups: number of groups of both.
        bias: whether there is a bias, in the order of the output.
        input_order: whether the input is permuted first.
        output_order: whether the output is permuted.
        device: device of the tensors.
        dtype: dtype of the parameters.

    Raises:
        LmcompressError: If the groups do not divide the widths.

    Reference:
        Xie et al., *ResNeXt*, CVPR 2017, https://arxiv.org/abs/1611.05431, section 3.3; Iandola et al., *SqueezeBERT*,
        2020, https://arxiv.org/abs/2006.11316, section 3.
    """

    bias: nn.Parameter | None
    input_order: Tensor | None
    output_order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int,
        bias: bool = True,
        *,
        input_order: bool = False,
        output_order: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        check_groups(groups, in_features, out_features)
        self.groups = groups
        shape = (groups, out_features // groups, in_features // groups)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("input_order", torch.arange(in_features, device=device) if input_order else None)
        self.register_buffer("output_order", torch.arange(out_features, device=device) if output_order else None)
        nn.init.kaiming_uniform_(self.weight.view(out_features, -1), a=5**0.5)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return self.in_features * self.out_features // self.groups

    def order(self, side: str) -> Tensor:
        """The source index of each channel, ``(width,)`` int64; increasing if there is no permutation.

        Args:
            side: ``"input"`` or ``"output"``.
        """
        given = self.input_order if side == "input" else self.output_order
        width = self.in_features if side == "input" else self.out_features
        return torch.arange(width, device=self.weight.device) if given is None else given

    def matrix(self) -> Tensor:
        """The full matrix, ``(out, in)``, with gradient."""
        blocks = torch.block_diag(*self.weight)
        return blocks[self.order("output")][:, self.order("input").argsort()]

    def check(self, name: str) -> None:
        """Refuse an order that is not a permutation.

        Args:
            name: name of the module in the error.

        Raises:
            CheckpointError: If a channel is repeated or missing.
        """
        for side, order in (("input_order", self.input_order), ("output_order", self.output_order)):
            if order is None:
                continue
            rising = torch.arange(len(order), device=order.device)
            if order.dtype != torch.int64 or not torch.equal(order.sort().values, rising):
                raise CheckpointError(
                    f"tensor {name}.{side} must have each number from 0 to {len(order) - 1} once, got something else: "
                    "the checkpoint is damaged; fetch or copy it again"
                )

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of all groups.

        Args:
            x: ``(..., in)``.

        Returns:
            ``(..., out)``.
        """
        shape = (*x.shape[:-1], self.out_features)
        if self.input_order is not None:
            x = x.index_select(-1, self.input_order)
        parts = x.reshape(-1, self.groups, self.in_features // self.groups).transpose(0, 1)
        y = torch.bmm(parts, self.weight.transpose(1, 2)).transpose(0, 1).reshape(shape)
        if self.output_order is not None:
            y = y.index_select(-1, self.output_order)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Widths, groups, and the permuted sides, for ``print``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, groups={self.groups}, "
            f"input_order={self.input_order is not None}, output_order={self.output_order is not None}"
        )
