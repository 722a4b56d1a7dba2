"""TextBrewer's own configuration files."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from families import inputs, make
from training import tiny_arguments

from lmcompress import LmcompressError
from lmcompress.distillation import Distillation, DistillationConfig, Match, TemperatureSchedule, read_textbrewer
from lmcompress.distillation.textbrewer import caches_logits
from lmcompress.method import Step
from lmcompress.trainers import CompressionTrainer

# as TextBrewer's examples write them: T3 from a 12-layer teacher, and T4-tiny with projections
T3 = {
    "temperature": 8,
    "temperature_scheduler": "none",
    "hard_label_weight": 0.5,
    "hard_label_weight_scheduler": "linear_growth",
    "kd_loss_type": "ce",
    "kd_loss_weight": 1,
    "kd_loss_weight_scheduler": "linear_decay",
    "probability_shift": False,
    "is_caching_logits": False,
    "intermediate_matches": [
        {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1},
        {"layer_T": [4, 4], "layer_S": [1, 1], "feature": "hidden", "loss": "mmd", "weight": 1},
        {"layer_T": 3, "layer_S": 0, "feature": "attention", "loss": "attention_mse_sum", "weight": 2.5},
        {"layer_T": -1, "layer_S": -1, "feature": "attention", "loss": "attention_ce"},
    ],
}
TINY = {
    "temperature_scheduler": ["flsw", 1, 2],
    "kd_loss_type": "mse",
    "intermediate_matches": [
        {
            "layer_T": 3, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1,
            "proj": ["linear", 8, 16, {"lr": 0.01}],
        },
        {"layer_T": [0, 3], "layer_S": [0, 1], "feature": "hidden", "loss": "fsp", "proj": ["tanh", 8, 16]},
    ],
}  # fmt: skip


def test_a_file_means_what_it_says(tmp_path):
    (tmp_path / "t3.json").write_text(json.dumps(T3))
    assert read_textbrewer(tmp_path / "t3.json") == DistillationConfig(
        loss="ce",
        temperature=8.0,
        scale_by_temperature=False,
        weight=1.0,
        weight_schedule="linear_decay",
        label_weight=0.5,
        label_weight_schedule="linear_growth",
        matches=[
            Match(loss="hidden_mse", student=0, teacher=0, projection="none"),
            Match(loss="mmd", student=(1, 1), teacher=(4, 4), projection="none"),
            # attention 0 is TextBrewer's first block, which is block 1 here; from the end both count alike
            Match(loss="attention_mse_mean", student=1, teacher=4, weight=2.5, on="scores", projection="none"),
            Match(loss="attention_ce", student=-1, teacher=-1, on="scores", projection="none"),
        ],
    )


def test_projections_and_temperature_schedulers_are_read():
    config = read_textbrewer(TINY)
    assert config.loss == "mse" and config.label_weight == 0.0
    assert config.temperature_schedule == TemperatureSchedule(kind="flsw", beta=1, gamma=2)
    first, second = config.matches
    assert (first.projection, first.projection_learning_rate) == ("linear", 0.01)
    assert (second.loss, second.student, second.projection) == ("fsp", (0, 1), "tanh")
    assert read_textbrewer({"temperature_scheduler": ["cwsm", 3]}).temperature_schedule.kind == "cwsm"


def test_defaults_are_those_of_textbrewer():
    assert read_textbrewer({}) == DistillationConfig(
        loss="ce", temperature=4.0, scale_by_temperature=False, weight=1.0, label_weight=0.0
    )


def test_a_distillation_made_from_it_runs():
    student, teacher = make("bert", hidden_size=8, num_hidden_layers=2), make("bert", seed=1)
    method = Distillation.from_textbrewer(TINY, teacher)
    method.attach(student, torch.device("cpu"), nullcontext)
    batch = inputs(student)
    step = Step(student, batch, batch, 0.0, outputs=student(**batch))
    made = method.loss_terms(step)
    assert set(made) == {"kd", "hidden_mse_0", "fsp_1"}
    with torch.no_grad():
        difference = (student(**batch).logits - teacher(**batch).logits) / 4.0
    assert len(method.parameter_groups()) == 2
    # flsw changes the temperature of each row a little, and with it mean (z_S / t - z_T / t)^2
    assert float(made["kd"].total.detach()) == pytest.approx(float(difference.square().mean(-1).sum()), rel=0.5)


RECIPES = {
    f"L{len(pairs)}_{loss}": [
        {"layer_T": theirs, "layer_S": mine, "feature": "attention", "loss": loss, "weight": 1}
        for theirs, mine in pairs
    ]
    for pairs in (((4, 1), (8, 2), (12, 3)), ((3, 1), (6, 2), (9, 3), (12, 4)))
    for loss in ("attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean")
}
"""All of TextBrewer's own attention recipes (examples/matches/matches.py), for a teacher of 12 layers."""


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_textbrewers_own_attention_recipes_count_from_the_embeddings(recipe):
    config = {"intermediate_matches": recipe}
    asked = [(match["layer_S"], match["layer_T"]) for match in recipe]
    for read in (read_textbrewer(config), read_textbrewer(config, teacher_layers=12)):
        assert [(match.student, match.teacher) for match in read.matches] == asked
    # and they run
    student, teacher = make("bert", num_hidden_layers=len(recipe)), make("bert", seed=1, num_hidden_layers=12)
    method = Distillation.from_textbrewer(config, teacher)
    method.attach(student, torch.device("cpu"), nullcontext)
    batch = inputs(student)
    made = method.loss_terms(Step(student, batch, batch, 0.0, outputs=student(**batch)))
    assert len(made) == 1 + len(recipe) and all(term.total.isfinite() for term in made.values())


