"""Sources of rows: the Hub, a folder or files, the package, or memory. All become named splits."""

from __future__ import annotations

import csv
import gzip
import lzma
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from lmcompress.data.answers import squad_rows
from lmcompress.data.columns import string_features
from lmcompress.errors import LmcompressError, argument, nearest

Rows: TypeAlias = Dataset | Sequence[Mapping[str, Any]] | str | Path
"""One split: a data set, a list of rows, or a file."""

InMemory: TypeAlias = Mapping[str, Rows] | Dataset | Sequence[Mapping[str, Any]]
"""Splits by name (including a :class:`~datasets.DatasetDict`), or training rows only."""

TRAIN_SPLIT = "{'train': ...}"
"""Spelling of the training split in messages."""

_COMPRESSION: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".json", ".txt")
_SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLIT_NAMES |= {"dev": "validation", "test": "test"}
_STEM = re.compile(r"(train|validation|valid|val|dev|test)(_matched|_mismatched)?(?:[_-](.+))?")
_SHARD = re.compile(r"\d{5}-of-\d{5}")


@dataclass(frozen=True)
class Source:
    """Splits as they were found.

    Attributes:
        splits: rows by split name; ``train``, ``validation``, ``test``, or ``validation_<something>``.
        notes: findings from the file names, such as that a split is a subset.
    """

    splits: dict[str, Dataset]
    notes: tuple[str, ...] = ()


def from_folder(folder: Path, wanted: Mapping[str, str] | None = None) -> Source:
    """The splits in a folder, one file (or several ``-00000-of-00002`` shards) each, named by split.

    ``train``, ``validation`` (``valid``, ``val``, ``dev``) and ``test`` may be followed by ``_matched`` or
    ``_mismatched``; any other suffix (``train_subset``, ``validation_1000``) is taken as a subset and noted.

    Args:
        folder: folder of parquet, csv, tsv, jsonl or txt files; text files may be compressed (``.gz``, ``.xz``).
        wanted: split name to the stem of its file, where the names are not the usual ones.

    Returns:
        the splits, under lmcompress's names.

    Raises:
        LmcompressError: If there are no such files, two match one split, or a requested one is missing.
    """
    files = {path: _stem(path) for path in sorted(folder.iterdir()) if _format(path)}
    if not files:
        raise LmcompressError(f"no data files in {folder}; expected train and validation as {', '.join(_FORMATS)}")
    if wanted is not None:
        return Source({split: read_files([_by_stem(files, stem, folder)]) for split, stem in wanted.items()})
    paths: dict[str, list[Path]] = {}
    notes = []
    for path, stem in files.items():
        if not (match := _STEM.fullmatch(stem)):
            continue
        base, half, rest = match.groups()
        split = _SPLIT_NAMES[base] + (half or "")
        is_shard = rest is not None and _SHARD.fullmatch(rest) is not None
        if split in paths and not is_shard:
            raise LmcompressError(
                f"two files for split {split!r} in {folder}: {paths[split][0].name} and {path.name}; "
                f"choose with {argument('splits', f'{{{split!r}: ...}}')}"
            )
        paths.setdefault(split, []).append(path)
        if rest and not is_shard:
            notes.append(f"{split} is a subset ({path.name}): numbers are not comparable with the whole set's")
    if not paths:
        raise LmcompressError(
            f"no file in {folder} is named train, validation or test, but there are: "
            f"{', '.join(path.name for path in files)}; choose with {argument('splits', TRAIN_SPLIT)}"
        )
    return Source({split: read_files(shards) for split, shards in paths.items()}, tuple(notes))


def from_hub(repository: str, configuration: str | None, wanted: Mapping[str, str] | None = None) -> Source:
    """The splits of a Hub data set, downloaded once and cached by ``datasets``.

    Args:
        repository: name such as ``"nyu-mll/glue"``.
        configuration: name such as ``"sst2"``.
        wanted: split name to its name on the Hub; slices such as ``"train[:1000]"`` work.

    Returns:
        the splits, under lmcompress's names.

    Raises:
        LmcompressError: If it cannot be loaded; the message contains the cause.
    """
    spelled = repository + (f":{configuration}" if configuration else "")
    try:
        loaded = datasets.load_dataset(repository, configuration, split=None if wanted is None else dict(wanted))
    except (OSError, ValueError) as error:
        raise LmcompressError(
            f"could not load {spelled!r} from the Hub ({type(error).__name__}: {error}). It is no local file or folder "
            f"either; without a network, give a folder with {argument('data', '')}"
        ) from error
    if wanted is not None:
        sliced = sorted(name for name, spec in wanted.items() if "[" in spec)
        notes = tuple(f"{name} is a subset ({wanted[name]})" for name in sliced)
        return Source(dict(loaded), notes)
    return Source({_canonical(name): split for name, split in loaded.items()})


