"""Criteria and ramps of a user's own: as objects, and by module:attribute."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from families import LAYERS, inputs, make
from nets import batches, mlp, rows
from pydantic import ValidationError

from lmcompress.errors import LmcompressError
from lmcompress.pruning import Criterion, PruningConfig, Target, census, prune, score, sensitivity
from lmcompress.pruning.unstructured import Criterion as WeightCriterion
from lmcompress.pruning.unstructured import Gradual, Sparsity, SparsityConfig, prune_weights
from lmcompress.schedules import ramp_of

MODULE = """
import torch
from lmcompress.pruning import Criterion
from lmcompress.pruning.unstructured import Criterion as WeightCriterion

spread = Criterion("spread", "weights", ("heads", "neurons"), lambda group: group.float().std(dim=1))
slope = Criterion("slope", "gates", ("heads", "neurons"), lambda gradient: gradient.float().abs().sqrt())
loud = Criterion("loud", "activations", ("neurons",), lambda activations: activations.float().abs().mean(dim=0))
wrong = Criterion("wrong", "weights", ("heads", "neurons"), lambda group: group.sum())
cube = WeightCriterion("cube", "weights", lambda weight: weight.float().abs() ** 3)
wide = WeightCriterion("wide", "inputs", lambda weight, norm: weight.abs().float() * norm**2, "row")
steep = WeightCriterion("steep", "examples", lambda weight, gradient: gradient.float().abs(), "global")

def late(progress):
    return progress**4

def above(progress):
    return 2.0
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of a user's, in the folder that the command is run from."""
    (tmp_path / "my_criteria.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_criteria", None)


def test_units_are_scored_by_a_function_of_what_it_needs(own):
    model = make("bert")
    data = [{**inputs(model), "labels": torch.tensor([0, 1, 2])}]
    spread = score(model, "my_criteria:spread", ["heads", "neurons"])
    block = model.base_model.encoder.layer[0]
    expected = torch.cat([block.intermediate.dense.weight, block.intermediate.dense.bias[:, None]], dim=1)
    expected = torch.cat([expected, block.output.dense.weight.t()], dim=1).std(dim=1)
    torch.testing.assert_close(spread.neurons[0], expected.detach())
    # the mean of the roots over examples is the score
    slope, gates = (score(model, name, ["heads"], data) for name in ("my_criteria:slope", "taylor_gates"))
    assert (slope.heads[0] ** 2 <= gates.heads[0] + 1e-6).all() and slope.heads[0].any()
    torch.testing.assert_close(
        score(model, "my_criteria:loud", ["neurons"], data).neurons[1],
        score(model, "mean_activation", ["neurons"], data).neurons[1],
    )
    rows = sensitivity(model, spread, lambda model: 1.0, shares=(0.5,))
    assert len(rows) == 1 + 2 * LAYERS


def test_a_criterion_goes_through_pruning_and_its_report_by_name(own):
    model = make("bert")
    config = PruningConfig(target=Target(sparsity=0.3), criterion="my_criteria:spread")
    assert not config.needs_data and config.criterion_name == "my_criteria:spread"
    before = census(model)["block_parameters"]
    report = prune(model, config)
    assert census(model)["block_parameters"] <= 0.7 * before
    assert report.method["criterion"] == "my_criteria:spread"
    again = PruningConfig.model_validate(json.loads(config.model_dump_json()))
    assert again == config and again.chosen_criterion.name == "spread"


def test_an_object_is_taken_where_a_name_is_and_saved_by_its_name(own):
    import my_criteria

    config = PruningConfig(target=Target(sparsity=0.3), criterion=my_criteria.slope, scores="training",
                           schedule={"kind": "gradual", "ramp": my_criteria.late})  # fmt: skip
    dumped = config.model_dump(mode="json")
    assert dumped["criterion"] == "my_criteria:slope" and dumped["schedule"]["ramp"] == "my_criteria:late"
    assert PruningConfig.model_validate(dumped).chosen_criterion is my_criteria.slope
    assert config.criterion_name == "slope" and not config.needs_data


