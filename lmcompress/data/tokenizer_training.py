"""Small tokenizers trained from scratch, for examples and tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Literal

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizerFast, GPT2TokenizerFast, PreTrainedTokenizerBase

from lmcompress.errors import LmcompressError, nearest

_BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_GPT2_SPECIAL = ["<|endoftext|>"]


def train_tokenizer(
    texts: Iterable[str], *, kind: Literal["wordpiece", "bytelevel_bpe"], vocab_size: int
) -> PreTrainedTokenizerBase:
    """A tokenizer trained on ``texts``, deterministically.

    Args:
        texts: a representative sample of the texts to tokenize.
        kind: ``wordpiece`` gives a lower-casing BERT tokenizer, ``bytelevel_bpe`` a GPT-2 tokenizer (which has no
            padding token, as GPT-2 has none).
        vocab_size: maximum number of entries, special tokens included.

    Returns:
        a fast tokenizer that ``save_pretrained`` writes like any other.

    Raises:
        LmcompressError: If the kind is unknown, or ``vocab_size`` is too small for the characters in the texts.

    Example:
        >>> tokenizer = train_tokenizer(["a cat and a hat"], kind="wordpiece", vocab_size=40)
        >>> tokenizer.decode(tokenizer("A hat")["input_ids"])
        '[CLS] a hat [SEP]'
    """
    if kind == "wordpiece":
        return _wordpiece(texts, vocab_size)
    if kind == "bytelevel_bpe":
        return _bytelevel_bpe(texts, vocab_size)
    raise LmcompressError(f"unknown kind of tokenizer {kind!r}{nearest(kind, ['wordpiece', 'bytelevel_bpe'])}")


def _wordpiece(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = list(texts)
    # the trainer numbers "##x" pieces in the order of a hash map and breaks ties by number; given in advance, they
    # are the same in every run
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_BERT_SPECIAL, *_continuations(texts, tokenizer)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BertTokenizerFast(vocab=_vocabulary(tokenizer, vocab_size))


def _bytelevel_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_GPT2_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return GPT2TokenizerFast(vocab=_vocabulary(tokenizer, vocab_size), merges=merges)


def _continuations(texts: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    """Every character that continues a word, as a word piece."""
    characters: set[str] = set()
    for text in texts:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
            characters.update(word[1:])
    return [f"##{character}" for character in sorted(characters)]


def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if len(vocabulary) > vocab_size:
        raise LmcompressError(
            f"vocab_size must be at least {len(vocabulary)} to hold the special tokens and every character, "
            f"got {vocab_size}"
        )
    return dict(sorted(vocabulary.items(), key=lambda entry: entry[1]))
