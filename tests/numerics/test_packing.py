"""packing: what went in comes out, in the bytes foretold, and streams that nobody packed are refused."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lmcompress.errors import CheckpointError, LmcompressError
from lmcompress.numerics.grids import (
    BINARY_GRID,
    STRETCHED_GRID,
    Grid,
    PerGroup,
    PerRow,
    PerTensor,
    signed_grid,
    symmetric_grid,
    unsigned_grid,
)
from lmcompress.numerics.packing import (
    CONTAINERS,
    check_scales,
    container_for,
    dequantize,
    pack,
    packed_bytes,
    packed_shape,
    unpack,
)

TERNARY = symmetric_grid("ternary")
GRIDS = [
    BINARY_GRID,
    TERNARY,
    STRETCHED_GRID,
    Grid(low=-7, levels=8, stride=2),
    *(symmetric_grid(bits) for bits in (3, 4, 8)),
    *(signed_grid(bits) for bits in (2, 3, 4, 8)),
    *(unsigned_grid(bits) for bits in (1, "ternary", 2, 3, 4, 8)),
]
LEVELS = {1: 2, "base3": 3, 2: 4, 3: 8, 4: 16, 8: 256}


def codes_of(grid, shape, seed=0, dtype=None):
    index = torch.randint(grid.levels, shape, generator=torch.Generator().manual_seed(seed))
    return (index * grid.stride + grid.low).to(dtype or grid.dtype)


def reference(codes, grid, container):
    """Bytes of one row, by NumPy's bits or Python's whole numbers."""
    index = [(int(code) - grid.low) // grid.stride for code in codes]
    if container == "base3":
        fives = [index[start : start + 5] for start in range(0, len(index), 5)]
        return [sum(digit * 3**place for place, digit in enumerate(five)) for five in fives]
    bits = [(i >> bit) & 1 for i in index for bit in range(container)]
    return np.packbits(np.array(bits, dtype=np.uint8), bitorder="little").tolist()


@given(
    st.sampled_from(GRIDS),
    st.sampled_from(CONTAINERS),
    st.lists(st.integers(0, 19), max_size=3),
    st.integers(0, 1000),
    st.sampled_from([torch.int64, torch.int32, None]),
)
def test_codes_come_back_from_the_bytes_foretold(grid, container, shape, seed, dtype):
    assume(grid.levels <= LEVELS[container])
    codes = codes_of(grid, shape, seed, dtype)
    packed = pack(codes, grid, container)
    assert packed.dtype == torch.uint8
    assert packed.shape == packed_shape(shape, container) and packed.numel() == packed_bytes(shape, container)
    for form in (packed, packed.flatten()):
        again = unpack(form, shape, grid, container)
        assert again.dtype == grid.dtype and again.shape == codes.shape
        assert torch.equal(again.long(), codes.long())


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("length", [1, 4, 5, 7, 8, 9, 24, 40, 41])
def test_bytes_are_those_of_another_implementation(container, length):
    grid = next(grid for grid in GRIDS if grid.levels == LEVELS[container])
    codes = codes_of(grid, (3, length), seed=length)
    assert pack(codes, grid, container).tolist() == [reference(row, grid, container) for row in codes]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rows_are_packed_alone_so_that_an_embedding_is_unpacked_by_row(grid):
    codes = codes_of(grid, (6, 13))
    packed = pack(codes, grid)
    chosen = torch.tensor([4, 0, 4])
    assert torch.equal(packed[2], pack(codes[2], grid))
    assert torch.equal(unpack(packed[chosen], (3, 13), grid), codes[chosen])


def test_every_base_3_byte_holds_its_five_digits():
    every = torch.arange(243, dtype=torch.uint8).reshape(-1, 1)
    codes = unpack(every, (243, 5), TERNARY)
    assert len({tuple(row) for row in codes.tolist()}) == 243
    assert torch.equal(pack(codes, TERNARY), every)


def test_the_smallest_container_is_chosen():
    chosen = [container_for(grid) for grid in GRIDS[:7]]
    assert chosen == [1, "base3", 2, 3, 3, 4, 8]
    assert all(LEVELS[container_for(grid)] >= grid.levels for grid in GRIDS)


def test_codes_of_any_layout_are_packed_alike():
    codes = codes_of(TERNARY, (7, 11))
    assert torch.equal(pack(codes.t().contiguous().t(), TERNARY), pack(codes, TERNARY))


GPT2_MATRICES = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12


@pytest.mark.parametrize(
    ("container", "mebibytes"), [(8, 121.4), (4, 62.4), (2, 33.0)], ids=["8 bits", "4 bits", "2 bits"]
)
def test_gpt2_has_the_sizes_of_the_paper(container, mebibytes):
    # METHODS 1.9: matrices and word embedding packed; positions, biases and norms float32; one scale for each matrix
    # and each row of the embedding
    shapes = [*GPT2_MATRICES, (50257, 768)]
    assert sum(rows * row for rows, row in shapes) == 84_934_656 + 38_597_376
    codes = sum(packed_bytes(shape, container) for shape in shapes)
    total = codes + 4 * (786_432 + 121_344 + len(GPT2_MATRICES) + 50257)
    assert total / 2**20 == pytest.approx(mebibytes, abs=0.2)


def test_ternary_in_base_3_is_a_fifth_smaller_than_in_two_bits():
    base3, two = (sum(packed_bytes(shape, c) for shape in GPT2_MATRICES) for c in ("base3", 2))
    assert 0.8 <= base3 / two < 0.803


@given(st.integers(0, 500))
def test_numbers_are_scale_times_code(seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (3, 8), generator=generator, dtype=torch.uint8)
    for granularity, rows, groups in [(PerTensor(), 1, 1), (PerRow(), 3, 1), (PerGroup(4), 3, 2)]:
        scales = torch.rand(rows, groups, generator=generator)
        zeros = torch.randint(0, 16, (rows, groups), generator=generator, dtype=torch.uint8)
        big = np.repeat(np.broadcast_to(scales.numpy(), (3, groups)), 8 // groups, axis=1)
        zero = np.repeat(np.broadcast_to(zeros.numpy(), (3, groups)), 8 // groups, axis=1).astype(np.float32)
        plain = dequantize(codes, scales, granularity=granularity)
        shifted = dequantize(codes, scales, granularity=granularity, zero_points=zeros)
        np.testing.assert_array_equal(plain.numpy(), big * codes.numpy())
        np.testing.assert_array_equal(shifted.numpy(), big * (codes.numpy().astype(np.float32) - zero))
        assert plain.dtype == shifted.dtype == torch.float32


@pytest.mark.parametrize("bits", [5, 6, 7, 0, 16, 4.0, True, "base2", None])
def test_bits_that_no_packing_has_are_refused(bits):
    message = r"no packing has .* bits per code; it must be one of 1, base3, 2, 3, 4, 8"
    with pytest.raises(LmcompressError, match=message):
        packed_shape((4, 4), bits)
    if bits is not None:
        with pytest.raises(LmcompressError, match=message):
            pack(torch.zeros(4, dtype=torch.int8), BINARY_GRID, bits)


def test_a_container_too_small_for_the_grid_is_refused():
    with pytest.raises(LmcompressError, match="the container 2 holds 4 levels, the codes have 15; use 4"):
        pack(torch.zeros(4, dtype=torch.int8), symmetric_grid(4), 2)
    with pytest.raises(LmcompressError, match="the container 'base3' holds 3 levels, the codes have 4; use 2"):
        unpack(torch.zeros(1, dtype=torch.uint8), (4,), STRETCHED_GRID, "base3")


@pytest.mark.parametrize(
    ("codes", "grid", "message"),
    [
        (torch.tensor([0, 8]), symmetric_grid(4), r"codes must lie in \[-7, 7\], got 8"),
        (torch.tensor([0, -8]), symmetric_grid(4), r"codes must lie in \[-7, 7\], got -8"),
        (torch.tensor([0, 70_000]), symmetric_grid(4), r"codes must lie in \[-7, 7\], got 70000"),
        (torch.tensor([-3, 0]), STRETCHED_GRID, "codes must be -3 and steps of 2 from there, got 0"),
        (torch.tensor([0.0]), TERNARY, "codes must be integers, got torch.float32"),
        (torch.tensor([True]), TERNARY, "codes must be integers, got torch.bool"),
    ],
)
def test_what_is_no_code_is_refused(codes, grid, message):
    with pytest.raises(LmcompressError, match=message):
        pack(codes, grid)


@pytest.mark.parametrize("container", CONTAINERS)
def test_streams_shorter_or_longer_than_the_shape_says_are_refused(container):
    grid = BINARY_GRID
    packed = pack(codes_of(grid, (3, 17)), grid, container).flatten()
    for stream, what in [
        (packed[:-1], "shorter"),
        (torch.cat([packed, packed[:1]]), "longer"),
        (packed[:0], "shorter"),
    ]:
        with pytest.raises(CheckpointError, match=f"must have {packed.numel()} bytes .*the stream is {what} than"):
            unpack(stream, (3, 17), grid, container)


def test_streams_of_another_make_are_refused():
    with pytest.raises(CheckpointError, match="packed codes must be uint8, got torch.int8"):
        unpack(torch.zeros(1, dtype=torch.int8), (4,), STRETCHED_GRID)
    with pytest.raises(
        CheckpointError, match=r"must have shape \(2, 1\) \(2 bits per code\) or lie in one row, got \(1, 2\)"
    ):
        unpack(torch.zeros(1, 2, dtype=torch.uint8), (2, 4), STRETCHED_GRID)
    with pytest.raises(
        CheckpointError, match="must be below 15 .4 bits per code., got a code of 15; the stream is damaged"
    ):
        unpack(torch.tensor([0xF0], dtype=torch.uint8), (2,), symmetric_grid(4))
    with pytest.raises(CheckpointError, match="must be below 255 .8 bits per code., got a code of 255"):
        unpack(torch.tensor([0xFF], dtype=torch.uint8), (1,), symmetric_grid(8))


@given(st.integers(243, 255), st.integers(1, 5))
def test_bytes_that_hold_no_five_digits_are_refused(byte, length):
    with pytest.raises(CheckpointError, match="got a byte above 242|the unused bits of a row's last byte must be 0"):
        unpack(torch.tensor([byte], dtype=torch.uint8), (length,), TERNARY)


def test_a_binary_stream_in_base_3_has_no_third_digit():
    with pytest.raises(CheckpointError, match="must be below 2 .base-3, five codes per byte., got a code of 2"):
        unpack(torch.tensor([2], dtype=torch.uint8), (5,), BINARY_GRID, "base3")


@pytest.mark.parametrize("container", [1, 2, 3, 4, "base3"])
def test_something_in_the_padding_is_refused(container):
    packed = pack(codes_of(BINARY_GRID, (2, 3)), BINARY_GRID, container)
    packed[0, -1] += 128 if container != "base3" else 81
    if container == 2:
        packed[0, -1] |= 64
    with pytest.raises(CheckpointError, match="the unused bits of a row's last byte must be 0"):
        unpack(packed, (2, 3), BINARY_GRID, container)


@pytest.mark.parametrize("wrong", [-0.5, float("nan"), float("inf")])
def test_scales_that_are_negative_or_not_finite_are_refused(wrong):
    scales = torch.tensor([[1.0], [wrong]])
    with pytest.raises(CheckpointError, match=r"scales must be finite and not negative, got .* at \(1, 0\)"):
        dequantize(torch.zeros(2, 4, dtype=torch.int8), scales, granularity=PerRow())
    with pytest.raises(CheckpointError, match="zero points must be finite and not negative"):
        dequantize(
            torch.zeros(2, 4, dtype=torch.uint8), scales.abs().nan_to_num(), granularity=PerRow(), zero_points=scales
        )


def test_scales_of_another_shape_are_refused():
    with pytest.raises(CheckpointError, match=r"shape \(2, 4\) must have shape \(2, 1\) \(PerRow\(\)\), got \(2,\)"):
        check_scales(torch.ones(2), (2, 4), PerRow())
    with pytest.raises(LmcompressError, match=r"must divide the length of a row, got 3 for rows of 4"):
        dequantize(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 2), granularity=PerGroup(3))
