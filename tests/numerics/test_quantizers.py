"""quantizers: the papers' formulas and gradients by NumPy; packing is exact; scales are shared as asked."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcompress.errors import LmcompressError
from lmcompress.numerics.grids import (
    STRETCHED_GRID,
    PerGroup,
    PerRow,
    PerTensor,
    mean_abs,
    symmetric_grid,
    unsigned_grid,
)
from lmcompress.numerics.packing import dequantize, pack, unpack
from lmcompress.numerics.quantizers.base import check_finite, nearest_levels
from lmcompress.numerics.quantizers.closed_form import binary, laq, tbt, twn
from lmcompress.numerics.quantizers.learned import (
    dynamic_scaling,
    elastic,
    initial_clip,
    initial_elastic,
    initial_gamma,
    initial_step,
    lsq,
    pact,
)
from lmcompress.numerics.quantizers.ranges import mse_clip, mse_limits, percentile_clip, percentile_limits
from lmcompress.numerics.quantizers.registry import QUANTIZERS, quantizer_for
from lmcompress.numerics.quantizers.uniform import affine, asymmetric, nearest_codes, symmetric

ALL = [(name, bits) for name, quantizer in QUANTIZERS.items() for bits in quantizer.bits]
GRANULARITIES = [PerTensor(), PerRow(), PerGroup(4)]
LEARNED = [(name, bits) for name, bits in ALL if QUANTIZERS[name].learned]
WITH_ZERO = ["ternary", 2, 3, 4, 8]

each = pytest.mark.parametrize(("name", "bits"), ALL, ids=lambda value: str(value))
each_learned = pytest.mark.parametrize(("name", "bits"), LEARNED, ids=lambda value: str(value))
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: type(g).__name__)


def weights(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # rows of different size, with outliers, off centre
    rows = torch.rand(shape[0], *(1,) * (len(shape) - 1), generator=generator) + 0.1
    return 0.1 * rows * (torch.randn(shape, generator=generator) ** 3 + 0.2)


def run(name, w, bits, granularity, state=None):
    quantizer = QUANTIZERS[name]
    if state is None and quantizer.initial is not None:
        state = quantizer.initial(w, bits=bits, granularity=granularity)
    return quantizer.function(w, state, bits=bits, granularity=granularity)


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@each
def test_packed_and_unpacked_numbers_are_the_values_to_the_bit(name, bits):
    for granularity in GRANULARITIES:
        w = weights(5, 24)
        result = run(name, w, bits, granularity)
        assert result.scales.shape == granularity.scale_shape(w.shape) and (result.scales > 0).all()
        assert result.scales.dtype == result.values.dtype == torch.float32 and not result.scales.requires_grad
        codes = unpack(pack(result.codes, result.grid), w.shape, result.grid)
        assert torch.equal(codes, result.codes) and codes.dtype == result.codes.dtype
        again = dequantize(codes, result.scales, granularity=granularity, zero_points=result.zero_points)
        assert same_bits(again, result.values)


@given(st.sampled_from(ALL), st.sampled_from(GRANULARITIES), st.integers(0, 10_000), st.floats(-25, 25))
@settings(deadline=None)
def test_packing_is_exact_for_weights_of_any_size(chosen, granularity, seed, power):
    name, bits = chosen
    w = weights(3, 8, seed=seed) * 2.0**power
    w[1] = 0.0
    result = run(name, w, bits, granularity)
    again = dequantize(result.codes, result.scales, granularity=granularity, zero_points=result.zero_points)
    assert same_bits(again, result.values)


@each
def test_arithmetic_is_float32_whatever_the_autocast(name, bits):
    for granularity in GRANULARITIES:
        w = weights(4, 8).bfloat16()
        expected = run(name, w.float(), bits, granularity)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = run(name, w, bits, granularity)
        assert same_bits(found.values, expected.values) and same_bits(found.scales, expected.scales)
        assert torch.equal(found.codes, expected.codes)


@each
def test_a_row_is_quantized_as_a_tensor_of_its_own(name, bits):
    w = weights(4, 12)
    by_row = run(name, w, bits, PerRow())
    rows = torch.cat([run(name, row.unsqueeze(0), bits, PerTensor()).values for row in w])
    # sums over one axis and over all are not taken in the same order
    torch.testing.assert_close(by_row.values, rows)
    torch.testing.assert_close(run(name, w, bits, PerGroup(12)).values, by_row.values)
    groups = run(name, w.reshape(12, 4), bits, PerRow()).values.reshape(4, 12)
    torch.testing.assert_close(run(name, w, bits, PerGroup(4)).values, groups)


@each
def test_the_layout_in_memory_makes_no_difference(name, bits):
    for granularity in GRANULARITIES:
        w = weights(6, 8)
        transposed = w.t().contiguous().t()
        torch.testing.assert_close(
            run(name, transposed, bits, granularity).values, run(name, w, bits, granularity).values
        )


@each
def test_weights_twice_as_great_have_values_twice_as_great(name, bits):
    w = weights(4, 16)
    assert torch.equal(run(name, 4 * w, bits, PerRow()).values, 4 * run(name, w, bits, PerRow()).values)


@pytest.mark.parametrize(
    ("name", "bits"),
    [c for c in ALL if c[0] != "lsq" and "asym" not in c[0] and c != ("elastic", 3) and c != ("elastic", 4)],
)
def test_grids_around_zero_are_odd(name, bits):
    w = weights(4, 16)
    assert torch.equal(run(name, -w, bits, PerRow()).values, -run(name, w, bits, PerRow()).values)


@each
def test_rounding_what_was_rounded_changes_nothing(name, bits):
    for granularity in GRANULARITIES:
        result = run(name, weights(4, 16), bits, granularity)
        again = nearest_codes(
            result.values, result.scales, grid=result.grid, granularity=granularity, zero_points=result.zero_points
        )
        assert torch.equal(again, result.codes)


@each
@each_granularity
def test_zeros_stay_zeros_with_gradients_that_are_numbers(name, bits, granularity):
    w = weights(3, 8)
    w[0] = 0.0
    state = QUANTIZERS[name].initial and QUANTIZERS[name].initial(w, bits=bits, granularity=granularity)
    if QUANTIZERS[name].learned:
        state.requires_grad_()
    w.requires_grad_()
    result = run(name, w, bits, granularity, state)
    result.values.sum().backward()
    assert (
        result.values.isfinite().all()
        and w.grad.isfinite().all()
        and (state is None or state.grad is None or state.grad.isfinite().all())
    )
    if granularity != PerTensor() and result.grid.levels % 2:
        assert not result.values[0].any()


@each
def test_what_pruning_left_empty_is_quantized_to_nothing(name, bits):
    for shape, granularity in product([(0, 4), (4, 0)], GRANULARITIES):
        result = run(name, torch.empty(shape), bits, granularity)
        assert result.values.shape == result.codes.shape == shape
        assert dequantize(result.codes, result.scales, granularity=granularity).shape == shape


@each_learned
@each_granularity
def test_scales_that_were_driven_below_zero_still_learn(name, bits, granularity):
    w = weights(3, 8)
    state = torch.full(granularity.scale_shape(w.shape), -1.0, requires_grad=True)
    result = run(name, w, bits, granularity, state)
    assert (result.scales > 0).all() and result.values.isfinite().all()
    (result.values * w.sign()).sum().backward()
    assert (state.grad > 0).all()


@each
def test_gradients_reach_weights_and_learned_states_only(name, bits):
    w = weights(4, 8).requires_grad_()
    quantizer = QUANTIZERS[name]
    state = quantizer.initial and quantizer.initial(w.detach(), bits=bits, granularity=PerRow()).requires_grad_()
    result = run(name, w, bits, PerRow(), state)
    gradient = torch.randn_like(w)
    result.values.backward(gradient)
    passed = w.grad == gradient
    assert (passed | (w.grad == 0)).all() and passed.float().mean() > 0.4
    if state is not None:
        assert (state.grad is not None and state.grad.abs().sum() > 0) == quantizer.learned


# what each paper says


def nearest_of(levels, x):
    levels = np.asarray(levels, dtype=np.float64)
    return levels[np.abs(x[..., None] - levels).argmin(axis=-1)]


def case(granularity_rows, seed=0, shape=(6, 20)):
    """A weight, gradient and where scales are shared by rows or not, as NumPy's float64."""
    w, g = weights(*shape, seed=seed), torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    axis = 1 if granularity_rows else None
    return w, g, w.double().numpy(), g.double().numpy(), axis


