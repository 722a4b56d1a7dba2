"""Distillation as a method of the trainer: setup before and cleanup after training; the step itself is in step.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lmcompress.activations.capture import Capture, Feature
from lmcompress.distillation.checks import (
    check_config,
    check_teacher,
    checked_loss,
    columns_of,
    loss_options,
    problem_type_of,
    refused_inputs,
)
from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.contrastive.term import ContrastTerm, Homogeneity
from lmcompress.distillation.emd import EmdTerm
from lmcompress.distillation.matched import matched, nearest_chooser
from lmcompress.distillation.step import DistillationStep, FeatureTerm
from lmcompress.distillation.teachers import LiveTeacher, Teacher, Teachers
from lmcompress.distillation.textbrewer import read_textbrewer
from lmcompress.errors import LmcompressError
from lmcompress.model import CompressedModel


class Distillation(DistillationStep):
    """Fits a student to one or several teachers: logits, and any features of any layers.

    Args:
        config: the compared features and their weights.
        teachers: models, or other sources (:class:`~lmcompress.distillation.teachers.StoredTeacher`).

    Raises:
        LmcompressError: If there is no teacher, or the number of weights differs from the number of teachers.
    """

    name = "distillation"

    def __init__(self, config: DistillationConfig, teachers: Teachers) -> None:
        given = list(teachers) if isinstance(teachers, Sequence) else [teachers]
        self.teachers = [_teacher(teacher) for teacher in given]
        if not self.teachers:
            raise LmcompressError("distillation needs at least one teacher")
        weights = config.teacher_weights or (1.0,) * len(self.teachers)
        if len(weights) != len(self.teachers):
            raise LmcompressError(f"teacher_weights has {len(weights)} values for {len(self.teachers)} teachers")
        self.config = config
        self._shares = [weight / sum(weights) for weight in weights]
        self._parts = []

    @classmethod
    def from_textbrewer(cls, config: str | Path | Mapping[str, Any], teachers: Teachers) -> Distillation:
        """From TextBrewer's own ``DistillationConfig`` as JSON.

        Args:
            config: file, or the dictionary.
            teachers: as for the class.

        Returns:
            The method.

        Raises:
            LmcompressError: If the file requests something that has no equivalent here; the message names it.
        """
        return cls(read_textbrewer(config), teachers)

    def prepare(self, trainer: Any) -> None:
        """Check student, teachers and matches against each other, add hooks, create projections.

        Args:
            trainer: the trainer; its ``student`` is the model without wrappers.

        Raises:
            LmcompressError: If vocabularies, labels, layers or heads do not agree, or a loss does not fit the head.
        """
        contrast = self.config.contrast
        if contrast and contrast.level == "sequence" and trainer.args.per_device_train_batch_size < 2:
            raise LmcompressError(
                "a contrast of sequences needs others in the micro-batch: per_device_train_batch_size must be at least "
                f"2, got {trainer.args.per_device_train_batch_size}"
            )
        self.attach(trainer.student, trainer.args.device, trainer.accelerator.autocast)
        columns = columns_of(trainer.train_dataset)
        if columns and self._refused_inputs is not None and "teacher_input_ids" not in columns:
            raise LmcompressError(self._refused_inputs)

    def attach(self, student: PreTrainedModel, device: torch.device, autocast: Any) -> None:
        """The same as :meth:`prepare`, without a trainer.

        Args:
            student: the model, not wrapped.
            device: training device.
            autocast: creates the mixed-precision context in which teachers run.

        Raises:
            LmcompressError: If anything does not fit, as in :meth:`prepare`.
        """
        self._autocast = autocast
        self.problem = problem_type_of(student)
        self._logit_loss = checked_loss(self.config, student, self.problem)
        self._loss_options = loss_options(self.config, self._logit_loss)
        check_config(self.config, self.problem)
        logits = self.config.weight > 0
        for teacher in self.teachers:
            check_teacher(student, teacher, self.problem, self._logit_loss if logits else None)
        self._refused_inputs = refused_inputs(student, self.teachers)
        self._parts = self._feature_terms(student, device)
        wanted = {feature for part in self._parts for feature in part.captured}
        asked: list[set[Feature]] = [set() for _ in self.teachers]
        for part in self._parts:
            asked[part.which].update(part.teacher)
        if self._capture is not None:
            self._capture.remove()
        self._capture = Capture(student, wanted, last_hidden=self._chunked)
        self._needed = [logits or bool(features) for features in asked]
        for teacher, features in zip(self.teachers, asked, strict=True):
            teacher.prepare(sorted(features), logits=logits, causal=self._chunked, device=device)
        for module in self.modules().values():
            module.to(device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One optimizer group for each projection, with its own learning rate where one was given."""
        return [
            {"params": parameters} | ({} if part.learning_rate is None else {"lr": part.learning_rate})
            for part in self._parts
            for module in part.modules.values()
            if (parameters := list(module.parameters()))
        ]

    @property
    def max_norm(self) -> float | None:
        """Max gradient norm of the projections; None: the model's."""
        return self.config.max_projection_norm

    def modules(self) -> dict[str, nn.Module]:
        """The projections by name, and the memory of a contrast."""
        return {name: module for part in self._parts for name, module in part.modules.items()}

    def set_active(self, active: bool) -> None:
        """Switch the hooks on the student on or off; they cost nothing while off.

        Args:
            active: whether they record.
        """
        if self._capture is not None:
            self._capture.active = active

    def finish(self) -> None:
        """Remove the hooks on student and teachers."""
        if self._capture is not None:
            self._capture.remove()
        for teacher in self.teachers:
            teacher.release()

    def _feature_terms(self, student: PreTrainedModel, device: torch.device) -> list[FeatureTerm]:
        config, count = self.config, len(self.teachers)
        for number, match in enumerate(config.matches):
            if match.which >= count:
                raise LmcompressError(f"match {number} names teacher {match.which}; there are {count}, from 0")
        matches = [matched(match, n, student, self.teachers[match.which]) for n, match in enumerate(config.matches)]
        self._choose_nearest = nearest_chooser(matches)
        parts: list[FeatureTerm] = [*matches]
        if config.emd is not None:
            parts.append(EmdTerm(config.emd, student, self.teachers, seed=len(matches)))
        contrast = config.contrast
        if contrast is not None and contrast.which >= count:
            raise LmcompressError(f"contrast names teacher {contrast.which}; there are {count}, from 0")
        if contrast is not None:
            parts.append(ContrastTerm(contrast, student, self.teachers[contrast.which], device))
        if contrast is not None or config.homogeneity:
            parts.append(Homogeneity(contrast, student, self.teachers[contrast.which if contrast else 0]))
        return parts


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
