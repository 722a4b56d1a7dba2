"""SparsityTrainer: a configuration of sparsity, and optionally a teacher, turned into methods of the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.teachers import Teachers
from lmcompress.errors import LmcompressError
from lmcompress.method import Method
from lmcompress.model import CompressedModel
from lmcompress.pruning.unstructured.config import SparsityConfig
from lmcompress.pruning.unstructured.method import Sparsity
from lmcompress.pruning.unstructured.report import SparsityReport
from lmcompress.trainers.compression import CompressionTrainer
from lmcompress.trainers.distillation import finished, taught


class SparsityTrainer(CompressionTrainer):
    """Prunes single weights of ``model`` while it is trained, on labels, on a teacher, or on both.

    After :meth:`train`, :meth:`finish` materializes the zeros and returns the report.

    Args:
        model: the student; a model of transformers or any other module that the trainer accepts.
        args: as for ``Trainer``.
        sparsity: the share, the criterion and the schedule.
        teacher: a model, another source of outputs, or several of them; often a copy of the original model.
        distillation: compared features and their weights; default: logits and labels.
        methods: further methods in the same run.
        calibration: batches for scores that need data; default: rows of the training data.
        **kwargs: as for :class:`CompressionTrainer`.

    Raises:
        LmcompressError: If there is no configuration, a distillation has no teacher, or
            :class:`~lmcompress.pruning.unstructured.method.Sparsity` refuses the configuration.
    """

    def __init__(
        self,
        model: PreTrainedModel | CompressedModel | nn.Module,
        args: TrainingArguments | None = None,
        sparsity: SparsityConfig | None = None,
        teacher: Teachers | None = None,
        distillation: DistillationConfig | None = None,
        methods: Sequence[Method] = (),
        *,
        calibration: Sequence[Mapping[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> None:
        if sparsity is None:
            raise LmcompressError(
                "sparsity must give the share to prune, got None; for example SparsityConfig(sparsity=0.9)"
            )
        self.sparsity = Sparsity(sparsity, calibration=calibration)
        super().__init__(model, args, [self.sparsity, *taught(teacher, distillation), *methods], **kwargs)

    @property
    def report(self) -> SparsityReport:
        """The result of pruning.

        Raises:
            LmcompressError: If :meth:`finish` was not called yet.
        """
        return finished(self.sparsity.report)
