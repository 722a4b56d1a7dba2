"""SharingTrainer: a model that trains the shared values of its clustered weights."""

from __future__ import annotations

from typing import Any

from lmcompress.clustering.config import SharingConfig
from lmcompress.clustering.method import WeightSharing
from lmcompress.clustering.report import SharingReport
from lmcompress.trainers.building import Asked, finished, only
from lmcompress.trainers.compression import CompressionTrainer


class SharingTrainer(CompressionTrainer):
    """Trains the shared values of each matrix's weights, on labels, on a ``teacher``, or on both.

    The model is clustered when the trainer is created, and shares its values from then on; if it was pruned, its zeros
    stay. Without ``sharing``, matrices have as many values as in Deep Compression. See :class:`CompressionTrainer` for
    the arguments.

    Raises:
        LmcompressError: If :class:`~lmcompress.clustering.method.WeightSharing` refuses the configuration, or
            :class:`CompressionTrainer` refuses.
    """

    def _completed(self, asked: Asked, args: Any) -> Asked:
        return super()._completed(asked, args).with_defaults(sharing=SharingConfig())

    @property
    def sharing(self) -> WeightSharing:
        """The method."""
        return only(self.methods, WeightSharing)

    @property
    def report(self) -> SharingReport:
        """The result of clustering.

        Raises:
            LmcompressError: If :meth:`finish` was not called yet.
        """
        return finished(self.sharing.report)
