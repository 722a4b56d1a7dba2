"""Distillation as a method of the trainer: what the student is compared with, and what that adds to the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.capture import Capture, Feature, Features, resolve, shape_of
from lmcompress.distillation.config import DistillationConfig, Match
from lmcompress.distillation.contrastive import Contrasting, homogeneity, token_scaling
from lmcompress.distillation.emd import emd_hidden_mse
from lmcompress.distillation.layer_maps import nearest_in_order
from lmcompress.distillation.losses import js_divergence, loss_for, probability_shift
from lmcompress.distillation.matches import MatchLoss, hidden_mse, match_for
from lmcompress.distillation.projections import Projection
from lmcompress.distillation.schedules import WEIGHT_SCHEDULES, cwsm, flsw
from lmcompress.distillation.store.teacher import StoredTeacher
from lmcompress.distillation.teachers import Answers, LiveTeacher, Teacher, teacher_inputs
from lmcompress.distillation.textbrewer import read_textbrewer
from lmcompress.distillation.vocabulary import VocabularyLoss, vocabulary_loss
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.method import Step, Term
from lmcompress.model import CompressedModel

_LOGIT_LOSSES = {
    "auto": None,
    "kl": "kl_divergence",
    "ce": "soft_cross_entropy",
    "reverse_kl": "reverse_kl",
    "jsd": "js_divergence",
    "mse": "logit_mse",
}


class _Matched:
    """A match with everything that it needs found: features on both sides, a projection, its schedule."""

    def __init__(self, match: Match, number: int, student: PreTrainedModel, teacher: Teacher) -> None:
        self.loss: MatchLoss = match_for(match.loss, match.on)
        self.match = match
        self.name = f"{match.loss}_{number}"
        assert self.loss.feature is not None
        self.nearest = match.student == "nearest"
        if self.nearest and (self.loss.feature != "hidden" or self.loss.layers != 1):
            raise LmcompressError(
                f"student: nearest is for hidden states, one layer of each model; the match {match.loss!r} compares "
                f"{self.loss.layers} layer(s) of {self.loss.feature}: name its student layers"
            )
        # "nearest" stands for the first block until the first step chooses one
        wanted = (1,) if match.student == "nearest" else _layers(match.student), _layers(match.teacher)
        if {len(side) for side in wanted} != {self.loss.layers}:
            raise LmcompressError(
                f"the match {match.loss!r} takes {self.loss.layers} layer(s) of each model, got student "
                f"{match.student} and teacher {match.teacher}"
            )
        for option in match.options:
            if option not in self.loss.options:
                raise LmcompressError(
                    f"the match {match.loss!r} has no option {option!r}; it has: "
                    f"{', '.join(sorted(self.loss.options)) or 'none'}"
                )
        self.student = [resolve(student, self.loss.feature, layer) for layer in wanted[0]]
        self.teacher = [teacher.resolve(self.loss.feature, layer) for layer in wanted[1]]
        mine = [shape_of(student, feature) for feature in self.student]
        theirs = [teacher.shape_of(feature) for feature in self.teacher]
        self.projection = self._make_projection(mine[0][-1], theirs[0][-1], number)
        self._try(mine, theirs)

    def candidates(self, student: PreTrainedModel) -> list[Feature]:
        """The student's features that this match may look at."""
        if not self.nearest:
            return self.student
        return [("hidden", layer) for layer in range(1, len(anatomy_of(student).block_list) + 1)]

    def _make_projection(self, width: int, target: int, number: int) -> Projection | None:
        if self.match.projection == "none" or not self.loss.projectable:
            if self.match.projection not in ("none", "auto"):
                raise LmcompressError(f"the match {self.match.loss!r} takes no projection; leave it out")
            return None
        if self.match.projection == "auto":
            return Projection(width, target, "linear", seed=number) if width != target else None
        if self.nearest and width == target:
            # CoFi's: a random map would make the first choices of the nearest layer random
            return Projection(width, target, self.match.projection, initialisation="identity")
        return Projection(width, target, self.match.projection, seed=number)

    def _try(self, mine: Sequence[tuple[int, ...]], theirs: Sequence[tuple[int, ...]]) -> None:
        """Compare zeros of the right shapes: heads, widths and options that do not fit show before training."""
        length = 2
        student, teacher = (
            {
                feature: torch.zeros(1, *(size or length for size in shape))
                for feature, shape in zip(side, shapes, strict=True)
            }
            for side, shapes in ((self.student, mine), (self.teacher, theirs))
        )
        try:
            with torch.no_grad():
                self(student, teacher, torch.ones(1, length, dtype=torch.long), False)
        except (LmcompressError, TypeError) as error:
            layers = f"student layer {self.match.student}, teacher layer {self.match.teacher}"
            raise LmcompressError(f"the match {self.name} ({layers}) does not fit: {error}") from error

    def __call__(self, student: Features, teacher: Features, mask: Tensor, causal: bool) -> Tensor:
        mine = [student[feature] for feature in self.student]
        if self.projection is not None:
            mine = [self.projection(tensor) for tensor in mine]
        theirs = [teacher[feature].detach() for feature in self.teacher]
        if self.loss.layers == 1:
            return self.loss(mine[0], theirs[0], mask, causal=causal, **self.match.options).sum()
        return self.loss((mine[0], mine[1]), (theirs[0], theirs[1]), mask, causal=causal, **self.match.options).sum()


