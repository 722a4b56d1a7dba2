"""A contrast as a term of the loss: its layers, projections and memory, evaluated on micro-batches."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.capture import Features, resolve, shape_of
from lmcompress.distillation.config import Contrast
from lmcompress.distillation.contrastive.losses import homogeneity, info_nce, sequence_contrast, token_contrast
from lmcompress.distillation.projections import Projection
from lmcompress.distillation.step import FeatureTerm, scheduled
from lmcompress.distillation.teachers import Teacher, teacher_inputs
from lmcompress.errors import LmcompressError
from lmcompress.method import Step, Term


class MemoryBank(nn.Module):
    r"""The student's states smoothed over time, one slot for each token of the vocabulary.

    .. math:: q_i = m \cdot \mathrm{slot}[v_i] + (1 - m) \cdot h_i

    In an optimizer step, every occurrence of a token reads the slot as it was before the step; after the step
    (:meth:`commit`), the slot becomes the mean of all :math:`q_i` of the token, over all micro-batches and processes.
    So a step does not depend on how its batch was split. A slot that was never written holds the state that reads it.

    Args:
        size: number of slots, the size of the vocabulary.
        width: width of a state.
        momentum: m, in [0, 1).
        device: device of the bank; 4 bytes × ``size`` × ``width``.

    Raises:
        LmcompressError: If the momentum is out of range.

    Reference:
        Tao et al. 2022, https://arxiv.org/abs/2203.10705, section 4.1. The paper leaves the addressing of its bank
        unclear; one slot for each token of the vocabulary is the reading that fits into memory.
    """

    slots: Tensor
    written: Tensor

    def __init__(
        self, size: int, width: int, *, momentum: float = 0.5, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise LmcompressError(f"momentum must be in [0, 1), got {momentum}; at 1 no gradient reaches the student")
        self.momentum = momentum
        self.register_buffer("slots", torch.zeros(size, width, device=device))
        self.register_buffer("written", torch.zeros(size, dtype=torch.bool, device=device))
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        # a checkpoint is written between two steps, before the end of the first is known
        self.register_state_dict_pre_hook(_commit)

    def read(self, ids: Tensor, states: Tensor) -> Tensor:
        """The smoothed states; gradients flow through the new share ``1 - m``.

        Args:
            ids: ``(...)`` int64 in [0, size).
            states: ``(..., width)``.

        Returns:
            ``(..., width)`` float32.
        """
        states = states.float()
        old = torch.where(self.written[ids].unsqueeze(-1), self.slots[ids], states.detach())
        return self.momentum * old + (1 - self.momentum) * states

    def add(self, ids: Tensor, smoothed: Tensor) -> None:
        """Store what this micro-batch has read, on all processes, for :meth:`commit`.

        Args:
            ids: ``(n,)`` int64, real tokens only.
            smoothed: ``(n, width)``, result of :meth:`read` for them.
        """
        unique, place, counts = ids.unique(return_inverse=True, return_counts=True)
        sums = smoothed.new_zeros(len(unique), self.slots.shape[1]).index_add_(0, place, smoothed.detach().float())
        self._pending.append(_of_all_processes(unique, sums, counts))

    def commit(self) -> None:
        """Write the means of everything added since the last commit."""
        if not self._pending:
            return
        ids, sums, counts = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending = []
        unique, place = ids.unique(return_inverse=True)
        total = sums.new_zeros(len(unique), sums.shape[1]).index_add_(0, place, sums)
        number = sums.new_zeros(len(unique)).index_add_(0, place, counts.to(sums.dtype))
        self.slots[unique] = (total / number.unsqueeze(-1)).to(self.slots.dtype)
        self.written[unique] = True

    def draw(self, count: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Random slots, sampled uniformly with replacement among those that were written.

        Args:
            count: number of slots.
            generator: default: the global one of the device.

        Returns:
            ``(ids (count,), states (count, width))``; both empty until something is written.
        """
        written = self.written.nonzero().squeeze(1)
        if not len(written):
            return written, self.slots[written]
        ids = written[torch.randint(len(written), (count,), device=written.device, generator=generator)]
        return ids, self.slots[ids]

    def extra_repr(self) -> str:
        """Sizes and momentum, for ``print``."""
        return f"{self.slots.shape[0]}, {self.slots.shape[1]}, momentum={self.momentum}"


class ContrastTerm(FeatureTerm):
    """A :class:`Contrast` with its layers on both sides, projections and memory bank resolved.

    Args:
        contrast: the configuration.
        student: not wrapped.
        teacher: the teacher that ``contrast.which`` names.
        device: training device, on which the bank is created.

    Raises:
        LmcompressError: If a layer does not exist, or widths differ and are not projected.
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
            step: the step, with the batch and the progress: when it changes, an optimizer step is over.
            mask: ``(batch, length)`` of the student.

        Returns:
            One term, by its name.

        Raises:
            LmcompressError: If token ids are needed and missing.
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
        # one sample for the whole micro-batch: one per token would need a matrix of states for each
        if self.bank is None or wanted.num_negatives is None:
            raise LmcompressError(
                "negatives='vocabulary' are drawn from the memory: they need memory='vocabulary' and num_negatives, "
                f"got memory={wanted.memory!r} and num_negatives={wanted.num_negatives}"
            )
        drawn, states = self.bank.draw(wanted.num_negatives)
        padding = ~mask.bool()
        allowed = ~padding.unsqueeze(-1).expand(-1, -1, len(drawn))
        if unlike is not None:
            allowed = allowed & (unlike.unsqueeze(-1) != drawn)
        mine, theirs = (part.masked_fill(padding.unsqueeze(-1), 0) for part in (anchors, teacher))
        loss = info_nce(mine, theirs, states.unsqueeze(0), allowed, temperature=wanted.temperature)
        return loss.masked_fill(padding, 0)


class Homogeneity(FeatureTerm):
    """The homogeneity of tokens in both models, for logging only.

    Args:
        contrast: determines the layers; None: the inputs of the heads.
        student: not wrapped.
        teacher: the teacher that ``contrast.which`` names, or the first.
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
            step: the step, with the batch.
            mask: ``(batch, length)`` of the student.

        Returns:
            Both terms, measured only.
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
        # same seed: equal widths start with equal projections, under which a token resembles its teacher's as before
        return {"student": Projection(mine, asked, seed=0), "teacher": Projection(theirs, asked, seed=0)}
    if asked == "none" and mine != theirs:
        raise LmcompressError(
            f"the contrast needs states of one width, got student {mine} and teacher {theirs}: use projection='auto', "
            "or a number to which both are projected"
        )
    return {"student": Projection(mine, theirs, seed=0)} if asked == "linear" or mine != theirs else {}


def _commit(module: nn.Module, *_: Any) -> None:
    # of the module that is saved, which may be a copy of the one that registered it
    cast(MemoryBank, module).commit()


def _of_all_processes(ids: Tensor, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of all processes, concatenated in the order of the processes."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ids, sums, counts
    lengths = [torch.zeros(1, dtype=torch.long, device=ids.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(ids)], device=ids.device))
    sizes = [int(length) for length in lengths]
    gathered = []
    for part in (ids, sums, counts):
        # collectives need the same shape on all processes
        padded = part.new_zeros(max(sizes), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        gathered.append(torch.cat([one[:size] for one, size in zip(parts, sizes, strict=True)]))
    return gathered[0], gathered[1], gathered[2]
