"""A contrast as a term of the loss: layers, projections and memory found, and one micro-batch compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.capture import Features, resolve, shape_of
from lmcompress.distillation.config import Contrast
from lmcompress.distillation.contrastive.losses import info_nce, sequence_contrast, token_contrast
from lmcompress.distillation.contrastive.memory import MemoryBank
from lmcompress.distillation.projections import Projection
from lmcompress.distillation.schedules import WEIGHT_SCHEDULES
from lmcompress.distillation.teachers import Teacher, teacher_inputs
from lmcompress.errors import LmcompressError
from lmcompress.method import Term


class Contrasting:
    """A :class:`Contrast` with everything that it needs found: layers on both sides, projections, a memory bank.

    Args:
        contrast: what is asked for.
        student: not wrapped.
        teacher: that ``contrast.which`` names.
        device: where training happens; the bank is made there.

    Raises:
        LmcompressError: a layer that is not there, or widths that differ and are not brought together.
    """

    def __init__(
        self, contrast: Contrast, student: PreTrainedModel, teacher: Teacher, device: torch.device | str
    ) -> None:
        self.contrast = contrast
        self.student = resolve(student, *contrast.feature("student"))
        self.teacher = teacher.resolve(*contrast.feature("teacher"))
        widths = shape_of(student, self.student)[-1], teacher.shape_of(self.teacher)[-1]
        self.projections = _projections(contrast.projection, *widths)
        self.bank: MemoryBank | None = None
        if contrast.level == "token" and contrast.memory == "vocabulary":
            width = self.projections["student"].teacher_dim if "student" in self.projections else widths[0]
            size = student.config.vocab_size
            self.bank = MemoryBank(size, width, momentum=contrast.momentum, device=device)
        self._step: float | None = None

    def modules(self) -> dict[str, nn.Module]:
        """What belongs into training checkpoints: projections and bank."""
        found: dict[str, nn.Module] = {f"contrast_{side}": module for side, module in self.projections.items()}
        return found if self.bank is None else found | {"contrast_bank": self.bank}

    def term(
        self, student: Features, teacher: Features, inputs: Mapping[str, Any], mask: Tensor, progress: float
    ) -> Term:
        """The loss of one micro-batch.

        Args:
            student: with :attr:`student` in it.
            teacher: with :attr:`teacher` in it.
            inputs: the whole batch.
            mask: ``(batch, length)`` of the student.
            progress: share of training done; when it changes, an optimizer step is over.

        Returns:
            The sum over tokens, or over sequences.

        Raises:
            LmcompressError: there are no token ids where they are needed.
        """
        wanted = self.contrast
        mine, theirs = student[self.student], teacher[self.teacher].detach()
        if "student" in self.projections:
            mine = self.projections["student"](mine)
        if "teacher" in self.projections:
            theirs = self.projections["teacher"](theirs)
        weight = wanted.weight * WEIGHT_SCHEDULES[wanted.weight_schedule](progress)
        if wanted.level == "sequence":
            other = teacher_inputs(inputs).get("attention_mask")
            if other is None:
                other = torch.ones(theirs.shape[:2], device=theirs.device)
            loss = sequence_contrast(mine, theirs, mask, temperature=wanted.temperature, teacher_mask=other)
            return Term(loss.sum(), "examples", weight)
        ids: Tensor | None = inputs.get("input_ids")
        if ids is None and (self.bank is not None or wanted.exclude_same_id):
            raise LmcompressError(
                "the contrast of tokens needs the batch's input_ids: without them use memory='none' and "
                "exclude_same_id=False"
            )
        anchors = mine
        if self.bank is not None and ids is not None:
            if self._step != progress:
                self.bank.commit()
                self._step = progress
            anchors = self.bank.read(ids, mine)
            valid = mask.bool()
            self.bank.add(ids[valid], anchors[valid])
        return Term(self._of_tokens(anchors, mine, theirs, mask, ids).sum(), "tokens", weight)

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
