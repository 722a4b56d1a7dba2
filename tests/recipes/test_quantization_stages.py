"""Stages that quantize: planned, run, resumed, with and without training, together with pruning, and by command."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from tiny_recipe import head
from transformers import AutoModelForSequenceClassification

from lmcompress.checkpoint.encoding import encoding_of
from lmcompress.checkpoint.saving import outputs_of, random_batches
from lmcompress.cli import run_app
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import stream_table
from lmcompress.quantization import QuantizationConfig
from lmcompress.recipes import builtin_recipes, load_recipe, parse_recipe, plan, run
from lmcompress.recipes.parts.quantization import StageQuantization
from lmcompress.trainers import CompressionTrainer

TRAINING = "{max_steps: 3, save_strategy: steps, save_steps: 1, per_device_train_batch_size: 8, learning_rate: 1e-3}"
RECIPE = f"""\
{head(layers=2)}  - name: dense
    training: {TRAINING}
  - name: int8
    start: dense
    quantization: {{}}
    training: {{max_steps: 0}}
  - name: cut-int4
    start: dense
    pruning: {{target: {{sparsity: 0.4}}}}
    quantization: {{method: gptq, weights: {{bits: 4}}, activations: {{range: static}}}}
    training: {{max_steps: 0}}
  - name: both
    start: dense
    pruning: {{target: {{sparsity: 0.4}}, schedule: {{kind: iterative, rounds: 2, end: 0.7}}}}
    quantization:
      weights: {{bits: 2, granularity: row}}
      bits_schedule: [[0.0, 8], [0.5, 2]]
    distillation: {{teachers: [dense], temperature: 1, label_weight: 0}}
    training: {TRAINING}
