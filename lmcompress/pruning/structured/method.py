"""Structured pruning as a method of the trainer, and without training as a function."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.config import Structure
from lmcompress.checkpoint.structure import recorded_structure
from lmcompress.errors import EquivalenceError, LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.method import Step, StepCallback, SteppedMethod, Term, calibration_rows, inner_optimizer, undisturbed
from lmcompress.model import CompressedModel, outputs_of, random_batches
from lmcompress.pruning.structured.config import GroupLasso, HardConcrete, Movement, PruningConfig
from lmcompress.pruning.structured.costs import CostModel, ModelSizes, ParameterCost
from lmcompress.pruning.structured.gates import Gates
from lmcompress.pruning.structured.goals import (
    Goal,
    along_chains,
    choose,
    expected_costs,
    feasible,
    goal_of,
    partial_target,
)
from lmcompress.pruning.structured.groups import GroupPart, Side, shrink_, silence_, unit_norms, unit_views
from lmcompress.pruning.structured.layout import Layout
from lmcompress.pruning.structured.learned import (
    LOG_ALPHA_LIMIT,
    expected_cost,
    hard_concrete_open,
    hard_concrete_sample,
    hard_concrete_value,
    initial_log_alpha,
    lagrangian,
    movement_penalty,
    threshold_mask,
    without_expected_zeros,
)
from lmcompress.pruning.structured.order import KEEP_AT_LEAST
from lmcompress.pruning.structured.repair import Repaired, compensate_bias, least_squares, least_squares_in_order
from lmcompress.pruning.structured.report import PruningReport
from lmcompress.pruning.structured.scoring import score
from lmcompress.pruning.structured.stock import stock_verdict
from lmcompress.pruning.structured.surgery import census, coverage, cut, fold, refuse_quantized
from lmcompress.pruning.structured.units import Units, full, masked_structure, unit_shapes
from lmcompress.schedules import (
    Event,
    Gradual,
    HardThresholding,
    Iterative,
    OneShot,
    cubic,
    events,
    linear,
    phase_share,
)

Batch = Mapping[str, Tensor]

TOLERANCE = 1e-5
"""Greatest difference allowed between masked and cut model in float32, relative to the greatest output."""
STEER_EVERY = 10
STEER_RATE = 0.25

_Set = Literal["nothing", "mask", "evaluation", "other"]
"""What the gates were given last."""

_LEARNED = (HardConcrete, Movement, GroupLasso)
_GROUPS: tuple[GroupPart, ...] = ("heads", "neurons")
_READS: tuple[Side, ...] = ("out",)


def prune(
    model: PreTrainedModel | CompressedModel,
    config: PruningConfig,
    batches: Iterable[Batch] = (),
    *,
    cost: CostModel | None = None,
    progress: bool = False,
    before_cut: Callable[[PreTrainedModel], object] | None = None,
) -> PruningReport:
    """Score, choose, perhaps repair, and cut, without training: the schedules one_shot and iterative.

    With ``iterative``, each round is scored with what is gone already masked. The model is changed at the end only:
    whatever is refused leaves it as it was, but for a repair.

    Args:
        model: cut in place.
        config: what is pruned, and how; shares of training in its schedule do not matter here.
        batches: calibration data, labels included where the criterion needs them; none for criteria of weights alone.
        cost: a latency table, for a latency target.
        progress: show a bar while scoring.
        before_cut: called with the masked model before it is cut, for instance to keep its outputs for the gate of
            :meth:`~lmcompress.model.CompressedModel.save_pretrained`.

    Returns:
        What was done.

    Raises:
        LmcompressError: the schedule needs training, no shape meets the target, the model is quantized by another
            library, or what the criterion refuses.
        EquivalenceError: the cut model answers differently from the masked one.
    """
    inner = model.model if isinstance(model, CompressedModel) else model
    if config.trains:
        raise LmcompressError(
            f"the schedule {config.schedule.kind} needs training: use PruningTrainer, or choose one_shot or iterative"
        )
    refuse_quantized(inner)
    started = time.perf_counter()
    data = [_on_device(batch, inner.device) for batch in batches]
    sizes, before, counts = ModelSizes.of(inner), recorded_structure(inner), census(inner)
    goal = goal_of(config.target, sizes, cost)
    feasible(config, sizes, cost)
    count = config.schedule.rounds if isinstance(config.schedule, Iterative) else 1
    mask: Units | None = None
    repaired: list[Repaired] = []
    with Gates(inner, config.parts) as gates:
        for number in range(1, count + 1):
            target = partial_target(config.target, number / count, sizes, goal)
            if target is None:
                continue
            scores = _calibrated(inner, config, data, progress=progress)
            new = choose(config, scores, sizes, target, cost=cost, gone=mask)
            if number == count:
                # of the dense model: what earlier rounds took is to be made good too
                gates.set(new.map(lambda tensor: torch.ones(len(tensor))))
                repaired = _repair(inner, config, new, data)
            mask = new
            gates.set(mask)
        assert mask is not None
        if before_cut is not None:
            before_cut(inner)
        values = mask.map(lambda tensor: tensor.float())
        error = _cut_behind(inner, gates, values, mask, data)
    return _report(inner, config, goal, before, mask, counts, error, repaired, time.perf_counter() - started)


class StructuredPruning(SteppedMethod):
    """Prunes heads, neurons, sub-layers, layers or hidden dimensions of the model that is trained.

    Until :meth:`finish`, units that are gone are masked: their gates are 0, and (but for layers and hidden dimensions,
    which gates alone close) their weights and what the optimizer remembers of them are set to 0, so that neither
    momentum nor weight decay nor a gradient can bring them back. Hard thresholding, whose units are to come back, sets
    only what reads them to 0: what feeds them stays (weight decay alone reaches it), or a unit would come back without
    any gradient.

    Schedules advance by optimizer steps. Noise of hard-concrete gates is drawn for each micro-batch, from a generator
    of its own that depends on seed, step and micro-batch alone.

    Args:
        config: what is pruned, how much, and when.
        calibration: batches for scores and repair; default: rows of the training data.
        cost: a latency table, for a latency target.
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
        self._given = None if calibration is None else list(calibration)
        self._trainer: Any = None
        self._optimizer: Any = None
        self._events: list[Event] = []
        self._seconds = 0.0

    def prepare(self, trainer: Any) -> None:
        """Check that the target can be met, and put gates on the student.

        Args:
            trainer: the trainer; its ``student`` is the model without wrappers.

        Raises:
            LmcompressError: no shape meets the target, the model is quantized by another library, calibration rows that
                will be needed cannot be had or have no labels, or the best checkpoint is to be loaded at the end.
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
        if trainer.train_dataset is not None and _needs_batches(self.config):
            _refuse_unlabelled(student, self.config, self._calibration())
        trainer.add_callback(StepCallback(self))

    def attach(self, student: PreTrainedModel, device: torch.device) -> None:
        """What :meth:`prepare` does to the model, without a trainer.

        Args:
            student: the model, not wrapped.
            device: where it trains.

        Raises:
            LmcompressError: no shape meets the target, or the model is quantized by another library.
        """
        refuse_quantized(student)
        config = self.config
        self._student = student
        self._device = device
        self._sizes = ModelSizes.of(student)
        self._before, self._census = recorded_structure(student), census(student)
        self._goal = goal_of(config.target, self._sizes, self.cost)
        # before training, not after it
        self.planned = feasible(config, self._sizes, self.cost)
        shapes = unit_shapes(self._sizes.structure, self._sizes.hidden)
        self._layout = Layout.of(full(student, config.parts))
        self._heads, self._neurons = list(shapes["heads"]), list(shapes["neurons"])
        self._state = _State(self._layout.size, config).to(device)
        if isinstance(config.schedule, HardConcrete):
            costs = expected_costs(self._sizes, self._goal.counted).to(device)
            self._costs = costs
            everything = float(expected_cost(Units(), costs, self._heads, self._neurons))
            # the time outside the blocks
            self._elsewhere = self._goal.dense - everything
        self.gates = Gates(student, config.parts)
        self._set: _Set = "nothing"
        self._step = self._micro = self._done = 0
        self._penalty = float(self._state.penalty)
        self._learning = self._some_gone = False
        self._surviving: list[int] | None = None
        self._repaired: list[Repaired] = []
        self._fresh: Tensor | None = None
        self._last_removed: Tensor | float | None = None

    @property
    def folds(self) -> bool:
        """Whether gates end between 0 and 1, so that weights are multiplied by them in the end."""
        return isinstance(self.config.schedule, HardConcrete)

    # what the trainer calls in every step

    def before_forward(self, step: Step) -> None:
        """Give the gates their values for this micro-batch.

        Args:
            step: the step; which layers are left is put into its ``shared``, for distillation.
        """
        schedule = self.config.schedule
        if self._learning and isinstance(schedule, HardConcrete):
            noise = self._noise()
            self._put(self._layout.split(hard_concrete_sample(self._state.learned, noise)), "other")
        elif self._learning and isinstance(schedule, Movement):
            self._put(self._layout.split(threshold_mask(self._state.learned, self._threshold())), "other")
        elif self._collects:
            self._put_leaf(step)
        elif self._set in ("evaluation", "other") or (self._set == "nothing" and self._some_gone):
            self._put(self._now(), "mask")
        self._micro += 1
        if (survivors := self._surviving) is not None:
            step.shared["surviving_layers"] = survivors

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """The Lagrangian of hard-concrete gates, or the penalty of movement scores; nothing otherwise.

        Args:
            step: with the student's outputs.

        Returns:
            ``sparsity`` while gates or scores are learnt.
        """
        schedule = self.config.schedule
        if not self._learning:
            return {}
        rows = len(next(value for value in step.inputs.values() if isinstance(value, Tensor)))
        if isinstance(schedule, HardConcrete):
            opened = self._layout.split(hard_concrete_open(self._state.learned))
            blocks = expected_cost(opened, self._costs, self._heads, self._neurons)
            removed = 1 - (blocks + self._expected_elsewhere(opened)) / self._goal.dense
            self._last_removed = removed.detach()
            multipliers = self._state.multipliers
            penalty = lagrangian(removed, self._wanted(), multipliers[0], multipliers[1])
            # counted in examples, so that it is added once to a step, however many micro-batches that has
            return {"sparsity": Term(penalty * rows, "examples")}
        if isinstance(schedule, Movement):
            split = self._layout.split(self._state.learned)
            # one mean for each kind of unit: heads are few and neurons many
            means = [movement_penalty(torch.cat(split.tensors(part))) for part in split.parts()]
            strength = self._penalty * self._threshold() / schedule.threshold
            return {"sparsity": Term(torch.stack(means).mean() * rows, "examples", strength)}
        return {}

    def label_weight(self, progress: float) -> float:
        """Pruning leaves the loss on the labels as it is.

        Args:
            progress: share of the training done.

        Returns:
            1.
        """
        return 1.0

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Gates or scores, and multipliers, which ascend; with learning rates of their own and no weight decay."""
        schedule = self.config.schedule
        if isinstance(schedule, HardConcrete):
            return [
                {"params": [self._state.learned], "lr": schedule.learning_rate},
                {"params": [self._state.multipliers], "lr": schedule.multiplier_learning_rate, "maximize": True},
            ]
        if isinstance(schedule, Movement):
            return [{"params": [self._state.learned], "lr": schedule.learning_rate}]
        return []

    def modules(self) -> dict[str, nn.Module]:
        """Gates, scores, multipliers, masks and where the schedule is, for checkpoints."""
        return {"state": self._state}

    def set_active(self, active: bool) -> None:
        """Take noise and what collects gradients out of the gates while the model is evaluated.

        Args:
            active: whether the next forward passes train.
        """
        soft = (self._learning or self._collects) and not isinstance(self.config.schedule, GroupLasso)
        # once, not for each batch: nothing moves while the model is evaluated
        if not active and soft and self._set != "evaluation":
            self._put(self._now(), "evaluation")

    def settle(self) -> None:
        """Make the mask final and put it on the gates: what :meth:`finish` cuts is what the model computes from now on.

        Raises:
            LmcompressError: training has not begun.
        """
        if self.report is not None:
            return
        if self._trainer is not None and not self._events:
            raise LmcompressError("nothing was pruned: finish() must come after train()")
        self._finalise()
        self._put(self._layout.split(self._state.values.detach()), "mask")

    def finish(self) -> None:
        """Fold soft gates into the weights, cut, compare with the masked model, and say what was done.

        Raises:
            LmcompressError: nothing was pruned, or training has not begun.
            EquivalenceError: the cut model answers differently from the masked one.
        """
        if self.report is not None:
            return
        self.settle()
        started = time.perf_counter()
        values, mask = self._layout.split(self._state.values.detach()), self._mask()
        if bool(self._state.mask.all()):
            raise LmcompressError(
                f"nothing was pruned, but {self.config.target.kind}="
                f"{getattr(self.config.target, self.config.target.kind)} was asked for; please report this"
            )
        error = _cut_behind(self._student, self.gates, values, mask, self._given or [])
        seconds = self._seconds + time.perf_counter() - started
        self.report = _report(
            self._student, self.config, self._goal, self._before, mask, self._census, error, self._repaired, seconds
        )

    # what the callback calls

    def begin(self, max_steps: int, optimizer: Any) -> None:
        """Lay out the schedule; read a checkpoint's state, if one was loaded.

        Args:
            max_steps: optimizer steps of the run.
            optimizer: that trains the model.

        Raises:
            LmcompressError: too few steps for the schedule, or an optimizer that cannot ascend.
        """
        self._optimizer = optimizer
        schedule = self.config.schedule
        if isinstance(schedule, HardConcrete) and "maximize" not in inner_optimizer(optimizer).defaults:
            raise LmcompressError(
                "the optimizer must be able to ascend for the Lagrange multipliers, got "
                f"{type(inner_optimizer(optimizer)).__name__}, which has no 'maximize'; use optim='adamw_torch' or "
                "'sgd'"
            )
        self._events = plan(self.config, max_steps)
        self._first = round(schedule.begin * max_steps)
        # everything from here on is decided by what is in the state, so that a run that resumes decides alike
        self._read_state()

    def advance(self, step: int) -> None:
        """What is due before an optimizer step.

        Args:
            step: optimizer steps done.
        """
        self._step, self._micro = step, 0
        while self._done < len(self._events) and step >= self._events[self._done].step:
            self._happen(self._events[self._done])
            self._set_done(self._done + 1)
        self._learning = self._is_learning()
        if isinstance(self.config.schedule, _LEARNED) and self._learning:
            self._prepare_learning()

    def before_optimizer_step(self) -> None:
        """Add the gradients of this step to the running scores."""
        if self._fresh is None:
            return
        fresh, self._fresh = self._fresh, None
        if self._trainer is not None and self._trainer.args.world_size > 1:
            fresh = self._trainer.accelerator.reduce(fresh, reduction="sum")
        if (scaler := getattr(getattr(self._trainer, "accelerator", None), "scaler", None)) is not None:
            # float16: the scale changes on the way, and a step that overflows is skipped
            if not bool(fresh.isfinite().all()):
                return
            fresh = fresh / scaler.get_scale() ** (2 if self.config.criterion_name == "fisher" else 1)
        self._state.scores.mul_(self.config.score_memory).add_(fresh)
        self._state.seen.fill_(1)

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Clamp gates; shrink groups; keep what is gone at 0."""
        schedule = self.config.schedule
        if not self._learning:
            return
        if isinstance(schedule, HardConcrete):
            self._state.learned.clamp_(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)
        elif isinstance(schedule, GroupLasso):
            norms = self._norms()
            # groups that press on together also reach zero together: none is pressed while enough are there
            if schedule.steer and self._share_removed(self._of_norms(norms)) >= self._wanted():
                return
            rate = inner_optimizer(self._optimizer).param_groups[0]["lr"]
            parts = [part for part in _GROUPS if part in self.config.parts]
            shrink_(self._student, parts, rate * self._penalty, self._optimizer, norms=norms)

    def end(self, max_steps: int) -> None:
        """Make the mask final, if the run went to its end.

        Args:
            max_steps: optimizer steps of the run.
        """
        if self._step + 1 >= max_steps:
            self._finalise()

    def metrics(self) -> dict[str, float]:
        """Share of the cost that is gone and that was to be gone by now, for the log."""
        values = {"pruning_removed": self._removed_now(), "pruning_target": self._wanted_now()}
        if self._learning and isinstance(self.config.schedule, HardConcrete):
            first, second = self._state.multipliers.detach().tolist()
            values |= {"pruning_lambda_1": first, "pruning_lambda_2": second}
        elif self._learning and isinstance(self.config.schedule, (Movement, GroupLasso)):
            values["pruning_penalty"] = self._penalty
        return values

    # below: nobody else's business

    @property
    def _finished(self) -> bool:
        return bool(self._events) and self._done >= len(self._events)

    @property
    def _collects(self) -> bool:
        """Whether the gradients of this step's gates are wanted."""
        return self.config.scores == "training" and not self._finished

    def _is_learning(self) -> bool:
        return isinstance(self.config.schedule, _LEARNED) and self._step >= self._first and not self._finished

    def _read_state(self) -> None:
        self._done, self._penalty = int(self._state.done), float(self._state.penalty)
        self._some_gone = bool((self._state.values != 1).any())
        self._learning = self._is_learning()
        self._surviving = self._survivors(self._mask()) if self._some_gone else None

    def _set_done(self, events: int) -> None:
        # a number too, so that nobody waits for a GPU to read it
        self._done = events
        self._state.done.fill_(events)

    def _mask(self) -> Units:
        return self._layout.split(self._state.mask)

    def _put(self, values: Units, what: _Set) -> None:
        self.gates.set(values)
        self._set = what

    def _now(self) -> Units:
        """The values of the gates without noise, as evaluation sees them."""
        schedule, state = self.config.schedule, self._state
        with torch.no_grad():
            if self._learning and isinstance(schedule, HardConcrete):
                values = self._layout.split(hard_concrete_value(state.learned))
                opened = self._layout.split(hard_concrete_open(state.learned))
                return values.zip(opened, without_expected_zeros)
            if self._learning and isinstance(schedule, Movement):
                return self._layout.split(threshold_mask(state.learned, self._threshold()))
            return self._layout.split(state.values)

    def _noise(self) -> Tensor:
        rank = 0 if self._trainer is None else self._trainer.args.process_index
        seed = 0
        for number in (self.config.seed, self._step, self._micro, rank):
            seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
        return torch.rand(self._layout.size, generator=torch.Generator().manual_seed(seed)).to(self._device)

    def _put_leaf(self, step: Step) -> None:
        """Values of their own for each example, so that gradients are there example by example."""
        rows = len(next(value for value in step.student_inputs.values() if isinstance(value, Tensor)))
        leaf = self._state.values.detach().expand(rows, -1).clone().requires_grad_()
        sign = self.config.criterion_name

        def collect(gradient: Tensor) -> None:
            with torch.no_grad():
                wide = gradient.float()
                new = {"taylor_gates": wide.abs, "fisher": wide.square, "movement": wide.neg}[sign]().sum(0)
                self._fresh = new if self._fresh is None else self._fresh + new

        leaf.register_hook(collect)
        self.gates.set_for_scores(self._layout.split(leaf))
        self._set = "other"

    def _expected_elsewhere(self, opened: Units) -> Tensor | float:
        """Expected cost outside the blocks."""
        counted = self._goal.counted
        if not isinstance(counted, ParameterCost):
            return self._elsewhere
        # embeddings narrow with the stream
        if opened.hidden is None:
            return counted.outside(float(self._sizes.hidden))
        return counted.outside(opened.hidden.sum())

    def _threshold(self) -> float:
        schedule = self.config.schedule
        assert isinstance(schedule, Movement)
        return schedule.threshold * cubic(min(1.0, self._phase() / max(schedule.warmup, 1e-9)))

    def _phase(self) -> float:
        last = self._events[-1].step if self._events else self._first
        return phase_share(self._step, self._first, last)

    def _wanted(self) -> float:
        """Share to be gone by now, of learned masks."""
        schedule = self.config.schedule
        assert isinstance(schedule, _LEARNED)
        return self._goal.removed * linear(min(1.0, self._phase() / max(schedule.warmup, 1e-9)))

    def _wanted_now(self) -> float:
        if isinstance(self.config.schedule, _LEARNED):
            return self._wanted() if self._step >= self._first else 0.0
        past = self._events[: self._done]
        return self._goal.removed * (past[-1].share or 0.0) if past else 0.0

    def _removed_now(self) -> float:
        if self._learning and isinstance(self.config.schedule, HardConcrete):
            return 0.0 if self._last_removed is None else float(self._last_removed)
        return self._share_removed(self._closed())

    def _share_removed(self, mask: Units) -> float:
        return self._goal.share_removed(masked_structure(self._sizes.structure, mask))

    def _closed(self) -> Units:
        """The mask as it is now, learned ones included, on the CPU."""
        if self._learning and isinstance(self.config.schedule, GroupLasso):
            return self._of_norms(self._norms())
        if self._learning:
            mask = self._now().map(lambda values: values != 0)
        else:
            mask = self._mask()
        return _with_something(mask.map(lambda tensor: tensor.cpu()))

    def _of_norms(self, norms: Units) -> Units:
        """The mask of groups that are not 0, in one copy from the GPU."""
        return self._layout.split(self._layout.join(norms).cpu() > 0)

    def _open_blocks(self) -> Units:
        """A mask with one entry for all heads of a block and one for all its neurons, of gates that are learnt.

        All that has to be known in every step, in one copy from the GPU and without sorting thousands of gates.
        """
        learned = self._layout.split(self._state.learned.detach().cpu())
        if isinstance(self.config.schedule, Movement):
            threshold = self._threshold()
            mask = learned.map(lambda scores: torch.sigmoid(scores) > threshold)
        else:
            opened = learned.map(hard_concrete_open)
            outer = opened.updated(heads=None, neurons=None)
            mask = outer.zip(learned, lambda p, alpha: without_expected_zeros(hard_concrete_value(alpha), p) != 0)
            # of these, as many are closed as are expected to be
            inner = Units(heads=opened.heads, neurons=opened.neurons)
            some = inner.map(lambda p: torch.tensor([round(len(p) - float(p.double().sum())) < len(p)]))
            mask = mask.updated(heads=some.heads, neurons=some.neurons)
        return _with_something(mask)

    def _norms(self) -> Units:
        parts = [part for part in _GROUPS if part in self.config.parts]
        return unit_norms(self._student, parts)

    def _prepare_learning(self) -> None:
        if self._step % STEER_EVERY == 0 and getattr(self.config.schedule, "steer", False):
            # a factor, so that no scale has to be guessed; bounded, so that it cannot run away between two looks
            gap = (self._wanted() - self._removed_now()) / self._goal.removed
            self._state.penalty.mul_(math.exp(STEER_RATE * max(-1.0, min(1.0, 5 * gap))))
            self._penalty = float(self._state.penalty)
        schedule = self.config.schedule
        for group in inner_optimizer(self._optimizer).param_groups:
            # constant: with the model's schedule they would stand still when the target is reached
            if any(parameter is self._state.learned for parameter in group["params"]):
                group["lr"] = getattr(schedule, "learning_rate")  # noqa: B009
            elif any(parameter is self._state.multipliers for parameter in group["params"]):
                group["lr"] = getattr(schedule, "multiplier_learning_rate")  # noqa: B009
        if {"layers", "attention", "ffn"} & set(self.config.parts):
            self._surviving = self._survivors(self._open_blocks())

    def _happen(self, event: Event) -> None:
        started = time.perf_counter()
        if event.share is None:
            self._state.mask.fill_(True)
            self._state.values.fill_(1.0)
            self._mask_changed()
        elif event.final:
            self._choose_final()
        else:
            target = partial_target(self.config.target, event.share, self._sizes, self._goal)
            if target is not None:
                with undisturbed(self._student):
                    mask = choose(self.config, self._scores(), self._sizes, target, cost=self.cost, gone=self._mask())
                self._take(mask, mask.map(lambda tensor: tensor.float()), final=False)
        self._seconds += time.perf_counter() - started

    def _finalise(self) -> None:
        if not self._finished:
            last = Event(self._step, 1.0, final=True)
            self._happen(last)
            self._events = self._events or [last]
            self._set_done(len(self._events))
            self._learning = False

    def _choose_final(self) -> None:
        config, schedule = self.config, self.config.schedule
        # those that pruned before must not let anything come back; those that learn have no mask yet
        gone = None if isinstance(schedule, (HardThresholding, *_LEARNED)) else self._mask()
        with undisturbed(self._student):
            scores = self._scores()
            mask = choose(
                config, scores, self._sizes, config.target,
                cost=self.cost, gone=gone, per_cost=not isinstance(schedule, _LEARNED),
            )  # fmt: skip
            if isinstance(schedule, GroupLasso) and config.multiple_of == 1 and config.target.shape is None:
                mask = _without_dead(mask, self._of_norms(self._norms()), config)
            values = mask.map(lambda tensor: tensor.float())
            if isinstance(schedule, HardConcrete):
                soft = self._layout.split(hard_concrete_value(self._state.learned.detach())).map(Tensor.cpu)
                values = values.zip(soft, torch.mul)
                if mask.layers is not None:
                    # half a block has no weights to be folded into
                    values = values.updated(layers=mask.layers.float())
            elif config.repair != "none":
                # what stays is seen open, and no batch finds values that were made for the rows of another
                now = self._now().zip(mask, lambda value, kept: torch.maximum(value, kept.to(value)))
                self._put(now, "other")
                self._repaired = _repair(self._student, config, mask, self._calibration())
        self._take(mask, values, final=True)

    def _scores(self) -> Units:
        config, schedule, state = self.config, self.config.schedule, self._state
        if isinstance(schedule, HardConcrete):
            return along_chains(self._layout.split(hard_concrete_open(state.learned.detach())))
        if isinstance(schedule, Movement):
            return along_chains(self._layout.split(torch.sigmoid(state.learned.detach())))
        if isinstance(schedule, GroupLasso):
            return self._norms().zip(_group_sizes(self._student, self._norms()), torch.div)
        if isinstance(schedule, HardThresholding):
            # what is thresholded is what reads a unit: it alone restarts from 0
            parts = [part for part in _GROUPS if part in config.parts]
            return unit_norms(self._student, parts, _READS)
        if config.scores == "training":
            if not bool(state.seen):
                raise LmcompressError(
                    "scores: training saw no step before the first pruning; let the schedule begin later"
                )
            return self._layout.split(state.scores)
        return _calibrated(self._student, config, self._calibration())

    def _calibration(self) -> list[Batch]:
        if self._given is None:
            config = self.config
            self._given = calibration_rows(
                self._trainer, config.calibration_rows, config.calibration_batch_size, config.seed
            )
        return [_on_device(batch, self._device) for batch in self._given]

    def _take(self, mask: Units, values: Units, *, final: bool) -> None:
        with torch.no_grad():
            self._state.mask.copy_(self._layout.join(mask))
            self._state.values.copy_(self._layout.join(values))
        sides: tuple[Side, ...] = ("in", "out")
        if isinstance(self.config.schedule, HardThresholding) and not final:
            sides = _READS
        silence_(self._student, mask, sides, self._optimizer)
        self._mask_changed()

    def _mask_changed(self) -> None:
        self._some_gone = True
        self._put(self._layout.split(self._state.values), "mask")
        self._surviving = self._survivors(self._mask())

    def _survivors(self, mask: Units) -> list[int]:
        """Numbers, from 1, of the blocks that still compute something."""
        structure = self._sizes.structure
        kept = []
        for index, _ in enumerate(structure.blocks):
            one = [part[0][index] for part in (mask.tensors("layers"),) if part]
            attention = _alive(mask, "attention", "heads", index)
            ffn = _alive(mask, "ffn", "neurons", index)
            if all(bool(gate) for gate in one) and (attention or ffn):
                kept.append(index + 1)
        return kept


