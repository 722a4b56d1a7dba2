"""Blocks of running text."""

from __future__ import annotations

import pytest
from datasets import Dataset

from lmcompress.data import pack_blocks
from lmcompress.errors import LmcompressError


@pytest.mark.parametrize("block_size", [2, 5, 16])
def test_blocks_joined_are_the_documents_with_eos_between(gpt2, sentences, block_size):
    expected: list[int] = []
    for text in sentences:
        expected += ([gpt2.eos_token_id] if expected else []) + gpt2(text)["input_ids"]
    blocks = pack_blocks(sentences, gpt2, block_size)
    joined = [token for block in blocks["input_ids"] for token in block]
    assert joined == expected[: len(expected) // block_size * block_size]
    assert {len(block) for block in blocks["input_ids"]} == {block_size}
    assert blocks["labels"][:] == blocks["input_ids"][:]
    assert {mark for block in blocks["attention_mask"] for mark in block} == {1}


def test_a_data_set_and_a_list_give_the_same(gpt2, sentences):
    rows = Dataset.from_dict({"body": sentences})
    assert pack_blocks(rows, gpt2, 8, text_column="body").to_list() == pack_blocks(sentences, gpt2, 8).to_list()
    assert pack_blocks((text for text in sentences), gpt2, 8).to_list() == pack_blocks(sentences, gpt2, 8).to_list()


def test_one_document_has_no_eos(gpt2, bert, sentences):
    text = " ".join(sentences)
    assert gpt2.eos_token_id not in pack_blocks([text], gpt2, 4)["input_ids"][0]
    assert pack_blocks([text], bert, 4).num_rows


@pytest.mark.parametrize("text", ["a cat", ""])
def test_a_text_shorter_than_a_block_is_refused(gpt2, text):
    length = len(gpt2(text)["input_ids"])
    with pytest.raises(LmcompressError, match=f"at least one block of 64 tokens, got {length}; give more text"):
        pack_blocks([text], gpt2, 64)


def test_documents_need_an_eos_token_and_blocks_two_tokens(gpt2, bert, sentences):
    with pytest.raises(LmcompressError, match="must have an eos_token to separate documents, BertTokenizer"):
        pack_blocks(sentences, bert, 8)
    with pytest.raises(LmcompressError, match="block_size must be >= 2, got 1"):
        pack_blocks(sentences, gpt2, 1)
