"""Answers that are spans of a context, in SQuAD's form: columns, checks, and SQuAD's nested JSON as rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, List, Value

from lmcompress.data.columns import is_list
from lmcompress.errors import LmcompressError

TEXT, START = "text", "answer_start"
"""The two fields of an answer."""

_FEATURE = {TEXT: List(Value("string")), START: List(Value("int64"))}


def holds_answers(feature: object) -> bool:
    """Whether a column holds answers: ``{text: [...], answer_start: [...]}``, or a list of ``{text, answer_start}``.

    Args:
        feature: feature of the column.
    """
    item = getattr(feature, "feature", None) if is_list(feature) else feature
    return isinstance(item, Mapping) and {TEXT, START} <= set(item)


def encode_answers(dataset: Dataset, context: str, answers: str, split: str) -> Dataset:
    """``dataset`` with its answers as ``{text: [...], answer_start: [...]}``, each one checked against its context.

    A question without an answer has empty lists.

    Args:
        dataset: the rows.
        context: the column of contexts.
        answers: the column of answers; see :func:`holds_answers`.
        split: name of the split in messages.

    Returns:
        the same rows, in order; the column of answers comes last.

    Raises:
        LmcompressError: If an answer does not stand in its context where it says; the message names row and answer.
    """
    where = f"column {answers!r} of split {split!r}"
    if not holds_answers(dataset.features[answers]):
        raise LmcompressError(
            f"{where} must hold answers as {{'text': [...], 'answer_start': [...]}}, got {dataset.features[answers]}"
        )
    encoded = []
    for row, (given, text) in enumerate(zip(dataset[answers], dataset[context], strict=True)):
        found = _as_lists(given)
        for answer, start in zip(found[TEXT], found[START], strict=True):
            if not answer.strip() or start < 0 or text[start : start + len(answer)] != answer:
                raise LmcompressError(
                    f"{where}: row {row} (from 0) has the answer {answer!r} at character {start}, where its context "
                    f"has {text[max(start, 0) : max(start, 0) + len(answer)]!r}; answer_start counts characters from 0"
                )
        encoded.append(found)
    return dataset.remove_columns(answers).add_column(answers, encoded, feature=_FEATURE)


def squad_rows(path: Path) -> list[dict[str, Any]] | None:
    """The questions of a file in SQuAD's nested form, versions 1.1 and 2.0.

    Args:
        path: a JSON file.

    Returns:
        rows of ``id``, ``title``, ``context``, ``question`` and ``answers``; None if the file has another form.

    Raises:
        LmcompressError: If a question or paragraph lacks one of its fields.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, UnicodeDecodeError):
        # JSON lines, which the usual reader reads
        return None
    articles = read.get("data") if isinstance(read, dict) else None
    if not isinstance(articles, list) or not all(isinstance(one, dict) and "paragraphs" in one for one in articles):
        return None
    try:
        return list(_questions(articles))
    except KeyError as error:
        raise LmcompressError(
            f"{path} is in SQuAD's form, but a paragraph or question of it has no {error}; each paragraph has context "
            "and qas, each question id, question and answers"
        ) from error


def _questions(articles: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for article in articles:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                yield {
                    "id": str(asked["id"]),
                    "title": article.get("title", ""),
                    "context": paragraph["context"],
                    "question": asked["question"],
                    "answers": _as_lists([] if asked.get("is_impossible") else asked["answers"]),
                }


def _as_lists(given: Any) -> dict[str, list[Any]]:
    if isinstance(given, Mapping):
        return {TEXT: list(given[TEXT]), START: [int(start) for start in given[START]]}
    answers = given or []
    return {TEXT: [answer[TEXT] for answer in answers], START: [int(answer[START]) for answer in answers]}
