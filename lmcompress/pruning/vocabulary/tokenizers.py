"""Fast tokenizers as data: reading them, the dependencies of their tokens, and rewriting them with fewer tokens."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import Encoding, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from lmcompress.errors import EquivalenceError, LmcompressError

_BATCH = 1000


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as data.

    Attributes:
        json: JSON written by the ``tokenizers`` library.
        ids, names: all tokens, added ones included.
        own: tokens of the tokenizer's model itself; the others are in ``added_tokens`` only.
        added: added tokens that are not special.
        unknown: id of the unknown token, if there is one.
    """

    json: dict[str, Any]
    ids: dict[str, int]
    names: dict[int, str]
    own: dict[str, int]
    added: tuple[str, ...]
    unknown: int | None

    @property
    def model(self) -> dict[str, Any]:
        """The component that splits words."""
        return cast(dict[str, Any], self.json["model"])

    @property
    def is_bpe(self) -> bool:
        """Whether it is a BPE: byte-level, or of characters with bytes for those that it lacks."""
        return bool(self.model["type"] == "BPE")

    @property
    def is_unigram(self) -> bool:
        """Whether it is a Unigram model."""
        return bool(self.model["type"] == "Unigram")

    @property
    def falls_back_to_bytes(self) -> bool:
        """Whether a character without a token is spelled by tokens such as ``<0x0A>``, one for each byte."""
        return bool(self.model.get("byte_fallback"))

    @property
    def space(self) -> str:
        """How tokens spell a space; empty for WordPiece, which splits at spaces."""
        if self.is_bpe and not self.falls_back_to_bytes:
            return "Ġ"
        return "▁" if self.is_bpe or self.is_unigram else ""

    @property
    def prefix(self) -> str:
        """WordPiece's prefix of a piece that continues a word."""
        return str(self.model.get("continuing_subword_prefix") or "")


class Merges:
    """The merges of a BPE, and those that are needed; empty for WordPiece and Unigram.

    BPE repeatedly merges, of the pairs of neighbours in a word, the one of lowest rank. Between the ends of a
    resulting token nothing else was merged than if the token were a word of its own, so its merges are found
    without the corpus. If all merges that a word uses are kept, in order, each is still the lowest when its turn
    comes: the word is split as before whatever other merges are pruned.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        merges = vocabulary.model["merges"] if vocabulary.is_bpe else ()
        self.ranks: dict[tuple[str, str], int] = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        self.used: set[tuple[str, str]] = set()

    def path(self, token: str) -> list[tuple[str, str]]:
        """The merges that lead from single symbols to ``token``, or none if they lead elsewhere."""
        symbols, path = list(token), []
        while self.ranks and len(symbols) > 1:
            pairs = list(zip(symbols, symbols[1:], strict=False))
            pair = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if pair not in self.ranks:
                return []
            place = pairs.index(pair)
            symbols[place : place + 2] = ["".join(pair)]
            path.append(pair)
        return path

    def parts(self, token: str) -> list[str]:
        """All intermediate tokens of ``token``, including itself; none if no merges lead to it."""
        return [part for pair in self.path(token) for part in (*pair, "".join(pair))]

    def take(self, token: str) -> list[str]:
        """Mark the merges that ``token`` needs as used; returns the intermediate tokens, which must be kept with it."""
        self.used.update(self.path(token))
        return self.parts(token)


@dataclass(frozen=True)
class Comparison:
    """A corpus as the new tokenizer splits it: tokens, unknown ones, and texts split differently than before."""

    tokens: int
    unknown: int
    changed: int


def fast_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The backend of a fast tokenizer; others are refused."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not getattr(tokenizer, "is_fast", False):
        raise LmcompressError(
            "tokenizer must be a fast tokenizer of transformers (one with a backend_tokenizer), got "
            f"{type(tokenizer).__name__}; load it with AutoTokenizer.from_pretrained"
        )
    return cast(Tokenizer, tokenizer.backend_tokenizer)


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the backend that neither truncates nor pads."""
    original = fast_backend(tokenizer)
    backend = Tokenizer.from_str(original.to_str())
    backend.no_truncation()
    backend.no_padding()
    # not in the JSON: whether special tokens in a text are read as text
    backend.encode_special_tokens = original.encode_special_tokens
    return backend


