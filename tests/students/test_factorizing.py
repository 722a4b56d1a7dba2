"""compact.factorizing: the best factors there are, and never larger than what they replace."""

import pytest
import torch
from compacting import batches
from families import FAMILIES, HIDDEN, VOCAB, inputs, make, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import packed
from torch import nn
from torch.nn.utils import parametrize

from lmcompress import LmcompressError
from lmcompress.checkpoint.config import recorded_compression
from lmcompress.checkpoint.cutting import drop_heads, drop_neurons
from lmcompress.evaluation import parameter_count
from lmcompress.families import anatomy_of, weight_view
from lmcompress.nn.low_rank import LowRankLinear
from lmcompress.students import factorize, factorize_embeddings
from lmcompress.students.low_rank import Factors


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_error_is_the_energy_that_was_cut_and_no_rank_does_better(rows, columns, seed, data):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    rank = data.draw(st.integers(1, min(rows, columns)))
    factors = Factors(weight)
    up, down = factors.at(rank)
    assert up.shape == (rows, rank) and down.shape == (rank, columns)
    missed = (weight - up @ down).square().sum()
    torch.testing.assert_close(missed / weight.square().sum(), torch.tensor(1 - factors.energy(rank)).double())
    other = torch.randn(rows, rank, generator=generator).double() @ torch.randn(rank, columns).double()
    assert (weight - other).square().sum() >= missed - 1e-9


def test_with_data_the_output_is_fitted_as_reduced_rank_regression_fits_it():
    torch.manual_seed(1)
    x, weight = torch.randn(200, 8).double() @ torch.randn(8, 8).double(), torch.randn(6, 8).double()
    up, down = Factors(weight, x.t() @ x / 200).at(3)
    target = x @ weight.t()
    # independent: the outputs' own principal directions, onto which the exact regression is projected
    directions = torch.linalg.svd(target, full_matrices=False)[2][:3]
    best = target @ directions.t() @ directions
    torch.testing.assert_close(x @ (up @ down).t(), best)
    plain_up, plain_down = Factors(weight).at(3)
    assert (target - best).norm() < (target - x @ (plain_up @ plain_down).t()).norm()


def test_directions_that_the_data_never_shows_cost_nothing():
    x = torch.zeros(50, 6, dtype=torch.float64)
    x[:, :2] = torch.randn(50, 2).double()
    weight = torch.randn(5, 6).double()
    factors = Factors(weight, x.t() @ x / 50)
    up, down = factors.at(2)
    torch.testing.assert_close(x @ (up @ down).t(), x @ weight.t(), atol=1e-4, rtol=1e-4)
    assert torch.isfinite(up).all() and torch.isfinite(down).all() and factors.energy(2) > 1 - 1e-6


@pytest.mark.parametrize("with_data", [False, True])
def test_a_matrix_of_low_rank_stays_what_it_was(family, with_data):
    model = make(family)
    with torch.no_grad():
        for block in anatomy_of(model).blocks:
            for part in ("ffn_in", "ffn_out"):
                weight = weight_view(block.get(part))
                weight.copy_(torch.randn(len(weight), 3) @ torch.randn(3, weight.shape[1]) * 0.2)
    before = outputs(model)
    report = factorize(model, rank=3, parts=["ffn_in", "ffn_out"], activations=batches(model) if with_data else None)
    torch.testing.assert_close(outputs(model), before, rtol=1e-3, atol=1e-4)
    assert max(report.errors.values()) < 1e-6 and len(report.changed) == 6


def test_every_family_has_all_of_its_matrices_replaced(family):
    model = make(family)
    before = parameter_count(model)
    report = factorize(model, rank=2)
    per_block = 4 if family.name == "gpt2" else 6
    assert len(report.changed) == 3 * per_block and report.left == {}
    assert report.parameters == (before, parameter_count(model)) and parameter_count(model) < before
    assert report.flops[1] < report.flops[0] and "rank 2" in str(report)
    assert report.to_dict()["parameters"] == list(report.parameters)
    assert recorded_compression(model.config).layers[0].rank == 2


def test_data_gives_less_error_on_the_data():
    model, other = make("bert", "language"), make("bert", "language")
    data = batches(model)
    expected = [model(**batch).logits.detach() for batch in data]
    factorize(model, rank=6, parts=["ffn_in", "ffn_out"], activations=data)
    factorize(other, rank=6, parts=["ffn_in", "ffn_out"])

    def missed(model):
        pairs = zip(data, expected, strict=True)
        return sum((model(**b).logits.detach() - e)[b["attention_mask"].bool()].square().sum() for b, e in pairs)

    assert missed(model) < missed(other)


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99])
def test_energy_asks_for_the_lowest_rank_that_keeps_it(energy):
    model = make("bert")
    weights = {i: weight_view(b.get("ffn_in")).clone() for i, b in enumerate(anatomy_of(model).blocks)}
    try:
        factorize(model, energy=energy, parts=["ffn_in"])
    except LmcompressError as error:
        assert energy == 0.99 and "smaller than their matrices" in str(error)
        return
    for i, block in enumerate(anatomy_of(model).blocks):
        module, kept = block.get("ffn_in"), Factors(weights[i]).energy
        if isinstance(module, LowRankLinear):
            assert kept(module.rank) >= energy > kept(module.rank - 1)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_budget_of_parameters_is_kept_and_spent(share):
    model = make("bert")
    whole = sum(weight_view(b.get(p)).numel() for b in anatomy_of(model).blocks for p in ("query", "ffn_in", "ffn_out"))
    report = factorize(model, parameters=share, parts=["query", "ffn_in", "ffn_out"])
    used = whole - (report.parameters[0] - report.parameters[1])
    assert share * whole - (HIDDEN + 24) * 2 < used <= share * whole


