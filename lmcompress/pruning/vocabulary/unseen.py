"""What a smaller vocabulary does to texts that it was not chosen from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lmcompress.pruning.vocabulary.tokenizers import checked_texts, encodings, plain_backend


@dataclass(frozen=True)
class UnseenRows:
    """Rows of a split, read with a smaller vocabulary.

    Attributes:
        rows: number of rows.
        changed: those that are tokenized differently.
        unknown: those of them with more unknown tokens than before.
    """

    rows: int
    changed: int
    unknown: int


def unseen_rows(
    before: PreTrainedTokenizerBase,
    after: PreTrainedTokenizerBase,
    old_ids: Sequence[int],
    columns: Sequence[Sequence[str]],
) -> UnseenRows:
    """Count the rows that a smaller vocabulary reads differently.

    Args:
        before: tokenizer with the full vocabulary.
        after: tokenizer with the smaller one.
        old_ids: for each new id the old one: ``old_ids`` of a
            :class:`~lmcompress.pruning.vocabulary.report.VocabularyReport`.
        columns: texts of all rows; two sequences of one length for pairs.

    Raises:
        LmcompressError: If a tokenizer is a slow one, or a text is not a string.
    """
    old, new = plain_backend(before), plain_backend(after)
    rows = len(columns[0]) if columns else 0
    changed, unknown = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=np.int64)
    for column in columns:
        texts = checked_texts(column)
        for row, (was, now) in enumerate(zip(encodings(old, texts), encodings(new, texts), strict=True)):
            changed[row] |= was.ids != [old_ids[number] for number in now.ids]
            unknown[row] += now.ids.count(after.unk_token_id) - was.ids.count(before.unk_token_id)
    return UnseenRows(rows, int(changed.sum()), int((unknown > 0).sum()))
