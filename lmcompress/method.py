"""What a compression method is to the trainer, and what a loss term is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

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
    """

    total: Tensor
    unit: Unit
    weight: float = 1.0
    parts: Mapping[str, Tensor] | None = None


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


class Method(Protocol):
    """A compression method, as the trainer sees it. Methods do not know one another."""

    name: str

    def prepare(self, trainer: Any) -> None:
        """Called once, before the optimizer is made: check the model and the data, put hooks, move teachers.

        Args:
            trainer: the :class:`~lmcompress.trainers.CompressionTrainer`.
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

    def label_weight(self, progress: float) -> float:
        """What the loss on the labels is multiplied by; 1 for a method that has no opinion.

        Args:
            progress: share of the training done, in [0, 1].

        Returns:
            A factor, at least 0.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters that are not the model's, as optimizer groups (``params``, optionally ``lr``)."""

    def modules(self) -> dict[str, nn.Module]:
        """Modules whose state belongs into training checkpoints, by name; never part of a final checkpoint."""

    @property
    def max_norm(self) -> float | None:
        """Gradient norm to which the parameters of :meth:`parameter_groups` are clipped; None: as the model."""

    def set_active(self, active: bool) -> None:
        """Called with False around evaluation, so that hooks keep nothing.

        Args:
            active: whether the next forward passes train.
        """

    def finish(self) -> None:
        """Called after training: take hooks away, make the work permanent."""