class _State(nn.Module):
    """What a checkpoint needs to go on: everything that decides what is masked, and how far the schedule is."""

    mask: Tensor
    values: Tensor
    scores: Tensor
    penalty: Tensor
    done: Tensor
    seen: Tensor

    def __init__(self, size: int, config: PruningConfig) -> None:
        super().__init__()
        schedule = config.schedule
        self.register_buffer("mask", torch.ones(size, dtype=torch.bool))
        self.register_buffer("values", torch.ones(size))
        self.register_buffer("scores", torch.zeros(size))
        self.register_buffer("penalty", torch.tensor(float(getattr(schedule, "penalty", 0.0))))
        self.register_buffer("done", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        start = initial_log_alpha(schedule.drop) if isinstance(schedule, HardConcrete) else 0.0
        self.learned = nn.Parameter(torch.full((size,), start))
        self.multipliers = nn.Parameter(torch.zeros(2))


def plan(config: PruningConfig, max_steps: int) -> list[Event]:
    """What happens when, in a run of so many optimizer steps.

    Args:
        config: its schedule.
        max_steps: optimizer steps of the run.

    Returns:
        Events in order; the last is final.

    Raises:
        LmcompressError: too few steps for the rounds or cycles.
    """
    schedule = config.schedule
    if isinstance(schedule, (OneShot, Iterative, Gradual, HardThresholding)):
        return events(schedule, max_steps)
    begin, end = round(schedule.begin * max_steps), round(schedule.end * max_steps)
    if end - begin < 1:
        raise LmcompressError(
            f"the schedule {schedule.kind} must have optimizer steps between begin and end, got {end - begin} of "
            f"{max_steps}: train longer, or let the phase take a larger share"
        )
    return [Event(end, 1.0, final=True)]


def _calibrated(
    model: PreTrainedModel, config: PruningConfig, batches: Sequence[Batch], *, progress: bool = False
) -> Units:
    criterion = config.chosen_criterion
    return score(model, criterion, config.parts, batches, labels=config.labels, seed=config.seed, progress=progress)


def _repair(model: PreTrainedModel, config: PruningConfig, mask: Units, batches: Sequence[Batch]) -> list[Repaired]:
    if config.repair == "none" or not _leaves_gaps(mask):
        return []
    if not batches:
        raise LmcompressError(f"repair: {config.repair} needs calibration batches, got none; pass batches=")
    repairs = {
        "bias": compensate_bias, "least_squares": least_squares, "least_squares_in_order": least_squares_in_order
    }  # fmt: skip
    return repairs[config.repair](model, mask, batches)


def _cut_behind(model: PreTrainedModel, gates: Gates, values: Units, mask: Units, batches: Sequence[Batch]) -> float:
    """Cut a gated model, and compare it with what it was.

    Args:
        model: changed in place.
        gates: with ``values`` set; taken away.
        values: of the gates.
        mask: what stays.
        batches: to compare on; random ones if there are none.

    Returns:
        The relative error.

    Raises:
        EquivalenceError: it is greater than allowed.
    """
    probes = list(batches[:2]) or random_batches(model)
    reference = outputs_of(model, probes)
    gates.remove()
    fold(model, values)
    cut(model, mask)
    after = outputs_of(model, probes)
    # hidden states of a base model lose the dimensions that are gone
    if mask.hidden is not None and reference[0].shape != after[0].shape:
        reference = [output[..., mask.hidden.cpu()] for output in reference]
    error = float(torch.stack([(a - b).abs().max() for a, b in zip(after, reference, strict=True)]).max())
    scale = float(torch.stack([b.abs().max() for b in reference]).max())
    relative = error / scale if scale > 0 else error
    allowed = TOLERANCE if model.dtype == torch.float32 else 0.05
    # written this way round so that NaN fails
    if not relative <= allowed:
        raise EquivalenceError(
            f"the cut model differs from the masked one by {error:.3g} ({relative:.3g} relative, allowed "
            f"{allowed:.3g}). If the model answers NaN, training diverged; otherwise please report this with the "
            "configuration"
        )
    return relative


def _report(
    model: PreTrainedModel,
    config: PruningConfig,
    goal: Goal,
    before: Structure,
    mask: Units,
    counts: dict[str, Any],
    error: float,
    repaired: Sequence[Repaired],
    seconds: float,
) -> PruningReport:
    after = recorded_structure(model)
    verdict = stock_verdict(after, model.config)
    covered = coverage(counts, census(model))
    if covered["unchanged"]:
        raise LmcompressError("nothing was pruned, though a mask said so; please report this with the configuration")
    dumped = config.model_dump(mode="json", exclude_none=True)
    return PruningReport(
        before=before,
        after=after,
        coverage=covered,
        target=dumped["target"],
        unit=goal.counted.unit,
        removed=goal.share_removed(after),
        asked=goal.removed,
        method={k: v for k, v in dumped.items() if k != "target"},
        masked_error=error,
        repaired=[dict(vars(one)) for one in repaired],
        stock={
            "loads": verdict.loads,
            "reason": verdict.reason,
            "nearest": verdict.nearest.model_dump(mode="json", exclude_none=True),
        },
        seconds=seconds,
        kept_heads=_kept_heads(before, mask),
    )


def _kept_heads(before: Structure, mask: Units) -> list[list[int]]:
    """Of each block before, the numbers of the heads that are left."""
    kept = []
    for index, block in enumerate(before.blocks):
        outer = [gate[0][index] for gate in (mask.tensors("layers"), mask.tensors("attention")) if gate]
        heads = mask.heads[index] if mask.heads is not None else torch.ones(block.heads, dtype=torch.bool)
        kept.append(heads.nonzero().flatten().tolist() if all(bool(gate) for gate in outer) else [])
    return kept


def _on_device(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}


def _group_sizes(model: PreTrainedModel, norms: Units) -> Units:
    """Roots of the number of weights of each group, of the shape of ``norms``: the group lasso's scale."""
    blocks = anatomy_of(model).blocks

    def root(part: GroupPart, index: int, tensor: Tensor) -> Tensor:
        views = unit_views(blocks[index], part) if len(tensor) else []
        return torch.full_like(tensor, max(1, sum(view[0].numel() for view in views)) ** 0.5)

    found: dict[str, Any] = {}
    for part in _GROUPS:
        if tensors := norms.tensors(part):
            found[part] = tuple(root(part, i, tensor) for i, tensor in enumerate(tensors))
    return Units(**found)


def _without_dead(mask: Units, alive: Units, config: PruningConfig) -> Units:
    """A mask without groups that are exactly 0, but where a block would have fewer than must stay."""
    changed: dict[str, Any] = {}
    for part in mask.parts():
        least = max(1, config.keep_at_least.get(part, KEEP_AT_LEAST[part]))
        pairs = zip(mask.tensors(part), alive.tensors(part), strict=True)
        changed[part] = tuple(kept & lives if int((kept & lives).sum()) >= least else kept for kept, lives in pairs)
    return mask.updated(**changed)


def _needs_batches(config: PruningConfig) -> bool:
    """Whether scores or repair look at calibration data."""
    own = isinstance(config.schedule, (HardThresholding, *_LEARNED))
    scored = not own and config.scores == "calibration"
    weights_alone = config.chosen_criterion.needs in ("nothing", "weights")
    return config.repair != "none" or (scored and not weights_alone)


def _refuse_unlabelled(model: PreTrainedModel, config: PruningConfig, batches: Sequence[Batch]) -> None:
    own = isinstance(config.schedule, (HardThresholding, *_LEARNED))
    if own or config.scores == "training" or config.chosen_criterion.needs not in ("gates", "products"):
        return
    if config.labels == "given" and anatomy_of(model).head is None and any("labels" not in batch for batch in batches):
        raise LmcompressError(
            f"the criterion {config.criterion_name} must have labels, the calibration rows have none; add a column "
            "'labels', or let the model answer for itself with labels: self"
        )


def _with_something(mask: Units) -> Units:
    """A mask that keeps the first layer and hidden dimension where noise had closed all: shapes must have some."""
    changed = {}
    for part in ("layers", "hidden"):
        tensors = mask.tensors(part)
        if tensors and not bool(tensors[0].any()):
            one = tensors[0].clone()
            one[0] = True
            changed[part] = one
    return mask.updated(**changed)


def _leaves_gaps(mask: Units) -> bool:
    """Whether a sub-layer that stays loses heads or neurons."""
    layers = mask.tensors("layers")
    for units, sublayer in (
        (mask.tensors("heads"), mask.tensors("attention")),
        (mask.tensors("neurons"), mask.tensors("ffn")),
    ):
        for index, kept in enumerate(units):
            outer = [gate[0][index] for gate in (layers, sublayer) if gate]
            if all(bool(gate) for gate in outer) and not bool(kept.all()):
                return True
    return False


def _alive(mask: Units, sublayer: Literal["attention", "ffn"], units: GroupPart, index: int) -> bool:
    gate, inner = mask.tensors(sublayer), mask.tensors(units)
    return (not gate or bool(gate[0][index])) and (not inner or bool(inner[index].any()))
