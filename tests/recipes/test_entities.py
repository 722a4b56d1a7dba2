"""Token classification in recipes: words, their labels, and F1 of entities."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from lmcompress.data import load_task
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import entity_f1
from lmcompress.recipes import Recipe
from lmcompress.recipes.metrics import fitting_metrics
from lmcompress.recipes.runner import run

NAMES = ("B-place", "I-place", "O")


def rows(count):
    cities = [["Oslo"], ["New", "York"], ["Lima"], ["Sao", "Paulo"]]
    for number in range(count):
        city = cities[number % 4]
        tags = ["O", "O", "B-place", *["I-place"] * (len(city) - 1), "O"]
        yield {"tokens": ["we", "saw", *city, "again"], "ner_tags": tags}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("entities")
    for split, count in (("train", 16), ("validation", 8)):
        (made / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows(count))) + "\n")
    return made


def test_entities_are_measured_where_labels_mark_them(folder, tmp_path):
    pytest.importorskip("nervaluate")
    stage = {"name": "tagger", "training": {"max_steps": 3, "learning_rate": 1e-2}}
    recipe = Recipe.model_validate(
        {
            "name": "tiny", "task": {"name": str(folder), "max_length": 16, "metrics": ["entity_f1", "accuracy"]},
            "model": {"family": "bert", "hidden_size": 16, "layers": 1, "num_heads": 2, "positions": 32,
                      "tokenizer": {"kind": "wordpiece", "vocab_size": 80}},
            "stages": [stage], "evaluation": {"repeats": 3, "latency_batches": []},
        }
    )  # fmt: skip
    found = run(recipe, tmp_path).report["rows"][0]["metrics"]["validation"]
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "tagger").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tagger")
    said, right = [], []
    for row in rows(8):
        inputs = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        words = inputs.word_ids()
        first = [words.index(word) for word in range(len(row["tokens"]))]
        with torch.no_grad():
            said.append(model(**inputs).logits[0].argmax(-1).numpy()[first])
        right.append(np.array([NAMES.index(tag) for tag in row["ner_tags"]]))
    assert found["entity_f1"] == pytest.approx(entity_f1(said, right, NAMES))
    assert found["accuracy"] == pytest.approx(np.mean(np.concatenate(said) == np.concatenate(right)))


def test_the_metric_fits_labels_of_entities_only(folder):
    assert "entity_f1" in fitting_metrics(load_task(folder).task)
    other = [{"tokens": ["a", "b"], "ner_tags": ["NOUN", "VERB"]}] * 4
    assert "entity_f1" not in fitting_metrics(load_task("m", data={"train": other, "validation": other}).task)


def test_labels_that_do_not_align_with_words_are_refused():
    wrong = [{"tokens": ["we", "saw"], "ner_tags": ["O", "B-place"]}, {"tokens": ["we"], "ner_tags": ["O", "O"]}]
    with pytest.raises(
        LmcompressError, match=r"row 1 \(from 0\) must have one label for each word, got 1 words and 2 l"
    ):
        load_task("m", data={"train": wrong, "validation": wrong})
