"""QuantizationTrainer: a configuration of quantization, and optionally a teacher, as methods of the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.presets import quantgpt, ternarybert
from lmcompress.distillation.teachers import Teachers
from lmcompress.families import anatomy_of
from lmcompress.method import Method
from lmcompress.model import CompressedModel
from lmcompress.quantization.config import QuantizationConfig
from lmcompress.quantization.method import Quantization
from lmcompress.quantization.report import QuantizationReport
from lmcompress.trainers.compression import CompressionTrainer
from lmcompress.trainers.distillation import finished, taught


class QuantizationTrainer(CompressionTrainer):
    """Trains ``model`` while it computes with quantized numbers, on labels, on a teacher, or on both.

    After :meth:`train`, :meth:`finish` packs the model and returns the report; until then its weights are float32, and
    quantized whenever they are read. Start from the model to quantize, with a copy of it as the teacher.

    Args:
        model: the student.
        args: as for ``Trainer``.
        quantization: quantization and its schedule; default: QuantGPT's at 8 bits.
        teacher: a model, another source of outputs, or several of them.
        distillation: compared features and their weights; default: :func:`default_distillation`.
        methods: further methods in the same run; one that prunes comes first of all.
        calibration: batches for calibrated ranges; default: training rows.
        **kwargs: as for :class:`CompressionTrainer`.

    Raises:
        LmcompressError: If a distillation has no teacher, or
            :class:`~lmcompress.quantization.method.Quantization` refuses the configuration.
    """

    def __init__(
        self,
        model: PreTrainedModel | CompressedModel,
        args: TrainingArguments | None = None,
        quantization: QuantizationConfig | None = None,
        teacher: Teachers | None = None,
        distillation: DistillationConfig | None = None,
        methods: Sequence[Method] = (),
        *,
        calibration: Sequence[Mapping[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quantization = Quantization(quantization, calibration=calibration)
        cutting = [method for method in methods if method.changes_shapes]
        others = [method for method in methods if method not in cutting]
        # gates are hooked first: quantization and distillation see gated values
        if teacher is not None and distillation is None:
            student = model.model if isinstance(model, CompressedModel) else model
            distillation = default_distillation(student, teacher, cut=bool(cutting))
        first: list[Method] = [*cutting, self.quantization, *taught(teacher, distillation)]
        super().__init__(model, args, [*first, *others], **kwargs)

    @property
    def report(self) -> QuantizationReport:
        """The result of quantization.

        Raises:
            LmcompressError: If :meth:`finish` was not called yet.
        """
        return finished(self.quantization.report)


def default_distillation(student: PreTrainedModel, teacher: Teachers, *, cut: bool = False) -> DistillationConfig:
    """The default distillation of a quantized student.

    Causal language models: logits and contrast of tokens
    (:func:`~lmcompress.distillation.presets.quantgpt`). Others: logits, and hidden states and attention scores of every
    layer (:func:`~lmcompress.distillation.presets.ternarybert`), as far as student and teacher have the same. Labels
    are not used.

    Args:
        student: the model.
        teacher: its teacher; with several, or one that does not run, only logits are used in place of layers.
        cut: whether the student is pruned in the same run, so that its layers and heads will differ from the teacher's.

    Returns:
        The configuration.
    """
    if anatomy_of(student).head is not None:
        return quantgpt()
    model = teacher if isinstance(teacher, PreTrainedModel) else getattr(teacher, "model", None)
    if cut or not isinstance(model, PreTrainedModel):
        return DistillationConfig(temperature=1.0, label_weight=0.0)
    mine, theirs = anatomy_of(student), anatomy_of(model)
    if len(mine.blocks) != len(theirs.blocks):
        return DistillationConfig(temperature=1.0, label_weight=0.0)
    whole = ternarybert(len(mine.blocks))
    heads = [(a.num_heads, b.num_heads) for a, b in zip(mine.blocks, theirs.blocks, strict=True)]
    kept = [
        match
        for match in whole.matches
        if match.loss == "hidden_mse" or _alike(heads[int(match.student) - 1])  # type: ignore[arg-type]
    ]
    return whole.model_copy(update={"matches": tuple(kept)})


def _alike(heads: tuple[int, int]) -> bool:
    return heads[0] == heads[1] > 0