def test_a_criterion_without_a_name_is_refused_before_anything_is_done():
    local = Criterion("local", "weights", ("heads", "neurons"), lambda group: group.std(dim=1))
    with pytest.raises(LmcompressError, match="has no name to save"):
        prune(make("bert"), PruningConfig(target=Target(sparsity=0.3), criterion=local))
    assert score(make("bert"), local, ["heads"]).heads is not None
    unnamed = WeightCriterion("local", "weights", lambda weight: weight.abs())
    with pytest.raises(LmcompressError, match="has no name to save"):
        Sparsity(SparsityConfig(sparsity=0.5, criterion=unnamed)).attach(mlp())


def test_weights_are_scored_by_a_function_of_what_it_needs(own):
    data = batches(rows())
    by_cube, by_size = mlp(), mlp()
    report = prune_weights(by_cube, SparsityConfig(sparsity=0.5, criterion="my_criteria:cube"))
    prune_weights(by_size, SparsityConfig(sparsity=0.5))
    for one, other in zip(by_cube.parameters(), by_size.parameters(), strict=True):
        assert torch.equal(one, other)
    assert report.config["criterion"] == "my_criteria:cube"
    for name in ("wide", "steep"):
        net = mlp()
        config = SparsityConfig(sparsity=0.5, criterion=f"my_criteria:{name}")
        assert config.needs_data
        with pytest.raises(LmcompressError, match=f"the criterion my_criteria:{name} must have data, got none"):
            prune_weights(net, config)
        # shares are rounded in each row
        assert prune_weights(net, config, data).sparsity == pytest.approx(0.5, abs=0.02)


def test_what_is_no_criterion_of_this_kind_is_refused(own):
    for name, message in (
        ("my_criteria:spraed", "my_criteria has no 'spraed'; did you mean 'spread'"),
        ("my_criterio:spread", "cannot import 'my_criterio'"),
        ("my_criteria:cube", "must be a lmcompress.pruning.Criterion, got Criterion"),
        ("my_criteria:loud", "the criterion my_criteria:loud does not score heads"),
    ):
        with pytest.raises(ValidationError, match=message):
            PruningConfig(target=Target(sparsity=0.3), criterion=name)
    with pytest.raises(ValidationError, match="must be a lmcompress.pruning.unstructured.Criterion"):
        SparsityConfig(sparsity=0.5, criterion="my_criteria:spread")
    with pytest.raises(LmcompressError, match="scores by wrong of heads must have the model's shapes"):
        score(make("bert"), "my_criteria:wrong", ["heads"])
    with pytest.raises(LmcompressError, match="needs 'weight', which is not known; did you mean 'weights'"):
        Criterion("a", "weight", ("heads",), torch.sum)
    with pytest.raises(LmcompressError, match="must name parts, got .'head',.; did you mean 'heads'"):
        Criterion("a", "weights", ("head",), torch.sum)
    with pytest.raises(LmcompressError, match="'rows', which is unknown; did you mean 'row'"):
        WeightCriterion("a", "weights", torch.abs, "rows")


def test_a_ramp_of_ones_own_says_how_fast_weights_are_pruned(own):
    late = Gradual(ramp="my_criteria:late", every=10).events(100)
    assert [event.share for event in late] == [(step / 50) ** 4 for step in (10, 20, 30, 40, 50)]
    with pytest.raises(LmcompressError, match=r"must give shares in \[0, 1\], got 2.0"):
        Gradual(ramp="my_criteria:above").events(100)
    with pytest.raises(ValidationError, match="unknown ramp 'cubi'; did you mean 'cubic'"):
        Gradual(ramp="cubi")
    assert ramp_of("linear")(0.5) == 0.5


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda group: 1 / 0, "the criterion 'own' fails: ZeroDivisionError: division by zero"),
        (lambda group: None, "the criterion 'own' fails: AttributeError"),
    ],
)
def test_a_criterion_that_fails_is_named(function, message):
    with pytest.raises(LmcompressError, match=message):
        score(make("bert"), Criterion("own", "weights", ("heads",), function), ("heads",))