def total(x, axis):
    return x.sum(axis=axis, keepdims=True).reshape(-1, 1)


@pytest.mark.parametrize("by_row", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize("bits", WITH_ZERO)
@pytest.mark.parametrize("pass_outside", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.6, 2.3])
def test_dynamic_scaling_and_its_gradient_are_the_papers(by_row, bits, pass_outside, gamma):
    w, g, wn, gn, axis = case(by_row)
    granularity = PerRow() if by_row else PerTensor()
    n = 1 if bits == "ternary" else 2 ** (bits - 1) - 1
    mean = np.abs(wn).mean(axis=axis, keepdims=True)
    alpha = gamma * mean
    q = nearest_of(np.arange(-n, n + 1) / n, np.clip(wn / alpha, -1, 1))
    outside = np.abs(wn) >= alpha
    # METHODS 1.4
    of_gamma = total(gn * mean * np.where(outside, q, q - wn / alpha), axis)

    state = torch.full(granularity.scale_shape(w.shape), gamma, requires_grad=True)
    w.requires_grad_()
    result = dynamic_scaling(w, state, bits=bits, granularity=granularity, pass_outside=pass_outside)
    result.values.backward(g)
    np.testing.assert_allclose(result.values.detach().numpy(), alpha * q, rtol=1e-5)
    np.testing.assert_allclose(state.grad.numpy(), of_gamma, rtol=1e-3, atol=1e-5)
    # nothing goes through the mean, which is data
    expected = g if pass_outside else torch.where(torch.from_numpy(outside), 0.0, g)
    assert torch.equal(w.grad, expected)


