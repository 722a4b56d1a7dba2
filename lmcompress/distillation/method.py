"""Distillation as a method of the trainer: setup before and cleanup after training; the step itself is in step.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.activations.capture import Capture, Feature
from lmcompress.distillation.caching import stored_once
from lmcompress.distillation.checks import (
    check_config,
    check_crossing_models,
    check_teacher,
    checked_loss,
    columns_of,
    compared_tokens,
    crosses,
    loss_options,
    problem_of,
    refused_inputs,
)
from lmcompress.distillation.config import DistillationConfig
from lmcompress.distillation.contrastive.term import ContrastTerm, Homogeneity
from lmcompress.distillation.crossing import SharedTokens, shared_tokens
from lmcompress.distillation.emd import EmdTerm
from lmcompress.distillation.matched import matched, nearest_chooser
from lmcompress.distillation.on_policy import StudentTexts
from lmcompress.distillation.step import DistillationStep, FeatureTerm
from lmcompress.distillation.teachers import LiveTeacher, Teacher, Teachers
from lmcompress.distillation.textbrewer import CountedFrom, caches_logits, read_textbrewer
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, inner_model
from lmcompress.families.refusal import refuse_unproven
from lmcompress.model import unwrapped


class Distillation(DistillationStep):
    """Fits a student to one or several teachers: logits, and any features of any layers.

    Args:
        config: the compared features and their weights.
        teachers: models, or other sources (:class:`~lmcompress.distillation.teachers.StoredTeacher`).
        store: folder in which the logits of models are written once, before training, and read from in every epoch;
            True: ``teacher_store`` in the trainer's output folder; False: models run in every step.

    Raises:
        LmcompressError: If there is no teacher, or the number of weights differs from the number of teachers.
    """

    name = "distillation"
    goes_on = True
    captures = True

    def __init__(self, config: DistillationConfig, teachers: Teachers, *, store: str | Path | bool = False) -> None:
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
        self._store = store
        self._texts: StudentTexts | None = None
        # the teachers to release, one entry for each call of their prepare
        self._prepared: list[Teacher] = []

    @classmethod
    def from_textbrewer(
        cls,
        config: str | Path | Mapping[str, Any],
        teachers: Teachers,
        *,
        attention_from: CountedFrom = "auto",
        store: str | Path | None = None,
    ) -> Distillation:
        """From TextBrewer's own ``DistillationConfig`` as JSON.

        With ``is_caching_logits`` the teachers run once, before training: their logits are written to a teacher store,
        from which every epoch reads.

        Args:
            config: file, or the dictionary.
            teachers: as for the class.
            attention_from: what attention layer 0 is; see :func:`~lmcompress.distillation.textbrewer.read_textbrewer`.
            store: folder of that store; default: ``teacher_store`` in the trainer's output folder.

        Returns:
            The method.

        Raises:
            LmcompressError: If the file requests something that has no equivalent here; the message names it.
        """
        models = [teacher.model for teacher in cls(DistillationConfig(), teachers).teachers]
        layers = next((len(anatomy_of(model).block_list) for model in models if model is not None), None)
        read = read_textbrewer(config, attention_from=attention_from, teacher_layers=layers)
        caches = caches_logits(config)
        return cls(read, teachers, store=(store or True) if caches else False)

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
        if self._store:
            if self.config.on_policy is not None:
                raise LmcompressError(
                    "a store holds outputs for the training rows, and on_policy trains on other "
                    "texts: leave store or on_policy out"
                )
            folder = None if self._store is True else Path(self._store)
            self.teachers = [stored_once(t, n, trainer, folder) for n, t in enumerate(self.teachers)]
        tokenizer = getattr(trainer, "processing_class", None)
        self.attach(trainer.student, trainer.args.device, trainer.accelerator.autocast, tokenizer)
        if self.config.on_policy is not None and self.config.on_policy.fraction > 0:
            args, autocast = trainer.args, trainer.accelerator.autocast
            self._texts = StudentTexts(self.config.on_policy, self._student, args.seed, args.process_index, autocast)
        self._refuse_reentrant(trainer.args)
        columns = columns_of(trainer.train_dataset)
        if columns and self._refused_inputs is not None and "teacher_input_ids" not in columns:
            raise LmcompressError(self._refused_inputs)

    def replaces_batches(self, step: int) -> bool:
        """Whether the student writes the texts of a step; see ``on_policy``.

        Args:
            step: optimizer steps done.
        """
        self._own_texts = self._texts is not None and self._texts.chosen(step)
        return self._own_texts

    def replace_batches(self, batches: list[Any], step: int) -> list[Any]:
        """Texts that the student writes, with the prompts of the batches.

        Args:
            batches: the micro-batches of an optimizer step.
            step: optimizer steps done.

        Returns:
            As many batches to train on in their place; the same ones if the student writes none.
        """
        if self._texts is None:
            return batches
        return [self._texts.written(batch, step, number) for number, batch in enumerate(batches)]

    def attach(
        self,
        student: PreTrainedModel,
        device: torch.device,
        autocast: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """The same as :meth:`prepare`, without a trainer.

        Args:
            student: the model, not wrapped.
            device: training device.
            autocast: creates the mixed-precision context in which teachers run.
            tokenizer: the student's, for ``shared_tokens``.

        Raises:
            LmcompressError: If anything does not fit, as in :meth:`prepare`.
        """
        self._autocast = autocast
        student = inner_model(student)
        refuse_unproven(student, "distillation")
        self.problem = problem_of(student, self.config)
        self._chunked = self.problem == "causal_lm" and anatomy_of(student).head is not None
        self._logit_loss = checked_loss(self.config, student, self.problem)
        self._loss_options = loss_options(self.config, self._logit_loss)
        check_config(self.config, self.problem)
        logits = self.config.weight > 0
        self._crossing = crosses(self.config)
        for teacher in self.teachers:
            loss = self._logit_loss if logits else None
            check_teacher(student, teacher, self.problem, loss, self.config.vocab_size, across=self._crossing)
        if self.config.on_policy is not None and any(teacher.model is None for teacher in self.teachers):
            raise LmcompressError("on_policy needs teachers that run, got a store, which has no outputs for new texts")
        if self._crossing:
            check_crossing_models(student, self.teachers, has_head=self._chunked)
        self._tokens = compared_tokens(student, self.teachers, self.problem, self.config.vocab_size)
        self._refused_inputs = refused_inputs(
            student, self.teachers, self.config.vocab_size, always=self.config.shared_tokens is not None
        )
        self._shared = self._tokens_shared(tokenizer)
        if self._shared is not None:
            self._shared = self._shared.to(device)
        self._parts = self._feature_terms(student, device)
        for module in self.modules().values():
            module.to(device)
        self._listen(student, device)

    def _tokens_shared(self, tokenizer: PreTrainedTokenizerBase | None) -> SharedTokens | None:
        if self.config.shared_tokens is None:
            return None
        own = getattr(self.teachers[0], "tokenizer", None)
        if tokenizer is None or own is None:
            raise LmcompressError(
                "shared_tokens needs both tokenizers: give the student's to the trainer as processing_class, and the "
                "teacher's as LiveTeacher(model, tokenizer)"
            )
        return shared_tokens(tokenizer, own)

    def _listen(self, student: PreTrainedModel, device: torch.device) -> None:
        """Add hooks to the student, and borrow the teachers."""
        self._student = student
        logits = self.config.weight > 0
        wanted = {feature for part in self._parts for feature in part.captured}
        asked: list[set[Feature]] = [set() for _ in self.teachers]
        for part in self._parts:
            asked[part.which].update(part.teacher)
        self.release()
        self._needed = [logits or bool(features) for features in asked]
        try:
            self._capture = Capture(student, wanted, last_hidden=self._chunked)
            for teacher, features in zip(self.teachers, asked, strict=True):
                teacher.prepare(sorted(features), logits=logits, causal=self._chunked, device=device)
                self._prepared.append(teacher)
        except BaseException:
            # such as a device that is full
            self.release()
            raise

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One optimizer group for each projection, with its own learning rate where one was given."""
        return [
            {"params": parameters, **part.optimizer_options}
            | ({} if part.learning_rate is None else {"lr": part.learning_rate})
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
        """Remove the hooks on student and teachers, and give the teachers back."""
        self.release()

    def release(self) -> None:
        """Give everything back that was borrowed: hooks, and the teachers' gradients, modes and devices.

        Projections and a contrast's memory stay, so that their state can be saved. Safe to call twice; after it,
        :meth:`prepare` or :meth:`attach` begins anew.
        """
        if self._capture is not None:
            self._capture.remove()
            self._capture = None
        while self._prepared:
            self._prepared.pop().release()

    def resume(self, trainer: Any) -> None:
        """Listen to the student and borrow the teachers again, with the same projections.

        Args:
            trainer: as for :meth:`prepare`.
        """
        if self._capture is None:
            self._listen(self._student, trainer.args.device)

    def _refuse_reentrant(self, args: Any) -> None:
        names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
        options = next((getattr(args, name) for name in names if hasattr(args, name)), None)
        if self._parts and (options or {}).get("use_reentrant"):
            self.release()
            raise LmcompressError(
                "features of a student have no gradient under reentrant checkpointing: use_reentrant must be False "
                "(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )

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
    model = unwrapped(given)
    # LiveTeacher says what a teacher is
    return model if hasattr(model, "prepare") and hasattr(model, "answer") else LiveTeacher(model)
