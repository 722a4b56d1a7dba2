"""A tokenizer together with the texts that its vocabulary is chosen from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from lmcompress.pruning.vocabulary.report import Reason
from lmcompress.pruning.vocabulary.tokenizers import (
    Comparison,
    Vocabulary,
    alphabet_of,
    checked_texts,
    compare,
    count_ids,
    of_lowest_score,
    plain_backend,
    read_vocabulary,
    rebuilt,
    unknown_words,
)


class Reader(Protocol):
    """A tokenizer and a corpus.

    Attributes:
        vocabulary: the tokenizer as data.
        texts: number of texts.
        counts: occurrences in the corpus by id, without special tokens around the texts.
    """

    vocabulary: Vocabulary
    texts: int
    counts: Counter[int]

    def always(self, keep_characters: bool) -> Iterable[tuple[Reason, Iterable[str]]]:
        """Tokens that stay whatever their counts, by reason.

        Args:
            keep_characters: whether single characters are among them.
        """
        ...

    def rebuilt(self, new_ids: Mapping[int, int], merges: Collection[tuple[str, str]]) -> PreTrainedTokenizerBase:
        """The tokenizer with fewer tokens.

        Args:
            new_ids: for each token that stays, by its old id.
            merges: those that stay.
        """
        ...

    def compared(self, pruned: PreTrainedTokenizerBase, new_ids: Mapping[int, int]) -> Comparison:
        """The corpus as both tokenizers split it.

        Args:
            pruned: the tokenizer with fewer tokens.
            new_ids: for each token that stayed, by its old id.

        Raises:
            EquivalenceError: If a text is split differently although all its tokens are kept.
        """
        ...


class FastReader:
    """A fast tokenizer and a corpus; see :class:`Reader`.

    Args:
        tokenizer: unchanged.
        texts: kept in memory.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
        self.vocabulary = read_vocabulary(tokenizer)
        self._tokenizer = tokenizer
        self._texts = checked_texts(texts)
        self._backend = plain_backend(tokenizer)
        self.texts = len(self._texts)
        self.counts = count_ids(self._backend, self._texts)

    def always(self, keep_characters: bool) -> Iterable[tuple[Reason, Iterable[str]]]:
        """Tokens that stay whatever their counts; see :class:`Reader`.

        Args:
            keep_characters: whether single characters are among them.

        Yields:
            The reason, and the tokens that stay for it.
        """
        yield "alphabet", alphabet_of(self.vocabulary, keep_characters)
        yield "unknown words", unknown_words(self.vocabulary, self._backend, self._texts, self.counts)
        yield "lowest score", of_lowest_score(self.vocabulary)

    def rebuilt(self, new_ids: Mapping[int, int], merges: Collection[tuple[str, str]]) -> PreTrainedTokenizerBase:
        """The tokenizer with fewer tokens; see :class:`Reader`.

        Args:
            new_ids: for each token that stays, by its old id.
            merges: those that stay.
        """
        return rebuilt(self._tokenizer, self.vocabulary, new_ids, merges)

    def compared(self, pruned: PreTrainedTokenizerBase, new_ids: Mapping[int, int]) -> Comparison:
        """The corpus as both tokenizers split it; see :class:`Reader`.

        Args:
            pruned: the tokenizer with fewer tokens.
            new_ids: for each token that stayed, by its old id.
        """
        return compare(self._backend, plain_backend(pruned), self._texts, new_ids, self.vocabulary.unknown)
