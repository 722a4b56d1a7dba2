import builtins
from itertools import combinations, combinations_with_replacement

import numpy as np
import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from lmcompress.distillation.emd import cost_attention, earth_mover_flow, emd_costs, emd_hidden_mse
from lmcompress.distillation.layer_maps import (
    given,
    last,
    nearest_in_order,
    nearest_kept,
    skip,
    uniform,
)
from lmcompress.distillation.matches.features import hidden_mse
from lmcompress.distillation.projections import Projection
from lmcompress.errors import LmcompressError


@pytest.mark.parametrize("students, step", [(6, 2), (3, 4), (4, 3)], ids=["T6", "T3", "T4"])
def test_uniform_gives_textbrewers_maps(students, step):
    assert uniform(students, 12) == [(k, k * step) for k in range(students + 1)]


@hypothesis_given(st.integers(1, 30), st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_uniform_increases_strictly_from_first_to_last_and_stays_near_the_line(students, more):
    teachers = students + more
    layers = uniform(students, teachers)
    assert layers[0] == (0, 0) and layers[-1] == (students, teachers)
    assert all(b[0] == a[0] + 1 and b[1] > a[1] for a, b in zip(layers, layers[1:], strict=False))
    assert all(abs(t - s * teachers / students) <= 0.5 for s, t in layers)
    assert uniform(students, teachers, include_embeddings=False) == layers[1:]


def test_pkds_maps_are_the_papers():
    assert [t for _, t in skip(6, 12)] == [2, 4, 6, 8, 10]
    assert [t for _, t in last(6, 12)] == [7, 8, 9, 10, 11]
    assert [t for _, t in skip(3, 12)] == [4, 8]
    assert skip(6, 12, include_last=True)[-1] == last(6, 12, include_last=True)[-1] == (6, 12)


def test_skip_refuses_what_does_not_divide():
    with pytest.raises(LmcompressError, match="5 blocks must divide its 12; use uniform"):
        skip(5, 12)


@pytest.mark.parametrize("layer_map", [uniform, skip, last])
@pytest.mark.parametrize("students, teachers", [(0, 12), (13, 12)])
def test_maps_refuse_students_without_blocks_or_deeper_than_their_teacher(layer_map, students, teachers):
    with pytest.raises(LmcompressError, match=f"no more than its teacher, got {students} and {teachers}"):
        layer_map(students, teachers)


def test_given_pairs_keep_their_order_and_count_from_the_end():
    assert given([(4, 12), [-4, -12], (0, 0)], 4, 12) == [(4, 12), (1, 1), (0, 0)]


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([], "at least one pair"),
        ([(1, 2, 3)], "pairs of integers"),
        ([(1, 2.0)], "pairs of integers"),
        ([(True, 2)], "pairs of integers"),
        ([(5, 2)], r"layer 5 of the student, which has 4 blocks.*\[0, 4\]"),
        ([(1, -14)], "layer -14 of the teacher, which has 12 blocks"),
        ([(4, 12), (-1, -1)], r"names the pair \(4, 12\) twice"),
    ],
    ids=["none", "triple", "float", "bool", "student", "teacher", "twice"],
)
def test_given_refuses(pairs, message):
    with pytest.raises(LmcompressError, match=message):
        given(pairs, 4, 12)


