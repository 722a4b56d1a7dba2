"""Weights made zero without training."""

from __future__ import annotations

import copy

import pytest
import torch
from families import cut_unevenly, inputs, make, outputs
from nets import batches, convolutional, mlp, rows
from torch import nn

from lmcompress import CompressedModel, LmcompressError
from lmcompress.pruning.unstructured import (
    Blocks,
    Gradual,
    Iterative,
    NOfM,
    SparsityConfig,
    SparsityRule,
    Surgery,
    prune_weights,
)


def zeros(model) -> dict[str, float]:
    return {n: float((p == 0).float().mean()) for n, p in model.named_parameters() if p.dim() > 1}


def is_plus_zero(tensor) -> bool:
    return not bool((torch.signbit(tensor) & (tensor == 0)).any())


def test_every_family_loses_exactly_what_was_asked_for(family, make_model):
    model = make_model(family)
    report = prune_weights(model, SparsityConfig(sparsity=0.25))
    for row in report.matrices:
        # the row of padding is zero before, and goes first
        assert row.zeros == round(0.25 * row.weights) and (row.zeros_before == 0 or row.part == "embeddings")
    assert {row.part for row in report.matrices} >= {"embeddings", "ffn_in", "ffn_out", "attention_out"}
    assert report.sparsity == pytest.approx(0.25) and report.factor == pytest.approx(4 / 3)
    assert "pooler.dense" in report.untouched or family.name not in ("bert",)
    assert torch.isfinite(outputs(model)).all()
    assert str(report).count("25.0%") >= len(report.matrices)
    assert report.to_dict()["matrices"][0]["sparsity"] == pytest.approx(0.25)


def test_a_model_that_was_cut_is_pruned_too(family, make_model):
    model = cut_unevenly(make_model(family))
    report = prune_weights(model, SparsityConfig(sparsity=0.5))
    assert all(row.zeros == round(0.5 * row.weights) for row in report.matrices)


@pytest.mark.parametrize("head", ["language", "classification"])
def test_nothing_changes_where_nothing_goes(head):
    model = make("gpt2", head)
    before = copy.deepcopy(model.state_dict())
    report = prune_weights(model, SparsityConfig(sparsity=0.0))
    assert report.sparsity == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_goes_is_what_is_smallest_within_the_scope():
    for scope in ("layer", "global", "row"):
        net = mlp()
        before = {n: p.detach().clone() for n, p in net.named_parameters() if p.dim() > 1}
        prune_weights(net, SparsityConfig(sparsity=0.5, scope=scope))
        pairs = [(before[n], p.detach()) for n, p in net.named_parameters() if n in before]
        assert all(torch.equal(new[new != 0], old[new != 0]) and is_plus_zero(new) for old, new in pairs)
        if scope == "global":
            pairs = [tuple(torch.cat([t.reshape(1, -1) for t in tensors], 1) for tensors in zip(*pairs, strict=True))]
        for old, new in pairs:
            for old_row, new_row in [(old, new)] if scope != "row" else zip(old, new, strict=True):
                assert int((new_row == 0).sum()) == round(0.5 * old_row.numel())
                assert old_row[new_row == 0].abs().max() <= old_row[new_row != 0].abs().min()


@pytest.mark.parametrize("family_name", ["gpt2", "bert"])
@pytest.mark.parametrize("compensation", [False, True])
def test_two_of_four_neighbouring_inputs_stay(family_name, compensation):
    model = make(family_name)
    config = SparsityConfig(
        pattern=NOfM(n=2, m=4), compensation=compensation, criterion="sparsegpt" if compensation else "magnitude"
    )
    report = prune_weights(model, config, [inputs(model)] if compensation else None)
    assert all(row.sparsity == 0.5 for row in report.matrices if row.part != "embeddings")
    projection = model.base_model.h[0].mlp.c_fc.weight.t() if family_name == "gpt2" else (
        model.bert.encoder.layer[0].intermediate.dense.weight
    )  # fmt: skip
    assert ((projection.reshape(-1, 4) != 0).sum(1) == 2).all()


def test_blocks_go_whole():
    model = make("bert")
    prune_weights(model, SparsityConfig(sparsity=0.5, pattern=Blocks(rows=2, columns=4)))
    weight = model.bert.encoder.layer[1].output.dense.weight
    blocks = (weight.reshape(8, 2, 6, 4).permute(0, 2, 1, 3).reshape(-1, 8) == 0).sum(1)
    assert set(blocks.tolist()) == {0, 8} and (blocks == 8).sum() == 24


