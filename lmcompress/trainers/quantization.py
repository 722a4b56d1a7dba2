"""QuantizationTrainer: a model that computes with quantized numbers while it is trained."""

from __future__ import annotations

from typing import Any

from lmcompress.quantization.config import QuantizationConfig
from lmcompress.quantization.method import Quantization
from lmcompress.quantization.report import QuantizationReport
from lmcompress.trainers.building import Asked, finished, only
from lmcompress.trainers.compression import CompressionTrainer


class QuantizationTrainer(CompressionTrainer):
    """Trains ``model`` while it computes with quantized numbers, on labels, on a ``teacher``, or on both.

    In training its weights are float32, and quantized whenever they are read; at the end they are packed. Start from
    the model to quantize, with a copy of it as the teacher. Without ``quantization``, weights, embeddings and
    activations have QuantGPT's 8 bits; without ``distillation``, a teacher is compared as
    :func:`~lmcompress.trainers.building.default_distillation` says. See :class:`CompressionTrainer` for the arguments.

    Raises:
        LmcompressError: If :class:`~lmcompress.quantization.method.Quantization` refuses the configuration, or
            :class:`CompressionTrainer` refuses.
    """

    def _completed(self, asked: Asked, args: Any) -> Asked:
        return super()._completed(asked, args).with_defaults(quantization=QuantizationConfig())

    @property
    def quantization(self) -> Quantization:
        """The method."""
        return only(self.methods, Quantization)

    @property
    def report(self) -> QuantizationReport:
        """The result of quantization.

        Raises:
            LmcompressError: If :meth:`finish` was not called yet.
        """
        return finished(self.quantization.report)
