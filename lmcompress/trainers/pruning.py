"""PruningTrainer: a model that is pruned while it is trained."""

from __future__ import annotations

from typing import Any

from lmcompress.errors import LmcompressError
from lmcompress.pruning.structured.method import StructuredPruning
from lmcompress.pruning.structured.report import PruningReport
from lmcompress.trainers.building import Asked, finished, only
from lmcompress.trainers.compression import CompressionTrainer


class PruningTrainer(CompressionTrainer):
    """Prunes ``model`` while it is trained on labels, on a ``teacher``, or on both.

    Pruned units are masked in training, and cut at its end. With a teacher, often a copy of the unpruned model, labels
    have the weight given in ``distillation``, 1 by default; a match with ``student: nearest`` learns from the teacher's
    layer in the nearest remaining block. See :class:`CompressionTrainer` for the arguments.

    Raises:
        LmcompressError: If there is no configuration in ``pruning``, no shape can meet the target, or
            :class:`CompressionTrainer` refuses.
    """

    def _completed(self, asked: Asked, args: Any) -> Asked:
        asked = super()._completed(asked, args)
        if asked.pruning is None:
            raise LmcompressError(
                "pruning must say what to prune and how much, got None; for instance "
                "pruning=PruningConfig(target=Target(sparsity=0.5))"
            )
        return asked

    @property
    def pruning(self) -> StructuredPruning:
        """The method."""
        return only(self.methods, StructuredPruning)

    @property
    def report(self) -> PruningReport:
        """The result of pruning.

        Raises:
            LmcompressError: If :meth:`finish` was not called yet.
        """
        return finished(self.pruning.report)
