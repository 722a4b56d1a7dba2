"""Summaries and translations: rows, tokens, batches, and the quality of a model on them."""

import json

import pytest
from transformers import BartConfig, BartForConditionalGeneration

from lmcompress.data import collator, load_task, tokenize, train_tokenizer
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import written_scores, written_texts
from lmcompress.recipes.one_model import evaluate_once
from lmcompress.recipes.specs import EvaluationSpec, TaskSpec

ROWS = [
    {"dialogue": f"Ann: is number {n} far away? Bob: it takes {n} hours from here.", "summary": f"It takes {n} hours."}
    for n in range(12)
]


def task(kind="summarization", rows=ROWS):
    return load_task("mine", data={"train": rows, "validation": rows[:4]}, kind=kind)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for row in ROWS for text in row.values()]
    made = train_tokenizer(texts, kind="wordpiece", vocab_size=80)
    made.model_max_length = 64
    return made


def test_targets_are_texts_if_the_kind_says_so():
    data = task()
    assert (data.task.text_columns, data.task.label_column) == (("dialogue",), "summary")
    assert data.task.metrics == ("rouge1", "rouge2", "rougeL") and data.task.label_names is None
    assert data.train[0]["summary"] == "It takes 0 hours."
    assert task("translation").task.metrics == ("bleu", "chrf")
    with pytest.raises(LmcompressError, match="row 1"):
        task(rows=[ROWS[0], ROWS[1] | {"summary": None}, *ROWS[2:]])


def test_labels_are_the_tokens_of_the_target_padded_on_the_right(tokenizer):
    data = tokenize(task(), tokenizer, max_length=40)
    row = data.train[3]
    assert row["labels"] == tokenizer(text_target=ROWS[3]["summary"])["input_ids"]
    longer = row | {"labels": [*row["labels"], 5, 6]}
    batch = collator(data.task, tokenizer)([row, longer])
    assert batch["labels"].shape == (2, len(row["labels"]) + 2)
    assert batch["labels"][0].tolist() == [*row["labels"], -100, -100]


def test_quality_is_that_of_the_texts_that_a_model_writes(tokenizer, tmp_path):
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.cls_token_id, forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "rows.json"
    file.write_text("\n".join(json.dumps(row) for row in ROWS[:4]))
    spec = TaskSpec(name=str(file), kind="summarization", max_length=40)
    found = evaluate_once(str(tmp_path / "model"), spec, EvaluationSpec(max_new_tokens=6, metrics=("rouge1", "chrf")))
    data = tokenize(task(), tokenizer, max_length=40)
    texts = written_texts(
        model, tokenizer, data.validation, collator(data.task, tokenizer), max_new_tokens=6, progress=False
    )
    assert found["metrics"] == pytest.approx(
        written_scores(["rouge1", "chrf"], texts, [row["summary"] for row in ROWS[:4]])
    )
