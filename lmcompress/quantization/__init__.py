"""Quantization: weights and activations on a few levels, and the bytes that hold them."""

from lmcompress.quantization.grids import Bits, Granularity, Grid, PerGroup, PerRow, PerTensor, PerToken
from lmcompress.quantization.packing import dequantize, pack, packed_bytes, packed_shape, unpack
from lmcompress.quantization.quantizers import QUANTIZERS, Quantized, WeightQuantizer, quantizer_for

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
