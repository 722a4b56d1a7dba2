"""activations: ranges of now, learned and calibrated, by NumPy; observers do not care how batches are cut."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcompress.errors import LmcompressError
from lmcompress.numerics.activations import (
    check_range,
    dynamic,
    initial_range,
    initial_step,
    learned,
    static,
)
from lmcompress.numerics.grids import PerTensor, PerToken
from lmcompress.numerics.observers import Histogram, MinMax
from lmcompress.numerics.packing import dequantize

BITS = [4, 8]
GRANULARITIES = [PerTensor(), PerToken()]
each_bits = pytest.mark.parametrize("bits", BITS)
each_symmetric = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: type(g).__name__)
STEP, OFFSET = torch.tensor([[0.07]]), torch.tensor([[-0.3]])
EVERY = {
    "dynamic": lambda x, bits: dynamic(x, bits=bits),
    "dynamic asymmetric": lambda x, bits: dynamic(x, bits=bits, symmetric=False),
    "dynamic per token": lambda x, bits: dynamic(x, bits=bits, granularity=PerToken()),
    "dynamic asymmetric per token": lambda x, bits: dynamic(x, bits=bits, symmetric=False, granularity=PerToken()),
    "dynamic clipped": lambda x, bits: dynamic(x, bits=bits, clip=1.5),
    "static": lambda x, bits: static(x, -1.0, 2.0, bits=bits),
    "static asymmetric": lambda x, bits: static(x, -1.0, 2.0, bits=bits, symmetric=False),
    "learned": lambda x, bits: learned(x, STEP, bits=bits),
    "learned asymmetric": lambda x, bits: learned(x, STEP, OFFSET, bits=bits),
}
each = pytest.mark.parametrize("quantize", EVERY.values(), ids=EVERY.keys())


def activations(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.3 + 0.2


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@each
@each_bits
@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 2, 5, 5), (7,)], ids=str)
def test_codes_scales_and_zero_points_make_the_values_to_the_bit(quantize, bits, shape):
    result = quantize(activations(*shape), bits)
    codes = result.codes
    assert codes.shape == result.values.shape == shape and result.values.dtype == torch.float32
    assert codes.dtype == (torch.int8 if result.zero_points is None else torch.uint8)
    assert len(codes.unique()) <= 2**bits
    again = dequantize(codes, result.scales, granularity=result.granularity, zero_points=result.zero_points)
    assert same_bits(again, result.values)


@each
@each_bits
def test_arithmetic_is_float32_whatever_the_autocast(quantize, bits):
    x = activations(2, 3, 8).bfloat16()
    expected = quantize(x.float(), bits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantize(x, bits)
    assert same_bits(found.values, expected.values)


@each
@each_bits
def test_zero_stays_zero_so_that_a_masked_probability_does(quantize, bits):
    x = activations(2, 3, 8)
    x[..., ::2] = 0.0
    assert not quantize(x, bits).values[..., ::2].any()
    assert not quantize(torch.zeros(2, 3, 8), bits).values.any()


@each
def test_layouts_and_empty_inputs_make_no_trouble(quantize):
    x = activations(4, 6)
    assert torch.equal(quantize(x.t().contiguous().t(), 8).values, quantize(x, 8).values)
    assert quantize(torch.empty(0, 6), 8).values.shape == (0, 6)
    assert quantize(torch.empty(3, 0), 8).codes.shape == (3, 0)


@each_bits
@each_symmetric
@each_granularity
def test_dynamic_by_hand(bits, symmetric, granularity):
    x = activations(2, 3, 8)
    rows = x.numpy().reshape(6, 8) if granularity == PerToken() else x.numpy().reshape(1, -1)
    if symmetric:
        n = 2 ** (bits - 1) - 1
        s = np.abs(rows).max(axis=1, keepdims=True) / n
        expected = s * np.round(rows / s)
    else:
        m = 2**bits - 1
        low, high = np.minimum(rows.min(axis=1, keepdims=True), 0), np.maximum(rows.max(axis=1, keepdims=True), 0)
        s = (high - low) / m
        z = np.round(-low / s)
        expected = s * (np.clip(np.round(rows / s) + z, 0, m) - z)
    result = dynamic(x, bits=bits, symmetric=symmetric, granularity=granularity)
    np.testing.assert_allclose(result.values.numpy().reshape(rows.shape), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.scales.numpy(), s, rtol=1e-6)


def test_a_token_does_not_depend_on_its_neighbours():
    x = activations(2, 3, 8)
    whole = dynamic(x, granularity=PerToken()).values
    assert torch.equal(whole[1, 2], dynamic(x[1, 2]).values)
    assert not torch.equal(dynamic(x).values, whole)


def test_asymmetric_ranges_are_finer_for_what_lies_on_one_side():
    probabilities = activations(4, 16).softmax(-1)
    for bits in BITS:
        error = [
            (dynamic(probabilities, bits=bits, symmetric=s).values - probabilities).abs().max() for s in (True, False)
        ]
        assert error[1] < 0.6 * error[0]
    assert dynamic(probabilities, symmetric=False).zero_points.item() == 0


def test_dynamic_gradients_stop_at_the_clip_alone():
    x = torch.tensor([-3.0, -1.0, 0.2, 2.0, 2.6], requires_grad=True)
    for symmetric in (True, False):
        x.grad = None
        dynamic(x, clip=2.0, symmetric=symmetric).values.backward(torch.arange(1.0, 6.0))
        assert x.grad.tolist() == [0, 2, 3, 0, 0]
        x.grad = None
        dynamic(x, symmetric=symmetric).values.backward(torch.arange(1.0, 6.0))
        assert x.grad.tolist() == [1, 2, 3, 4, 5]
    result = dynamic(x, clip=2.0)
    assert result.scales.item() == pytest.approx(2 / 127) and result.values.max().item() == pytest.approx(2.0)


@each_bits
@each_symmetric
def test_static_by_hand(bits, symmetric):
    x, low, high = activations(2, 3, 8), -0.7, 1.1
    if symmetric:
        n = 2 ** (bits - 1) - 1
        s = 1.1 / n
        expected = s * np.clip(np.round(x.numpy() / s), -n, n)
        outside = x.abs() >= 1.1
    else:
        m = 2**bits - 1
        s, z = 1.8 / m, round(0.7 / (1.8 / m))
        expected = s * (np.clip(np.round(x.numpy() / s) + z, 0, m) - z)
        outside = (x < low) | (x > high)
    x.requires_grad_()
    result = static(x, low, high, bits=bits, symmetric=symmetric)
    np.testing.assert_allclose(result.values.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    gradient = torch.randn_like(x)
    result.values.backward(gradient)
    assert outside.any() and torch.equal(x.grad, gradient.masked_fill(outside, 0.0))


@each_bits
def test_learned_symmetric_is_lsq(bits):
    x, g = activations(5, 8), torch.randn(5, 8)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = initial_step(x, bits=bits)
    assert step.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(high), rel=1e-6)
    s = step.item() * 0.5
    v = x.double().numpy() / s
    slope = np.where(v <= low, low, np.where(v >= high, high, np.round(v) - v))
    step = (step * 0.5).requires_grad_()
    x.requires_grad_()
    result = learned(x, step, bits=bits)
    result.values.backward(g)
    np.testing.assert_allclose(result.values.detach().numpy(), s * np.clip(np.round(v), low, high), rtol=1e-5)
    # N is the length of a vector: neither batch nor length changes the factor
    expected = (g.double().numpy() * slope).sum() / math.sqrt(8 * high)
    np.testing.assert_allclose(step.grad.item(), expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(x.grad.numpy(), np.where((v <= low) | (v >= high), 0, g.numpy()))


@each_bits
def test_learned_asymmetric_is_lsq_plus(bits):
    x, g, m = activations(5, 8), torch.randn(5, 8), 2**bits - 1
    step, offset = initial_range(-0.8, 1.9, bits=bits)
    assert step.item() == pytest.approx(2.7 / m) and offset.item() == pytest.approx(-0.8)
    s, beta = step.item(), offset.item()
    z = round(-beta / s)
    v = x.double().numpy() / s
    below, above = v + z <= 0, v + z >= m
    slope = np.where(below, 0, np.where(above, m, np.round(v) - v))
    x.requires_grad_(), step.requires_grad_(), offset.requires_grad_()
    result = learned(x, step, offset, bits=bits)
    result.values.backward(g)
    codes = np.clip(np.round(v) + z, 0, m)
    np.testing.assert_array_equal(result.codes.numpy(), codes)
    np.testing.assert_allclose(result.values.detach().numpy(), s * (codes - z), rtol=1e-5, atol=1e-7)
    factor = 1 / math.sqrt(8 * m)
    assert below.any() and above.any()
    np.testing.assert_allclose(step.grad.item(), (g.double().numpy() * slope).sum() * factor, rtol=1e-3, atol=1e-5)
    expected = (g.double().numpy() * (below | above)).sum() * factor
    np.testing.assert_allclose(offset.grad.item(), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(x.grad.numpy(), np.where(below | above, 0, g.numpy()))


def test_the_slope_of_learned_asymmetric_is_that_of_what_is_cut():
    # a number that is cut gives an end of the range: beta below, beta + m s above; differences say the same
    s, beta, m = 0.1, -0.4, 255
    for x, of_step in [(torch.tensor([-9.0]), 0.0), (torch.tensor([99.0]), m)]:
        step, offset = torch.tensor([[s]], requires_grad=True), torch.tensor([[beta]], requires_grad=True)
        result = learned(x, step, offset)
        assert result.values.item() == pytest.approx(beta + of_step * s, rel=1e-4)
        result.values.sum().backward()
        factor = 1 / math.sqrt(m)
        assert (step.grad.item(), offset.grad.item()) == pytest.approx((of_step * factor, factor), rel=1e-5)


@given(st.integers(0, 1000), st.lists(st.integers(0, 30), max_size=4))
@settings(deadline=None)
def test_observers_do_not_depend_on_how_batches_are_cut(seed, cuts):
    x = activations(31, seed=seed) * torch.logspace(-6, 6, 31)
    whole, pieces = (MinMax().updated(x), Histogram(bins=64).updated(x)), (MinMax(), Histogram(bins=64))
    order = torch.randperm(31, generator=torch.Generator().manual_seed(seed))
    for piece in torch.tensor_split(x[order], sorted(cuts)):
        pieces = (pieces[0].updated(piece), pieces[1].updated(piece))
    assert whole[0] == pieces[0] and whole[1].extremes == pieces[1].extremes
    assert whole[1].exponent == pieces[1].exponent and torch.equal(whole[1].counts, pieces[1].counts)


@given(st.integers(0, 1000), st.floats(-30, 30))
@settings(deadline=None)
def test_a_histogram_is_numpys(seed, power):
    x = activations(200, seed=seed) * 2.0**power
    seen = Histogram(bins=128).updated(x)
    reach = 2.0**seen.exponent
    assert reach / 2 <= x.abs().max() < reach
    edges = np.linspace(-reach, reach, 129)
    np.testing.assert_array_equal(seen.counts.numpy(), np.histogram(x.double().numpy(), edges)[0])


@pytest.mark.parametrize("percentile", [50, 90, 99, 99.9])
def test_percentile_ranges_are_numpys_to_within_a_bin(percentile):
    x = activations(10_000)
    seen = Histogram().updated(x)
    width = 2 * 2.0**seen.exponent / seen.bins
    # mirrored below, so that as many lie beyond either end
    high, low = (np.percentile(side, 50 + percentile / 2, method="inverted_cdf") for side in (x.numpy(), -x.numpy()))
    expected = np.array([-low, high])
    assert np.abs(np.array(seen.percentile_range(percentile)) - expected).max() <= width
    assert seen.percentile_range(100) == (x.min().item(), x.max().item())


@each_bits
@each_symmetric
def test_the_range_of_least_error_is_found(bits, symmetric):
    x = activations(20_000) ** 3
    seen = Histogram().updated(x)

    def error(low, high):
        return (static(x, low, high, bits=bits, symmetric=symmetric).values - x).square().mean().item()

    low, high = seen.extremes.range()
    assert (low, high) == MinMax().updated(x).range() == (x.min().item(), x.max().item())
    found = error(*seen.mse_range(bits=bits, symmetric=symmetric))
    assert found <= 1.1 * min(error(low * i / 100, high * i / 100) for i in range(2, 101))
    if bits == 4:
        assert found < 0.5 * error(low, high)


def test_padding_is_not_seen():
    x = activations(2, 3, 8)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x[mask == 0] = 1e6
    for observer in (MinMax(), Histogram()):
        masked, alone = observer.updated(x, mask), observer.updated(x[mask == 1])
        assert getattr(masked, "extremes", masked) == getattr(alone, "extremes", alone)
    assert MinMax().updated(x, mask).count == 24
    with pytest.raises(LmcompressError, match=r"leading axes of its activations, got \(3, 2\) for \(2, 3, 8\)"):
        MinMax().updated(x, mask.t())


def test_zeros_seen_first_do_not_widen_the_bins():
    late = Histogram().updated(torch.zeros(3)).updated(torch.tensor([1.0, 0.25]))
    at_once = Histogram().updated(torch.tensor([1.0, 0.25, 0.0, 0.0, 0.0]))
    assert late.exponent == at_once.exponent == 1 and torch.equal(late.counts, at_once.counts)


def test_calibration_without_data_is_refused():
    nothing = torch.zeros(1, 2, 4), torch.zeros(1, 2)
    for observer in (MinMax(), MinMax().updated(*nothing)):
        with pytest.raises(LmcompressError, match="calibration needs data, got none: give it a few batches"):
            observer.range()
    for observer in (Histogram(), Histogram().updated(*nothing)):
        for ask in (observer.percentile_range, observer.mse_range):
            with pytest.raises(LmcompressError, match="calibration needs data, got none"):
                ask()


def test_a_range_of_zero_is_refused_where_it_is_chosen():
    zeros = torch.zeros(4, 8)
    message = r"must be wider than zero, got \[0, 0\]: calibration saw only zeros"
    for choose in (
        MinMax().updated(zeros).range,
        Histogram().updated(zeros).percentile_range,
        Histogram().updated(zeros).mse_range,
        lambda: static(zeros, 0.0, 0.0),
        lambda: initial_range(0.0, 0.0),
    ):
        with pytest.raises(LmcompressError, match=message):
            choose()
    with pytest.raises(LmcompressError, match="must not all be zero to initialize a step, got 32 of them"):
        initial_step(zeros)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ((1.0, -1.0), r"must go from low to high, got \[1.0, -1.0\]"),
        ((float("nan"), 1.0), r"must be finite, got \[nan, 1.0\]; calibrate again"),
        ((0.0, float("inf")), "must be finite"),
    ],
)
def test_ranges_that_are_none_are_refused(ends, message):
    for use in (check_range, lambda *ends: static(torch.ones(2), *ends), initial_range):
        with pytest.raises(LmcompressError, match=message):
            use(*ends)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_no_numbers_are_refused(wrong):
    x = activations(3, 4)
    x[1, 1] = wrong
    message = "activations must be finite to be quantized, got NaN or infinity.*float16 overflows"
    for use in (
        dynamic,
        lambda x: dynamic(x, symmetric=False),
        lambda x: dynamic(x, granularity=PerToken()),
        lambda x: dynamic(x, clip=2.5),
        MinMax().updated,
        Histogram().updated,
        initial_step,
    ):
        with pytest.raises(LmcompressError, match=message):
            use(x)


@each_symmetric
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_unchecked_activations_that_are_no_numbers_are_not_hidden(symmetric, wrong):
    x = activations(3, 4)
    x[1, 1] = wrong
    assert dynamic(x, symmetric=symmetric, check=False).values.isnan().all()
    by_token = dynamic(x, symmetric=symmetric, granularity=PerToken(), check=False).values
    assert by_token.isnan().all(dim=1).tolist() == [False, True, False] and by_token[0].isfinite().all()
    assert torch.equal(dynamic(x.nan_to_num(0, 0, 0), check=False).values, dynamic(x.nan_to_num(0, 0, 0)).values)


@pytest.mark.parametrize("name", ["static", "static asymmetric", "learned", "learned asymmetric"])
def test_ranges_that_are_frozen_do_not_hide_nan(name):
    x = activations(3, 4)
    x[1, 1] = float("nan")
    values = EVERY[name](x, 8).values
    assert values.isnan().sum() == 1 and values[1, 1].isnan()


@pytest.mark.parametrize("bits", [2, 3, 5, 16, "ternary", 8.0])
def test_activations_have_8_or_4_bits(bits):
    x = activations(3, 4)
    for use in (
        lambda: dynamic(x, bits=bits),
        lambda: static(x, -1.0, 1.0, bits=bits),
        lambda: learned(x, STEP, bits=bits),
        lambda: initial_step(x, bits=bits),
        lambda: initial_range(-1.0, 1.0, bits=bits),
        lambda: Histogram().updated(x).mse_range(bits=bits),
    ):
        with pytest.raises(LmcompressError, match="bits must be one of 4, 8, got"):
            use()


def test_states_clips_bins_and_percentiles_are_checked():
    x = activations(3, 4)
    with pytest.raises(LmcompressError, match=r"the step of activations must have shape \(1, 1\), got \(3, 1\)"):
        learned(x, torch.ones(3, 1))
    with pytest.raises(LmcompressError, match=r"the offset of activations must have shape \(1, 1\), got \(1,\)"):
        learned(x, STEP, torch.ones(1))
    for clip in (0.0, -2.5, float("nan")):
        with pytest.raises(LmcompressError, match="clip must be > 0, got"):
            dynamic(x, clip=clip)
    for bins in (0, 7):
        with pytest.raises(LmcompressError, match=f"the number of bins must be even and at least 2, got {bins}"):
            Histogram(bins=bins)
    with pytest.raises(LmcompressError, match="must be above 0 and at most 100, got 0"):
        Histogram().updated(x).percentile_range(0)
