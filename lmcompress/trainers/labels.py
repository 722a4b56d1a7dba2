"""The loss on the labels as a term: the model's own, a smoothed one, a function of the user's, a subclass's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmcompress.errors import LmcompressError
from lmcompress.method import UNITS, Step, Term

if TYPE_CHECKING:
    from lmcompress.trainers.compression import CompressionTrainer


class LabelLoss:
    """Computes the loss on the labels of a trainer.

    Args:
        trainer: with its ``compute_loss_func`` and ``label_smoother``, as ``Trainer`` sets them.
    """

    def __init__(self, trainer: CompressionTrainer) -> None:
        self._trainer = trainer

    @property
    def _outside(self) -> bool:
        """Whether the loss is computed from the outputs, and not by the model."""
        return self._trainer.compute_loss_func is not None or self._trainer.label_smoother is not None

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The labels that the model gets.

        Args:
            inputs: one micro-batch.

        Returns:
            Nothing where the loss is not the model's.
        """
        labels = self.labels_in(inputs)
        if self._outside:
            labels.pop("labels", None)
        return labels

    def labels_in(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The labels of a batch, by the names that the trainer knows.

        Args:
            inputs: one micro-batch.
        """
        names = dict.fromkeys(["labels", *self._trainer.label_names])
        return {name: inputs[name] for name in names if name in inputs}

    def term(self, outputs: Any, inputs: Mapping[str, Any], weight: float) -> Term:
        """The loss as a sum over the micro-batch.

        Args:
            outputs: of the student.
            inputs: one micro-batch, with labels.
            weight: of the term.

        Returns:
            A term of unit ``labels``.

        Raises:
            LmcompressError: If labels that are no classes are to be smoothed, or the model returned no loss.
        """
        trainer = self._trainer
        if trainer.compute_loss_func is not None:
            value = trainer.compute_loss_func(outputs, inputs.get("labels"), num_items_in_batch=trainer._items)
            return self.of_the_step(value, weight)
        # heads return the mean over the units they count; times that count it is the sum
        count = trainer._count(inputs)[UNITS.index("labels")]
        smoothed = trainer.label_smoother is not None and "labels" in inputs
        loss = self._smoothed(outputs, inputs) if smoothed else loss_of(outputs)
        # a micro-batch without a single label has a mean of 0 / 0
        return Term(torch.where(count > 0, loss.float(), torch.zeros_like(loss.float())) * count, "labels", weight)

    def of_the_step(self, value: Tensor, weight: float) -> Term:
        """A term for a value that is normalized for the whole optimizer step already.

        Args:
            value: 0-d, with gradient.
            weight: of the term.

        Returns:
            A term that the trainer's division by the labels of the step turns into ``value`` again.
        """
        trainer = self._trainer
        counts = trainer._counts
        count = 1.0 if counts is None else counts["labels"].clamp(min=1)
        averaged = trainer._items is None or not trainer.args.average_tokens_across_devices
        # DDP averages over processes: as in Trainer, only what is divided by the items of all of them is summed
        share = 1 / trainer.accelerator.num_processes if averaged else 1.0
        return Term(value.float() * count * share, "labels", weight)

    def _smoothed(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        labels = inputs["labels"]
        if labels.is_floating_point():
            raise LmcompressError(
                f"label_smoothing_factor is for classes, got labels of {str(labels.dtype).removeprefix('torch.')}; "
                "set it to 0"
            )
        _, shifted, _ = self._trainer._reading(inputs)
        loss: Tensor = self._trainer.label_smoother(outputs, labels, shift_labels=shifted)
        return loss


class OverriddenLoss:
    """A ``compute_loss`` of a subclass of the user's, which knows nothing of methods.

    It is called in place of the student's forward pass, and what it returns is the loss on the labels: the mean over a
    micro-batch, unless the class sets ``loss_is_scaled_for_ga``. ``super().compute_loss`` gives it the loss that
    ``Trainer`` would. Terms of methods are added afterwards.

    Args:
        trainer: of the user's class.
        function: its ``compute_loss``, bound.
        scaled: whether it is normalized for the whole optimizer step.
    """

    def __init__(self, trainer: CompressionTrainer, function: Callable[..., Any], scaled: bool) -> None:
        self._trainer = trainer
        self.function = function
        self._scaled = scaled
        self.running = False

    def __call__(self, step: Step, inputs: Mapping[str, Any], weight: float) -> tuple[Any, Term]:
        """Run the user's function.

        Args:
            step: the step, without outputs.
            inputs: one micro-batch.
            weight: of the term.

        Returns:
            The student's outputs, and the term.

        Raises:
            LmcompressError: If the function does not run the model.
        """
        seen: list[Any] = []
        student = self._trainer._model_for(inputs)
        handle = student.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
        self.running = True
        given = {**step.student_inputs, **self._trainer._label_loss.labels_in(inputs)}
        try:
            result = self.function(step.model, given, num_items_in_batch=self._trainer._items)
        finally:
            self.running = False
            handle.remove()
        if not seen:
            raise LmcompressError(
                f"compute_loss of {type(self._trainer).__name__} did not run the model, so methods have nothing to "
                "read; it must call model(**inputs)"
            )
        loss = result[0] if isinstance(result, tuple) else result
        value = loss if self._scaled else loss / self._trainer.current_gradient_accumulation_steps
        return seen[-1], self._trainer._label_loss.of_the_step(value, weight)

    def evaluated(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Tensor | int | None
    ) -> Any:
        """What evaluation measures: the user's function, as ``Trainer`` calls it.

        Args:
            model: the student, possibly wrapped.
            inputs: one batch.
            return_outputs: whether to return the outputs too.
            num_items_in_batch: as in ``Trainer``.

        Returns:
            What the function returns.
        """
        self.running = True
        try:
            return self.function(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        finally:
            self.running = False

    def ordinary(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        """What ``super().compute_loss`` is for the user's function: the loss on the labels alone.

        Args:
            model: the student, possibly wrapped.
            inputs: one micro-batch, perhaps changed.
            return_outputs: whether to return the outputs too.

        Returns:
            The loss as a mean for one micro-batch, or ``(loss, outputs)``.
        """
        trainer = self._trainer
        label_loss = trainer._label_loss
        outputs = model(**trainer._student_inputs(inputs), **label_loss.model_inputs(inputs))
        term = label_loss.term(outputs, inputs, 1.0)
        counts = trainer._counts
        value = term.total / (1.0 if counts is None else counts[term.unit].clamp(min=1))
        if not self._scaled:
            value = value * trainer.current_gradient_accumulation_steps
        return (value, outputs) if return_outputs else value


def overridden_loss(trainer: CompressionTrainer, base: type[CompressionTrainer]) -> OverriddenLoss | None:
    """The ``compute_loss`` of a subclass, if it has one of its own.

    Args:
        trainer: of any class.
        base: the class whose ``compute_loss`` adds the terms.

    Returns:
        None if it is that of ``base``.
    """
    kind = type(trainer)
    if kind.compute_loss is base.compute_loss:
        return None
    above = kind.__mro__[: kind.__mro__.index(base)]
    scaled = next((vars(one)["loss_is_scaled_for_ga"] for one in above if "loss_is_scaled_for_ga" in vars(one)), False)
    function = kind.compute_loss.__get__(trainer)
    return OverriddenLoss(trainer, function, bool(scaled))


def loss_of(outputs: Any) -> Tensor:
    """The loss that a model returned.

    Args:
        outputs: a ``ModelOutput``, a dictionary or a tuple.

    Returns:
        0-d.

    Raises:
        LmcompressError: If there is none.
    """
    found = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0] if outputs else None
    if not isinstance(found, Tensor) or found.dim() > 0:
        raise LmcompressError(
            "the model returned no loss for these inputs. Does its head take labels of this name, and does the batch "
            "have them? compute_loss_func= computes a loss from the outputs"
        )
    return found


def first_tensor(outputs: Any) -> Tensor:
    """A floating-point tensor that depends on all that the outputs depend on: logits, or the last hidden state.

    Args:
        outputs: a ``ModelOutput``, a dictionary or a tuple.
    """
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    named = outputs.get("logits") if isinstance(outputs, Mapping) else None
    found: Tensor = next(v for v in (named, *values) if isinstance(v, Tensor) and v.is_floating_point())
    return found
