"""Structured pruning as a method of the trainer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from lmcompress.activations.batches import Batch, as_batches
from lmcompress.data.windows import SPAN_LABELS
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.method import Step, SteppedMethod, Term, undisturbed
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.costs import CostModel
from lmcompress.pruning.structured.finishing import Finish
from lmcompress.pruning.structured.goals import choose, feasible, partial_target
from lmcompress.pruning.structured.groups import Side, silence_
from lmcompress.pruning.structured.masks import survivors
from lmcompress.pruning.structured.report import PruningReport
from lmcompress.pruning.structured.run import PruningRun
from lmcompress.pruning.structured.schedules import STRATEGIES
from lmcompress.pruning.structured.surgery import refuse_quantized
from lmcompress.pruning.structured.targets import Target
from lmcompress.pruning.structured.units import Units
from lmcompress.schedules import Event

_Held = Literal["nothing", "mask", "evaluation", "other"]
"""The latest values of the gates."""


class StructuredPruning(SteppedMethod):
    """Prunes heads, neurons, sub-layers, layers or hidden dimensions of the model in training.

    Until :meth:`finish`, pruned units are masked: their gates are 0, and (except for layers and hidden dimensions,
    which only gates close) their weights and the optimizer's moments of them are set to 0, so that neither momentum
    nor weight decay nor a gradient can reactivate them.

    Schedules advance by optimizer steps. A schedule's action in a step is defined by its
    :class:`~lmcompress.pruning.structured.schedules.Strategy`.

    Args:
        config: the parts, the target and the schedule.
        calibration: batches for scores and repair; default: rows of the training data.
        cost: a latency table, for a latency target.

    Attributes:
        report: the result; set by :meth:`finish`.
        planned: a structure that meets the target; set by :meth:`prepare`.
    """

    name = "pruning"
    # gates and multipliers are few, with their own learning rates
    max_norm: float | None = 0.0
    changes_shapes = True

    def __init__(
        self, config: PruningConfig, *, calibration: Sequence[Batch] | None = None, cost: CostModel | None = None
    ) -> None:
        self.config = config
        self.cost = cost
        self.report: PruningReport | None = None
        self._calibration = None if calibration is None else as_batches(calibration)
        self._trainer: Any = None
        self._events: list[Event] = []
        self._seconds = 0.0

    def prepare(self, trainer: Any) -> None:
        """Check that the target can be met, and put gates on the student.

        Args:
            trainer: the trainer; its ``student`` is the model without wrappers.

        Raises:
            LmcompressError: If no shape meets the target, the model is quantized by another library, calibration rows
                that will be needed are not available or have no labels, or the criterion is a custom one without a
                name.
        """
        self._trainer = trainer
        student: PreTrainedModel = trainer.student
        self.attach(student, trainer.args.device)
        # before training, not at its first pruning
        if trainer.train_dataset is not None and self.config.needs_data:
            _refuse_unlabelled(student, self.config, self.run.calibration())

    def attach(self, student: PreTrainedModel, device: torch.device) -> None:
        """The effect of :meth:`prepare` on the model, without a trainer.

        Args:
            student: the model, not wrapped.
            device: training device.

        Raises:
            LmcompressError: If no shape meets the target, or the model is quantized by another library.
        """
        refuse_quantized(student)
        self._end = Finish(student, self.config)
        self.run = PruningRun(
            self.config, student, device, cost=self.cost, trainer=self._trainer, calibration=self._calibration
        )
        # before training, not after it
        self.planned = feasible(self.config, self.run.sizes, self.cost)
        self.strategy = STRATEGIES[self.config.schedule.kind](self.run)
        self._gates_hold: _Held = "nothing"
        self._done = 0
        self._some_pruned = False
        self._surviving: list[int] | None = None

    @property
    def folds(self) -> bool:
        """Whether weights are multiplied in the end: by soft gates, or for a block that gets another number."""
        folds = STRATEGIES[self.config.schedule.kind].folds
        if folds or "layers" not in self.config.parts or not hasattr(self, "run"):
            return folds
        blocks = anatomy_of(self.run.student).blocks
        return any(block.number_factors(index + 1) for index, block in enumerate(blocks))

    # called by the trainer in every step

    def before_forward(self, step: Step) -> None:
        """Set the gates for this micro-batch.

        Args:
            step: the step; the remaining layers are stored in its ``shared``, for distillation.
        """
        if self.strategy.set_gates(step):
            self._gates_hold = "other"
        elif self._gates_hold in ("evaluation", "other") or (self._gates_hold == "nothing" and self._some_pruned):
            self._put("mask")
        self.run.micro += 1
        if (survivors := self._surviving) is not None:
            step.shared["surviving_layers"] = survivors

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """The Lagrangian of hard-concrete gates, or the penalty of movement scores; otherwise none.

        Args:
            step: the step, with the student's outputs.

        Returns:
            ``sparsity`` while gates or scores are learned.
        """
        return self.strategy.loss_terms(step) if self._learning else {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Gates or scores, and multipliers, which ascend; with separate learning rates and no weight decay."""
        return self.strategy.parameter_groups()

    def modules(self) -> dict[str, nn.Module]:
        """Gates, scores, multipliers, masks and the state of the schedule, for checkpoints."""
        return {"state": self.run.state}

    def set_active(self, active: bool) -> None:
        """Remove noise and gradient collection from the gates while the model is evaluated.

        Args:
            active: whether the next forward passes train.
        """
        # once, not for each batch: nothing changes while the model is evaluated
        if not active and self.strategy.soft and self._gates_hold != "evaluation":
            self._put("evaluation")

    def freeze(self) -> None:
        """Make the mask final and apply it to the gates: the model already computes what :meth:`finish` cuts.

        Raises:
            LmcompressError: If training has not begun.
        """
        if self.report is not None:
            return
        if self._trainer is not None and not self._events:
            raise LmcompressError("nothing was pruned: finish() must come after train()")
        self._finalise()
        self._put("mask")

    def finish(self) -> None:
        """Fold soft gates into the weights, cut, compare with the masked model, and report.

        Raises:
            LmcompressError: If nothing was pruned, or training has not begun.
            EquivalenceError: If the outputs of the cut model differ from the masked one's.
        """
        if self.report is not None:
            return
        self.freeze()
        run, target = self.run, self.config.target
        if bool(run.state.mask.all()):
            raise LmcompressError(
                f"nothing was pruned, but the target is {target.kind}={getattr(target, target.kind)}; please report "
                "this"
            )
        values, probes = run.layout.split(run.state.values.detach()), run.calibration_data or []
        self.report = self._end.cut(run.gates, values, run.mask(), probes, run.goal, self._seconds)

    def detach(self) -> None:
        """Take the gates off the student; units that were pruned on the way stay zero."""
        if self.report is None:
            self.run.gates.remove()

    @property
    def complete(self) -> bool:
        """Whether the mask is final."""
        return self.run.finished

    # called by the callback

    def begin(self, max_steps: int, optimizer: Any) -> None:
        """Lay out the schedule; read a checkpoint's state, if one was loaded.

        Args:
            max_steps: optimizer steps of the run.
            optimizer: the model's optimizer.

        Raises:
            LmcompressError: If there are too few steps for the schedule, or the optimizer cannot ascend.
        """
        run, schedule = self.run, self.config.schedule
        run.optimizer = optimizer
        # all later decisions depend only on the state, so that a resumed run decides in the same way
        self.strategy.begin()
        self._events = schedule.events(max_steps)
        run.first, run.last = round(schedule.begin * max_steps), self._events[-1].step
        self._read_state()

    def advance(self, step: int) -> None:
        """The action due before an optimizer step.

        Args:
            step: optimizer steps done.
        """
        self.run.step, self.run.micro = step, 0
        while self._done < len(self._events) and step >= self._events[self._done].step:
            self._happen(self._events[self._done])
            self._set_done(self._done + 1)
        if self._learning:
            self.strategy.advance()
            if {"layers", "attention", "ffn"} & set(self.config.parts):
                blocks = self.strategy.open_blocks()
                self._surviving = self._surviving if blocks is None else survivors(blocks, self.run.sizes.structure)

    def before_optimizer_step(self) -> None:
        """Add the gradients of this step to the running scores."""
        self.strategy.before_optimizer_step()

    def after_optimizer_step(self) -> None:
        """Clamp gates, or shrink groups."""
        if self._learning:
            self.strategy.after_optimizer_step()

    def end(self, max_steps: int) -> None:
        """Make the mask final if the run is complete.

        Args:
            max_steps: optimizer steps of the run.
        """
        if self.run.step + 1 >= max_steps:
            self._finalise()

    def restored(self) -> None:
        """Gates as in the checkpoint that was loaded."""
        self._read_state()
        self._put("mask")

    def metrics(self) -> dict[str, float]:
        """Share of the cost that is pruned and that is due by now, for the log."""
        past = self._events[: self._done]
        planned = self.run.goal.removed * (past[-1].share or 0.0) if past else 0.0
        shares = {"pruning_removed": self.strategy.removed(), "pruning_target": self.strategy.wanted(planned)}
        return shares | (self.strategy.metrics() if self._learning else {})

    # private below

    @property
    def _learning(self) -> bool:
        return self.run.begun and not self.run.finished

    def _read_state(self) -> None:
        run = self.run
        self._set_done(int(run.state.done))
        self._some_pruned = bool((run.state.values != 1).any())
        self._surviving = survivors(run.mask(), run.sizes.structure) if self._some_pruned else None

    def _set_done(self, events: int) -> None:
        # also as a number, so that reading it does not wait for a GPU
        self._done = events
        self.run.state.done.fill_(events)
        self.run.finished = bool(self._events) and events >= len(self._events)

    def _put(self, what: _Held) -> None:
        self.run.gates.set(self.strategy.values())
        self._gates_hold = what

    def _happen(self, event: Event) -> None:
        started, run = time.perf_counter(), self.run
        if event.share is None:
            run.state.mask.fill_(True)
            run.state.values.fill_(1.0)
            self._mask_changed()
        elif event.final:
            self._choose_final()
        elif (target := partial_target(self.config.target, event.share, run.sizes, run.goal)) is not None:
            with undisturbed(run.student):
                mask = self._chosen(target, run.mask())
            self._take(mask, mask.map(lambda tensor: tensor.float()), self.strategy.silenced)
        self._seconds += time.perf_counter() - started

    def _chosen(self, target: Target, gone: Units | None) -> Units:
        scores, per_cost = self.strategy.scores(), self.strategy.per_cost
        return choose(self.config, scores, self.run.sizes, target, cost=self.cost, gone=gone, per_cost=per_cost)

    def _finalise(self) -> None:
        if not self.run.finished:
            last = Event(self.run.step, 1.0, final=True)
            self._happen(last)
            self._events = self._events or [last]
            self._set_done(len(self._events))

    def _choose_final(self) -> None:
        run = self.run
        with undisturbed(run.student):
            gone = run.mask() if self.strategy.keeps_pruned else None
            mask = self.strategy.final_mask(self._chosen(self.config.target, gone))
            values = self.strategy.final_values(mask)
            if self.config.repair != "none":
                # remaining units are seen open, and no batch gets values made for the rows of another
                now = self.strategy.values().zip(mask, lambda value, kept: torch.maximum(value, kept.to(value)))
                run.gates.set(now)
                self._gates_hold = "other"
                self._end.repair(mask, run.calibration())
        self._take(mask, values, ("in", "out"))

    def _take(self, mask: Units, values: Units, sides: tuple[Side, ...]) -> None:
        run = self.run
        with torch.no_grad():
            run.state.mask.copy_(run.layout.join(mask))
            run.state.values.copy_(run.layout.join(values))
        silence_(run.student, mask, sides, run.optimizer)
        self._mask_changed()

    def _mask_changed(self) -> None:
        run = self.run
        self._some_pruned = True
        run.gates.set(run.layout.split(run.state.values))
        self._gates_hold = "mask"
        self._surviving = survivors(run.mask(), run.sizes.structure)


def _refuse_unlabelled(model: PreTrainedModel, config: PruningConfig, batches: Sequence[Batch]) -> None:
    unlabelled = any("labels" not in batch and SPAN_LABELS[0] not in batch for batch in batches)
    if config.needs_labels and unlabelled and not anatomy_of(model).predicts_next:
        raise LmcompressError(
            f"the criterion {config.criterion_name} must have labels, the calibration rows have none; add a column "
            "'labels', or use the model's own predictions with labels: self"
        )
