"""Unstructured pruning as a method of the trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lmcompress.activations.batches import as_batches, batches_for
from lmcompress.errors import LmcompressError
from lmcompress.method import SteppedMethod, calibration_rows, inner_optimizer, undisturbed
from lmcompress.pruning.saved import saved
from lmcompress.pruning.unstructured.compensation import compensated, in_order
from lmcompress.pruning.unstructured.config import SparsityConfig, Surgery
from lmcompress.pruning.unstructured.criteria import quality_threshold
from lmcompress.pruning.unstructured.masking import keep_where
from lmcompress.pruning.unstructured.patterns import Blocks
from lmcompress.pruning.unstructured.planning import Planned, choose, plan
from lmcompress.pruning.unstructured.report import SparseMatrix, SparsityReport
from lmcompress.pruning.unstructured.scoring import score
from lmcompress.pruning.unstructured.state import SparsityState
from lmcompress.pruning.unstructured.surgery import Splicing
from lmcompress.schedules import Event

Batch = Mapping[str, Tensor]

_ALL_EVENTS = 1 << 30


class Sparsity(SteppedMethod):
    """Sets single weights of the model to zero while it is trained.

    The model remains an ordinary one: a pruned weight is 0 in the parameter itself. A permanently pruned one has no
    gradient, and its moments in the optimizer are 0.

    With ``train_removed`` (surgery, movement) weights continue behind the mask: before an optimizer step the parameter
    gets the hidden values, and after it they are hidden again. The gradient is that of the loss at the masked
    weights, for all of them, as in surgery's paper, and modules need no changes.

    Schedules advance by optimizer steps.

    Put it before structured pruning in the list of methods: both masks apply while the model is trained, and the
    model is sparse once cut. With quantization, zeros are on every grid that has a zero.

    Args:
        config: the share, the criterion and the schedule.
        calibration: batches for scores that need data; default: rows of the training data.

    Attributes:
        report: the result; set by :meth:`finish`.
    """

    name = "sparsity"
    goes_on = True
    changes_values = True

    def __init__(self, config: SparsityConfig, *, calibration: Sequence[Batch] | None = None) -> None:
        self.config = config
        self.report: SparsityReport | None = None
        self._handles: list[RemovableHandle] = []
        self._given = None if calibration is None else as_batches(calibration)
        self._trainer: Any = None
        self._optimizer: Any = None
        self._events: list[Event] = []
        self._rows: list[SparseMatrix] | None = None
        self._seconds = 0.0

    def prepare(self, trainer: Any) -> None:
        """Check the configuration, and hook the weights.

        Args:
            trainer: the trainer; its ``student`` is the model without wrappers.

        Raises:
            LmcompressError: As :func:`~lmcompress.pruning.unstructured.planning.plan`; if calibration rows that will be
                needed are not available, or the criterion is a custom one without a name.
        """
        self._trainer = trainer
        self.attach(trainer.student)
        if self.config.needs_data and trainer.train_dataset is not None:
            # before training, not at its first pruning
            self._calibration()

    def attach(self, model: nn.Module) -> None:
        """The effect of :meth:`prepare` on the model, without a trainer.

        Args:
            model: not wrapped.

        Raises:
            LmcompressError: As :func:`~lmcompress.pruning.unstructured.planning.plan`.
        """
        self._student = model
        # a criterion without a name is refused now, not after training
        self._dumped = saved(self.config)
        self.planned, self._untouched = plan(model, self.config)
        self._state = SparsityState(self.planned, self.config)
        schedule = self.config.schedule
        self._splicing = (
            Splicing(self.config, schedule, self.planned, self._state) if isinstance(schedule, Surgery) else None
        )
        self._zeros_before = [int((one.weight == 0).sum()) for one in self.planned]
        self._step = self._done = 0
        # whether pruning is temporary, and whether pruned weights are trained
        self._some_pruned = self.config.keep_zeros and any(self._zeros_before)
        self._tracks = self.config.removed_is_trained
        self._mask_gradients()

    # called by the trainer in every step

    def modules(self) -> dict[str, nn.Module]:
        """Masks, hidden weights, scores and the state of the schedule, for checkpoints."""
        return {"state": self._state}

    def freeze(self) -> None:
        """Make the mask final and materialize the zeros; the weights are ordinary ones from then on.

        Raises:
            LmcompressError: If training has not begun.
        """
        if self._rows is not None:
            return
        if self._trainer is not None and not self._events:
            raise LmcompressError("nothing was pruned: finish() must come after train()")
        self._finalise()
        self.detach()
        self._rows = [
            SparseMatrix(one.path, one.at.part, one.weight.numel(), int((one.weight == 0).sum()), before)
            for one, before in zip(self.planned, self._zeros_before, strict=True)
        ]

    def finish(self) -> None:
        """Materialize the zeros, if :meth:`freeze` has not, and report.

        Raises:
            LmcompressError: If training has not begun.
        """
        if self.report is None:
            self.freeze()
            self.report = self._reported(trained=True)

    def resume(self, trainer: Any) -> None:
        """After :meth:`finish`, mask gradients again: the zeros stay in further training.

        Args:
            trainer: unused.
        """
        if self.report is not None:
            self.report = self._rows = None
            # more than any schedule has events: nothing more is pruned
            self._state.done.fill_(_ALL_EVENTS)
            self._mask_gradients()

    def detach(self) -> None:
        """Stop masking gradients; weights that were pruned on the way stay zero."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def complete(self) -> bool:
        """Whether the mask is final."""
        return self._finished

    # called by the callback

    def begin(self, max_steps: int, optimizer: Any) -> None:
        """Lay out the schedule; read a checkpoint's state, if one was loaded.

        Args:
            max_steps: optimizer steps of the run.
            optimizer: the model's optimizer.

        Raises:
            LmcompressError: If there are too few steps for the schedule, or for a sum over training.
        """
        self._optimizer = optimizer
        self._events = self.config.events(max_steps)
        # all later decisions depend only on the state, so that a resumed run decides in the same way
        self.restored()

    def restored(self) -> None:
        """Masks as in the checkpoint that was loaded."""
        self._done = int(self._state.done)
        self._some_pruned = any(not bool(mask.all()) for mask in self._state.masks())
        self._tracks = self.config.removed_is_trained and not self._finished

    def advance(self, step: int) -> None:
        """The action due before an optimizer step.

        Args:
            step: optimizer steps done.
        """
        self._step = step
        while self._done < len(self._events) and step >= self._events[self._done].step:
            self._happen(self._events[self._done])
            self._set_done(self._done + 1)

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Restore the weights behind the mask for the optimizer, and add to running scores."""
        if self._finished:
            return
        if self._tracks:
            self._uncover()
        if self.config.chosen_criterion.in_training:
            self._collect()

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Keep pruned weights at 0; with surgery, cut and splice."""
        if self._tracks and not self._finished:
            for one, hidden in zip(self.planned, self._state.hidden(), strict=True):
                hidden.copy_(one.weight)
            if self._splicing is not None and self._done and self._splicing.looks(self._step, self._events[0].step):
                self._splicing.operate(self._step, self._events, self._may_stay())
                self._some_pruned = True
        self._mask_weights()

    def end(self, max_steps: int) -> None:
        """Make the mask final if the run is complete.

        Args:
            max_steps: optimizer steps of the run.
        """
        if self._step + 1 >= max_steps:
            self._finalise()

    def metrics(self) -> dict[str, float]:
        """Pruned share of the weights, for the log."""
        masks = self._state.masks()
        # one transfer from the GPU
        pruned = torch.stack([(~mask).sum() for mask in masks]).sum()
        return {"sparsity": float(pruned) / max(1, sum(mask.numel() for mask in masks))}

    # private below

    def _mask_gradients(self) -> None:
        self._handles = [
            one.weight.register_hook(self._masking(mask))
            for one, mask in zip(self.planned, self._state.masks(), strict=True)
            if one.weight.requires_grad
        ]

    @property
    def _finished(self) -> bool:
        return bool(self._events) and self._done >= len(self._events)

    def _set_done(self, count: int) -> None:
        # also as a number, so that reading it does not wait for a GPU
        self._done = count
        self._state.done.fill_(count)

    def _masking(self, mask: Tensor) -> Callable[[Tensor], Tensor | None]:
        # not after the backward pass: clipping would include the gradients of pruned weights
        def hook(gradient: Tensor) -> Tensor | None:
            return gradient * mask if self._some_pruned and not self._tracks else None

        return hook

    @torch.no_grad()
    def _mask_weights(self) -> None:
        if self._some_pruned:
            for one, mask in zip(self.planned, self._state.masks(), strict=True):
                keep_where(one.weight, mask)

    def _uncover(self) -> None:
        """Set masked weights to their values behind the mask."""
        for one, mask, hidden in zip(self.planned, self._state.masks(), self._state.hidden(), strict=True):
            # unmasked weights may have been changed by others
            keep_where(one.weight, mask, hidden)

    @torch.no_grad()
    def _collect(self) -> None:
        scaler = getattr(getattr(self._trainer, "accelerator", None), "scaler", None)
        for one, scores in zip(self.planned, self._state.scores(), strict=True):
            gradient = one.weight.grad
            # float16: a step that overflows is skipped
            if gradient is not None and (scaler is None or bool(gradient.isfinite().all())):
                scores.add_(self.config.chosen_criterion.function(one.weight.detach(), gradient))
        self._state.seen.fill_(1)

    def _happen(self, event: Event) -> None:
        started = time.perf_counter()
        if event.share is None:
            for mask, may_stay in zip(self._state.masks(), self._may_stay(), strict=True):
                mask.copy_(may_stay)
            self._some_pruned = self.config.keep_zeros
        elif event.share == 0:
            # only surgery has such an event
            assert self._splicing is not None
            self._splicing.fix_thresholds()
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
        """Prune the due weights, and reset the optimizer's state of them."""
        if self._tracks:
            self._uncover()
        if self.config.compensation:
            self._compensate(share)
        else:
            masks = self._masks(share)
            for one, mask, new in zip(self.planned, self._state.masks(), masks, strict=True):
                mask.copy_(one.stored(new))
        self._some_pruned = True
        self._mask_weights()
        if not self._tracks:
            self._forget()

    def _masks(self, share: float) -> list[Tensor]:
        """Masks ``(out, in)`` at a share of the way to the target, for weights that are not fixed."""
        config, planned = self.config, self.planned
        criterion = config.chosen_criterion
        if criterion.in_training and bool(self._state.seen):
            scores = [one.matrix(scores) for one, scores in zip(planned, self._state.scores(), strict=True)]
        else:
            with undisturbed(self._student):
                data = self._calibration() if criterion.needs_data else None
                scores = score(self._student, planned, criterion, data, seed=config.seed)
        may_stay = [one.matrix(kept) for one, kept in zip(planned, self._may_stay(), strict=True)]
        # the pattern of a block depends on its other weights
        least = 0.0 if isinstance(config.pattern, Blocks) else -math.inf
        ranked = [one.masked_fill(~kept, least) for one, kept in zip(scores, may_stay, strict=True)]
        masks = [mask & kept for mask, kept in zip(choose(planned, config, ranked, share), may_stay, strict=True)]
        for number, one in enumerate(planned):
            if one.quality is None:
                continue
            if self._splicing is not None:
                masks[number] = one.matrix(self._state.masks()[number])
            else:
                threshold = quality_threshold(one.weight.detach(), one.quality * share)
                masks[number] &= scores[number] >= threshold
        return masks

    def _may_stay(self) -> list[Tensor]:
        """For each matrix the weights that no earlier event or stage has permanently pruned; as stored."""
        if not self._tracks and self.config.schedule.kind != "iht":
            return [mask.clone() for mask in self._state.masks()]
        return self._state.kept() if self.config.keep_zeros else [torch.ones_like(m) for m in self._state.masks()]

    def _compensate(self, share: float) -> None:
        paths = [one.path for one in self.planned]
        may_stay = dict(zip(paths, self._may_stay(), strict=True))
        jointly = self.config.chosen_criterion.needs == "moments"
        chosen = {} if jointly else dict(zip(paths, self._masks(share), strict=True))
        masks = dict(zip(paths, self._state.masks(), strict=True))

        def prune(one: Planned, hessian: Tensor | None) -> None:
            weight, kept = one.matrix(one.weight.detach()), one.matrix(may_stay[one.path])
            values, mask = compensated(one, weight, hessian, self.config, share, kept, chosen.get(one.path))
            masks[one.path].copy_(one.stored(mask))
            if values is not None:
                one.weight.copy_(one.stored(values))

        with undisturbed(self._student):
            in_order(self._student, self.planned, self._calibration(), prune)

    def _forget(self) -> None:
        """Zero the optimizer's moments of pruned weights."""
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
                raise LmcompressError(f"the criterion {config.criterion_name} must have data, got none; pass batches")
            rows = calibration_rows(self._trainer, config.calibration_rows, config.calibration_batch_size, config.seed)
            self._given = batches_for(self._student, rows)
        return self._given

    def prune_now(self, rounds: int) -> SparsityReport:
        """Prune without training, after :meth:`attach`.

        Args:
            rounds: number of rounds to reach the target in.

        Returns:
            The result.

        Raises:
            LmcompressError: If data are missing, or scores are NaN.
        """
        # nothing is trained here
        self._tracks = False
        try:
            for number in range(1, rounds + 1):
                self._happen(Event(0, number / rounds, final=number == rounds))
        finally:
            self.detach()
        self._events, self._done = [Event(0, 1.0, final=True)], 1
        self.freeze()
        return self._reported(trained=False)

    def _reported(self, *, trained: bool) -> SparsityReport:
        return SparsityReport(self._dumped, list(self._rows or ()), dict(self._untouched), trained, self._seconds)
