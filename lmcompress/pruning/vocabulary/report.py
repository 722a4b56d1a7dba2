"""The result of vocabulary pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lmcompress.pruning.vocabulary.unseen import UnseenRows

Reason = Literal["special", "added", "asked for", "alphabet", "unknown words", "lowest score", "corpus", "merges"]

REASONS: dict[Reason, str] = {
    "special": "special tokens, and every token that the tokenizer's templates or the model's configs name by its id",
    "added": "tokens that were added to the tokenizer by hand",
    "asked for": "named in `keep`",
    "alphabet": "bytes, or single characters, of WordPiece also inside of a word: with them unseen text can be read",
    "unknown words": "pieces by which WordPiece finds that a word of the corpus is unknown, as it has to stay",
    "lowest score": "the piece from whose score a Unigram model computes that of an unknown character",
    "corpus": "counted at least `min_count` times in the corpus",
    "merges": "steps on the way from bytes or characters to a token that stays",
}
"""Why a token is kept, in the order in which the reasons are tried: the first that applies is reported."""


@dataclass(frozen=True)
class VocabularyReport:
    """The result of vocabulary pruning. All fields are numbers except ``kept``, ``old_ids`` and ``unseen``.

    Attributes:
        rows_before, rows_after: number of embeddings.
        merges_before, merges_after: merge rules of a BPE tokenizer; 0 for others.
        bytes_saved: bytes of the model's parameters in memory; a tied head counts once.
        coverage: share of the corpus, in tokens of the old tokenizer, whose token is kept; 1 if ``min_count`` is 1
            and ``max_size`` unset.
        tokens_before, tokens_after: length of the corpus in tokens, without special tokens; a smaller vocabulary makes
            texts longer.
        unknown_before, unknown_after: unknown tokens among them.
        texts, texts_changed: number of texts of the corpus, and of those that are now tokenized differently.
        kept: by reason (see :data:`REASONS`), the tokens kept for it and for no earlier one.
        old_ids: for each new id the old one. ``logits[..., old_ids]`` of the old model are the new model's.
        unseen: by split, the rows of splits that the vocabulary was not chosen from, where they were compared.
    """

    rows_before: int
    rows_after: int
    merges_before: int
    merges_after: int
    bytes_saved: int
    coverage: float
    tokens_before: int
    tokens_after: int
    unknown_before: int
    unknown_after: int
    texts: int
    texts_changed: int
    kept: Mapping[Reason, tuple[str, ...]]
    old_ids: tuple[int, ...]
    unseen: Mapping[str, UnseenRows] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON types, with the number of tokens kept for each reason in place of the lists."""
        values = {name: value for name, value in asdict(self).items() if name not in ("kept", "old_ids")}
        return values | {"kept": {reason: len(tokens) for reason, tokens in self.kept.items()}}
