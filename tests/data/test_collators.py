"""Batches."""

from __future__ import annotations

import pytest
import torch
from transformers import BertTokenizerFast

from lmcompress.data import Task, collator, load_task, tokenize
from lmcompress.errors import LmcompressError

TASK = Task("t", "classification", ("text",), "label", ("a", "b"))
NAMES = {"classification": ("a", "b"), "multi_label": ("a", "b"), "token_classification": ("a", "b")}


def task_of(kind):
    return Task("t", kind, ("text",), None if kind == "causal_lm" else "label", NAMES.get(kind))


def inputs(tokenizer, sentences, prefix=""):
    return [{prefix + key: value for key, value in tokenizer(text).items()} for text in sentences]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("multiple", [None, 1, 8])
def test_padding_is_what_the_tokenizer_would_do(bert, sentences, side, multiple):
    tokenizer = BertTokenizerFast(vocab=bert.get_vocab(), padding_side=side)
    batch = collator(TASK, tokenizer, pad_to_multiple_of=multiple)(inputs(tokenizer, sentences))
    expected = tokenizer(sentences, padding=True, pad_to_multiple_of=multiple, return_tensors="pt")
    assert set(batch) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(batch[key], value)


def test_gpt2_is_padded_with_its_eos_and_the_mask_hides_it(gpt2, sentences):
    batch = collator(TASK, gpt2)(inputs(gpt2, sentences))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == gpt2.eos_token_id).all()
    assert batch["attention_mask"].sum() == sum(len(ids) for ids in gpt2(sentences)["input_ids"])
    assert gpt2.pad_token is None


def test_the_teachers_inputs_are_padded_its_own_way(bert, gpt2, sentences):
    student, teacher = inputs(bert, sentences), inputs(gpt2, sentences, "teacher_")
    batch = collator(TASK, bert, gpt2)([a | b for a, b in zip(student, teacher, strict=True)])
    hidden = batch["teacher_attention_mask"] == 0
    assert hidden.any() and (batch["teacher_input_ids"][hidden] == gpt2.eos_token_id).all()
    assert batch["teacher_input_ids"].shape != batch["input_ids"].shape
    assert (batch["input_ids"][batch["attention_mask"] == 0] == bert.pad_token_id).all()


@pytest.mark.parametrize(
    ("kind", "labels", "dtype"),
    [
        ("classification", [0, 1], torch.int64),
        ("regression", [1, 2.5], torch.float32),
        ("multi_label", [[1, 0], [1, 1]], torch.float32),
    ],
)
def test_labels_have_the_type_that_the_loss_wants(bert, kind, labels, dtype):
    rows = [{"input_ids": [1, 2], "labels": label} for label in labels]
    batch = collator(task_of(kind), bert)(rows)
    torch.testing.assert_close(batch["labels"], torch.tensor(labels, dtype=dtype))


@pytest.mark.parametrize("kind", ["token_classification", "causal_lm"])
def test_labels_of_tokens_are_padded_with_what_no_loss_counts(gpt2, kind):
    rows = [{"input_ids": [5, 6, 7], "labels": [0, 1, 1]}, {"input_ids": [5], "labels": [1]}]
    assert collator(task_of(kind), gpt2)(rows)["labels"].tolist() == [[0, 1, 1], [1, -100, -100]]


def test_other_columns_are_stacked(bert):
    batch = collator(TASK, bert)([{"input_ids": [1], "row": 3}, {"input_ids": [1, 2], "row": 4}])
    assert batch["row"].tolist() == [3, 4]


def test_tokenised_rows_collate(bert, gpt2, sentences):
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(sentences)]
    data = tokenize(
        load_task("m", data={"train": rows, "validation": rows}), bert, max_length=16, teacher_tokenizer=gpt2
    )
    batch = collator(data.task, bert, gpt2)([data.train[i] for i in range(4)])
    assert {key: value.shape[0] for key, value in batch.items()} == dict.fromkeys(batch, 4)
    assert "teacher_input_ids" in batch


def test_what_can_not_be_padded_is_refused(bert, sentences):
    bare = BertTokenizerFast(vocab=bert.get_vocab())
    bare.pad_token = None
    with pytest.raises(LmcompressError, match="has neither a pad_token nor an eos_token to pad batches with"):
        collator(TASK, bare)
    with pytest.raises(LmcompressError, match="the rows have teacher_\\* inputs, but the collator has no teacher_tok"):
        collator(TASK, bert)(inputs(bert, sentences, "teacher_"))
    with pytest.raises(LmcompressError, match="pad_to_multiple_of must be >= 1, got 0"):
        collator(TASK, bert, pad_to_multiple_of=0)
