"""Self-test of kernels on a device: matmuls with known results, with the largest possible codes, and their time."""

from __future__ import annotations

import itertools
import statistics
import time

import torch

from lmcompress.kernels.base import UNAVAILABLE, Kernel, unavailable
from lmcompress.kernels.matrix import Encoding, Inputs, Matrix, Prepacked
from lmcompress.kernels.reference import Reference
from lmcompress.numerics.grids import Grid

# tokens and width of the square matrix; the first is small enough for loops that take 10 ns a product
_FIRST, _TIMED, _FEW = (4, 128), (64, 512), (1, 512)
_ROUNDS = 5
# of the reference's time: more than the noise of a busy machine makes of equal ones
_MARGIN, _HOPELESS = 1.25, 20.0


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
                inputs = Inputs(Encoding(symmetric=symmetric))
                given = kernel.prepack(matrix, None, inputs, torch.float32)(these.to(device)).cpu()
                if not torch.allclose(given.double(), these.double() @ codes.double().t(), rtol=1e-5, atol=1.0):
                    return "its results are wrong on this device"
    except UNAVAILABLE as error:
        return unavailable(error)
    return None


def too_slow(kernel: Kernel, device: torch.device, *, weights_only: bool = False) -> str | None:
    """The reason why a kernel that works is not worth its while: the reference is faster.

    Timed on a CPU only, in a few milliseconds: medians of matmuls in turn with the reference's.

    Args:
        kernel: a kernel that passes :func:`self_test`.
        device: the device.
        weights_only: whether it multiplies inputs that are not quantized.

    Returns:
        ``None`` if it is as fast, or was not timed.
    """
    if device.type != "cpu":
        return None
    inputs = None if weights_only else Inputs(Encoding(symmetric=True))
    with torch.inference_mode():
        ratio = _ratio(kernel, inputs, *_FIRST, rounds=3)
        if ratio <= _HOPELESS:
            ratio = _ratio(kernel, inputs, *(_FEW if weights_only else _TIMED), rounds=_ROUNDS)
    if ratio <= _MARGIN:
        return None
    return f"slower than the reference, {ratio:.1f} times its time"


def _ratio(kernel: Kernel, inputs: Inputs | None, tokens: int, width: int, rounds: int) -> float:
    """The median time of a matmul over that of the reference."""
    codes = (torch.arange(width * width) % 251).to(torch.uint8)
    matrix = Matrix(codes, torch.full((width, 1), 0.01), None, (width, width), Grid(-127, 255), 8)
    x = torch.linspace(-1, 1, tokens * width).reshape(tokens, width)
    both = [one.prepack(matrix, None, inputs, torch.float32) for one in (kernel, Reference())]
    # the first call of a shape may compile for it
    times = [[_seconds(multiply, x) for multiply in both] for _ in range(rounds + 1)][1:]
    ours, references = (statistics.median(column) for column in zip(*times, strict=True))
    return ours / references


def _seconds(multiply: Prepacked, x: torch.Tensor) -> float:
    start = time.perf_counter()
    multiply(x)
    return time.perf_counter() - start
