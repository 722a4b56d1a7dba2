"""Stages that prune: planned, run, resumed, with and without training, with a teacher, after the vocabulary."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import make
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipe import head
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lmcompress.checkpoint.config import recorded_compression
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import machine
from lmcompress.model import CompressedModel
from lmcompress.pruning.structured.latency import LatencyTable
from lmcompress.recipes import parse_recipe, plan, run
from lmcompress.recipes.materials import Materials
from lmcompress.recipes.parts.pruning import plan_pruning
from lmcompress.trainers import CompressionTrainer

TRAINING = "{max_steps: 4, save_strategy: steps, save_steps: 2, per_device_train_batch_size: 4, learning_rate: 1e-3}"
PRUNING = f"""\
{head(layers=3)}  - name: dense
    training: {TRAINING}
  - name: one-shot
    start: dense
    vocabulary: {{min_count: 1, keep_characters: false}}
    pruning: {{target: {{sparsity: 0.4}}, repair: least_squares}}
    training: {{max_steps: 0}}
  - name: trained
    start: dense
    pruning:
      target: {{sparsity: 0.5}}
      schedule: {{kind: iterative, rounds: 2, end: 0.5}}
    distillation:
      teachers: [dense]
      matches: [{{loss: hidden_mse, student: nearest, teacher: 2}}]
    control: true
    training: {TRAINING}
  - name: after
    start: one-shot
    training: {TRAINING}
evaluation: {{repeats: 3, latency_batches: [1]}}
"""


CAUSAL = """\
name: lm
model: {family: gpt2, hidden_size: 16, layers: 2, num_heads: 2, positions: 16, tokenizer: {kind: bytelevel_bpe,
    vocab_size: 400}}
task: {name: DATA, max_length: 16}
stages:
  - {name: teacher, training: {max_steps: 2, per_device_train_batch_size: 2}}
  - name: pruned
    start: teacher
    vocabulary: {min_count: 50}
    pruning: {target: {sparsity: 0.4}, parts: [heads, neurons, layers]}
    distillation: {teachers: [teacher]}
    training: {max_steps: 2, per_device_train_batch_size: 2}
