"""Iterative hard thresholding: what is pruned is reactivated and trained again."""

from __future__ import annotations

from typing import ClassVar

from lmcompress.pruning.structured.groups import GROUP_PARTS, Side, unit_norms
from lmcompress.pruning.structured.schedules.base import Strategy
from lmcompress.pruning.structured.units import Units


class HardThresholdingStrategy(Strategy):
    """Keeps the units whose readers have the largest norm.

    Only what reads a pruned unit is zeroed before the mask is final: what feeds it stays, or the unit would be
    reactivated without any gradient.
    """

    keeps_pruned: ClassVar[bool] = False
    silenced: ClassVar[tuple[Side, ...]] = ("out",)

    def scores(self) -> Units:
        """Norms of what reads each unit: it alone restarts from 0."""
        parts = [part for part in GROUP_PARTS if part in self.run.config.parts]
        return unit_norms(self.run.student, parts, self.silenced)
