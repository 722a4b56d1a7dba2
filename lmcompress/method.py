"""The interface between a compression method and the trainer, and the terms of a loss."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import TrainerCallback

from lmcompress.errors import LmcompressError

if TYPE_CHECKING:
    from typing_extensions import Self

Unit = Literal["examples", "labels", "tokens", "pairs"]
UNITS: tuple[Unit, ...] = ("examples", "labels", "tokens", "pairs")


@dataclass(frozen=True)
class Term:
    """One term of the loss: a sum over the micro-batch, and the unit of its mean.

    Attributes:
        total: 0-d float32, with gradient; the sum, not the mean.
        unit: the trainer divides by the number of these in the whole optimizer step, over all micro-batches and
            processes.
        weight: factor of the mean in the loss; the logged value is without it.
        parts: sums, without gradient, to log instead of ``total`` where several losses share one gradient.
        measured: whether it is only logged: needs no gradient, has weight 0 and is logged without ``loss_``.
    """

    total: Tensor
    unit: Unit
    weight: float = 1.0
    parts: Mapping[str, Tensor] | None = None
    measured: bool = False


@dataclass
class Step:
    """The state of one forward pass, as methods see it.

    Attributes:
        model: the student as the training loop holds it (possibly wrapped or compiled).
        inputs: the batch on the model's device, labels included.
        student_inputs: inputs of the student: no labels, no ``teacher_*`` columns.
        progress: share of the training done, in [0, 1].
        outputs: the student's outputs, once it has run.
        shared: results shared by methods, such as one forward pass of a teacher.
        retain_graph: whether gradients are computed more than once, so that nothing may be freed after the first time.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    student_inputs: Mapping[str, Any]
    progress: float
    outputs: Any = None
    shared: dict[str, Any] = field(default_factory=dict)
    retain_graph: bool = False


class Method:
    """A compression method, as the trainer sees it; by default it adds nothing to a step.

    Methods are independent of each other. They may read what others declare below.

    Attributes:
        name: name in messages, and key of the method's state in training checkpoints.
        changes_shapes: whether :meth:`finish` cuts the model.
        changes_values: whether it determines the values of single weights.
        goes_on: whether training may go on after :meth:`finish`: :meth:`resume` puts back what that took away.
        captures: whether it reads features inside of the model, with hooks.
    """

    name: str
    changes_shapes: bool = False
    changes_values: bool = False
    goes_on: bool = False
    captures: bool = False
    _created_with: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remembers the arguments, for :meth:`fresh`."""
        self = super().__new__(cls)
        self._created_with = (args, kwargs)
        return self

    def fresh(self) -> Self:
        """The same method, not prepared yet: for the next model of a search over hyperparameters."""
        args, kwargs = self._created_with
        return type(self)(*args, **kwargs)

    @property
    def complete(self) -> bool:
        """Whether the schedule has come to its end: only from then on is a checkpoint a candidate for the best."""
        return True

    @property
    def folds(self) -> bool:
        """Whether :meth:`finish` multiplies weights by numbers other than 0 and 1."""
        return False

    @property
    def max_norm(self) -> float | None:
        """Max gradient norm of the parameters in :meth:`parameter_groups`; None: the model's."""
        return None

    def prepare(self, trainer: Any) -> None:
        """Called once, before the optimizer is created: check the model and the data, add hooks, move teachers.

        Args:
            trainer: the :class:`~lmcompress.trainers.CompressionTrainer`; its ``student`` is the model, not wrapped.
        """

    def replaces_batches(self, step: int) -> bool:
        """Called before each optimizer step: whether it is to be taken on other batches than the data loader's.

        Args:
            step: optimizer steps done.
        """
        return False

    def replace_batches(self, batches: list[Any], step: int) -> list[Any]:
        """Called where :meth:`replaces_batches` says so, before units are counted; hooks record nothing.

        Args:
            batches: as the data loader gives them.
            step: optimizer steps done.

        Returns:
            As many batches to train on in their place.
        """
        return batches

    def before_forward(self, step: Step) -> None:
        """Called before the student runs.

        Args:
            step: without ``outputs`` yet.
        """

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """The method's terms for this micro-batch, by name.

        Args:
            step: with the student's ``outputs``.

        Returns:
            The terms, with names unique among methods.
        """
        return {}

    def label_weight(self, progress: float) -> float:
        """Factor of the loss on the labels, at least 0.

        Args:
            progress: share of the training done, in [0, 1].
        """
        return 1.0

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters outside the model, as optimizer groups (``params``, optionally ``lr``)."""
        return []

    def modules(self) -> dict[str, nn.Module]:
        """Modules whose state is part of training checkpoints, by name; never part of a final checkpoint."""
        return {}

    def set_active(self, active: bool) -> None:
        """Called with False around evaluation, so that hooks record nothing.

        Args:
            active: whether the next forward passes train.
        """

    def freeze(self) -> None:
        """Called on all methods before any is finished: decisions of the method are final from then on."""

    def finish(self) -> None:
        """Called after training: materialize the decisions and remove hooks."""

    def release(self) -> None:
        """Called when training ends, fails or is interrupted: give back what is borrowed, such as teachers.

        :meth:`resume` may follow, and :meth:`finish`. Calling it twice changes nothing.
        """

    def resume(self, trainer: Any) -> None:
        """Called before training begins once more: take again what :meth:`release` gave back.

        Args:
            trainer: as for :meth:`prepare`.
        """

    def detach(self) -> None:
        """Let go of the student without finishing: remove every hook and every replacement of a module."""
        self.release()


class SteppedMethod(Method):
    """A method that also acts before and after optimizer steps."""

    def begin(self, max_steps: int, optimizer: Any) -> None:
        """Called when training begins or resumes, with a checkpoint's state loaded.

        Args:
            max_steps: optimizer steps of the run.
            optimizer: the model's optimizer.
        """

    def advance(self, step: int) -> None:
        """Called before the forward passes of an optimizer step.

        Args:
            step: optimizer steps done.
        """

    def before_optimizer_step(self) -> None:
        """Called when gradients are computed and clipped."""

    def after_optimizer_step(self) -> None:
        """Called when weights are updated."""

    def end(self, max_steps: int) -> None:
        """Called when training ends, complete or not.

        Args:
            max_steps: optimizer steps of the run.
        """

    def restored(self) -> None:
        """Called when a checkpoint's state has been loaded after training, because it was the best."""

    def metrics(self) -> dict[str, float]:
        """Values for the log, in addition to the loss."""
        return {}


