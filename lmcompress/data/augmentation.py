"""Data augmentation for training texts: a teacher labels the results, so the texts need not make sense.

The operations are those of

* Tang et al., *Distilling Task-Specific Knowledge from BERT into Simple Neural Networks*, 2019,
  https://arxiv.org/abs/1903.12136, section 3.3: masking, n-gram sampling;
* TextBrewer: deleting, disorder;
* Jiao et al., *TinyBERT: Distilling BERT for Natural Language Understanding*, 2020, https://arxiv.org/abs/1909.10351,
  algorithm 1: replacement by similar words.

Each takes words and a random generator and returns new words; hyperparameters are bound with
:func:`functools.partial`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from datasets import Dataset, Value, concatenate_datasets
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from lmcompress.errors import LmcompressError, nearest

# a word between punctuation, which stays where it is
_WORD = re.compile(r"^(\W*)(\w+)(\W*)$")
# rows of the similarity matrix in memory at a time
_CHUNK = 1024

Operation = Callable[[Sequence[str], np.random.Generator], list[str]]
"""``(words, rng) -> words``: leaves its input unchanged, and keeps at least one of at least one word."""


def mask_tokens(
    tokens: Sequence[str], rng: np.random.Generator, *, p: float = 0.1, mask_token: str = "[MASK]"
) -> list[str]:
    """Each word becomes ``mask_token`` with probability ``p``.

    Args:
        tokens: words; not modified.
        rng: source of randomness.
        p: in [0, 1].
        mask_token: mask token of the tokenizers of student and teacher.

    Returns:
        as many words as in the input.

    Example:
        >>> mask_tokens(["a", "b"], np.random.default_rng(0), p=1.0)
        ['[MASK]', '[MASK]']
    """
    _check_probability(p)
    hit = rng.random(len(tokens)) < p
    return [mask_token if masked else token for token, masked in zip(tokens, hit, strict=True)]


def delete_tokens(tokens: Sequence[str], rng: np.random.Generator, *, p: float = 0.1) -> list[str]:
    """Each word is dropped with probability ``p``; if all would be, a random one is kept.

    Args:
        tokens: words; not modified.
        rng: source of randomness.
        p: in [0, 1].

    Returns:
        the remaining words, in order.

    Example:
        >>> delete_tokens(["a", "b"], np.random.default_rng(0), p=0.0)
        ['a', 'b']
    """
    _check_probability(p)
    kept = [token for token, draw in zip(tokens, rng.random(len(tokens)), strict=True) if draw >= p]
    return kept or _one_of(tokens, rng)


def n_gram_sample(
    tokens: Sequence[str], rng: np.random.Generator, *, lengths: Sequence[int] = (1, 2, 3, 4, 5)
) -> list[str]:
    """A random n-gram, its length drawn uniformly from ``lengths`` (all words if there are fewer).

    Args:
        tokens: words; not modified.
        rng: source of randomness.
        lengths: numbers of words, each >= 1.

    Returns:
        the n-gram.

    Example:
        >>> n_gram_sample(["a", "b", "c"], np.random.default_rng(0), lengths=[3])
        ['a', 'b', 'c']
    """
    if not lengths or min(lengths) < 1:
        raise LmcompressError(f"lengths must be numbers of words >= 1, got {list(lengths)}")
    length = min(int(rng.choice(list(lengths))), len(tokens))
    start = int(rng.integers(len(tokens) - length + 1))
    return list(tokens[start : start + length])


def short_disorder(tokens: Sequence[str], rng: np.random.Generator, *, p: float = 0.1) -> list[str]:
    """Swaps neighbours: from left to right, a word swaps with the next with probability ``p``.

    A word that has moved does not move again. TextBrewer's ``short_disorder`` with its default weights.

    Args:
        tokens: words; not modified.
        rng: source of randomness.
        p: in [0, 1].

    Returns:
        the same words in another order.

    Example:
        >>> short_disorder(["a", "b", "c"], np.random.default_rng(0), p=1.0)
        ['b', 'a', 'c']
    """
    return long_disorder(tokens, rng, p=p, length=2)


def long_disorder(tokens: Sequence[str], rng: np.random.Generator, *, p: float = 0.1, length: int = 20) -> list[str]:
    """Swaps the two halves of the next ``length`` words at each position with probability ``p``.

    Words that have moved do not move again; texts shorter than ``length`` stay as they are.

    Args:
        tokens: words; not modified.
        rng: source of randomness.
        p: in [0, 1].
        length: an even number of words.

    Returns:
        the same words in another order.

    Example:
        >>> long_disorder(["a", "b", "c", "d", "e"], np.random.default_rng(0), p=1.0, length=4)
        ['c', 'd', 'a', 'b', 'e']
    """
    _check_probability(p)
    if length < 2 or length % 2:
        raise LmcompressError(f"length must be an even number of words >= 2, got {length}")
    words, half, start = list(tokens), length // 2, 0
    while start + length <= len(words):
        if rng.random() < p:
            middle, end = start + half, start + length
            words[start:end] = words[middle:end] + words[start:middle]
            start = end
        else:
            start += 1
    return words


def replace_tokens(
    tokens: Sequence[str], rng: np.random.Generator, *, neighbours: Mapping[str, Sequence[str]], p: float = 0.4
) -> list[str]:
    """Each word that has neighbours is replaced, with probability ``p``, by one of them, drawn uniformly.

    TinyBERT's algorithm 1 with its ``p``. There the words come from BERT's own masked predictions and, for words of
    several pieces, from GloVe; here from any source of ``neighbours``, and words without any stay.

    Args:
        tokens: words, with or without punctuation at their ends, which stays; not modified.
        rng: source of randomness.
        neighbours: similar words by word, such as :func:`nearest_words` finds; looked up in lower case if need be.
        p: in [0, 1].

    Returns:
        as many words as in the input.

    Example:
        >>> replace_tokens(["a", "film."], np.random.default_rng(0), neighbours={"film": ["movie"]}, p=1.0)
        ['a', 'movie.']
    """
    _check_probability(p)
    out = []
    for token, hit, draw in zip(tokens, rng.random(len(tokens)) < p, rng.random(len(tokens)), strict=True):
        found = _WORD.match(token) if hit else None
        near = (neighbours.get(found[2]) or neighbours.get(found[2].lower())) if found else None
        out.append(f"{found[1]}{near[int(draw * len(near))]}{found[3]}" if found and near else token)
    return out


def nearest_words(
    embeddings: Tensor, tokenizer: PreTrainedTokenizerBase, *, count: int = 15
) -> dict[str, tuple[str, ...]]:
    """For each word that is one token, the words with the most similar embeddings (cosine).

    Args:
        embeddings: ``(vocabulary, width)``, such as ``model.get_input_embeddings().weight`` of a trained model.
        tokenizer: tokenizer with the same vocabulary.
        count: maximum number of neighbours; TinyBERT's ``K``.

    Returns:
        neighbours by word, nearest first. Words have at least two characters, all letters.

    Raises:
        LmcompressError: If ``count`` < 1, the vocabulary has no two words, or the embeddings have fewer rows than the
            tokenizer has tokens.

    Example:
        ``partial(replace_tokens, neighbours=nearest_words(model.get_input_embeddings().weight, tokenizer))``
    """
    if count < 1:
        raise LmcompressError(f"count must be >= 1, got {count}")
    if len(embeddings) < len(tokenizer):
        raise LmcompressError(
            f"the tokenizer has {len(tokenizer)} tokens and the embeddings have {len(embeddings)} rows: they belong to "
            "different models"
        )
    words = whole_words(tokenizer)
    count = min(count, len(words) - 1)
    vectors = F.normalize(embeddings.detach().float().cpu()[[token for _, token in words]], dim=1)
    near: dict[str, tuple[str, ...]] = {}
    for start in range(0, len(words), _CHUNK):
        likeness = vectors[start : start + _CHUNK] @ vectors.T
        rows = torch.arange(len(likeness))
        likeness[rows, start + rows] = -torch.inf
        for row, best in zip(rows.tolist(), likeness.topk(count, dim=1).indices.tolist(), strict=True):
            near[words[start + row][0]] = tuple(words[other][0] for other in best)
    return near


def whole_words(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, int]]:
    """Words of at least two letters that are one token within a text, and those tokens.

    Args:
        tokenizer: any tokenizer.

    Raises:
        LmcompressError: If there are fewer than two.
    """
    texts = dict.fromkeys(tokenizer.decode([token]).strip() for token in range(len(tokenizer)))
    candidates = [text for text in texts if len(text) > 1 and text.isalpha()]
    # after a space, as GPT-2's words begin with one; a word piece that continues a word in BERT is not a word
    encoded = (
        tokenizer([" " + text for text in candidates], add_special_tokens=False)["input_ids"] if candidates else []
    )
    special = set(tokenizer.all_special_ids)
    words = [(text, ids[0]) for text, ids in zip(candidates, encoded, strict=True) if len(ids) == 1]
    words = [(text, token) for text, token in words if token not in special]
    if len(words) < 2:
        raise LmcompressError(
            f"the vocabulary of {len(tokenizer)} tokens has {len(words)} whole words, so there is nothing to replace "
            "words by; augment in another way"
        )
    return words


def augment(
    dataset: Dataset,
    text_columns: Sequence[str],
    operations: Sequence[Operation],
    *,
    copies: int = 1,
    seed: int = 0,
) -> Dataset:
    """``dataset`` followed by ``copies`` augmented copies of it.

    Each text of each new row goes through one operation, drawn uniformly. Words are separated by white space. All
    other columns, labels included, are those of the original row: they are a guess, so reduce the weight of the labels'
    loss or set it to 0.

    Args:
        dataset: rows before tokenisation.
        text_columns: columns of strings to change.
        operations: possible operations on a text.
        copies: number of new rows for each row.
        seed: row ``i`` of copy ``c`` depends on ``(seed, c, i)`` only, whatever the number of processes or the batch
            size.

    Returns:
        ``len(dataset) * (1 + copies)`` rows, the original ones first and in order.

    Raises:
        LmcompressError: If a column is missing or holds no strings, there are no operations, or ``copies`` < 1.

    Example:
        >>> rows = Dataset.from_dict({"text": ["a b"], "label": [1]})
        >>> augment(rows, ["text"], [lambda words, rng: list(words[::-1])])["text"][:]
        ['a b', 'b a']
    """
    if not operations:
        raise LmcompressError("operations must name at least one, such as mask_tokens; got none")
    if copies < 1:
        raise LmcompressError(f"copies must be >= 1, got {copies}")
    for column in text_columns:
        if column not in dataset.column_names:
            raise LmcompressError(f"no column {column!r} to augment{nearest(column, dataset.column_names)}")
        if dataset.features[column] not in (Value("string"), Value("large_string")):
            raise LmcompressError(
                f"column {column!r} must hold strings to be augmented, got {dataset.features[column]}; "
                "words with a label each can't be moved or left out"
            )

    new = [
        dataset.map(
            _augment_row,
            with_indices=True,
            fn_kwargs={
                "text_columns": tuple(text_columns), "operations": tuple(operations), "copy": copy, "seed": seed,
            },
            features=dataset.features,
        )
        for copy in range(copies)
    ]  # fmt: skip
    return concatenate_datasets([dataset, *new])


def _augment_row(
    row: dict[str, str],
    index: int,
    text_columns: tuple[str, ...],
    operations: tuple[Operation, ...],
    copy: int,
    seed: int,
) -> dict[str, str]:
    rng = np.random.default_rng((seed, copy, index))
    changed = {}
    for column in text_columns:
        operation = operations[int(rng.integers(len(operations)))]
        changed[column] = " ".join(operation(row[column].split(), rng))
    return changed


def _one_of(tokens: Sequence[str], rng: np.random.Generator) -> list[str]:
    return [tokens[int(rng.integers(len(tokens)))]] if tokens else []


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise LmcompressError(f"p must be in [0, 1], got {p}")
