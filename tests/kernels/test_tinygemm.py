"""Weights of few bits times bfloat16: the arithmetic is checked by torch's operation of the same convention on CPUs."""

import logging
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lmcompress.checkpoint.schema import ActivationEncoding
from lmcompress.errors import LmcompressError
from lmcompress.kernels import dispatch as kernels
from lmcompress.kernels import tinygemm
from lmcompress.kernels.dispatch import using
from lmcompress.kernels.matmul import Matmul
from lmcompress.kernels.matrix import Inputs, Matrix
from lmcompress.kernels.tinygemm import Tinygemm, nibbles
from lmcompress.nn.packed import Layout, PackedLinear
from lmcompress.numerics.grids import Grid, PerGroup, PerRow, PerTensor
from lmcompress.numerics.packing import container_for, pack
from lmcompress.numerics.quantizers.registry import quantizer_for

WEIGHTS = [
    ("minmax", 8), ("minmax", 4), ("minmax", 3), ("minmax", "ternary"), ("lsq", 4), ("elastic", 2), ("binary", 1),
    ("asymmetric_minmax", 8), ("asymmetric_minmax", 4), ("asymmetric_minmax", 3), ("asymmetric_minmax", 2),
]  # fmt: skip
GRANULARITIES = [PerTensor(), PerRow(), PerGroup(32), PerGroup(96), PerGroup(256)]
CPU = torch.device("cpu")


def matrix_of(weight, name="minmax", bits=4, granularity=None, device="cpu"):
    granularity = granularity or PerRow()
    quantizer = quantizer_for(name, bits)
    state = () if quantizer.initial is None else (quantizer.initial(weight, bits=bits, granularity=granularity),)
    q = quantizer.function(weight, *state, bits=bits, granularity=granularity)
    container = container_for(q.grid)
    tensors = [None if t is None else t.to(device) for t in (pack(q.codes, q.grid, container), q.scales, q.zero_points)]
    return Matrix(*tensors, tuple(weight.shape), q.grid, container, granularity)


def pack_for_cpu(codes):
    return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 8)


def product_of(x, said, out):
    """What the operation gives for an input, planes added up and rows scaled."""
    x = F.pad(x, (0, said.codes.shape[1] - x.shape[1]))
    y = torch._weight_int4pack_mm_for_cpu(x, pack_for_cpu(said.codes), said.group, said.scales_and_zeros).double()
    y = sum(y[:, plane * said.rows :][:, :out] for plane in range(said.planes))
    return y if said.row_scales is None else y * said.row_scales


def taken(matrix):
    return Tinygemm().refusal(matrix, None, torch.bfloat16) is None


@pytest.fixture
def on_cpu(monkeypatch):
    """The rung works on CPUs, by the operation that torch has there; what works is tried anew before and after."""
    monkeypatch.setattr(tinygemm, "_unfit", lambda device: None)
    monkeypatch.setattr(tinygemm, "_pack", pack_for_cpu)
    monkeypatch.setattr(tinygemm, "_multiply", torch._weight_int4pack_mm_for_cpu)
    # on a GPU there is no other kernel for weights alone
    others = tuple(kernel for kernel in kernels.KERNELS if not isinstance(kernel, kernels.HalfCodes))
    monkeypatch.setattr(kernels, "KERNELS", others)
    kernels._tried.cache_clear()
    yield
    kernels._tried.cache_clear()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize(("name", "bits"), WEIGHTS)
