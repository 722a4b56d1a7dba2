"""Round to nearest, and how many bytes the codes take."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lmcompress.numerics.packing import container_for, packed_bytes
from lmcompress.numerics.quantizers import Quantized
from lmcompress.quantization.config import WeightScheme

Rounding = Callable[[Tensor], Quantized]
"""``weight (out, in) -> Quantized``: a quantizer whose bits, granularity and state are settled."""


def rounding_of(scheme: WeightScheme) -> Rounding:
    """Round to nearest as a scheme says, its state made anew of each weight.

    Args:
        scheme: of a quantizer that learns nothing, or whose start is good enough.

    Returns:
        A function of weights ``(out, in)``.
    """
    quantizer, granularity = scheme.function(), scheme.grouping()
    options = {"percentile": scheme.percentile} if scheme.quantizer.endswith("percentile") else {}

    def rounding(weight: Tensor) -> Quantized:
        weight = weight.detach()
        state = None
        if quantizer.initial is not None:
            state = quantizer.initial(weight, bits=scheme.bits, granularity=granularity, **options)
        return quantizer.function(weight, state, bits=scheme.bits, granularity=granularity)

    return rounding


def stored_bytes(quantized: Quantized) -> int:
    """Bytes of codes, scales and zero points once they are packed.

    Args:
        quantized: any.

    Returns:
        Their number.
    """
    zero_points = 0 if quantized.zero_points is None else quantized.zero_points.numel()
    codes = packed_bytes(tuple(quantized.values.shape), container_for(quantized.grid))
    return codes + 4 * quantized.scales.numel() + zero_points
