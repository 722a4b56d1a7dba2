"""Quantized attention in graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from torch import Tensor

from lmcompress.export.eight_bit import quantize_static
from lmcompress.kernels.matrix import Inputs
from lmcompress.nn.quantized_attention import ROLES, AttentionEncodings, AttentionQuantizers, Role


class GraphQuantizers(AttentionQuantizers):
    """The quantizers of one attention module in a graph: Q/DQ where ranges are static, arithmetic where dynamic.

    Runtimes have no integer matmul of two activations with dynamic ranges; the values are the same.

    Args:
        quantizers: of the packed model.
    """

    def __init__(self, quantizers: AttentionQuantizers) -> None:
        said = SimpleNamespace(**{role: quantizers.encodings.get(role) for role in ROLES})
        super().__init__(cast(AttentionEncodings, said))
        self.load_state_dict(quantizers.state_dict())

    def forward(self, role: Role, x: Tensor) -> Tensor:
        """One of the four activations.

        Args:
            role: name of the activation.
            x: ``(batch, heads, length, ...)``.

        Returns:
            The same shape and dtype.
        """
        encoding = self.encodings.get(role)
        if encoding is None or encoding.range != "static":
            return super().forward(role, x)
        zero_point = None if encoding.symmetric else self.get_buffer(f"{role}_zero_point")
        return quantize_static(x, Inputs(encoding, self.get_buffer(f"{role}_scale"), zero_point))
