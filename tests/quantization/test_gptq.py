"""GPTQ against a slow reference, and against plain rounding, which it must beat."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcompress.activations.hessian import output_error
from lmcompress.errors import LmcompressError
from lmcompress.numerics.grids import PER_TENSOR, PerGroup, PerRow
from lmcompress.numerics.packing import dequantize, pack, unpack
from lmcompress.numerics.quantizers.closed_form import laq, tbt
from lmcompress.numerics.quantizers.learned import initial_step as first_step
from lmcompress.numerics.quantizers.learned import lsq
from lmcompress.numerics.quantizers.ranges import mse_clip
from lmcompress.numerics.quantizers.uniform import asymmetric, nearest_codes, symmetric
from lmcompress.quantization.ptq.gptq import gptq

GRANULARITIES = [PER_TENSOR, PerRow(), PerGroup(4)]


def inputs(width, rows=200, seed=0):
    """Inputs that depend on one another, some greater than others, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    sizes = torch.rand(width, generator=generator) * 3
    return torch.randn(rows, width, generator=generator) @ mix * sizes + torch.randn(width, generator=generator)


def weights(out, width, seed=1):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def rounding(granularity, bits=3, function=symmetric):
    return lambda w: function(w, bits=bits, granularity=granularity)


def obq(weight, hessian, plain, places, damping):
    """Column by column, the inverse Hessian updated by elimination (Frantar et al. 2022, OBQ, equation 3)."""
    h = hessian.double().clone()
    mean = h.diagonal().mean().clone()
    for j in range(len(h)):
        if h[j, j] == 0:
            h[j, j] = mean
    h += damping * mean * torch.eye(len(h))
    inverse = torch.linalg.inv(h)
    w, codes = weight.double().clone(), torch.zeros(weight.shape)
    scales = plain.granularity.spread(plain.scales, weight.shape).expand_as(plain.granularity.split(weight))
    scales = scales.reshape(weight.shape)
    zeros = torch.zeros(weight.shape)
    if plain.zero_points is not None:
        spread = plain.granularity.spread(plain.zero_points.float(), weight.shape)
        zeros = spread.expand_as(plain.granularity.split(weight)).reshape(weight.shape)
    for j in places:
        scale, zero = scales[:, j].double(), zeros[:, j].double()
        codes[:, j] = ((w[:, j] / scale).round() + zero).clamp(plain.grid.low, plain.grid.high)
        error = (w[:, j] - (codes[:, j].double() - zero) * scale) / inverse[j, j]
        w -= torch.outer(error, inverse[j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes, scales, zeros


@pytest.mark.parametrize("order", [True, False], ids=["ordered", "in-order"])
@pytest.mark.parametrize("function", [symmetric, asymmetric], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("few", [4, 16])
def test_codes_are_those_of_column_by_column_elimination(granularity, function, order, few, monkeypatch):
    monkeypatch.setattr("lmcompress.quantization.ptq.gptq._FEW", few)
    if isinstance(granularity, PerGroup) and not order:
        pytest.skip("groups are rescaled on the way; see the next test")
    weight, x = weights(7, 12), inputs(12)
    x[:, 5] = 0
    hessian = x.T @ x
    plain = rounding(granularity, function=function)(weight)
    places = torch.argsort(hessian.diagonal(), descending=True, stable=True) if order else torch.arange(12)
    codes, scales, zeros = obq(weight, hessian, plain, places.tolist(), 0.01)
    values = ((codes - zeros) * scales).float()
    # rows that plain rounding serves better keep it
    better = output_error(weight, values, hessian) <= output_error(weight, plain.values, hessian)
    expected = torch.where(better[:, None], values, plain.values)
    assert better.sum() > 3
    for block_size in (1, 5, 128):
        found = gptq(weight, hessian, rounding(granularity, function=function), order=order, block_size=block_size)
        torch.testing.assert_close(found.values, expected)


def test_groups_in_order_take_their_scales_from_what_is_left_of_the_weights():
    weight, x = weights(6, 12), inputs(12)
    hessian = (x.T @ x).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12)
    inverse, w, values = torch.linalg.inv(damped), weight.double().clone(), torch.zeros(6, 12)
    for j in range(12):
        if j % 4 == 0:
            scales = symmetric(w[:, j : j + 4].float(), bits=3, granularity=PerRow()).scales[:, 0]
        values[:, j] = (w[:, j] / scales).round().clamp(-3, 3).float() * scales
        w -= torch.outer((w[:, j] - values[:, j]) / inverse[j, j], inverse[j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    plain = rounding(PerGroup(4))(weight).values
    better = output_error(weight, values, hessian) <= output_error(weight, plain, hessian)
    for block_size in (1, 6, 128):
        found = gptq(weight, hessian, rounding(PerGroup(4)), order=False, block_size=block_size).values
        torch.testing.assert_close(found, torch.where(better[:, None], values, plain))


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 6),
    groups=st.integers(1, 5),
    rows=st.integers(1, 30),
    bits=st.sampled_from(["ternary", 2, 3, 4, 8]),
    granularity=st.sampled_from(GRANULARITIES),
    function=st.sampled_from([symmetric, asymmetric]),
    order=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_output_is_worse_than_by_plain_rounding(out, groups, rows, bits, granularity, function, order, seed):
    width = 4 * groups
    weight, x = weights(out, width, seed), inputs(width, rows, seed)
    round_ = rounding(granularity, bits, function)
    found = gptq(weight, x.T @ x, round_, order=order)
    before, after = (output_error(weight, q.values, x.T @ x) for q in (round_(weight), found))
    assert (after <= before * (1 + 1e-6) + 1e-9).all()


@pytest.mark.parametrize("order", [True, False], ids=["ordered", "in-order"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_is_much_less_than_that_of_plain_rounding(bits, order):
    weight, x = weights(32, 48), inputs(48, 400)
    hessian = x.T @ x
    plain = output_error(weight, rounding(PerRow(), bits)(weight).values, hessian).sum()
    assert output_error(weight, gptq(weight, hessian, rounding(PerRow(), bits), order=order).values, hessian).sum() < (
        0.6 * plain
    )


def test_inputs_that_have_nothing_to_do_with_one_another_are_rounded_plainly():
    weight = weights(5, 8)
    found = gptq(weight, torch.diag(torch.arange(8.0)), rounding(PerRow(), 4))
    plain = rounding(PerRow(), 4)(weight)
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.values, plain.values)


def test_an_input_that_is_always_zero_is_rounded_and_leaves_the_others_alone():
    weight, x = weights(5, 9), inputs(9)
    x[:, 4] = 0
    others = [i for i in range(9) if i != 4]
    round_ = rounding(PER_TENSOR, 4)
    # the greatest weight, which makes the scale, is in both
    weight[:, 4] = 0.1
    found = gptq(weight, x.T @ x, round_)
    assert torch.equal(found.codes[:, 4], round_(weight).codes[:, 4])
    without = gptq(weight[:, others], x[:, others].T @ x[:, others], round_, damping=0.01 * 8 / 9)
    assert torch.equal(found.codes[:, others], without.codes)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("function", [symmetric, asymmetric], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("order", [True, False])
def test_what_comes_back_packs_exactly(granularity, function, order):
    weight, x = weights(6, 12), inputs(12)
    found = gptq(weight, x.T @ x, rounding(granularity, 4, function), order=order)
    codes = unpack(pack(found.codes, found.grid), weight.shape, found.grid)
    values = dequantize(codes, found.scales, granularity=granularity, zero_points=found.zero_points)
    assert torch.equal(values, found.values)
    assert found.scales.dtype == torch.float32 and found.levels.shape == granularity.split(weight).shape
    again = nearest_codes(
        found.values, found.scales, grid=found.grid, granularity=granularity, zero_points=found.zero_points
    )
    assert torch.equal(again, codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_neither_dtype_nor_scale_of_the_hessian_matters(dtype):
    weight, x = weights(6, 12).to(dtype), inputs(12)
    found = gptq(weight, x.T @ x, rounding(PerRow()))
    assert torch.equal(found.codes, gptq(weight.float(), (x.T @ x).double() / 200, rounding(PerRow())).codes)


QUANTIZERS = {
    "tbt": lambda w: tbt(w, bits=2, granularity=PerRow()),
    "laq": lambda w: laq(w, bits=3, granularity=PerRow()),
    "lsq": lambda w: lsq(w, first_step(w, bits=4, granularity=PerRow()), bits=4, granularity=PerRow()),
    "mse": lambda w: symmetric(w, mse_clip(w, bits=3, granularity=PerRow()), bits=3, granularity=PerRow()),
}


@pytest.mark.parametrize("round_", QUANTIZERS.values(), ids=QUANTIZERS)
def test_any_quantizer_gives_the_grid(round_):
    weight, x = weights(8, 16), inputs(16)
    found, plain = gptq(weight, x.T @ x, round_), round_(weight)
    assert found.grid == plain.grid and torch.equal(found.scales, plain.scales)
    errors = [output_error(weight, q.values, x.T @ x).sum() for q in (found, plain)]
    assert errors[0] < errors[1]


def test_few_inputs_are_enough_for_a_factor():
    weight, x = weights(4, 16), inputs(16, rows=2)
    assert torch.isfinite(gptq(weight, x.T @ x, rounding(PerRow()), damping=1e-12).values).all()


def test_what_cannot_be_is_refused():
    weight, hessian = weights(3, 4), torch.eye(4)
    with pytest.raises(LmcompressError, match=r"shape \(in, in\) for a weight \(out, in\), got \(3, 3\) for \(3, 4\)"):
        gptq(weight, torch.eye(3), rounding(PerRow()))
    with pytest.raises(LmcompressError, match="damping must be > 0, got 0"):
        gptq(weight, hessian, rounding(PerRow()), damping=0)
    with pytest.raises(LmcompressError, match="block size must be at least 1, got 0"):
        gptq(weight, hessian, rounding(PerRow()), block_size=0)
    with pytest.raises(LmcompressError, match="Hessian must be finite"):
        gptq(weight, hessian * torch.nan, rounding(PerRow()))
    with pytest.raises(LmcompressError, match="inputs that are not all 0"):
        gptq(weight, hessian * 0, rounding(PerRow()))
    with pytest.raises(LmcompressError, match="weights must be finite"):
        gptq(weight * torch.nan, hessian, rounding(PerRow()))
    with pytest.raises(LmcompressError, match="symmetric positive definite"):
        gptq(weight, torch.diag(torch.tensor([1e20, -1e22, 0.0, 0.0])), rounding(PerRow()))
