"""Exports of a run: made after the stages, kept, made again, refused before anything is trained."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from tiny_recipe import head, write_task
from transformers import AutoModelForSequenceClassification

from lmcompress.errors import LmcompressError
from lmcompress.export import load_exported
from lmcompress.recipes import exporting, parse_recipe, plan, run

RECIPE = f"""\
{head(layers=2)}  - name: int8
    quantization: {{attention: false}}
    training: {{max_steps: 0}}
    export: [{{to: onnx}}]
evaluation: {{repeats: 3, latency_batches: []}}
"""


@pytest.fixture
def recipe(tmp_path):
    return RECIPE.replace("DATA", str(write_task(tmp_path / "data")))


def test_a_run_exports_once_and_again_only_where_something_changed(recipe, tmp_path, monkeypatch):
    said = Console(record=True, quiet=True)
    result = run(parse_recipe(recipe), tmp_path / "run", console=said)
    folder = tmp_path / "run" / "exports" / "int8" / "onnx"
    (entry,) = result.report["exports"]
    assert (entry["stage"], entry["to"], entry["folder"]) == ("int8", "onnx", "exports/int8/onnx")
    assert any("int8: exported to onnx" in note and "matmuls in integers" in note for note in result.report["notes"])
    assert any("by at most" in note and "of their norm (" in note for note in result.report["notes"])
    ids = torch.tensor([[5, 6, 7, 8]])
    model = AutoModelForSequenceClassification.from_pretrained(result.models["int8"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(load_exported(folder)(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)

    made = []
    monkeypatch.setattr(exporting, "_export", lambda *given: made.append(given[2].activations))
    assert run(parse_recipe(recipe), tmp_path / "run", console=said).report["exports"] == result.report["exports"]
    assert made == []
    # another setting: the export is made again, the stage is not
    before = (result.models["int8"] / "stage.json").stat().st_mtime_ns
    changed = recipe.replace("{to: onnx}", "{to: onnx, activations: none}")
    run(parse_recipe(changed), tmp_path / "run", console=said)
    assert made == ["none"] and (result.models["int8"] / "stage.json").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "run" / "results.json").read_text())["exports"]


def test_the_plan_names_exports(recipe, tmp_path):
    assert "exported to onnx" in plan(parse_recipe(recipe), tmp_path / "run").stages[0].words


def test_a_missing_library_is_refused_before_anything_is_trained(recipe, tmp_path, monkeypatch):
    def missing(target):
        raise LmcompressError(f'pip install "lmcompress[{target}]"')

    monkeypatch.setattr(exporting, "check_exporter", missing)
    with pytest.raises(LmcompressError, match=r"stage 'int8', export to onnx: pip install .lmcompress\[onnx\]"):
        run(parse_recipe(recipe), tmp_path / "run", console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ("[{to: onnx}, {to: onnx, activations: none}]", "export names onnx more than once"),
        ("[{to: tflite}]", "onnx"),
        ("[{to: compressed-tensors, opset: 20}]", "opset must be left out for compressed-tensors"),
    ],
)
def test_exports_that_make_no_sense_are_refused(export, message, recipe):
    with pytest.raises(LmcompressError, match=message):
        parse_recipe(recipe.replace("[{to: onnx}]", export))
