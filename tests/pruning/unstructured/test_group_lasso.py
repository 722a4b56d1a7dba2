"""Groups that become exactly zero, what is cut then, and how much each matrix can lose by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from families import inputs, make, outputs
from nets import convolutional, mlp, rows
from pydantic import ValidationError
from torch import nn
from torch.utils.data import default_collate
from training import tiny_arguments

from lmcompress import LmcompressError
from lmcompress.pruning.structured.groups import zero_units
from lmcompress.pruning.structured.surgery import cut
from lmcompress.pruning.unstructured import (
    GroupLassoConfig,
    GroupRule,
    GroupSparsity,
    SparsityConfig,
    cut_zero_units,
    prune_weights,
    sensitivity_scan,
)
from lmcompress.pruning.unstructured.groups import groups_of
from lmcompress.trainers import CompressionTrainer

STEPS = 40


def trainer_of(folder, net, config, *, image=False, **changes):
    given = dict(max_steps=STEPS, learning_rate=1e-2, optim="adamw_torch", remove_unused_columns=False)
    args = tiny_arguments(folder, **(given | changes))
    return CompressionTrainer(
        net, args, methods=[GroupSparsity(config)], train_dataset=rows(48, image=image), data_collator=default_collate
    )


def by_hand(module, kind, span):
    """Groups as lists of slices, written out."""
    weight = module.weight
    if kind == "rows":
        return [[weight[i], module.bias[i]] for i in range(len(weight))]
    if kind == "columns":
        return [[weight[:, i : i + span]] for i in range(0, weight.shape[1], span)]
    if kind == "channels":
        return [[weight[:, i]] for i in range(weight.shape[1])]
    if kind == "shapes":
        _, channels, height, width = weight.shape
        return [[weight[:, c, i, j]] for c in range(channels) for i in range(height) for j in range(width)]
    return [[weight, module.bias]]


@pytest.mark.parametrize(
    "kind, path, span",
    [
        ("rows", "layers.0", 1), ("rows", "layers.6", 1), ("columns", "layers.6", 1), ("columns", "layers.6", 16),
        ("channels", "layers.3", 1), ("shapes", "layers.3", 1), ("matrix", "layers.3", 1), ("matrix", "layers.8", 1),
    ],
)  # fmt: skip
def test_groups_are_what_they_are_called(kind, path, span):
    net = convolutional()
    (groups,) = groups_of(net, [GroupRule(modules=path, groups=kind, span=span)])
    module = net.get_submodule(path)
    slices = by_hand(module, kind, span)
    norms = torch.stack([torch.cat([s.detach().reshape(-1) for s in group]).norm() for group in slices])
    torch.testing.assert_close(groups.norms(), norms)
    assert groups.count == len(slices) and groups.size == sum(s.numel() for s in slices[0])
    factor = torch.rand(groups.count)
    factor[::2] = 0.0
    groups.multiply_(factor)
    torch.testing.assert_close(groups.norms(), norms * factor)
    assert not any(bool((torch.signbit(p) & (p == 0)).any()) for p in net.parameters())


RULES = {
    "neurons": (False, (GroupRule(modules="layers.0", groups="rows", keep=6),)),
    "inputs-and-neurons": (
        False,
        (GroupRule(modules="layers.0", groups="columns", keep=8), GroupRule(modules="layers.0", groups="rows", keep=9)),
    ),
    "filters": (True, (GroupRule(modules="layers.[03]", groups="rows", keep=3),)),
    "shapes": (True, (GroupRule(modules="layers.3", groups="shapes", keep=7),)),
    "channels-of-the-flat": (True, (GroupRule(modules="layers.6", groups="columns", span=16, keep=4),)),
}


@pytest.mark.parametrize("name", RULES)
def test_as_many_groups_stay_as_are_to_and_the_network_learns(tmp_path, name):
    image, rules = RULES[name]
    net = convolutional() if image else mlp()
    trainer = trainer_of(tmp_path, net, GroupLassoConfig(rules=rules, penalty=5.0, end=0.7), image=image)
    trainer.train()
    trained = copy.deepcopy(net.state_dict())
    trainer.finish()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in net.state_dict().items())
    (method,) = trainer.methods
    wanted = [one.rule.keep for one in method.groups]
    assert [row.after for row in method.report.rows] == wanted
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert logs[-1]["loss"] < logs[0]["loss"] and logs[-1]["group_sparsity"] > 0.2
    # most became zero by being pressed, not by the cut at the end
    assert logs[int(STEPS * 0.7) - 1]["group_sparsity"] > 0.5 * logs[-1]["group_sparsity"]
    assert method.report.to_dict()["rows"][0]["after"] == wanted[0]


def test_without_a_number_the_penalty_decides(tmp_path):
    left = []
    for penalty in (0.001, 2.0):
        net = mlp()
        rules = (GroupRule(modules="layers.[02]", groups="rows"),)
        trainer = trainer_of(tmp_path, net, GroupLassoConfig(rules=rules, penalty=penalty, end=0.9))
        trainer.train()
        trainer.finish()
        left.append(sum(row.after for row in trainer.methods[0].report.rows))
    assert left[0] == 24 > left[1]


def test_a_run_killed_and_resumed_ends_as_one_that_was_not(tmp_path):
    config = GroupLassoConfig(rules=RULES["neurons"][1], penalty=2.0)
    whole = trainer_of(tmp_path / "whole", mlp(), config)
    whole.train()
    first = trainer_of(tmp_path / "killed", mlp(), config, save_strategy="steps", save_steps=11, max_steps=STEPS)

    class Killed(Exception):
        pass

    def kill(*args, **kwargs):
        raise Killed

    original = first.training_step
    first.training_step = lambda *a, **k: kill() if first.state.global_step == 15 else original(*a, **k)
    with pytest.raises(Killed):
        first.train()
    second = trainer_of(tmp_path / "killed", mlp(), config)
    second.train(resume_from_checkpoint=True)
    for (key, one), two in zip(whole.student.state_dict().items(), second.student.state_dict().values(), strict=True):
        assert torch.equal(one, two), key


@pytest.mark.parametrize("family_name", ["bert", "gpt2"])
def test_zero_groups_of_transformers_are_handed_to_surgery(tmp_path, family_name):
    model = make(family_name, seed=1)
    rules = (
        GroupRule(modules="ffn_in", groups="rows", keep=10),
        GroupRule(modules="attention_out", groups="columns", span=4, keep=3),
    )
    examples = [{k: v[0] for k, v in inputs(model, rows=1, seed=i).items()} for i in range(8)]
    for number, row in enumerate(examples):
        row["attention_mask"], row["labels"] = torch.ones_like(row["input_ids"]), torch.tensor(number % 3)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    args = tiny_arguments(tmp_path, max_steps=10, learning_rate=1e-3)
    trainer = CompressionTrainer(
        model, args, methods=[GroupSparsity(GroupLassoConfig(rules=rules, penalty=1.0))], train_dataset=examples
    )
    trainer.train()
    trainer.finish()
    before = outputs(model.eval())
    mask = zero_units(model)
    assert [int(kept.sum()) for kept in mask.neurons] == [10] * 3 and [int(k.sum()) for k in mask.heads] == [3] * 3
    cut(model, mask)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5)


def test_cutting_changes_no_answer():
    net, linear = convolutional(), mlp()
    with torch.no_grad():
        net.layers[0].weight[1], net.layers[0].bias[1] = 0, 0
        net.layers[3].weight[:, 2] = 0
        net.layers[6].weight[:, 16:48] = 0
        net.layers[8].weight[:, 5] = 0
        linear.layers[0].weight[:, [0, 7]] = 0
        # what reads only a neuron that goes, goes with it
        linear.layers[2].weight[3], linear.layers[2].bias[3] = 0, 0
        linear.layers[2].weight[[i for i in range(8) if i != 3], 4] = 0
    x, vectors = torch.randn(5, 1, 12, 12), torch.randn(5, 12)
    before, plain = net(x)["logits"], linear(vectors)["logits"]
    found = cut_zero_units(net.layers)
    torch.testing.assert_close(net(x)["logits"], before, rtol=1e-4, atol=1e-6)
    assert [(row.before, row.after) for row in found] == [(4, 2), (6, 4), (8, 7), (3, 3)]
    found = cut_zero_units(linear.layers)
    torch.testing.assert_close(linear(vectors)["logits"], plain, rtol=1e-4, atol=1e-6)
    assert [row.after for row in found] == [15, 7, 3] and found[0].inputs == 10
    assert linear.layers[2].in_features == 15 and linear.layers[2].out_features == 7


def test_what_cannot_be_cut_or_grouped_is_refused(tmp_path):
    with pytest.raises(LmcompressError, match="got a Sigmoid at 1"):
        cut_zero_units(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 2)))
    with pytest.raises(LmcompressError, match="a convolution with groups at 0"):
        cut_zero_units(nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)))
    with pytest.raises(LmcompressError, match="layers to cut, got none"):
        cut_zero_units(nn.Sequential(nn.ReLU()))
    with pytest.raises(LmcompressError, match="layer 0 would lose all its 2 units"):
        dead = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        nn.init.zeros_(dead[2].weight)
        cut_zero_units(dead)
    net = convolutional()
    with pytest.raises(LmcompressError, match="channels are of convolutions, got layers.6, a Linear"):
        groups_of(net, [GroupRule(modules="layers.6", groups="channels")])
    with pytest.raises(LmcompressError, match="groups must divide the inputs of layers.6, got 7 for 96"):
        groups_of(net, [GroupRule(modules="layers.6", groups="columns", span=7)])
    with pytest.raises(LmcompressError, match="layers.0 has 4 rows, got 5 to keep"):
        groups_of(net, [GroupRule(modules="layers.0", groups="rows", keep=5)])
    with pytest.raises(LmcompressError, match="matches no matrix.*did you mean 'layers.6'"):
        groups_of(net, [GroupRule(modules="layer.6", groups="rows")])
    with pytest.raises(ValidationError, match="span is of columns, got 2 for rows"):
        GroupLassoConfig(rules=(GroupRule(modules="a", groups="rows", span=2),))
    config = GroupLassoConfig(rules=RULES["neurons"][1])
    with pytest.raises(LmcompressError, match="finish.. must come after train"):
        trainer_of(tmp_path, mlp(), config).finish()
    with pytest.raises(LmcompressError, match="must have optimizer steps between begin and end, got 0 of 1"):
        trainer_of(tmp_path, mlp(), config.model_copy(update={"end": 0.1}), max_steps=1).train()


def test_a_scan_says_what_each_matrix_can_lose_by_itself():
    net = mlp()
    with torch.no_grad():
        # this matrix has half its weights for nothing
        net.layers[2].weight[:, ::2] *= 1e-6
    before = copy.deepcopy(net.state_dict())
    batch = default_collate(rows(24))
    reference = net(batch["pixel_values"])["logits"].detach()

    def error(model):
        with torch.no_grad():
            return float((model(batch["pixel_values"])["logits"] - reference).square().mean())

    scan = sensitivity_scan(net, error, (0.25, 0.5, 0.9))
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert scan.dense == 0 and set(scan.values) == {"layers.0", "layers.2", "layers.4"}
    rules = {rule.modules: rule.sparsity for rule in scan.rules(1e-9)}
    assert rules == {"layers.0": None, "layers.2": 0.5, "layers.4": None}
    prune_weights(net, SparsityConfig(rules=scan.rules(1e-9)))
    assert error(net) < 1e-9 and int((net.layers[2].weight == 0).sum()) == 64
    for value in scan.values.values():
        assert list(value) == sorted(value)
    with pytest.raises(LmcompressError, match="the tolerance must be >= 0, got -1"):
        scan.rules(-1)
    with pytest.raises(LmcompressError, match=r"shares must increase within \(0, 1\), got \[0.5, 0.4\]"):
        sensitivity_scan(net, error, (0.5, 0.4))
