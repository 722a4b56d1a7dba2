"""Iterative hard thresholding: pruned units are reactivated and trained again."""

from __future__ import annotations

from typing import ClassVar

from lmcompress.pruning.structured.groups import GROUP_PARTS, Side, unit_norms
from lmcompress.pruning.structured.schedules.base import Strategy
from lmcompress.pruning.structured.units import Units


class HardThresholdingStrategy(Strategy):
    """Keeps the units whose reading weights have the largest norm.

    Only the weights that read a pruned unit are zeroed before the mask is final: without those that feed it, the
    reactivated unit would have no gradient.
    """

    keeps_pruned: ClassVar[bool] = False
    silenced: ClassVar[tuple[Side, ...]] = ("out",)

    def scores(self) -> Units:
        """Norms of the weights that read each unit: only these restart from 0."""
        parts = [part for part in GROUP_PARTS if part in self.run.config.parts]
        return unit_norms(self.run.student, parts, self.silenced)
