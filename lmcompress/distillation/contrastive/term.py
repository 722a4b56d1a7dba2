"""A contrast as a term of the loss: layers, projections and memory found, and one micro-batch compared."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.activations.capture import Features, resolve, shape_of
from lmcompress.distillation.config import Contrast
from lmcompress.distillation.contrastive.losses import homogeneity, info_nce, sequence_contrast, token_contrast
from lmcompress.distillation.contrastive.memory import MemoryBank
from lmcompress.distillation.projections import Projection
from lmcompress.distillation.step import FeatureTerm, scheduled
from lmcompress.distillation.teachers import Teacher, teacher_inputs
from lmcompress.errors import LmcompressError
from lmcompress.method import Step, Term


class ContrastTerm(FeatureTerm):
    """A :class:`Contrast` with everything that it needs found: layers on both sides, projections, a memory bank.

    Args:
        contrast: what is asked for.
        student: not wrapped.
        teacher: that ``contrast.which`` names.
        device: where training happens; the bank is made there.

    Raises:
        LmcompressError: If a layer is not there, or widths differ and are not brought together.
    """

    def __init__(
        self, contrast: Contrast, student: PreTrainedModel, teacher: Teacher, device: torch.device | str
    ) -> None:
        self.contrast, self.which, self.learning_rate = contrast, contrast.which, contrast.projection_learning_rate
        self.student = [resolve(student, *contrast.feature("student"))]
        self.teacher = [teacher.resolve(*contrast.feature("teacher"))]
        widths = shape_of(student, self.student[0])[-1], teacher.shape_of(self.teacher[0])[-1]
        self._projections = _projections(contrast.projection, *widths)
        self.modules = {f"contrast_{side}": module for side, module in self._projections.items()}
        self.bank: MemoryBank | None = None
        if contrast.level == "token" and contrast.memory == "vocabulary":
            width = self._projections["student"].teacher_dim if "student" in self._projections else widths[0]
            size = student.config.vocab_size
            self.bank = MemoryBank(size, width, momentum=contrast.momentum, device=device)
            self.modules["contrast_bank"] = self.bank
        self._step: float | None = None

    def terms(self, student: Features, teacher: Features, step: Step, mask: Tensor) -> dict[str, Term]:
        """The term ``contrast`` of one micro-batch, a sum over tokens or over sequences; see :class:`FeatureTerm`.

        Args:
            student: features of the student.
            teacher: features of the teacher.
            step: with the batch, and the progress: when it changes, an optimizer step is over.
            mask: ``(batch, length)`` of the student.

        Returns:
            One, by its name.

        Raises:
            LmcompressError: If there are no token ids where they are needed.
        """
        wanted = self.contrast
        mine, theirs = student[self.student[0]], teacher[self.teacher[0]].detach()
        if "student" in self._projections:
            mine = self._projections["student"](mine)
        if "teacher" in self._projections:
            theirs = self._projections["teacher"](theirs)
        weight = scheduled(wanted.weight, wanted.weight_schedule, step.progress)
        if wanted.level == "sequence":
            other = teacher_inputs(step.inputs).get("attention_mask")
            if other is None:
                other = torch.ones(theirs.shape[:2], device=theirs.device)
            loss = sequence_contrast(mine, theirs, mask, temperature=wanted.temperature, teacher_mask=other)
            return {"contrast": Term(loss.sum(), "examples", weight)}
        ids: Tensor | None = step.inputs.get("input_ids")
        if ids is None and (self.bank is not None or wanted.exclude_same_id):
            raise LmcompressError(
                "the contrast of tokens needs the batch's input_ids: without them use memory='none' and "
                "exclude_same_id=False"
            )
        anchors = mine
        if self.bank is not None and ids is not None:
            if self._step != step.progress:
                self.bank.commit()
                self._step = step.progress
            anchors = self.bank.read(ids, mine)
            valid = mask.bool()
            self.bank.add(ids[valid], anchors[valid])
        return {"contrast": Term(self._of_tokens(anchors, mine, theirs, mask, ids).sum(), "tokens", weight)}

    def _of_tokens(self, anchors: Tensor, student: Tensor, teacher: Tensor, mask: Tensor, ids: Tensor | None) -> Tensor:
        wanted = self.contrast
        unlike = ids if wanted.exclude_same_id else None
        if wanted.negatives != "vocabulary":
            return token_contrast(
                anchors,
                teacher,
                mask,
                temperature=wanted.temperature,
                negatives=None if wanted.negatives == "teacher" else student,
                input_ids=unlike,
                num_negatives=wanted.num_negatives,
            )
        # one draw for the whole micro-batch: for every token its own would be a matrix of states for each
        assert self.bank is not None and wanted.num_negatives is not None
        drawn, states = self.bank.draw(wanted.num_negatives)
        padding = ~mask.bool()
        allowed = ~padding.unsqueeze(-1).expand(-1, -1, len(drawn))
        if unlike is not None:
            allowed = allowed & (unlike.unsqueeze(-1) != drawn)
        mine, theirs = (part.masked_fill(padding.unsqueeze(-1), 0) for part in (anchors, teacher))
        loss = info_nce(mine, theirs, states.unsqueeze(0), allowed, temperature=wanted.temperature)
        return loss.masked_fill(padding, 0)


class Homogeneity(FeatureTerm):
    """How alike the tokens of a sequence are in both models, as numbers to log and no loss.

    Args:
        contrast: whose layers are looked at; None: what the heads are given.
        student: not wrapped.
        teacher: that ``contrast.which`` names, or the first.
    """

    def __init__(self, contrast: Contrast | None, student: PreTrainedModel, teacher: Teacher) -> None:
        wanted = contrast or Contrast()
        self.which = wanted.which
        self.student = [resolve(student, *wanted.feature("student"))]
        self.teacher = [teacher.resolve(*wanted.feature("teacher"))]

    def terms(self, student: Features, teacher: Features, step: Step, mask: Tensor) -> dict[str, Term]:
        """The terms ``homogeneity_student`` and ``homogeneity_teacher``; see :class:`FeatureTerm`.

        Args:
            student: features of the student.
            teacher: features of the teacher.
            step: with the batch.
            mask: ``(batch, length)`` of the student.

        Returns:
            Both, measured only.
        """
        states = {"student": student[self.student[0]], "teacher": teacher[self.teacher[0]]}
        masks = mask, teacher_inputs(step.inputs).get("attention_mask")
        terms = {}
        for (side, tensor), valid in zip(states.items(), masks, strict=True):
            alike = homogeneity(tensor, torch.ones(tensor.shape[:2], device=tensor.device) if valid is None else valid)
            terms[f"homogeneity_{side}"] = Term(alike.sum(), "examples", 0.0, measured=True)
        return terms


def _projections(asked: str | int, mine: int, theirs: int) -> dict[str, Projection]:
    if isinstance(asked, int):
        # of one seed: equal widths begin with equal maps, under which a token resembles its teacher's as before
        return {"student": Projection(mine, asked, seed=0), "teacher": Projection(theirs, asked, seed=0)}
    if asked == "none" and mine != theirs:
        raise LmcompressError(
            f"the contrast needs states of one width, got student {mine} and teacher {theirs}: use projection='auto', "
            "or a number to which both are projected"
        )
    return {"student": Projection(mine, theirs, seed=0)} if asked == "linear" or mine != theirs else {}
