"""A group lasso on heads and neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from lmcompress.families import anatomy_of
from lmcompress.method import inner_optimizer
from lmcompress.pruning.structured.config import GroupLasso, PruningConfig
from lmcompress.pruning.structured.groups import GROUP_PARTS, GroupPart, shrink_, unit_norms, unit_views
from lmcompress.pruning.structured.masks import with_something
from lmcompress.pruning.structured.order import KEEP_AT_LEAST
from lmcompress.pruning.structured.run import PruningRun
from lmcompress.pruning.structured.schedules.learned import SteeredStrategy
from lmcompress.pruning.structured.units import Units


class GroupLassoStrategy(SteeredStrategy):
    """Shrinks the coupled weights of every head and neuron after each optimizer step, until enough are exactly 0."""

    schedule: GroupLasso

    def __init__(self, run: PruningRun) -> None:
        super().__init__(run)
        self._parts: list[GroupPart] = [part for part in GROUP_PARTS if part in run.config.parts]

    @property
    def soft(self) -> bool:
        """False: no gates are set in the phase."""
        return False

    def scores(self) -> Units:
        """Norms over the root of the number of weights, the scale of the group lasso."""
        norms, blocks = self._norms(), anatomy_of(self.run.student).blocks

        def scaled(part: GroupPart, index: int, norm: Tensor) -> Tensor:
            views = unit_views(blocks[index], part) if len(norm) else []
            return norm / max(1, sum(view[0].numel() for view in views)) ** 0.5

        found = {part: tuple(scaled(part, i, n) for i, n in enumerate(norms.tensors(part))) for part in self._parts}
        return norms.updated(**found)

    def mask(self) -> Units:
        """Groups that are not 0, in one transfer from the GPU."""
        if not self.learning:
            return super().mask()
        return with_something(self._of_norms(self._norms()))

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """A proximal step; none while enough groups are 0, since groups shrunk together reach 0 together."""
        if not self.learning:
            return
        run, norms = self.run, self._norms()
        if self.schedule.steer and run.share_removed(self._of_norms(norms)) >= self.wanted():
            return
        rate = inner_optimizer(run.optimizer).param_groups[0]["lr"]
        shrink_(run.student, self._parts, rate * self.penalty, run.optimizer, norms=norms)

    def final_mask(self, mask: Units) -> Units:
        """The mask without zero groups, unless counts must be multiples, alike in all blocks, or a shape.

        Args:
            mask: bool, on the CPU.
        """
        config = self.run.config
        if config.multiple_of != 1 or config.uniform or config.target.shape is not None:
            return mask
        return without_dead(mask, self._of_norms(self._norms()), config)

    def _norms(self) -> Units:
        return unit_norms(self.run.student, self._parts)

    def _of_norms(self, norms: Units) -> Units:
        return self.run.layout.split(self.run.layout.join(norms).cpu() > 0)


def without_dead(mask: Units, alive: Units, config: PruningConfig) -> Units:
    """A mask without groups that are exactly 0, except where a block would fall below its minimum.

    Args:
        mask: bool, True is kept.
        alive: bool, False for groups that are 0.
        config: configuration with ``keep_at_least``.
    """
    changed: dict[str, tuple[Tensor, ...]] = {}
    for part in mask.parts():
        least = max(1, config.keep_at_least.get(part, KEEP_AT_LEAST[part]))
        pairs = zip(mask.tensors(part), alive.tensors(part), strict=True)
        changed[part] = tuple(kept & lives if int((kept & lives).sum()) >= least else kept for kept, lives in pairs)
    return mask.updated(**changed)
