"""DistillationTrainer: a teacher and a configuration, made into a method of the one loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.method import Distillation
from lmcompress.distillation.teachers import Teacher
from lmcompress.method import Method
from lmcompress.model import CompressedModel
from lmcompress.trainers.compression import CompressionTrainer


class DistillationTrainer(CompressionTrainer):
    """Fits ``model`` to its teacher or teachers.

    Args:
        model: the student.
        teacher: a model, another source of answers, or several of them.
        args: as for ``Trainer``.
        distillation: what is compared; default: logits and labels.
        methods: further methods in the same run.
        **kwargs: as for :class:`CompressionTrainer`.
    """

    def __init__(
        self,
        model: PreTrainedModel | CompressedModel,
        teacher: Teacher | PreTrainedModel | Sequence[Teacher | PreTrainedModel],
        args: TrainingArguments | None = None,
        distillation: DistillationConfig | None = None,
        methods: Sequence[Method] = (),
        **kwargs: Any,
    ) -> None:
        method = Distillation(distillation or DistillationConfig(), teacher)
        super().__init__(model, args, [method, *methods], **kwargs)
