"""SparsityTrainer: a model whose single weights are pruned while it is trained."""

from __future__ import annotations

from typing import Any

from lmcompress.errors import LmcompressError
from lmcompress.pruning.unstructured.method import Sparsity
from lmcompress.pruning.unstructured.report import SparsityReport
from lmcompress.trainers.building import Asked, finished, only
from lmcompress.trainers.compression import CompressionTrainer


class SparsityTrainer(CompressionTrainer):
    """Prunes single weights of ``model`` while it is trained, on labels, on a ``teacher``, or on both.

    The student may be any module that ``Trainer`` accepts. See :class:`CompressionTrainer` for the arguments.

    Raises:
        LmcompressError: If there is no configuration in ``sparsity``,
            :class:`~lmcompress.pruning.unstructured.method.Sparsity` refuses it, or :class:`CompressionTrainer`
            refuses.
    """

    def _completed(self, asked: Asked, args: Any) -> Asked:
        asked = super()._completed(asked, args)
        if asked.sparsity is None:
            raise LmcompressError(
                "sparsity must give the share to prune, got None; for example sparsity=SparsityConfig(sparsity=0.9)"
            )
        return asked

    @property
    def sparsity(self) -> Sparsity:
        """The method."""
        return only(self.methods, Sparsity)

    @property
    def report(self) -> SparsityReport:
        """The result of pruning.

        Raises:
            LmcompressError: If :meth:`finish` was not called yet.
        """
        return finished(self.sparsity.report)
