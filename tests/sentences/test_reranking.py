"""Rerankers: scores of pairs, distillation of one score by identity or sigmoid, order of documents."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import BY_NAME
from sentence_folders import SENTENCES
from transformers import BertForSequenceClassification, TrainingArguments

from lmcompress.data import collator, load_task, tokenize, train_tokenizer
from lmcompress.distillation import DistillationConfig
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import mean_ndcg
from lmcompress.sentences import reranker_scores
from lmcompress.students.layers import by_layers
from lmcompress.trainers import DistillationTrainer

PAIRS = [(a, b) for a in SENTENCES[:2] for b in SENTENCES]


@pytest.fixture
def tokenizer():
    made = train_tokenizer(SENTENCES, kind="wordpiece", vocab_size=64)
    made.model_max_length = 40
    return made


def reranker(tokenizer, **config):
    torch.manual_seed(0)
    made = BY_NAME["bert"].make_config(initializer_range=0.3, vocab_size=len(tokenizer), num_labels=1, **config)
    return BertForSequenceClassification(made).eval()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_are_those_of_each_pair_alone(tokenizer, batch_size):
    model = reranker(tokenizer)
    with torch.no_grad():
        alone = [float(model(**tokenizer(a, b, return_tensors="pt")).logits) for a, b in PAIRS]
    found = reranker_scores(model, tokenizer, PAIRS, batch_size=batch_size)
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)
    squeezed = reranker_scores(model, tokenizer, PAIRS, sigmoid=True)
    np.testing.assert_allclose(squeezed, 1 / (1 + np.exp(-np.array(alone))), rtol=1e-4, atol=1e-5)
    relevant = [{2: 1.0}, {0: 1.0, 3: 2.0}]
    ranked = [mean_ndcg(np.reshape(scores, (2, 5)), relevant) for scores in (found, squeezed)]
    assert ranked[0] == pytest.approx(ranked[1])


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_a_student_of_fewer_layers_learns_the_score(tokenizer, tmp_path, problem):
    teacher = reranker(tokenizer, problem_type=problem)
    student = by_layers(teacher, 1, choose="first").model
    label = 0.5 if problem == "regression" else [1]
    rows = [{"text_a": a, "text_b": b, "label": label} for a, b in PAIRS]
    data = tokenize(
        load_task("m", data={"train": rows, "validation": rows}, kind=_kind(problem)), tokenizer, max_length=40
    )
    args = TrainingArguments(
        str(tmp_path), max_steps=40, learning_rate=3e-3, report_to="none", save_strategy="no", disable_tqdm=True,
        use_cpu=True, per_device_train_batch_size=10,
    )  # fmt: skip
    wanted = reranker_scores(teacher, tokenizer, PAIRS, sigmoid=problem != "regression")

    def distance():
        return float(
            np.square(reranker_scores(student, tokenizer, PAIRS, sigmoid=problem != "regression") - wanted).mean()
        )

    before = distance()
    DistillationTrainer(
        student, args, teacher=copy.deepcopy(teacher), distillation=DistillationConfig(label_weight=0.0),
        train_dataset=data.train, data_collator=collator(data.task, tokenizer),
    ).train()  # fmt: skip
    assert distance() < before / 3


def _kind(problem):
    return "regression" if problem == "regression" else "multi_label"


def test_what_is_no_reranker_is_refused(tokenizer):
    with pytest.raises(LmcompressError, match="there must be pairs to score, got none"):
        reranker_scores(reranker(tokenizer), tokenizer, [])
    config = BY_NAME["bert"].make_config(vocab_size=len(tokenizer), num_labels=2)
    with pytest.raises(
        LmcompressError, match="must have one output, BertForSequenceClassification has 2: load it with"
    ):
        reranker_scores(BertForSequenceClassification(config), tokenizer, PAIRS)