@hypothesis_given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_nearest_in_order_costs_what_brute_force_finds(teachers, students, seed):
    distances = torch.rand(teachers, students, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    student_layers, teacher_layers = [2 * s + 1 for s in range(students)], [3 * t + 2 for t in range(teachers)]
    pairs = nearest_in_order(distances, student_layers, teacher_layers)
    assert [t for _, t in pairs] == teacher_layers
    choose = combinations if students >= teachers else combinations_with_replacement
    least = min(sum(distances[t, s].item() for t, s in enumerate(c)) for c in choose(range(students), teachers))
    chosen = [student_layers.index(s) for s, _ in pairs]
    assert sum(distances[t, s].item() for t, s in enumerate(chosen)) == pytest.approx(least)
    strict = students >= teachers
    assert all(b > a if strict else b >= a for a, b in zip(chosen, chosen[1:], strict=False))


def test_a_student_that_kept_everything_is_mapped_to_itself():
    assert nearest_kept(range(1, 13), [3, 6, 9, 12]) == [(3, 3), (6, 6), (9, 9), (12, 12)]


def test_fewer_kept_blocks_than_teacher_layers_may_serve_twice():
    assert nearest_kept([2, 11], [2, 5, 8, 11]) == [(1, 2), (1, 5), (2, 8), (2, 11)]


@pytest.mark.parametrize(
    "distances, students, teachers, message",
    [
        (torch.zeros(2, 2), [1, 1], [1, 2], "student layers must be one or more increasing"),
        (torch.zeros(2, 2), [1, 2], [2, 1], "teacher layers must be one or more increasing"),
        (torch.zeros(1, 0), [], [1], "student layers must be one or more"),
        (torch.zeros(2, 3), [1, 2], [1, 2], r"= \(2, 2\), got \(2, 3\)"),
        (torch.full((1, 1), float("nan")), [1], [1], "must be finite"),
    ],
    ids=["students", "teachers", "none", "shape", "nan"],
)
def test_nearest_in_order_refuses(distances, students, teachers, message):
    with pytest.raises(LmcompressError, match=message):
        nearest_in_order(distances, students, teachers)


def test_nearest_kept_refuses_blocks_that_do_not_increase():
    with pytest.raises(LmcompressError, match="kept blocks must be increasing"):
        nearest_kept([3, 2], [1])


def least_cost(cost, student, teacher):
    """The transport problem by scipy's linear programming."""
    s, t = cost.shape
    sums = np.concatenate([np.kron(np.eye(s), np.ones(t)), np.kron(np.ones(s), np.eye(t))])
    return linprog(cost.ravel(), A_eq=sums, b_eq=np.concatenate([student, teacher]), method="highs").fun


@hypothesis_given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_flow_is_a_transport_of_least_cost(students, teachers, seed):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(students, teachers, generator=generator)
    student, teacher = torch.rand(students, generator=generator) + 0.1, torch.rand(teachers, generator=generator) + 0.1
    flow = earth_mover_flow(cost, student, teacher)
    assert (flow >= 0).all()
    torch.testing.assert_close(flow.sum(1), student / student.sum())
    torch.testing.assert_close(flow.sum(0), teacher / teacher.sum())
    expected = least_cost(
        cost.double().numpy(),
        (student.double() / student.double().sum()).numpy(),
        (teacher.double() / teacher.double().sum()).numpy(),
    )
    assert (flow * cost).sum().item() == pytest.approx(expected, abs=1e-6)


def test_flows_of_a_batch_are_those_of_its_matrices_and_have_no_gradient():
    costs = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    flows = earth_mover_flow(costs)
    assert not flows.requires_grad and flows.dtype == torch.float32
    torch.testing.assert_close(flows, torch.stack([earth_mover_flow(cost) for cost in costs]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(3),), r"got shape \(3,\)"),
        ((torch.full((2, 2), float("inf")),), "must be finite"),
        ((torch.zeros(2, 2), torch.tensor([1.0, -1.0])), "student weights must be 2 numbers >= 0"),
        ((torch.zeros(2, 2), None, torch.zeros(2)), "teacher weights must be 2 numbers >= 0 with a sum > 0"),
        ((torch.zeros(2, 2), torch.ones(3)), "student weights must be 2 numbers"),
    ],
    ids=["shape", "infinite", "negative", "zero", "number"],
)
def test_the_flow_refuses(arguments, message):
    with pytest.raises(LmcompressError, match=message):
        earth_mover_flow(*arguments)


def test_without_pot_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_pot(name, *args, **kwargs):
        if name == "ot":
            raise ImportError("No module named 'ot'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pot)
    with pytest.raises(ImportError, match=r'pip install "lmcompress\[emd\]"'):
        earth_mover_flow(torch.zeros(2, 2))


def states(layers, width, seed):
    return list(torch.randn(layers, 3, 4, width, generator=torch.Generator().manual_seed(seed)))


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])


def test_emd_of_one_layer_each_is_hidden_mse():
    student, teacher = states(1, 5, 0), states(1, 5, 1)
    torch.testing.assert_close(emd_hidden_mse(student, teacher, MASK), hidden_mse(student[0], teacher[0], MASK))