@given(st.integers(0, 10_000), st.floats(0.3, 3.0), st.sampled_from([2, 3, 4, 8]))
@settings(deadline=None)
def test_dynamic_scaling_is_what_autograd_makes_of_rounding_straight_through(seed, gamma, bits):
    n = 2 ** (bits - 1) - 1
    w, g = weights(3, 8, seed=seed).double(), torch.randn(3, 8, dtype=torch.float64)
    ours = torch.tensor([[gamma]], requires_grad=True)
    w.requires_grad_()
    dynamic_scaling(w, ours, bits=bits, pass_outside=False).values.backward(g.float())
    of_w, w.grad = w.grad, None

    theirs = torch.tensor(gamma, requires_grad=True)
    alpha = theirs.double() * w.detach().abs().mean()
    u = (w / alpha).clamp(-1, 1) * n
    (alpha * (u + (u.round() - u).detach()) / n).backward(g)
    torch.testing.assert_close(of_w, w.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.squeeze(), theirs.grad, rtol=1e-3, atol=1e-4)


@each_granularity
def test_dynamic_scaling_starts_at_the_mean_and_has_three_levels_at_two_bits(granularity):
    w = weights(4, 16)
    gamma = initial_gamma(w, bits=2, granularity=granularity)
    result = dynamic_scaling(w, gamma, bits=2, granularity=granularity)
    assert torch.equal(result.scales, mean_abs(w, granularity))
    assert result.codes.unique().tolist() == [-1, 0, 1] and result.grid.levels == 3
    assert torch.equal(dynamic_scaling(w, gamma, bits="ternary", granularity=granularity).codes, result.codes)
    thresholds = granularity.spread(result.scales / 2, w.shape)
    assert torch.equal(granularity.split(w).abs() > thresholds, granularity.split(result.codes) != 0)