def test_a_budget_is_spent_where_the_energy_is():
    model = make("bert")
    first, second, third = anatomy_of(model).blocks
    with torch.no_grad():
        weight = weight_view(first.get("ffn_in"))
        weight.copy_(torch.outer(torch.randn(24), torch.randn(16)))
    factorize(model, parameters=0.5, parts=["ffn_in"])
    ranks = [block.get("ffn_in").rank for block in (first, second, third)]
    assert ranks[0] == 1 and min(ranks[1:]) > 3


def test_what_a_rank_does_not_make_smaller_is_left_and_told():
    model = make("bert")
    # 16×16: 8 · 32 numbers are as many; 24×16: 8 · 40 are fewer
    report = factorize(model, rank=8)
    assert report.left["encoder.layer.0.attention.self.query"] == "a rank of 8 saves nothing of a 16×16 matrix, 7 would"
    assert all("dense" in path and "attention" not in path for path in report.changed)
    with pytest.raises(LmcompressError, match="smaller than their matrices, got none.*a rank of 8 saves nothing"):
        factorize(make("bert"), rank=8, parts=["query"])


def test_what_pruning_has_left_nothing_of_is_left():
    model = make("distilbert")
    drop_heads(anatomy_of(model).blocks[0])
    drop_neurons(anatomy_of(model).blocks[1])
    report = factorize(model, rank=2)
    assert sorted(set(report.left.values())) == ["pruned to nothing"] and len(report.left) == 4 + 2


def test_frozen_stays_frozen_and_modes_stay():
    model = make("bert").requires_grad_(False)
    factorize(model, rank=2)
    assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())


REFUSED = {
    "a rank above the matrix": (dict(rank=17), "rank must be at most 16 for encoder.layer.0.*16×16, got 17"),
    "rank 0": (dict(rank=0), "rank must be at least 1, got 0"),
    "two goals": (
        dict(rank=2, energy=0.5),
        "exactly one of rank, energy and parameters.*got rank, energy",
    ),
    "no goal": ({}, "exactly one of rank, energy and parameters must be given, got none"),
    "all energy": (dict(energy=1.0), "energy must be a share between 0 and 1, got 1.0"),
    "NaN": (dict(parameters=float("nan")), "parameters must be a share between 0 and 1, got nan"),
    "too few parameters": (dict(parameters=0.01), "parameters must leave at least rank 1 everywhere"),
    "an unknown part": (dict(rank=2, parts=["qkv"]), "bert has no part 'qkv'"),
    "an unknown block": (
        dict(rank=2, blocks=[3]),
        r"blocks must be numbers from 0 to 2, without repetition, got \[3\]",
    ),
    "no data": (dict(rank=2, activations=[]), "calibration data must have at least one batch, got none"),
    "a batch of something": (
        dict(rank=2, activations=[{"x": 1}]),
        "a batch must have input_ids or inputs_embeds, got x",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_before_anything_is_changed(what):
    arguments, message = REFUSED[what]
    model = make("bert")
    before = outputs(model)
    with pytest.raises(LmcompressError, match=message):
        factorize(model, **arguments)
    assert torch.equal(outputs(model), before) and not hasattr(model.config, "quantization_config")


def test_a_model_that_is_not_dense_is_refused():
    with pytest.raises(LmcompressError, match="cannot make a model compact whose weights are packed"):
        factorize(packed(make("bert")), rank=2)
    model = make("bert")
    parametrize.register_parametrization(anatomy_of(model).blocks[0].get("query"), "weight", nn.Identity())
    with pytest.raises(LmcompressError, match="cannot make a model compact while .*query is parametrized"):
        factorize(model, rank=2)
    model = make("bert")
    factorize(model, rank=2, parts=["query"])
    with pytest.raises(LmcompressError, match="query must be a dense matrix to be replaced: it is a LowRankLinear"):
        factorize(model, rank=2)
    model = make("bert")
    with torch.no_grad():
        weight_view(anatomy_of(model).blocks[0].get("query"))[0, 0] = float("nan")
    with pytest.raises(LmcompressError, match="a matrix to factorise must be finite"):
        factorize(model, rank=2)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name != "electra-projected"], ids=str)
def test_embeddings_of_low_rank_stay_what_they_were_and_the_tied_head_with_them(family):
    model = make(family, "language")
    words = model.get_input_embeddings()
    with torch.no_grad():
        words.weight.copy_(torch.randn(VOCAB, 3) @ torch.randn(3, HIDDEN))
    before = outputs(model)
    report = factorize_embeddings(model, 3)
    torch.testing.assert_close(outputs(model), before, rtol=1e-3, atol=1e-3)
    assert report.parameters[0] - report.parameters[1] == VOCAB * HIDDEN - 3 * (VOCAB + HIDDEN)
    model.get_input_embeddings()(inputs(model)["input_ids"]).sum().backward()


def test_embeddings_that_would_not_be_smaller_are_refused():
    with pytest.raises(LmcompressError, match="must be at most 12 to save anything of a 64×16 table, got 13"):
        factorize_embeddings(make("bert"), 13)
    with pytest.raises(LmcompressError, match="rank of a 64×16 table must be 1 to 16, got 17"):
        factorize_embeddings(make("bert"), 17)
    model = make("bert")
    factorize_embeddings(model, 2)
    with pytest.raises(LmcompressError, match="must be a dense matrix to be replaced: it is a FactorizedEmbedding"):
        factorize_embeddings(model, 2)
