import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcompress.distillation.losses.distributions import kl_divergence
from lmcompress.distillation.schedules import WEIGHT_SCHEDULES, cwsm, flsw
from lmcompress.errors import LmcompressError

each_weight = pytest.mark.parametrize("schedule", WEIGHT_SCHEDULES.values(), ids=WEIGHT_SCHEDULES)


def confidence(student, teacher, base, **options):
    """cwsm, called as flsw is."""
    return cwsm(student, base, **options)


each_temperature = pytest.mark.parametrize("schedule", [flsw, confidence], ids=["flsw", "cwsm"])


def logits(*shape, seed=0):
    return 3 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


@each_weight
@given(progress=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_weight_schedules_are_factors(schedule, progress):
    assert 0 <= schedule(progress) <= 1


@pytest.mark.parametrize(
    "name, start, middle, end",
    [("constant", 1, 1, 1), ("linear_decay", 1, 0.5, 0), ("linear_growth", 0, 0.5, 1), ("cosine_decay", 1, 0.5, 0)],
)
def test_weight_schedules_at_start_middle_and_end(name, start, middle, end):
    values = [WEIGHT_SCHEDULES[name](x) for x in (0.0, 0.5, 1.0)]
    assert values == pytest.approx([start, middle, end], abs=1e-12)


@each_weight
@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_weight_schedules_refuse_progress_outside_training(schedule, progress):
    with pytest.raises(LmcompressError, match=r"progress must be the share of training done, in \[0, 1\]"):
        schedule(progress)


@each_temperature
def test_temperatures_are_float32_per_row_detached_and_fit_the_losses(schedule):
    student, teacher = logits(2, 3, 5)
    student = student.bfloat16().requires_grad_()
    temperatures = schedule(student, teacher.bfloat16(), 4.0)
    assert temperatures.shape == (2, 3) and temperatures.dtype == torch.float32 and not temperatures.requires_grad
    assert kl_divergence(student, teacher, temperature=temperatures).isfinite().all()


@each_temperature
def test_without_beta_every_temperature_is_the_base(schedule):
    student, teacher = logits(6, 5)
    torch.testing.assert_close(schedule(student, teacher, 4.0, beta=0.0), torch.full((6,), 4.0))


@each_temperature
@given(seed=st.integers(0, 1000), beta=st.floats(0, 100))
@settings(max_examples=20, deadline=None)
def test_temperatures_stay_within_their_limits_where_the_formula_would_not(schedule, seed, beta):
    student, teacher = logits(4, 20, seed=seed)
    temperatures = schedule(student, teacher, 4.0, beta=beta, minimum=2.0, maximum=9.0)
    assert (temperatures >= 2).all() and (temperatures <= 9).all()


def test_flsw_is_its_formula():
    student, teacher = logits(6, 5)
    cosine = (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
    weights = (1 - cosine) ** 1.5
    expected = 4 + 0.7 * (weights.mean() - weights)
    torch.testing.assert_close(flsw(student, teacher, 4.0, beta=0.7, gamma=1.5), expected)


def test_cwsm_is_its_formula():
    student, teacher = logits(6, 5)
    weights = 1 / (student.softmax(-1).max(-1).values + 1e-3)
    expected = 4 + 0.7 * (weights.mean() - weights)
    torch.testing.assert_close(cwsm(student, 4.0, beta=0.7), expected)


def test_flsw_is_sharper_where_student_and_teacher_disagree():
    teacher = torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    agreeing, disagreeing = flsw(torch.tensor([[3.0, 0.0], [0.0, 3.0]]), teacher, 4.0)
    assert disagreeing < 4 < agreeing


def test_cwsm_is_sharper_where_the_student_is_unsure():
    student = torch.tensor([[9.0, 0.0], [0.1, 0.0]])
    sure, unsure = cwsm(student, 4.0)
    assert unsure < 4 < sure


def test_equal_logits_with_a_fractional_gamma_give_no_nan():
    student, _ = logits(50, 7)
    assert flsw(student, student, 4.0, gamma=0.5).isfinite().all()


@each_temperature
def test_with_a_mask_padding_does_not_move_the_others(schedule):
    student, teacher = logits(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    temperatures = schedule(student, teacher, 4.0, mask=mask)
    student[0, 2] = torch.tensor([99.0, 0, 0, 0, -99.0])
    changed = schedule(student, teacher, 4.0, mask=mask)
    torch.testing.assert_close(changed[mask.bool()], temperatures[mask.bool()])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"minimum": 0.0}, "0 < minimum <= base <= maximum"),
        ({"minimum": 5.0}, "0 < minimum <= base <= maximum.*minimum 5.0, base 4.0"),
        ({"maximum": 3.0}, "0 < minimum <= base <= maximum"),
        ({"beta": -1.0}, "beta must be >= 0"),
        ({"mask": torch.ones(3)}, r"shape \(2,\), got \(3,\)"),
    ],
    ids=["zero", "minimum", "maximum", "beta", "mask"],
)
@each_temperature
def test_temperature_schedules_refuse(schedule, options, message):
    with pytest.raises(LmcompressError, match=message):
        schedule(torch.zeros(2, 3), torch.zeros(2, 3), 4.0, **options)


def test_flsw_refuses_a_gamma_that_is_not_positive_and_two_vocabularies():
    with pytest.raises(LmcompressError, match="gamma must be > 0"):
        flsw(torch.zeros(2, 3), torch.zeros(2, 3), 4.0, gamma=0.0)
    with pytest.raises(LmcompressError, match="different vocabularies"):
        flsw(torch.zeros(2, 3), torch.zeros(2, 4), 4.0)
