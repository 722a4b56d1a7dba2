"""ONNX's operators of quantization, as calls in a model that is being exported.

Outside of an export they return tensors of the right shape without values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``QuantizeLinear``: codes of the dtype of the zero point.

    Args:
        x: any shape, float32.
        scale: one number, ``()`` float32.
        zero_point: one number, ``()`` int8 or uint8.
    """
    return operator("QuantizeLinear", (x, scale, zero_point), zero_point.dtype, x.shape)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None = None, block: int | None = None
) -> Tensor:
    """``DequantizeLinear``: ``(codes - zero point) * scale``.

    Args:
        codes: any shape, int8 or uint8.
        scale: one number, or one for each index of ``axis``.
        zero_point: of the scale's shape and the codes' dtype, or None for 0.
        axis: axis of the scales; None for one number.
        block: number of neighbours along the axis that share a scale; None: one scale for each index.
    """
    inputs = (codes, scale) if zero_point is None else (codes, scale, zero_point)
    attributes = {"axis": axis, "block_size": block}
    given = {name: value for name, value in attributes.items() if value is not None}
    return operator("DequantizeLinear", inputs, torch.float32, codes.shape, given)


def clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``Clip``.

    Args:
        x: any shape, float32.
        low: one number, ``()`` float32.
        high: one number, ``()`` float32.
    """
    return operator("Clip", (x, low, high), x.dtype, x.shape)


def matmul_integer(x: Tensor, codes: Tensor, x_zero_point: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """``MatMulInteger``: the int32 matmul of codes, each less its zero point.

    Args:
        x: ``(..., in)`` uint8 or int8.
        codes: ``(in, out)`` int8.
        x_zero_point: one number, of the dtype of ``x``.
        zero_point: ``(out,)`` int8, or None for 0.
    """
    inputs = (x, codes, x_zero_point) if zero_point is None else (x, codes, x_zero_point, zero_point)
    return operator("MatMulInteger", inputs, torch.int32, (*x.shape[:-1], codes.shape[1]))


def matmul_nbits(
    x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, *, bits: int, block: int, rows: int
) -> Tensor:
    """ONNX Runtime's ``MatMulNBits``: ``x Wᵀ`` with codes that stay packed in memory, in float32.

    Args:
        x: ``(..., in)`` float32.
        packed: ``(out, blocks, block * bits / 8)`` uint8, the first code in the low bits.
        scales: ``(out, blocks)`` float32.
        zero_points: ``(out, blocks)``: packed uint8 along the last axis, or float32.
        bits: 2, 4 or 8.
        block: codes that share a scale: a power of 2 from 16 up.
        rows: out.
    """
    # accuracy_level 1: without it, or with 4, the input is rounded to 8 bits on some processors
    attributes = {"K": x.shape[-1], "N": rows, "bits": bits, "block_size": block, "accuracy_level": 1}
    inputs = (x, packed, scales, zero_points)
    return operator("com.microsoft::MatMulNBits", inputs, torch.float32, (*x.shape[:-1], rows), attributes)


def operator(
    name: str,
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    shape: Sequence[int | torch.SymInt],
    attributes: dict[str, Any] | None = None,
) -> Tensor:
    """Any operator of ONNX with one output.

    Args:
        name: its name; ``"com.microsoft::MatMulNBits"`` names another domain.
        inputs: its inputs.
        dtype: dtype of the output.
        shape: shape of the output.
        attributes: its attributes.
    """
    answer: Tensor = torch.onnx.ops.symbolic(name, inputs, attributes or {}, dtype=dtype, shape=shape)
    return answer
