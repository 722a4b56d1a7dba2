"""A pruning run: the inputs of its schedule's decisions, and the state in a training checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.calibration import Batch, on_device
from lmcompress.errors import LmcompressError
from lmcompress.method import calibration_rows
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.costs import CostModel, ModelSizes
from lmcompress.pruning.structured.gates import Gates
from lmcompress.pruning.structured.goals import goal_of
from lmcompress.pruning.structured.layout import Layout
from lmcompress.pruning.structured.units import Units, full, masked_structure
from lmcompress.schedules import phase_share


class PruningState(nn.Module):
    """Everything that determines the mask, and the progress of the schedule.

    Args:
        size: number of units.

    Attributes:
        mask: ``(units,)`` bool, True is kept.
        values: ``(units,)`` float32, values of the gates.
        scores: ``(units,)`` float32, running sums of ``scores: training``.
        penalty: 0-d float32, strength of an adjusted penalty.
        done: 0-d int64, number of events of the schedule so far.
        seen: 0-d int64, 1 once ``scores`` holds values.
        learned: ``(units,)`` float32, ``log_alpha`` or movement scores.
        multipliers: ``(2,)`` float32, of the Lagrangian.
    """

    mask: Tensor
    values: Tensor
    scores: Tensor
    penalty: Tensor
    done: Tensor
    seen: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(size, dtype=torch.bool))
        self.register_buffer("values", torch.ones(size))
        self.register_buffer("scores", torch.zeros(size))
        self.register_buffer("penalty", torch.zeros(()))
        self.register_buffer("done", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.learned = nn.Parameter(torch.zeros(size))
        self.multipliers = nn.Parameter(torch.zeros(2))


class PruningRun:
    """The model to prune, the goal, the state, and the progress of training.

    Args:
        config: the parts, the target and the schedule.
        student: the model, not wrapped; gets gates.
        device: training device.
        cost: a latency table, for a latency target.
        trainer: None without a trainer.
        calibration: batches for scores and repair; None: rows of the trainer's data.

    Attributes:
        step: optimizer steps done.
        micro: forward passes since then.
        first: step at which the schedule begins; None before training.
        last: step of the schedule's last event.
        finished: whether the mask is final.
    """

    def __init__(
        self,
        config: PruningConfig,
        student: PreTrainedModel,
        device: torch.device,
        *,
        cost: CostModel | None = None,
        trainer: Any = None,
        calibration: Sequence[Batch] | None = None,
    ) -> None:
        self.config, self.student, self.device, self.cost = config, student, device, cost
        self.trainer, self.calibration_data = trainer, calibration
        self.optimizer: Any = None
        self.sizes = ModelSizes.of(student)
        self.goal = goal_of(config.target, self.sizes, cost)
        self.layout = Layout.of(full(student, config.parts))
        self.state = PruningState(self.layout.size).to(device)
        self.gates = Gates(student, config.parts)
        self.step = self.micro = self.last = 0
        self.first: int | None = None
        self.finished = False

    @property
    def begun(self) -> bool:
        """Whether the schedule's first step has been reached."""
        return self.first is not None and self.step >= self.first

    @property
    def phase(self) -> float:
        """Share of the schedule that is done, in [0, 1]."""
        return phase_share(self.step, self.first or 0, self.last)

    def mask(self) -> Units:
        """The mask, bool, on the device."""
        return self.layout.split(self.state.mask)

    def share_removed(self, mask: Units) -> float:
        """Share of the goal's cost that a mask removes.

        Args:
            mask: bool, True is kept.
        """
        return self.goal.share_removed(masked_structure(self.sizes.structure, mask))

    def calibration(self) -> list[Batch]:
        """Batches for scores and repair, on the device; sampled once."""
        if self.calibration_data is None:
            config = self.config
            if self.trainer is None:
                raise LmcompressError(f"the criterion {config.criterion_name} needs data, got none; pass calibration=")
            self.calibration_data = calibration_rows(
                self.trainer, config.calibration_rows, config.calibration_batch_size, config.seed
            )
        return [on_device(batch, self.device) for batch in self.calibration_data]
