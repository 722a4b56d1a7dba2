"""Real inputs for a model from any source of texts, for calibration and comparisons that need no labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lmcompress.data import load_task
from lmcompress.data.columns import find_text_columns, is_list
from lmcompress.data.sources import read_files
from lmcompress.errors import LmcompressError, argument

_ROWS_OF_A_BATCH = 8


def text_batches(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    max_length: int,
    text_columns: Sequence[str] | None = None,
) -> list[dict[str, Tensor]]:
    """The first texts of a source, tokenized and padded.

    Args:
        source: a file (csv, tsv, json, jsonl, parquet; txt with a text in each line), ``glue/<task>`` or
            ``embedded/<name>``.
        tokenizer: the model's.
        rows: the greatest number of texts.
        max_length: the greatest number of tokens of each.
        text_columns: one column or two, for pairs; None: the usual names.

    Returns:
        Batches as the model takes them.

    Raises:
        LmcompressError: If there are no texts, or the source is of no known form.
    """
    table, columns = _read(source, text_columns)
    table = table.select(range(min(rows, table.num_rows)))
    if not table.num_rows or rows < 1:
        raise LmcompressError(f"{source} must have texts, got {min(rows, table.num_rows)} of them")
    split = is_list(table.features[columns[0]])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batches: list[dict[str, Tensor]] = []
    for start in range(0, table.num_rows, _ROWS_OF_A_BATCH):
        part: Any = table[start : start + _ROWS_OF_A_BATCH]
        texts = [list(part[column]) for column in columns]
        options = dict(padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        batches.append(dict(tokenizer(*texts, is_split_into_words=split, **options)))
    return batches


def _read(source: str, text_columns: Sequence[str] | None) -> tuple[Dataset, tuple[str, ...]]:
    file = Path(source)
    if file.is_file():
        table = read_files([file])
        if file.suffix == ".txt":
            lines = [line for line in table[0]["text"].splitlines() if line.strip()]
            table = Dataset.from_dict({"text": lines})
        return table, find_text_columns(table.column_names, text_columns)
    if source.partition("/")[0] not in ("glue", "embedded"):
        raise LmcompressError(
            f"{argument('data')} must be a file of texts, glue/<task> or embedded/<name>, got {source!r}"
            + ("" if not file.exists() else ", a folder")
        )
    data = load_task(source, text_columns=text_columns)
    splits = data.splits()
    return splits["train"], data.task.text_columns
