"""SparsityTrainer: a configuration of sparsity, and perhaps a teacher, made into methods of the one loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.method import Distillation
from lmcompress.distillation.teachers import Teacher
from lmcompress.errors import LmcompressError
from lmcompress.method import Method
from lmcompress.model import CompressedModel
from lmcompress.pruning.unstructured.config import SparsityConfig
from lmcompress.pruning.unstructured.method import Sparsity
from lmcompress.pruning.unstructured.report import SparsityReport
from lmcompress.trainers.compression import CompressionTrainer


class SparsityTrainer(CompressionTrainer):
    """Makes single weights of ``model`` zero while it is trained, on labels, on a teacher, or on both.

    After :meth:`train`, :meth:`finish` makes the zeros permanent and gives the report.

    Args:
        model: the student; a model of transformers or any other module that the trainer takes.
        args: as for ``Trainer``.
        sparsity: which weights go, how many, and when.
        teacher: a model, another source of answers, or several of them; often a copy of the model before.
        distillation: what is compared with the teacher; default: logits and labels.
        methods: further methods in the same run.
        calibration: batches for scores that need data; default: rows of the training data.
        **kwargs: as for :class:`CompressionTrainer`.

    Raises:
        LmcompressError: no configuration, a distillation without a teacher, or what
            :class:`~lmcompress.pruning.unstructured.method.Sparsity` refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel | CompressedModel | nn.Module,
        args: TrainingArguments | None = None,
        sparsity: SparsityConfig | None = None,
        teacher: Teacher | PreTrainedModel | Sequence[Teacher | PreTrainedModel] | None = None,
        distillation: DistillationConfig | None = None,
        methods: Sequence[Method] = (),
        *,
        calibration: Sequence[Mapping[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> None:
        if sparsity is None:
            raise LmcompressError(
                "sparsity must say how many weights go, got None; for instance SparsityConfig(sparsity=0.9)"
            )
        if teacher is None and distillation is not None:
            raise LmcompressError("distillation needs a teacher, got none; pass teacher=, or leave distillation out")
        self.sparsity = Sparsity(sparsity, calibration=calibration)
        first: list[Method] = [self.sparsity]
        if teacher is not None:
            first.append(Distillation(distillation or DistillationConfig(), teacher))
        super().__init__(model, args, [*first, *methods], **kwargs)

    @property
    def report(self) -> SparsityReport:
        """What became zero.

        Raises:
            LmcompressError: :meth:`finish` was not called yet.
        """
        if self.sparsity.report is None:
            raise LmcompressError("there is no report before finish(): call it after train()")
        return self.sparsity.report