def read_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Read a tokenizer; kinds that cannot be reduced exactly are refused."""
    backend = fast_backend(tokenizer)
    data = json.loads(backend.to_str())
    model = data["model"]
    obstacle = _obstacle(data)
    # not in the JSON
    if (alpha := getattr(backend.model, "alpha", None)) is not None:
        obstacle = f"a Unigram model that samples (alpha {alpha}), which splits a text differently each time"
    if obstacle is not None:
        raise LmcompressError(
            "the tokenizer must be WordPiece (BERT, DistilBERT, ELECTRA) or byte-level BPE (GPT-2, RoBERTa), Unigram "
            "(XLM-R, ALBERT, T5) or BPE with bytes for unknown characters (Llama 2), whose tokens can be removed "
            f"without changing how the rest is split; got {type(tokenizer).__name__} with {obstacle}"
        )
    unigram = model["type"] == "Unigram"
    own: dict[str, int] = {piece: i for i, (piece, _) in enumerate(model["vocab"])} if unigram else dict(model["vocab"])
    ids = own | {token["content"]: token["id"] for token in data["added_tokens"]}
    return Vocabulary(
        json=data,
        ids=ids,
        names={number: token for token, number in ids.items()},
        own=own,
        added=tuple(token["content"] for token in data["added_tokens"] if not token["special"]),
        unknown=model["unk_id"] if unigram else ids.get(model.get("unk_token") or ""),
    )


def _obstacle(data: dict[str, Any]) -> str | None:
    """Why a tokenizer cannot lose tokens without changing how the rest is split, or None if it can."""
    model = data["model"]
    if model["type"] not in ("WordPiece", "BPE", "Unigram"):
        return f"a {model['type']} model"
    if model["type"] == "Unigram" and model["unk_id"] is None:
        return "a Unigram model without an unknown token (unk_id)"
    if model["type"] == "Unigram" and len({piece for piece, _ in model["vocab"]}) < len(model["vocab"]):
        return "a Unigram model that lists a piece twice"
    if model["type"] != "BPE":
        return None
    byte_level = _has_step(data["pre_tokenizer"], "ByteLevel") or _has_step(data["normalizer"], "ByteLevel")
    if not (byte_level or model.get("byte_fallback")):
        return "a BPE model that does not work on bytes"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "a BPE model that marks the parts of a word"
    if model.get("dropout"):
        return f"a BPE model with dropout {model['dropout']}, which splits a text differently each time"
    return None


def _has_step(step: dict[str, Any] | None, kind: str) -> bool:
    if step is None:
        return False
    below = step.get("pretokenizers") or step.get("normalizers") or ()
    return step["type"] == kind or any(_has_step(inner, kind) for inner in below)


def processor_ids(processor: dict[str, Any] | None) -> Iterator[int]:
    """The ids that a post-processor adds around texts."""
    if processor is None:
        return
    for inner in processor.get("processors", ()):
        yield from processor_ids(inner)
    if processor["type"] == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            yield from token["ids"]
    elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
        yield processor["sep"][1]
        yield processor["cls"][1]


def checked_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list; anything but a collection of strings is refused."""
    if isinstance(texts, str):
        raise LmcompressError("texts must be several strings, got one string; put it into a list")
    listed = list(texts)
    for index, text in enumerate(listed):
        if not isinstance(text, str):
            raise LmcompressError(
                f"texts must be strings, got {type(text).__name__} at index {index}; for pairs of sentences give all "
                "first and all second ones as separate texts"
            )
    return listed


def encodings(backend: Tokenizer, texts: Sequence[str]) -> Iterator[Encoding]:
    """The encoding of each text, without special tokens around it."""
    for start in range(0, len(texts), _BATCH):
        yield from backend.encode_batch_fast(list(texts[start : start + _BATCH]), add_special_tokens=False)