def test_nibbles_say_the_matrix(name, bits, granularity):
    matrix = matrix_of(torch.randn(13, 768), name, bits, granularity)
    if not taken(matrix):
        assert (name, bits) == ("asymmetric_minmax", 8) and isinstance(granularity, PerGroup)
        return
    said = nibbles(matrix, torch.float32)
    assert said.codes.dtype == torch.uint8 and int(said.codes.max()) <= 15
    assert said.codes.shape[0] == said.planes * said.rows and said.rows % 16 == 0 and said.codes.shape[1] % 128 == 0
    assert said.scales_and_zeros.shape == (said.codes.shape[1] // said.group, said.codes.shape[0], 2)
    assert said.planes == (2 if bits == 8 else 1)
    # by definition, without the operation
    scales, zeros = (part.t().repeat_interleave(said.group, dim=1) for part in said.scales_and_zeros.unbind(-1))
    values = ((said.codes.float() - 8) * scales + zeros).unflatten(0, (said.planes, said.rows)).sum(0)[:13, :768]
    values = values if said.row_scales is None else values * said.row_scales.unsqueeze(1)
    torch.testing.assert_close(values, matrix.values(), rtol=1e-5, atol=1e-5 * float(matrix.values().abs().max()))
    # and by it
    x = torch.randn(5, 768)
    torch.testing.assert_close(product_of(x, said, 13), x.double() @ matrix.values().double().t(), rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 40),
    width=st.integers(1, 300),
    weights=st.sampled_from(WEIGHTS),
    by_row=st.booleans(),
    tokens=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_of_any_size(out, width, weights, by_row, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(tokens, width, generator=generator), torch.randn(out, width, generator=generator)
    matrix = matrix_of(weight, *weights, PerRow() if by_row else PerTensor())
    wanted = x.double() @ matrix.values().double().t()
    reach = 1 + float((x.abs().double() @ matrix.values().abs().double().t()).max())
    torch.testing.assert_close(product_of(x, nibbles(matrix, torch.float32), out), wanted, rtol=0, atol=1e-5 * reach)


@pytest.mark.parametrize(("name", "bits"), WEIGHTS)
def test_with_scales_of_rows_the_operation_sees_whole_numbers_that_bfloat16_has(name, bits):
    matrix = matrix_of(torch.randn(13, 200), name, bits)
    said, exact = nibbles(matrix), nibbles(matrix, torch.float64)
    assert said.scales_and_zeros.dtype == torch.bfloat16
    assert torch.equal(said.scales_and_zeros.double(), exact.scales_and_zeros)
    scales, zeros = (part.t().repeat_interleave(said.group, dim=1) for part in exact.scales_and_zeros.unbind(-1))
    values = (said.codes.double() - 8) * scales + zeros
    assert torch.equal(values.bfloat16().double(), values)


@pytest.mark.parametrize(("name", "bits"), [("minmax", "ternary"), ("asymmetric_minmax", 3), ("minmax", 4)])
def test_with_scales_of_groups_a_zero_stays_zero(name, bits):
    matrix = matrix_of(torch.randn(16, 128), name, bits, PerGroup(32))
    assert nibbles(matrix).scales_and_zeros[..., 1].abs().max() == 0


@pytest.mark.parametrize(
    ("size", "group"), [(32, 32), (64, 64), (96, 32), (160, 32), (192, 64), (256, 256), (384, 128), (512, 256)]
)
def test_groups_become_groups_that_the_operation_has(size, group):
    assert nibbles(matrix_of(torch.randn(16, 2 * size), granularity=PerGroup(size))).group == group


def test_what_is_not_taken_is_said():
    weight, kernel, half = torch.randn(16, 96), Tinygemm(), torch.bfloat16
    matrix = matrix_of(weight)
    assert kernel.refusal(matrix, None, half) is None
    inputs = Inputs(ActivationEncoding(bits=8, symmetric=True))
    assert "inputs are quantized" in kernel.refusal(matrix, inputs, half)
    for dtype in (torch.float32, torch.float16):
        assert f"inputs are {dtype}" in kernel.refusal(matrix, None, dtype)
    assert "groups of 48, no multiple of 32" in kernel.refusal(matrix_of(weight, granularity=PerGroup(48)), None, half)
    coarse = matrix_of(weight, "asymmetric_minmax", 8, PerGroup(32))
    assert "too coarse in bfloat16" in kernel.refusal(coarse, None, half)
    for shape in ((8 * 65535, 8), (1 << 17, 1 << 15)):
        large = Matrix(torch.empty(0), torch.empty(0), None, shape, Grid(-7, 15), 4)
        assert "too large" in kernel.refusal(large, None, half)


def test_on_a_cpu_it_is_not_tried():
    assert kernels.ladder("cpu")["tinygemm"] == "for CUDA devices"
    with using(kernel="tinygemm"), pytest.raises(LmcompressError, match="'tinygemm' does not work on cpu.*for CUDA"):
        Matmul()(torch.randn(2, 96).bfloat16(), matrix_of(torch.randn(16, 96)))


def test_old_devices_are_not_tried(monkeypatch):
    # an operation that was not compiled for a device ends its use by the process
    monkeypatch.setattr(tinygemm, "_pack", lambda codes: pytest.fail("was tried"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "(8, 0) and later, this device has (7, 5)" in Tinygemm().trouble(torch.device("cuda"))


def test_a_device_that_is_not_there_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "not for this device" in Tinygemm().trouble(torch.device("cuda"))


def test_the_ladder_takes_it_where_it_works(on_cpu, caplog):
    with caplog.at_level(logging.INFO, logger="lmcompress.kernels.dispatch"):
        assert kernels.ladder("cpu")["tinygemm"] == "works"
    assert "only weights quantized use tinygemm where it accepts them" in caplog.records[0].getMessage()
    inputs = Inputs(ActivationEncoding(bits=8, symmetric=True))
    small = matrix_of(torch.randn(16, 96))
    for matrix, x_dtype, given_inputs, kernel in (
        (small, torch.bfloat16, None, "tinygemm"),
        (small, torch.float32, None, "reference"),
        (small, torch.float16, None, "reference"),
        (small, torch.bfloat16, inputs, kernels.kernels(few=True)[0].name),
        (matrix_of(torch.randn(16, 96), granularity=PerGroup(48)), torch.bfloat16, None, "reference"),
    ):
        product = Matmul()
        product(torch.randn(2, 96).to(x_dtype), matrix, None, given_inputs)
        assert product.kernel == kernel
    with using(kernel="reference"):
        product = Matmul()
        product(torch.randn(2, 96).bfloat16(), small)
        assert product.kernel == "reference"
    with using(memory="low"):
        product(torch.randn(2, 96).bfloat16(), small)
        assert product.kernel == "reference by blocks"


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 200, 300])
def test_it_is_as_near_as_the_reference(on_cpu, granularity, biased, tokens):
    x, weight = torch.randn(tokens, 768).bfloat16(), torch.randn(13, 768)
    bias = torch.randn(13).bfloat16() if biased else None
    for name, bits in WEIGHTS:
        matrix, product = matrix_of(weight, name, bits, granularity), Matmul()
        wanted = F.linear(x.double(), matrix.values().double(), None if bias is None else bias.double())
        given = product(x, matrix, bias)
        assert product.kernel == ("tinygemm" if taken(matrix) else "reference")
        assert given.dtype == torch.bfloat16 and given.shape == (tokens, 13)
        assert float((given - wanted).abs().max()) <= 0.01 * float(wanted.abs().max())


def test_shapes_and_views_of_inputs(on_cpu):
    matrix, bias = matrix_of(torch.randn(13, 128)), torch.randn(13)
    # addresses that words cannot be read from, several axes, a vector, strides, nothing
    whole = torch.randn(2 * 3 * 128 + 1).bfloat16()
    inputs = [whole[1:].view(2, 3, 128), whole[:128], whole[1:].view(128, 6).t(), whole[:0].view(0, 3, 128)]
    for x in inputs:
        given = Matmul()(x, matrix, bias)
        wanted = F.linear(x.double(), matrix.values().double(), bias.double())
        assert given.shape == wanted.shape
        torch.testing.assert_close(given.double(), wanted, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("bits", [4, 8])
def test_for_many_tokens_floats_are_made(on_cpu, monkeypatch, bits):
    calls, multiply = [], tinygemm._multiply
    monkeypatch.setattr(tinygemm, "_multiply", lambda x, *rest: calls.append(len(x)) or multiply(x, *rest))
    most = 256 if bits == 4 else 128
    matrix, product = matrix_of(torch.randn(16, 96), bits=bits), Matmul()
    kernels.ladder()
    calls.clear()
    for tokens in (most, most + 1):
        product(torch.randn(tokens, 96).bfloat16(), matrix)
    assert calls == [most] and product.kernel == "tinygemm"


def test_gradients_of_inputs_are_the_references(on_cpu):
    x, matrix, product = torch.randn(2, 96).bfloat16().requires_grad_(), matrix_of(torch.randn(16, 96)), Matmul()
    product(x, matrix).sum().backward()
    assert product.kernel == "tinygemm"
    torch.testing.assert_close(x.grad.float(), matrix.values().sum(0).expand(2, 96), rtol=0.02, atol=0.1)


def test_a_module_uses_it(on_cpu):
    quantizer = quantizer_for("minmax", 4)
    q = quantizer.function(torch.randn(16, 96), bits=4, granularity=PerRow())
    module = PackedLinear(96, 16, Layout(q.grid, 4, PerRow()), None, torch.nn.Parameter(torch.randn(16))).eval()
    module.fill(q)
    module.to(torch.bfloat16)
    x = torch.randn(2, 5, 96).bfloat16()
    with torch.no_grad():
        given = module(x)
        assert module._matmul.kernel == "tinygemm"
        with using(kernel="reference"):
            torch.testing.assert_close(given, module(x), rtol=0.02, atol=0.1)


def _raises(*_):
    raise ValueError("no such tile\nmore")


def _missing(*_):
    return torch.ops.aten.no_such_product


def _mixed_up(x, packed, group, scales_and_zeros):
    return torch._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros).roll(1, 1)


def _without_zeros(x, packed, group, scales_and_zeros):
    scales_and_zeros = scales_and_zeros * torch.tensor([1.0, 0.0]).bfloat16()
    return torch._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros)


def _beyond_the_first_tile(x, packed, group, scales_and_zeros):
    y = torch._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros)
    y[16:] = 0
    return y


