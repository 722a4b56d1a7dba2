"""Quantization: configuration and plan, quantization-aware training, and post-training quantization."""

from lmcompress.numerics.quantizers.base import WeightQuantizer
from lmcompress.numerics.quantizers.learned import initial_clip
from lmcompress.numerics.quantizers.uniform import symmetric
from lmcompress.quantization.config import ActivationScheme, QuantizationConfig, Rule, WeightScheme
from lmcompress.quantization.fake import FakeActivation, FakeQuantized, FakeWeight
from lmcompress.quantization.method import Quantization
from lmcompress.quantization.mixed import bits_sensitivity, choose_bits, mixed_precision
from lmcompress.quantization.planning import Plan, Planned, plan
from lmcompress.quantization.ptq import POST_TRAINING, quantize
from lmcompress.quantization.report import QuantizationReport, QuantizedMatrix

__all__ = [
    "POST_TRAINING",
    "ActivationScheme",
    "FakeActivation",
    "FakeQuantized",
    "FakeWeight",
    "Plan",
    "Planned",
    "Quantization",
    "QuantizationConfig",
    "QuantizationReport",
    "QuantizedMatrix",
    "Rule",
    "WeightQuantizer",
    "WeightScheme",
    "bits_sensitivity",
    "choose_bits",
    "initial_clip",
    "mixed_precision",
    "plan",
    "quantize",
    "symmetric",
]
