"""Texts to token ids, for a student and for a teacher with another tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lmcompress.data.tasks import Task, TaskData, TaskKind
from lmcompress.data.text import pack_blocks
from lmcompress.errors import LmcompressError

TEACHER_PREFIX = "teacher_"
"""Prefix of the columns of a teacher with another tokenizer: ``teacher_input_ids``."""

IGNORED_LABEL = -100
"""The label that losses ignore."""

_TRUNCATED = "__truncated__"

logger = logging.getLogger(__name__)


def tokenize(
    task_data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    num_proc: int | None = None,
) -> TaskData:
    """Every split as model inputs and ``labels``, without padding (see :func:`lmcompress.data.collators.collator`).

    Results for rows stored in files are cached on disk under ``datasets``' fingerprints. Pairs are joined as the
    tokenizer does it: GPT-2's puts nothing in between. For ``token_classification`` the first piece of a word has
    its label, all others have -100. ``causal_lm`` texts are packed into blocks of ``max_length``.

    Args:
        task_data: result of :func:`lmcompress.data.loading.load_task`.
        tokenizer: the student's; a fast one.
        max_length: longer texts are truncated, the longer one of a pair first. The share of truncated rows is logged as
            a warning and noted.
        teacher_tokenizer: if it differs from ``tokenizer``, its inputs are added under ``teacher_input_ids`` and so on.
        num_proc: number of processes.

    Returns:
        the same task and splits; columns are model inputs, those of the teacher, and ``labels``.

    Raises:
        LmcompressError: If a tokenizer is not a fast one, cannot take ``max_length`` tokens or cannot take words, or a
            causal teacher has another tokenizer.
    """
    task, teacher = task_data.task, teacher_tokenizer
    for each in (tokenizer, teacher):
        if each is not None:
            _check_tokenizer(each, max_length, task)
    if teacher is not None and same_tokenizer(tokenizer, teacher):
        teacher = None
    if task.kind is TaskKind.CAUSAL_LM:
        if teacher is not None:
            raise LmcompressError(
                "a causal teacher and its student must have one tokenizer, or their next tokens can't be compared"
            )
        column = task.text_columns[0]
        return task_data.map_splits(lambda _, rows: pack_blocks(rows, tokenizer, max_length, text_column=column))

    notes: list[str] = []

    def encode(split: str, rows: Dataset) -> Dataset:
        if not rows.num_rows:
            return rows
        encoded = rows.map(
            _encode_rows,
            batched=True,
            num_proc=num_proc,
            remove_columns=rows.column_names,
            fn_kwargs={"task": task, "tokenizer": tokenizer, "teacher": teacher, "max_length": max_length},
        )
        if cut := sum(encoded[_TRUNCATED]):
            share = cut / encoded.num_rows
            notes.append(f"{cut} rows ({share:.2%}) of {split} are truncated to {max_length} tokens")
            logger.warning("%s: %s; a larger max_length keeps more", task.name, notes[-1])
        return encoded.remove_columns(_TRUNCATED)

    encoded_data = task_data.map_splits(encode)
    return replace(encoded_data, notes=(*encoded_data.notes, *notes))


def same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers produce the same model inputs for every text."""
    if first is second:
        return True
    if first.model_input_names != second.model_input_names or not (first.is_fast and second.is_fast):
        return False
    return _rules(first) == _rules(second)


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    # these two are state of the latest call
    return {key: value for key, value in rules.items() if key not in ("truncation", "padding")}


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int, task: Task) -> None:
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise LmcompressError(f"the tokenizer {name} must be a fast one (backed by the tokenizers library)")
    if not 2 <= max_length <= tokenizer.model_max_length:
        raise LmcompressError(
            f"max_length must be in [2, {tokenizer.model_max_length}], the most that {name} takes, got {max_length}"
        )
    if task.kind is TaskKind.TOKEN_CLASSIFICATION and not _starts_words(_rules(tokenizer)["pre_tokenizer"]):
        raise LmcompressError(
            f"the tokenizer {name} must be loaded with add_prefix_space=True for {task.name}: its words come one by one"
        )


def _starts_words(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether a word alone is tokenized as in a sentence: byte-level tokenizers distinguish " word" and "word"."""
    if pre_tokenizer is None:
        return True
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return not any(part["type"] == "ByteLevel" and not part["add_prefix_space"] for part in parts)


def _encode_rows(
    rows: dict[str, list[Any]],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
    max_length: int,
) -> dict[str, list[Any]]:
    texts = [rows[column] for column in task.text_columns]
    is_words = task.kind is TaskKind.TOKEN_CLASSIFICATION
    inputs = tokenizer(*texts, truncation=True, max_length=max_length, is_split_into_words=is_words)
    columns: dict[str, list[Any]] = dict(inputs)
    columns[_TRUNCATED] = [bool(encoding.overflowing) for encoding in inputs.encodings]
    if teacher is not None:
        seen = teacher(*texts, truncation=True, max_length=max_length, is_split_into_words=is_words)
        columns |= {TEACHER_PREFIX + key: value for key, value in seen.items()}
    labels = rows.get(task.label_column or "")
    if labels is not None and is_words:
        aligned = zip(inputs.encodings, labels, strict=True)
        columns["labels"] = [_align(encoding.word_ids, words) for encoding, words in aligned]
    elif labels is not None:
        columns["labels"] = labels
    return columns


def _align(word_ids: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    before = [None, *word_ids[:-1]]
    return [
        labels[word] if word is not None and word != previous else IGNORED_LABEL
        for word, previous in zip(word_ids, before, strict=True)
    ]