@pytest.mark.parametrize(
    ("pairs", "layers", "asked", "first"),
    [
        ([(11, 2)], 12, "auto", 0),
        ([(12, 3)], 12, "auto", 1),
        ([(3, 0), (7, 1), (11, 2)], 12, "auto", 0),
        ([(3, 0), (7, 1), (11, 2)], None, "auto", 0),
        ([(5, 1), (11, 3)], None, "auto", 0),
        ([(4, 2)], None, "auto", 0),
        ([(4, 2)], None, "embeddings", 1),
        ([(4, 1), (8, 2), (12, 3)], 12, "block", 0),
        ([(-1, -1)], 12, "auto", 0),
    ],
)
def test_attention_layers_are_counted_as_the_teacher_or_the_pairs_show(pairs, layers, asked, first):
    loss = {"feature": "attention", "loss": "attention_ce"}
    config = {"intermediate_matches": [{"layer_T": t, "layer_S": s, **loss} for t, s in pairs]}
    read = read_textbrewer(config, attention_from=asked, teacher_layers=layers)
    expected = [(s + 1 - first if s >= 0 else s, t + 1 - first if t >= 0 else t) for t, s in pairs]
    assert [(match.student, match.teacher) for match in read.matches] == expected


@pytest.mark.parametrize(
    ("given", "schedule"),
    [
        (("flsw", 1, 2), {"kind": "flsw", "beta": 1, "gamma": 2}),
        (["flsw", 1, 2, "ignored"], {"kind": "flsw", "beta": 1, "gamma": 2}),
        (["flsw", {"gamma": 2, "beta": 1}], {"kind": "flsw", "beta": 1, "gamma": 2}),
        ({"flsw": {"gamma": 2, "beta": 1}}, {"kind": "flsw", "beta": 1, "gamma": 2}),
        ({"flsw": [1, 2]}, {"kind": "flsw", "beta": 1, "gamma": 2}),
        ({"name": "cwsm", "beta": 3}, {"kind": "cwsm", "beta": 3}),
        (("cwsm", 3), {"kind": "cwsm", "beta": 3}),
        ("constant", {"kind": "constant"}),
        (["none"], {"kind": "constant"}),
    ],
    ids=str,
)
def test_arguments_of_temperature_schedulers_come_in_any_form(given, schedule):
    read = read_textbrewer({"temperature_scheduler": given})
    assert read.temperature_schedule == TemperatureSchedule(**schedule)


def test_options_of_a_projection_reach_its_optimizer_group(tmp_path):
    proj = ["linear", 8, 16, {"lr": 0.01, "weight_decay": 0.3, "betas": [0.5, 0.6]}]
    config = {"intermediate_matches": [{"layer_T": [1, 3], "layer_S": [0, 2], "feature": "hidden", "loss": "nst"}]}
    config["intermediate_matches"][0]["proj"] = proj
    trainer = CompressionTrainer(
        make("bert", hidden_size=8),
        args=tiny_arguments(tmp_path, max_steps=2),
        methods=[Distillation.from_textbrewer(config, make("bert", seed=1))],
        train_dataset=[{name: v[0] for name, v in inputs(make("bert"), rows=1).items()}] * 8,
    )
    projection = trainer.methods[0].modules()["nst_0"]
    before = projection.weight.detach().clone()
    trainer.train()
    group = trainer.optimizer.param_groups[-1]
    assert (group["initial_lr"], group["weight_decay"], list(group["betas"])) == (0.01, 0.3, [0.5, 0.6])
    assert group["params"][0] is projection.weight and not torch.equal(before, projection.weight)


