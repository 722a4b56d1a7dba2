"""Post-training quantization: round to nearest, GPTQ and AWQ, on the inputs from already quantized blocks."""

from lmcompress.quantization.ptq.checks import Method, check_post_training
from lmcompress.quantization.ptq.quantize import POST_TRAINING, quantize

__all__ = ["POST_TRAINING", "Method", "check_post_training", "quantize"]
