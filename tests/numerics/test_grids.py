"""grids: a code is the nearest there is, and a granularity says who shares a scale."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcompress.errors import LmcompressError
from lmcompress.numerics.grids import (
    BINARY_GRID,
    BITS,
    STRETCHED_GRID,
    Grid,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    check_bits,
    extremes,
    max_abs,
    mean_abs,
    signed_grid,
    symmetric_grid,
    unsigned_grid,
)

WITH_ZERO = [bits for bits in BITS if bits != 1]
GRIDS = [
    BINARY_GRID,
    STRETCHED_GRID,
    Grid(low=-7, levels=8, stride=2),
    *(make(bits) for make in (symmetric_grid, signed_grid, unsigned_grid) for bits in WITH_ZERO),
]


def codes_of(grid):
    return np.arange(grid.levels) * grid.stride + grid.low


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_nearest_code_is_the_nearest(grid):
    x = torch.linspace(1.3 * grid.low - 1.01, 1.3 * grid.high + 1.01, 701)
    distances = np.abs(x.double().numpy()[:, None] - codes_of(grid))
    found = grid.nearest(x)
    assert set(found.tolist()) <= set(codes_of(grid).tolist())
    np.testing.assert_allclose((found - x).abs().double().numpy(), distances.min(axis=1), atol=1e-4)
    assert not (torch.signbit(found) & (found == 0)).any(), "-0 is another bit pattern than the integer's 0"
    assert torch.equal(grid.nearest(found), found)
    assert grid.nearest(torch.tensor(torch.nan)).isnan() and found.to(grid.dtype).float().equal(found)


def test_the_sign_of_a_tiny_number_counts_at_one_bit():
    assert BINARY_GRID.nearest(torch.tensor([-1e-30, 0.0, 1e-30])).tolist() == [-1, 1, 1]


def test_two_bits_are_ternary_around_zero_and_four_levels_in_twos_complement():
    assert codes_of(symmetric_grid(2)).tolist() == codes_of(symmetric_grid("ternary")).tolist() == [-1, 0, 1]
    assert codes_of(signed_grid(2)).tolist() == [-2, -1, 0, 1]
    assert [symmetric_grid(bits).levels for bits in (3, 4, 8)] == [7, 15, 255]
    assert unsigned_grid(8).dtype == torch.uint8 and signed_grid(8).dtype == torch.int8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "from 2 to 256 levels and a stride of 1 or more, got 1 levels"),
        ((0, 2, 0), "got 2 levels with stride 0"),
        ((-255, 256, 2), "codes must fit one byte, signed or not, got codes from -255 to 255; use fewer bits"),
        ((-1, 256), "got codes from -1 to 254"),
    ],
)
def test_a_grid_fits_a_byte(arguments, message):
    with pytest.raises(LmcompressError, match=message):
        Grid(*arguments)


@pytest.mark.parametrize("bits", [0, 5, 6, 16, 2.0, True, "4", None])
def test_bits_that_no_packing_has_are_refused(bits):
    with pytest.raises(LmcompressError, match=r"bits must be one of 1, ternary, 2, 3, 4, 8, got"):
        check_bits(bits)


def test_one_bit_has_no_grid_with_a_zero():
    for make in (symmetric_grid, signed_grid):
        with pytest.raises(
            LmcompressError, match="bits must be at least 2 for a grid with a zero, got 1; quantize to 1"
        ):
            make(1)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_statistics_are_those_of_the_numbers_that_share_a_scale(rows, groups, size, seed):
    x = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(seed))
    sharing = {
        PerTensor(): x.numpy().reshape(1, 1, -1),
        PerRow(): x.numpy().reshape(rows, 1, -1),
        PerToken(): x.numpy().reshape(rows, 1, -1),
        PerGroup(size): x.numpy().reshape(rows, groups, size),
    }
    for granularity, numbers in sharing.items():
        assert granularity.scale_shape(x.shape) == numbers.shape[:2]
        np.testing.assert_allclose(mean_abs(x, granularity).numpy(), np.abs(numbers).mean(axis=2), rtol=1e-5)
        np.testing.assert_array_equal(max_abs(x, granularity).numpy(), np.abs(numbers).max(axis=2))
        np.testing.assert_array_equal(extremes(x, granularity)[0].numpy(), numbers.min(axis=2))
        spread = granularity.spread(mean_abs(x, granularity), x.shape)
        expected = np.broadcast_to(np.abs(numbers).mean(axis=2, keepdims=True), numbers.shape).reshape(x.shape)
        np.testing.assert_allclose(spread.expand_as(granularity.split(x)).reshape(x.shape), expected, rtol=1e-5)


def test_tokens_are_vectors_along_the_last_axis():
    x = torch.randn(2, 3, 5)
    assert PerToken().scale_shape(x.shape) == (6, 1)
    torch.testing.assert_close(mean_abs(x, PerToken()), x.abs().mean(dim=-1).reshape(6, 1))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("granularity", [PerTensor(), PerRow(), PerGroup(2), PerToken()], ids=str)
def test_what_pruning_left_empty_has_statistics_of_zero(shape, granularity):
    found = mean_abs(torch.empty(shape), granularity)
    assert found.shape == granularity.scale_shape(shape) and not found.any()


def test_a_group_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(LmcompressError, match=r"got 128 for rows of 312.*rows are not padded. Use PerGroup\(104\)"):
        PerGroup(128).scale_shape((4, 312))


@pytest.mark.parametrize("size", [0, -4, 2.0, True])
def test_the_size_of_a_group_is_a_whole_number(size):
    with pytest.raises(LmcompressError, match="the size of a group must be a whole number from 1 up, got"):
        PerGroup(size)


def test_vectors_have_no_rows_and_numbers_no_tokens():
    with pytest.raises(LmcompressError, match=r"PerRow\(\) needs a tensor with at least two axes, got shape \(3,\)"):
        PerRow().scale_shape((3,))
    with pytest.raises(LmcompressError, match=r"PerGroup\(size=1\) needs a tensor with at least two axes"):
        PerGroup(1).scale_shape((3,))
    with pytest.raises(LmcompressError, match="PerToken needs a tensor with at least one axis, got a single number"):
        PerToken().scale_shape(())
