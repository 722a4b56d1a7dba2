"""Structured pruning as a method of the trainer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from lmcompress.activations.calibration import Batch
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.method import Step, StepCallback, SteppedMethod, Term, undisturbed
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
"""What the gates were given last."""


class StructuredPruning(SteppedMethod):
    """Prunes heads, neurons, sub-layers, layers or hidden dimensions of the model that is trained.

    Until :meth:`finish`, pruned units are masked: their gates are 0, and (but for layers and hidden dimensions,
    which gates alone close) their weights and the optimizer's moments of them are set to 0, so that neither momentum
    nor weight decay nor a gradient can reactivate them.

    Schedules advance by optimizer steps. What a schedule does in a step is its
    :class:`~lmcompress.pruning.structured.schedules.Strategy`.

    Args:
        config: what is pruned, how much, and when.
        calibration: batches for scores and repair; default: rows of the training data.
        cost: a latency table, for a latency target.

    Attributes:
        report: what was done; after :meth:`finish`.
        planned: a structure that meets the target; after :meth:`prepare`.
    """

    name = "pruning"
    # gates and multipliers are few, and their learning rates their own
    max_norm: float | None = 0.0
    changes_shapes = True

    def __init__(
        self, config: PruningConfig, *, calibration: Sequence[Batch] | None = None, cost: CostModel | None = None
    ) -> None:
        self.config = config
        self.cost = cost
        self.report: PruningReport | None = None
        self._calibration = None if calibration is None else list(calibration)
        self._trainer: Any = None
        self._events: list[Event] = []
        self._seconds = 0.0

    def prepare(self, trainer: Any) -> None:
        """Check that the target can be met, and put gates on the student.

        Args:
            trainer: the trainer; its ``student`` is the model without wrappers.

        Raises:
            LmcompressError: If no shape meets the target, the model is quantized by another library, calibration rows
                that will be needed cannot be had or have no labels, the criterion is one of your own without a name, or
                the best checkpoint is to be loaded at the end.
        """
        if trainer.args.load_best_model_at_end:
            raise LmcompressError(
                "load_best_model_at_end must be false with pruning: the weights of an earlier checkpoint do not fit "
                "the final mask. Evaluate checkpoints of the stage after, once the model is cut"
            )
        self._trainer = trainer
        student: PreTrainedModel = trainer.student
        self.attach(student, trainer.args.device)
        # before training, not at its first pruning
        if trainer.train_dataset is not None and self.config.needs_data:
            _refuse_unlabelled(student, self.config, self.run.calibration())
        trainer.add_callback(StepCallback(self))

    def attach(self, student: PreTrainedModel, device: torch.device) -> None:
        """What :meth:`prepare` does to the model, without a trainer.

        Args:
            student: the model, not wrapped.
            device: where it trains.

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
        """Whether gates end between 0 and 1, so that weights are multiplied by them in the end."""
        return STRATEGIES[self.config.schedule.kind].folds

    # what the trainer calls in every step

    def before_forward(self, step: Step) -> None:
        """Give the gates their values for this micro-batch.

        Args:
            step: the step; which layers are left is put into its ``shared``, for distillation.
        """
        if self.strategy.set_gates(step):
            self._gates_hold = "other"
        elif self._gates_hold in ("evaluation", "other") or (self._gates_hold == "nothing" and self._some_pruned):
            self._put("mask")
        self.run.micro += 1
        if (survivors := self._surviving) is not None:
            step.shared["surviving_layers"] = survivors

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """The Lagrangian of hard-concrete gates, or the penalty of movement scores; nothing otherwise.

        Args:
            step: with the student's outputs.

        Returns:
            ``sparsity`` while gates or scores are learnt.
        """
        return self.strategy.loss_terms(step) if self._learning else {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Gates or scores, and multipliers, which ascend; with learning rates of their own and no weight decay."""
        return self.strategy.parameter_groups()

    def modules(self) -> dict[str, nn.Module]:
        """Gates, scores, multipliers, masks and where the schedule is, for checkpoints."""
        return {"state": self.run.state}

    def set_active(self, active: bool) -> None:
        """Take noise and what collects gradients out of the gates while the model is evaluated.

        Args:
            active: whether the next forward passes train.
        """
        # once, not for each batch: nothing moves while the model is evaluated
        if not active and self.strategy.soft and self._gates_hold != "evaluation":
            self._put("evaluation")

    def freeze(self) -> None:
        """Make the mask final and put it on the gates: what :meth:`finish` cuts is what the model computes from now on.

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
            EquivalenceError: If the cut model gives other outputs than the masked one.
        """
        if self.report is not None:
            return
        self.freeze()
        run, target = self.run, self.config.target
        if bool(run.state.mask.all()):
            raise LmcompressError(
                f"nothing was pruned, but {target.kind}={getattr(target, target.kind)} was asked for; please report "
                "this"
            )
        values, probes = run.layout.split(run.state.values.detach()), run.calibration_data or []
        self.report = self._end.cut(run.gates, values, run.mask(), probes, run.goal, self._seconds)

    # what the callback calls

    def begin(self, max_steps: int, optimizer: Any) -> None:
        """Lay out the schedule; read a checkpoint's state, if one was loaded.

        Args:
            max_steps: optimizer steps of the run.
            optimizer: that trains the model.

        Raises:
            LmcompressError: If there are too few steps for the schedule, or the optimizer cannot ascend.
        """
        run, schedule = self.run, self.config.schedule
        run.optimizer = optimizer
        # everything from here on is decided by what is in the state, so that a run that resumes decides alike
        self.strategy.begin()
        self._events = schedule.events(max_steps)
        run.first, run.last = round(schedule.begin * max_steps), self._events[-1].step
        self._set_done(int(run.state.done))
        self._some_pruned = bool((run.state.values != 1).any())
        self._surviving = survivors(run.mask(), run.sizes.structure) if self._some_pruned else None

    def advance(self, step: int) -> None:
        """What is due before an optimizer step.

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
        """Make the mask final, if the run went to its end.

        Args:
            max_steps: optimizer steps of the run.
        """
        if self.run.step + 1 >= max_steps:
            self._finalise()

    def metrics(self) -> dict[str, float]:
        """Share of the cost that is pruned and that was to be pruned by now, for the log."""
        past = self._events[: self._done]
        planned = self.run.goal.removed * (past[-1].share or 0.0) if past else 0.0
        shares = {"pruning_removed": self.strategy.removed(), "pruning_target": self.strategy.wanted(planned)}
        return shares | (self.strategy.metrics() if self._learning else {})

    # below: nobody else's business

    @property
    def _learning(self) -> bool:
        return self.run.begun and not self.run.finished

    def _set_done(self, events: int) -> None:
        # a number too, so that nobody waits for a GPU to read it
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
                # what stays is seen open, and no batch finds values that were made for the rows of another
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
    if config.needs_labels and anatomy_of(model).head is None and any("labels" not in batch for batch in batches):
        raise LmcompressError(
            f"the criterion {config.criterion_name} must have labels, the calibration rows have none; add a column "
            "'labels', or let the model answer for itself with labels: self"
        )
