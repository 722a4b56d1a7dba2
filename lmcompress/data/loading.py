"""Loading a task by name, with its rows checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import Dataset

from lmcompress.data.answers import encode_answers, holds_answers
from lmcompress.data.chat import MESSAGES, check_conversations
from lmcompress.data.columns import check_column, check_texts, find_label_column, find_text_columns, infer_kind, is_list
from lmcompress.data.embedded import EMBEDDED_SETS, embedded_splits
from lmcompress.data.glue import EVALUATION_ONLY, GLUE_HUB_ID, GLUE_TASKS
from lmcompress.data.labels import encode_labels, find_label_names, labels_are_hidden
from lmcompress.data.sources import (
    TRAIN_SPLIT,
    InMemory,
    Source,
    from_folder,
    from_hub,
    from_memory,
    is_data_file,
    read_files,
)
from lmcompress.data.tasks import Task, TaskData, TaskKind, task_kind
from lmcompress.errors import LmcompressError, argument, nearest

HELD_OUT_SHARE = 0.1
"""Share of the training rows that becomes ``validation`` if a source has none."""

_SEED = 0


def load_task(
    name_or_path: str | Path,
    *,
    data: str | Path | InMemory | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    kind: str | None = None,
    splits: Mapping[str, str] | None = None,
    limit: int | None = None,
    chat: bool = False,
) -> TaskData:
    """Reads a task from any source, infers its kind unless given, and checks every row.

    Args:
        name_or_path: one of

            - ``"glue/sst2"`` and the other GLUE tasks, from the Hub or from ``data``;
            - ``"embedded/clinc150"``, ``"embedded/clinc150_pairs"``, ``"embedded/inaugural"``: shipped with the
              package;
            - a folder of ``train``, ``validation`` and ``test`` files, or one file (parquet, csv, tsv, jsonl, txt);
            - a Hub data set, ``"owner/name"`` or ``"owner/name:configuration"``;
            - with ``data``, a name of the user's choice.
        data: a folder (for GLUE tasks, the one that holds ``glue/<task>/``), or rows in memory: a ``DatasetDict``, a
            ``Dataset``, a list of dicts, or a dict of those or of files by split.
        text_columns: one or two columns; default: the usual names.
        label_column: default: the usual names. A table with only texts is ``causal_lm``.
        kind: a :class:`~lmcompress.data.tasks.TaskKind`; default: inferred from the labels (integers and strings
            are classes, other numbers are scores, lists are several labels, or one for each word, ``{text,
            answer_start}`` are answers in a context). Texts that are to be written are ``summarization`` or
            ``translation`` if that is said: by themselves they are names of classes.
        splits: ``train``, ``validation``, ``test``, ``validation_<name>`` to their names in the source; default: all
            splits, by name.
        limit: maximum number of rows of each split, drawn with a fixed seed and kept in order.
        chat: whether rows are conversations: a list of messages with ``role`` and ``content``, in the column
            ``messages`` or the one in ``text_columns``. Their kind is ``causal_lm``.

    Returns:
        Rows with the text columns and the label column only. Labels are numbers: int64 classes, float32 scores,
        float32 zeros and ones, a list of classes, or answers (``{text: [...], answer_start: [...]}``). Without a
        validation split, a tenth of the training rows is held out (the last tenth of a single text). ``notes``
        describes what was done.

    Raises:
        LmcompressError: If a name is unknown, a file or column is missing, a split is empty, a text is not a string, a
            label is missing, not a number, out of range, or unknown from training, or an answer does not stand where it
            says. Messages name row and value.

    Example:
        >>> pairs = load_task("embedded/clinc150_pairs", limit=10)
        >>> pairs.task.label_names, pairs.train.num_rows
        (('different_intent', 'same_intent'), 10)
    """
    if limit is not None and limit < 1:
        raise LmcompressError(f"limit must be >= 1, got {limit}")
    _check_split_names(splits)
    name = str(name_or_path)
    prefix, _, rest = name.partition("/")
    if prefix in ("glue", "embedded") and not Path(name).exists():
        if text_columns is not None or label_column is not None or kind is not None or chat:
            given = ", ".join(argument(word) for word in ("text_columns", "label_column", "kind", "chat"))
            raise LmcompressError(f"{name} fixes its own columns and kind; leave out {given}")
        task, source = _glue(rest, data, splits) if prefix == "glue" else _embedded(rest, data, splits)
    else:
        source = _used_splits(name, _own_source(name, data, splits))
        described = _describe_chat if chat else _describe
        task = described(name, source, text_columns, label_column, kind)
    return limit_rows(_assemble(task, source), limit)


def _glue(name: str, data: str | Path | InMemory | None, splits: Mapping[str, str] | None) -> tuple[Task, Source]:
    if name not in GLUE_TASKS:
        raise LmcompressError(f"no GLUE task {name!r}{nearest(name, GLUE_TASKS)}")
    task = GLUE_TASKS[name]
    return task, _scored_diagnostics(task, _used_splits(task.name, _glue_source(name, data, splits)))


def _embedded(name: str, data: str | Path | InMemory | None, splits: Mapping[str, str] | None) -> tuple[Task, Source]:
    if name not in EMBEDDED_SETS:
        raise LmcompressError(f"no embedded data set {name!r}{nearest(name, EMBEDDED_SETS)}")
    if data is not None:
        raise LmcompressError(
            f"embedded/{name} is in the package; leave out {argument('data')}, or choose another name"
        )
    kind, text_columns, label_column = EMBEDDED_SETS[name]
    source = from_memory(embedded_splits(name), splits)
    return _describe(f"embedded/{name}", source, text_columns, label_column, kind), source


def _glue_source(name: str, data: str | Path | InMemory | None, splits: Mapping[str, str] | None) -> Source:
    if data is None:
        return from_hub(GLUE_HUB_ID, name, splits)
    if not isinstance(data, str | Path):
        return from_memory(data, splits)
    folder = Path(data) / "glue" / name
    if not folder.is_dir():
        raise LmcompressError(
            f"no folder {folder}; {argument('data', '')} must hold glue/{name}/ with its splits as files"
        )
    return from_folder(folder, splits)


def _own_source(name: str, data: str | Path | InMemory | None, splits: Mapping[str, str] | None) -> Source:
    if data is not None and not isinstance(data, str | Path):
        return from_memory(data, splits)
    path = Path(name if data is None else data)
    if path.is_dir():
        return from_folder(path, splits)
    if path.is_file():
        return Source({"train": read_files([path])})
    if data is not None or is_data_file(path) or name.startswith((".", "/")):
        raise LmcompressError(f"no such file or folder: {path}")
    if name in GLUE_TASKS:
        raise LmcompressError(f"the GLUE task is called 'glue/{name}', got {name!r}")
    repository, _, configuration = name.partition(":")
    return from_hub(repository, configuration or None, splits)


def _used_splits(name: str, source: Source) -> Source:
    """The splits that a task uses, none of them empty; the others are noted."""
    used = {split: rows for split, rows in source.splits.items() if _is_split_name(split)}
    if not used:
        raise LmcompressError(
            f"{name} has no train split, only: {', '.join(source.splits)}; choose with "
            f"{argument('splits', TRAIN_SPLIT)}"
        )
    for split, rows in used.items():
        if not rows.num_rows:
            raise LmcompressError(f"split {split!r} of {name} has no rows")
    notes = tuple(f"split {split!r} of the source is not used" for split in source.splits if split not in used)
    return Source(used, (*source.notes, *notes))


def _describe(
    name: str,
    source: Source,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    kind: str | None,
) -> Task:
    """The task implied by the training rows (or, without any, by the first split's)."""
    rows = source.splits.get("train", next(iter(source.splits.values())))
    wanted = None if kind is None else task_kind(kind)
    texts = find_text_columns(rows.column_names, text_columns)
    label = find_label_column(rows.column_names, texts, label_column, wanted)
    if wanted is None and label is not None and holds_answers(rows.features[label]):
        wanted = TaskKind.QUESTION_ANSWERING
    found = wanted or infer_kind(rows, label)
    if wanted is None and found is TaskKind.MULTI_LABEL and is_list(rows.features[texts[0]]):
        found = TaskKind.TOKEN_CLASSIFICATION
    if label is None or found is TaskKind.QUESTION_ANSWERING or found.generates:
        return Task(name, found, texts, label)
    needs_lists = found in (TaskKind.MULTI_LABEL, TaskKind.TOKEN_CLASSIFICATION)
    if needs_lists != is_list(rows.features[label]):
        raise LmcompressError(
            f"column {label!r} must {'' if needs_lists else 'not '}hold lists for a {found} task, "
            f"got {rows.features[label]}"
        )
    return Task(name, found, texts, label, find_label_names(rows, label, found))


def _describe_chat(
    name: str,
    source: Source,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    kind: str | None,
) -> Task:
    """The task of conversations."""
    if label_column is not None or kind not in (None, TaskKind.CAUSAL_LM.value):
        given = argument("kind", repr(kind)) if label_column is None else argument("label_column", repr(label_column))
        raise LmcompressError(
            f"{argument('chat', 'True')} is of causal_lm, whose labels are the answers, got {given}; leave it out"
        )
    columns = source.splits.get("train", next(iter(source.splits.values()))).column_names
    texts = (MESSAGES,) if text_columns is None else tuple(text_columns)
    for column in texts:
        check_column(column, columns)
    return Task(name, TaskKind.CAUSAL_LM, texts, chat=True)


def _assemble(task: Task, source: Source) -> TaskData:
    splits = dict(source.splits)
    notes = list(source.notes)
    checked: dict[str, Dataset] = {}
    for split, rows in splits.items():
        ready, note = _check_split(task, split, rows)
        checked[split] = ready
        notes += note
    if "validation" not in checked and "validation_matched" in checked:
        checked["validation"] = checked.pop("validation_matched")
    if task in EVALUATION_ONLY:
        return _evaluation_only(task, checked, notes)
    if "train" not in checked:
        raise LmcompressError(
            f"{task.name} has no train split, only: {', '.join(splits)}; choose with {argument('splits', TRAIN_SPLIT)}"
        )
    if "validation" not in checked:
        checked["train"], checked["validation"], note_text = _hold_out(checked["train"], task)
        notes.append(note_text)
    train, validation, test = checked.pop("train"), checked.pop("validation"), checked.pop("test", None)
    return TaskData(task, train, validation, test, checked, tuple(notes))


def _check_split(task: Task, split: str, rows: Dataset) -> tuple[Dataset, list[str]]:
    """The task's columns, checked and encoded; and a note if a test split has no labels."""
    is_words = task.kind is TaskKind.TOKEN_CLASSIFICATION
    for column in task.text_columns:
        check_column(column, rows.column_names, f" in split {split!r}")
        if task.chat:
            check_conversations(rows, column, split)
        else:
            check_texts(rows, column, split, words=is_words)
    label = task.label_column
    if label is None:
        return rows.select_columns(list(task.text_columns)), []
    if split == "test" and labels_are_hidden(rows, label):
        return rows.select_columns(list(task.text_columns)), ["test has no labels: it can be predicted, not scored"]
    check_column(label, rows.column_names, f" in split {split!r}")
    chosen = rows.select_columns([*task.text_columns, label])
    if task.kind is TaskKind.QUESTION_ANSWERING:
        return encode_answers(chosen, task.text_columns[1], label, split), []
    if task.kind.generates:
        check_texts(chosen, label, split, words=False)
        return chosen, []
    ready = encode_labels(chosen, task, split)
    if is_words:
        _check_a_label_for_each_word(ready, task.text_columns[0], label, split)
    return ready, []


def _check_a_label_for_each_word(rows: Dataset, text: str, label: str, split: str) -> None:
    for row, (words, labels) in enumerate(zip(rows[text], rows[label], strict=True)):
        if len(words) != len(labels):
            raise LmcompressError(
                f"split {split!r}: row {row} (from 0) must have one label for each word, got {len(words)} words and "
                f"{len(labels)} labels"
            )


def _scored_diagnostics(task: Task, source: Source) -> Source:
    """AX has only a test split on the Hub, without labels; a copy with labels can be evaluated."""
    if task not in EVALUATION_ONLY or "test" not in source.splits or "validation" in source.splits:
        return source
    if task.label_column is None or labels_are_hidden(source.splits["test"], task.label_column):
        return source
    renamed = {("validation" if split == "test" else split): rows for split, rows in source.splits.items()}
    return replace(source, splits=renamed)


def _evaluation_only(task: Task, checked: dict[str, Dataset], notes: list[str]) -> TaskData:
    nothing = next(iter(checked.values())).select([])
    note = f"{task.name} has no training data: evaluate a model that was trained on glue/mnli"
    return TaskData(task, nothing, checked.get("validation", nothing), checked.get("test"), notes=(*notes, note))


def _hold_out(train: Dataset, task: Task) -> tuple[Dataset, Dataset, str]:
    share = f"{HELD_OUT_SHARE:.0%}"
    if train.num_rows == 1:
        if task.kind is not TaskKind.CAUSAL_LM or task.chat:
            raise LmcompressError("one training row and no validation split: no rows can be held out; add rows")
        column = task.text_columns[0]
        head, tail = _cut_text(train[0][column])
        note = f"validation is the last {share} of the training text, which is excluded from training"
        return Dataset.from_dict({column: [head]}), Dataset.from_dict({column: [tail]}), note
    held_out = max(1, round(train.num_rows * HELD_OUT_SHARE))
    halves = train.train_test_split(test_size=held_out, seed=_SEED)
    note = f"validation is {held_out} rows ({share}) held out of train, drawn with seed {_SEED}"
    return halves["train"], halves["test"], note


def _cut_text(text: str) -> tuple[str, str]:
    """Splits after the line that holds the split point, or at the point itself if that is the last line."""
    point = int(len(text) * (1 - HELD_OUT_SHARE))
    line_end = text.find("\n", point) + 1
    cut = line_end if 0 < line_end < len(text) else point
    if not text[:cut].strip() or not text[cut:].strip():
        raise LmcompressError("the training text is too short to hold out a part of it; give a validation split")
    return text[:cut], text[cut:]


def limit_rows(data: TaskData, limit: int | None, *, first: bool = False) -> TaskData:
    """At most ``limit`` rows of each split, in order; ``notes`` names the splits that were reduced.

    Args:
        data: the task's data.
        limit: maximum number of rows of a split; None: all.
        first: whether to take the first rows instead of rows drawn with a fixed seed.
    """
    if limit is None:
        return data
    cut = [split for split, rows in data.splits().items() if rows.num_rows > limit]

    def draw(split: str, rows: Dataset) -> Dataset:
        if split not in cut:
            return rows
        if first:
            return rows.select(range(limit))
        chosen = np.random.default_rng(_SEED).permutation(rows.num_rows)[:limit]
        return rows.select(np.sort(chosen))

    which = f"the first {limit} blocks" if first else f"{limit} rows drawn with seed {_SEED}"
    notes = tuple(f"{split} is a subset ({which})" for split in cut)
    return replace(data.map_splits(draw), notes=(*data.notes, *notes))


def _check_split_names(splits: Mapping[str, str] | None) -> None:
    for split in splits or ():
        if not _is_split_name(split):
            raise LmcompressError(f"unknown split {split!r}{nearest(split, ['train', 'validation', 'test'])}")


def _is_split_name(split: str) -> bool:
    return split in ("train", "validation", "test") or split.startswith("validation_")
