"""Labels of any type converted to the numbers a model is trained on, each one checked."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from datasets import ClassLabel, Dataset, List, Value

from lmcompress.data.columns import arrow_column, is_list
from lmcompress.data.tasks import Task, TaskKind
from lmcompress.errors import LmcompressError

IGNORED_LABEL = -100
"""The label that losses ignore."""

HIDDEN_LABEL = -1
"""Label of rows without one in the Hub's GLUE test sets."""


def find_label_names(train: Dataset, column: str, kind: TaskKind) -> tuple[str, ...] | None:
    """The classes of a task, fixed by its training rows.

    Those of the column's :class:`~datasets.ClassLabel` if it has one, otherwise its values in sorted order:
    whole numbers (also those written as text) by size, strings by code point. For ``multi_label`` rows of zeros and
    ones, the classes are numbered.

    Args:
        train: the training rows.
        column: the label column.
        kind: kind of the labels.

    Returns:
        None for ``regression``.

    Raises:
        LmcompressError: If there are fewer than two classes, or a row has no label.
    """
    if kind is TaskKind.REGRESSION:
        return None
    feature = train.features[column]
    if names := _class_label_names(feature):
        return names
    rows = arrow_column(train, column).to_pylist()
    where = f"column {column!r} of split 'train'"
    if kind is TaskKind.MULTI_LABEL and not _holds_strings(feature):
        _check_not_null(rows, where)
        return tuple(str(index) for index in range(_multi_hot_width(rows, where)))
    _check_not_null(rows, where)
    values = {_plain(value) for value in _flat(rows)}
    if HIDDEN_LABEL in values:
        row_number = next(i for i, row in enumerate(rows) if HIDDEN_LABEL in map(_plain, _flat([row])))
        raise LmcompressError(f"{where}: row {row_number} (from 0) has the label -1, which means none; drop such rows")
    if len(values) < 2:
        raise LmcompressError(f"{where} must hold at least two classes, got only {sorted(map(str, values))}")
    all_numbers = all(isinstance(value, int) for value in values)
    return tuple(str(value) for value in (sorted(values) if all_numbers else sorted(map(str, values))))


def encode_labels(dataset: Dataset, task: Task, split: str) -> Dataset:
    """``dataset`` with its label column as numbers.

    These are int64 classes, float32 scores, float32 rows of zeros and ones, or a list with a class for each word.

    Args:
        dataset: rows with the task's label column, as names, numbers or :class:`~datasets.ClassLabel`.
        task: determines the classes.
        split: name of the split in messages.

    Returns:
        the same rows, in order; the label column comes last.

    Raises:
        LmcompressError: If the task has no labels, or a label is missing, unknown, out of range or not a number; the
            message names row and value.
    """
    column = task.label_column
    if column is None:
        raise LmcompressError(f"{task.name} is a {task.kind} task, which has no labels to encode")
    feature = dataset.features[column]
    where = f"column {column!r} of split {split!r}"
    _check_same_names(feature, task, where)
    rows = arrow_column(dataset, column).to_pylist()
    _check_not_null(rows, where)
    encode = {
        TaskKind.CLASSIFICATION: _encode_classes,
        TaskKind.REGRESSION: _encode_scores,
        TaskKind.MULTI_LABEL: _encode_multi_hot,
        TaskKind.TOKEN_CLASSIFICATION: _encode_words,
    }[task.kind]
    encoded, target = encode(rows, task, where, feature)
    kept = dataset.remove_columns(column)
    return kept.add_column(column, encoded, feature=target)


def labels_are_hidden(dataset: Dataset, column: str) -> bool:
    """Whether no row has a label: the column is missing, or -1 or null in every row."""
    if column not in dataset.column_names:
        return True
    if is_list(dataset.features[column]):
        return False
    return all(value is None or _plain(value) == HIDDEN_LABEL for value in arrow_column(dataset, column).to_pylist())


Encoded = tuple[list[Any], Any]


def _encode_classes(rows: list[Any], task: Task, where: str, feature: object) -> Encoded:
    look_up = _class_lookup(task, feature, rows)
    target = ClassLabel(names=list(task.label_names or ()))
    return [_class_of(value, look_up, task, where, row) for row, value in enumerate(rows)], target


def _encode_words(rows: list[Any], task: Task, where: str, feature: object) -> Encoded:
    look_up = _class_lookup(task, feature, rows)
    target = List(ClassLabel(names=list(task.label_names or ())))
    return [[_class_of(v, look_up, task, where, row) for v in values] for row, values in enumerate(rows)], target


