"""Quantized numbers: quantizers of weights and activations, and the packing of their codes into bytes."""

from lmcompress.numerics.grids import Bits, Granularity, Grid, PerGroup, PerRow, PerTensor, PerToken
from lmcompress.numerics.packing import dequantize, pack, packed_bytes, packed_shape, unpack
from lmcompress.numerics.quantizers import QUANTIZERS, Quantized, WeightQuantizer, quantizer_for

__all__ = [
    "QUANTIZERS",
    "Bits",
    "Granularity",
    "Grid",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "Quantized",
    "WeightQuantizer",
    "dequantize",
    "pack",
    "packed_bytes",
    "packed_shape",
    "quantizer_for",
    "unpack",
]
