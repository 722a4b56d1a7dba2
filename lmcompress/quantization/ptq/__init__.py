"""Quantization without training: round to nearest, GPTQ and AWQ, on the inputs that quantized blocks before give."""

from lmcompress.quantization.ptq.checks import Method, check_post_training
from lmcompress.quantization.ptq.quantize import POST_TRAINING, quantize

__all__ = ["POST_TRAINING", "Method", "check_post_training", "quantize"]
