"""Digests of the contents that a stage depends on: rows, and models on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import try_to_load_from_cache

from lmcompress.data import Task
from lmcompress.evaluation.size import INDEX_FILE, OTHER_FILES

MODEL_FILES = ("*.safetensors", "*.bin", "*.py", INDEX_FILE, "pytorch_model.bin.index.json", *OTHER_FILES)
"""Patterns of the files that a model and its tokenizer are loaded from. Reports and cards are not among them: a run
writes them anew each time."""

_NOT_OF_A_MODEL = ("training_args.bin", "optimizer.bin", "scheduler.bin")
_CHUNK = 1 << 22
_ROWS_AT_ONCE = 1000


def digest(value: Any) -> str:
    """A digest of JSON types.

    Args:
        value: JSON types; mappings in any order.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_of_rows(rows: Dataset, task: Task) -> str:
    """A digest of the values of all rows in their order, wherever they come from.

    ``Dataset._fingerprint`` is of the operations that made a data set, not of its values.

    Args:
        rows: of any source.
        task: its labels' names are part of the digest.
    """
    columns = sorted(rows.column_names)
    found = hashlib.sha256(json.dumps([columns, str(task.kind), task.label_names]).encode())
    for batch in rows.with_format(None).iter(_ROWS_AT_ONCE):
        found.update(json.dumps([batch[column] for column in columns], default=str).encode())
    return found.hexdigest()


def fingerprint_of_model(name: str | Path) -> str | None:
    """A digest of the files that a model is loaded from; for a name on the Hub, the commit in the local cache.

    Args:
        name: folder, or name on the Hub.

    Returns:
        None if the model is neither a folder nor in the cache: nothing can be said of its contents.
    """
    folder = Path(name)
    if not folder.is_dir():
        cached = try_to_load_from_cache(str(name), "config.json")
        # .../snapshots/<commit>/config.json
        return Path(cached).parent.name if isinstance(cached, str) else None
    return digest([[file.name, _of_file(file)] for file in model_files(folder)])


def model_files(folder: Path) -> list[Path]:
    """The files of a folder that its model and tokenizer are loaded from, by name.

    Args:
        folder: a checkpoint; its subfolders are not looked into.
    """
    found = {file for pattern in MODEL_FILES for file in folder.glob(pattern)}
    return sorted(file for file in found if file.is_file() and file.name not in _NOT_OF_A_MODEL)


def _of_file(file: Path) -> str:
    about = file.stat()
    return _of_contents(file.resolve(), about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=1024)
def _of_contents(file: Path, size: int, modified: int) -> str:
    """Digest of a file's bytes, read once in a process as long as size and time of change stay the same."""
    del size, modified
    found = hashlib.sha256()
    with file.open("rb") as stream:
        for chunk in _chunks(stream.read):
            found.update(chunk)
    return found.hexdigest()


def _chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while chunk := read(_CHUNK):
        yield chunk
