"""What a compression method is to the trainer, and what a loss term is."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import TrainerCallback

from lmcompress.errors import LmcompressError

Unit = Literal["examples", "labels", "tokens", "pairs"]
UNITS: tuple[Unit, ...] = ("examples", "labels", "tokens", "pairs")


@dataclass(frozen=True)
class Term:
    """One part of the loss: a sum over the micro-batch, and the unit that it is a mean of.

    Attributes:
        total: 0-d float32, with gradient; the sum, not the mean.
        unit: the trainer divides by the number of these in the whole optimizer step, over all micro-batches and
            processes.
        weight: what the mean is multiplied by in the loss; the value that is logged is without it.
        parts: sums, without gradient, to log instead of ``total`` where several losses share one gradient.
        measured: a number to look at and no loss: needs no gradient, has weight 0 and is logged without ``loss_``.
    """

    total: Tensor
    unit: Unit
    weight: float = 1.0
    parts: Mapping[str, Tensor] | None = None
    measured: bool = False


@dataclass
class Step:
    """What a method sees of one forward pass.

    Attributes:
        model: the student as the training loop has it (perhaps wrapped or compiled).
        inputs: the batch on the model's device, labels included.
        student_inputs: what the student is called with: no labels, no ``teacher_*`` columns.
        progress: share of the training done, in [0, 1].
        outputs: the student's outputs, once somebody has run it.
        shared: for methods that look at the same thing, such as one forward pass of a teacher.
        retain_graph: whether gradients are taken more than once, so that nothing may be freed after the first time.
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

    Methods do not know one another. They may look at what others declare below.

    Attributes:
        name: for messages, and the key of the method's state in training checkpoints.
        changes_shapes: whether :meth:`finish` cuts the model.
        changes_values: whether it says what values single weights may have.
    """

    name: str
    changes_shapes: bool = False
    changes_values: bool = False

    @property
    def folds(self) -> bool:
        """Whether :meth:`finish` multiplies weights by numbers other than 0 and 1."""
        return False

    @property
    def max_norm(self) -> float | None:
        """Gradient norm to which the parameters of :meth:`parameter_groups` are clipped; None: as the model."""
        return None

    def prepare(self, trainer: Any) -> None:
        """Called once, before the optimizer is made: check the model and the data, put hooks, move teachers.

        Args:
            trainer: the :class:`~lmcompress.trainers.CompressionTrainer`; its ``student`` is the model, not wrapped.
        """

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
            The terms, their names unlike those of other methods.
        """
        return {}

    def label_weight(self, progress: float) -> float:
        """What the loss on the labels is multiplied by, at least 0.

        Args:
            progress: share of the training done, in [0, 1].
        """
        return 1.0

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters that are not the model's, as optimizer groups (``params``, optionally ``lr``)."""
        return []

    def modules(self) -> dict[str, nn.Module]:
        """Modules whose state belongs into training checkpoints, by name; never part of a final checkpoint."""
        return {}

    def set_active(self, active: bool) -> None:
        """Called with False around evaluation, so that hooks keep nothing.

        Args:
            active: whether the next forward passes train.
        """

    def freeze(self) -> None:
        """Called on all methods before any is finished: what it does is decided from then on."""

    def finish(self) -> None:
        """Called after training: materialize what was decided and take hooks away."""


class SteppedMethod(Method):
    """A method that also acts before and after optimizer steps, of which :class:`StepCallback` tells it."""

    def begin(self, max_steps: int, optimizer: Any) -> None:
        """When training begins or goes on, with a checkpoint's state in place.

        Args:
            max_steps: optimizer steps of the run.
            optimizer: that trains the model.
        """

    def advance(self, step: int) -> None:
        """Before the forward passes of an optimizer step.

        Args:
            step: optimizer steps done.
        """

    def before_optimizer_step(self) -> None:
        """When gradients are there and clipped."""

    def after_optimizer_step(self) -> None:
        """When weights have moved."""

    def end(self, max_steps: int) -> None:
        """When training ends, whether or not it went to its end.

        Args:
            max_steps: optimizer steps of the run.
        """

    def metrics(self) -> dict[str, float]:
        """Numbers for the log, beside the loss."""
        return {}


class TextReport:
    """What a method did, with a table for the terminal (``__rich__``), whose plain text is ``str(report)``."""

    def __str__(self) -> str:
        written = io.StringIO()
        Console(file=written, width=160, color_system=None).print(self)
        return written.getvalue()


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Tells a :class:`SteppedMethod` of optimizer steps.

    Args:
        method: to be told.
    """

    def __init__(self, method: SteppedMethod) -> None:
        self.method = method

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training begins or goes on."""
        self.method.begin(state.max_steps, kwargs["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An optimizer step begins."""
        self.method.advance(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are clipped."""
        self.method.before_optimizer_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights have moved."""
        self.method.after_optimizer_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training ends."""
        self.method.end(state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The method's numbers join the log."""
        if logs is not None and "loss" in logs and state.log_history:
            values = self.method.metrics()
            logs.update(values)
            # what was appended is a copy
            state.log_history[-1].update(values)


def calibration_rows(trainer: Any, rows: int, batch_size: int, seed: int) -> list[Mapping[str, Tensor]]:
    """Batches out of a trainer's training data, the same on every process and in a run that resumes.

    Args:
        trainer: the :class:`~lmcompress.trainers.CompressionTrainer`.
        rows: how many, chosen at random; fewer where there are fewer.
        batch_size: rows of one batch.
        seed: of the choice.

    Returns:
        The batches as the collator makes them, without what is a teacher's.

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
    # a collator may draw, such as the tokens that it masks: a run that resumes must get the same
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
    """Leave mode and random numbers of a training run as they are; gradients are None afterwards.

    Args:
        model: that is trained.

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
    """The optimizer itself, where accelerate has wrapped it.

    Args:
        optimizer: wrapped or not.

    Returns:
        The optimizer.
    """
    return getattr(optimizer, "optimizer", optimizer)
