"""The tokens to keep, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.errors import LmcompressError
from lmcompress.pruning.vocabulary.report import REASONS, Reason
from lmcompress.pruning.vocabulary.tables import Tables, configs_of, is_token_id
from lmcompress.pruning.vocabulary.tokenizers import (
    Merges,
    Vocabulary,
    processor_ids,
)

_MAX_SPARE_ROWS = 1024

_NAMED_IDS = ("pad", "bos", "eos", "unk", "sep", "cls", "mask")


def special_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tables: Tables, vocabulary: Vocabulary
) -> set[int]:
    """Every id that is referenced, after checking that model and tokenizer belong together."""
    rows, largest = tables.rows, max(vocabulary.names, default=-1)
    if not largest < rows <= largest + 1 + _MAX_SPARE_ROWS:
        raise LmcompressError(
            f"model and tokenizer must belong together: the tokenizer's ids go up to {largest}, the embeddings have "
            f"{rows} rows (up to {_MAX_SPARE_ROWS} spare ones are taken for padding of the table). Load both from the "
            "same checkpoint, or call model.resize_token_embeddings(len(tokenizer)) after adding tokens"
        )
    for name in _NAMED_IDS:
        said, own = getattr(model.config, f"{name}_token_id", None), getattr(tokenizer, f"{name}_token_id", None)
        several = said if isinstance(said, (list, tuple)) else [said]
        inside = [number for number in several if isinstance(number, int) and 0 <= number < rows]
        if inside and own is not None and own not in inside:
            raise LmcompressError(
                f"model and tokenizer must agree on {name}_token_id: model.config says {said}, the tokenizer {own}. "
                "They are not a pair, or one was changed: load both from the same checkpoint, or correct the wrong one"
            )
    special = {token["id"] for token in vocabulary.json["added_tokens"] if token["special"]}
    special |= {vocabulary.ids[token] for token in tokenizer.all_special_tokens if token in vocabulary.ids}
    special |= set(processor_ids(vocabulary.json["post_processor"]))
    if vocabulary.json["padding"] is not None:
        special.add(vocabulary.json["padding"]["pad_id"])
    if vocabulary.unknown is not None:
        special.add(vocabulary.unknown)
    named: dict[str, Sequence[Any]] = {"the embeddings' padding_idx": [tables.padding]}
    for config in configs_of(model):
        for name, value in vars(config).items():
            if is_token_id(name):
                named[f"{type(config).__name__}.{name}"] = value if isinstance(value, (list, tuple)) else [value]
    for where, numbers in named.items():
        for number in numbers:
            # GPT-2's config names 50256 by default, however small its vocabulary: that has no embedding, and is
            # unchanged
            if isinstance(number, int) and 0 <= number < rows:
                if number not in vocabulary.names:
                    raise LmcompressError(
                        f"{where} is {number}, which is no token of the tokenizer and would lose its embedding; "
                        "add that token to the tokenizer or set the field to a token's id"
                    )
                special.add(number)
    return special


def asked_for(keep: Collection[str], vocabulary: Vocabulary) -> list[str]:
    """The tokens requested by name, in the order of their ids.

    Args:
        keep: tokens in the tokenizer's spelling.
        vocabulary: the tokenizer's vocabulary.

    Raises:
        LmcompressError: If ``keep`` is one string, or contains something that is not a token.
    """
    if isinstance(keep, str):
        raise LmcompressError(f"keep must be several tokens, got the one string {keep!r}; put it into a list")
    for token in keep:
        if token not in vocabulary.ids:
            inside = f"a piece inside a word begins with {vocabulary.prefix}"
            written = f"a space is written {vocabulary.space}" if vocabulary.space else inside
            near = get_close_matches(str(token), vocabulary.ids, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise LmcompressError(
                f"keep must name tokens of the tokenizer, got {token!r}, which is none; {hint}({written}; "
                "tokenizer.tokenize(text) returns tokens)"
            )
    return sorted(keep, key=vocabulary.ids.__getitem__)


def staying(
    vocabulary: Vocabulary,
    counts: Counter[int],
    always: Iterable[tuple[Reason, Iterable[str]]],
    min_count: int,
    max_size: int | None,
) -> tuple[dict[str, Reason], Merges]:
    """The tokens to keep, with the first reason of each, and the merges that create them.

    Args:
        vocabulary: the tokenizer's vocabulary.
        counts: occurrences in the corpus, by id.
        always: tokens kept whatever the counts, by reason.
        min_count: minimum number of occurrences of a token of the corpus.
        max_size: maximum number of tokens.

    Raises:
        LmcompressError: If more than ``max_size`` tokens are kept in any case, or none of the corpus would be.
    """
    reasons: dict[str, Reason] = {}
    for reason, tokens in always:
        for token in tokens:
            reasons.setdefault(token, reason)
    merges = Merges(vocabulary)
    for token in list(reasons):
        for part in merges.take(token):
            reasons.setdefault(part, "merges")
    _choose(reasons, merges, vocabulary, counts, min_count, max_size)
    return reasons, merges


def _choose(
    reasons: dict[str, Reason],
    merges: Merges,
    vocabulary: Vocabulary,
    counts: Counter[int],
    min_count: int,
    max_size: int | None,
) -> None:
    """Add the corpus's tokens to ``reasons``, the most frequent first, up to the maximum."""
    if max_size is not None and len(reasons) > max_size:
        groups = Counter(reasons.values())
        listed = ", ".join(f"{groups[reason]} {reason}" for reason in REASONS if groups[reason])
        raise LmcompressError(
            f"max_size must be at least {len(reasons)}, the number of tokens kept in any case ({listed}); got "
            f"{max_size}" + ("" if vocabulary.space == "Ġ" else ". keep_characters=False drops single characters")
        )
    special = {vocabulary.ids[token] for token, reason in reasons.items() if reason == "special"}
    frequent = [number for number, count in counts.items() if count >= min_count and number not in special]
    if not frequent:
        most = max((count for number, count in counts.items() if number not in special), default=0)
        raise LmcompressError(
            f"min_count must keep some of the corpus's tokens, got {min_count}; the most frequent one that is not "
            f"special occurs {most} times"
        )
    for number in sorted(frequent, key=lambda number: (-counts[number], number)):
        token = vocabulary.names[number]
        if reasons.get(token, "merges") != "merges":
            continue
        missing = {token, *merges.parts(token)} - reasons.keys()
        if max_size is None or len(reasons) + len(missing) <= max_size:
            reasons[token] = "corpus"
            for part in merges.take(token):
                reasons.setdefault(part, "merges")
