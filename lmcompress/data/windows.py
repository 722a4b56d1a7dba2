"""Questions with their contexts as windows of tokens, which overlap where a context is longer than the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lmcompress.data.answers import START, TEXT
from lmcompress.data.tasks import Task
from lmcompress.errors import LmcompressError, argument

SPAN_LABELS = ("start_positions", "end_positions")
"""Columns with the first and the last token of the answer; both are that of "no answer" where the window has none."""

WINDOWS, LOST, CUT_QUESTION = "__windows__", "__lost__", "__cut_question__"
"""Columns by which :func:`encode_windows` counts, in the first window of each question; 0 in the others."""


@dataclass(frozen=True)
class Windows:
    """The windows of a split, for the search for answers.

    Attributes:
        rows: model inputs, one row for each window.
        questions: ``(windows,)``, the row of the split that each belongs to, ascending.
        offsets: for each window ``(length, 2)``: begin and end of each token in the context's characters, -1 for tokens
            that are not the context's.
        no_answer: ``(windows,)``, the token that stands for "no answer".
        contexts: the contexts of the split.
    """

    rows: Dataset
    questions: NDArray[np.int64]
    offsets: Sequence[NDArray[np.int64]]
    no_answer: NDArray[np.int64]
    contexts: Sequence[str]


def checked_overlap(tokenizer: PreTrainedTokenizerBase, max_length: int, overlap: int | None) -> int:
    """The overlap of windows, where they advance.

    Args:
        tokenizer: determines the special tokens.
        max_length: tokens of a window.
        overlap: tokens of the context that neighbours share; None: a third of the window, as 128 of 384 in the scripts
            of BERT and Transformers, or as far as windows advance.

    Raises:
        LmcompressError: If a question of a third of the window leaves no room for more than the overlap.
    """
    most = max_length - tokenizer.num_special_tokens_to_add(pair=True) - _longest_question(max_length) - 1
    chosen = min(max_length // 3, most) if overlap is None else overlap
    if most < 0:
        raise LmcompressError(
            f"{argument('max_length')} must be larger for question answering: windows of {max_length} tokens have no "
            "room for a context beside a question and special tokens"
        )
    if not 0 <= chosen <= most:
        raise LmcompressError(
            f"{argument('overlap')} must be from 0 to {most} with windows of max_length = {max_length} tokens, of "
            f"which a question may take {_longest_question(max_length)}, got {chosen}"
        )
    return chosen


def windows(
    task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, overlap: int | None = None
) -> Windows:
    """The windows of a split's rows, with what is needed to turn tokens into text again.

    Args:
        task: a task of question answering.
        rows: its rows, untokenized.
        tokenizer: a fast one.
        max_length: tokens of a window.
        overlap: tokens of the context that neighbouring windows share; None: as :func:`checked_overlap`.

    Returns:
        the windows, in the order of :func:`lmcompress.data.tokenization.tokenize`.

    Raises:
        LmcompressError: If ``overlap`` is out of range.
    """
    shared = checked_overlap(tokenizer, max_length, overlap)
    question, context = task.text_columns
    contexts = rows[context][:]
    encoded, _ = _windowed(rows[question][:], contexts, tokenizer, max_length, shared)
    offsets = [_context_offsets(one) for one in encoded.encodings]
    inputs = Dataset.from_dict(_inputs(encoded))
    questions = np.asarray(encoded["overflow_to_sample_mapping"], dtype=np.int64)
    no_answer = np.asarray([_no_answer(ids, tokenizer) for ids in encoded["input_ids"]], dtype=np.int64)
    return Windows(inputs, questions, offsets, no_answer, contexts)


def encode_windows(
    rows: Mapping[str, list[Any]], task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, overlap: int
) -> dict[str, list[Any]]:
    """Model inputs and the places of answers, one row for each window; for ``Dataset.map``.

    The first answer of each question counts. A window that does not hold it whole has no answer: both positions are
    those of the classification token, or 0 without one.

    Args:
        rows: columns of the task's rows.
        task: a task of question answering.
        tokenizer: a fast one.
        max_length: tokens of a window.
        overlap: tokens of the context that neighbouring windows share.

    Returns:
        the columns of the inputs, :data:`SPAN_LABELS` if there are answers, and those to count by: the number of
        windows, whether no window holds the answer, whether the question was cut.
    """
    question, context = task.text_columns
    encoded, cut = _windowed(rows[question], rows[context], tokenizer, max_length, overlap)
    sources = encoded["overflow_to_sample_mapping"]
    columns: dict[str, list[Any]] = _inputs(encoded)
    first = [number == 0 or sources[number - 1] != source for number, source in enumerate(sources)]
    count = np.bincount(sources)
    columns[WINDOWS] = [int(count[source]) if begins else 0 for source, begins in zip(sources, first, strict=True)]
    columns[CUT_QUESTION] = [int(begins and cut[source]) for source, begins in zip(sources, first, strict=True)]
    answers = rows.get(task.label_column or "")
    if answers is None:
        return columns
    places = [_place(one, answers[source]) for one, source in zip(encoded.encodings, sources, strict=True)]
    nothing = [_no_answer(ids, tokenizer) for ids in encoded["input_ids"]]
    for side, name in enumerate(SPAN_LABELS):
        columns[name] = [none if place is None else place[side] for place, none in zip(places, nothing, strict=True)]
    held = {source for source, place in zip(sources, places, strict=True) if place is not None}
    columns[LOST] = [
        int(begins and bool(answers[source][TEXT]) and source not in held)
        for source, begins in zip(sources, first, strict=True)
    ]
    return columns


def _longest_question(max_length: int) -> int:
    return max_length // 3


def _windowed(
    questions: Sequence[str],
    contexts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlap: int,
) -> tuple[Any, list[bool]]:
    """The tokenizer's windows, and whether each question was cut."""
    most = _longest_question(max_length)
    asked, cut = [], []
    alone = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for text, spans in zip(questions, alone["offset_mapping"], strict=True):
        cut.append(len(spans) > most)
        asked.append(text[: spans[most - 1][1]] if cut[-1] else text)
    encoded = tokenizer(
        asked,
        list(contexts),
        truncation="only_second",
        max_length=max_length,
        stride=overlap,
        return_overflowing_tokens=True,
    )
    return encoded, cut


def _inputs(encoded: Any) -> dict[str, list[Any]]:
    return {name: values for name, values in encoded.items() if name != "overflow_to_sample_mapping"}


def _context_offsets(encoding: Any) -> NDArray[np.int64]:
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    outside = np.asarray([source != 1 for source in encoding.sequence_ids], dtype=bool)
    offsets[outside] = -1
    return offsets


def _place(encoding: Any, answer: Mapping[str, Sequence[Any]]) -> tuple[int, int] | None:
    """First and last token of the answer in a window, or None if it does not hold all of it."""
    if not answer[TEXT]:
        return None
    text, begin = answer[TEXT][0], answer[START][0]
    # a tokenizer may leave white space out of its tokens
    begin, end = begin + len(text) - len(text.lstrip()), begin + len(text.rstrip())
    offsets = _context_offsets(encoding)
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(inside) or offsets[inside[0], 0] > begin or offsets[inside[-1], 1] < end:
        return None
    first = inside[int(np.searchsorted(offsets[inside, 1], begin, side="right"))]
    last = inside[int(np.searchsorted(offsets[inside, 0], end, side="left")) - 1]
    return int(first), int(last)


def _no_answer(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    mark = tokenizer.cls_token_id
    return ids.index(mark) if mark is not None and mark in ids else 0
