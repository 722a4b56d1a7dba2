"""Batches of tensors from rows of different lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lmcompress.data.labels import IGNORED_LABEL
from lmcompress.data.tasks import Task, TaskKind
from lmcompress.data.text import TEACHER_PREFIX
from lmcompress.data.windows import SPAN_LABELS
from lmcompress.errors import LmcompressError

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask")


@dataclass(frozen=True)
class Padding:
    """Padding of one tokenizer's inputs.

    Attributes:
        values: padding value by input name.
        on_the_left: whether the padding comes first.
    """

    values: Mapping[str, int]
    on_the_left: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Padding:
        """The padding of a tokenizer; one without a padding token (GPT-2's) pads with its end-of-sequence token.

        Args:
            tokenizer: a tokenizer of a student or a teacher.

        Returns:
            the padding.

        Raises:
            LmcompressError: If it has neither token.
        """
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise LmcompressError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has neither a pad_token nor an "
                "eos_token to pad batches with; set tokenizer.pad_token"
            )
        fill = (pad, 0, tokenizer.pad_token_type_id, 1)
        return cls(dict(zip(_INPUTS, fill, strict=True)), tokenizer.padding_side == "left")


class Collator:
    """Makes a batch from tokenized rows; created by :func:`collator`.

    Args:
        task: determines the type of the labels.
        padding: padding of the student's inputs.
        teacher_padding: padding of ``teacher_*`` inputs, if any.
        pad_to_multiple_of: lengths are rounded up to a multiple.
    """

    def __init__(
        self,
        task: Task,
        padding: Padding,
        teacher_padding: Padding | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.task = task
        self.padding = padding
        self.teacher_padding = teacher_padding
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pads and stacks.

        Args:
            rows: tokenized; columns that are neither model inputs nor ``labels`` must have one shape and are stacked.

        Returns:
            ``(batch, length)`` int64 inputs (``teacher_*`` of their own length, labels of a causal teacher's tokens
            among them) and ``labels``: ``(batch,)`` int64
            classes, ``(batch,)`` float32 scores, ``(batch, classes)`` float32, or ``(batch, length)`` int64 with -100
            where there is nothing to predict. For question answering ``start_positions`` and ``end_positions``
            ``(batch,)`` int64 instead.

        Raises:
            LmcompressError: If rows have a teacher's inputs but its tokenizer was not given.
        """
        batch = {}
        for key in rows[0]:
            values = [row[key] for row in rows]
            name = key.removeprefix(TEACHER_PREFIX)
            if name != key and name in _INPUTS:
                batch[key] = self._pad(values, self._teacher().values[name], self._teacher().on_the_left)
            elif key in _INPUTS:
                batch[key] = self._pad(values, self.padding.values[key], self.padding.on_the_left)
            elif key == "labels":
                batch[key] = self._labels(values)
            elif key == f"{TEACHER_PREFIX}labels":
                batch[key] = self._pad(values, IGNORED_LABEL, self._teacher().on_the_left)
            elif key in SPAN_LABELS:
                batch[key] = self._positions(values, [len(row["input_ids"]) for row in rows])
            else:
                batch[key] = torch.tensor(values)
        return batch

    def _labels(self, values: list[Any]) -> torch.Tensor:
        if self.task.kind in (TaskKind.TOKEN_CLASSIFICATION, TaskKind.CAUSAL_LM):
            return self._pad(values, IGNORED_LABEL, self.padding.on_the_left)
        if self.task.kind.generates:
            # a decoder begins with the first
            return self._pad(values, IGNORED_LABEL, False)
        is_class = self.task.kind is TaskKind.CLASSIFICATION
        return torch.tensor(values, dtype=torch.int64 if is_class else torch.float32)

    def _positions(self, values: list[int], lengths: list[int]) -> torch.Tensor:
        positions = torch.tensor(values)
        # padding on the left moves every token
        return positions + self._length(lengths) - torch.tensor(lengths) if self.padding.on_the_left else positions

    def _length(self, lengths: list[int]) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-max(lengths) // multiple) * multiple

    def _pad(self, values: list[Sequence[int]], fill: int, on_the_left: bool) -> torch.Tensor:
        length = self._length(list(map(len, values)))
        padded = torch.full((len(values), length), fill, dtype=torch.int64)
        for row, value in zip(padded, values, strict=True):
            start = length - len(value) if on_the_left else 0
            row[start : start + len(value)] = torch.as_tensor(value, dtype=torch.int64)
        return padded

    def _teacher(self) -> Padding:
        if self.teacher_padding is None:
            raise LmcompressError(
                "the rows have teacher_* inputs, but the collator has no teacher_tokenizer to pad them with"
            )
        return self.teacher_padding


def collator(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    pad_to_multiple_of: int | None = None,
) -> Collator:
    """The collator of a task's tokenized rows.

    Args:
        task: determines the type of the labels.
        tokenizer: the student's. Without a padding token (GPT-2), its end-of-sequence token is used, with attention
            mask 0; for classification set the model's ``config.pad_token_id`` to the same, from which it finds the last
            token of a row.
        teacher_tokenizer: pads ``teacher_*`` inputs; needed if there are any.
        pad_to_multiple_of: lengths are rounded up to a multiple, which some hardware prefers.

    Returns:
        a function from rows to a batch; see :class:`Collator`.

    Raises:
        LmcompressError: If a tokenizer has no token to pad with, or ``pad_to_multiple_of`` < 1.
    """
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise LmcompressError(f"pad_to_multiple_of must be >= 1, got {pad_to_multiple_of}")
    teacher_padding = None if teacher_tokenizer is None else Padding.of(teacher_tokenizer)
    return Collator(task, Padding.of(tokenizer), teacher_padding, pad_to_multiple_of)