def _nan(x, packed, group, scales_and_zeros):
    return torch._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros) * torch.nan


@pytest.mark.parametrize(
    ("multiply", "said"),
    [
        (_raises, "not for this device: no such tile$"),
        (_missing, "no_such_product"),
        (_mixed_up, "results are wrong"),
        (_without_zeros, "results are wrong"),
        (_beyond_the_first_tile, "results are wrong"),
        (_nan, "results are wrong"),
    ],
)
def test_where_it_fails_the_reference_multiplies(on_cpu, monkeypatch, multiply, said):
    monkeypatch.setattr(tinygemm, "_multiply", multiply)
    assert re.search(said, kernels.ladder("cpu")["tinygemm"])
    x, matrix, product = torch.randn(2, 96).bfloat16(), matrix_of(torch.randn(16, 96)), Matmul()
    torch.testing.assert_close(product(x, matrix), F.linear(x, matrix.values().bfloat16()))
    assert product.kernel == "reference"


def test_nibbles_in_another_order_are_seen(on_cpu, monkeypatch):
    def swapped(codes):
        return pack_for_cpu(codes.unflatten(1, (-1, 2)).flip(2).flatten(1).contiguous())

    monkeypatch.setattr(tinygemm, "_pack", swapped)
    assert kernels.ladder("cpu")["tinygemm"] == "its results are wrong on this device"


