"""New training texts out of old ones: a teacher labels whatever comes out, so the texts need not make sense.

The operations are those of Tang et al., *Distilling Task-Specific Knowledge from BERT into Simple Neural Networks*,
2019, https://arxiv.org/abs/1903.12136, section 3.3 (masking, n-gram sampling) and of TextBrewer (deleting, disorder).
Each takes words and a random generator and returns new words; hyperparameters are bound with
:func:`functools.partial`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from datasets import Dataset, Value, concatenate_datasets

from lmcompress.errors import LmcompressError, nearest

Operation = Callable[[Sequence[str], np.random.Generator], list[str]]
"""``(words, rng) -> words``: never changes its input, and keeps at least one of at least one word."""


def mask_tokens(
    tokens: Sequence[str], rng: np.random.Generator, *, p: float = 0.1, mask_token: str = "[MASK]"
) -> list[str]:
    """Each word becomes ``mask_token`` with probability ``p``.

    Args:
        tokens: words; not changed.
        rng: where chance comes from.
        p: in [0, 1].
        mask_token: what the student's tokenizer, and the teacher's, take for a mask.

    Returns:
        as many words as came.

    Example:
        >>> mask_tokens(["a", "b"], np.random.default_rng(0), p=1.0)
        ['[MASK]', '[MASK]']
    """
    _check_probability(p)
    hit = rng.random(len(tokens)) < p
    return [mask_token if masked else token for token, masked in zip(tokens, hit, strict=True)]


def delete_tokens(tokens: Sequence[str], rng: np.random.Generator, *, p: float = 0.1) -> list[str]:
    """Each word is left out with probability ``p``; if all would be, one drawn at random stays.

    Args:
        tokens: words; not changed.
        rng: where chance comes from.
        p: in [0, 1].

    Returns:
        the words that stay, in their order.

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
    """A run of successive words, its length drawn evenly from ``lengths`` (all words if there are fewer).

    Args:
        tokens: words; not changed.
        rng: where chance comes from.
        lengths: numbers of words, each >= 1.

    Returns:
        the run of words.

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
    """Neighbours change places: going from left to right, a word swaps with the next with probability ``p``.

    A word that has moved does not move again. TextBrewer's ``short_disorder`` with its default weights.

    Args:
        tokens: words; not changed.
        rng: where chance comes from.
        p: in [0, 1].

    Returns:
        the same words in another order.

    Example:
        >>> short_disorder(["a", "b", "c"], np.random.default_rng(0), p=1.0)
        ['b', 'a', 'c']
    """
    return long_disorder(tokens, rng, p=p, length=2)


def long_disorder(tokens: Sequence[str], rng: np.random.Generator, *, p: float = 0.1, length: int = 20) -> list[str]:
    """At each position, the two halves of the next ``length`` words change places with probability ``p``.

    Words that have moved do not move again; texts shorter than ``length`` stay as they are.

    Args:
        tokens: words; not changed.
        rng: where chance comes from.
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


def augment(
    dataset: Dataset,
    text_columns: Sequence[str],
    operations: Sequence[Operation],
    *,
    copies: int = 1,
    seed: int = 0,
) -> Dataset:
    """``dataset`` followed by ``copies`` changed copies of it.

    Each text of each new row goes through one operation, drawn evenly. Words are what white space separates. All
    other columns, labels among them, are those of the row that it came from: they are a guess, so weigh the labels'
    loss down or leave it out.

    Args:
        dataset: rows before tokenisation.
        text_columns: columns of strings to change.
        operations: what may happen to a text.
        copies: how many new rows for each row.
        seed: row ``i`` of copy ``c`` depends on ``(seed, c, i)`` only, whatever the number of processes or the batch
            size.

    Returns:
        ``len(dataset) * (1 + copies)`` rows, the old ones first and in their order.

    Raises:
        LmcompressError: a column is missing or holds no strings, there are no operations, or ``copies`` < 1.

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
