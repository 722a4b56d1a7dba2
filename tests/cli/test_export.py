"""``lmcompress export``."""

from __future__ import annotations

import json

import pytest
from exported import BY_TOKEN, STATIC, bert

from lmcompress import cli
from lmcompress.export import load_exported
from lmcompress.model import CompressedModel

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_trained_model_is_exported_with_its_tokenizer_and_checked_on_texts(reviews, tmp_path, capsys):
    folder, data = tmp_path / "out", str(reviews / "reviews.csv")
    words = ["export", str(reviews / "my-model"), "--to", "onnx", "--data", data, "--text-column", "review"]
    assert cli.run_app([*words, "--rows", "20", "-o", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["comparison"]["inputs"] == "given" and report["comparison"]["batches"] == 3
    assert report["comparison"]["agreement"] == 1.0 and report["task"] == "sequence_classification"
    assert (folder / "tokenizer.json").is_file() and load_exported(folder).config.id2label[1] == "positive"


@pytest.mark.slow
def test_the_table_counts_integer_matmuls_and_names_the_folder(tmp_path, capsys, monkeypatch):
    CompressedModel(bert(STATIC)).save_pretrained(tmp_path / "int8")
    monkeypatch.chdir(tmp_path)
    assert cli.run_app(["export", "int8", "--to", "openvino"]) == 0
    printed = capsys.readouterr().out
    assert "12 of 14" in printed and "int8-openvino/README.md has the code that runs it" in printed


def test_static_ranges_ask_for_data_by_the_name_of_the_option(tmp_path, capsys):
    CompressedModel(bert(BY_TOKEN)).save_pretrained(tmp_path / "m")
    assert cli.run_app(["export", str(tmp_path / "m"), "--to", "openvino", "-o", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert "18 activations of this model have dynamic ranges" in printed and "give --data" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere", "--to", "onnx"], "no such folder: /nowhere"),
        (["FOLDER", "--to", "onnx"], "holds no model (no config.json)"),
        (
            ["MODEL", "--to", "tflite"],
            "--to: input should be 'onnx', 'openvino', 'compressed-tensors' or 'gguf', got 'tflite'",
        ),
        (["MODEL", "--to", "onnx", "--opset", "7"], "--opset: input should be greater than or equal to 18, got 7"),
        (["MODEL", "--to", "onnx", "--task", "x"], "there is no task 'x' to export for"),
        (["MODEL", "--to", "onnx", "--data", "x"], "--data must be a file of texts, glue/<task> or embedded/<name>"),
    ],
)
def test_what_cannot_be_exported_is_one_message(words, message, reviews, tmp_path, capsys):
    known = {"FOLDER": str(tmp_path), "MODEL": str(reviews / "my-model")}
    assert cli.run_app(["export", *(known.get(word, word) for word in words), "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