class TextReport:
    """What a method did, with a table for the terminal (``__rich__``), whose plain text is ``str(report)``."""

    def __str__(self) -> str:
        written = io.StringIO()
        Console(file=written, width=160, color_system=None).print(self)
        return written.getvalue()


def noted(unrecovered: str | None) -> str:
    """A line for the caption of a report's table.

    Args:
        unrecovered: of the report.
    """
    return "" if unrecovered is None else f"\n{unrecovered}"


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Notifies the stepped methods of a trainer of its optimizer steps.

    Args:
        trainer: its ``methods`` are read anew each time, for a search makes new ones.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    @property
    def _methods(self) -> list[SteppedMethod]:
        return [method for method in self._trainer.methods if isinstance(method, SteppedMethod)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training begins or resumes."""
        for method in self._methods:
            method.begin(state.max_steps, kwargs["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An optimizer step begins."""
        for method in self._methods:
            method.advance(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are clipped."""
        for method in self._methods:
            method.before_optimizer_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights are updated."""
        for method in self._methods:
            method.after_optimizer_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training ends."""
        self._trainer.cut_short = {
            method.name: f"training ended at step {state.global_step} of {state.max_steps}, before the schedule of "
            f"{method.name} had done its last step: the rest was done at once and not trained any more"
            for method in self._methods
            if not method.complete
        }
        for method in self._methods:
            method.end(state.max_steps)


def calibration_rows(trainer: Any, rows: int, batch_size: int, seed: int) -> list[Mapping[str, Tensor]]:
    """Batches from a trainer's training data, the same on every process and in a resumed run.

    Args:
        trainer: the :class:`~lmcompress.trainers.CompressionTrainer`.
        rows: number of random rows; fewer if there are fewer.
        batch_size: rows of one batch.
        seed: seed of the choice.

    Returns:
        The collator's batches, without a teacher's columns.

    Raises:
        LmcompressError: If there is no training set, or it cannot be indexed.
    """
    data = trainer.train_dataset
    if data is None or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise LmcompressError(
            f"calibration rows must come from a training set that can be indexed, got {type(data).__name__}; pass "
            "calibration=, some batches"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data), generator=generator)[:rows].tolist()
    trainer._set_signature_columns_if_needed()
    known = set(trainer._signature_columns or ())
    collate = trainer.data_collator or default_collate
    batches: list[Mapping[str, Tensor]] = []
    # a collator may be random, such as in its masking: a resumed run must get the same
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(chosen), batch_size):
            picked = [data[i] for i in chosen[start : start + batch_size]]
            if trainer.args.remove_unused_columns:
                picked = [{k: v for k, v in row.items() if k in known} for row in picked]
            batches.append({k: v for k, v in collate(picked).items() if not k.startswith("teacher_")})
    return batches


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Preserve mode and random state of a training run; gradients are None afterwards.

    Args:
        model: the model in training.

    Yields:
        Nothing.
    """
    training = model.training
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.train(training)
        for parameter in model.parameters():
            parameter.grad = None


def inner_optimizer(optimizer: Any) -> Any:
    """The underlying optimizer, if accelerate has wrapped it.

    Args:
        optimizer: wrapped or not.

    Returns:
        The optimizer.
    """
    return getattr(optimizer, "optimizer", optimizer)
