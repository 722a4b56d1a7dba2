"""Dynamic network surgery: weights are cut below one threshold and spliced above another, at random steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmcompress.pruning.unstructured.config import SparsityConfig, Surgery
from lmcompress.pruning.unstructured.criteria import splice, surgery_threshold
from lmcompress.pruning.unstructured.planning import Planned, pools
from lmcompress.pruning.unstructured.state import SparsityState
from lmcompress.schedules import Event, phase_share, ramp_of


class Splicing:
    """Changes masks while the weights are trained behind them.

    The steps at which it updates the masks depend only on the seed and the step.

    Args:
        config: the configuration.
        schedule: its schedule.
        planned: the matrices.
        state: their masks, weights behind the masks, and thresholds.

    Reference:
        Guo, Yao & Chen, *Dynamic Network Surgery for Efficient DNNs*, NIPS 2016, https://arxiv.org/abs/1608.04493,
        section 3.
    """

    def __init__(
        self, config: SparsityConfig, schedule: Surgery, planned: Sequence[Planned], state: SparsityState
    ) -> None:
        self._seed, self._schedule, self._planned, self._state = config.seed, schedule, planned, state
        self._ramp = None if schedule.ramp is None else ramp_of(schedule.ramp)

    def fix_thresholds(self) -> None:
        """Thresholds of the matrices with a ``quality``, from their current weights."""
        for number, one in enumerate(self._planned):
            if one.quality is not None:
                self._state.thresholds[number] = surgery_threshold(one.weight.detach(), one.quality)

    def looks(self, step: int, begin: int) -> bool:
        """Whether masks change after a step.

        Args:
            step: optimizer steps done.
            begin: step at which surgery began.
        """
        steps = step - begin
        if steps % self._schedule.every:
            return False
        chance = (1 + self._schedule.gamma * steps) ** -self._schedule.power
        seed = (self._seed * 6364136223846793005 + step + 1442695040888963407) % 2**63
        return float(torch.rand((), generator=torch.Generator().manual_seed(seed))) < chance

    def operate(self, step: int, events: Sequence[Event], may_stay: Sequence[Tensor]) -> None:
        """One update: cut below the lower threshold, splice above the upper one.

        Args:
            step: optimizer steps done.
            events: first and last event of the schedule.
            may_stay: for each matrix a bool mask of weights that may be kept, as stored.
        """
        low, high = 1 - self._schedule.margin, 1 + self._schedule.margin
        tensors = zip(self._state.masks(), self._state.hidden(), may_stay, self._thresholds(step, events), strict=True)
        for mask, hidden, kept, threshold in tensors:
            mask.copy_(splice(mask, hidden, low * threshold, high * threshold) & kept)

    def _thresholds(self, step: int, events: Sequence[Event]) -> list[Tensor]:
        """For each matrix: the initial threshold, or the one that prunes the due number of weights."""
        found = list(self._state.thresholds.unbind())
        way = 1.0 if self._ramp is None else self._ramp(phase_share(step, events[0].step, events[-1].step))
        for numbers in pools(self._planned):
            sparsity = self._planned[numbers[0]].sparsity
            if sparsity is None:
                continue
            sizes = torch.cat([self._state.hidden()[number].reshape(-1).abs().float() for number in numbers])
            below = round(sparsity * way * len(sizes))
            value = sizes.kthvalue(below).values if below else sizes.new_zeros(())
            for number in numbers:
                found[number] = value
        return found
