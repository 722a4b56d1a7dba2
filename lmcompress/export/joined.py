"""Queries, keys and values as one product.

Each of the three quantizes the same input. Apart, a runtime that merges these finds one quantized input with three
readers, and fuses none of them with its matmul; together they are also one larger matmul, which is faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.export import eight_bit
from lmcompress.families import anatomy_of
from lmcompress.nn.packed import PackedLinear


class _Product:
    """The product of the last input, until each part has been taken."""

    def __init__(self, matmul: nn.Module, widths: list[int]) -> None:
        self.matmul, self.widths = matmul, widths
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def part(self, index: int, x: Tensor) -> Tensor:
        """The columns of one part."""
        if self._input is not x or self._outputs[index] is None:
            self._input, self._outputs = x, list(torch.split(self.matmul(x), self.widths, dim=-1))
        answer = self._outputs[index]
        assert answer is not None
        self._outputs[index] = None
        if all(output is None for output in self._outputs):
            # nothing of one graph may be left for the next
            self._input = None
        return answer


class _Part(nn.Module):
    """One of the projections; the first that is called computes all."""

    def __init__(self, product: _Product, index: int) -> None:
        super().__init__()
        # a plain object: exporters refuse modules that write to themselves
        self.__dict__["product"] = product
        self.index = index
        self.out_features = product.widths[index]
        if index == 0:
            # only one of them owns the tensors
            self.matmul = product.matmul

    def forward(self, x: Tensor) -> Tensor:
        """The projection of ``x (..., in)``."""
        product: _Product = self.__dict__["product"]
        return product.part(self.index, x)


def join_projections(model: PreTrainedModel) -> int:
    """Compute queries, keys and values of each block by one product, where they are packed and read the same codes.

    Args:
        model: modified in place; for exporters only.

    Returns:
        The number of blocks where they were joined.
    """
    count = 0
    for block in anatomy_of(model).blocks:
        parts = block.readers("attention")
        if len(parts) < 2:
            continue
        found: list[Any] = [block.get(part) for part in parts]
        if not all(isinstance(one, PackedLinear) and eight_bit.fits(one) for one in found):
            continue
        # fewer bits have forms of their own, which are smaller
        if any(one.layout.container != 8 for one in found):
            continue
        operand = eight_bit.joined([eight_bit.operand(one, one.bias) for one in found])
        if operand is None:
            continue
        product = _Product(eight_bit.ByteMatmul(operand), [one.out_features for one in found])
        for index, part in enumerate(parts):
            block.replace(part, _Part(product, index))
        count += 1
    return count
