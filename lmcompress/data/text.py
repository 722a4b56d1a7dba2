"""Running text for causal language models: blocks of one length, packed documents, pieces for two tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeAlias

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lmcompress.data.labels import IGNORED_LABEL
from lmcompress.errors import LmcompressError

Tokens: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]
"""Ids of tokens, one after the other."""

TEACHER_PREFIX = "teacher_"
"""Prefix of the columns of a teacher with another tokenizer: ``teacher_input_ids``."""

_DOCUMENTS_AT_ONCE = 1000


def pack_blocks(
    texts: Dataset | Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int, *, text_column: str = "text"
) -> Dataset:
    """Joins documents with an end-of-sequence token between them and splits the result into blocks of one length.

    No padding and no other special tokens; trailing tokens that do not fill a block are dropped.

    Args:
        texts: documents, or a data set with documents in ``text_column``.
        tokenizer: must have an ``eos_token`` if there are several documents.
        block_size: tokens per block.
        text_column: column of a data set's documents.

    Returns:
        ``input_ids``, ``attention_mask`` (all 1) and ``labels`` (the same as ``input_ids``: the model shifts them),
        ``block_size`` values each.

    Raises:
        LmcompressError: If the text is shorter than a block, or the tokenizer has no ``eos_token``.
    """
    _check_block(block_size)
    documents = texts[text_column] if isinstance(texts, Dataset) else texts
    pieces: list[Tokens] = []
    for ids in _tokenized(iter(documents), tokenizer):
        if pieces:
            pieces.append(_end_of_sequence(tokenizer))
        pieces.append(_as_array(ids))
    blocks = _blocks(np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64), block_size)
    return Dataset.from_dict({"input_ids": blocks, "attention_mask": np.ones_like(blocks), "labels": blocks})


def pack_documents(
    texts: Dataset | Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int, *, text_column: str = "text"
) -> Dataset:
    """Documents packed into blocks of one length whose position ids begin anew at each document.

    A model that keeps packed documents apart attends within each of them only, as if it had a row of its own; every
    document ends with an end-of-sequence token. One that does not fit goes on in the next block, without what came
    before; trailing tokens that do not fill a block are dropped.

    Args:
        texts: documents, or a data set with documents in ``text_column``.
        tokenizer: must have an ``eos_token``.
        block_size: tokens per block.
        text_column: column of a data set's documents.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``, ``block_size`` values each; no ``attention_mask``, which would
        turn packing off. Labels are -100 at the first token of a document, which nothing predicts.

    Raises:
        LmcompressError: If the text is shorter than a block, or the tokenizer has no ``eos_token``.
    """
    _check_block(block_size)
    documents = texts[text_column] if isinstance(texts, Dataset) else texts
    end = _end_of_sequence(tokenizer)
    pieces = [np.concatenate([ids, end]) for ids in map(_as_array, _tokenized(iter(documents), tokenizer)) if len(ids)]
    tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
    blocks = _blocks(tokens, block_size)
    begins = np.zeros(len(tokens), dtype=bool)
    begins[np.cumsum([0, *map(len, pieces[:-1])])] = True
    begins = begins[: blocks.size].reshape(blocks.shape)
    begins[:, 0] = True
    places = np.broadcast_to(np.arange(block_size), blocks.shape)
    positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    labels = np.where(begins, IGNORED_LABEL, blocks)
    return Dataset.from_dict({"input_ids": blocks, "position_ids": positions, "labels": labels})


def documents_for_two(
    texts: Dataset | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    max_length: int,
    *,
    text_column: str = "text",
) -> Dataset:
    """The same pieces of text as tokens of a student and of a teacher with another tokenizer.

    Args:
        texts: documents, or a data set with documents in ``text_column``.
        tokenizer: the student's; a fast one. A document of more than ``max_length`` tokens becomes several rows.
        teacher: the teacher's. Its tokens of a row are truncated to ``max_length``.
        max_length: tokens of a row.
        text_column: column of a data set's documents.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` (the same as ``input_ids``: the model shifts them), also as
        ``teacher_*``. Rows of a single token, of which nothing is predicted, are left out.

    Raises:
        LmcompressError: If no row has two tokens.
    """
    _check_block(max_length)
    documents = iter(texts[text_column] if isinstance(texts, Dataset) else texts)
    columns: dict[str, list[list[int]]] = {}
    while batch := list(islice(documents, _DOCUMENTS_AT_ONCE)):
        encoded = tokenizer(batch, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            done = 0
            for start in range(0, len(ids), max_length):
                mine = ids[start : start + max_length]
                # from the end of the piece before, for offsets may leave a space out
                end = len(text) if start + max_length >= len(ids) else offsets[start + len(mine) - 1][1]
                theirs = teacher(text[done:end], add_special_tokens=False, truncation=True, max_length=max_length)
                done = end
                if len(mine) < 2 or len(theirs["input_ids"]) < 2:
                    continue
                for prefix, tokens in (("", mine), (TEACHER_PREFIX, theirs["input_ids"])):
                    append_row(columns, prefix, tokens, tokens)
    if not columns:
        raise LmcompressError("the text must have a document of at least two tokens, got none; give more text")
    return Dataset.from_dict(columns)


def append_row(columns: dict[str, list[list[int]]], prefix: str, ids: list[int], labels: list[int]) -> None:
    """Add a row of tokens, none of which is padding, to the columns of a data set.

    Args:
        columns: the columns by name, which get the row.
        prefix: begins the names: empty for the student, :data:`TEACHER_PREFIX` for a teacher's own tokens.
        ids: the tokens.
        labels: as many labels.
    """
    for name, values in (("input_ids", ids), ("attention_mask", [1] * len(ids)), ("labels", labels)):
        columns.setdefault(f"{prefix}{name}", []).append(values)


def _check_block(block_size: int) -> None:
    if block_size < 2:
        raise LmcompressError(f"block_size must be >= 2, got {block_size}: a token is predicted from those before it")


def _as_array(ids: list[int]) -> Tokens:
    return np.asarray(ids, dtype=np.int64)


def _blocks(tokens: Tokens, block_size: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    if len(tokens) < block_size:
        raise LmcompressError(
            f"the text must fill at least one block of {block_size} tokens, got {len(tokens)}; "
            "give more text or a smaller block_size (max_length)"
        )
    return tokens[: len(tokens) // block_size * block_size].reshape(-1, block_size)


def _tokenized(documents: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    while batch := list(islice(documents, _DOCUMENTS_AT_ONCE)):
        # verbose=False: a document may be longer than the model's positions, the blocks are not
        yield from tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    if tokenizer.eos_token_id is None:
        raise LmcompressError(
            f"the tokenizer must have an eos_token to separate documents, {type(tokenizer).__name__} has none; "
            "give one document, or a causal model's tokenizer"
        )
    return np.array([tokenizer.eos_token_id], dtype=np.int64)
