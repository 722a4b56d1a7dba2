"""A pointwise matmul followed by a depthwise convolution along the sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmcompress.errors import LmcompressError
from lmcompress.nn.base import Compact


class SeparableMixing(Compact):
    r"""Local mixing in place of attention: a weighted sum of values at fixed distances.

    .. math:: y_{t,c} = b_c + \sum_j w_{c,j} \, v_{t + j - j_0, c}, \quad v = P x

    :math:`P` is the value projection of the attention; :math:`j_0` is the middle of the kernel, or its end in a
    causal model. Values at padding and outside of the sequence are zero. With the output projection
    that follows in the block, the sum is the depthwise half and the projection the pointwise half of MobileNets'
    separable convolution; the value projection before it makes it MobileNetV2's inverted bottleneck where it widens.

    Args:
        pointwise: the matmul at each position, ``(..., in) -> (..., channels)``.
        in_features: input width.
        channels: output width.
        kernel: number of positions; odd if both sides are covered.
        causal: whether only a position itself and earlier ones are covered.
        device: device of the tensors.
        dtype: dtype of the parameters.

    Raises:
        LmcompressError: If the kernel is below 1, or even and covers both sides.

    Reference:
        Howard et al., *MobileNets*, 2017, https://arxiv.org/abs/1704.04861, section 3.1; Wu et al., *Pay Less Attention
        with Lightweight and Dynamic Convolutions*, 2019, https://arxiv.org/abs/1901.10430, section 2.
    """

    def __init__(
        self,
        pointwise: nn.Module,
        in_features: int,
        channels: int,
        kernel: int,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, channels)
        check_kernel(kernel, causal)
        self.kernel, self.causal = kernel, causal
        self.pointwise = pointwise
        self.weight = nn.Parameter(torch.zeros(channels, 1, kernel, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return (self.in_features + self.kernel) * self.out_features

    def values(self, x: Tensor) -> Tensor:
        """The values to mix.

        Args:
            x: ``(batch, length, in)``.

        Returns:
            ``(batch, length, channels)``.
        """
        y: Tensor = self.pointwise(x)
        return y

    def mix(self, values: Tensor, valid: Tensor | None = None, length: int | None = None) -> Tensor:
        """The convolution.

        Args:
            values: ``(batch, seen, channels)``.
            valid: ``(batch, seen)``, false for padding; None: all are real.
            length: number of last positions to return; default: all.

        Returns:
            ``(batch, length, channels)``.
        """
        length = values.shape[1] if length is None else length
        if valid is not None:
            values = values * valid.to(values.dtype).unsqueeze(-1)
        left = self.kernel - 1 if self.causal else self.kernel // 2
        if self.causal:
            # cached values that no kernel reaches are ignored
            values = values[:, -(length + left) :]
        padded = nn.functional.pad(values.transpose(1, 2), (left, 0 if self.causal else left))
        mixed = nn.functional.conv1d(padded, self.weight, self.bias, groups=self.out_features)
        return mixed[..., -length:].transpose(1, 2).contiguous()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """The mixed values of all positions.

        Args:
            x: ``(batch, length, in)``.
            valid: ``(batch, length)``, false for padding; None: all are real.

        Returns:
            ``(batch, length, channels)``.
        """
        return self.mix(self.values(x), valid)

    def extra_repr(self) -> str:
        """Kernel and direction, for ``print``."""
        return f"channels={self.out_features}, kernel={self.kernel}, causal={self.causal}"


def check_kernel(kernel: int, causal: bool) -> None:
    """Refuse an invalid kernel size.

    Args:
        kernel: number of positions.
        causal: whether it ends at its own position.

    Raises:
        LmcompressError: If it is below 1, or even and covers both sides.
    """
    if kernel < 1 or (not causal and kernel % 2 == 0):
        raise LmcompressError(
            f"kernel must be {'at least 1' if causal else 'an odd number, to cover both sides equally'}, got {kernel}"
        )
