"""SharingTrainer: a configuration of weight sharing, and perhaps a teacher, made into methods of the one loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from lmcompress.clustering.config import SharingConfig
from lmcompress.clustering.method import WeightSharing
from lmcompress.clustering.report import SharingReport
from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.method import Distillation
from lmcompress.distillation.teachers import Teacher
from lmcompress.errors import LmcompressError
from lmcompress.method import Method
from lmcompress.model import CompressedModel
from lmcompress.trainers.compression import CompressionTrainer


class SharingTrainer(CompressionTrainer):
    """Trains the values that the weights of each matrix share, on labels, on a teacher, or on both.

    The model is clustered when the trainer is made, and shares its values from then on. After :meth:`train`,
    :meth:`finish` gives the report.

    Args:
        model: the student; where it was pruned, its zeros stay.
        args: as for ``Trainer``.
        sharing: how many values which matrix has; default: Deep Compression's.
        teacher: a model, another source of answers, or several of them; often a copy of the model before.
        distillation: what is compared with the teacher; default: logits and labels.
        methods: further methods in the same run.
        calibration: batches for the sensitivity, where the configuration asks for it; default: rows of the training
            data.
        **kwargs: as for :class:`CompressionTrainer`.

    Raises:
        LmcompressError: a distillation without a teacher, or what
            :class:`~lmcompress.clustering.method.WeightSharing` refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel | CompressedModel | nn.Module,
        args: TrainingArguments | None = None,
        sharing: SharingConfig | None = None,
        teacher: Teacher | PreTrainedModel | Sequence[Teacher | PreTrainedModel] | None = None,
        distillation: DistillationConfig | None = None,
        methods: Sequence[Method] = (),
        *,
        calibration: Sequence[Mapping[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> None:
        if teacher is None and distillation is not None:
            raise LmcompressError("distillation needs a teacher, got none; pass teacher=, or leave distillation out")
        self.sharing = WeightSharing(sharing, calibration=calibration)
        first: list[Method] = [self.sharing]
        if teacher is not None:
            first.append(Distillation(distillation or DistillationConfig(), teacher))
        super().__init__(model, args, [*first, *methods], **kwargs)

    @property
    def report(self) -> SharingReport:
        """What shares its values.

        Raises:
            LmcompressError: :meth:`finish` was not called yet.
        """
        if self.sharing.report is None:
            raise LmcompressError("there is no report before finish(): call it after train()")
        return self.sharing.report
