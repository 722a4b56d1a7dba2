"""Self-test of kernels on a device: matmuls with known results, with the largest possible codes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch

from lmcompress.kernels.base import Kernel
from lmcompress.kernels.matrix import Inputs, Matrix
from lmcompress.numerics.grids import Grid


def self_test(kernel: Kernel, device: torch.device, greatest: int) -> str | None:
    """The reason why a kernel does not work: it fails, or its result for the largest codes is wrong."""
    out, width = 16, 64
    codes = torch.full((out, width), greatest, dtype=torch.int16)
    codes[1::2] = -greatest
    # rows of one sign saturate first, rows of several numbers show whether entries are permuted
    codes[2::4] = torch.arange(width, dtype=torch.int16) - 32
    matrix = Matrix(
        (codes + greatest).to(torch.uint8).to(device),
        torch.ones(out, 1, device=device),
        None,
        (out, width),
        Grid(-greatest, 2 * greatest + 1),
        8,
    )
    x = torch.full((3, width), 255.0)
    x[1, ::2] = 0.0
    x[2] = torch.arange(width) * 4.0
    x[2, -1] = 255.0
    try:
        with torch.inference_mode():
            # up to 255 without and 127 with levels around 0 the scale is 1, and so codes are the numbers
            # few rows may be padded, many are not
            for symmetric, times in itertools.product((False, True), (1, 14)):
                these = (x.clamp(max=127.0) if symmetric else x).repeat(times, 1)
                inputs = Inputs(_TestEncoding(symmetric=symmetric))
                given = kernel.prepack(matrix, None, inputs, torch.float32)(these.to(device)).cpu()
                if not torch.allclose(given.double(), these.double() @ codes.double().t(), rtol=1e-5, atol=1.0):
                    return "its results are wrong on this device"
    # raised by a torch without the operation, or with another signature of it
    except (RuntimeError, AttributeError, TypeError, IndexError) as error:
        return f"not in this torch, or not for this device: {(str(error) or repr(error)).splitlines()[0]}"
    return None


@dataclass(frozen=True)
class _TestEncoding:
    """The input of the self-test."""

    bits: Literal[4, 8] = 8
    symmetric: bool = False
    granularity: Literal["tensor", "token"] = "tensor"
    range: Literal["dynamic", "static"] = "dynamic"
    clip: float | None = None
    full: bool = False