def count_ids(backend: Tokenizer, texts: Sequence[str]) -> Counter[int]:
    """The number of occurrences of each id, without special tokens around the texts."""
    counts: Counter[int] = Counter()
    for encoding in encodings(backend, texts):
        counts.update(encoding.ids)
    return counts


def alphabet_of(vocabulary: Vocabulary, keep_characters: bool) -> list[str]:
    """The tokens with which any text can be spelled, as far as this vocabulary can."""
    if vocabulary.is_bpe and not vocabulary.falls_back_to_bytes:
        return [byte for byte in sorted(pre_tokenizers.ByteLevel.alphabet()) if byte in vocabulary.own]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if vocabulary.falls_back_to_bytes else []
    found = [byte for byte in fallback if byte in vocabulary.own]
    if keep_characters:
        found += [token for token in vocabulary.own if len(token) == 1 or _is_continuation(token, vocabulary.prefix)]
    return found


def _is_continuation(token: str, prefix: str) -> bool:
    return bool(prefix) and len(token.removeprefix(prefix)) == 1


def of_lowest_score(vocabulary: Vocabulary) -> list[str]:
    """A piece of the lowest score of a Unigram model, from which it takes the score of an unknown character.

    Any split competes with one in which characters are unknown. If the lowest score rose, so would that of the unknown,
    and texts might be split differently although all their pieces are kept.
    """
    if not vocabulary.is_unigram:
        return []
    piece, _ = min(vocabulary.model["vocab"], key=lambda entry: entry[1])
    return [piece]


def unknown_words(vocabulary: Vocabulary, backend: Tokenizer, texts: Sequence[str], counts: Counter[int]) -> set[str]:
    """The pieces that WordPiece finds in words of the corpus before a position where none fits.

    Such a word becomes the unknown token. If the pieces were dropped, shorter ones might lead past that place, and the
    word would be tokenized although it was unknown before.
    """
    if vocabulary.model["type"] != "WordPiece" or vocabulary.unknown is None or not counts[vocabulary.unknown]:
        return set()
    words: set[str] = set()
    for text, encoding in zip(texts, encodings(backend, texts), strict=True):
        if vocabulary.unknown in encoding.ids:
            if backend.normalizer is not None:
                text = backend.normalizer.normalize_str(text)
            split = backend.pre_tokenizer
            words.update([word for word, _ in split.pre_tokenize_str(text)] if split is not None else [text])
    longest = vocabulary.model["max_input_chars_per_word"]
    return {piece for word in words if len(word) <= longest for piece in _before_failure(word, vocabulary)}


def _before_failure(word: str, vocabulary: Vocabulary) -> list[str]:
    found: list[str] = []
    start = 0
    while start < len(word):
        before = vocabulary.prefix if start else ""
        ends = (end for end in range(len(word), start, -1) if before + word[start:end] in vocabulary.own)
        end = next(ends, None)
        if end is None:
            return found
        found.append(before + word[start:end])
        start = end
    return []


def new_order(vocabulary: Vocabulary, kept: Collection[str], padding: int | None) -> list[int]:
    """Old ids in their new order: as before, except that the padding token keeps its id if possible."""
    own = sorted(vocabulary.ids[token] for token in kept if token in vocabulary.own)
    # the tokenizers library numbers the tokens of its model first
    added = sorted(vocabulary.ids[token] for token in kept if token not in vocabulary.own)
    if padding in own and padding < len(own):
        own.remove(padding)
        own.insert(padding, padding)
    return own + added