def from_memory(data: InMemory, wanted: Mapping[str, str] | None = None) -> Source:
    """Splits that are in memory, or training rows only.

    Args:
        data: a mapping from split to rows or file; rows alone become ``train``.
        wanted: split name to the key in ``data``.

    Returns:
        the splits, under lmcompress's names.

    Raises:
        LmcompressError: If the rows have an unknown type, or a requested key is missing.
    """
    named = data if isinstance(data, Mapping) else {"train": data}
    if wanted is not None:
        for key in wanted.values():
            if key not in named:
                raise LmcompressError(f"no split {key!r}{nearest(key, named)}")
        return Source({split: _rows(named[key], split) for split, key in wanted.items()})
    return Source({_canonical(name): _rows(rows, name) for name, rows in named.items()})


def read_files(paths: Sequence[Path]) -> Dataset:
    """One split from one file, or from shards of one format.

    Every column of csv (quoted as usual) and tsv (never quoted, as in GLUE) is read as text, so that a sentence
    ``"None"`` or ``"007"`` is unchanged. A txt file is one document, byte for byte. SQuAD's nested json becomes one row
    for each question.

    Args:
        paths: one file, or the shards of one split.

    Returns:
        the rows, unchecked.

    Raises:
        LmcompressError: If a file is missing, empty, damaged, or of an unknown format.
    """
    kind = _format(paths[0])
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise LmcompressError(f"no such file: {', '.join(missing)}")
    if kind is None:
        raise LmcompressError(f"unknown format of {paths[0].name}; expected one of {', '.join(_FORMATS)}")
    if any(path.stat().st_size == 0 for path in paths):
        raise LmcompressError(f"{paths[0]} is empty")
    if kind == ".txt":
        return Dataset.from_dict({"text": [_text(path) for path in paths]})
    try:
        return _read_table(kind, paths)
    except LmcompressError:
        raise
    except (ValueError, OSError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise LmcompressError(f"could not read {paths[0]}: {type(cause).__name__}: {str(cause).strip()}") from error


def is_data_file(path: Path) -> bool:
    """Whether a path has the extension of a data file."""
    return _format(path) is not None


def _rows(rows: Rows, split: str) -> Dataset:
    if isinstance(rows, Dataset):
        return rows
    if isinstance(rows, str | Path):
        return read_files([Path(rows)])
    if isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows):
        if not rows:
            raise LmcompressError(f"split {split!r} has no rows")
        return Dataset.from_list([dict(row) for row in rows if isinstance(row, Mapping)])
    raise LmcompressError(f"split {split!r} must be a Dataset, a list of dicts or a file, got {type(rows).__name__}")


def _read_table(kind: str, paths: Sequence[Path]) -> Dataset:
    names = [str(path) for path in paths]
    if kind == ".parquet":
        return Dataset.from_parquet(names)
    if kind == ".json" and all(nested := [squad_rows(path) for path in paths]):
        return Dataset.from_list([row for rows in nested for row in rows or ()])
    if kind in (".jsonl", ".json"):
        return Dataset.from_json(names)
    options: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {"sep": ","}
    with _open(paths[0]) as file:
        lines = csv.reader(file, delimiter=options["sep"], quoting=options.get("quoting", csv.QUOTE_MINIMAL))
        header, first = next(lines), next(lines, None)
    if first is None and len(paths) == 1:
        return Dataset.from_dict({column: [] for column in header})
    return Dataset.from_csv(
        names,
        features=string_features(header),
        keep_default_na=False,
        na_filter=False,
        encoding=_encoding(paths[0]),
        **options,
    )


def _text(path: Path) -> str:
    with _open(path) as file:
        return file.read()


def _open(path: Path) -> IO[str]:
    open_text = _COMPRESSION.get(path.suffix, open)
    # newline="" keeps line ends as they are: translation would change token counts
    opened: IO[str] = open_text(path, "rt", encoding=_encoding(path), newline="")
    return opened


def _encoding(path: Path) -> str:
    """UTF-8; of a table without the mark that spreadsheets begin with, which the first column would be called by."""
    return "utf-8" if _format(path) == ".txt" else "utf-8-sig"


def _format(path: Path) -> str | None:
    plain = path.with_suffix("") if path.suffix in _COMPRESSION else path
    return plain.suffix if plain.suffix in _FORMATS else None


def _stem(path: Path) -> str:
    return path.name.removesuffix(path.suffix if path.suffix in _COMPRESSION else "").rpartition(".")[0]


def _by_stem(files: Mapping[Path, str], stem: str, folder: Path) -> Path:
    found = [path for path, name in files.items() if name == stem]
    if len(found) != 1:
        raise LmcompressError(f"{len(found) or 'no'} files named {stem!r} in {folder}{nearest(stem, files.values())}")
    return found[0]


def _canonical(name: str) -> str:
    match = _STEM.fullmatch(name)
    if not match or match.group(3):
        return name
    return _SPLIT_NAMES[match.group(1)] + (match.group(2) or "")
