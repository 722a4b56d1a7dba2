"""The interface of a schedule of structured pruning."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lmcompress.method import Step, Term
from lmcompress.pruning.structured.groups import Side
from lmcompress.pruning.structured.masks import with_something
from lmcompress.pruning.structured.run import PruningRun
from lmcompress.pruning.structured.units import Units


class Strategy:
    """How one kind of schedule prunes; this base scores units at each event, and does nothing in between.

    A subclass implements :meth:`scores`, and overrides its other actions.

    Args:
        run: the model, the goal and the state; the strategy keeps everything a checkpoint needs in ``run.state``.

    Attributes:
        folds: whether gates end between 0 and 1, so that weights are multiplied by them.
        per_cost: whether scores are divided by the cost of units.
        keeps_pruned: whether units pruned by an event stay pruned at all later ones.
        silenced: sides of the pruned units' weights that are zeroed before the mask is final.
    """

    folds: ClassVar[bool] = False
    per_cost: ClassVar[bool] = True
    keeps_pruned: ClassVar[bool] = True
    silenced: ClassVar[tuple[Side, ...]] = ("in", "out")

    def __init__(self, run: PruningRun) -> None:
        self.run = run

    def scores(self) -> Units:
        """Current scores of the units; higher ones are kept longer."""
        raise NotImplementedError

    def begin(self) -> None:
        """Read ``run.state`` when training begins or resumes."""

    def advance(self) -> None:
        """Before the forward passes of an optimizer step, after the events that are due."""

    def set_gates(self, step: Step) -> bool:
        """Set the gates to values of this micro-batch.

        Args:
            step: the step, without outputs yet.

        Returns:
            Whether it did; if not, the gates have the mask's values.
        """
        return False

    @property
    def soft(self) -> bool:
        """Whether :meth:`set_gates` sets other values than those used in evaluation."""
        return False

    def values(self) -> Units:
        """Values of the gates in evaluation."""
        return self.run.layout.split(self.run.state.values)

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """Terms of the loss, by name.

        Args:
            step: the step, with the student's outputs.
        """
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters outside the model, as optimizer groups."""
        return []

    def before_optimizer_step(self) -> None:
        """Called when gradients are computed and clipped."""

    def after_optimizer_step(self) -> None:
        """Called when weights are updated."""

    def metrics(self) -> dict[str, float]:
        """Values for the log, besides the removed and the target share."""
        return {}

    def mask(self) -> Units:
        """The current mask, bool, on the CPU; at least one layer and hidden dimension are kept."""
        return with_something(self.run.mask().map(lambda tensor: tensor.cpu()))

    def removed(self) -> float:
        """Current removed share of the cost."""
        return self.run.share_removed(self.mask())

    def wanted(self, planned: float) -> float:
        """Share of the cost to be removed by now.

        Args:
            planned: share due at the last event.
        """
        return planned

    def open_blocks(self) -> Units | None:
        """A mask that shows which blocks still compute something, if it changes from step to step."""
        return None

    def final_mask(self, mask: Units) -> Units:
        """The final mask, from the one that meets the target.

        Args:
            mask: bool, on the CPU.
        """
        return mask

    def final_values(self, mask: Units) -> Units:
        """Values of the gates for the final mask.

        Args:
            mask: from :meth:`final_mask`.
        """
        return mask.map(lambda tensor: tensor.float())


def rows_in(inputs: Any) -> int:
    """Number of rows of a batch.

    Args:
        inputs: tensors by name, possibly with other entries.
    """
    return len(next(value for value in inputs.values() if isinstance(value, torch.Tensor)))
