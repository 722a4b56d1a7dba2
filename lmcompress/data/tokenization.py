"""Texts to token ids, for a student and for a teacher with another tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lmcompress.data.chat import check_chat_template, encode_conversations
from lmcompress.data.labels import IGNORED_LABEL
from lmcompress.data.tasks import Task, TaskData, TaskKind
from lmcompress.data.text import TEACHER_PREFIX, documents_for_two, pack_blocks, pack_documents
from lmcompress.data.windows import CUT_QUESTION, LOST, WINDOWS, checked_overlap, encode_windows
from lmcompress.errors import LmcompressError, argument

_TRUNCATED = "__truncated__"

logger = logging.getLogger(__name__)


def tokenize(
    task_data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlap: int | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    num_proc: int | None = None,
    packing: Literal["joined", "apart"] = "joined",
) -> TaskData:
    """Every split as model inputs and ``labels``, without padding (see :func:`lmcompress.data.collators.collator`).

    Results for rows stored in files are cached on disk under ``datasets``' fingerprints. Pairs are joined as the
    tokenizer does it: GPT-2's puts nothing in between. For ``token_classification`` the first piece of a word has
    its label, all others have -100. ``causal_lm`` texts are packed into blocks of ``max_length``; for a teacher with
    another tokenizer, every row is a piece of one document instead. Conversations (``task.chat``) are a row each, with
    labels on the assistant's answers only. For ``question_answering`` a long context becomes several rows, windows that
    overlap, with ``start_positions`` and ``end_positions`` in place of ``labels`` (see
    :func:`lmcompress.data.windows.encode_windows`). For ``summarization`` and ``translation`` the labels are the tokens
    of the target, as its language's side of the tokenizer makes them, and are not shifted.

    Args:
        task_data: result of :func:`lmcompress.data.loading.load_task`.
        tokenizer: the student's; a fast one.
        max_length: longer texts are truncated, the longer one of a pair first. The share of truncated rows is logged as
            a warning and noted, and so are answers that no window holds.
        overlap: for ``question_answering``, tokens of the context that neighbouring windows share; None: a third of
            ``max_length`` at most.
        teacher_tokenizer: if it differs from ``tokenizer``, its inputs are added under ``teacher_input_ids`` and so on.
        num_proc: number of processes.
        packing: documents of ``causal_lm`` in a block: ``joined`` (each token attends to all before it) or ``apart``
            (position ids begin anew at each, see :func:`~lmcompress.data.text.pack_documents`).

    Returns:
        the same task and splits; columns are model inputs, those of the teacher, and ``labels``.

    Raises:
        LmcompressError: If a tokenizer is not a fast one, cannot take ``max_length`` tokens, cannot take words or has
            no chat template for conversations; documents are to be packed apart that cannot be; a teacher of question
            answering has another tokenizer; or ``overlap`` is out of range or given for another kind of task.
    """
    task, teacher = task_data.task, teacher_tokenizer
    for each in (tokenizer, teacher):
        if each is not None:
            _check_tokenizer(each, max_length, task)
    if teacher is not None and same_tokenizer(tokenizer, teacher):
        teacher = None
    if packing == "apart":
        _check_packing(task, teacher)
    if task.kind.generates and teacher is not None:
        raise LmcompressError(
            f"a teacher of a {task.kind} task and its student must have one tokenizer, or the texts that they write "
            "can't be compared token by token"
        )
    if task.chat:
        return _tokenize_conversations(task_data, tokenizer, teacher, max_length)
    if overlap is not None and task.kind is not TaskKind.QUESTION_ANSWERING:
        raise LmcompressError(f"{argument('overlap')} is of question answering; {task.name} is a {task.kind} task")
    if task.kind is TaskKind.QUESTION_ANSWERING:
        return _in_windows(task_data, tokenizer, teacher, max_length, overlap, num_proc)
    if task.kind is TaskKind.CAUSAL_LM:
        column = task.text_columns[0]
        if teacher is not None:
            return task_data.map_splits(
                lambda _, rows: documents_for_two(rows, tokenizer, teacher, max_length, text_column=column)
            )
        pack = pack_blocks if packing == "joined" else pack_documents
        return task_data.map_splits(lambda _, rows: pack(rows, tokenizer, max_length, text_column=column))

    def encode(split: str, rows: Dataset) -> tuple[Dataset, list[str]]:
        if not rows.num_rows:
            return rows, []
        encoded = rows.map(
            _encode_rows,
            batched=True,
            num_proc=num_proc,
            remove_columns=rows.column_names,
            fn_kwargs={"task": task, "tokenizer": tokenizer, "teacher": teacher, "max_length": max_length},
        )
        cut = sum(encoded[_TRUNCATED])
        told = [_truncated(split, cut, encoded.num_rows, max_length)] if cut else []
        return encoded.remove_columns(_TRUNCATED), _warned(task, told, "; a larger max_length keeps more")

    return _encoded(task_data, encode)


def _encoded(task_data: TaskData, encode: Callable[[str, Dataset], tuple[Dataset, list[str]]]) -> TaskData:
    """Every split encoded, with what there is to note about it after the notes so far."""
    notes: list[str] = []

    def rows_of(split: str, rows: Dataset) -> Dataset:
        encoded, told = encode(split, rows)
        notes.extend(told)
        return encoded

    encoded_data = task_data.map_splits(rows_of)
    return replace(encoded_data, notes=(*encoded_data.notes, *notes))


def _truncated(split: str, cut: int, rows: int, max_length: int) -> str:
    return f"{cut} rows ({cut / rows:.2%}) of {split} are truncated to {max_length} tokens"


def _warned(task: Task, notes: list[str], hint: str = "") -> list[str]:
    for note in notes:
        logger.warning("%s: %s%s", task.name, note, hint)
    return notes


def _tokenize_conversations(
    task_data: TaskData, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None, max_length: int
) -> TaskData:
    def encode(split: str, rows: Dataset) -> tuple[Dataset, list[str]]:
        column = task_data.task.text_columns[0]
        encoded, cut, left_out = encode_conversations(rows, column, tokenizer, max_length, teacher)
        told = [_truncated(split, cut, rows.num_rows, max_length)] if cut else []
        if left_out:
            told.append(
                f"{left_out} rows ({left_out / rows.num_rows:.2%}) of {split} are left out: no token of an "
                f"answer is among their first {max_length}"
            )
        return encoded, _warned(task_data.task, told, "; a larger max_length keeps more")

    return _encoded(task_data, encode)


def _in_windows(
    task_data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
    max_length: int,
    overlap: int | None,
    num_proc: int | None,
) -> TaskData:
    task = task_data.task
    if teacher is not None:
        raise LmcompressError(
            "a teacher of question answering and its student must have one tokenizer, or the places of their answers "
            "can't be compared"
        )
    shared = checked_overlap(tokenizer, max_length, overlap)

    def encode(split: str, rows: Dataset) -> tuple[Dataset, list[str]]:
        if not rows.num_rows:
            return rows, []
        encoded = rows.map(
            encode_windows,
            batched=True,
            num_proc=num_proc,
            remove_columns=rows.column_names,
            fn_kwargs={"task": task, "tokenizer": tokenizer, "max_length": max_length, "overlap": shared},
        )
        told = _notes_of_windows(task, encoded, split, rows.num_rows, max_length)
        counted = [name for name in (WINDOWS, LOST, CUT_QUESTION) if name in encoded.column_names]
        return encoded.remove_columns(counted), told

    return _encoded(task_data, encode)


def _notes_of_windows(task: Task, encoded: Dataset, split: str, questions: int, max_length: int) -> list[str]:
    several = sum(count > 1 for count in encoded[WINDOWS])
    lost = sum(encoded[LOST]) if LOST in encoded.column_names else 0
    cut = sum(encoded[CUT_QUESTION])
    warned = []
    if lost:
        warned.append(
            f"{lost} of {questions} answers of {split} are in no window of {max_length} tokens as a whole: there they "
            "count as no answer; a larger max_length or overlap keeps more"
        )
    if cut:
        warned.append(f"{cut} of {questions} questions of {split} are cut: they take at most a third of a window")
    _warned(task, warned)
    if several:
        warned.append(
            f"{several} of {questions} questions of {split} have contexts in several windows of {max_length} tokens"
        )
    return warned


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
    if task.chat:
        check_chat_template(tokenizer)
    if task.kind is TaskKind.TOKEN_CLASSIFICATION and not _starts_words(_rules(tokenizer)["pre_tokenizer"]):
        raise LmcompressError(
            f"the tokenizer {name} must be loaded with add_prefix_space=True for {task.name}: its words come one by one"
        )


def _check_packing(task: Task, teacher: PreTrainedTokenizerBase | None) -> None:
    if task.kind is TaskKind.CAUSAL_LM and not task.chat and teacher is None:
        return
    what = "of conversations" if task.chat else "for a teacher with another tokenizer"
    what = what if task.kind is TaskKind.CAUSAL_LM else f"of a {task.kind} task"
    given = argument("packing", repr("apart"))
    raise LmcompressError(f"{given} packs documents of running text, and rows {what} are not packed; leave it out")


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
    if labels is not None and task.kind.generates:
        columns["labels"] = tokenizer(text_target=labels, truncation=True, max_length=max_length)["input_ids"]
    elif labels is not None and is_words:
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
