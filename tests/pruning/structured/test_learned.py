"""The arithmetic of learned masks against independent computations and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from families import FAMILIES, make
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcompress import LmcompressError, anatomy_of
from lmcompress.pruning.structured.layout import Layout
from lmcompress.pruning.structured.learned import (
    LOG_ALPHA_LIMIT,
    UnitCosts,
    expected_cost,
    hard_concrete_open,
    hard_concrete_sample,
    hard_concrete_value,
    initial_log_alpha,
    lagrangian,
    movement_penalty,
    threshold_mask,
    without_expected_zeros,
)
from lmcompress.pruning.structured.units import Units, full


@given(st.floats(-4.0, 4.0))
@settings(max_examples=15, deadline=None)
def test_the_share_of_open_gates_is_the_expected_l0_norm(log_alpha):
    noise = (torch.arange(20000) + 0.5) / 20000
    gates = hard_concrete_sample(torch.full((20000,), log_alpha), noise)
    open_share = hard_concrete_open(torch.tensor(log_alpha))
    assert float((gates > 0).float().mean()) == pytest.approx(float(open_share), abs=1e-3)
    assert 0 <= float(gates.min()) <= float(gates.max()) <= 1


def test_gates_reach_exact_zeros_and_ones_and_have_a_gradient_in_between():
    noise = torch.linspace(0.01, 0.99, 99)
    log_alpha = torch.zeros(99, requires_grad=True)
    gates = hard_concrete_sample(log_alpha, noise)
    assert (gates == 0).any() and (gates == 1).any()
    gates.sum().backward()
    inside = (gates > 0) & (gates < 1)
    assert (log_alpha.grad[inside] > 0).all() and (log_alpha.grad[~inside] == 0).all()


def test_gate_arithmetic_is_float32_for_half_precision_too():
    log_alpha = torch.randn(64, dtype=torch.bfloat16)
    for result in (
        hard_concrete_sample(log_alpha, torch.rand(64)),
        hard_concrete_open(log_alpha),
        hard_concrete_value(log_alpha),
        threshold_mask(log_alpha, 0.1),
        movement_penalty(log_alpha),
    ):
        assert result.dtype == torch.float32


def test_noise_of_another_shape_is_refused():
    with pytest.raises(LmcompressError, match=r"shape of log_alpha \(3,\), got \(2,\)"):
        hard_concrete_sample(torch.zeros(3), torch.zeros(2))


def test_gates_start_where_they_are_asked_to():
    assert float(torch.sigmoid(torch.tensor(initial_log_alpha(0.3)))) == pytest.approx(0.7)
    assert initial_log_alpha(0.0) == LOG_ALPHA_LIMIT == math.log(100)
    with pytest.raises(LmcompressError, match=r"must be in \[0, 1\), got 1"):
        initial_log_alpha(1.0)


def test_as_many_values_become_zero_as_are_expected_to():
    torch.manual_seed(0)
    log_alpha = torch.randn(50) * 3
    values, open_share = hard_concrete_value(log_alpha), hard_concrete_open(log_alpha)
    kept = without_expected_zeros(values, open_share)
    assert int((kept == 0).sum()) == round(float((1 - open_share).sum()))
    assert values[kept == 0].max() <= values[kept > 0].min()
    assert torch.equal(kept[kept > 0], values[kept > 0])


def test_gradient_descent_and_ascent_on_the_lagrangian_reach_the_target():
    log_alpha = torch.full((200,), 2.0, requires_grad=True)
    multipliers = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [{"params": [log_alpha]}, {"params": [multipliers], "maximize": True}], lr=0.05, weight_decay=0.0
    )
    for _ in range(400):
        sparsity = 1 - hard_concrete_open(log_alpha).mean()
        optimizer.zero_grad()
        lagrangian(sparsity, 0.6, multipliers[0], multipliers[1]).backward()
        optimizer.step()
    assert float(sparsity.detach()) == pytest.approx(0.6, abs=0.03)


def test_the_movement_mask_is_hard_forward_and_straight_through_backward():
    scores = torch.tensor([-5.0, -1.0, 0.0, 3.0], requires_grad=True)
    mask = threshold_mask(scores, 0.3)
    assert mask.tolist() == [0.0, 0.0, 1.0, 1.0]
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (mask * weights).sum().backward()
    assert torch.equal(scores.grad, weights)


def test_the_movement_penalty_falls_with_the_scores():
    assert movement_penalty(torch.full((4,), -1.0)) < movement_penalty(torch.zeros(4)) < movement_penalty(torch.ones(4))


def _costs_of_parameters(model) -> tuple[UnitCosts, list[int], list[int]]:
    blocks = anatomy_of(model).blocks
    hidden, size = anatomy_of(model).hidden_size, blocks[0].head_size
    count = len(blocks)
    costs = UnitCosts(
        per_head=torch.full((count,), 4.0 * size),
        per_head_fixed=torch.full((count,), 3.0 * size),
        per_neuron=torch.full((count,), 2.0),
        per_neuron_fixed=torch.ones(count),
        per_layer=torch.full((count,), 6.0),
        hidden=hidden,
    )
    return costs, [b.num_heads for b in blocks], [b.ffn_width for b in blocks]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_cost_of_open_gates_is_the_number_of_parameters_of_the_blocks(family):
    model = make(family)
    costs, heads, neurons = _costs_of_parameters(model)
    counted = sum(p.numel() for p in anatomy_of(model).block_list.parameters())
    assert float(expected_cost(Units(), costs, heads, neurons)) == counted
    opened = full(model, ["heads", "neurons", "attention", "ffn", "layers", "hidden"], 1.0, torch.float32)
    assert float(expected_cost(opened, costs, heads, neurons)) == counted


def test_expected_cost_is_the_mean_over_independent_gates():
    model = make("bert", num_hidden_layers=1, hidden_size=4, num_attention_heads=1, intermediate_size=2)
    costs, heads, neurons = _costs_of_parameters(model)
    probabilities = {"heads.0": [0.3], "neurons.0": [0.9, 0.2], "attention": [0.6], "ffn": [0.5], "layers": [0.8]}
    probabilities["hidden"] = [0.1, 0.7, 0.4, 0.9]
    names = [(name, i) for name, values in probabilities.items() for i in range(len(values))]
    total = 0.0
    for bits in range(2 ** len(names)):
        weight, gates = 1.0, {name: [0.0] * len(values) for name, values in probabilities.items()}
        for k, (name, i) in enumerate(names):
            bit = bits >> k & 1
            gates[name][i] = float(bit)
            weight *= probabilities[name][i] if bit else 1 - probabilities[name][i]
        state = {name: torch.tensor(values) for name, values in gates.items()}
        total += weight * float(expected_cost(Units.from_state_dict(state), costs, heads, neurons))
    expected = {name: torch.tensor(values) for name, values in probabilities.items()}
    assert float(expected_cost(Units.from_state_dict(expected), costs, heads, neurons)) == pytest.approx(
        total, rel=1e-4
    )


def test_cost_of_other_blocks_is_refused():
    costs, heads, neurons = _costs_of_parameters(make("bert"))
    with pytest.raises(LmcompressError, match="costs are of 3 blocks, got heads of 2"):
        expected_cost(Units(), costs, heads[:2], neurons)


def test_a_layout_splits_and_joins_units_with_their_gradient():
    units = full(make("gpt2"), ["heads", "neurons", "ffn", "hidden"], 1.0, torch.float32)
    layout = Layout.of(units)
    vector = torch.randn(layout.size, requires_grad=True)
    split = layout.split(vector)
    assert split.parts() == units.parts()
    torch.testing.assert_close(layout.join(split), vector)
    split.heads[1].sum().backward()
    assert vector.grad.sum() == len(units.heads[1])
    batched = layout.split(torch.randn(5, layout.size))
    assert batched.neurons[0].shape == (5, len(units.neurons[0]))
    with pytest.raises(LmcompressError, match="must have .* entries, got 3"):
        layout.split(torch.zeros(3))
    with pytest.raises(LmcompressError, match="got other units"):
        layout.join(units.updated(ffn=torch.ones(1)))
