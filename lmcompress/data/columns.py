"""The text and label columns of a table, and the kind of task they imply."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, LargeList, List, Value

from lmcompress.data.tasks import TaskKind
from lmcompress.errors import LmcompressError, argument, nearest

TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("text_a", "text_b"),
    ("tokens",),
    ("sentence",),
    ("text",),
    ("review",),
    ("content",),
    ("body",),
    ("dialogue",),
    ("document",),
    ("article",),
    ("source",),
)
"""Names looked up when no text columns are given; the first entry whose names all exist is used."""

LABEL_COLUMNS = (
    *("label", "labels", "ner_tags", "pos_tags", "chunk_tags", "tags", "score"),
    *("sentiment", "class", "category", "target", "answers"),
)
"""Names looked up when no label column is given."""

TARGET_COLUMNS = ("summary", "highlights", "target", "translation")
"""The same for texts that are to be written."""


def find_text_columns(columns: Sequence[str], text_columns: Sequence[str] | None) -> tuple[str, ...]:
    """The text columns: those given, or the first of :data:`TEXT_COLUMNS` that exist.

    Args:
        columns: columns of the table.
        text_columns: requested columns, or None.

    Returns:
        one or two names.

    Raises:
        LmcompressError: If a given column is missing or given twice, or none of the usual ones is there.

    Example:
        >>> find_text_columns(["idx", "premise", "hypothesis", "label"], None)
        ('premise', 'hypothesis')
    """
    if text_columns is not None:
        for column in text_columns:
            check_column(column, columns)
        if len(set(text_columns)) < len(text_columns):
            raise LmcompressError(f"{argument('text_columns')} must be two different columns, got {column!r} twice")
        return tuple(text_columns)
    for usual in TEXT_COLUMNS:
        if set(usual) <= set(columns):
            return usual
    conversations = f", or read conversations with {argument('chat', 'True')}" if "messages" in columns else ""
    raise LmcompressError(
        f"no text column found among: {', '.join(columns)}; name one or two with {argument('text_columns', '')}"
        f"{conversations}"
    )


def find_label_column(
    columns: Sequence[str], text_columns: Sequence[str], label_column: str | None, kind: TaskKind | None
) -> str | None:
    """The label column, or None if the text itself is predicted.

    Args:
        columns: columns of the table.
        text_columns: its text columns.
        label_column: requested column, or None.
        kind: requested kind of task, or None.

    Returns:
        a name, or None.

    Raises:
        LmcompressError: If a given column is missing or one of the texts, or none of the usual ones is there and the
            table holds more than one text.

    Example:
        >>> find_label_column(["text", "label"], ["text"], None, None)
        'label'
        >>> find_label_column(["text"], ["text"], None, None) is None
        True
    """
    if kind is TaskKind.CAUSAL_LM:
        if label_column is not None:
            raise LmcompressError(
                f"a causal_lm task has no label column, got {argument('label_column', repr(label_column))}"
            )
        return None
    if label_column is not None:
        check_column(label_column, columns)
        if label_column in text_columns:
            others = nearest(label_column, set(columns) - set(text_columns))
            raise LmcompressError(
                f"{argument('label_column')} must not be a column of texts, got {label_column!r}{others}"
            )
        return label_column
    for usual in TARGET_COLUMNS if kind is not None and kind.generates else LABEL_COLUMNS:
        if usual in columns and usual not in text_columns:
            return usual
    if kind is None and list(columns) == list(text_columns) and len(columns) == 1:
        return None
    raise LmcompressError(
        f"no label column found among: {', '.join(columns)}; name it with {argument('label_column', '')}, or give "
        f"{argument('kind', repr(TaskKind.CAUSAL_LM.value))}"
    )


def infer_kind(train: Dataset, label_column: str | None) -> TaskKind:
    """The kind of task implied by the type of the labels.

    Args:
        train: the training rows.
        label_column: None if the text itself is predicted.

    Returns:
        the kind; lists mean ``multi_label``.

    Raises:
        LmcompressError: If the type of the labels implies none.
    """
    if label_column is None:
        return TaskKind.CAUSAL_LM
    feature = train.features[label_column]
    if is_list(feature):
        return TaskKind.MULTI_LABEL
    if isinstance(feature, ClassLabel):
        return TaskKind.CLASSIFICATION
    column = arrow_column(train, label_column)
    if pa.types.is_floating(column.type):
        return TaskKind.REGRESSION
    if is_string_type(column.type):
        # csv columns are all strings: 0.5 and 3.25 are scores, 0 and 1 and "spam" are classes
        return TaskKind.REGRESSION if _looks_like_scores(column) else TaskKind.CLASSIFICATION
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return TaskKind.CLASSIFICATION
    raise LmcompressError(
        f"labels must be numbers, strings or lists of them, but column {label_column!r} holds {column.type}"
    )


def check_column(column: str, columns: Sequence[str], where: str = "") -> None:
    """Checks that ``column`` is one of ``columns``.

    Args:
        column: requested column.
        columns: existing columns.
        where: added to the message, starting with a space.

    Raises:
        LmcompressError: If it is not; the message suggests the nearest name and lists all.
    """
    if column not in columns:
        raise LmcompressError(f"no column {column!r}{where}{nearest(column, columns)}")


def check_texts(dataset: Dataset, column: str, split: str, *, words: bool) -> None:
    """Checks that a column holds a string in every row, or a list of strings if ``words``.

    Args:
        dataset: the rows.
        column: the column of texts.
        split: name of the split in messages.
        words: whether each text is a list of words.

    Raises:
        LmcompressError: If it does not; the message names the type, or the row and its value.
    """
    where = f"column {column!r} of split {split!r}"
    column_type = arrow_column(dataset, column).type
    wanted, found = ("lists of strings", _item_type(column_type)) if words else ("strings", column_type)
    if found is None or not is_string_type(found):
        raise LmcompressError(f"{where} must hold {wanted}, got {column_type}")
    values = arrow_column(dataset, column)
    if values.null_count:
        row = pc.index(pc.is_null(values), True).as_py()
        raise LmcompressError(f"{where}: row {row} (from 0) is empty (null); fill or drop rows without text")


def arrow_column(dataset: Dataset, column: str) -> pa.ChunkedArray:
    """A column as Arrow data, in row order."""
    table = dataset.select_columns([column]).with_format("arrow")[:]
    return table.column(0)


def is_list(feature: object) -> bool:
    """Whether a feature is a list, of any length."""
    return isinstance(feature, List | LargeList)


def is_string_type(arrow_type: pa.DataType) -> bool:
    """Whether an Arrow type is text."""
    return pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) or arrow_type == pa.string_view()


def string_features(columns: Sequence[str]) -> Features:
    """Features by which every column is read as text."""
    return Features({column: Value("string") for column in columns})


def _item_type(arrow_type: pa.DataType) -> pa.DataType | None:
    is_any_list = pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type)
    return arrow_type.value_type if is_any_list else None


def _looks_like_scores(column: pa.ChunkedArray) -> bool:
    try:
        numbers = [float(value) for value in column.to_pylist() if value]
    except (TypeError, ValueError):
        return False
    return any(number != int(number) for number in numbers if abs(number) != float("inf") and number == number)
