"""Tokenising: what comes out, for student and teacher."""

from __future__ import annotations

import json
import logging

import datasets
import pytest
from transformers import BertTokenizerFast, GPT2TokenizerFast

from lmcompress.data import load_task, same_tokenizer, tokenize, train_tokenizer
from lmcompress.errors import LmcompressError


@pytest.fixture
def pairs(sentences):
    rows = [{"sentence1": a, "sentence2": b, "label": i % 2}
            for i, (a, b) in enumerate(zip(sentences, sentences[1:], strict=False))]  # fmt: skip
    return load_task("pairs", data={"train": rows, "validation": rows[:3], "test": [{**rows[0], "label": -1}]})


@pytest.fixture
def words(sentences):
    rows = [{"tokens": text.split(), "ner_tags": [i % 3 for i in range(len(text.split()))]} for text in sentences]
    return load_task("words", data={"train": rows, "validation": rows})


def with_prefix_space(gpt2):
    return GPT2TokenizerFast(vocab=gpt2.get_vocab(), merges=_merges(gpt2), add_prefix_space=True)


def _merges(tokenizer):
    return [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


def test_rows_hold_what_the_tokenizer_says_and_labels_only(pairs, bert):
    data = tokenize(pairs, bert, max_length=64)
    assert set(data.train.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    for raw, row in zip(pairs.train, data.train, strict=True):
        expected = bert(raw["sentence1"], raw["sentence2"])
        assert row == {**expected, "labels": raw["label"]}


def test_rows_are_not_padded(pairs, bert):
    lengths = {len(ids) for ids in tokenize(pairs, bert, max_length=64).train["input_ids"]}
    assert len(lengths) > 1


def test_a_split_without_labels_has_inputs_only(pairs, bert):
    assert "labels" not in tokenize(pairs, bert, max_length=64).test.column_names


def test_an_empty_split_stays_empty(bert):
    rows = [{"premise": "a cat", "hypothesis": "a dog", "label": i} for i in range(3)]
    data = tokenize(load_task("glue/ax", data={"test": rows}), bert, max_length=64)
    assert (data.train.num_rows, data.validation["labels"][:]) == (0, [0, 1, 2])


def test_a_teacher_with_another_tokenizer_has_columns_of_its_own(pairs, bert, gpt2):
    data = tokenize(pairs, bert, max_length=64, teacher_tokenizer=gpt2)
    assert {name for name in data.train.column_names if name.startswith("teacher_")} == {
        "teacher_input_ids",
        "teacher_attention_mask",
    }
    for raw, row in zip(pairs.train, data.train, strict=True):
        assert row["teacher_input_ids"] == gpt2(raw["sentence1"], raw["sentence2"])["input_ids"]
        assert row["input_ids"] == bert(raw["sentence1"], raw["sentence2"])["input_ids"]


def test_a_teacher_with_the_same_tokenizer_needs_none(pairs, bert, sentences):
    twin = train_tokenizer(sentences, kind="wordpiece", vocab_size=120)
    twin("left over", truncation=True, max_length=3, padding="max_length")
    data = tokenize(pairs, bert, max_length=64, teacher_tokenizer=twin)
    assert not any(name.startswith("teacher_") for name in data.train.column_names)


def test_tokenizers_are_told_apart_by_what_they_do(bert, gpt2, sentences):
    assert same_tokenizer(bert, train_tokenizer(sentences, kind="wordpiece", vocab_size=120))
    assert not same_tokenizer(bert, gpt2)
    assert not same_tokenizer(bert, BertTokenizerFast(vocab=bert.get_vocab(), do_lower_case=False))
    assert not same_tokenizer(bert, train_tokenizer(sentences, kind="wordpiece", vocab_size=90))


def test_truncation_is_counted_and_said(pairs, bert, caplog):
    with caplog.at_level(logging.WARNING, logger="lmcompress"):
        data = tokenize(pairs, bert, max_length=12)
    whole = [len(bert(row["sentence1"], row["sentence2"])["input_ids"]) for row in pairs.train]
    cut = sum(length > 12 for length in whole)
    assert 0 < cut
    assert f"{cut} rows ({cut / len(whole):.2%}) of train are truncated to 12 tokens" in data.notes
    assert f"pairs: {cut} rows" in caplog.text
    assert max(map(len, data.train["input_ids"])) == 12


def test_nothing_is_said_when_nothing_is_cut(pairs, bert, caplog):
    with caplog.at_level(logging.WARNING, logger="lmcompress"):
        assert tokenize(pairs, bert, max_length=64).notes == pairs.notes
    assert "cut" not in caplog.text


def test_the_same_call_is_answered_from_the_cache(tmp_path, bert, sentences, monkeypatch):
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f'"{s}",{i % 2}\n' for i, s in enumerate(sentences)))
    (tmp_path / "dev.csv").write_text("text,label\na cat,0\na dog,1\n")

    def run(length):
        return tokenize(load_task(tmp_path), bert, max_length=length).train

    first, again, other = run(32), run(32), run(16)
    assert first.cache_files and first.cache_files == again.cache_files
    assert first._fingerprint == again._fingerprint != other._fingerprint