def test_rules_name_parts_and_paths_and_the_later_one_counts():
    model = make("bert")
    config = SparsityConfig(
        sparsity=0.5,
        rules=(
            SparsityRule(modules="ffn_*", sparsity=0.75),
            SparsityRule(modules="encoder.layer.1.*", sparsity=0.25),
            SparsityRule(modules="embeddings"),
            SparsityRule(modules="pooler.dense", sparsity=0.5),
        ),
    )
    report = prune_weights(model, config)
    shares = {row.path: row.sparsity for row in report.matrices}
    assert shares["encoder.layer.0.intermediate.dense"] == 0.75
    assert shares["encoder.layer.1.intermediate.dense"] == 0.25
    assert shares["encoder.layer.0.attention.self.query"] == 0.5 == shares["pooler.dense"]
    assert report.untouched["embeddings.word_embeddings"] == "the config leaves it as it is"


def test_a_rule_is_left_out_of_what_is_compared_in_all():
    net = mlp()
    config = SparsityConfig(sparsity=0.5, scope="global", rules=(SparsityRule(modules="layers.0", sparsity=0.25),))
    shares = [row.sparsity for row in prune_weights(net, config).matrices]
    assert shares[0] == 0.25
    weights = [16 * 8, 8 * 3]
    assert sum(s * w for s, w in zip(shares[1:], weights, strict=True)) == round(0.5 * sum(weights))


def test_quality_is_a_threshold_in_standard_deviations():
    net = mlp()
    before = net.layers[0].weight.detach().clone()
    prune_weights(net, SparsityConfig(quality=0.8))
    assert torch.equal(net.layers[0].weight == 0, before.abs() < 0.8 * before.std())


