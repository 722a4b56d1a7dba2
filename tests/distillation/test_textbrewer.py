"""TextBrewer's own configuration files."""

from __future__ import annotations

import json

import pytest
import torch
from families import inputs, make

from lmcompress import LmcompressError
from lmcompress.distillation import Distillation, DistillationConfig, Match, TemperatureSchedule, read_textbrewer

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
    from contextlib import nullcontext

    from lmcompress.method import Step

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
        ({"temperature_scheduler": ["cwsm"]}, r'\["cwsm", beta\], got'),
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
        (match(proj=["linear", 8, 16, {"weight_decay": 1}]), "other options of the optimizer"),
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