@pytest.mark.parametrize(("name", "bits"), [("minmax", 4), ("asymmetric_minmax", 8)])
def test_the_operation_of_gpus_takes_these_shapes_and_types(name, bits):
    said = nibbles(matrix_of(torch.randn(13, 200), name, bits))
    # tensors without numbers know what the operation's checks know
    with FakeTensorMode():
        codes = torch.empty(said.codes.shape, dtype=said.codes.dtype)
        packed = tinygemm._pack(codes)
        assert packed.shape == (said.codes.shape[0] // 8, said.codes.shape[1] // 128, 32, 4)
        x = torch.empty(3, said.codes.shape[1], dtype=torch.bfloat16)
        pairs = torch.empty(said.scales_and_zeros.shape, dtype=torch.bfloat16)
        y = tinygemm._multiply(x, packed, said.group, pairs)
    assert y.shape == (3, said.codes.shape[0]) and y.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", [(13, 768), (768, 3072), (50257, 768)], ids=str)
def test_on_a_gpu(granularity, shape):
    if torch.cuda.get_device_capability() < (8, 0):
        assert "and later" in kernels.ladder("cuda")["tinygemm"]
        pytest.skip("too old")
    assert kernels.ladder("cuda")["tinygemm"] == "works"
    weight, bias = torch.randn(shape), torch.randn(shape[0]).bfloat16()
    for name, bits in WEIGHTS:
        matrix, product = matrix_of(weight, name, bits, granularity, "cuda"), Matmul()
        for tokens in (1, 5, 17, 200, 300):
            x = torch.randn(tokens, shape[1]).bfloat16().cuda()
            wanted = F.linear(x.double(), matrix.values().double(), bias.cuda().double())
            given = product(x, matrix, bias.cuda())
            assert product.kernel == ("tinygemm" if taken(matrix) else "reference")
            assert float((given - wanted).abs().max()) <= 0.01 * float(wanted.abs().max())


@pytest.mark.gpu
def test_on_a_gpu_inputs_that_are_no_bfloat16_are_multiplied_by_the_reference():
    matrix = matrix_of(torch.randn(16, 96), device="cuda")
    for dtype in (torch.float16, torch.float32):
        product = Matmul()
        product(torch.randn(2, 96, device="cuda", dtype=dtype), matrix)
        assert product.kernel == "reference"
