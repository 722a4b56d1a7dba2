"""Fixtures for data: a cache of its own, and small tokenizers."""

from __future__ import annotations

import datasets
import pytest

from lmcompress.data import train_tokenizer

datasets.disable_progress_bars()

SENTENCES = [
    "the cat sat on the mat", "a good film, really good", "what a bad and boring play", "dogs chase cats up the tree",
    "the play was good", "no film is that bad", "she sat in the tree", "he said nothing at all",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return list(SENTENCES)


@pytest.fixture(scope="session")
def bert():
    """A BERT tokenizer of 120 word pieces."""
    return train_tokenizer(SENTENCES, kind="wordpiece", vocab_size=120)


@pytest.fixture(scope="session")
def gpt2():
    """A GPT-2 tokenizer of 300 tokens, without a padding token."""
    return train_tokenizer(SENTENCES, kind="bytelevel_bpe", vocab_size=300)