evaluation: {{repeats: 3, latency_batches: []}}
"""


@pytest.fixture(scope="session")
def quantizing(task_folder) -> str:
    return RECIPE.replace("DATA", str(task_folder))


@pytest.fixture(scope="session")
def quantized(quantizing, tmp_path_factory):
    return run(parse_recipe(quantizing), tmp_path_factory.mktemp("run") / "tiny", console=Console(quiet=True))


def answers(model) -> torch.Tensor:
    return torch.cat(outputs_of(model, random_batches(model)))


def test_a_plan_says_what_is_quantized_and_what_it_will_weigh(quantizing):
    dense, int8, cut, both = plan(parse_recipe(quantizing)).stages
    assert [entry.role for entry in (dense, int8, cut, both)] == ["teacher", "quantized", "quantized", "student"]
    assert tuple(entry.plans["quantization"].method for entry in (int8, cut, both)) == ("rtn", "gptq", None)
    assert dense.bytes_estimate > 2 * int8.bytes_estimate > 2 * cut.bytes_estimate
    assert "packed codes" in int8.vanilla_obstacle and "quantization" not in dense.plans


def test_a_run_packs_every_stage_and_measures_it(quantized):
    rows = {row["name"]: row for row in quantized.report["rows"]}
    assert rows["dense"]["quantization"] is None
    for name, method in (("int8", "rtn"), ("cut-int4", "gptq"), ("both", "trained")):
        row = rows[name]
        assert row["quantization"]["method"] == method and row["weights_bytes"] < rows["dense"]["weights_bytes"]
        assert row["equivalence"]["relative_error"] < 1e-4
        model = AutoModelForSequenceClassification.from_pretrained(quantized.models[name]).eval()
        assert encoding_of(model) is not None and torch.isfinite(answers(model)).all()
    assert rows["int8"]["parameters"] == rows["dense"]["parameters"] > rows["both"]["parameters"]
    assert any("bits a weight" in note for note in quantized.report["notes"])
    assert rows["cut-int4"]["columns"] == {
        "bits a weight": f"{rows['cut-int4']['quantization']['bits_per_weight']:.2f}"
    }
    assert rows["both"]["pruning"]["removed"] >= 0.39


def test_a_checkpoint_names_all_methods_that_made_it(quantized):
    for name, methods in (
        ("int8", ("quantization",)),
        ("cut-int4", ("structured pruning", "quantization")),
        ("both", ("structured pruning", "quantization", "distillation")),
    ):
        config = json.loads((quantized.models[name] / "config.json").read_text())
        assert tuple(config["quantization_config"]["provenance"]["methods"]) == methods


def test_what_was_planned_is_what_the_file_weighs(quantized, quantizing):
    # what is cut more than asked for was not known
    entry = next(e for e in plan(parse_recipe(quantizing)).stages if e.stage.name == "int8")
    row = next(row for row in quantized.report["rows"] if row["name"] == "int8")
    bytes_after = row["quantization"]["bytes_after"]
    assert bytes_after <= entry.bytes_estimate <= 1.05 * bytes_after + 64


def test_an_interrupted_run_goes_on(quantizing, tmp_path, monkeypatch, quantized):
    recipe = parse_recipe(quantizing)
    original = CompressionTrainer.training_step

    def step(self, *args, **kwargs):
        if any(method.name == "quantization" for method in self.methods) and self.state.global_step == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(CompressionTrainer, "training_step", step)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", console=Console(quiet=True))
    monkeypatch.setattr(CompressionTrainer, "training_step", original)
    again = run(recipe, tmp_path / "run", console=Console(quiet=True))
    marker = json.loads((again.models["both"] / "stage.json").read_text())
    assert marker["training"]["resumed"]
    one, other = (AutoModelForSequenceClassification.from_pretrained(r.models["both"]) for r in (quantized, again))
    assert torch.equal(answers(one), answers(other))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("quantization: {}", "quantization: {rules: [{modules: ffn_oot}]}", "matches no matrix"),
        ("quantization: {}", "quantization: {weights: {quantizer: lsq}}", "must not be one that learns"),
        ("quantization: {}", "quantization: {}\n    save: vanilla", "save.*vanilla.*or as self_loading"),
        (
            "quantization: {}",
            "quantization: {attention: true}\n    save: self_loading",
            "self_loading is not possible with quantized attention.*leave attention out",
        ),
        ("name: dense", "name: dense\n    save: vanilla\n    storage: zstd", "streams need lmcompress"),
        ("{method: gptq, weights: {bits: 4}", "{method: awq, weights: {bits: 5}", "bits"),
        ("quantization:\n      weights: {bits: 2,", "quantization:\n      method: gptq\n      weights: {bits: 2,",
         "is for stages without training"),
        ("{bits: 2, granularity: row}", "{bits: 2, granularity: 8}", "must be tensor or row in a run that prunes too"),
        ("schedule: {kind: iterative, rounds: 2, end: 0.7}", "schedule: {kind: hard_concrete}", "hard_concrete"),
        ("name: both\n    start: dense", "name: both\n    start: int8", "whose weights are codes"),
        ("[0.5, 2]]", "[0.5, 4]]", "must end with the bits of all matrices"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_runs(quantizing, old, new, message):
    assert old in quantizing
    with pytest.raises(LmcompressError, match=message):
        plan(parse_recipe(quantizing.replace(old, new)))


def test_without_training_what_is_left_out_is_as_nothing_has_to_be_learned_for():
    spec = StageQuantization(weights={"bits": 4})
    config = spec.config(3, trains=False)
    assert (config.weights.quantizer, config.weights.bits, config.weights.granularity) == ("mse", 4, "row")
    assert (config.embeddings.bits, config.attention, config.seed) == (8, False, 3)
    assert spec.config(3, trains=True) == QuantizationConfig(weights={"bits": 4}, seed=3)


def test_quantize_on_the_command_line(quantized, task_folder, tmp_path, capsys):
    dense, target = str(quantized.models["dense"]), tmp_path / "small"
    asked = ["quantize", dense, "--task", str(task_folder), "--bits", "4", "--method", "gptq", "--batch", "1"]
    asked += ["--max-length", "12"]
    assert run_app([*asked, "--out", str(target), "--dry-run"]) == 0
    assert "weights 4, embeddings 4, activations 8 (gptq)" in capsys.readouterr().out and not target.exists()
    assert run_app([*asked, "--leave", "ffn_out", "--out", str(target), "--storage", "auto"]) == 0
    assert "bits a weight" in capsys.readouterr().out
    assert stream_table(target)
    encoding = encoding_of(AutoModelForSequenceClassification.from_pretrained(target))
    assert not any("output.dense" in path and "attention" not in path for path in encoding.by_module())
    assert run_app([*asked, "--out", str(target)]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert run_app([*asked, "--storage", "zip", "--out", str(tmp_path / "other")]) == 2
    assert "--storage: input should be 'plain', 'auto', 'zstd' or 'huffman'" in capsys.readouterr().err
    assert run_app([*asked[:4], "--max-length", "12", "--bits", "7", "--out", str(tmp_path / "other")]) == 2
    assert "--bits: input should be 1, 2, 3, 4, 8" in capsys.readouterr().err


def test_the_quickstart_of_quantization_has_all_its_ways(tmp_path):
    planned = plan(load_recipe("quickstart-quantize"), tmp_path)
    assert [e.role for e in planned.stages] == ["teacher", "quantized", "quantized", "student", "student"]
    contrasts = [entry.plans["distillation"].contrast for entry in planned.stages[3:]]
    assert contrasts[0] is not None and contrasts[1] is None
    assert "quantgpt-w2a8" in builtin_recipes()