@pytest.mark.parametrize("kind", ["regression", "multi_label"])
def test_labels_that_are_numbers_pass_through(bert, kind):
    labels = {"regression": [0.5, -2.0], "multi_label": [[1, 0], [1, 1]]}[kind]
    rows = [{"text": "a cat", "label": label} for label in labels]
    data = tokenize(load_task("m", data={"train": rows, "validation": rows}), bert, max_length=8)
    assert data.train["labels"][:] == labels


@pytest.mark.parametrize("which", ["bert", "gpt2"])
def test_the_first_piece_of_each_word_bears_its_label(words, bert, gpt2, which):
    tokenizer = bert if which == "bert" else with_prefix_space(gpt2)
    data = tokenize(words, tokenizer, max_length=64)
    assert any(-100 in row["labels"] for row in data.train)
    for raw, row in zip(words.train, data.train, strict=True):
        assert [label for label in row["labels"] if label != -100] == raw["ner_tags"]
        assert len(row["labels"]) == len(row["input_ids"])
        starts = [i for i, label in enumerate(row["labels"]) if label != -100]
        pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in raw["tokens"]]
        assert [row["input_ids"][i] for i in starts] == [ids[0] for ids in pieces]


def test_causal_texts_are_packed(gpt2, sentences):
    rows = [{"text": text} for text in sentences]
    data = tokenize(load_task("m", data={"train": rows, "validation": rows}), gpt2, max_length=8)
    assert {len(ids) for ids in data.train["input_ids"]} == {8}
    assert data.train["labels"][:] == data.train["input_ids"][:]


def test_what_can_not_be_tokenized_is_refused(pairs, words, bert, gpt2, sentences, monkeypatch):
    short = BertTokenizerFast(vocab=bert.get_vocab(), model_max_length=10)
    with pytest.raises(LmcompressError, match=r"max_length must be in \[2, 10\], the most that .* takes, got 11"):
        tokenize(pairs, short, max_length=11)
    with pytest.raises(LmcompressError, match=r"max_length must be in \[2, 10\]"):
        tokenize(pairs, bert, max_length=11, teacher_tokenizer=short)
    with pytest.raises(
        LmcompressError, match="must be loaded with add_prefix_space=True for words: its words come one"
    ):
        tokenize(words, gpt2, max_length=11)
    rows = [{"text": text} for text in sentences]
    causal = load_task("m", data={"train": rows, "validation": rows})
    assert "teacher_labels" in tokenize(causal, gpt2, max_length=8, teacher_tokenizer=bert).train.column_names
    monkeypatch.setattr(BertTokenizerFast, "is_fast", False)
    with pytest.raises(LmcompressError, match="must be a fast one"):
        tokenize(pairs, bert, max_length=11)


def test_several_processes_give_what_one_gives(pairs, bert):
    datasets.disable_caching()
    try:
        one, two = (tokenize(pairs, bert, max_length=64, num_proc=n).train.to_list() for n in (None, 2))
    finally:
        datasets.enable_caching()
    assert one == two