class Distillation:
    """Fits a student to one or several teachers: logits, and any features of any layers.

    Args:
        config: what is compared, and how it is weighed.
        teachers: models, or other sources (:class:`~lmcompress.distillation.teachers.StoredTeacher`).

    Raises:
        LmcompressError: no teacher, or weights for another number of teachers.
    """

    name = "distillation"

    def __init__(
        self, config: DistillationConfig, teachers: Teacher | PreTrainedModel | Sequence[Teacher | PreTrainedModel]
    ) -> None:
        given = list(teachers) if isinstance(teachers, Sequence) else [teachers]
        self.teachers: list[Teacher] = [_teacher(teacher) for teacher in given]
        if not self.teachers:
            raise LmcompressError("distillation needs at least one teacher")
        weights = config.teacher_weights or (1.0,) * len(self.teachers)
        if len(weights) != len(self.teachers):
            raise LmcompressError(f"teacher_weights has {len(weights)} values for {len(self.teachers)} teachers")
        self.config = config
        self._weights = [weight / sum(weights) for weight in weights]
        self._autocast: Any = None
        self._capture: Capture | None = None
        self._matches: list[_Matched] = []
        self._emd_projection: Projection | None = None
        self._contrast: Contrasting | None = None
        self._monitored: tuple[Feature, Feature] | None = None
        self._needed: list[bool] = []
        self._chosen_at: float | None = None

    @classmethod
    def from_textbrewer(
        cls,
        config: str | Path | Mapping[str, Any],
        teachers: Teacher | PreTrainedModel | Sequence[Teacher | PreTrainedModel],
    ) -> Distillation:
        """From TextBrewer's own ``DistillationConfig`` as JSON.

        Args:
            config: file, or the dictionary.
            teachers: as for the class.

        Returns:
            The method.

        Raises:
            LmcompressError: the file asks for something that has no meaning here; the message says what.
        """
        return cls(read_textbrewer(config), teachers)

    def prepare(self, trainer: Any) -> None:
        """Check student, teachers and matches against each other, put hooks, make projections.

        Args:
            trainer: the trainer; its ``student`` is the model without wrappers.

        Raises:
            LmcompressError: vocabularies, labels, layers or heads do not agree, or a loss does not fit the head.
        """
        contrast = self.config.contrast
        if contrast and contrast.level == "sequence" and trainer.args.per_device_train_batch_size < 2:
            raise LmcompressError(
                "a contrast of sequences needs others in the micro-batch: per_device_train_batch_size must be at least "
                f"2, got {trainer.args.per_device_train_batch_size}"
            )
        self.attach(trainer.student, trainer.args.device, trainer.accelerator.autocast)
        columns = _columns(trainer.train_dataset)
        if columns:
            self._check_tokens("teacher_input_ids" in columns)

    def attach(self, student: PreTrainedModel, device: torch.device, autocast: Any) -> None:
        """What :meth:`prepare` does, without a trainer.

        Args:
            student: the model, not wrapped.
            device: where it trains.
            autocast: makes the mixed-precision context in which teachers run.

        Raises:
            LmcompressError: as :meth:`prepare`.
        """
        self._autocast = autocast
        self._student = student
        self.problem = problem_type_of(student)
        # a masked language model is a token classifier over the vocabulary
        kind = "token_classification" if self.problem == "masked_lm" else self.problem
        self._logit_loss = loss_for(kind, _LOGIT_LOSSES[self.config.loss])
        self._causal = anatomy_of(student).family.causal
        self._chunked = self.problem == "causal_lm"
        if self.config.probability_shift and self.problem in ("regression", "multi_label_classification"):
            raise LmcompressError(f"probability_shift needs one right class; a head for {self.problem} has none")
        per_token = self.problem in ("token_classification", "masked_lm", "causal_lm")
        if self.config.token_scaling is not None and not per_token:
            raise LmcompressError(
                f"token_scaling weighs the tokens of a sequence; the student's head is for {self.problem} and has one "
                "answer for all: leave it out"
            )
        for teacher in self.teachers:
            if teacher.model is not None:
                _check_separate(student, teacher.model)
            if self.config.weight > 0:
                self._check_logits(student, teacher)
        for number, match in enumerate(self.config.matches):
            if match.which >= len(self.teachers):
                raise LmcompressError(
                    f"match {number} names teacher {match.which}; there are {len(self.teachers)}, from 0"
                )
        self._matches = [
            _Matched(match, number, student, self.teachers[match.which])
            for number, match in enumerate(self.config.matches)
        ]
        wanted = {feature for matched in self._matches for feature in matched.candidates(student)}
        asked: list[set[Feature]] = [set() for _ in self.teachers]
        for matched in self._matches:
            asked[matched.match.which].update(matched.teacher)
        if self.config.emd is not None:
            self._prepare_emd(student, wanted, asked)
        self._prepare_contrast(student, wanted, asked, device)
        if self._capture is not None:
            self._capture.remove()
        self._capture = Capture(student, wanted, last_hidden=self._chunked)
        logits = self.config.weight > 0
        self._needed = [logits or bool(features) for features in asked]
        for teacher, features in zip(self.teachers, asked, strict=True):
            teacher.prepare(sorted(features), logits=logits, causal=self._chunked, device=device)
        for module in self.modules().values():
            module.to(device)

    def _prepare_emd(self, student: PreTrainedModel, wanted: set[Feature], asked: list[set[Feature]]) -> None:
        assert self.config.emd is not None
        which = self.config.emd.which
        teacher = self.teachers[which].model if which < len(self.teachers) else None
        if teacher is None:
            raise LmcompressError(
                f"emd needs a teacher that runs, number {which} is none; there are {len(self.teachers)}"
            )
        self._emd_layers = [
            [("hidden", layer) for layer in range(1, len(anatomy_of(model).block_list) + 1)]
            for model in (student, teacher)
        ]
        wanted.update(self._emd_layers[0])
        asked[which].update(self._emd_layers[1])
        widths = anatomy_of(student).hidden_size, anatomy_of(teacher).hidden_size
        self._emd_projection = Projection(*widths, seed=len(self._matches)) if widths[0] != widths[1] else None
        try:
            mine, theirs = ([torch.zeros(1, 2, width)] for width in widths)
            emd_hidden_mse(mine, theirs, torch.ones(1, 2), projection=self._emd_projection)
        except ImportError as error:
            raise LmcompressError(str(error)) from error

    def _prepare_contrast(
        self, student: PreTrainedModel, wanted: set[Feature], asked: list[set[Feature]], device: torch.device
    ) -> None:
        contrast = self.config.contrast
        if contrast is None and not self.config.homogeneity:
            return
        which = contrast.which if contrast else 0
        if which >= len(self.teachers):
            raise LmcompressError(f"contrast names teacher {which}; there are {len(self.teachers)}, from 0")
        teacher = self.teachers[which]
        if contrast is None:
            self._monitored = resolve(student, "output", -1), teacher.resolve("output", -1)
        else:
            self._contrast = Contrasting(contrast, student, teacher, device)
            self._monitored = self._contrast.student, self._contrast.teacher
        wanted.add(self._monitored[0])
        asked[which].add(self._monitored[1])

    def _check_logits(self, student: PreTrainedModel, teacher: Teacher) -> None:
        if teacher.model is not None:
            _check_agreement(student, teacher.model, self.problem)
        elif isinstance(teacher, StoredTeacher):
            _check_store(student, teacher, self.problem, self.config.loss)

    def _check_tokens(self, separate: bool) -> None:
        """Refuse to feed one model's token ids to another whose vocabulary is of another size."""
        for teacher in self.teachers:
            if teacher.model is None or separate:
                continue
            sizes = self._student.config.vocab_size, teacher.model.config.vocab_size
            if sizes[0] != sizes[1]:
                raise LmcompressError(
                    f"the student has a vocabulary of {sizes[0]} tokens and the teacher one of {sizes[1]}, but both "
                    "would be given the same input_ids: tokenize for the teacher too and add its columns as "
                    "teacher_input_ids and teacher_attention_mask"
                )

    def before_forward(self, step: Step) -> None:
        """Ask a causal student for its hidden states only: the vocabulary comes in chunks.

        Args:
            step: the step.
        """
        if self._chunked:
            step.student_inputs = {**step.student_inputs, "logits_to_keep": 1, "use_cache": False}

    def label_weight(self, progress: float) -> float:
        """The weight of the labels; 0 for causal models, where the labels are part of the chunked term.

        Args:
            progress: share of the training done.

        Returns:
            What the loss of the head is multiplied by.
        """
        return 0.0 if self._chunked else self._label_weight(progress)

    def loss_terms(self, step: Step) -> dict[str, Term]:
        """The loss on the logits, and one term for each match.

        Args:
            step: with the student's outputs.

        Returns:
            ``kd`` (causal models: ``label+kd``), ``emd``, ``contrast``, and the matches as their name and number;
            ``homogeneity_student`` and ``homogeneity_teacher`` are measured only.
        """
        assert self._capture is not None
        self._check_batch(step.inputs)
        answers = self._answers(step)
        mask = step.inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(step.inputs["input_ids"])
        terms: dict[str, Term] = {}
        if self._chunked:
            if self.config.weight > 0 or self.config.label_weight > 0:
                terms |= self._chunked_terms(step, answers)
        elif self.config.weight > 0:
            terms["kd"] = self._logit_term(step, answers, mask)
        student = self._capture.take(mask)
        self._choose_nearest(step, student, answers, mask)
        for matched in self._matches:
            theirs = answers[matched.match.which].features
            weight = matched.match.weight * WEIGHT_SCHEDULES[matched.match.weight_schedule](step.progress)
            terms[matched.name] = Term(matched(student, theirs, mask, self._causal), matched.loss.unit, weight)
        if self.config.emd is not None:
            emd = self.config.emd
            mine = [student[feature] for feature in self._emd_layers[0]]
            theirs_all = [answers[emd.which].features[feature] for feature in self._emd_layers[1]]
            total = emd_hidden_mse(mine, theirs_all, mask, projection=self._emd_projection).sum()
            terms["emd"] = Term(total, "tokens", emd.weight * WEIGHT_SCHEDULES[emd.weight_schedule](step.progress))
        return terms | self._contrast_terms(step, student, answers, mask)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One optimizer group for each projection, with its own learning rate where one was given."""
        projections = [(matched.projection, matched.match.projection_learning_rate) for matched in self._matches]
        if self.config.emd is not None:
            projections.append((self._emd_projection, self.config.emd.projection_learning_rate))
        if self._contrast is not None:
            rate = self._contrast.contrast.projection_learning_rate
            projections += [(projection, rate) for projection in self._contrast.projections.values()]
        return [
            {"params": list(projection.parameters())} | ({} if learning_rate is None else {"lr": learning_rate})
            for projection, learning_rate in projections
            if projection is not None
        ]

    @property
    def max_norm(self) -> float | None:
        """Gradient norm to which projections are clipped; None: as the model."""
        return self.config.max_projection_norm

    def modules(self) -> dict[str, nn.Module]:
        """The projections by name, and the memory of a contrast."""
        found: dict[str, nn.Module] = {m.name: m.projection for m in self._matches if m.projection is not None}
        if self._emd_projection is not None:
            found["emd"] = self._emd_projection
        return found if self._contrast is None else found | self._contrast.modules()

    def finish(self) -> None:
        """Take the hooks off student and teachers."""
        if self._capture is not None:
            self._capture.remove()
        for teacher in self.teachers:
            teacher.release()

    def set_active(self, active: bool) -> None:
        """Let the hooks on the student keep something or not; they cost nothing while they do not.

        Args:
            active: whether they keep.
        """
        if self._capture is not None:
            self._capture.active = active

    def _choose_nearest(self, step: Step, student: Features, answers: Sequence[Answers], mask: Tensor) -> None:
        """Choose the layer of every match with ``student: nearest``, on the first micro-batch of an optimizer step.

        Blocks that pruning has closed are no candidates: a method says so in ``step.shared["surviving_layers"]``.
        """
        matches = [matched for matched in self._matches if matched.nearest]
        if not matches or self._chosen_at == step.progress:
            return
        self._chosen_at = step.progress
        every = [layer for _, layer in matches[0].candidates(self._student)]
        layers = list(step.shared.get("surviving_layers") or every)
        for which in sorted({matched.match.which for matched in matches}):
            # of several matches with one layer of the teacher the first decides for all
            first = {m.teacher[0]: m for m in reversed(matches) if m.match.which == which}
            wanted = sorted(first)
            with torch.no_grad():
                distances = torch.stack(
                    [
                        torch.stack(
                            [_distance(first[feature], student["hidden", layer], theirs, mask) for layer in layers]
                        )
                        for feature in wanted
                        for theirs in [answers[which].features[feature]]
                    ]
                )
            pairs = nearest_in_order(distances, layers, [layer for _, layer in wanted])
            chosen = {teacher: layer for layer, teacher in pairs}
            for matched in matches:
                if matched.match.which == which:
                    matched.student = [("hidden", chosen[matched.teacher[0][1]])]

    def _contrast_terms(
        self, step: Step, student: Features, answers: Sequence[Answers], mask: Tensor
    ) -> dict[str, Term]:
        if self._monitored is None:
            return {}
        which = self._contrast.contrast.which if self._contrast else 0
        theirs = answers[which].features
        terms: dict[str, Term] = {}
        if self._contrast is not None:
            terms["contrast"] = self._contrast.term(student, theirs, step.inputs, mask, step.progress)
        told = teacher_inputs(step.inputs).get("attention_mask")
        states = {"student": student[self._monitored[0]], "teacher": theirs[self._monitored[1]]}
        for (side, tensor), valid in zip(states.items(), (mask, told), strict=True):
            alike = homogeneity(tensor, torch.ones(tensor.shape[:2], device=tensor.device) if valid is None else valid)
            terms[f"homogeneity_{side}"] = Term(alike.sum(), "examples", 0.0, measured=True)
        return terms

    def _label_weight(self, progress: float) -> float:
        return self.config.label_weight * WEIGHT_SCHEDULES[self.config.label_weight_schedule](progress)

    def _soft_weight(self, progress: float) -> float:
        return self.config.weight * WEIGHT_SCHEDULES[self.config.weight_schedule](progress)

    def _answers(self, step: Step) -> list[Answers]:
        # by identity: two methods with the same teacher share its one forward pass
        known = step.shared.setdefault("answers", {})
        for teacher, needed in zip(self.teachers, self._needed, strict=True):
            if needed and id(teacher) not in known:
                known[id(teacher)] = teacher.answer(step.inputs, self._autocast)
        return [known.get(id(teacher), Answers(None, None, {})) for teacher in self.teachers]

    def _check_batch(self, inputs: Mapping[str, Any]) -> None:
        # shapes and types only: nothing waits for the device
        self._check_tokens("teacher_input_ids" in inputs)
        labels = inputs.get("labels")
        if labels is not None and labels.is_floating_point() and self.problem == "single_label_classification":
            raise LmcompressError(
                "the labels are floating-point numbers, but the student's head is for one class of several: set "
                "config.problem_type of student and teacher to 'multi_label_classification' or 'regression'"
            )
        per_token = self.config.weight > 0 and self.problem in ("token_classification", "masked_lm", "causal_lm")
        contrast = self.config.contrast
        per_token = per_token or (contrast is not None and contrast.level == "token")
        if per_token and "teacher_input_ids" in inputs:
            lengths = inputs["input_ids"].shape[1], teacher_inputs(inputs)["input_ids"].shape[1]
            if lengths[0] != lengths[1]:
                raise LmcompressError(
                    f"student and teacher see sequences of {lengths[0]} and {lengths[1]} tokens: a loss per token "
                    "needs one tokenisation for both"
                )

    def _temperature(self, student: Tensor, teacher: Tensor) -> float | Tensor:
        schedule = self.config.temperature_schedule
        if schedule.kind == "constant":
            return self.config.temperature
        limits: dict[str, Any] = {"minimum": schedule.minimum, "maximum": schedule.maximum, "beta": schedule.beta}
        if schedule.kind == "flsw":
            return flsw(student, teacher, self.config.temperature, gamma=schedule.gamma, **limits)
        return cwsm(student, self.config.temperature, **limits)

    def _row_loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        student, teacher = student.float(), teacher.float()
        if self.config.probability_shift:
            if labels is None:
                raise LmcompressError("probability_shift needs labels; the batch has none")
            teacher = probability_shift(teacher, labels)
        options: dict[str, Any] = {"beta": self.config.beta} if self._logit_loss is js_divergence else {}
        return self._logit_loss(
            student,
            teacher,
            temperature=self._temperature(student, teacher),
            scale_by_temperature=self.config.scale_by_temperature,
            **options,
        )

    def _mean_logits(self, logits: Sequence[Tensor]) -> Tensor:
        if len(logits) == 1:
            return logits[0]
        mean = torch.zeros_like(logits[0], dtype=torch.float32)
        for weight, one in zip(self._weights, logits, strict=True):
            mean += weight * one
        return mean

    def _logit_term(self, step: Step, answers: Sequence[Answers], mask: Tensor) -> Term:
        student = step.outputs["logits"]
        teacher = self._mean_logits([answer.logits for answer in answers if answer.logits is not None])
        weight = self._soft_weight(step.progress)
        labels = step.inputs.get("labels")
        if self.problem not in ("token_classification", "masked_lm"):
            if self.problem == "regression":
                student, teacher = student.reshape(len(student), -1), teacher.reshape(len(teacher), -1)
            return Term(self._row_loss(student, teacher, labels).sum(), "examples", weight)
        # positions without a label (padding, further pieces of a word) teach nothing the head is used for
        if labels is not None:
            rows = labels != -100
            loss = self._row_loss(student[rows], teacher[rows], labels[rows])
            if self.config.token_scaling is not None:
                surprise = F.cross_entropy(teacher[rows].float(), labels[rows], reduction="none")
                loss = loss * self._token_weights(surprise, rows)
            return Term(loss.sum(), "labels", weight)
        if self.config.token_scaling is not None:
            raise LmcompressError("token_scaling needs labels; the batch has none")
        rows = mask.bool()
        return Term(self._row_loss(student[rows], teacher[rows], None).sum(), "tokens", weight)

    def _chunked_terms(self, step: Step, answers: Sequence[Answers]) -> dict[str, Term]:
        assert self._capture is not None
        hidden = self._capture.take_last_hidden()
        labels = next_token_labels(step.inputs)
        rows = (labels != -100).flatten().nonzero().squeeze(1)
        chunks = [answer.chunk(rows) for answer in answers if answer.chunk is not None]
        head = anatomy_of(self._capture.model).head
        assert head is not None
        temperature = self.config.temperature
        asked = VocabularyLoss(
            label_weight=self._label_weight(step.progress) if "labels" in step.inputs else 0.0,
            soft_weight=self._soft_weight(step.progress),
            temperature=temperature,
            scale=temperature**2 if self.config.scale_by_temperature else 1.0,
            soft=None if self._closed_form else self._row_loss_of_chunk,
            chunk=self.config.chunk_tokens,
            retain=step.retain_graph,
        )

        def teacher_logits(start: int, stop: int) -> Tensor:
            return self._mean_logits([chunk(start, stop) for chunk in chunks])

        targets = labels.flatten()[rows]
        weights = None
        if self.config.token_scaling is not None and asked.soft_weight > 0 and len(rows):
            # every token's weight depends on the whole sequence: the teacher's head runs twice
            starts = range(0, len(rows), asked.chunk)
            surprise = [
                F.cross_entropy(
                    teacher_logits(n, n + asked.chunk).float(), targets[n : n + asked.chunk], reduction="none"
                )
                for n in starts
            ]
            weights = self._token_weights(torch.cat(surprise), labels != -100)
        with self._autocast():
            total, label_sum, soft_sum = vocabulary_loss(
                _entering(head, hidden).flatten(0, 1)[rows], head.weight, targets, teacher_logits, asked, weights
            )
        # a part that is not asked for is no dead term
        sums = (("label", label_sum, asked.label_weight), ("kd", soft_sum, asked.soft_weight))
        return {"label+kd": Term(total, "labels", parts={name: part for name, part, weight in sums if weight > 0})}

    def _token_weights(self, surprise: Tensor, rows: Tensor) -> Tensor:
        """Weights ``(n,)`` of the tokens that ``rows`` ``(batch, length)`` marks, from their cross-entropies."""
        assert self.config.token_scaling is not None
        table = surprise.new_zeros(rows.shape).masked_scatter(rows, surprise)
        return token_scaling(table, rows, temperature=self.config.token_scaling)[rows]

    @property
    def _closed_form(self) -> bool:
        plain = self.config.temperature_schedule.kind == "constant" and not self.config.probability_shift
        return plain and self.config.loss in ("auto", "kl")

    def _row_loss_of_chunk(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self._row_loss(student, teacher, labels)


def next_token_labels(inputs: Mapping[str, Any]) -> Tensor:
    """For each position the token that comes next, −100 where none counts; the last position never has one.

    Args:
        inputs: a causal batch; without ``labels`` the next real token is taken.

    Returns:
        ``(batch, length)`` int64.
    """
    labels = inputs.get("labels")
    if labels is None:
        labels = inputs["input_ids"]
        if (mask := inputs.get("attention_mask")) is not None:
            # the first real token after padding on the left has nothing that it could be told from
            before = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=0)
            labels = labels.masked_fill((mask == 0) | (before == 0), -100)
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def problem_type_of(model: PreTrainedModel) -> str:
    """What kind of head a model has, as :func:`~lmcompress.distillation.losses.loss_for` names it, or ``masked_lm``.

    Args:
        model: with a head.

    Returns:
        Such as ``"regression"``.

    Raises:
        LmcompressError: the head is of no kind that logits can be distilled for.
    """
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        stated = getattr(model.config, "problem_type", None)
        return stated or ("regression" if model.config.num_labels == 1 else "single_label_classification")
    if name.endswith("ForTokenClassification"):
        return "token_classification"
    if name.endswith("ForMaskedLM"):
        return "masked_lm"
    if anatomy_of(model).head is not None:
        return "causal_lm"
    raise LmcompressError(
        f"cannot distil the logits of {name}: known are ...ForSequenceClassification, ...ForTokenClassification, "
        "...ForMaskedLM and causal language models"
    )


def _entering(head: nn.Module, hidden: Tensor) -> Tensor:
    """What the head multiplies: chunks go round its forward, but not round the hooks that quantize its input."""
    for key, hook in head._forward_pre_hooks.items():
        if key in head._forward_pre_hooks_with_kwargs:
            (hidden, *_), _ = hook(head, (hidden,), {}) or ((hidden,), {})
        elif (changed := hook(head, (hidden,))) is not None:
            hidden = changed[0] if isinstance(changed, tuple) else changed
    return hidden


def _layers(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _distance(matched: _Matched, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    mine = student if matched.projection is None else matched.projection(student)
    return hidden_mse(mine, teacher, mask).sum()


def _teacher(given: Any) -> Teacher:
    model = given.model if isinstance(given, CompressedModel) else given
    if isinstance(model, PreTrainedModel):
        return LiveTeacher(model)
    if isinstance(model, (str, Path, nn.Module)):
        raise LmcompressError(
            f"a teacher must be a PreTrainedModel, or a source such as StoredTeacher, got {type(model).__name__}; "
            "load a path with load_teacher"
        )
    return model


def _columns(dataset: Any) -> Sequence[str]:
    """Names of the columns of a data set, or none where they cannot be known without using it up."""
    if (names := getattr(dataset, "column_names", None)) is not None:
        return list(names)
    if isinstance(dataset, Sequence) and dataset and isinstance(dataset[0], Mapping):
        return list(dataset[0])
    return []


def _check_separate(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    own = {id(parameter) for parameter in student.parameters()}
    if student is teacher or any(id(parameter) in own for parameter in teacher.parameters()):
        raise LmcompressError(
            "student and teacher share parameters, so there would be nothing to learn and the student would be frozen: "
            "load the teacher a second time, or use copy.deepcopy(model)"
        )


def _check_store(student: PreTrainedModel, teacher: StoredTeacher, problem: str, loss: str) -> None:
    meta, folder = teacher.store.meta, teacher.store.folder
    unit = "row" if problem in ("single_label_classification", "multi_label_classification", "regression") else "token"
    if meta.logits != unit:
        raise LmcompressError(
            f"the student's head is for {problem} and needs logits per {unit}; the teacher store {folder} has them "
            f"per {meta.logits}"
        )
    size, of = (
        (student.config.vocab_size, "tokens")
        if problem in ("causal_lm", "masked_lm")
        else (student.config.num_labels, "labels")
    )
    if meta.vocab_size != size:
        raise LmcompressError(
            f"the student has {size} {of}, the teacher store {folder} was made for {meta.vocab_size}: they must agree"
        )
    sigmoid = problem in ("multi_label_classification", "regression")
    if meta.top_k is not None and meta.top_k < meta.vocab_size and (sigmoid or loss == "mse"):
        raise LmcompressError(
            f"the teacher store {folder} keeps the top {meta.top_k} of {meta.vocab_size} logits, which describe a "
            f"softmax; {'a head for ' + problem if sigmoid else 'the loss mse'} needs all of them: build it again "
            "without top_k"
        )


def _check_agreement(student: PreTrainedModel, teacher: PreTrainedModel, problem: str) -> None:
    names = [str(model.config.name_or_path or type(model).__name__) for model in (student, teacher)]
    if problem in ("causal_lm", "masked_lm"):
        sizes = student.config.vocab_size, teacher.config.vocab_size
        if sizes[0] != sizes[1]:
            raise LmcompressError(
                f"student and teacher must share a vocabulary: {names[1]} has {sizes[1]} tokens, {names[0]} has "
                f"{sizes[0]}. Choose a student of the teacher's family, or resize its embeddings with "
                "resize_token_embeddings"
            )
        return
    if problem_type_of(teacher) != problem:
        raise LmcompressError(
            f"the student's head is for {problem}, the teacher's ({names[1]}) for {problem_type_of(teacher)}"
        )
    labels = student.config.num_labels, teacher.config.num_labels
    if labels[0] != labels[1]:
        raise LmcompressError(
            f"the student has {labels[0]} labels, the teacher ({names[1]}) has {labels[1]}: they must agree"
        )
    mine, theirs = ([str(model.config.id2label.get(i, i)) for i in range(labels[0])] for model in (student, teacher))
    generic = [f"LABEL_{i}" for i in range(labels[0])]
    if mine != theirs and generic not in (mine, theirs):
        raise LmcompressError(
            f"student and teacher name their labels differently: {mine[:5]} and {theirs[:5]}; "
            "set id2label and label2id of the student's config to the teacher's"
        )
