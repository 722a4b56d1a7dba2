"""Movement scores with a threshold."""

from __future__ import annotations

from typing import Any

import torch

from lmcompress.method import Step, Term
from lmcompress.pruning.structured.config import Movement
from lmcompress.pruning.structured.goals import along_chains
from lmcompress.pruning.structured.learned import movement_penalty, threshold_mask
from lmcompress.pruning.structured.masks import with_something
from lmcompress.pruning.structured.schedules.base import rows_in
from lmcompress.pruning.structured.schedules.learned import SteeredStrategy
from lmcompress.pruning.structured.units import Units
from lmcompress.schedules import cubic


class MovementStrategy(SteeredStrategy):
    """Scores are learned straight through a rising threshold, and lowered by a penalty."""

    schedule: Movement

    def scores(self) -> Units:
        """Sigmoids of the scores, each times those of its sub-layer and its layer."""
        return along_chains(self.run.layout.split(torch.sigmoid(self.run.state.learned.detach())))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The scores."""
        return [{"params": [self.run.state.learned], "lr": self.schedule.learning_rate}]

    def set_gates(self, step: Step) -> bool:
        """Open the gates whose score is above the threshold.

        Args:
            step: unused.

        Returns:
            Whether the phase continues.
        """
        if self.learning:
            self.run.gates.set(self.run.layout.split(threshold_mask(self.run.state.learned, self._threshold())))
        return self.learning

    @torch.no_grad()
    def values(self) -> Units:
        """Gates whose score is above the threshold are 1."""
        if not self.learning:
            return super().values()
        return self.run.layout.split(threshold_mask(self.run.state.learned, self._threshold()))

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """The penalty on the scores.

        Args:
            step: the step, for its number of rows.

        Returns:
            ``sparsity``, a mean over examples, so that it is added once to an optimizer step.
        """
        split = self.run.layout.split(self.run.state.learned)
        # one mean for each kind of unit: heads are few and neurons many
        means = [movement_penalty(torch.cat(split.tensors(part))) for part in split.parts()]
        strength = self.penalty * self._threshold() / self.schedule.threshold
        return {"sparsity": Term(torch.stack(means).mean() * rows_in(step.inputs), "examples", strength)}

    def open_blocks(self) -> Units:
        """The mask of :meth:`values`, in one transfer from the GPU."""
        threshold = self._threshold()
        learned = self.run.layout.split(self.run.state.learned.detach().cpu())
        return with_something(learned.map(lambda scores: torch.sigmoid(scores) > threshold))

    def _threshold(self) -> float:
        return self.schedule.threshold * cubic(self.warmed_up)
