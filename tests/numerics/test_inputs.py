"""inputs: one description, the same numbers as the quantizers that it describes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcompress import CheckpointError, LmcompressError
from lmcompress.checkpoint.schema import ActivationEncoding
from lmcompress.numerics import activations
from lmcompress.numerics.grids import PerToken
from lmcompress.numerics.inputs import check_input_range, input_grid, quantize_input, static_range


def encoding(**given):
    return ActivationEncoding(**{"bits": 8, **given})


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_dynamic_range_is_that_of_the_quantizer(bits, symmetric, granularity, clip):
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    said = encoding(bits=bits, symmetric=symmetric, granularity=granularity, clip=clip)
    per = {} if granularity == "tensor" else {"granularity": PerToken()}
    expected = activations.dynamic(x, bits=bits, symmetric=symmetric, clip=clip, **per)
    assert torch.equal(quantize_input(x, said).values, expected.values)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(-50, 50, width=32),
    st.floats(0.25, 50, width=32),
    st.booleans(),
    st.sampled_from([4, 8]),
    st.integers(0, 9),
)
def test_a_static_range_is_that_of_the_quantizer_to_the_rounding_of_a_scale(low, width, symmetric, bits, seed):
    high = low + width
    said = encoding(bits=bits, symmetric=symmetric, range="static")
    x = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 20
    scale, zero_point = static_range(low, high, said)
    now, before = (
        quantize_input(x, said, scale, zero_point),
        activations.static(x, low, high, bits=bits, symmetric=symmetric),
    )
    # a number in the middle between two codes may get the other
    middle = ((x / scale) % 1 - 0.5).abs() < 1e-4
    torch.testing.assert_close(now.values[~middle], before.values[~middle], rtol=1e-5, atol=1e-6)
    assert int(now.codes.min()) >= input_grid(said).low and int(now.codes.max()) <= input_grid(said).high


@pytest.mark.parametrize("bits", [8, 4])
def test_a_learned_range_ends_as_a_static_one_to_the_bit(bits):
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(1)) * 3
    step = torch.tensor([[0.37]])
    learned = activations.learned(x, step, bits=bits)
    full = encoding(bits=bits, range="static", full=True)
    assert torch.equal(quantize_input(x, full, learned.scales).values, learned.values)
    assert int(quantize_input(x * 100, full, learned.scales).codes.min()) == -(2 ** (bits - 1))
    learned = activations.learned(x, step, torch.tensor([[-1.3]]), bits=bits)
    said = encoding(bits=bits, symmetric=False, range="static")
    assert torch.equal(quantize_input(x, said, learned.scales, learned.zero_points).values, learned.values)


@pytest.mark.parametrize(("symmetric", "zero"), [(True, None), (False, torch.tensor([5], dtype=torch.uint8))])
def test_the_gradient_goes_to_what_is_not_cut(symmetric, zero):
    x = torch.tensor([-100.0, -0.3, 0.0, 0.4, 100.0], requires_grad=True)
    said = encoding(bits=4, symmetric=symmetric, range="static")
    quantize_input(x, said, torch.tensor([0.1]), zero).values.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_a_range_must_come_where_it_is_static_and_nowhere_else():
    x, one, byte = torch.ones(3), torch.ones(1), torch.ones(1, dtype=torch.uint8)
    for said, given_range in [
        (encoding(range="static"), ()),
        (encoding(range="static"), (one, byte)),
        (encoding(range="static", symmetric=False), (one,)),
        (encoding(), (one,)),
    ]:
        with pytest.raises(LmcompressError, match="a static range must have a scale, and a zero point if"):
            quantize_input(x, said, *given_range)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_none_calibrates_is_refused(scale):
    with pytest.raises(CheckpointError, match="scale of h.0's input must be finite and above 0, got"):
        check_input_range(torch.tensor([scale]), None, encoding(range="static"), "h.0's input")


def test_a_zero_point_that_is_no_code_is_refused():
    said = encoding(bits=4, symmetric=False, range="static")
    with pytest.raises(CheckpointError, match="zero point of h.0's input must be a code, at most 15, got 16"):
        check_input_range(torch.ones(1), torch.tensor([16], dtype=torch.uint8), said, "h.0's input")
