"""Stages that make a model compact: planned, run, resumed, reloaded, started from, and refused."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from tiny_recipe import head
from transformers import AutoModelForSequenceClassification

from lmcompress.checkpoint.encoding import weight_count
from lmcompress.checkpoint.layers import layers_of
from lmcompress.checkpoint.saving import outputs_of, random_batches
from lmcompress.errors import LmcompressError
from lmcompress.recipes import load_recipe, parse_recipe, plan, run
from lmcompress.recipes.building import skeleton
from lmcompress.reporting import print_plan
from lmcompress.students import model_flops
from lmcompress.trainers import CompressionTrainer

TRAINING = "{max_steps: 3, save_strategy: steps, save_steps: 1, per_device_train_batch_size: 8, learning_rate: 1e-3}"
RECIPE = f"""\
{head(layers=4)}  - name: dense
    training: {TRAINING}
  - name: factors
    start: dense
    compact:
      - {{kind: factorize, rank: 4, parts: ["ffn_*"], activations: true, calibration_rows: 20}}
      - {{kind: factorize_embeddings, rank: 6}}
    training: {{max_steps: 0}}
  - name: spread
    start: dense
    compact: [{{kind: factorize, parameters: 0.5, parts: [query], blocks: [0, 1]}}]
    training: {{max_steps: 0}}
  - name: groups
    start: dense
    student: {{layers: 2}}
    compact:
      - {{kind: group, groups: 2, parts: [ffn_in], shuffle: fitted}}
      - {{kind: separate, blocks: [1], kernel: 3}}
      - {{kind: fold_shuffles}}
    distillation: {{teachers: [dense]}}
    control: true
    training: {TRAINING}
  - name: shared
    start: factors
    compact: [{{kind: share_layers, every: 2, values: mean}}]
    distillation: {{teachers: [dense], layer_map: uniform, losses: [hidden_mse]}}
    training: {TRAINING}
  - name: sparse
    start: shared
    sparsity: {{sparsity: 0.5}}
    training: {{max_steps: 0}}
