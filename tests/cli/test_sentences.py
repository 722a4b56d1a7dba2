"""Sentence encoders, and models without a task, on the command line."""

from __future__ import annotations

import json

import pytest
from scipy.stats import spearmanr
from sentence_folders import SENTENCES, write_encoder
from transformers import AutoModelForSequenceClassification

from lmcompress import cli
from lmcompress.sentences import SentenceEncoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sentences")
    write_encoder(made / "encoder")
    rows = zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], (0.5, 3.2, 1.1, 4.8, 2.0), strict=True)
    lines = ["sentence1,sentence2,score", *(f"{a},{b},{rating}" for a, b, rating in rows)]
    (made / "sts.csv").write_text("\n".join(lines) + "\n")
    (made / "texts.txt").write_text("\n".join(SENTENCES) + "\n")
    return made


def test_similarities_are_evaluated(folder, capsys):
    assert cli.run_app(["evaluate", str(folder / "encoder"), "--task", str(folder / "sts.csv"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    vectors = SentenceEncoder.from_pretrained(folder / "encoder").encode(SENTENCES)
    cosines = (vectors * vectors.roll(-1, 0)).sum(-1)
    assert found["spearmanr"] == pytest.approx(spearmanr(cosines, (0.5, 3.2, 1.1, 4.8, 2.0))[0])


def test_an_encoder_without_a_head_is_quantized(folder, tmp_path, capsys):
    arguments = ["quantize", str(folder / "encoder"), "-o", str(tmp_path / "q")]
    assert cli.run_app(arguments) == 0
    shown = capsys.readouterr().out
    assert "its quality was not measured" in shown and "SentenceTransformer('" in shown
    before = SentenceEncoder.from_pretrained(folder / "encoder").encode(SENTENCES)
    after = SentenceEncoder.from_pretrained(tmp_path / "q").encode(SENTENCES)
    assert 0.9 < float((before * after).sum(-1).min()) < 1
    assert cli.run_app(arguments) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert cli.run_app([*arguments, "--overwrite", "--bits", "4"]) == 0


def test_texts_calibrate_and_measure_embeddings(folder, tmp_path, capsys):
    arguments = ["quantize", str(folder / "encoder"), "--data", str(folder / "texts.txt"), "-o", str(tmp_path / "q")]
    assert cli.run_app([*arguments, "--method", "gptq", "--bits", "4", "--static"]) == 0
    assert "cosine of embeddings before and after, mean over texts: 0.9" in capsys.readouterr().out


def test_a_classifier_without_a_task_is_quantized_too(reviews, tmp_path, capsys):
    assert cli.run_app(["quantize", str(reviews / "my-model"), "-o", str(tmp_path / "q")]) == 0
    assert "BertForSequenceClassification.from_pretrained(" in capsys.readouterr().out
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "q").config.num_labels == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "gptq"], "the method gptq must be calibrated on texts: give --task, or texts with --data"),
        (["--static"], "static ranges must be calibrated on texts: give --task, or texts with --data"),
        (["--metric", "accuracy"], "--metric: for models that are measured on a task; give --task, or drop it"),
        (["--dry-run"], "--dry-run: for models that are measured on a task"),
        (["--data", "missing.txt"], "no such file: missing.txt"),
    ],
)
def test_what_needs_a_task_is_refused(options, message, folder, tmp_path, capsys):
    assert cli.run_app(["quantize", str(folder / "encoder"), "-o", str(tmp_path / "q"), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "q").exists()


def test_tasks_that_do_not_fit_an_encoder_are_refused(folder, reviews, capsys):
    assert cli.run_app(["evaluate", str(folder / "encoder"), "--task", str(reviews / "reviews.csv")]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "evaluated on two texts and a rating of their similarity in each row, got" in shown
    sts = ["evaluate", str(folder / "encoder"), "--task", str(folder / "sts.csv"), "--metric", "mse"]
    assert cli.run_app(sts) == 2
    assert "--metric: 'mse' does not fit similarities" in " ".join(capsys.readouterr().err.split())
