"""Running text split into equal blocks, for causal language models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lmcompress.errors import LmcompressError

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
    if block_size < 2:
        raise LmcompressError(f"block_size must be >= 2, got {block_size}: a token is predicted from those before it")
    documents = texts[text_column] if isinstance(texts, Dataset) else texts
    pieces: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    for ids in _tokenized(iter(documents), tokenizer):
        if pieces:
            pieces.append(_end_of_sequence(tokenizer))
        pieces.append(np.asarray(ids, dtype=np.int64))
    tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
    if len(tokens) < block_size:
        raise LmcompressError(
            f"the text must fill at least one block of {block_size} tokens, got {len(tokens)}; "
            "give more text or a smaller block_size (max_length)"
        )
    blocks = tokens[: len(tokens) // block_size * block_size].reshape(-1, block_size)
    return Dataset.from_dict({"input_ids": blocks, "attention_mask": np.ones_like(blocks), "labels": blocks})


def _tokenized(documents: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    while batch := list(islice(documents, _DOCUMENTS_AT_ONCE)):
        # verbose=False: a document may be longer than the model's positions, the blocks are not
        yield from tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    if tokenizer.eos_token_id is None:
        raise LmcompressError(
            f"the tokenizer must have an eos_token to separate documents, {type(tokenizer).__name__} has none; "
            "give one document, or a causal model's tokenizer"
        )
    return np.array([tokenizer.eos_token_id], dtype=np.int64)
