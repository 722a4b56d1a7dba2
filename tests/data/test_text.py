"""Blocks of running text."""

from __future__ import annotations

import pytest
from datasets import Dataset

from lmcompress.data import documents_for_two, load_task, pack_blocks, pack_documents, tokenize, train_tokenizer
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


def test_packed_documents_begin_anew_and_predict_nothing_across_a_border(gpt2, sentences):
    blocks = pack_documents(sentences, gpt2, 16)
    assert "attention_mask" not in blocks.column_names
    whole = [token for text in sentences for token in [*gpt2(text)["input_ids"], gpt2.eos_token_id]]
    joined = [token for block in blocks["input_ids"] for token in block]
    assert joined == whole[: len(joined)] and len(joined) > len(whole) - 16
    before = gpt2.eos_token_id
    for row in blocks:
        expected = -1
        for place, (token, position, label) in enumerate(
            zip(row["input_ids"], row["position_ids"], row["labels"], strict=True)
        ):
            begins = place == 0 or before == gpt2.eos_token_id
            expected = 0 if begins else expected + 1
            assert (position, label) == (expected, -100 if begins else token)
            before = token


def test_packed_documents_need_an_eos_token_and_a_block(gpt2, bert, sentences):
    with pytest.raises(LmcompressError, match="must have an eos_token to separate documents, BertTokenizer"):
        pack_documents(sentences, bert, 8)
    with pytest.raises(LmcompressError, match="at least one block of 64 tokens"):
        pack_documents(["a cat"], gpt2, 64)
    task = load_task("mine", data=[{"text": text, "label": n % 2} for n, text in enumerate(sentences)])
    with pytest.raises(
        LmcompressError, match="packing='apart' packs documents of running text, .* classification task"
    ):
        tokenize(task, gpt2, max_length=16, packing="apart")


def test_two_tokenizers_see_the_same_pieces_of_text(gpt2, sentences):
    other = train_tokenizer(sentences, kind="bytelevel_bpe", vocab_size=262)
    texts = [" ".join(sentences), "a ñandú ☃", "x"]
    rows = documents_for_two(texts, gpt2, other, 20)
    mine, theirs = (
        [tokenizer.decode(ids) for ids in rows[column]]
        for tokenizer, column in ((gpt2, "input_ids"), (other, "teacher_input_ids"))
    )
    for one, two in zip(mine, theirs, strict=True):
        # the teacher's tokens are smaller, and may end earlier
        assert one.startswith(two.rstrip("�"))
    assert "".join(mine[:-1]) == texts[0] and mine[-1] == texts[1]
    assert rows["labels"][:] == rows["input_ids"][:] and rows["teacher_labels"][:] == rows["teacher_input_ids"][:]
    with pytest.raises(LmcompressError, match="a document of at least two tokens, got none"):
        documents_for_two(["x"], gpt2, other, 20)
