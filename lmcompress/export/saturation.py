"""Whether OpenVINO adds up products of bytes on this processor without saturating: a matmul with a known result."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from lmcompress.export.optional import library

_WIDTH = 64


@cache
def saturates() -> bool:
    """Whether sums of products of the largest codes are wrong.

    Processors without VNNI add two products of an unsigned and a signed byte in 16 bits, which hold them up to codes of
    64.
    """
    openvino = library("openvino", "openvino")
    return any(_is_wrong(openvino, low) for low in (0, -128))


def _is_wrong(openvino: Any, low: int) -> bool:
    """Whether a matmul is, whose inputs have codes from this one on."""
    operators, high = openvino.opset13, low + 255
    ends = [operators.constant(np.float32(end)) for end in (low, high)] * 2
    x = operators.parameter([-1, _WIDTH], np.float32)
    codes = operators.convert(operators.constant(np.full((16, _WIDTH), 127, np.int8)), "f32")
    weight = operators.multiply(codes, operators.constant(np.ones((16, 1), np.float32)))
    product = operators.matmul(operators.fake_quantize(x, *ends, 256), weight, False, True)
    model = openvino.Core().compile_model(openvino.Model([product], [x], "bytes"), "CPU")
    found = model(np.full((3, _WIDTH), high, np.float32))[0]
    return not np.allclose(found, high * 127 * _WIDTH, rtol=1e-3)
