"""SharingTrainer: a configuration of weight clustering, and optionally a teacher, as methods of the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from lmcompress.clustering.config import SharingConfig
from lmcompress.clustering.method import WeightSharing
from lmcompress.clustering.report import SharingReport
from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.teachers import Teachers
from lmcompress.method import Method
from lmcompress.model import CompressedModel
from lmcompress.trainers.compression import CompressionTrainer
from lmcompress.trainers.distillation import finished, taught


class SharingTrainer(CompressionTrainer):
    """Trains the shared values of each matrix's weights, on labels, on a teacher, or on both.

    The model is clustered when the trainer is created, and shares its values from then on. After :meth:`train`,
    :meth:`finish` returns the report.

    Args:
        model: the student; if it was pruned, its zeros stay.
        args: as for ``Trainer``.
        sharing: number of shared values of each matrix; default: Deep Compression's.
        teacher: a model, another source of outputs, or several of them; often a copy of the original model.
        distillation: compared features and their weights; default: logits and labels.
        methods: further methods in the same run.
        calibration: batches for the sensitivity, if the configuration needs it; default: training
            rows.
        **kwargs: as for :class:`CompressionTrainer`.

    Raises:
        LmcompressError: If a distillation has no teacher, or
            :class:`~lmcompress.clustering.method.WeightSharing` refuses the configuration.
    """

    def __init__(
        self,
        model: PreTrainedModel | CompressedModel | nn.Module,
        args: TrainingArguments | None = None,
        sharing: SharingConfig | None = None,
        teacher: Teachers | None = None,
        distillation: DistillationConfig | None = None,
        methods: Sequence[Method] = (),
        *,
        calibration: Sequence[Mapping[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.sharing = WeightSharing(sharing, calibration=calibration)
        super().__init__(model, args, [self.sharing, *taught(teacher, distillation), *methods], **kwargs)

    @property
    def report(self) -> SharingReport:
        """The result of clustering.

        Raises:
            LmcompressError: If :meth:`finish` was not called yet.
        """
        return finished(self.sharing.report)