@pytest.mark.parametrize("by_row", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize("bits", WITH_ZERO)
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_pact_learns_from_what_it_cuts_alone(by_row, bits, share):
    w, g, wn, gn, axis = case(by_row)
    granularity = PerRow() if by_row else PerTensor()
    n = 1 if bits == "ternary" else 2 ** (bits - 1) - 1
    state = initial_clip(w, granularity=granularity) * share
    alpha = state.double().numpy()
    outside = np.abs(wn) >= alpha
    assert outside.any()
    state.requires_grad_()
    w.requires_grad_()
    result = pact(w, state, bits=bits, granularity=granularity)
    result.values.backward(g)
    levels = nearest_of(np.arange(-n, n + 1) / n, np.clip(wn / alpha, -1, 1))
    np.testing.assert_allclose(result.values.detach().numpy(), alpha * levels, rtol=1e-5)
    np.testing.assert_allclose(state.grad.numpy(), total(gn * np.sign(wn) * outside, axis), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(w.grad.double().numpy(), np.where(outside, 0, gn))


def lsq_reference(wn, gn, s, low, high, axis, inside=None):
    v = wn / s
    code = nearest_of(np.arange(low, high + 1), np.clip(v, low, high))
    slope = np.where(v <= low, low, np.where(v >= high, high, code - v))
    count = wn.size if axis is None else wn.shape[1]
    return s * code, total(gn * slope, axis) / math.sqrt(count * high), (v <= low) | (v >= high)


@pytest.mark.parametrize("by_row", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize("bits", WITH_ZERO)
@pytest.mark.parametrize("start", [initial_step, initial_elastic], ids=["lsq", "elastic"])
def test_lsq_and_its_gradient_are_the_papers(by_row, bits, start):
    if start is initial_elastic and bits not in (3, 4):
        return
    w, g, wn, gn, axis = case(by_row)
    granularity = PerRow() if by_row else PerTensor()
    low, high = (-1, 1) if bits == "ternary" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    # a little less, for in float32 the greatest weight lies on either side of the greatest code
    state = start(w, bits=bits, granularity=granularity) * 0.97
    expected = lsq_reference(wn, gn, state.double().numpy(), low, high, axis)
    state.requires_grad_()
    w.requires_grad_()
    result = (lsq if start is initial_step else elastic)(w, state, bits=bits, granularity=granularity)
    result.values.backward(g)
    np.testing.assert_allclose(result.values.detach().numpy(), expected[0], rtol=1e-5)
    np.testing.assert_allclose(state.grad.numpy(), expected[1], rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(w.grad.double().numpy(), np.where(expected[2], 0, gn))


def test_first_steps_are_the_papers():
    w = weights(4, 16)
    magnitudes = np.abs(w.numpy())
    for bits, greatest in [("ternary", 1), (2, 1), (3, 3), (4, 7), (8, 127)]:
        expected = 2 * magnitudes.mean(axis=1, keepdims=True) / math.sqrt(greatest)
        np.testing.assert_allclose(initial_step(w, bits=bits, granularity=PerRow()).numpy(), expected, rtol=1e-6)
    for bits, share in [("ternary", 1), (2, 1), (3, 3), (4, 7)]:
        expected = magnitudes.max(axis=1, keepdims=True) / share
        np.testing.assert_allclose(initial_elastic(w, bits=bits, granularity=PerRow()).numpy(), expected, rtol=1e-6)
    expected = magnitudes.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(initial_elastic(w, bits=1, granularity=PerRow()).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("by_row", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize(
    ("bits", "levels", "edge"),
    [(2, [-0.75, -0.25, 0.25, 0.75], 0.99), ("ternary", [-2 / 3, 0, 2 / 3], 0.99), (1, [-1, 1], 1.0)],
)
def test_elastic_grids_and_their_gradients_are_the_papers(by_row, bits, levels, edge):
    w, g, wn, gn, axis = case(by_row)
    granularity = PerRow() if by_row else PerTensor()
    state = initial_elastic(w, bits=bits, granularity=granularity) * 0.7
    alpha = state.double().numpy()
    u = wn / alpha
    q = nearest_of(levels, u)
    outside = (u <= -edge) | (u >= edge)
    slope = q if bits == 1 else np.where(outside, q, q - u)
    count = wn.size if axis is None else wn.shape[1]
    state.requires_grad_()
    w.requires_grad_()
    result = elastic(w, state, bits=bits, granularity=granularity)
    result.values.backward(g)
    np.testing.assert_allclose(result.values.detach().numpy(), alpha * q, rtol=1e-5)
    np.testing.assert_allclose(state.grad.numpy(), total(gn * slope, axis) / math.sqrt(count), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(w.grad.double().numpy(), np.where(outside, 0, gn))
    assert len(result.codes.unique()) == len(levels)


@each_granularity
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_laq_is_a_fixed_point_no_worse_than_where_it_started(granularity, bits):
    w = weights(4, 16)
    errors = []
    for iterations in range(12):
        result = laq(w, bits=bits, granularity=granularity, iterations=iterations)
        errors.append((result.values - w).square().sum().item())
    assert errors[-1] <= (symmetric(w, bits=bits, granularity=granularity).values - w).square().sum() * (1 + 1e-5)
    assert all(after <= before * (1 + 1e-5) for before, after in zip(errors, errors[1:], strict=False))
    split, codes = granularity.split(w).double(), granularity.split(result.codes).double()
    axes = granularity.axes(split.dim())
    best = (split * codes).sum(axes) / codes.square().sum(axes)
    torch.testing.assert_close(result.scales.double().flatten(), best.flatten(), rtol=2e-3, atol=0)


def test_laq_weighs_by_curvature():
    w, d = weights(1, 40), torch.rand(1, 40) ** 4
    weighed = (d * (laq(w, bits=2, curvature=d).values - w).square()).sum()
    assert weighed < (d * (laq(w, bits=2).values - w).square()).sum()
    torch.testing.assert_close(laq(w, bits=2, curvature=torch.full_like(w, 3)).values, laq(w, bits=2).values)
    torch.testing.assert_close(laq(w, bits=1, curvature=d).scales, (d * w.abs()).sum(1, True) / d.sum())
    assert torch.equal(laq(w, bits=1).codes, binary(w).codes)


def test_laq_refuses_a_curvature_that_is_none():
    w = weights(2, 4)
    with pytest.raises(LmcompressError, match=r"curvature must have the weight's shape \(2, 4\), got \(4,\)"):
        laq(w, bits=2, curvature=torch.ones(4))
    with pytest.raises(
        LmcompressError, match="curvature must be >= 0 everywhere, got one of -1.0; take the square root"
    ):
        laq(w, bits=2, curvature=-torch.ones(2, 4))


def test_twn_by_hand():
    w = weights(5, 30)
    result = twn(w, granularity=PerRow())
    for row, values in zip(w.tolist(), result.values.tolist(), strict=True):
        threshold = 0.7 * sum(map(abs, row)) / len(row)
        above = [abs(x) for x in row if abs(x) > threshold]
        expected = [math.copysign(sum(above) / len(above), x) if abs(x) > threshold else 0.0 for x in row]
        assert values == pytest.approx(expected, rel=1e-5)


def test_tbt_and_binary_by_hand():
    w = weights(5, 30)
    mean = np.abs(w.numpy()).mean(axis=1, keepdims=True)
    scale = 4 / 3 * mean
    expected = scale * nearest_of([-1, 0, 1], w.numpy() / scale)
    np.testing.assert_allclose(tbt(w, granularity=PerRow()).values.numpy(), expected, rtol=1e-5)
    expected = mean * np.where(w.numpy() >= 0, 1, -1)
    np.testing.assert_allclose(binary(w, granularity=PerRow()).values.numpy(), expected, rtol=1e-5)


def test_tbt_has_the_least_error_of_evenly_spread_weights():
    w = torch.linspace(-1, 1, 20_001).unsqueeze(0)
    least = (tbt(w).values - w).square().mean()
    for share in (0.5, 0.6, 0.7, 0.8):
        assert least <= (symmetric(w, torch.tensor([[share]]), bits=2).values - w).square().mean() + 1e-6


@each_granularity
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_min_max_is_off_by_half_a_step_at_most(granularity, bits):
    w = weights(4, 16)
    for result, slack in [
        (symmetric(w, bits=bits, granularity=granularity), 0.5),
        (asymmetric(w, bits=bits, granularity=granularity), 1.0),
    ]:
        # of an asymmetric range the ends lie up to half a step beyond, for the zero point is whole
        error = (granularity.split(result.values) - granularity.split(w)).abs()
        assert (error <= granularity.spread(result.scales, w.shape) * (slack + 1e-4)).all()


@pytest.mark.parametrize("bits", WITH_ZERO)
def test_asymmetric_by_hand(bits):
    w = weights(5, 30) + 0.03
    m = 2 if bits == "ternary" else 2**bits - 1
    low = np.minimum(w.numpy().min(axis=1, keepdims=True), 0)
    high = np.maximum(w.numpy().max(axis=1, keepdims=True), 0)
    s = (high - low) / m
    z = np.round(-low / s)
    result = asymmetric(w, bits=bits, granularity=PerRow())
    np.testing.assert_allclose(
        result.values.numpy(), s * (np.clip(np.round(w.numpy() / s) + z, 0, m) - z), rtol=1e-5, atol=1e-8
    )
    np.testing.assert_array_equal(result.zero_points.numpy(), z)
    assert result.codes.dtype == result.zero_points.dtype == torch.uint8
    # one-sided weights keep their zero too
    assert asymmetric(w.abs() + 1, bits=bits).zero_points.item() == 0
    assert asymmetric(-w.abs() - 1, bits=bits).zero_points.item() == m


def test_a_range_that_float32_cannot_span_is_no_infinity():
    w = torch.tensor([[-3e38, 3e38, 0.0]])
    result = asymmetric(w, bits=8)
    assert result.values.isfinite().all() and result.scales.isfinite().all()


@given(st.integers(0, 1000), st.floats(1, 100), st.integers(1, 60))
@settings(deadline=None)
def test_percentiles_are_numpys(seed, percentile, length):
    w = weights(3, length, seed=seed)
    clip = percentile_clip(w, granularity=PerRow(), percentile=percentile)
    place = percentile * length / 100
    if abs(place - round(place)) < 1e-4 and place != length:
        return
    expected = np.percentile(np.abs(w.numpy()), percentile, axis=1, method="inverted_cdf", keepdims=True)
    np.testing.assert_array_equal(clip.numpy(), expected)
    limits = percentile_limits(w, granularity=PerRow(), percentile=percentile)
    assert (limits[0] <= limits[1]).all()


def test_percentile_limits_leave_the_same_share_on_either_side():
    w = torch.arange(1.0, 1001.0).reshape(1, 1000)
    assert percentile_limits(w, percentile=99).flatten().tolist() == [6.0, 995.0]
    assert percentile_limits(w, percentile=100).flatten().tolist() == [1.0, 1000.0]


@each_granularity
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_clip_of_least_error_is_found(granularity, bits):
    w = weights(4, 64, seed=3)
    size = granularity.scale_shape(w.shape)

    def error(result):
        split = (granularity.split(result.values) - granularity.split(w)).square()
        return split.mean(granularity.axes(split.dim())).reshape(size)

    greatest = initial_clip(w, granularity=granularity)
    tried = [error(symmetric(w, greatest * i / 400, bits=bits, granularity=granularity)) for i in range(7, 401)]
    found = error(symmetric(w, mse_clip(w, bits=bits, granularity=granularity), bits=bits, granularity=granularity))
    # of a few numbers the error is a jagged function of the clip
    slack = 1.6 if granularity == PerGroup(4) else 1.1
    assert (found <= torch.stack(tried).amin(0) * slack).all()
    assert (found <= tried[-1] * (1 + 1e-4)).all()
    limits = mse_limits(w, bits=bits, granularity=granularity)
    shrunk = error(asymmetric(w, limits, bits=bits, granularity=granularity))
    assert (shrunk <= error(asymmetric(w, bits=bits, granularity=granularity)) * (1 + 1e-6)).all()


def shares_of_the_whole(error, ones):
    """The search as it is described, with nothing left out."""
    best, least = ones, error(ones)
    coarse = [ones * 2 ** (-power / 4) for power in range(1, 25)]
    for shares in coarse:
        now = error(shares)
        best, least = torch.where(now < least, shares, best), torch.minimum(now, least)
    start = best
    for step in (-3, -2, -1, 1, 2, 3):
        shares = (start * 2 ** (step / 16)).clamp(max=1.0)
        now = error(shares)
        best, least = torch.where(now < least, shares, best), torch.minimum(now, least)
    return best


@pytest.mark.parametrize("granularity", [PerRow(), PerGroup(32), PerTensor()], ids=str)
@pytest.mark.parametrize("bits", ["ternary", 3, 4, 8])
def test_a_search_in_blocks_of_rows_finds_the_very_scales_of_one_over_all(granularity, bits, monkeypatch):
    generator = torch.Generator().manual_seed(7)
    # rows of different size and shape, some with outliers, one of zeros, one that is uniform
    w = torch.randn(40, 64, generator=generator) * torch.logspace(-3, 2, 40)[:, None]
    w[3], w[5, 0], w[8] = 0.0, 1000.0, torch.linspace(-1, 1, 64)
    grid, split = symmetric_grid(bits), granularity.split(w)
    greatest = initial_clip(w, granularity=granularity)

    def error(share):
        scale = granularity.spread(greatest * share / grid.high, w.shape)
        rounded = nearest_levels(split, scale, grid) * scale
        return (rounded - split).square().mean(granularity.axes(split.dim())).reshape(greatest.shape)

    expected = greatest * shares_of_the_whole(error, torch.ones_like(greatest))
    whole = mse_clip(w, bits=bits, granularity=granularity)
    limits = mse_limits(w, bits=bits, granularity=granularity)
    monkeypatch.setattr("lmcompress.numerics.quantizers.ranges._BLOCK", 3 * 64)
    assert torch.equal(whole, expected)
    assert torch.equal(mse_clip(w, bits=bits, granularity=granularity), expected)
    assert torch.equal(mse_limits(w, bits=bits, granularity=granularity), limits)
    # as GPT-2 stores it
    stored = w.t().contiguous().t()
    torch.testing.assert_close(mse_clip(stored, bits=bits, granularity=granularity), expected, rtol=0.05, atol=0)


def test_numbers_whose_sum_overflows_are_finite_and_the_others_are_named():
    check_finite(torch.full((4,), 3e38))
    wrong = torch.tensor([1.0, float("nan"), float("inf"), float("-inf")])
    with pytest.raises(LmcompressError, match="got 3 of 4 that are NaN or infinite"):
        check_finite(wrong)
    with pytest.raises(LmcompressError, match="got 2 of 2"):
        check_finite(wrong[2:])


def test_given_ranges_stop_the_gradient_of_what_they_cut():
    w = torch.tensor([[-2.0, -0.5, 0.5, 2.0]], requires_grad=True)
    symmetric(w, torch.tensor([[1.0]]), bits=4).values.sum().backward()
    assert w.grad.tolist() == [[0, 1, 1, 0]]
    w.grad = None
    asymmetric(w, torch.tensor([[[-1.0]], [[3.0]]]), bits=4).values.sum().backward()
    assert w.grad.tolist() == [[0, 1, 1, 1]]
    w.grad = None
    (symmetric(w, bits=4).values + asymmetric(w, bits=4).values).sum().backward()
    assert w.grad.tolist() == [[2, 2, 2, 2]]


def test_columns_can_be_rounded_one_after_another():
    w = weights(4, 16)
    result = asymmetric(w, bits=4, granularity=PerGroup(4))
    columns = [
        nearest_codes(
            w[:, j : j + 1],
            result.scales[:, j // 4].unsqueeze(1),
            grid=unsigned_grid(4),
            granularity=PerRow(),
            zero_points=result.zero_points[:, j // 4].unsqueeze(1),
        )
        for j in range(16)
    ]
    assert torch.equal(torch.cat(columns, dim=1), result.codes)
    assert nearest_codes(torch.tensor([[0.1, -9.0]]), torch.tensor([[0.0]]), grid=STRETCHED_GRID).tolist() == [[1, 1]]


# what comes in wrong


@each
def test_weights_that_are_no_numbers_have_no_state_and_no_codes(name, bits):
    quantizer = QUANTIZERS[name]
    message = "weights must be finite to be quantized, got 1 of 8 that are NaN or infinite"
    state = quantizer.initial and quantizer.initial(weights(2, 4), bits=bits, granularity=PerTensor())
    for wrong in (float("nan"), float("inf"), -float("inf")):
        broken = weights(2, 4)
        broken[1, 2] = wrong
        if quantizer.initial is not None:
            with pytest.raises(LmcompressError, match=message):
                quantizer.initial(broken, bits=bits, granularity=PerTensor())
        result = run(name, broken, bits, PerTensor(), state)
        with pytest.raises(LmcompressError, match=message):
            result.codes  # noqa: B018


@each
def test_nan_is_not_hidden_from_training(name, bits):
    w = weights(2, 4)
    quantizer = QUANTIZERS[name]
    state = quantizer.initial and quantizer.initial(w, bits=bits, granularity=PerTensor())
    w[0, 0] = float("nan")
    assert run(name, w, bits, PerTensor(), state).values[0, 0].isnan()


def test_codes_of_a_diverged_scale_are_refused():
    w = weights(2, 4)
    with pytest.raises(LmcompressError, match="scales must be finite.*lower the learning rate of the scales"):
        lsq(w, torch.tensor([[float("inf")]]), bits=4).codes  # noqa: B018
    with pytest.raises(LmcompressError, match="weights must be finite"):
        nearest_codes(w / 0, torch.ones(1, 1), grid=STRETCHED_GRID)


@pytest.mark.parametrize(
    ("name", "bits", "message"),
    [
        ("lsqq", 4, "unknown weight quantizer 'lsqq'; did you mean 'lsq'"),
        ("twn", 4, "'twn' has bits ternary, 2, got 4; at 4 there are asymmetric_minmax, .*dynamic_scaling"),
        ("elastic", 8, "'elastic' has bits 1, ternary, 2, 3, 4, got 8; at 8 there are"),
        ("pact", 1, "'pact' has bits ternary, 2, 3, 4, 8, got 1; at 1 there are binary, elastic, laq"),
        ("lsq", 5, "has bits ternary, 2, 3, 4, 8, got 5$"),
        ("binary", True, "has bits 1, got True"),
    ],
)
def test_quantizers_are_found_by_name_and_bits(name, bits, message):
    with pytest.raises(LmcompressError, match=message):
        quantizer_for(name, bits)
    if name in QUANTIZERS:
        with pytest.raises(LmcompressError, match="bits must be one of"):
            QUANTIZERS[name].function(weights(2, 4), torch.ones(1, 1), bits=bits)


@each_learned
def test_states_of_another_granularity_are_refused(name, bits):
    w = weights(3, 8)
    with pytest.raises(LmcompressError, match=r"of weights of shape \(3, 8\) must have shape \(3, 2\) \(PerGroup"):
        run(name, w, bits, PerGroup(4), torch.ones(3, 1))


@each
def test_groups_that_do_not_divide_are_refused(name, bits):
    with pytest.raises(LmcompressError, match=r"got 5 for rows of 8.*Use PerGroup\(4\)"):
        run(name, weights(3, 8), bits, PerGroup(5), torch.ones(3, 2))


def test_limits_and_percentiles_are_checked():
    w = weights(3, 8)
    with pytest.raises(
        LmcompressError, match=r"limits of weights of shape \(3, 8\) must have shape \(2, 3, 1\), got \(2,\)"
    ):
        asymmetric(w, torch.ones(2), bits=4, granularity=PerRow())
    for percentile in (0, -1, 100.1, float("nan")):
        for clip in (percentile_clip, percentile_limits):
            with pytest.raises(LmcompressError, match="must be above 0 and at most 100, got .* is in per cent"):
                clip(w, percentile=percentile)


def test_affine_of_a_range_that_does_not_hold_zero_is_widened():
    x = torch.tensor([0.0, 2.0, 3.0])
    result = affine(x, torch.tensor([[2.0]]), torch.tensor([[3.0]]), unsigned_grid(2), PerTensor(), cut=True)
    assert result.values.tolist() == [0.0, 2.0, 3.0]