def rebuilt(
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    new_ids: Mapping[int, int],
    merges: Collection[tuple[str, str]],
) -> PreTrainedTokenizerBase:
    """The tokenizer with other ids, created from its files, as it will be when loaded."""
    # a deep copy through JSON, because the parts below are modified in place
    data = json.loads(json.dumps(vocabulary.json))
    model = data["model"]
    own = sorted((new_ids[old], token) for token, old in vocabulary.own.items() if old in new_ids)
    if vocabulary.is_unigram:
        scores = dict(model["vocab"])
        model["vocab"] = [[token, scores[token]] for _, token in own]
        model["unk_id"] = None if vocabulary.unknown is None else new_ids[vocabulary.unknown]
    else:
        model["vocab"] = {token: new for new, token in own}
    if vocabulary.is_bpe:
        model["merges"] = [pair for pair in model["merges"] if tuple(pair) in merges]
    data["added_tokens"] = sorted(
        (token | {"id": new_ids[token["id"]]} for token in data["added_tokens"] if token["id"] in new_ids),
        key=lambda token: token["id"],
    )
    _renumber_processor(data["post_processor"], new_ids)
    if data["padding"] is not None:
        data["padding"]["pad_id"] = new_ids[data["padding"]["pad_id"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        _write_json(folder / "tokenizer.json", data)
        # other files of a tokenizer with the old ids; everything is in tokenizer.json too
        for file in ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json"):
            (folder / file).unlink(missing_ok=True)
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        settings.pop("added_tokens_decoder", None)
        _write_json(folder / "tokenizer_config.json", settings)
        pruned: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(folder)
    # settings made after the tokenizer was created are not in its files
    for setting in ("name_or_path", "padding_side", "truncation_side", "model_input_names"):
        setattr(pruned, setting, getattr(tokenizer, setting))
    check_ids(pruned, vocabulary, new_ids)
    if vocabulary.is_unigram and vocabulary.unknown is not None:
        # some classes write its number in their code
        wanted = new_ids[vocabulary.unknown]
        if (unknown := json.loads(fast_backend(pruned).to_str())["model"]["unk_id"]) != wanted:
            raise EquivalenceError(
                f"{type(pruned).__name__} takes token {unknown} for the unknown one whatever its files say, and that "
                f"is now token {wanted}; nothing was changed. Name the tokens before it in keep"
            )
    return pruned


def check_ids(pruned: PreTrainedTokenizerBase, vocabulary: Vocabulary, new_ids: Mapping[int, int]) -> None:
    """Refuse a tokenizer whose class numbers tokens otherwise than its files do."""
    expected = {vocabulary.names[old]: new for old, new in new_ids.items()}
    if pruned.get_vocab() != expected:
        wrong = {token for token, _ in pruned.get_vocab().items() ^ expected.items()}
        raise EquivalenceError(
            f"{type(pruned).__name__}, loaded from its own files, numbers {len(wrong)} tokens otherwise than they "
            f"say, such as {sorted(wrong)[:3]}; nothing was changed. Please report this with the tokenizer's name"
        )


def _renumber_processor(processor: dict[str, Any] | None, new_ids: Mapping[int, int]) -> None:
    if processor is None:
        return
    for inner in processor.get("processors", ()):
        _renumber_processor(inner, new_ids)
    if processor["type"] == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [new_ids[number] for number in token["ids"]]
    elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
        for end in ("sep", "cls"):
            processor[end][1] = new_ids[processor[end][1]]


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def compare(
    before: Tokenizer, after: Tokenizer, texts: Sequence[str], new_ids: Mapping[int, int], unknown: int | None
) -> Comparison:
    """Tokenize the whole corpus with both tokenizers; if every old token is kept, the pieces must be the same."""
    new_unknown = None if unknown is None else new_ids[unknown]
    tokens = unknowns = changed = 0
    pairs = zip(texts, encodings(before, texts), encodings(after, texts), strict=True)
    for text, old, new in pairs:
        wanted = [new_ids.get(number) for number in old.ids]
        tokens += len(new.ids)
        unknowns += new.ids.count(new_unknown) if new_unknown is not None else 0
        if wanted != new.ids:
            changed += 1
            if None not in wanted:
                raise EquivalenceError(
                    f"all tokens of {text[:80]!r} are kept, yet it is split into {new.tokens[:12]} instead of "
                    f"{old.tokens[:12]}; nothing was changed. The tokenizer in memory may have been altered in a way "
                    "its files do not record (compare it with the result of save_pretrained and from_pretrained); "
                    "otherwise please report this with its name"
                )
    return Comparison(tokens=tokens, unknown=unknowns, changed=changed)
