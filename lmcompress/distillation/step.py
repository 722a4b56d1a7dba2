"""One optimizer step of a distillation: terms of the loss from the teachers' outputs and the captured features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.capture import Capture, Feature, Features, stack_of
from lmcompress.activations.documents import Documents, documents_in, documents_of
from lmcompress.activations.hooks import valid_targets
from lmcompress.data.text import TEACHER_PREFIX
from lmcompress.data.windows import SPAN_LABELS
from lmcompress.distillation.causal import by_document, chunked_term, next_token_labels
from lmcompress.distillation.config import DistillationConfig, Match
from lmcompress.distillation.crossing import SharedTokens
from lmcompress.distillation.losses import LOGIT_LOSSES, LogitLoss
from lmcompress.distillation.losses.outputs import probability_shift, token_weights
from lmcompress.distillation.losses.vocabularies import over_shared_tokens
from lmcompress.distillation.matches import MatchLoss
from lmcompress.distillation.projections import Projection
from lmcompress.distillation.schedules import WEIGHT_SCHEDULES, WeightSchedule, cwsm, flsw
from lmcompress.distillation.teachers import Answers, Teacher, teacher_inputs
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, head_logits, with_decoder_inputs
from lmcompress.method import Method, Step, Term

SPANS = "question_answering"
"""The head whose two distributions, of the first and the last token of an answer, are over the tokens of a row."""

PER_TOKEN = ("token_classification", "masked_lm", "causal_lm", "seq2seq_lm", SPANS)
"""Heads with one output per token."""

# a logit whose probability is 0 at every temperature, and finite, so that 0 times it is 0
_NEVER = -1e30


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
        optimizer_options: further options of their group in the optimizer.
    """

    which: int = 0
    student: Sequence[Feature]
    teacher: Sequence[Feature]
    modules: Mapping[str, nn.Module] = {}
    learning_rate: float | None = None
    optimizer_options: Mapping[str, Any] = {}

    @property
    def captured(self) -> Sequence[Feature]:
        """All features of the student that it may read."""
        return self.student

    def of_decoder(self, model: PreTrainedModel) -> bool:
        """Whether it reads features of a decoder that reads an encoder, which has tokens of its own.

        Args:
            model: the student.
        """
        return stack_of(model, self.student[0][1]) > 0

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
        self.optimizer_options = match.projection_optimizer
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
        problem: kind of the student's head, from :func:`~lmcompress.distillation.checks.problem_of`.
    """

    config: DistillationConfig
    teachers: list[Teacher]
    problem: str
    # each teacher's share of the logits, and whether it is needed at all
    _shares: list[float]
    _needed: list[bool]
    _capture: Capture | None = None
    # whether the student's logits are its head on its last hidden states, computed in chunks
    _chunked: bool = False
    # number of logits compared, where tables are padded to different sizes; None: all
    _tokens: int | None = None
    _logit_loss: LogitLoss
    _loss_options: Mapping[str, float]
    # the tokens that are compared, of two vocabularies; and whether the loss is for two at all
    _shared: SharedTokens | None = None
    _crossing: bool = False
    # whether the batches of the current optimizer step were written by the student
    _own_texts: bool = False
    # why a batch without separate inputs for the teacher is refused, if it is
    _refused_inputs: str | None
    _parts: list[FeatureTerm]
    _choose_nearest: Callable[[Step, Features, Sequence[Answers], Tensor], None] | None
    _autocast: Any

    def before_forward(self, step: Step) -> None:
        """Request only hidden states from a causal student: the vocabulary is computed in chunks.

        Args:
            step: the step.
        """
        if self._chunked:
            step.student_inputs = {**step.student_inputs, "logits_to_keep": 1, "use_cache": False}
        elif self._documents(step) is not None:
            # with a cache, Transformers would let packed documents attend to each other
            step.student_inputs = {**step.student_inputs, "use_cache": False}

    def label_weight(self, progress: float) -> float:
        """The weight of the labels; 0 without a head, and for causal models, whose chunked term includes them.

        Args:
            progress: share of the training done.
        """
        return 0.0 if self._chunked or self.problem == "headless" else self._weight_of_labels(progress)

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """The loss on the logits, and one term for each match.

        Args:
            step: the step, with the student's outputs.

        Returns:
            ``kd`` (causal models: ``label+kd``; question answering: the mean over both ends), the matches under their
            name and number, ``emd``, ``contrast``; ``homogeneity_student`` and ``homogeneity_teacher`` are only
            measured.
        """
        if self._capture is None:
            raise LmcompressError("this distillation has been released or finished: pass a new one to train again")
        self.check_batch(step.inputs)
        answers, documents = self._answers(step), self._documents(step)
        terms: dict[str, Term] = {}
        if self._chunked:
            if self.config.weight > 0 or self.config.label_weight > 0:
                terms |= self._chunked_term(step, self._capture, answers)
        elif self.config.weight > 0:
            terms["kd"] = self._logit_term(step, answers, documents)
        seen = step if documents is None else replace(step, inputs=_unpacked(step.inputs, documents))
        mask = _mask_of(seen.inputs)
        student = self._capture.take(documents)
        if self._choose_nearest is not None:
            self._choose_nearest(seen, student, answers, mask)
        targets = self._of_targets(seen)
        for part in self._parts:
            own = targets if targets is not None and part.of_decoder(self._capture.model) else seen
            found = part.terms(student, answers[part.which].features, own, _mask_of(own.inputs))
            terms |= found if own is seen else {name: _over_labels(term, own.inputs) for name, term in found.items()}
        return terms

    def _of_targets(self, step: Step) -> Step | None:
        """The step as the decoder of the student sees it, with its tokens, if there is one that reads an encoder."""
        model = cast(Capture, self._capture).model
        if not anatomy_of(model).reads_encoder:
            return None
        inputs = with_decoder_inputs(model, step.inputs)
        return replace(
            step, inputs={"input_ids": inputs["decoder_input_ids"], "attention_mask": valid_targets(inputs).long()}
        )

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
        if self._crossing:
            # its positions are aligned by what counts, whatever the lengths
            per_token = False
        if (per_token or (contrast is not None and contrast.level == "token")) and "teacher_input_ids" in inputs:
            lengths = inputs["input_ids"].shape[1], inputs["teacher_input_ids"].shape[1]
            if lengths[0] != lengths[1]:
                raise LmcompressError(
                    f"student and teacher see sequences of {lengths[0]} and {lengths[1]} tokens: a loss per token "
                    "needs one tokenisation for both"
                )

    def _documents(self, step: Step) -> Documents | None:
        return None if self._capture is None else documents_of(self._capture.model, step.inputs)

    def _answers(self, step: Step) -> list[Answers]:
        # by identity: two methods with the same teacher share its one forward pass
        known = step.shared.setdefault("answers", {})
        for teacher, needed in zip(self.teachers, self._needed, strict=True):
            if needed and id(teacher) not in known:
                known[id(teacher)] = teacher.answer(step.inputs, self._autocast)
        return [known.get(id(teacher), Answers(None, None, {})) for teacher in self.teachers]

    def _weight_of_labels(self, progress: float) -> float:
        if self._own_texts:
            # what the student wrote is no target
            return 0.0
        return scheduled(self.config.label_weight, self.config.label_weight_schedule, progress)

    def _logit_term(self, step: Step, answers: Sequence[Answers], documents: Documents | None) -> Term:
        student = cast(Tensor, head_logits(step.outputs))[..., : self._tokens]
        given = [answer.logits for answer in answers if answer.logits is not None]
        teacher = self._mean_logits([logits[..., : self._tokens] for logits in given])
        weight = scheduled(self.config.weight, self.config.weight_schedule, step.progress)
        if self.problem == SPANS:
            return self._span_term(step, student, teacher, weight)
        labels = next_token_labels(step.inputs) if self.problem == "causal_lm" else step.inputs.get("labels")
        if self.problem not in PER_TOKEN:
            if self.problem == "regression":
                student, teacher = student.reshape(len(student), -1), teacher.reshape(len(teacher), -1)
            return Term(self._row_loss(student, teacher, labels).sum(), "examples", weight)
        if labels is None and self.config.token_scaling is not None:
            raise LmcompressError("token_scaling needs labels; the batch has none")
        # positions without a label (padding, continuation pieces of a word) teach nothing the head is used for
        rows = _mask_of(step.inputs).bool() if labels is None else labels != -100
        chosen = None if labels is None else labels[rows]
        loss = self._row_loss(student[rows], teacher[rows], chosen)
        if self.config.token_scaling is not None and chosen is not None:
            surprise = F.cross_entropy(teacher[rows].float(), chosen, reduction="none")
            loss = loss * token_weights(surprise, by_document(rows, documents), self.config.token_scaling)
        return Term(loss.sum(), "tokens" if labels is None else "labels", weight)

    def _span_term(self, step: Step, student: Tensor, teacher: Tensor, weight: float) -> Term:
        """The mean of the losses on both ends, each over the tokens of a row that are not padding."""
        mask = _mask_of(step.inputs).bool()
        ends = [torch.cat([side.masked_fill(~mask, _NEVER) for side in logits.float().unbind(-1)])
                for logits in (student, teacher)]  # fmt: skip
        positions = [step.inputs[name] for name in SPAN_LABELS if name in step.inputs]
        loss = self._row_loss(ends[0], ends[1], torch.cat(positions) if positions else None)
        return Term(loss.sum() / 2, "examples", weight)

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
            soft=None if plain and self._logit_loss is LOGIT_LOSSES["kl"] and self._shared is None else self._row_loss,
            mean=self._mean_logits,
            tokens=self._tokens,
            autocast=self._autocast,
            crossing=self._crossing and f"{TEACHER_PREFIX}input_ids" in step.inputs,
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
        if self._shared is not None:
            return self._shared_loss(student, teacher, self._shared)
        return self._logit_loss.function(
            student,
            teacher,
            temperature=self._temperature(student, teacher),
            scale_by_temperature=self.config.scale_by_temperature,
            **self._loss_options,
        )

    def _shared_loss(self, student: Tensor, teacher: Tensor, shared: SharedTokens) -> Tensor:
        temperature, rest = self.config.temperature, self.config.shared_tokens == "with_rest"
        # at the temperature first: the rest is a sum of probabilities
        student, teacher = over_shared_tokens(
            student, teacher, shared.student, shared.teacher, temperature=temperature, rest=rest
        )
        rows = self._logit_loss.function(
            student, teacher, temperature=1.0, scale_by_temperature=False, **self._loss_options
        )
        return rows * temperature**2 if self.config.scale_by_temperature else rows

    def _temperature(self, student: Tensor, teacher: Tensor) -> float | Tensor:
        schedule = self.config.temperature_schedule
        if schedule.kind == "constant":
            return self.config.temperature
        limits: dict[str, Any] = {"minimum": schedule.minimum, "maximum": schedule.maximum, "beta": schedule.beta}
        if schedule.kind == "flsw":
            return flsw(student, teacher, self.config.temperature, gamma=schedule.gamma, **limits)
        return cwsm(student, self.config.temperature, **limits)


def _over_labels(term: Term, inputs: Mapping[str, Any]) -> Term:
    """A term over tokens of a decoder, or pairs of them: the units that a trainer counts are those of the encoder."""
    if term.unit == "tokens":
        return replace(term, unit="labels")
    if term.unit != "pairs":
        return term
    # the mean over the pairs of this micro-batch, which counts as much as it has tokens
    lengths = inputs["attention_mask"].sum(-1)
    share = lengths.sum() / (lengths * (lengths + 1) / 2).sum().clamp(min=1)
    return replace(term, total=term.total * share, unit="labels")


def _mask_of(inputs: Mapping[str, Any]) -> Tensor:
    """``(batch, length)``, 1 = real token; the choices of multiple choice are rows, one after the other."""
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    return mask.reshape(-1, mask.shape[-1])


def _unpacked(inputs: Mapping[str, Any], documents: Documents) -> dict[str, Any]:
    """A packed batch with one document in each row, a teacher's own columns included."""
    split = documents.of_inputs(inputs)
    own = teacher_inputs(inputs)
    if f"{TEACHER_PREFIX}input_ids" in inputs and (theirs := documents_in(own)) is not None:
        split |= {f"{TEACHER_PREFIX}{name}": value for name, value in theirs.of_inputs(own).items()}
    return split