def test_cached_logits_are_a_store(tmp_path):
    student, teacher = make("bert"), make("bert", seed=1)
    rows = [
        {name: value[0] for name, value in inputs(student, rows=1, seed=seed).items()} | {"idx": seed}
        for seed in range(8)
    ]
    runs = []
    for caching in (False, True):
        calls = []
        handle = teacher.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        method = Distillation.from_textbrewer({"is_caching_logits": caching}, teacher)
        trainer = CompressionTrainer(
            copy.deepcopy(student),
            args=tiny_arguments(tmp_path / str(caching), num_train_epochs=3, per_device_train_batch_size=4),
            methods=[method],
            train_dataset=Dataset.from_list(rows),
        )
        trainer.train()
        trainer.finish()
        handle.remove()
        runs.append(([entry["loss_kd"] for entry in trainer.state.log_history if "loss_kd" in entry], len(calls)))
    (live, ran), (stored, once) = runs
    assert ran == 6 and once == 2 and stored == pytest.approx(live, rel=1e-5)
    assert (tmp_path / "True" / "teacher_store" / "0" / "meta.json").is_file()
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_features_are_not_cached_as_in_textbrewer(tmp_path):
    assert caches_logits({"is_caching_logits": True}) and not caches_logits({**T3, "is_caching_logits": True})


def match(**changes):
    given = {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1} | changes
    return {"intermediate_matches": [{key: value for key, value in given.items() if value != "gone"}]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temprature": 3}, "has no 'temprature'.*temperature"),
        ({"kd_loss_type": "kl"}, "must be ce or mse, got 'kl'"),
        ({"temperature": -1}, "not valid"),
        ({"kd_loss_weight": "much"}, "not valid"),
        ({"kd_loss_weight_scheduler": "linear_deca"}, "no weight scheduler 'linear_deca'.*linear_decay"),
        ({"hard_label_weight_scheduler": ["linear_decay"]}, "no weight scheduler"),
        ({"temperature_scheduler": "flsw"}, r'\["flsw", beta, gamma\].*got \'flsw\''),
        ({"temperature_scheduler": ["cwsm"]}, r'\["cwsm", beta\], the arguments.*got'),
        ({"kd_loss_weight": 0}, "nothing to train on"),
        ({"intermediate_matches": [7]}, "a TextBrewer match is an object"),
        (match(layr_T=1), "a TextBrewer match has no 'layr_T'.*layer_T"),
        (match(layer_S="gone", feature="gone"), "needs layer_S and feature"),
        (match(loss="hidden_mae"), "no match loss 'hidden_mae'.*hidden_mse"),
        (match(feature="attention"), "'hidden_mse' compares the feature 'hidden', got 'attention'"),
        (match(loss="attention_mse"), "'attention_mse' compares the feature 'attention', got 'hidden'"),
        (match(layer_T="last"), "layer_T and layer_S are a number or a list of numbers, got 'last'"),
        (match(layer_S=[]), "layer_T and layer_S are a number"),
        (match(proj="linear"), "proj is .kind, student width, teacher width."),
        (match(proj=["linear", 8, 16, {"warmup": 1}]), "options of the optimizer, of which there are lr, weight_decay"),
        ({"temperature_scheduler": ("flsw", {"beta": 1})}, "or as .*got"),
        ({"temperature_scheduler": {"name": "cwsm", "gamma": 1}}, "or as .*got"),
        (match(proj=["sigmoid", 8, 16]), "not valid"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_read_is_refused(values, message):
    with pytest.raises(LmcompressError, match=message):
        read_textbrewer(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{", "cannot read"),
        (b"\xff\xfe\x00", "cannot read"),
        ("[1]", "expected an object, got list"),
    ],
    ids=str,
)
def test_a_file_that_is_none_is_refused(tmp_path, text, message):
    file = tmp_path / "config.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LmcompressError, match=message):
        read_textbrewer(file)


def test_a_method_that_is_made_anew_still_caches(tmp_path):
    method = Distillation.from_textbrewer({"is_caching_logits": True}, make("bert"), store=tmp_path / "logits")
    again = method.fresh()
    student = make("bert", seed=1)
    rows = [{name: value[0] for name, value in inputs(student, rows=1, seed=seed).items()} for seed in range(4)]
    trainer = CompressionTrainer(
        student, args=tiny_arguments(tmp_path, max_steps=1), methods=[again], train_dataset=Dataset.from_list(rows)
    )
    assert again.teachers[0].model is None and (tmp_path / "logits" / "0" / "meta.json").is_file()
    trainer.train()
    with pytest.raises(
        LmcompressError, match="is_caching_logits needs a training set with a length, got IterableDataset"
    ):
        CompressionTrainer(
            student,
            args=tiny_arguments(tmp_path, max_steps=1),
            methods=[method],
            train_dataset=Dataset.from_list(rows).to_iterable_dataset(),
        )
