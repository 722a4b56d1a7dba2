"""Tokenizers made on the spot."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from lmcompress.data import same_tokenizer, train_tokenizer
from lmcompress.errors import LmcompressError

KINDS = [("wordpiece", 90), ("bytelevel_bpe", 290)]


@pytest.mark.parametrize(("kind", "vocab_size"), KINDS)
def test_texts_come_back(kind, vocab_size, sentences):
    tokenizer = train_tokenizer(sentences, kind=kind, vocab_size=vocab_size)
    assert len(tokenizer) <= vocab_size
    for text in sentences:
        decoded = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(("kind", "vocab_size"), KINDS)
def test_saving_changes_nothing(kind, vocab_size, sentences, tmp_path):
    tokenizer = train_tokenizer(sentences, kind=kind, vocab_size=vocab_size)
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(reloaded) is type(tokenizer)
    assert same_tokenizer(tokenizer, reloaded)
    assert tokenizer(sentences)["input_ids"] == reloaded(sentences)["input_ids"]


@pytest.mark.slow
def test_another_process_makes_the_same_ones(sentences):
    script = (
        "import json; from lmcompress.data import train_tokenizer; "
        f"print(json.dumps([train_tokenizer({sentences!r}, kind=k, vocab_size=v).get_vocab() for k, v in {KINDS!r}]))"
    )
    elsewhere = json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
    assert elsewhere == [train_tokenizer(sentences, kind=k, vocab_size=v).get_vocab() for k, v in KINDS]


@pytest.mark.parametrize(("kind", "vocab_size"), KINDS)
def test_training_twice_gives_the_same(kind, vocab_size, sentences):
    first, second = (train_tokenizer(sentences, kind=kind, vocab_size=vocab_size) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert same_tokenizer(first, second)


def test_special_tokens_are_the_familys(bert, gpt2):
    assert (bert.pad_token, bert.mask_token, bert.pad_token_id) == ("[PAD]", "[MASK]", 0)
    assert (gpt2.eos_token, gpt2.pad_token) == ("<|endoftext|>", None)
    assert bert.unk_token_id not in bert("The CAT")["input_ids"]


def test_what_can_not_be_trained_is_refused(sentences):
    with pytest.raises(LmcompressError, match="unknown kind of tokenizer 'word_piece'; did you mean 'wordpiece'"):
        train_tokenizer(sentences, kind="word_piece", vocab_size=100)
    for kind in ("wordpiece", "bytelevel_bpe"):
        with pytest.raises(LmcompressError, match=r"vocab_size must be at least \d+ to hold .* got 7"):
            train_tokenizer(sentences, kind=kind, vocab_size=7)