evaluation: {latency_batches: []}
"""


@pytest.fixture(scope="session")
def pruning(task_folder) -> str:
    return PRUNING.replace("DATA", str(task_folder))


@pytest.fixture(scope="session")
def pruned(pruning, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "tiny"
    return run(parse_recipe(pruning), folder, console=Console(quiet=True))


def only(text: str, *names: str) -> str:
    """The recipe with some of its stages."""
    head, *stages = text.split("  - name: ")
    tail = stages[-1].partition("evaluation:")
    stages[-1] = tail[0]
    kept = [stage for stage in stages if stage.split()[0] in names]
    return head + "".join(f"  - name: {stage}" for stage in kept) + "".join(tail[1:])


def test_a_plan_says_shape_parameters_vocabulary_and_verdict(pruning):
    dense, one_shot, trained, control, after = plan(parse_recipe(pruning)).stages
    assert [p.role for p in (dense, one_shot, trained, control, after)] == [
        "teacher",
        "pruned",
        "student",
        "control",
        "model",
    ]
    assert dense.shape == "3 blocks of width 16: 4 heads, FFN 64"
    assert one_shot.shape.startswith("about 3 blocks of width 16: ") and one_shot.steps == 0
    assert one_shot.plans["vocabulary"].rows_after < one_shot.plans["vocabulary"].rows_before
    assert (
        len(one_shot.materials.tokenizer) == len(after.materials.tokenizer) == one_shot.plans["vocabulary"].rows_after
    )
    assert len(trained.materials.tokenizer) > len(one_shot.materials.tokenizer)
    assert after.parameters == one_shot.parameters < dense.parameters
    assert control.plans["pruning"].config == trained.plans["pruning"].config and "distillation" not in control.plans
    assert trained.plans["pruning"].expected is not None and not trained.plans["pruning"].exact
    assert "every block needs all heads" in trained.vanilla_obstacle
    # a stage that prunes leaves its start as it was
    assert trained.parameters < dense.parameters == plan(parse_recipe(pruning)).stages[0].parameters


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.one-shot.pruning.target={sparsity: 0.999}", "stage 'one-shot': no shape meets the target sparsity"),
        ("stages.one-shot.pruning.target={parameters: 10}", "least that can be reached is"),
        ("stages.one-shot.pruning.target={shape: {heads: 9}}", "must have at most the 4 heads"),
        ("stages.one-shot.pruning.target={shape: {layers: 2}}", "scores of them are needed"),
        ("stages.trained.pruning.schedule={kind: iterative, rounds: 9}", "9 rounds need at least 8 optimizer steps"),
        ("stages.trained.save=vanilla", "save=vanilla is not possible: pruned attention has no stock config"),
        ("stages.one-shot.vocabulary.splits=[test]", "vocabulary.splits names 'test'"),
        ("stages.one-shot.vocabulary.keep=[xyzzy]", "keep must name tokens"),
        ("stages.one-shot.pruning.criterion=nonsense", "unknown criterion 'nonsense'"),
        ("stages.one-shot.pruning.schedule={kind: movement}", "movement needs training, got max_steps: 0"),
        ("stages.trained.training.max_steps=0", "nothing to distil"),
        ("stages.one-shot.augmentation={operations: [mask]}", "augmentation has no use"),
        ("stages.one-shot.pruning.latency={batch_size: 3}", "latency is for targets latency_share and latency_ms"),
        ("stages.one-shot.pruning.schedule={kind: itertive}", "no kind 'itertive'; did you mean 'iterative'"),
        ("stages.one-shot.pruning.schedule={rounds: 3}", "needs a kind"),
        ("stages.trained.pruning.schedule.round=3", "schedule.round: unknown key; did you mean 'rounds'"),
        ("stages.one-shot.pruning.prune=3", "pruning.prune: unknown key"),
    ],
)
def test_what_cannot_work_is_refused_before_training(pruning, override, message, monkeypatch):
    monkeypatch.setattr(CompressionTrainer, "train", lambda *_: pytest.fail("a plan must not train"))
    with pytest.raises(LmcompressError, match=message):
        plan(parse_recipe(pruning, [override]))


def test_a_mistake_in_a_stage_is_one_problem_and_not_two(pruning):
    with pytest.raises(LmcompressError, match="not valid") as error:
        parse_recipe(pruning, ["stages.one-shot.pruning.target={sparsity: 1.5}"])
    assert "at least 1 item" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "obstacle"),
    [
        (["parts=[neurons]"], "ranking: global the FFN widths will differ"),
        (["parts=[neurons]", "ranking=per_layer"], None),
        (["parts=[neurons]", "ranking=per_layer", "order=cost"], "FFN widths will differ"),
        (["parts=[layers]"], None),
        (["parts=[ffn]"], "FFN"),
        (["parts=[hidden]"], "hidden size"),
        (["parts=[neurons]", "target={shape: {ffn: 20}}"], None),
        (["parts=[neurons]", "target={shape: {ffn: [20, 20, 30]}}"], "one FFN width for all blocks"),
    ],
)
def test_the_stock_verdict_comes_before_training(pruning, overrides, obstacle):
    overrides = [f"stages.one-shot.pruning.{text}" for text in ("repair=none", "criterion=l1", *overrides)]
    entry = plan(parse_recipe(only(pruning, "dense", "one-shot"), overrides)).stages[1]
    assert entry.vanilla_obstacle is None if obstacle is None else obstacle in entry.vanilla_obstacle


def test_a_criterion_with_gradients_needs_labels(pruning):
    recipe = parse_recipe(only(pruning, "dense", "one-shot"))
    planned = plan(recipe)
    data = planned.materials.data
    bare = replace(data, train=data.train.remove_columns("label"))
    without = Materials(recipe, bare, planned.materials.tokenizer, bare)
    model = make("bert")
    spec = recipe.stages[1].pruning
    with pytest.raises(LmcompressError, match="fisher needs labels, and the training rows of .* have none"):
        plan_pruning(spec, model, without, 0, folder=Path(), measure=False)
    own = spec.model_copy(update={"labels": "self"})
    assert plan_pruning(own, model, without, 0, folder=Path(), measure=False).expected is not None


def test_the_pruning_seed_is_the_recipes_unless_it_has_its_own(pruning):
    text = only(pruning, "dense", "one-shot")
    assert plan(parse_recipe(text, ["seed=3"])).stages[1].plans["pruning"].config.seed == 3
    own = parse_recipe(text, ["seed=3", "stages.one-shot.pruning.seed=5"])
    assert plan(own).stages[1].plans["pruning"].config.seed == 5


def test_a_run_reports_heads_widths_coverage_and_the_error_of_the_cut(pruned):
    report = json.loads((pruned.folder / "results.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert set(rows) == {"dense", "one-shot", "trained", "trained-control", "after"}
    for name in ("one-shot", "trained", "trained-control"):
        found = rows[name]["pruning"]
        assert found["removed"] >= found["asked"] - 1e-9
        assert found["coverage"]["sparsity"] == pytest.approx(found["removed"])
        assert [len(kept) for kept in found["kept_heads"]] == [block["heads"] for block in rows[name]["blocks"]]
        # masked = cut = saved = reloaded
        assert found["masked_error"] <= 1e-5 and rows[name]["equivalence"]["relative_error"] <= 1e-5
    assert rows["dense"]["pruning"] is None and rows["dense"]["blocks"] == [{"heads": 4, "ffn": 64}] * 3
    assert rows["one-shot"]["vocabulary"]["texts_changed"] == 0
    assert rows["one-shot"]["pruning"]["repaired"] and rows["one-shot"]["training"]["steps"] == 0
    assert rows["after"]["parameters"] == rows["one-shot"]["parameters"]
    assert any(note.startswith("one-shot: ") and "requested" in note for note in report["notes"])
    text = (pruned.folder / "report.md").read_text()
    assert "## What was pruned" in text and "vocabulary of" in text
    page = (pruned.folder / "report.html").read_text().replace("\u00a0", " ")
    assert all(f'var(--pruned)">{name}</span>' in page for name in ("one-shot", "trained"))
    assert "Its vocabulary has" in page and "0 of" in page


def test_the_models_load_know_their_history_and_their_tokenizer(pruned):
    methods = {
        "one-shot": ("vocabulary pruning", "structured pruning"),
        "trained": ("structured pruning", "distillation"),
        "trained-control": ("structured pruning",),
        "after": ("vocabulary pruning", "structured pruning"),
    }
    for name, wanted in methods.items():
        model = AutoModelForSequenceClassification.from_pretrained(pruned.models[name])
        tokenizer = AutoTokenizer.from_pretrained(pruned.models[name])
        assert len(tokenizer) == model.config.vocab_size
        assert torch.isfinite(model(**tokenizer("a great film", return_tensors="pt")).logits).all()
        assert recorded_compression(model.config).provenance.methods == wanted
        assert CompressedModel(model).structure.blocks != CompressedModel(_dense(pruned)).structure.blocks


def test_the_card_of_a_pruned_model_has_its_heads(pruned):
    saved = json.loads((pruned.models["one-shot"] / "lmcompress.json").read_text())
    assert saved["pruning"]["target"] == {"sparsity": 0.4} and saved["vocabulary"]["rows_after"] < 80
    assert "heads per block" in (pruned.models["one-shot"] / "README.md").read_text()


def test_a_stage_of_nothing_is_the_start_itself(pruning, tmp_path):
    same = "  - {name: same, start: dense, training: {max_steps: 0}}\nevaluation:"
    recipe = parse_recipe(only(pruning, "dense").replace("evaluation:", same))
    result = run(recipe, tmp_path / "out", console=Console(quiet=True))
    first, second = (load_file(result.models[name] / "model.safetensors") for name in ("dense", "same"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class _Killed(BaseException):
    """What no handler catches."""


def test_a_pruning_that_was_killed_goes_on_to_the_same_model(pruned, pruning, tmp_path, monkeypatch, console):
    plain = CompressionTrainer._save_checkpoint
    saved = []

    def die_after_the_third(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        saved.append(self.state.global_step)
        if len(saved) == 3:
            raise _Killed

    recipe = parse_recipe(only(pruning, "dense", "trained"), ["stages.trained.control=false"])
    monkeypatch.setattr(CompressionTrainer, "_save_checkpoint", die_after_the_third)
    with pytest.raises(_Killed):
        run(recipe, tmp_path / "tiny", console=console)
    monkeypatch.setattr(CompressionTrainer, "_save_checkpoint", plain)
    result = run(recipe, tmp_path / "tiny", console=console)
    assert "resuming from checkpoint-2" in console.file.getvalue()
    folders = (result.models["trained"], pruned.models["trained"])
    resumed, straight = (load_file(folder / "model.safetensors") for folder in folders)
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


def test_a_latency_target_is_measured_when_the_run_begins_and_kept(pruning, tmp_path, monkeypatch):
    asked = []

    def measured(model, *, batch_size, length):
        asked.append((batch_size, length, next(model.parameters()).device.type))
        return TABLE.model_copy(update={"machine": _machine(), "batch_size": batch_size, "length": length})

    monkeypatch.setattr("lmcompress.recipes.parts.pruning.measure_latency", measured)
    recipe = parse_recipe(
        only(pruning, "dense", "one-shot"),
        [
            "stages.one-shot.pruning.target={latency_share: 0.6}",
            "stages.one-shot.pruning.latency={batch_size: 4}",
        ],
    )
    dry = plan(recipe, tmp_path)
    assert asked == [] and "is measured when the run begins" in dry.stages[1].plans["pruning"].note
    assert dry.stages[1].plans["pruning"].expected is not None
    planned = plan(recipe, tmp_path, measure=True)
    assert asked == [(4, 12, "cpu")] and planned.stages[1].plans["pruning"].note is None
    assert plan(recipe, tmp_path).stages[1].plans["pruning"].cost == planned.stages[1].plans["pruning"].cost
    found = run(recipe, tmp_path, console=Console(quiet=True)).report["rows"][1]["pruning"]
    assert len(asked) == 1 and found["unit"] == "ms" and found["removed"] >= 0.4
    too_fast = parse_recipe(
        only(pruning, "dense", "one-shot"),
        ["stages.one-shot.pruning.target={latency_ms: 0.1}", "stages.one-shot.pruning.latency={batch_size: 4}"],
    )
    with pytest.raises(LmcompressError, match="least that can be reached"):
        plan(too_fast, tmp_path)


def test_a_latency_without_a_table_and_a_number_of_ms_is_not_guessed(pruning, tmp_path):
    recipe = parse_recipe(only(pruning, "dense", "one-shot"), ["stages.one-shot.pruning.target={latency_ms: 0.1}"])
    assert plan(recipe, tmp_path).stages[1].plans["pruning"].expected is None


def test_a_teacher_with_the_whole_vocabulary_teaches_a_student_with_a_part_of_it(pruning, tmp_path):
    recipe = parse_recipe(
        only(pruning, "dense", "trained"),
        ["stages.trained.vocabulary={keep_characters: false}", "stages.trained.control=false"],
    )
    row = run(recipe, tmp_path / "out", console=Console(quiet=True)).report["rows"][1]
    assert row["vocabulary"]["texts_changed"] == 0 and row["vocabulary"]["rows_after"] < 80
    # its texts are cut into the same pieces, so hidden states can be compared; single answers of tokens could not
    with pytest.raises(LmcompressError, match="prune the vocabulary of the teacher's stage"):
        plan(parse_recipe(CAUSAL.replace("DATA", str(_texts(tmp_path)))))


def test_a_language_model_is_pruned_with_its_vocabulary_and_measured_by_perplexity(tmp_path):
    text = CAUSAL.replace("DATA", str(_texts(tmp_path))).replace("    distillation: {teachers: [teacher]}\n", "")
    report = run(parse_recipe(text), tmp_path / "out", console=Console(quiet=True)).report
    teacher, pruned = report["rows"]
    assert pruned["metrics"]["validation"]["token_perplexity"] > 1
    assert pruned["parameters"] < teacher["parameters"] and pruned["vocabulary"]["rows_after"] < 400


def _texts(folder):
    text = " ".join(f"word{i % 7} and thing{i % 3} or {i % 97} ." for i in range(600))
    (folder / "texts").mkdir(exist_ok=True)
    (folder / "texts" / "train.txt").write_text(text)
    (folder / "texts" / "validation.txt").write_text(text[:2000])
    return folder / "texts"


def _dense(result):
    return AutoModelForSequenceClassification.from_pretrained(result.models["dense"])


def _machine() -> str:
    facts = machine()
    return f"{facts['processor']}, {facts['threads']} threads"


TABLE = LatencyTable(
    machine="m",
    dtype="float32",
    batch_size=1,
    length=8,
    model_type="bert",
    hidden=16,
    head_size=4,
    heads=((0, 0.0), (1, 1.0), (2, 2.0), (3, 2.5), (4, 3.0)),
    ffn=((0, 0.0), (32, 1.0), (64, 3.0)),
    block_ms=0.5,
    base_ms=1.0,
)
