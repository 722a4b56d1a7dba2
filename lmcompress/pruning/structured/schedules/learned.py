"""The common base of schedules with learned masks: a rising target, and a penalty that follows it."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch

from lmcompress.method import inner_optimizer
from lmcompress.pruning.proximal import STEER_EVERY, steering_factor
from lmcompress.pruning.structured.config import GroupLasso, Learned, Movement
from lmcompress.pruning.structured.masks import with_something
from lmcompress.pruning.structured.run import PruningRun
from lmcompress.pruning.structured.schedules.base import Strategy
from lmcompress.pruning.structured.units import Units
from lmcompress.schedules import linear


class LearnedStrategy(Strategy):
    """A mask that is learned in the phase, and cut to the target at its end."""

    schedule: Learned
    per_cost: ClassVar[bool] = False
    keeps_pruned: ClassVar[bool] = False

    def __init__(self, run: PruningRun) -> None:
        super().__init__(run)
        self.schedule = cast(Any, run.config.schedule)

    @property
    def learning(self) -> bool:
        """Whether the phase continues."""
        return self.run.begun and not self.run.finished

    @property
    def soft(self) -> bool:
        """Whether gates are currently learned."""
        return self.learning

    def advance(self) -> None:
        """Keep the learning rates constant: with the model's schedule gates would stop moving at the target."""
        for own in self.parameter_groups():
            for group in inner_optimizer(self.run.optimizer).param_groups:
                if any(parameter is own["params"][0] for parameter in group["params"]):
                    group["lr"] = own["lr"]

    def wanted(self, planned: float = 0.0) -> float:
        """Share of the cost to be removed by now.

        Args:
            planned: unused.
        """
        return self.run.goal.removed * linear(self.warmed_up) if self.run.begun else 0.0

    @property
    def warmed_up(self) -> float:
        """Share of the warm-up that is done, in [0, 1]."""
        return min(1.0, self.run.phase / max(self.schedule.warmup, 1e-9))

    def mask(self) -> Units:
        """The gates that are open without noise, bool, on the CPU."""
        if not self.learning:
            return super().mask()
        return with_something(self.values().map(lambda values: (values != 0).cpu()))


class SteeredStrategy(LearnedStrategy):
    """With a penalty whose strength is adjusted, so that the mask follows the target."""

    schedule: Movement | GroupLasso

    def __init__(self, run: PruningRun) -> None:
        super().__init__(run)
        run.state.penalty.fill_(self.schedule.penalty)
        self.penalty = self.schedule.penalty

    def begin(self) -> None:
        """Read the penalty, also as a number, so that reading it does not wait for a GPU."""
        self.penalty = float(self.run.state.penalty)

    @torch.no_grad()
    def advance(self) -> None:
        """Adjust the penalty, every :data:`~lmcompress.pruning.proximal.STEER_EVERY` steps."""
        super().advance()
        if self.schedule.steer and self.run.step % STEER_EVERY == 0:
            gap = (self.wanted() - self.removed()) / self.run.goal.removed
            self.run.state.penalty.mul_(steering_factor(gap))
            self.penalty = float(self.run.state.penalty)

    def metrics(self) -> dict[str, float]:
        """The strength of the penalty, while it acts."""
        return {"pruning_penalty": self.penalty} if self.learning else {}
