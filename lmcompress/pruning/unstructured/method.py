"""Sparsity as a method of the trainer, and without training as a function."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lmcompress.errors import LmcompressError
from lmcompress.method import StepCallback, SteppedMethod, calibration_rows, inner_optimizer, undisturbed
from lmcompress.model import CompressedModel
from lmcompress.pruning.unstructured.compensation import choosing, compensate, given, in_order
from lmcompress.pruning.unstructured.config import SparsityConfig, Surgery
from lmcompress.pruning.unstructured.criteria import CRITERIA, quality_threshold, splice, surgery_threshold
from lmcompress.pruning.unstructured.masking import keep_where
from lmcompress.pruning.unstructured.patterns import Blocks
from lmcompress.pruning.unstructured.planning import Planned, choose, plan, pools
from lmcompress.pruning.unstructured.report import SparseMatrix, SparsityReport
from lmcompress.pruning.unstructured.scoring import score
from lmcompress.pruning.unstructured.state import SparsityState
from lmcompress.schedules import RAMPS, Event, Iterative, events, phase_share

Batch = Mapping[str, Tensor]


class Sparsity(SteppedMethod):
    """Makes single weights of the model zero while it is trained.

    The model remains an ordinary one: what is gone is 0 in the parameter itself, whoever looks at it. A weight that is
    gone for good has no gradient, and the optimizer forgets what it knew of it.

    With ``train_removed`` (surgery, movement) weights go on behind the mask: before an optimizer step the parameter
    gets the values that are hidden, and after it they are hidden again. The gradient is that of the loss at the masked
    weights, for all of them, which is what surgery's paper asks for, and no module has to know of it.

    Schedules advance by optimizer steps. When surgery looks at the mask is drawn from seed and step alone.

    Put it before structured pruning in the list of methods: both masks hold while the model is trained, and what is cut
    in the end is sparse. With quantization, zeros are on every grid that has a zero.

    Args:
        config: which weights go, how many, and when.
        calibration: batches for scores that need data; default: rows of the training data.

    Attributes:
        report: what was done; after :meth:`finish`.
    """

    name = "sparsity"
    changes_values = True

    def __init__(self, config: SparsityConfig, *, calibration: Sequence[Batch] | None = None) -> None:
        self.config = config
        self.report: SparsityReport | None = None
        self._given = None if calibration is None else list(calibration)
        self._trainer: Any = None
        self._optimizer: Any = None
        self._events: list[Event] = []
        self._rows: list[SparseMatrix] | None = None
        self._seconds = 0.0

    def prepare(self, trainer: Any) -> None:
        """Check what is asked for, and hook the weights.

        Args:
            trainer: the trainer; its ``student`` is the model without wrappers.

        Raises:
            LmcompressError: what :func:`~lmcompress.pruning.unstructured.planning.plan` refuses, calibration rows that
                will be needed cannot be had, or the best checkpoint is to be loaded at the end.
        """
        if trainer.args.load_best_model_at_end:
            raise LmcompressError(
                "load_best_model_at_end must be false with sparsity: an earlier checkpoint has fewer zeros than the "
                "last. Compare checkpoints after the run, or train for fewer steps"
            )
        self._trainer = trainer
        self.attach(trainer.student)
        if self.config.needs_data and trainer.train_dataset is not None:
            # before training, not at its first pruning
            self._calibration()
        trainer.add_callback(StepCallback(self))

    def attach(self, model: nn.Module) -> None:
        """What :meth:`prepare` does to the model, without a trainer.

        Args:
            model: not wrapped.

        Raises:
            LmcompressError: as :func:`~lmcompress.pruning.unstructured.planning.plan`.
        """
        self._student = model
        self.planned, self._untouched = plan(model, self.config)
        self._state = SparsityState(self.planned, self.config)
        self._zeros_before = [int((one.weight == 0).sum()) for one in self.planned]
        self._step = self._done = 0
        # whether a weight is gone for now, and whether those that are gone are trained
        self._some_gone = self.config.keep_zeros and any(self._zeros_before)
        self._tracks = self.config.removed_is_trained
        self._handles: list[RemovableHandle] = [
            one.weight.register_hook(self._masking(mask))
            for one, mask in zip(self.planned, self._state.masks(), strict=True)
            if one.weight.requires_grad
        ]

    # what the trainer calls in every step

    def modules(self) -> dict[str, nn.Module]:
        """Masks, hidden weights, scores and where the schedule is, for checkpoints."""
        return {"state": self._state}

    def settle(self) -> None:
        """Make the mask final and the zeros permanent; the weights are ordinary ones from then on.

        Raises:
            LmcompressError: training has not begun.
        """
        if self._rows is not None:
            return
        if self._trainer is not None and not self._events:
            raise LmcompressError("nothing was removed: finish() must come after train()")
        self._finalise()
        self._release()
        self._rows = [
            SparseMatrix(one.path, one.at.part, one.weight.numel(), int((one.weight == 0).sum()), before)
            for one, before in zip(self.planned, self._zeros_before, strict=True)
        ]

    def finish(self) -> None:
        """Make the zeros permanent, if :meth:`settle` has not, and say what was done.

        Raises:
            LmcompressError: training has not begun.
        """
        if self.report is None:
            self.settle()
            self.report = self._reported(trained=True)

    # what the callback calls

    def begin(self, max_steps: int, optimizer: Any) -> None:
        """Lay out the schedule; read a checkpoint's state, if one was loaded.

        Args:
            max_steps: optimizer steps of the run.
            optimizer: that trains the model.

        Raises:
            LmcompressError: too few steps for the schedule, or scores of training that would see none.
        """
        self._optimizer = optimizer
        self._events = sparsity_events(self.config, max_steps)
        # everything from here on is decided by what is in the state, so that a run that resumes decides alike
        self._done = int(self._state.done)
        self._some_gone = any(not bool(mask.all()) for mask in self._state.masks())
        self._tracks = self.config.removed_is_trained and not self._finished

    def advance(self, step: int) -> None:
        """What is due before an optimizer step.

        Args:
            step: optimizer steps done.
        """
        self._step = step
        while self._done < len(self._events) and step >= self._events[self._done].step:
            self._happen(self._events[self._done])
            self._set_done(self._done + 1)

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Let the optimizer see the weights behind the mask, and add to running scores."""
        if self._finished:
            return
        if self._tracks:
            self._uncover()
        if self.config.criterion == "movement":
            self._collect()

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Keep what is gone at 0; with surgery, cut and splice."""
        if self._tracks and not self._finished:
            for one, hidden in zip(self.planned, self._state.hidden(), strict=True):
                hidden.copy_(one.weight)
            if self._looks():
                self._operate()
        self._mask_weights()

    def end(self, max_steps: int) -> None:
        """Make the mask final, if the run went to its end.

        Args:
            max_steps: optimizer steps of the run.
        """
        if self._step + 1 >= max_steps:
            self._finalise()

    def metrics(self) -> dict[str, float]:
        """Share of the weights that is gone, for the log."""
        masks = self._state.masks()
        # one copy from the GPU
        gone = torch.stack([(~mask).sum() for mask in masks]).sum()
        return {"sparsity": float(gone) / max(1, sum(mask.numel() for mask in masks))}

    # below: nobody else's business

    @property
    def _finished(self) -> bool:
        return bool(self._events) and self._done >= len(self._events)

    def _set_done(self, count: int) -> None:
        # a number too, so that nobody waits for a GPU to read it
        self._done = count
        self._state.done.fill_(count)

    def _masking(self, mask: Tensor) -> Callable[[Tensor], Tensor | None]:
        # not after the backward pass: clipping would count the gradients of what is gone
        def hook(gradient: Tensor) -> Tensor | None:
            return gradient * mask if self._some_gone and not self._tracks else None

        return hook

    @torch.no_grad()
    def _mask_weights(self) -> None:
        if self._some_gone:
            for one, mask in zip(self.planned, self._state.masks(), strict=True):
                keep_where(one.weight, mask)

    def _uncover(self) -> None:
        """Give the weights that are masked the values that they have behind the mask."""
        for one, mask, hidden in zip(self.planned, self._state.masks(), self._state.hidden(), strict=True):
            # what is not masked may have been changed by others
            keep_where(one.weight, mask, hidden)

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _collect(self) -> None:
        scaler = getattr(getattr(self._trainer, "accelerator", None), "scaler", None)
        for one, scores in zip(self.planned, self._state.scores(), strict=True):
            gradient = one.weight.grad
            # float16: a step that overflows is skipped
            if gradient is not None and (scaler is None or bool(gradient.isfinite().all())):
                # movement(), without a matrix in between
                scores.addcmul_(one.weight, gradient, value=-1)
        self._state.seen.fill_(1)

    def _happen(self, event: Event) -> None:
        started = time.perf_counter()
        if event.share is None:
            for mask, may_stay in zip(self._state.masks(), self._may_stay(), strict=True):
                mask.copy_(may_stay)
            self._some_gone = self.config.keep_zeros
        elif event.share == 0:
            self._fix_thresholds()
        else:
            self._take(event.share)
        if event.final and self._tracks:
            self._tracks = False
            self._forget()
        self._seconds += time.perf_counter() - started

    def _finalise(self) -> None:
        if not self._finished:
            last = Event(self._step, 1.0, final=True)
            self._happen(last)
            self._events = self._events or [last]
            self._set_done(len(self._events))

    @torch.no_grad()
    def _take(self, share: float) -> None:
        """Remove what is due, and let the optimizer forget it."""
        if self._tracks:
            self._uncover()
        if self.config.compensation:
            self._compensate(share)
        else:
            masks = self._masks(share)
            for one, mask, new in zip(self.planned, self._state.masks(), masks, strict=True):
                mask.copy_(one.stored(new))
        self._some_gone = True
        self._mask_weights()
        if not self._tracks:
            self._forget()

    def _masks(self, share: float) -> list[Tensor]:
        """Masks ``(out, in)`` at a share of the way to the target, of weights that are not covered."""
        config, planned = self.config, self.planned
        if config.criterion == "movement" and bool(self._state.seen):
            scores = [one.matrix(scores) for one, scores in zip(planned, self._state.scores(), strict=True)]
        else:
            with undisturbed(self._student):
                data = self._calibration() if CRITERIA[config.criterion].needs not in ("weights", "nothing") else None
                scores = score(self._student, planned, config.criterion, data, seed=config.seed)
        may_stay = [one.matrix(kept) for one, kept in zip(planned, self._may_stay(), strict=True)]
        # of blocks the others in it count
        least = 0.0 if isinstance(config.pattern, Blocks) else -math.inf
        ranked = [one.masked_fill(~kept, least) for one, kept in zip(scores, may_stay, strict=True)]
        masks = [mask & kept for mask, kept in zip(choose(planned, config, ranked, share), may_stay, strict=True)]
        for number, one in enumerate(planned):
            if one.quality is None:
                continue
            if isinstance(config.schedule, Surgery):
                masks[number] = one.matrix(self._state.masks()[number])
            else:
                threshold = quality_threshold(one.weight.detach(), one.quality * share)
                masks[number] &= scores[number] >= threshold
        return masks

    def _may_stay(self) -> list[Tensor]:
        """Of each matrix the weights that no earlier event, and no stage before, has taken for ever; as stored."""
        if not self._tracks and self.config.schedule.kind != "iht":
            return [mask.clone() for mask in self._state.masks()]
        return self._state.kept() if self.config.keep_zeros else [torch.ones_like(m) for m in self._state.masks()]

    def _compensate(self, share: float) -> None:
        config = self.config
        by_criterion: dict[str, Tensor] = {}
        before = dict(zip((one.path for one in self.planned), self._may_stay(), strict=True))
        if config.criterion != "sparsegpt":
            by_criterion = dict(zip((one.path for one in self.planned), self._masks(share), strict=True))
        masks = dict(zip((one.path for one in self.planned), self._state.masks(), strict=True))

        def settle(one: Planned, hessian: Tensor | None) -> None:
            old, weight = one.matrix(before[one.path]), one.matrix(one.weight.detach())
            if hessian is None or not bool((hessian.diagonal() > 0).any()):
                # nothing reaches it, or each row is read by itself
                mask = by_criterion.get(one.path)
                mask = choose([one], config, [weight.float().abs()], share)[0] if mask is None else mask
                masks[one.path].copy_(one.stored(mask & old))
                return
            if config.criterion == "sparsegpt":
                choice, size = choosing((one.sparsity or 0.0) * share, config.pattern, old)
            else:
                choice, size = given(by_criterion[one.path] & old), 128
            try:
                values, mask = compensate(
                    weight, hessian.to(weight.device), choice, damping=config.damping, block_size=size
                )
            except LmcompressError as error:
                raise LmcompressError(f"{one.path}: {error}") from error
            masks[one.path].copy_(one.stored(mask))
            one.weight.copy_(one.stored(values))

        with undisturbed(self._student):
            in_order(self._student, self.planned, self._calibration(), settle)

    def _fix_thresholds(self) -> None:
        for number, one in enumerate(self.planned):
            if one.quality is not None:
                self._state.thresholds[number] = surgery_threshold(one.weight.detach(), one.quality)

    def _looks(self) -> bool:
        """Whether surgery looks at the mask after this step."""
        schedule = self.config.schedule
        if not isinstance(schedule, Surgery) or not self._done:
            return False
        steps = self._step - self._events[0].step
        if steps % schedule.every:
            return False
        chance = (1 + schedule.gamma * steps) ** -schedule.power
        seed = (self.config.seed * 6364136223846793005 + self._step + 1442695040888963407) % 2**63
        return float(torch.rand((), generator=torch.Generator().manual_seed(seed))) < chance

    def _operate(self) -> None:
        """One look of surgery: cut below the lower threshold, splice above the upper one."""
        schedule = self.config.schedule
        assert isinstance(schedule, Surgery)
        thresholds = self._thresholds()
        tensors = zip(self._state.masks(), self._state.hidden(), self._may_stay(), thresholds, strict=True)
        for mask, hidden, may_stay, threshold in tensors:
            new = splice(mask, hidden, (1 - schedule.margin) * threshold, (1 + schedule.margin) * threshold)
            mask.copy_(new & may_stay)
        self._some_gone = True

    def _thresholds(self) -> list[Tensor]:
        """Of each matrix: what it was when surgery began, or what as many weights lie below as are to be gone."""
        schedule = self.config.schedule
        assert isinstance(schedule, Surgery)
        found = list(self._state.thresholds.unbind())
        begin, end = self._events[0].step, self._events[-1].step
        ramp = RAMPS[schedule.ramp] if schedule.ramp else None
        way = 1.0 if ramp is None else ramp(phase_share(self._step, begin, end))
        for numbers in pools(self.planned):
            sparsity = self.planned[numbers[0]].sparsity
            if sparsity is None:
                continue
            sizes = torch.cat([self._state.hidden()[number].reshape(-1).abs().float() for number in numbers])
            below = round(sparsity * way * len(sizes))
            value = sizes.kthvalue(below).values if below else sizes.new_zeros(())
            for number in numbers:
                found[number] = value
        return found

    def _forget(self) -> None:
        """What the optimizer knows of weights that are gone."""
        if self._optimizer is None:
            return
        states = inner_optimizer(self._optimizer).state
        for one, mask in zip(self.planned, self._state.masks(), strict=True):
            for moment in states.get(one.weight, {}).values():
                if isinstance(moment, Tensor) and moment.shape == mask.shape:
                    moment.mul_(mask)

    def _calibration(self) -> list[Batch]:
        if self._given is None:
            config = self.config
            if self._trainer is None:
                raise LmcompressError(f"the criterion {config.criterion} must have data, got none; pass batches")
            self._given = calibration_rows(
                self._trainer, config.calibration_rows, config.calibration_batch_size, config.seed
            )
        return self._given

    def _reported(self, *, trained: bool) -> SparsityReport:
        config = self.config.model_dump(mode="json", exclude_none=True)
        return SparsityReport(config, list(self._rows or ()), dict(self._untouched), trained, self._seconds)


def prune_weights(
    model: nn.Module | CompressedModel, config: SparsityConfig, batches: Iterable[Batch] | None = None
) -> SparsityReport:
    """Make single weights zero without training: the schedules one_shot and iterative.

    With ``iterative``, each round is scored with what is gone already at 0.

    Args:
        model: a ``PreTrainedModel`` or any other module; its weights are changed in place.
        config: which weights go, and how many; shares of training in its schedule do not matter here.
        batches: what the model is called with, for criteria and compensation that need data; with labels for
            gradients.

    Returns:
        What was done.

    Raises:
        LmcompressError: the schedule needs training, data are missing, or what
            :func:`~lmcompress.pruning.unstructured.planning.plan` refuses; the model is as it was then.
    """
    inner = model.model if isinstance(model, CompressedModel) else model
    if config.trains:
        raise LmcompressError(
            f"the schedule {config.schedule.kind} needs training: use SparsityTrainer, or choose one_shot or iterative"
        )
    method = Sparsity(config, calibration=None if batches is None else list(batches))
    method.attach(inner)
    # nothing is trained here
    method._tracks = False
    rounds = config.schedule.rounds if isinstance(config.schedule, Iterative) else 1
    kept = [one.weight.detach().clone() for one in method.planned]
    try:
        for number in range(1, rounds + 1):
            method._happen(Event(0, number / rounds, final=number == rounds))
    except BaseException:
        with torch.no_grad():
            for one, values in zip(method.planned, kept, strict=True):
                one.weight.copy_(values)
        raise
    finally:
        method._release()
    method._events, method._done = [Event(0, 1.0, final=True)], 1
    method.settle()
    return method._reported(trained=False)


def sparsity_events(config: SparsityConfig, max_steps: int) -> list[Event]:
    """What happens when: as for other schedules; of surgery its beginning, and its end.

    Args:
        config: with a schedule.
        max_steps: optimizer steps of the run.

    Returns:
        In order of time.

    Raises:
        LmcompressError: too few steps for the schedule, or scores of training that would see none.
    """
    schedule = config.schedule
    if not isinstance(schedule, Surgery):
        found = events(schedule, max_steps)
        if config.criterion == "movement" and next(event for event in found if event.share).step == 0:
            raise LmcompressError(
                "the criterion movement must see some steps before weights go, got a schedule that begins with the "
                "first; let it begin later, such as begin: 0.1"
            )
        return found
    begin, end = round(schedule.begin * max_steps), round(schedule.end * max_steps)
    if end <= begin:
        raise LmcompressError(
            f"surgery must have optimizer steps between begin and end, got {end - begin} of {max_steps}: train longer, "
            "or let the phase take a larger share"
        )
    return [Event(begin, 0.0), Event(end, 1.0, final=True)]