def test_rounds_end_where_one_shot_does_where_scores_do_not_change():
    once, rounds = mlp(), mlp()
    prune_weights(once, SparsityConfig(sparsity=0.7))
    prune_weights(rounds, SparsityConfig(sparsity=0.7, schedule=Iterative(rounds=4)))
    for one, two in zip(once.parameters(), rounds.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("criterion", ["obd", "fisher", "taylor", "movement", "wanda", "random"])
@pytest.mark.parametrize("schedule", ["one_shot", "iterative"])
@pytest.mark.parametrize("image", [False, True], ids=["mlp", "convolution"])
def test_every_criterion_prunes_a_plain_network(criterion, schedule, image):
    net = convolutional() if image else mlp()
    data = batches(rows(9, image=image))
    config = SparsityConfig(sparsity=0.5, criterion=criterion, schedule={"kind": schedule})
    report = prune_weights(net, config, data)
    # by row, each row is rounded
    assert report.sparsity == pytest.approx(0.5, abs=0.05 if criterion == "wanda" else 1e-2)
    assert sum(row.zeros for row in report.matrices) == sum(int((p == 0).sum()) for p in net.parameters())


def test_obd_hurts_less_than_magnitude_where_scales_mislead():
    torch.manual_seed(0)
    net, examples = mlp(), rows(60)
    with torch.no_grad():
        # a unit that is scaled down and read scaled up computes the same
        scale = torch.logspace(-1.5, 1.5, 16)
        net.layers[0].weight.mul_(scale[:, None])
        net.layers[0].bias.mul_(scale)
        net.layers[2].weight.div_(scale)
    data = batches(examples)
    reference = [net(**batch)["logits"].detach() for batch in data]
    changes = {}
    for criterion in ("obd", "magnitude"):
        pruned = copy.deepcopy(net)
        prune_weights(pruned, SparsityConfig(sparsity=0.4, criterion=criterion, scope="global"), data)
        changes[criterion] = sum(
            float((pruned(**batch)["logits"] - r).detach().square().sum())
            for batch, r in zip(data, reference, strict=True)
        )
    assert changes["obd"] < 0.25 * changes["magnitude"]


@pytest.mark.parametrize("family_name, head", [("gpt2", "language"), ("bert", "classification")])
@pytest.mark.parametrize("criterion", ["sparsegpt", "magnitude", "wanda"])
def test_compensation_keeps_the_answers_nearer(family_name, head, criterion):
    model = make(family_name, head)
    data = [inputs(model, rows=16, length=12, seed=seed) for seed in range(4)]
    reference = outputs(model, rows=16, length=12)
    errors = []
    for compensated in (False, True):
        pruned = copy.deepcopy(model)
        config = SparsityConfig(
            sparsity=0.5,
            criterion="magnitude" if criterion == "sparsegpt" and not compensated else criterion,
            compensation=compensated,
            rules=(SparsityRule(modules="embeddings"),),
        )
        report = prune_weights(pruned, config, data)
        assert report.sparsity == pytest.approx(0.5, abs=0.01)
        assert all(is_plus_zero(p) for p in pruned.parameters())
        errors.append(float((outputs(pruned, rows=16, length=12) - reference).square().mean()))
    assert errors[1] < errors[0]


def test_compensation_of_plain_networks_and_convolutions():
    net = convolutional()
    data = batches(rows(60, image=True))
    reference = net(data[0]["pixel_values"])["logits"].detach()
    errors = []
    for compensated in (False, True):
        pruned = copy.deepcopy(net)
        criterion = "sparsegpt" if compensated else "magnitude"
        prune_weights(pruned, SparsityConfig(sparsity=0.6, criterion=criterion, compensation=compensated), data)
        errors.append(float((pruned(data[0]["pixel_values"])["logits"].detach() - reference).square().mean()))
    assert errors[1] < errors[0]


def test_zeros_of_a_stage_before_stay():
    net = mlp()
    prune_weights(net, SparsityConfig(rules=(SparsityRule(modules="layers.0", sparsity=0.5),)))
    gone = net.layers[0].weight == 0
    report = prune_weights(net, SparsityConfig(sparsity=0.25, keep_zeros=True, criterion="random"))
    assert (net.layers[0].weight[gone] == 0).all()
    assert [row.zeros_before for row in report.matrices] == [96, 0, 0]
    # half is gone already where a quarter was asked for
    assert [row.sparsity for row in report.matrices] == [0.5, 0.25, 0.25]


def test_a_sparse_model_is_saved_and_reloaded_with_its_zeros(tmp_path):
    model = CompressedModel(make("distilbert"))
    prune_weights(model, SparsityConfig(sparsity=0.5))
    model.save_pretrained(tmp_path)
    again = type(model.model).from_pretrained(tmp_path)
    assert zeros(again) == zeros(model.model) and torch.equal(outputs(again), outputs(model.model))


def test_what_is_refused_leaves_the_model_as_it_was():
    def refused(model, message, batches=None, **given):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(LmcompressError, match=message):
            prune_weights(model, SparsityConfig(**given), batches)
        assert all(torch.equal(t, before[n]) or not t.isfinite().all() for n, t in model.state_dict().items())

    refused(mlp(), "gradual needs training: use SparsityTrainer", sparsity=0.5, schedule=Gradual())
    refused(mlp(), "surgery needs training", sparsity=0.5, schedule=Surgery())
    refused(mlp(), "the rule for 'layer.0' matches no matrix.*did you mean 'layers.0'", sparsity=0.5,
            rules=(SparsityRule(modules="layer.0", sparsity=0.5),))  # fmt: skip
    refused(mlp(), "layers.4 must consist of groups of 2 × 1, got 3 × 8", sparsity=0.5,
            pattern=Blocks(rows=2, columns=1))  # fmt: skip
    refused(convolutional(), r"layers.0 must consist of groups of 1 × 4, got 4 × 9", pattern=NOfM())
    refused(nn.ReLU(), "no weight of this ReLU would be removed: it has no matrices", sparsity=0.5)
    refused(nn.Linear(2, 2), "no weight of this Linear would be removed", sparsity=0.01)
    refused(mlp(), "no weight of this Net would be removed: layers.0: the config leaves it", sparsity=0.5,
            rules=(SparsityRule(modules="*"),))  # fmt: skip
    refused(mlp(), "the criterion wanda must have data, got none", sparsity=0.5, criterion="wanda")
    refused(mlp(), "must have data, got none", sparsity=0.5, criterion="sparsegpt", compensation=True)
    # the second matrix fails after the first was compensated
    net, x = mlp(), torch.randn(4, 12)
    x[0, 0] = float("nan")
    refused(net, "layers.0: the Hessian must be finite", [{"pixel_values": x}], sparsity=0.5, criterion="sparsegpt",
            compensation=True)  # fmt: skip
    broken = mlp()
    with torch.no_grad():
        broken.layers[2].weight[0, 0] = float("inf")
    refused(broken, "weights of layers.2 must be finite", sparsity=0.5)
    grouped = nn.Conv2d(4, 4, 3, groups=2)
    refused(grouped, "must have one group for a criterion that uses inputs, got 2", sparsity=0.5, criterion="wanda")


def test_equal_weights_are_no_trouble():
    net = nn.Linear(8, 4)
    nn.init.constant_(net.weight, 0.5)
    prune_weights(net, SparsityConfig(sparsity=0.5))
    assert int((net.weight == 0).sum()) == 16
    zero = nn.Linear(8, 4)
    nn.init.zeros_(zero.weight)
    report = prune_weights(zero, SparsityConfig(sparsity=0.5))
    assert report.matrices[0].zeros == 32 == report.matrices[0].zeros_before