def test_emd_is_zero_for_the_same_layers_in_any_order_and_positive_otherwise():
    teacher = states(3, 5, 0)
    torch.testing.assert_close(emd_hidden_mse(teacher[::-1], teacher, MASK), torch.zeros(3))
    assert (emd_hidden_mse(states(2, 5, 1), teacher, MASK) > 0).all()


def test_emd_of_a_batch_is_that_of_its_examples():
    student, teacher = states(2, 5, 0), states(3, 5, 1)
    alone = [
        emd_hidden_mse([s[b : b + 1] for s in student], [t[b : b + 1] for t in teacher], MASK[b : b + 1])
        for b in range(3)
    ]
    torch.testing.assert_close(emd_hidden_mse(student, teacher, MASK), torch.cat(alone))


def test_emd_does_not_see_padding():
    student, teacher = states(2, 5, 0), states(3, 5, 1)
    before = emd_hidden_mse(student, teacher, MASK)
    for hidden in student + teacher:
        hidden[MASK == 0] = float("nan")
    torch.testing.assert_close(emd_hidden_mse(student, teacher, MASK), before)


def test_emd_trains_student_and_projection_through_the_costs_only():
    student, teacher = states(2, 3, 0), states(3, 5, 1)
    projection = Projection(3, 5, seed=0)
    for hidden in student:
        hidden.requires_grad_()
    emd_hidden_mse(student, teacher, MASK, projection=projection).sum().backward()
    assert all(hidden.grad.abs().sum() > 0 for hidden in student) and projection.weight.grad.abs().sum() > 0


def test_a_teacher_layer_without_weight_does_not_matter():
    student, teacher = states(2, 5, 0), states(3, 5, 1)
    weights = torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(
        emd_hidden_mse(student, teacher, MASK, teacher_weights=weights), emd_hidden_mse(student, teacher[:2], MASK)
    )


def test_emd_refuses_no_layers_and_unequal_widths():
    with pytest.raises(LmcompressError, match="need layers on both sides, got 0"):
        emd_hidden_mse([], states(1, 5, 0), MASK)
    with pytest.raises(LmcompressError, match="add a projection"):
        emd_hidden_mse(states(1, 3, 0), states(1, 5, 0), MASK)


def test_cost_attention_keeps_distributions_and_prefers_layers_that_match_cheaply():
    costs = emd_costs(states(2, 5, 0), states(3, 5, 1), MASK)
    costs = costs * torch.tensor([1.0, 5.0])[None, :, None]
    student, teacher = torch.full((2,), 1 / 2), torch.full((3,), 1 / 3)
    new_student, new_teacher = cost_attention(earth_mover_flow(costs), costs, student, teacher)
    for weights in (new_student, new_teacher):
        assert weights.sum().item() == pytest.approx(1, abs=1e-6)
        assert (weights > 0).all() and not weights.requires_grad
    assert new_student[0] > new_student[1]


def test_cost_attention_divides_the_cost_by_the_weight_that_carried_it():
    cost, weights = torch.tensor([[3.0, 9.0], [9.0, 2.0]]), torch.tensor([0.2, 0.8])
    # all flow on the diagonal: the cost of a layer by unit of weight is 3 and 2
    for updated in cost_attention(torch.diag(weights), cost, weights, weights):
        torch.testing.assert_close(updated, torch.tensor([2 / 5, 3 / 5]))


def test_cost_attention_leaves_equal_costs_alone():
    cost = torch.ones(2, 2)
    weights = torch.full((2,), 0.5)
    for updated in cost_attention(earth_mover_flow(cost), cost, weights, weights):
        torch.testing.assert_close(updated, weights)


def test_cost_attention_refuses():
    half, third = torch.full((2,), 0.5), torch.full((3,), 1 / 3)
    with pytest.raises(LmcompressError, match=r"must have shape \(..., 2, 3\)"):
        cost_attention(torch.ones(2, 2), torch.ones(2, 2), half, third)
    with pytest.raises(LmcompressError, match="layer weights must be > 0"):
        cost_attention(torch.ones(2, 2), torch.ones(2, 2), half, torch.tensor([1.0, 0.0]))