def _encode_scores(rows: list[Any], task: Task, where: str, feature: object) -> Encoded:
    del task, feature
    scores = []
    for row, value in enumerate(rows):
        try:
            score = float(value)
        except (TypeError, ValueError):
            raise LmcompressError(f"{where}: row {row} (from 0) must be a number, got {value!r}") from None
        if not math.isfinite(score):
            raise LmcompressError(f"{where}: row {row} (from 0) must be a finite number, got {score}")
        scores.append(score)
    return scores, Value("float32")


def _encode_multi_hot(rows: list[Any], task: Task, where: str, feature: object) -> Encoded:
    target = List(Value("float32"))
    if not _holds_strings(feature) and not _class_label_names(feature):
        width = _multi_hot_width(rows, where)
        if width != task.num_labels:
            raise LmcompressError(f"{where} must have {task.num_labels} labels per row, as in training, got {width}")
        return [[float(value) for value in values] for values in rows], target
    look_up = _class_lookup(task, feature, rows)
    encoded = []
    for row, values in enumerate(rows):
        hot = [0.0] * task.num_labels
        for value in values:
            hot[_class_of(value, look_up, task, where, row)] = 1.0
        encoded.append(hot)
    return encoded, target


def _class_lookup(task: Task, feature: object, rows: list[Any]) -> dict[Hashable, int]:
    """Class by label, for every spelling of the labels in the data."""
    names = task.label_names or ()
    by_name: dict[Hashable, int] = {name: index for index, name in enumerate(names)}
    if _class_label_names(feature) is None and _are_numbers(names):
        # these numbers are values, whose sorted order defines the classes
        return {**by_name, **{int(name): index for index, name in enumerate(names)}}
    # "1" may be a class index in a text file, but not next to labels that are names
    if _holds_strings(feature) and not _are_numbers(_flat(rows)):
        return by_name
    return {**by_name, **{index: index for index in range(len(names))}}


def _class_of(value: Any, look_up: dict[Hashable, int], task: Task, where: str, row: int) -> int:
    found = look_up.get(value, look_up.get(_plain(value)))
    if found is None:
        names = task.label_names or ()
        shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
        raise LmcompressError(
            f"{where}: row {row} (from 0) has the label {value!r}, which is out of range; the {len(names)} classes, "
            f"as fixed by the task or its training rows, are: {shown} (numbers 0 to {len(names) - 1})"
        )
    return found


def _plain(value: Any) -> Any:
    """Integers as int, however they are written; ``True`` is not 1, its name is 'True'."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and (value.isdecimal() or value[:1] == "-" and value[1:].isdecimal()):
        return int(value)
    return value


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(_plain(value), int) for value in values)


def _flat(rows: list[Any]) -> Iterator[Any]:
    for row in rows:
        yield from row if isinstance(row, list) else [row]


def _class_label_names(feature: object) -> tuple[str, ...] | None:
    item = _item(feature)
    return tuple(item.names) if isinstance(item, ClassLabel) else None


def _holds_strings(feature: object) -> bool:
    return _item(feature) in (Value("string"), Value("large_string"))


def _item(feature: Any) -> Any:
    """The element type of a list, or of a list of lists; any other feature itself."""
    while is_list(feature):
        feature = feature.feature
    return feature


def _check_same_names(feature: object, task: Task, where: str) -> None:
    names = _class_label_names(feature)
    if names is not None and task.label_names is not None and names != task.label_names:
        raise LmcompressError(
            f"{where} has the label names {list(names)}, but the task has {list(task.label_names)}: the same number "
            "would mean two classes. Rename or reorder the labels so that both agree"
        )


def _check_not_null(rows: list[Any], where: str) -> None:
    for row, value in enumerate(rows):
        if any(label is None or label == "" for label in _flat([value])):
            raise LmcompressError(f"{where}: row {row} (from 0) has no label (null); drop rows without labels")


def _multi_hot_width(rows: list[Any], where: str) -> int:
    width = len(rows[0])
    for row, values in enumerate(rows):
        if len(values) != width or any(value not in (0, 1) for value in values):
            raise LmcompressError(
                f"{where}: row {row} (from 0) must be {width} zeros and ones, one for each label, got {values}; "
                "or give lists of names"
            )
    return width
