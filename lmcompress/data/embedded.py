"""Small data sets shipped inside the package, for the quickstart and for tests (licences: ``embedded/NOTICE.md``)."""

from __future__ import annotations

import lzma
import re
from collections.abc import Mapping
from importlib import resources

from datasets import Dataset

from lmcompress.data.tasks import TaskKind

EMBEDDED_SETS: Mapping[str, tuple[TaskKind, tuple[str, ...], str | None]] = {
    "clinc150": (TaskKind.CLASSIFICATION, ("text",), "intent"),
    "clinc150_pairs": (TaskKind.CLASSIFICATION, ("sentence1", "sentence2"), "label"),
    "inaugural": (TaskKind.CAUSAL_LM, ("text",), None),
}
"""Name to (kind, text columns, label column)."""

_PAIR_LABELS = {"0": "different_intent", "1": "same_intent"}
# Hoover's and Johnson's addresses have sections that are separated like addresses: these parts continue the previous
# one
_INAUGURAL_SECTIONS = frozenset({*range(36, 48), *range(57, 61)})
_INAUGURAL_VALIDATION = 6


def embedded_splits(name: str) -> dict[str, Dataset]:
    """The splits of one of :data:`EMBEDDED_SETS`, in memory.

    - ``clinc150``: a sentence and its ``intent``, one of 150; 15000 / 3000 / 4500 rows.
    - ``clinc150_pairs``: two sentences and whether they have the same intent; 6000 / 1000 / 1000 rows.
    - ``inaugural``: addresses of US presidents, one per row; 53 / 6 rows, the last six for validation.
    """
    if name == "inaugural":
        return _inaugural()
    splits = {split: _table(f"{name}_{split}.tsv.xz") for split in ("train", "validation", "test")}
    if name == "clinc150_pairs":
        for columns in splits.values():
            columns["label"] = [_PAIR_LABELS[label] for label in columns["label"]]
    return {split: Dataset.from_dict(columns) for split, columns in splits.items()}


def _read(file_name: str) -> str:
    packed = (resources.files("lmcompress.data") / "embedded" / file_name).read_bytes()
    return lzma.decompress(packed).decode("utf-8")


def _table(file_name: str) -> dict[str, list[str]]:
    header, *rows = (line.split("\t") for line in _read(file_name).rstrip("\n").split("\n"))
    return {column: list(cells) for column, cells in zip(header, zip(*rows, strict=True), strict=True)}


def _inaugural() -> dict[str, Dataset]:
    addresses: list[str] = []
    for index, part in enumerate(re.split(r"\n{3,}", _read("inaugural.txt.xz").strip())):
        if index in _INAUGURAL_SECTIONS:
            addresses[-1] += "\n\n" + part
        else:
            addresses.append(part)
    return {
        "train": Dataset.from_dict({"text": addresses[:-_INAUGURAL_VALIDATION]}),
        "validation": Dataset.from_dict({"text": addresses[-_INAUGURAL_VALIDATION:]}),
    }
