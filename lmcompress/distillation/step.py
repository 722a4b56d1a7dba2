"""One optimizer step of a distillation: terms of the loss from the teachers' outputs and the captured features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcompress.activations.capture import Capture, Feature, Features
from lmcompress.distillation.causal import chunked_term
from lmcompress.distillation.config import DistillationConfig, Match
from lmcompress.distillation.losses import LOGIT_LOSSES, LogitLoss
from lmcompress.distillation.losses.outputs import probability_shift, token_weights
from lmcompress.distillation.matches import MatchLoss
from lmcompress.distillation.projections import Projection
from lmcompress.distillation.schedules import WEIGHT_SCHEDULES, WeightSchedule, cwsm, flsw
from lmcompress.distillation.teachers import Answers, Teacher
from lmcompress.errors import LmcompressError
from lmcompress.method import Method, Step, Term

PER_TOKEN = ("token_classification", "masked_lm", "causal_lm")
"""Heads with one output per token."""


def scheduled(weight: float, schedule: str | WeightSchedule, progress: float) -> float:
    """A weight at this point of the training.

    Args:
        weight: as configured.
        schedule: its factor over training: a name or a function.
        progress: share of the training done, in [0, 1].
    """
    return weight if schedule == "constant" else weight * WEIGHT_SCHEDULES.resolve(schedule)(progress)


class FeatureTerm:
    """A term of the loss computed from captured features of both models.

    Attributes:
        which: number of the teacher.
        student: features of the student it reads.
        teacher: features of the teacher it reads.
        modules: modules trained or kept alongside the student, by name.
        learning_rate: learning rate of their parameters; None: the model's.
    """

    which: int = 0
    student: Sequence[Feature]
    teacher: Sequence[Feature]
    modules: Mapping[str, nn.Module] = {}
    learning_rate: float | None = None

    @property
    def captured(self) -> Sequence[Feature]:
        """All features of the student that it may read."""
        return self.student

    def terms(self, student: Features, teacher: Features, step: Step, mask: Tensor) -> dict[str, Term]:
        """The terms of one micro-batch.

        Args:
            student: features that include :attr:`student`.
            teacher: features that include :attr:`teacher`.
            step: the step, with the whole batch.
            mask: ``(batch, length)`` of the student, 1 = real token.

        Returns:
            By name.
        """
        raise NotImplementedError


class Matched(FeatureTerm):
    """A match with its features on both sides, projection and options resolved.

    Args:
        match: the configuration.
        loss: the match, with its feature set.
        name: name of the term.
        sides: features of the student and of the teacher.
        causal: whether the models are causal.
        projection: projection of the student's features.
        nearest: the student's features to choose the nearest from, if requested.
    """

    def __init__(
        self,
        match: Match,
        loss: MatchLoss,
        name: str,
        sides: tuple[list[Feature], list[Feature]],
        *,
        causal: bool,
        projection: Projection | None,
        nearest: Sequence[Feature] = (),
    ) -> None:
        self.match, self.loss, self.name = match, loss, name
        self.which, self.learning_rate = match.which, match.projection_learning_rate
        self.student, self.teacher = sides
        self.projection, self.nearest = projection, nearest
        self.modules = {} if projection is None else {name: projection}
        self._compare = loss.bound(causal=causal, **match.options)

    @property
    def captured(self) -> Sequence[Feature]:
        """All features of the student that it may read."""
        return self.nearest or self.student

    def compare(self, student: Features, teacher: Features, mask: Tensor) -> Tensor:
        """The sum for each example, ``(batch,)``.

        Args:
            student: features that include :attr:`student`.
            teacher: features that include :attr:`teacher`.
            mask: ``(batch, length)``, 1 = real token.
        """
        mine = [student[feature] for feature in self.student]
        if self.projection is not None:
            mine = [self.projection(tensor) for tensor in mine]
        theirs = [teacher[feature].detach() for feature in self.teacher]
        if self.loss.layers == 1:
            return self._compare(mine[0], theirs[0], mask)
        return self._compare((mine[0], mine[1]), (theirs[0], theirs[1]), mask)

    def terms(self, student: Features, teacher: Features, step: Step, mask: Tensor) -> dict[str, Term]:
        """The term of one micro-batch; see :class:`FeatureTerm`.

        Args:
            student: features of the student.
            teacher: features of the teacher.
            step: the step, with the progress.
            mask: ``(batch, length)``.

        Returns:
            One term, by its name.
        """
        weight = scheduled(self.match.weight, self.match.weight_schedule, step.progress)
        return {self.name: Term(self.compare(student, teacher, mask).sum(), self.loss.unit, weight)}


class DistillationStep(Method):
    """The part of :class:`~lmcompress.distillation.Distillation` that runs in each step; created by its ``attach``.

    Attributes:
        config: the compared features and their weights.
        teachers: sources of the teachers' outputs.
        problem: kind of the student's head, from :func:`~lmcompress.distillation.checks.problem_type_of`.
    """

    config: DistillationConfig
    teachers: list[Teacher]
    problem: str
    # each teacher's share of the logits, and whether it is needed at all
    _shares: list[float]
    _needed: list[bool]
    _capture: Capture | None = None
    _logit_loss: LogitLoss
    _loss_options: Mapping[str, float]
    # why a batch without separate inputs for the teacher is refused, if it is
    _refused_inputs: str | None
    _parts: list[FeatureTerm]
    _choose_nearest: Callable[[Step, Features, Sequence[Answers], Tensor], None] | None
    _autocast: Any

    @property
    def _chunked(self) -> bool:
        return self.problem == "causal_lm"

    def before_forward(self, step: Step) -> None:
        """Request only hidden states from a causal student: the vocabulary is computed in chunks.

        Args:
            step: the step.
        """
        if self._chunked:
            step.student_inputs = {**step.student_inputs, "logits_to_keep": 1, "use_cache": False}

    def label_weight(self, progress: float) -> float:
        """The weight of the labels; 0 for causal models, where the labels are part of the chunked term.

        Args:
            progress: share of the training done.
        """
        return 0.0 if self._chunked else self._weight_of_labels(progress)

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """The loss on the logits, and one term for each match.

        Args:
            step: the step, with the student's outputs.

        Returns:
            ``kd`` (causal models: ``label+kd``), the matches under their name and number, ``emd``, ``contrast``;
            ``homogeneity_student`` and ``homogeneity_teacher`` are only measured.
        """
        assert self._capture is not None
        self.check_batch(step.inputs)
        answers = self._answers(step)
        mask = step.inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(step.inputs["input_ids"])
        terms: dict[str, Term] = {}
        if self._chunked:
            if self.config.weight > 0 or self.config.label_weight > 0:
                terms |= self._chunked_term(step, self._capture, answers)
        elif self.config.weight > 0:
            terms["kd"] = self._logit_term(step, answers, mask)
        student = self._capture.take(mask)
        if self._choose_nearest is not None:
            self._choose_nearest(step, student, answers, mask)
        for part in self._parts:
            terms |= part.terms(student, answers[part.which].features, step, mask)
        return terms

    def check_batch(self, inputs: Mapping[str, Any]) -> None:
        """Refuse a batch for which the losses cannot be computed; checks only shapes and types.

        Args:
            inputs: the batch, ``teacher_*`` columns included.

        Raises:
            LmcompressError: If the labels do not fit the head, or tokens are to be compared one by one and
                teacher and student have different ones.
        """
        if self._refused_inputs is not None and "teacher_input_ids" not in inputs:
            raise LmcompressError(self._refused_inputs)
        labels = inputs.get("labels")
        if labels is not None and labels.is_floating_point() and self.problem == "single_label_classification":
            raise LmcompressError(
                "the labels are floating-point numbers, but the student's head is for one class of several: set "
                "config.problem_type of student and teacher to 'multi_label_classification' or 'regression'"
            )
        contrast = self.config.contrast
        per_token = self.config.weight > 0 and self.problem in PER_TOKEN
        if (per_token or (contrast is not None and contrast.level == "token")) and "teacher_input_ids" in inputs:
            lengths = inputs["input_ids"].shape[1], inputs["teacher_input_ids"].shape[1]
            if lengths[0] != lengths[1]:
                raise LmcompressError(
                    f"student and teacher see sequences of {lengths[0]} and {lengths[1]} tokens: a loss per token "
                    "needs one tokenisation for both"
                )

    def _answers(self, step: Step) -> list[Answers]:
        # by identity: two methods with the same teacher share its one forward pass
        known = step.shared.setdefault("answers", {})
        for teacher, needed in zip(self.teachers, self._needed, strict=True):
            if needed and id(teacher) not in known:
                known[id(teacher)] = teacher.answer(step.inputs, self._autocast)
        return [known.get(id(teacher), Answers(None, None, {})) for teacher in self.teachers]

    def _weight_of_labels(self, progress: float) -> float:
        return scheduled(self.config.label_weight, self.config.label_weight_schedule, progress)

    def _logit_term(self, step: Step, answers: Sequence[Answers], mask: Tensor) -> Term:
        student = step.outputs["logits"]
        teacher = self._mean_logits([answer.logits for answer in answers if answer.logits is not None])
        weight = scheduled(self.config.weight, self.config.weight_schedule, step.progress)
        labels = step.inputs.get("labels")
        if self.problem not in PER_TOKEN:
            if self.problem == "regression":
                student, teacher = student.reshape(len(student), -1), teacher.reshape(len(teacher), -1)
            return Term(self._row_loss(student, teacher, labels).sum(), "examples", weight)
        if labels is None and self.config.token_scaling is not None:
            raise LmcompressError("token_scaling needs labels; the batch has none")
        # positions without a label (padding, continuation pieces of a word) teach nothing the head is used for
        rows = mask.bool() if labels is None else labels != -100
        chosen = None if labels is None else labels[rows]
        loss = self._row_loss(student[rows], teacher[rows], chosen)
        if self.config.token_scaling is not None and chosen is not None:
            surprise = F.cross_entropy(teacher[rows].float(), chosen, reduction="none")
            loss = loss * token_weights(surprise, rows, self.config.token_scaling)
        return Term(loss.sum(), "tokens" if labels is None else "labels", weight)

    def _chunked_term(self, step: Step, capture: Capture, answers: Sequence[Answers]) -> dict[str, Term]:
        plain = self.config.temperature_schedule.kind == "constant" and not self.config.probability_shift
        return chunked_term(
            self.config,
            step,
            capture,
            [answer.chunk for answer in answers if answer.chunk is not None],
            weights=(
                self._weight_of_labels(step.progress),
                scheduled(self.config.weight, self.config.weight_schedule, step.progress),
            ),
            soft=None if plain and self._logit_loss is LOGIT_LOSSES["kl"] else self._row_loss,
            mean=self._mean_logits,
            autocast=self._autocast,
        )

    def _mean_logits(self, logits: Sequence[Tensor]) -> Tensor:
        if len(logits) == 1:
            return logits[0]
        mean = torch.zeros_like(logits[0], dtype=torch.float32)
        for share, one in zip(self._shares, logits, strict=True):
            mean += share * one
        return mean

    def _row_loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        student, teacher = student.float(), teacher.float()
        if self.config.probability_shift:
            if labels is None:
                raise LmcompressError("probability_shift needs labels; the batch has none")
            teacher = probability_shift(teacher, labels)
        return self._logit_loss.function(
            student,
            teacher,
            temperature=self._temperature(student, teacher),
            scale_by_temperature=self.config.scale_by_temperature,
            **self._loss_options,
        )

    def _temperature(self, student: Tensor, teacher: Tensor) -> float | Tensor:
        schedule = self.config.temperature_schedule
        if schedule.kind == "constant":
            return self.config.temperature
        limits: dict[str, Any] = {"minimum": schedule.minimum, "maximum": schedule.maximum, "beta": schedule.beta}
        if schedule.kind == "flsw":
            return flsw(student, teacher, self.config.temperature, gamma=schedule.gamma, **limits)
        return cwsm(student, self.config.temperature, **limits)