evaluation: {{repeats: 3, latency_batches: []}}
"""
FACTORS = """- {kind: factorize, rank: 4, parts: ["ffn_*"], activations: true, calibration_rows: 20}"""
SHARED = "compact: [{kind: share_layers, every: 2, values: mean}]"


@pytest.fixture(scope="session")
def compacting(task_folder) -> str:
    return RECIPE.replace("DATA", str(task_folder))


@pytest.fixture(scope="session")
def compacted(compacting, tmp_path_factory):
    return run(parse_recipe(compacting), tmp_path_factory.mktemp("run") / "tiny", console=Console(quiet=True))


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def answers(model) -> torch.Tensor:
    return torch.cat(outputs_of(model, random_batches(model)))


def test_a_plan_shows_parameters_and_operations_and_trains_nothing(compacting, monkeypatch):
    monkeypatch.setattr(CompressionTrainer, "train", lambda *_: pytest.fail("a plan must not train"))
    planned = plan(parse_recipe(compacting))
    dense, factors, spread, groups, control, shared, sparse = planned.stages
    roles = [entry.role for entry in planned.stages]
    assert roles == ["teacher", "compact", "compact", "student", "control", "student", "pruned"]
    assert "compact" not in sparse.plans and sparse.parameters == shared.parameters
    assert (
        "compact" not in dense.plans
        and len(factors.plans["compact"].reports) == 2
        and len(groups.plans["compact"].reports) == 3
    )
    for entry in (factors, spread, groups, control, shared):
        first, last = entry.plans["compact"].reports[0], entry.plans["compact"].reports[-1]
        assert entry.parameters == last.parameters[1] < first.parameters[0]
        assert entry.vanilla_obstacle and entry.plans["compact"].reports[0].errors == {}
    assert factors.plans["compact"].unknown is None and "singular values" in spread.plans["compact"].unknown
    console = Console(file=io.StringIO(), width=400)
    print_plan(planned, console)
    text = console.file.getvalue()
    assert "factors: rank 4: encoder.layer.0.intermediate.dense" in text and "FLOPs of 128 tokens: " in text
    assert "spread: ranks follow from the singular values" in text


def test_what_was_planned_is_what_is_saved(compacted, compacting):
    for entry in plan(parse_recipe(compacting)).stages:
        model = load(compacted.models[entry.stage.name])
        if "compact" not in entry.plans:
            continue
        flops = entry.plans["compact"].reports[-1].flops[1]
        if entry.stage.name == "spread":
            assert (weight_count(model), model_flops(model)) == (
                pytest.approx(entry.parameters, rel=0.02),
                pytest.approx(flops, rel=0.02),
            )
        else:
            assert (weight_count(model), model_flops(model)) == (entry.parameters, flops)


def test_layers_are_what_was_asked_for_and_reload_equal(compacted):
    kinds = {name: [entry.kind for entry in layers_of(load(path))] for name, path in compacted.models.items()}
    assert kinds == {
        "dense": [],
        "factors": ["factorized_embedding", "low_rank"],
        "spread": ["low_rank", "low_rank"],
        "groups": ["separable", "grouped"],
        "groups-control": ["separable", "grouped"],
        "shared": ["factorized_embedding", "low_rank", "shared"],
        # single weights are made zero in the factors
        "sparse": ["factorized_embedding", "low_rank", "shared"],
    }
    rows = {row["name"]: row for row in compacted.report["rows"]}
    for name, path in compacted.models.items():
        assert rows[name]["equivalence"]["max_error"] == 0
        assert torch.equal(answers(load(path)), answers(load(path)))
    factors = load(compacted.models["factors"])
    assert {tuple(m.reduce.weight.shape) for m in factors.modules() if hasattr(m, "reduce")} == {(4, 16), (4, 64)}
    grouped = next(entry for entry in layers_of(load(compacted.models["groups"])) if entry.kind == "grouped")
    # the order in which ffn_in gives its neurons is in ffn_out
    assert not grouped.output_order


def test_an_output_fitted_on_data_misses_less_and_a_trained_model_has_moved(compacted):
    marker = json.loads((compacted.models["factors"] / "stage.json").read_text())
    assert all(0 < error < 1 for error in marker["compact"][0]["errors"].values())
    marker = json.loads((compacted.models["groups"] / "stage.json").read_text())
    assert "encoder.layer.0.intermediate.dense.output_order" in marker["compact"][2]["changed"]
    factors, shared = (load(compacted.models[name]).state_dict() for name in ("factors", "shared"))
    assert not torch.equal(factors["classifier.weight"], shared["classifier.weight"])


def test_what_was_done_is_in_report_notes_and_card(compacted):
    text = " ".join(compacted.report["notes"])
    assert "factors: 9 modules replaced before training" in text and "groups: " in text
    config = json.loads((compacted.models["shared"] / "config.json").read_text())
    assert config["quantization_config"]["provenance"]["methods"] == ["compact layers", "distillation"]
    assert "compact layers, smaller student" not in (compacted.models["groups"] / "README.md").read_text()
    assert "smaller student, compact layers" in (compacted.models["groups"] / "README.md").read_text()


def test_an_interrupted_run_goes_on(compacting, compacted, tmp_path, monkeypatch):
    start, _, others = compacting.partition("  - name: factors")
    groups = others[others.index("  - name: groups") : others.index("  - name: shared")]
    recipe = parse_recipe(start + groups + compacting[compacting.index("evaluation") :])
    original = CompressionTrainer.training_step

    def step(self, *args, **kwargs):
        if layers_of(self.student) and self.state.global_step == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(CompressionTrainer, "training_step", step)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", console=Console(quiet=True))
    monkeypatch.setattr(CompressionTrainer, "training_step", original)
    again = run(recipe, tmp_path / "run", console=Console(quiet=True))
    assert json.loads((again.models["groups"] / "stage.json").read_text())["training"]["resumed"]
    assert torch.equal(answers(load(again.models["groups"])), answers(load(compacted.models["groups"])))


def test_a_compact_checkpoint_is_a_teacher_and_a_start_without_weights(compacted, compacting, tmp_path):
    for name in ("groups", "shared", "factors"):
        model = load(compacted.models[name])
        bare = skeleton(model.config, AutoModelForSequenceClassification)
        assert layers_of(bare) == layers_of(model) and weight_count(bare) == weight_count(model)
        overrides = [f"stages.dense.distillation={{teachers: [{compacted.models[name]}]}}"]
        assert plan(parse_recipe(compacting, overrides)).outside_teachers


@pytest.mark.parametrize(
    "old, new, message",
    [
        # what the schema says
        (FACTORS, "- {kind: factorize, rank: 4, energy: 0.9}", "compact.0.*exactly one of rank, energy and parameters"),
        (FACTORS, "- {kind: factorize}", "exactly one of rank, energy and parameters must be given, got none"),
        (FACTORS, "- {kind: factorize, parameters: 1.5}", "parameters must be a share between 0 and 1, got 1.5"),
        (FACTORS, "- {kind: factorise, rank: 4}", "no kind 'factorise'; did you mean 'factorize'"),
        (FACTORS, "- {rank: 4}", "needs a kind"),
        (FACTORS, "- {kind: factorize, rnk: 4}", "unknown key; did you mean 'rank'"),
        ("kind: group, groups: 2,", "kind: group, groups: 1,", "greater than or equal to 2"),
        ("    student: {layers: 2}", "    pruning: {target: {sparsity: 0.5}}", "compact and pruning.*an earlier stage"),
        ("    student: {layers: 2}", "    quantization: {}", "compact and quantization.*cannot be quantized"),
        ("    student: {layers: 2}", "    sparsity: {sparsity: 0.5}", "compact and sparsity.*in a stage after it"),
        ("    student: {layers: 2}", "    sharing: {}", "compact and sharing.*in a stage after it"),
        ("    student: {layers: 2}", "    save: self_loading", "save: self_loading is not possible with compact"),
        # what shapes say
        (FACTORS, "- {kind: factorize, rank: 40}", r"'factors': compact.0 \(factorize\): the rank must be at most 16"),
        (FACTORS, "- {kind: factorize, rank: 16}", "factors must be smaller than their matrices"),
        (FACTORS, "- {kind: factorize, parameters: 0.01}", "must leave at least rank 1 everywhere"),
        (FACTORS, "- {kind: factorize, rank: 4, parts: [fnn_*]}", r"no part 'fnn_\*'. Valid are: attention_out"),
        (FACTORS, "- {kind: factorize, rank: 4, blocks: [4]}", "blocks must be numbers from 0 to 3"),
        ("embeddings, rank: 6", "embeddings, rank: 70", "rank of a 59×16 table must be 1 to 16, got 70"),
        ("kind: group, groups: 2,", "kind: group, groups: 3,", "groups must divide the widths 16 and 64, got 3"),
        ("separate, blocks: [1]", "separate, blocks: [2]", "blocks must be numbers from 0 to 1"),
        ("kernel: 3", "kernel: 4", "kernel.*odd"),
        ("shuffle: fitted", "shuffle: none", "there must be an order of channels that can be folded"),
        ("every: 2", "every: 5", "every must be 2 to 4"),
        ("start: factors", "start: spread", "same ranks.*give factorize a rank"),
        ("factors\n    compact: [", "factors\n    compact: [{kind: factorize, energy: 0.5, parts: [key]}, ",
         "same ranks.*give factorize a rank"),
        (SHARED, "compact: [{kind: group, groups: 2}]", "is a LowRankLinear already"),
        (SHARED, "pruning: {target: {sparsity: 0.5}}", "cannot cut a model that has compact layers"),
        (SHARED, "quantization: {}", "cannot quantize a model that has compact layers"),
        (SHARED, "student: {width: 0.5}", "cannot slice a model that has compact layers"),
        (SHARED, "save: self_loading", "save=self_loading"),
        (SHARED, "save: vanilla", "save=vanilla"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_runs(compacting, old, new, message):
    assert old in compacting
    with pytest.raises(LmcompressError, match=message):
        plan(parse_recipe(compacting.replace(old, new)))


def test_a_student_of_half_the_width_is_cut(compacting):
    recipe = parse_recipe(compacting, ["stages.groups.student={width: 0.5}", "stages.groups.compact=null"])
    half = next(entry for entry in plan(recipe).stages if entry.stage.name == "groups")
    assert half.shape == "4 blocks of width 8: 2 heads, FFN 32"


def test_the_quickstart_of_compact_layers_has_all_its_ways(tmp_path):
    planned = plan(load_recipe("quickstart-compact", ["task.limit=400"]), tmp_path)
    assert [e.role for e in planned.stages] == ["teacher", "compact", "compact", "student", "student", "student"]
    assert all(entry.parameters < 0.8 * planned.stages[0].parameters for entry in planned.stages[1:])
