"""DistillationTrainer: a teacher and a configuration, turned into a method of the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from transformers import PreTrainedModel, TrainingArguments

from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.method import Distillation
from lmcompress.distillation.teachers import Teachers
from lmcompress.errors import LmcompressError
from lmcompress.method import Method
from lmcompress.model import CompressedModel
from lmcompress.trainers.compression import CompressionTrainer

Report = TypeVar("Report")


class DistillationTrainer(CompressionTrainer):
    """Fits ``model`` to its teacher or teachers.

    Args:
        model: the student.
        teacher: a model, another source of outputs, or several of them.
        args: as for ``Trainer``.
        distillation: compared features and their weights; default: logits and labels.
        methods: further methods in the same run.
        **kwargs: as for :class:`CompressionTrainer`.
    """

    def __init__(
        self,
        model: PreTrainedModel | CompressedModel,
        teacher: Teachers,
        args: TrainingArguments | None = None,
        distillation: DistillationConfig | None = None,
        methods: Sequence[Method] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, [*taught(teacher, distillation), *methods], **kwargs)


def taught(teacher: Teachers | None, distillation: DistillationConfig | None) -> list[Method]:
    """The method for a trainer's ``teacher`` and ``distillation``, if there is a teacher.

    Args:
        teacher: one or several.
        distillation: compared features and their weights; default: logits and labels.

    Returns:
        One method, or none.

    Raises:
        LmcompressError: If a distillation has no teacher.
    """
    if teacher is None and distillation is not None:
        raise LmcompressError("distillation needs a teacher, got none; pass teacher=, or leave distillation out")
    return [] if teacher is None else [Distillation(distillation or DistillationConfig(), teacher)]


def finished(report: Report | None) -> Report:
    """The report of a method, available once the trainer has finished.

    Args:
        report: report of the method, or None.

    Raises:
        LmcompressError: If there is none yet.
    """
    if report is None:
        raise LmcompressError("there is no report before finish(): call it after train()")
    return report
