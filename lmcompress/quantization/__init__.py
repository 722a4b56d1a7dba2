"""Quantization: configuration and plan, quantization-aware training, and post-training quantization."""

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
    "WeightScheme",
    "bits_sensitivity",
    "choose_bits",
    "mixed_precision",
    "plan",
    "quantize",
]
