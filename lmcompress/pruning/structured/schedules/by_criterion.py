"""Schedules that prune by a criterion: one_shot, iterative, gradual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.method import Step
from lmcompress.pruning.structured.run import PruningRun
from lmcompress.pruning.structured.schedules.base import Strategy, rows_in
from lmcompress.pruning.structured.scoring import calibrated
from lmcompress.pruning.structured.units import Units


class CriterionStrategy(Strategy):
    """Scores from calibration data at each event, or running sums over the gradients of training."""

    def __init__(self, run: PruningRun) -> None:
        super().__init__(run)
        self._fresh: Tensor | None = None

    @property
    def soft(self) -> bool:
        """Whether the gates collect gradients, and so have one value per example."""
        return self.run.config.scores == "training" and not self.run.finished

    def scores(self) -> Units:
        """Scores of the units.

        Raises:
            LmcompressError: If training was to accumulate them and has not run a step, or as
                :func:`~lmcompress.pruning.structured.scoring.score`.
        """
        run = self.run
        if run.config.scores == "calibration":
            return calibrated(run.student, run.config, run.calibration())
        if not bool(run.state.seen):
            raise LmcompressError("scores: training saw no step before the first pruning; let the schedule begin later")
        return run.layout.split(run.state.scores)

    def set_gates(self, step: Step) -> bool:
        """Separate values for each example, for per-example gradients.

        Args:
            step: the step, without outputs yet.

        Returns:
            Whether scores are collected.
        """
        if not self.soft:
            return False
        run, criterion, scale = self.run, self.run.config.chosen_criterion, self._scale()
        leaf = run.state.values.detach().expand(rows_in(step.student_inputs), -1).clone().requires_grad_()

        def collect(gradient: Tensor) -> None:
            with torch.no_grad():
                wide = gradient.float() if scale == 1 else gradient.float() / scale
                new = criterion.function(wide).sum(0)
                self._fresh = new if self._fresh is None else self._fresh + new

        leaf.register_hook(collect)
        run.gates.set_for_scores(run.layout.split(leaf))
        return True

    def before_optimizer_step(self) -> None:
        """Add the scores from this step's gradients to the running scores."""
        if self._fresh is None:
            return
        fresh, self._fresh, trainer = self._fresh, None, self.run.trainer
        if trainer is not None and trainer.args.world_size > 1:
            fresh = trainer.accelerator.reduce(fresh, reduction="sum")
        # float16: a step that overflows is skipped
        if self._scaler() is not None and not bool(fresh.isfinite().all()):
            return
        self.run.state.scores.mul_(self.run.config.score_memory).add_(fresh)
        self.run.state.seen.fill_(1)

    def _scaler(self) -> Any:
        return getattr(getattr(self.run.trainer, "accelerator", None), "scaler", None)

    def _scale(self) -> float:
        """The loss scale of float16 in this step; it changes between steps."""
        scaler = self._scaler()
        return 1.0 if scaler is None else float(scaler.get_scale())
