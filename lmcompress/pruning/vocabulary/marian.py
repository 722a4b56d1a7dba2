"""Marian's tokenizers: two SentencePiece models, of source and target, whose pieces share one ``vocab.json``.

They are slow tokenizers, and need the packages ``sentencepiece`` and ``protobuf``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import MarianTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import import_protobuf

from lmcompress.errors import EquivalenceError, LmcompressError
from lmcompress.pruning.vocabulary.report import Reason
from lmcompress.pruning.vocabulary.tokenizers import Comparison, Vocabulary, check_ids, checked_texts

_SIDES = ("source", "target")

# types of pieces in sentencepiece_model.proto
_NORMAL, _UNIGRAM = 1, 1


class MarianReader:
    """Marian's tokenizer and a corpus of both sides; see :class:`~lmcompress.pruning.vocabulary.readers.Reader`.

    A piece that leaves ``vocab.json`` leaves both SentencePiece models too: a text that used it is spelled in other
    pieces, and does not become unknown.

    Args:
        tokenizer: unchanged.
        texts: texts of the source language.
        target_texts: texts of the target language; empty if the model will only read.

    Raises:
        LmcompressError: If the tokenizer has two vocabularies, its models are not Unigram, or the target is not given.
    """

    def __init__(self, tokenizer: MarianTokenizer, texts: Iterable[str], target_texts: Iterable[str] | None) -> None:
        if target_texts is None:
            raise LmcompressError(
                "a Marian tokenizer has two SentencePiece models, source.spm and target.spm, over one vocab.json, "
                "which are pruned together: give target_texts, the texts that the model will write, as well (or [] if "
                "it will only read)"
            )
        if tokenizer.separate_vocabs:
            raise LmcompressError(
                "a Marian tokenizer must have one vocabulary for source and target, got separate_vocabs=True, whose "
                "two numberings cannot be pruned as one"
            )
        self._tokenizer = tokenizer
        self._texts = {"source": checked_texts(texts), "target": checked_texts(target_texts)}
        self.texts = sum(map(len, self._texts.values()))
        self._models = {side: _model_proto(getattr(tokenizer, f"spm_{side}"), side) for side in _SIDES}
        self.vocabulary = _vocabulary_of(tokenizer)
        self.counts: Counter[int] = Counter()
        # pieces on the best path of a text that vocab.json lacks: they are unknown tokens, and have to stay so
        self._unlisted: set[str] = set()
        for side in _SIDES:
            for pieces in _pieces(tokenizer, side, self._texts[side]):
                self.counts.update(tokenizer.convert_tokens_to_ids(pieces))
                self._unlisted.update(piece for piece in pieces if piece not in self.vocabulary.ids)

    def always(self, keep_characters: bool) -> Iterable[tuple[Reason, Iterable[str]]]:
        """Tokens that stay whatever their counts; see :class:`~lmcompress.pruning.vocabulary.readers.Reader`.

        Args:
            keep_characters: whether single characters are among them.

        Yields:
            The reason, and the tokens that stay for it.
        """
        yield "special", self._tokenizer.supported_language_codes
        if keep_characters:
            yield "alphabet", [token for token in self.vocabulary.own if len(token) == 1]

    def rebuilt(self, new_ids: Mapping[int, int], merges: Collection[tuple[str, str]]) -> PreTrainedTokenizerBase:
        """The tokenizer with fewer tokens; see :class:`~lmcompress.pruning.vocabulary.readers.Reader`.

        Its files lie in a temporary folder as long as it exists, from which copies of it read them.

        Args:
            new_ids: for each token that stays, by its old id.
            merges: none.
        """
        kept = {self.vocabulary.names[old]: new for old, new in new_ids.items()}
        name = tempfile.mkdtemp(prefix="marian-")
        folder = Path(name)
        self._tokenizer.save_pretrained(folder)
        for side, model in self._models.items():
            (folder / f"{side}.spm").write_bytes(_without(model, kept, self._unlisted))
        vocab = {token: new for token, new in kept.items() if token in self._tokenizer.encoder}
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        (folder / "added_tokens.json").unlink(missing_ok=True)
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        settings.pop("added_tokens_decoder", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        pruned: PreTrainedTokenizerBase = type(self._tokenizer).from_pretrained(folder)
        weakref.finalize(pruned, shutil.rmtree, name, ignore_errors=True)
        pruned.name_or_path = self._tokenizer.name_or_path
        check_ids(pruned, self.vocabulary, new_ids)
        return pruned

    def compared(self, pruned: PreTrainedTokenizerBase, new_ids: Mapping[int, int]) -> Comparison:
        """The corpus as both tokenizers split it; see :class:`~lmcompress.pruning.vocabulary.readers.Reader`.

        Args:
            pruned: the tokenizer with fewer tokens.
            new_ids: for each token that stayed, by its old id.
        """
        tokens = unknown = changed = 0
        for side in _SIDES:
            texts = self._texts[side]
            olds, news = _pieces(self._tokenizer, side, texts), _pieces(pruned, side, texts)
            for text, old, new in zip(texts, olds, news, strict=True):
                wanted = [new_ids.get(number) for number in self._tokenizer.convert_tokens_to_ids(old)]
                got = pruned.convert_tokens_to_ids(new)
                tokens += len(got)
                unknown += got.count(pruned.unk_token_id)
                changed += wanted != got
                if wanted != got and None not in wanted:
                    raise EquivalenceError(
                        f"all tokens of {text[:80]!r} are kept, yet it is split into {new[:12]} instead of {old[:12]}; "
                        "nothing was changed. Please report this with the tokenizer's name"
                    )
        return Comparison(tokens=tokens, unknown=unknown, changed=changed)


def _vocabulary_of(tokenizer: MarianTokenizer) -> Vocabulary:
    ids = {token: int(number) for token, number in tokenizer.get_vocab().items()}
    own = {token: number for token, number in ids.items() if token in tokenizer.encoder}
    added = tokenizer.added_tokens_decoder.items()
    listed = [{"id": number, "content": token.content, "special": token.special} for number, token in added]
    return Vocabulary(
        json={"model": {"type": "Unigram"}, "added_tokens": listed, "post_processor": None, "padding": None},
        ids=ids,
        names={number: token for token, number in ids.items()},
        own=own,
        added=tuple(str(token["content"]) for token in listed if not token["special"]),
        unknown=tokenizer.unk_token_id,
    )


def _model_proto(processor: Any, side: str) -> Any:
    """A SentencePiece model as its message; anything but a Unigram model is refused."""
    try:
        model = import_protobuf().ModelProto()
    except ImportError as error:
        raise LmcompressError("pruning a SentencePiece model needs protobuf: pip install protobuf") from error
    model.ParseFromString(processor.serialized_model_proto())
    if model.trainer_spec.model_type != _UNIGRAM:
        raise LmcompressError(
            f"the SentencePiece models of a Marian tokenizer must be Unigram, got one of type "
            f"{model.trainer_spec.model_type} in {side}.spm, whose pieces depend on each other"
        )
    return model


def _without(model: Any, kept: Collection[str], unlisted: Collection[str]) -> bytes:
    """A Unigram model's file with some of its pieces.

    Pieces of the lowest and of the highest score stay: from the first it takes the score of an unknown character, from
    the second those of pieces that users defined.
    """
    scores = [piece.score for piece in model.pieces if piece.type == _NORMAL]
    bounds = {min(scores), max(scores)} if scores else set()
    staying = []
    for piece in model.pieces:
        at_bound = piece.type == _NORMAL and piece.score in bounds
        bounds -= {piece.score} if at_bound else set()
        if piece.type != _NORMAL or at_bound or piece.piece in kept or piece.piece in unlisted:
            staying.append(piece)
    smaller = type(model)()
    smaller.CopyFrom(model)
    del smaller.pieces[:]
    smaller.pieces.extend(staying)
    smaller.trainer_spec.vocab_size = len(staying)
    # examples of how the whole model splits; not every version's message has them
    if "self_test_data" in smaller.DESCRIPTOR.fields_by_name:
        smaller.ClearField("self_test_data")
    written: bytes = smaller.SerializeToString()
    return written


def _pieces(tokenizer: Any, side: str, texts: Sequence[str]) -> list[list[str]]:
    """The pieces of each text, as the tokenizer splits texts of this side."""
    if side == "target":
        tokenizer._switch_to_target_mode()
    try:
        return [tokenizer.tokenize(text) for text in texts]
    finally:
        tokenizer._switch_to_input_mode()
