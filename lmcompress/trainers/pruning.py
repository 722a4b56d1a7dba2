"""PruningTrainer: a configuration of pruning, and optionally a teacher, turned into methods of the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.teachers import Teachers
from lmcompress.errors import LmcompressError
from lmcompress.method import Method
from lmcompress.model import CompressedModel
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.costs import CostModel
from lmcompress.pruning.structured.method import StructuredPruning
from lmcompress.pruning.structured.report import PruningReport
from lmcompress.trainers.compression import CompressionTrainer
from lmcompress.trainers.distillation import finished, taught


class PruningTrainer(CompressionTrainer):
    """Prunes ``model`` while it is trained on labels, on a teacher, or on both.

    After :meth:`train`, :meth:`finish` cuts the model and returns the report; until then pruned units are masked.
    With a teacher, labels have the weight given in ``distillation``, 1 by default.

    Args:
        model: the student.
        args: as for ``Trainer``.
        pruning: the parts, the target and the schedule.
        teacher: a model, another source of outputs, or several of them; often a copy of the unpruned model.
        distillation: compared features and their weights; default: logits and labels. A match with ``student: nearest``
            learns from the teacher's layer in the nearest remaining block.
        methods: further methods in the same run.
        calibration: batches for scores and repair; default: rows of the training data.
        cost: a latency table, for a latency target.
        **kwargs: as for :class:`CompressionTrainer`.

    Raises:
        LmcompressError: If there is no configuration, a distillation has no teacher, or no shape can meet the target.
    """

    def __init__(
        self,
        model: PreTrainedModel | CompressedModel,
        args: TrainingArguments | None = None,
        pruning: PruningConfig | None = None,
        teacher: Teachers | None = None,
        distillation: DistillationConfig | None = None,
        methods: Sequence[Method] = (),
        *,
        calibration: Sequence[Mapping[str, Tensor]] | None = None,
        cost: CostModel | None = None,
        **kwargs: Any,
    ) -> None:
        if pruning is None:
            raise LmcompressError(
                "pruning must say what to prune and how much, got None; for instance "
                "PruningConfig(target=Target(sparsity=0.5))"
            )
        self.pruning = StructuredPruning(pruning, calibration=calibration, cost=cost)
        # gates are hooked first: distillation captures gated features
        super().__init__(model, args, [self.pruning, *taught(teacher, distillation), *methods], **kwargs)

    @property
    def report(self) -> PruningReport:
        """The result of pruning.

        Raises:
            LmcompressError: If :meth:`finish` was not called yet.
        """
        return finished(self.pruning.report)
