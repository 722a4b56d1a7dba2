"""What a schedule of structured pruning is to the method."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lmcompress.method import Step, Term
from lmcompress.pruning.structured.groups import Side
from lmcompress.pruning.structured.masks import with_something
from lmcompress.pruning.structured.run import PruningRun
from lmcompress.pruning.structured.units import Units


class Strategy:
    """How one kind of schedule prunes; here: one that scores units anew at each event, and nothing in between.

    A subclass gives :meth:`scores`, and overrides what it does besides.

    Args:
        run: the model, the goal and the state; the strategy keeps all that a checkpoint needs in ``run.state``.

    Attributes:
        folds: whether gates end between 0 and 1, so that weights are multiplied by them.
        per_cost: whether scores are divided by what units cost.
        keeps_pruned: whether what an event pruned stays pruned at all later ones.
        silenced: sides of the pruned units' weights that are zeroed before the mask is final.
    """

    folds: ClassVar[bool] = False
    per_cost: ClassVar[bool] = True
    keeps_pruned: ClassVar[bool] = True
    silenced: ClassVar[tuple[Side, ...]] = ("in", "out")

    def __init__(self, run: PruningRun) -> None:
        self.run = run

    def scores(self) -> Units:
        """Scores of the units now; greater stays longer."""
        raise NotImplementedError

    def begin(self) -> None:
        """Read ``run.state``, when training begins or goes on."""

    def advance(self) -> None:
        """Before the forward passes of an optimizer step, after the events that are due."""

    def set_gates(self, step: Step) -> bool:
        """Give the gates values of this micro-batch's own.

        Args:
            step: without outputs yet.

        Returns:
            Whether it did; if not, the gates have the values of the mask.
        """
        return False

    @property
    def soft(self) -> bool:
        """Whether :meth:`set_gates` gives other values than evaluation is to see."""
        return False

    def values(self) -> Units:
        """Values of the gates in evaluation."""
        return self.run.layout.split(self.run.state.values)

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """Terms of the loss, by name.

        Args:
            step: with the student's outputs.
        """
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters that are not the model's, as optimizer groups."""
        return []

    def before_optimizer_step(self) -> None:
        """When gradients are there and clipped."""

    def after_optimizer_step(self) -> None:
        """When weights have moved."""

    def metrics(self) -> dict[str, float]:
        """Numbers for the log, beside the shares removed and wanted."""
        return {}

    def mask(self) -> Units:
        """The mask as it is now, bool, on the CPU; at least one layer and hidden dimension stay."""
        return with_something(self.run.mask().map(lambda tensor: tensor.cpu()))

    def removed(self) -> float:
        """Share of the cost that is removed now."""
        return self.run.share_removed(self.mask())

    def wanted(self, planned: float) -> float:
        """Share of the cost that is to be removed by now.

        Args:
            planned: by the last event.
        """
        return planned

    def open_blocks(self) -> Units | None:
        """A mask that tells which blocks still compute something, where it moves from step to step."""
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
            mask: of :meth:`final_mask`.
        """
        return mask.map(lambda tensor: tensor.float())


def rows_in(inputs: Any) -> int:
    """Rows of a batch.

    Args:
        inputs: tensors by name, and perhaps other things.
    """
    return len(next(value for value in inputs.values() if isinstance(value, torch.Tensor)))
