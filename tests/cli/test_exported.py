"""Commands that are given an exported folder."""

from __future__ import annotations

import json

import pytest

from lmcompress import cli

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def exported(reviews, tmp_path_factory):
    """The model of the reviews, for ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("exported") / "my-model-onnx"
    assert cli.run_app(["export", str(reviews / "my-model"), "--to", "onnx", "-o", str(folder), "--json"]) == 0
    return folder


def test_evaluate_gives_what_the_checkpoint_gives(exported, reviews, capsys):
    def measured(model):
        assert cli.run_app(["evaluate", str(model), "--task", str(reviews / "reviews.csv"), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["metrics"]

    capsys.readouterr()
    assert measured(exported) == pytest.approx(measured(reviews / "my-model"))


def test_benchmark_times_it_beside_the_checkpoint(exported, reviews, capsys):
    model, given = str(reviews / "my-model"), ["--batch", "1", "--repeats", "3", "--length", "8", "--threads", "1"]
    capsys.readouterr()
    assert cli.run_app(["benchmark", str(exported), "--against", model, *given]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "my-model-onnx: exported, 0." in said and "my-model: " in said


def test_what_changes_a_model_needs_the_checkpoint(exported, capsys):
    assert cli.run_app(["export", str(exported), "--to", "openvino"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is an exported model" in said and "give the checkpoint that it was exported from" in said
