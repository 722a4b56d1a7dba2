"""Every kernel multiplies what the quantizers say, and one that cannot is never used."""

import copy
import logging
import pickle
import sys
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from processors import needs_exact_bytes

from lmcompress.checkpoint.schema import ActivationEncoding
from lmcompress.errors import CheckpointError, LmcompressError
from lmcompress.kernels import blockwise, matmul, matrix, ranges
from lmcompress.kernels import dispatch as kernels
from lmcompress.kernels.dispatch import using
from lmcompress.kernels.matmul import Matmul
from lmcompress.kernels.matrix import Inputs, Matrix
from lmcompress.numerics.grids import PerGroup, PerRow, PerTensor
from lmcompress.numerics.inputs import static_range
from lmcompress.numerics.packing import container_for, pack
from lmcompress.numerics.quantizers.registry import quantizer_for

LADDER = [name for name, said in kernels.ladder().items() if said.startswith("works")]
# those that multiply quantized inputs
WORKING = [name for name in LADDER if name != "fbgemm16"]
OF_WEIGHTS = "fbgemm16" if "fbgemm16" in LADDER else "reference"
FEW = kernels.kernels(few=True)[0].name
GROUPS = PerGroup(8)


def encoding(bits=8, symmetric=True, granularity="tensor", **more):
    return ActivationEncoding(bits=bits, symmetric=symmetric, granularity=granularity, **more)


ENCODINGS = {
    "symmetric": encoding(),
    "asymmetric": encoding(symmetric=False),
    "by token": encoding(granularity="token"),
    "asymmetric by token": encoding(symmetric=False, granularity="token"),
    "clipped": encoding(clip=0.8),
    "asymmetric, clipped": encoding(symmetric=False, clip=0.8),
    "clipped by token": encoding(granularity="token", clip=0.8),
    "4 bits": encoding(bits=4),
    "4 bits, asymmetric": encoding(bits=4, symmetric=False),
    "4 bits, asymmetric by token": encoding(bits=4, symmetric=False, granularity="token"),
    "static": encoding(range="static"),
    "static, full": encoding(range="static", full=True),
    "static, asymmetric": encoding(range="static", symmetric=False),
    "static, 4 bits": encoding(bits=4, range="static"),
    "static, 4 bits, asymmetric": encoding(bits=4, range="static", symmetric=False),
}
WEIGHTS = [
    ("minmax", 8), ("minmax", 4), ("minmax", 3), ("minmax", "ternary"), ("lsq", 8), ("elastic", 2), ("binary", 1),
    ("asymmetric_minmax", 8), ("asymmetric_minmax", 4), ("asymmetric_minmax", 2),
]  # fmt: skip


def matrix_of(weight, name="minmax", bits=8, granularity=None):
    granularity = granularity or PerRow()
    quantizer = quantizer_for(name, bits)
    state = () if quantizer.initial is None else (quantizer.initial(weight, bits=bits, granularity=granularity),)
    q = quantizer.function(weight, *state, bits=bits, granularity=granularity)
    container = container_for(q.grid)
    packed = pack(q.codes, q.grid, container).flatten()
    return Matrix(packed, q.scales, q.zero_points, tuple(weight.shape), q.grid, container, granularity)


def inputs_of(given):
    """With a range that cuts a little of normal numbers, where it is static."""
    return Inputs(given, *(static_range(-1.1, 1.7, given) if given.range == "static" else (None, None)))


def expected(x, matrix, bias=None, inputs=None):
    """In float64, from numbers that the quantizers give."""
    x = x if inputs is None else inputs.quantized(x.detach()).values
    return F.linear(x.double(), matrix.values().double(), None if bias is None else bias.double())


def assert_near(given, wanted, tolerance=1e-5):
    assert given.shape == wanted.shape
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(given.double(), wanted, rtol=0, atol=tolerance * scale + 1e-12)


@pytest.fixture
def fresh_choice():
    """What works is tried anew before and after."""
    kernels._tried.cache_clear()
    yield
    kernels._tried.cache_clear()


def test_on_this_machine_more_than_the_reference_works():
    assert WORKING[-1] == "reference" and len(WORKING) > 1


@needs_exact_bytes
@pytest.mark.parametrize("kernel", WORKING)
@pytest.mark.parametrize("given", ENCODINGS.values(), ids=ENCODINGS)
def test_every_kernel_multiplies_the_codes_of_every_input(kernel, given):
    x, weight, bias = torch.randn(3, 5, 33), torch.randn(13, 33), torch.randn(13)
    for name, bits in WEIGHTS:
        matrix, inputs, product = matrix_of(weight, name, bits), inputs_of(given), Matmul()
        with using(kernel=kernel):
            assert_near(product(x, matrix, bias, inputs), expected(x, matrix, bias, inputs))
            assert_near(product(x[:1, :1], matrix, bias, inputs), expected(x[:1, :1], matrix, bias, inputs))
        assert product.kernel == kernel


@pytest.mark.parametrize("kernel", WORKING)
@pytest.mark.parametrize("granularity", [PerTensor(), PerRow()], ids=str)
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 4),
    width=st.integers(1, 40),
    out=st.integers(1, 24),
    given=st.sampled_from(list(ENCODINGS.values())),
    weights=st.sampled_from(WEIGHTS),
    seed=st.integers(0, 5),
    biased=st.booleans(),
)
def test_of_any_size(kernel, granularity, tokens, width, out, given, weights, seed, biased):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(tokens, width, generator=generator), torch.randn(out, width, generator=generator)
    bias = torch.randn(out, generator=generator) if biased else None
    matrix, inputs = matrix_of(weight, *weights, granularity), inputs_of(given)
    # what cancels is lost of any sum: the operands say what rounding may be
    reach = (expected(x.abs(), matrix).abs().max() if tokens else torch.tensor(0.0)) + width
    with using(kernel=kernel):
        result = Matmul()(x, matrix, bias, inputs)
    torch.testing.assert_close(result.double(), expected(x, matrix, bias, inputs), rtol=0, atol=2e-6 * float(reach))


@pytest.mark.parametrize("kernel", WORKING)
@pytest.mark.parametrize("given", [encoding(), encoding(symmetric=False)], ids=["symmetric", "asymmetric"])
def test_a_number_in_the_middle_moves_by_one_code_at_most(kernel, given):
    # 127 or 255 steps of 1, and all others halfway
    x = torch.arange(-64.0, 64.0) + 0.5
    x[0], x[-1] = (-127.0, 127.0) if given.symmetric else (-128.0, 127.0)
    x = x.unsqueeze(0)
    matrix, inputs = matrix_of(torch.randn(5, 128)), inputs_of(given)
    with using(kernel=kernel):
        result = Matmul()(x, matrix, None, inputs)
    step = float(inputs.quantized(x).scales)
    assert ((result - expected(x, matrix, None, inputs)).abs() <= step * matrix.values().abs().sum(1)).all()


@pytest.mark.parametrize("kernel", WORKING)
@pytest.mark.parametrize("given", ENCODINGS.values(), ids=ENCODINGS)
def test_zeros_give_the_bias(kernel, given):
    weight = torch.randn(4, 9)
    weight[2] = 0
    for name in ("minmax", "asymmetric_minmax"):
        bias = torch.randn(4)
        with using(kernel=kernel):
            result = Matmul()(torch.zeros(2, 9), matrix_of(weight, name), bias, inputs_of(given))
        torch.testing.assert_close(result, bias.expand(2, 4))


@pytest.mark.parametrize("kernel", WORKING)
@pytest.mark.parametrize("size", [1e-9, 1e-4, 1e6])
@pytest.mark.parametrize("given", ["symmetric", "asymmetric", "by token", "asymmetric by token"])
def test_small_and_large_inputs_keep_their_digits(kernel, size, given):
    x, matrix, inputs = torch.randn(4, 17) * size, matrix_of(torch.randn(6, 17)), inputs_of(ENCODINGS[given])
    with using(kernel=kernel):
        assert_near(Matmul()(x, matrix, None, inputs), expected(x, matrix, None, inputs))


@pytest.mark.parametrize("kernel", WORKING)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("given", [e for e in ENCODINGS.values() if e.clip is None], ids=str)
def test_nan_and_infinity_show(kernel, wrong, given):
    x, matrix, inputs = torch.randn(3, 9), matrix_of(torch.randn(4, 9)), inputs_of(given)
    x[1, 2] = wrong
    with using(kernel=kernel):
        result = Matmul()(x, matrix, None, inputs)
    if given.range == "static":
        # a given range clips it, for which nothing is read twice; what NaN becomes is not said
        assert_near(result[[0, 2]], expected(x[[0, 2]], matrix, None, inputs))
        if wrong == torch.inf:
            assert_near(result, expected(x, matrix, None, inputs))
        return
    assert result[1].isnan().all()
    if given.granularity == "token":
        assert not result[[0, 2]].isnan().any()


@pytest.mark.parametrize("kernel", WORKING)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("clip", [0.5, 1.0, 2.5])
def test_the_grid_of_a_clipped_asymmetric_range_ends_at_the_clip(kernel, bits, clip):
    # the zero point is rounded, so that there may be a code beyond the clip
    x, matrix = torch.linspace(-3, 3, 64).reshape(4, 16), matrix_of(torch.eye(16))
    inputs = inputs_of(encoding(bits=bits, symmetric=False, clip=clip))
    with using(kernel=kernel):
        assert_near(Matmul()(x, matrix, None, inputs), expected(x, matrix, None, inputs))


def odd_inputs(width):
    x = torch.randn(4, 6, width)
    return {
        "transposed": x.transpose(0, 1),
        "strided": torch.randn(4, 6, 2 * width)[..., ::2],
        "expanded": x[:1, :1].expand(3, 5, width),
        "one token": x[0, :1],
        "a row of zeros": torch.cat([torch.zeros(1, width), x[0]]),
        "empty": x[:0],
        "denormal": x * 1e-42,
        "huge": x * 1e30,
        "half": x.half(),
        "bfloat16": x.bfloat16(),
    }


@pytest.mark.parametrize("kernel", WORKING)
@pytest.mark.parametrize("given", ENCODINGS.values(), ids=ENCODINGS)
def test_odd_inputs_are_multiplied_as_by_the_reference(kernel, given):
    for out, width, name in ((7, 13, "asymmetric_minmax"), (16, 1, "minmax")):
        matrix, inputs, bias = matrix_of(torch.randn(out, width), name), inputs_of(given), torch.randn(out)
        for what, x in odd_inputs(width).items():
            with using(kernel=kernel):
                result = Matmul()(x, matrix, bias, inputs)
            with using(kernel="reference"):
                wanted = Matmul()(x, matrix, bias, inputs)
            assert (result.dtype, result.shape) == (x.dtype, wanted.shape), what
            if not x.numel():
                continue
            # of numbers with few digits some lie in the middle between two codes, and may get the other
            step = inputs.quantized(x).scales.max() if x.dtype != torch.float32 else 0.0
            scale = wanted.float().abs().max() * (1e-5 if x.dtype == torch.float32 else 0.01)
            allowed = scale + step * matrix.values().abs().amax(dim=1)
            assert ((result - wanted).abs() <= allowed).all(), what


@pytest.mark.parametrize("granularity", [PerRow(), PerTensor(), GROUPS], ids=str)
def test_groups_are_multiplied_by_the_reference(granularity):
    x, bias = torch.randn(2, 3, 16), torch.randn(7)
    matrix, product = matrix_of(torch.randn(7, 16), "minmax", 4, granularity), Matmul()
    assert_near(product(x, matrix, bias), expected(x, matrix, bias), 1e-6)
    assert product.kernel == ("reference" if granularity == GROUPS else OF_WEIGHTS)
    if granularity == GROUPS:
        inputs = inputs_of(encoding())
        assert_near(product(x, matrix, bias, inputs), expected(x, matrix, bias, inputs))
        assert product.kernel == "reference"


@pytest.mark.skipif(OF_WEIGHTS == "reference", reason="FBGEMM is not in this torch")
@pytest.mark.parametrize("granularity", [PerRow(), PerTensor()], ids=str)
@pytest.mark.parametrize(("name", "bits"), WEIGHTS)
def test_codes_in_float16_are_exact(granularity, name, bits):
    matrix, bias, product = matrix_of(torch.randn(13, 33), name, bits, granularity), torch.randn(13), Matmul()
    for tokens in (0, 1, 5, 40):
        x = torch.randn(tokens, 33)
        assert_near(product(x, matrix, bias), expected(x, matrix, bias), 1e-6)
        assert_near(product(x, matrix, None, post="gelu"), F.gelu(expected(x, matrix)), 1e-6)
        # few tokens of bfloat16 too, whose weights are then not rounded to it
        assert_near(product(x.bfloat16(), matrix, bias), expected(x.bfloat16(), matrix, bias), 0.02)
        if tokens:
            assert product.kernel == ("fbgemm16" if tokens <= kernels.FEW_TOKENS else "reference")
    assert torch.isnan(product(torch.full((1, 33), torch.nan), matrix)).all()
    kernel = kernels.HalfCodes()
    assert "groups" in kernel.refusal(replace(matrix, granularity=GROUPS), None, torch.float32)
    assert "torch.float16" in kernel.refusal(matrix, None, torch.float16)
    assert "many tokens" in kernel.refusal(matrix, None, torch.bfloat16)
    assert "inputs are quantized" in kernel.refusal(matrix, inputs_of(encoding()), torch.float32)
    with pytest.raises(LmcompressError, match="use the reference"):
        kernel.prepack(matrix, None, inputs_of(encoding()), torch.float32)


@pytest.mark.parametrize("wrong", [torch.zeros(24), torch.ones(24, 80)], ids=["another operation", "wrong numbers"])
def test_float16_is_tested_too(monkeypatch, wrong):
    fake = SimpleNamespace(linear_prepack_fp16=lambda values, bias: values)
    fake.linear_dynamic_fp16 = SimpleNamespace(default=lambda x, packed: x @ wrong.t())
    monkeypatch.setattr(torch.ops, "quantized", fake)
    said = kernels.HalfCodes().trouble(torch.device("cpu"))
    assert said and (said.startswith("not in this torch") or "wrong" in said)


@pytest.mark.parametrize("granularity", [PerRow(), PerTensor(), GROUPS], ids=str)
@pytest.mark.parametrize("given", [None, *ENCODINGS.values()], ids=["weights only", *ENCODINGS])
def test_low_memory_changes_no_result(monkeypatch, granularity, given):
    monkeypatch.setattr(blockwise, "BLOCK_WEIGHTS", 64)
    x, weight, bias = torch.randn(2, 3, 16), torch.randn(11, 16), torch.randn(11)
    inputs = None if given is None else inputs_of(given)
    for name, bits in WEIGHTS:
        matrix, product = matrix_of(weight, name, bits, granularity), Matmul()
        with using(memory="low"):
            assert_near(product(x, matrix, bias, inputs), expected(x, matrix, bias, inputs))
            assert product(x[:0], matrix, bias, inputs).shape == (0, 3, 11)
        integers = given is not None and granularity != GROUPS and "int_mm" in WORKING
        assert product.kernel == ("int_mm by blocks" if integers else "reference by blocks")


def test_low_memory_unpacks_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK_WEIGHTS", 64)
    codes, greatest = matrix_of(torch.randn(11, 16), bits=4), []
    unpack = matrix.unpack
    monkeypatch.setattr(
        matrix, "unpack", lambda _, shape, *a, **k: greatest.append(shape[0]) or unpack(_, shape, *a, **k)
    )
    with using(memory="low"):
        Matmul()(torch.randn(2, 16), codes, None, inputs_of(encoding()))
    assert greatest == [4, 4, 3]


@pytest.mark.parametrize("granularity", [PerRow(), PerTensor(), GROUPS], ids=str)
@pytest.mark.parametrize(("name", "bits"), WEIGHTS)
def test_rows_are_those_of_the_whole(granularity, name, bits):
    matrix = matrix_of(torch.randn(20, 24), name, bits, granularity)
    ids = torch.randint(20, (3, 5))
    assert torch.equal(matrix.rows(ids), F.embedding(ids, matrix.values()))
    assert matrix.rows(ids[:0]).shape == (0, 5, 24)
    assert torch.equal(matrix.block(4, 90).values(), matrix.values()[4:])


def test_rows_are_unpacked_alone(monkeypatch):
    codes, seen = matrix_of(torch.randn(20, 24), bits=2), []
    unpack = matrix.unpack
    monkeypatch.setattr(matrix, "unpack", lambda _, shape, *a, **k: seen.append(shape) or unpack(_, shape, *a, **k))
    codes.rows(torch.tensor([3, 19]))
    assert seen == [(2, 24)]


@pytest.mark.parametrize("row", [-1, 20])
def test_rows_that_are_not_there_are_refused(row):
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        matrix_of(torch.randn(20, 24)).rows(torch.tensor([row]))


def test_bytes_of_another_shape_are_refused():
    matrix = replace(matrix_of(torch.randn(20, 24)), shape=(20, 25))
    with pytest.raises(CheckpointError, match="shorter than the shape says"):
        Matmul()(torch.randn(2, 25), matrix, None, inputs_of(encoding()))


def test_what_changes_is_made_ready_again():
    x, bias = torch.randn(2, 9), torch.randn(4)
    matrix, inputs, product = matrix_of(torch.randn(4, 9)), inputs_of(ENCODINGS["static"]), Matmul()

    def check():
        assert_near(product(x, matrix, bias, inputs), expected(x, matrix, bias, inputs))

    check()
    ready = product._ready["few"]
    check()
    assert product._ready["few"] is ready
    for tensor in (matrix.scales, bias, inputs.scale):
        tensor.mul_(1.5)
        check()
    matrix.packed.copy_(matrix_of(torch.randn(4, 9)).packed)
    check()
    matrix = matrix_of(torch.randn(4, 9), bits=4)
    check()
    with using(kernel="reference"):
        check()
        assert product.kernel == "reference"
    check()
    assert product.kernel == FEW


def test_another_description_of_the_input_is_another_product():
    x, matrix, product = torch.randn(3, 9), matrix_of(torch.randn(4, 9)), Matmul()
    for inputs in (None, inputs_of(encoding()), inputs_of(encoding(symmetric=False)), inputs_of(encoding(bits=4))):
        assert_near(product(x, matrix, None, inputs), expected(x, matrix, None, inputs))


def test_a_vector_is_taken_as_by_linear():
    x, matrix, inputs = torch.randn(9), matrix_of(torch.randn(4, 9)), inputs_of(encoding())
    for memory in ("fast", "low"):
        with using(memory=memory):
            assert_near(Matmul()(x, matrix, None, inputs), expected(x, matrix, None, inputs))


def test_what_was_made_in_inference_mode_works():
    with torch.inference_mode():
        x, matrix, product, inputs = torch.randn(2, 9), matrix_of(torch.randn(4, 9)), Matmul(), inputs_of(encoding())
        for _ in range(2):
            assert_near(product(x, matrix, None, inputs), expected(x, matrix, None, inputs))


def test_what_was_made_ready_in_inference_mode_gives_gradients_later():
    matrix, product, x = matrix_of(torch.randn(4, 9)), Matmul(), torch.randn(2, 9)
    for inputs in (None, inputs_of(encoding())):
        with torch.inference_mode():
            before = product(x, matrix, None, inputs)
        leaf = x.clone().requires_grad_()
        product(leaf, matrix, None, inputs).sum().backward()
        torch.testing.assert_close(leaf.grad, matrix.values().sum(0).expand(2, 9))
        assert torch.equal(before, product(x, matrix, None, inputs))


def test_copies_start_afresh():
    product = Matmul()
    x, matrix, inputs = torch.randn(2, 9), matrix_of(torch.randn(4, 9)), inputs_of(encoding())
    product(x, matrix, None, inputs)
    for other in (copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
        assert other.kernel == ""
        assert torch.equal(other(x, matrix, None, inputs), product(x, matrix, None, inputs))
    product.reset()
    assert product.kernel == "" and not product._ready


@pytest.mark.parametrize("given", [None, *ENCODINGS.values()], ids=["weights only", *ENCODINGS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_comes_back_as_it_came(given, dtype):
    x, bias = torch.randn(2, 9).to(dtype), torch.randn(4).to(dtype)
    matrix, inputs = matrix_of(torch.randn(4, 9)), None if given is None else inputs_of(given)
    result = Matmul()(x, matrix, bias, inputs)
    assert result.dtype == dtype
    assert_near(result, expected(x, matrix, bias, inputs), 0.02 if dtype == torch.bfloat16 else 0.003)


@pytest.mark.parametrize("kernel", WORKING)
def test_autocast_does_not_reach_a_quantized_product(kernel):
    x, matrix, inputs = torch.randn(2, 9), matrix_of(torch.randn(4, 9)), inputs_of(encoding())
    with using(kernel=kernel), torch.autocast("cpu", torch.bfloat16):
        result = Matmul()(x, matrix, None, inputs)
    assert_near(result, expected(x, matrix, None, inputs))


@pytest.mark.parametrize("kernel", WORKING)
@pytest.mark.parametrize("given", ["symmetric", "asymmetric", "static", "clipped", "by token"])
def test_the_gradient_of_the_input_is_the_references(kernel, given):
    x, bias = torch.randn(3, 9, requires_grad=True), torch.randn(4)
    matrix, inputs = matrix_of(torch.randn(4, 9)), inputs_of(ENCODINGS[given])
    with using(kernel=kernel):
        result = Matmul()(x, matrix, bias, inputs)
    gradient = torch.randn_like(result)
    (ours,) = torch.autograd.grad(result, x, gradient)
    wanted = F.linear(inputs.quantized(x).values, matrix.values(), bias)
    torch.testing.assert_close(ours, torch.autograd.grad(wanted, x, gradient)[0])
    assert_near(result.detach(), expected(x, matrix, bias, inputs))


@pytest.mark.parametrize("kernel", WORKING)
@pytest.mark.parametrize("given", [None, *ENCODINGS.values()], ids=["weights only", *ENCODINGS])
def test_a_gelu_in_the_product_is_that_after_it(kernel, given):
    x, bias = torch.randn(3, 5, 33), torch.randn(13)
    inputs, product = None if given is None else inputs_of(given), Matmul()
    for name, post in (("minmax", "gelu"), ("asymmetric_minmax", "gelu"), ("minmax", "gelu_tanh")):
        matrix = matrix_of(torch.randn(13, 33), name)
        approximate = {"gelu": "none", "gelu_tanh": "tanh"}[post]
        with using(kernel=kernel):
            result = product(x, matrix, bias, inputs, post=post)
            assert_near(result, F.gelu(expected(x, matrix, bias, inputs), approximate=approximate))
            assert product(x[:0], matrix, bias, inputs, post=post).shape == (0, 5, 13)
            # the other result is still to be had
            assert_near(product(x, matrix, bias, inputs), expected(x, matrix, bias, inputs))


def test_a_gelu_in_the_product_has_its_gradient():
    x, bias = torch.randn(3, 9, requires_grad=True), torch.randn(4)
    matrix, inputs = matrix_of(torch.randn(4, 9)), inputs_of(encoding())
    result = Matmul()(x, matrix, bias, inputs, post="gelu")
    (ours,) = torch.autograd.grad(result.sum(), x)
    wanted = F.gelu(F.linear(inputs.quantized(x).values, matrix.values(), bias))
    torch.testing.assert_close(ours, torch.autograd.grad(wanted.sum(), x)[0])


def test_another_function_of_the_result_is_refused():
    with pytest.raises(LmcompressError, match="unknown function of a matmul's result 'geluu'.*gelu"):
        Matmul()(torch.randn(2, 9), matrix_of(torch.randn(4, 9)), post="geluu")


class _Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix, self.inputs, self.product = matrix_of(torch.randn(4, 9)), inputs_of(encoding()), Matmul()

    def forward(self, x):
        return self.product(x * 2, self.matrix, None, self.inputs) + 1

    def expected(self, x):
        return expected(x * 2, self.matrix, None, self.inputs) + 1


@needs_exact_bytes
def test_a_compiled_model_uses_the_kernel():
    module = _Module()
    compiled = torch.compile(module, backend="eager")
    for size in (1.0, 30.0):
        x = torch.randn(2, 9) * size
        with torch.no_grad():
            assert_near(compiled(x), module.expected(x))
    assert module.product.kernel == WORKING[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["trace", "export"])
def test_a_graph_holds_no_range_of_its_example(how):
    module, x = _Module().eval(), torch.randn(2, 9)
    with torch.no_grad():
        if how == "trace":
            graph = torch.jit.trace(module, x)
        else:
            graph = torch.export.export(module, (x,), strict=False).module()
        assert_near(graph(x * 30), module.expected(x * 30))


def test_the_choice_is_made_once_and_said(fresh_choice, caplog):
    with caplog.at_level(logging.INFO, logger="lmcompress.kernels.dispatch"):
        for _ in range(2):
            Matmul()(torch.randn(2, 9), matrix_of(torch.randn(4, 9)), None, inputs_of(encoding()))
            kernels.ladder("cpu")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"int8 matmuls on cpu use {WORKING[0]}, those with only weights quantized ")
    assert f"use {OF_WEIGHTS} where it accepts them (" in message and "tinygemm: for CUDA devices" in message


@dataclass(frozen=True)
class _Broken:
    """A kernel that does not do what it should."""

    prepack_with: object
    name: str = "fbgemm"

    def refusal(self, matrix, inputs, dtype):
        return None

    def prepack(self, *arguments):
        return self.prepack_with(*arguments)


def _missing(*_):
    return torch.ops.quantized.no_such_product


def _off_by_a_code(*arguments):
    ready = kernels.Reference().prepack(*arguments)
    return lambda x: ready(x) + 64


@pytest.mark.parametrize(("prepare", "said"), [(_missing, "no_such_product"), (_off_by_a_code, "results are wrong")])
def test_a_kernel_that_is_missing_or_wrong_is_skipped(monkeypatch, fresh_choice, prepare, said):
    monkeypatch.setattr(kernels, "KERNELS", (_Broken(prepare), kernels.Reference()))
    assert said in kernels.ladder()["fbgemm"]
    x, matrix, inputs, product = torch.randn(2, 9), matrix_of(torch.randn(4, 9)), inputs_of(encoding()), Matmul()
    assert_near(product(x, matrix, None, inputs), expected(x, matrix, None, inputs))
    assert product.kernel == "reference"
    with using(kernel="fbgemm"), pytest.raises(LmcompressError, match=f"does not work on cpu.*{said}.*reference"):
        product(x, matrix, None, inputs)


def _slowly(*arguments):
    ready = kernels.Reference().prepack(*arguments)
    return lambda x: time.sleep(0.02) or ready(x)


def test_a_kernel_that_is_slower_than_the_reference_is_skipped(monkeypatch, fresh_choice):
    monkeypatch.setattr(kernels, "KERNELS", (_Broken(_slowly), kernels.Reference()))
    assert kernels.ladder()["fbgemm"].startswith("slower than the reference, ")
    product = Matmul()
    product(torch.randn(2, 9), matrix_of(torch.randn(4, 9)), None, inputs_of(encoding()))
    assert product.kernel == "reference"
    with (
        using(kernel="fbgemm"),
        pytest.raises(LmcompressError, match="does not work on cpu .slower than the reference"),
    ):
        product(torch.randn(2, 9), matrix_of(torch.randn(4, 9)), None, inputs_of(encoding()))


@needs_exact_bytes
@pytest.mark.parametrize("gone", [("fbgemm",), ("fbgemm", "int_mm"), ("onednn",), ("onednn", "fbgemm", "int_mm")])
def test_the_day_kernels_leave_torch_the_next_one_is_used(monkeypatch, fresh_choice, gone):
    def left(kernel):
        return replace(_Broken(_missing), name=kernel.name) if kernel.name in gone else kernel

    monkeypatch.setattr(kernels, "KERNELS", tuple(map(left, kernels.KERNELS)))
    x, matrix, inputs, product = torch.randn(40, 9), matrix_of(torch.randn(4, 9)), inputs_of(encoding()), Matmul()
    assert_near(product(x, matrix, None, inputs), expected(x, matrix, None, inputs))
    assert product.kernel == next(name for name in WORKING if name not in gone)


@pytest.mark.parametrize("given", ENCODINGS.values(), ids=ENCODINGS)
def test_without_quantized_tensors_codes_are_the_same(monkeypatch, given):
    monkeypatch.setattr(ranges, "_quantized_tensors", lambda: False)
    x, matrix, inputs = torch.randn(3, 5, 33), matrix_of(torch.randn(13, 33)), inputs_of(given)
    with using(kernel="onednn"):
        assert_near(Matmul()(x, matrix, None, inputs), expected(x, matrix, None, inputs))


@needs_exact_bytes
@pytest.mark.skipif("onednn" not in WORKING or "fbgemm" not in WORKING, reason="needs both")
def test_few_tokens_have_a_kernel_of_their_own():
    matrix, inputs, product = matrix_of(torch.randn(4, 9)), inputs_of(encoding()), Matmul()
    few, many = torch.randn(2, 4, 9), torch.randn(3, 3, 9)
    for _ in range(2):
        for x, kernel in ((few, "fbgemm"), (many, "onednn")):
            assert_near(product(x, matrix, None, inputs), expected(x, matrix, None, inputs))
            assert product.kernel == kernel
    both = dict(product._ready)
    product(few, matrix, None, inputs)
    assert product._ready == both
    # what has changed is dropped of both
    matrix.scales.mul_(2)
    product(few, matrix, None, inputs)
    assert set(product._ready) == {"few"}


@needs_exact_bytes
def test_without_vnni_codes_that_may_saturate_go_elsewhere(monkeypatch, fresh_choice):
    test = kernels.self_test

    def saturating(kernel, device, greatest):
        return "its results are wrong" if kernel.name == "fbgemm" and greatest > 64 else test(kernel, device, greatest)

    monkeypatch.setattr(kernels, "self_test", saturating)
    assert kernels.ladder()["fbgemm"] == "works up to codes of 64"
    for bits, uses in ((8, "onednn"), (4, "fbgemm")):
        product = Matmul()
        product(torch.randn(2, 9), matrix_of(torch.randn(4, 9), bits=bits), None, inputs_of(encoding()))
        assert product.kernel == uses


def test_the_self_test_sees_saturation():
    class Saturating(kernels.Reference):
        def prepack(self, matrix, bias, inputs, dtype):
            weight = matrix.codes().double()

            def ready(x):
                # u8 x s8 in pairs, as vpmaddubsw adds them up: 16 bits
                levels = x.double() if not inputs.encoding.symmetric else x.double() + 128
                pairs = (levels.unsqueeze(1) * weight).unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767).sum(-1)
                return (pairs - (128 * weight.sum(1) if inputs.encoding.symmetric else 0)).float()

            return ready

    device = torch.device("cpu")
    assert kernels.self_test(Saturating(), device, 127) == "its results are wrong on this device"
    assert kernels.self_test(Saturating(), device, 64) is None


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"kernel": "fbgem"}, "unknown kernel 'fbgem'.*fbgemm"),
        ({"memory": "slow"}, "memory must be one of fast, low, got 'slow'"),
    ],
)
def test_unknown_settings_are_refused_and_leave_the_others(wrong, match):
    before = replace(kernels.settings)
    with pytest.raises(LmcompressError, match=match), using(**wrong):
        pass
    assert kernels.settings == before
    setattr(kernels.settings, *next(iter(wrong.items())))
    try:
        with pytest.raises(LmcompressError, match=match):
            Matmul()(torch.randn(2, 9), matrix_of(torch.randn(4, 9)))
    finally:
        kernels.settings.memory, kernels.settings.kernel = before.memory, before.kernel


def test_settings_come_back_after_an_error():
    with pytest.raises(ZeroDivisionError), using(memory="low", kernel="reference"):
        raise ZeroDivisionError
    assert kernels.settings == kernels.Settings()


@pytest.mark.parametrize("kernel", [kernels.Fbgemm(), kernels.Onednn(), kernels.IntMM()], ids=lambda k: k.name)
def test_integer_kernels_say_what_they_do_not_take(kernel):
    matrix = matrix_of(torch.randn(4, 16))
    assert "only weights" in kernel.refusal(matrix, None, torch.float32)
    groups = matrix_of(torch.randn(4, 16), granularity=GROUPS)
    assert "groups" in kernel.refusal(groups, inputs_of(encoding()), torch.float32)
    assert kernel.refusal(matrix, inputs_of(encoding()), torch.float32) is None
    with pytest.raises(LmcompressError, match="use the reference"):
        kernel.prepack(matrix, None, None, torch.float32)(torch.randn(1, 16))


@pytest.mark.parametrize(("name", "most"), [("minmax", 66_311), ("asymmetric_minmax", 33_025)])
def test_sums_that_overflow_32_bits_go_to_the_reference(name, most):
    for width in (most, most + 1, 70_000):
        weight = torch.ones(8, width)
        weight[::2] = -1
        matrix = matrix_of(weight, name)
        refused = [kernel.refusal(matrix, inputs_of(encoding()), torch.float32) for kernel in kernels.KERNELS[:3]]
        assert all(r is None for r in refused) if width == most else all(f"{most:,} of them" in r for r in refused)
    for name in ("symmetric", "asymmetric", "by token", "asymmetric by token", "4 bits, asymmetric"):
        for memory in ("fast", "low"):
            x, inputs, product = torch.ones(3, width), inputs_of(ENCODINGS[name]), Matmul()
            with using(memory=memory):
                assert_near(product(x, matrix, None, inputs), expected(x, matrix, None, inputs), 1e-4)
            assert product.kernel.startswith("reference")


@pytest.mark.parametrize("kernel", WORKING)
def test_sums_just_within_32_bits_are_right(kernel):
    for quantizer, width in (("minmax", 66_311), ("asymmetric_minmax", 33_025)):
        weight = torch.ones(8, width)
        weight[::2] = -1
        matrix = matrix_of(weight, quantizer)
        for name in ("symmetric", "asymmetric", "by token", "asymmetric by token"):
            x, inputs = torch.ones(3, width), inputs_of(ENCODINGS[name])
            with using(kernel=kernel):
                assert_near(Matmul()(x, matrix, None, inputs), expected(x, matrix, None, inputs), 1e-4)


def _in_threads(functions):
    """Run all at once, and raise what one raised."""
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    interval = sys.getswitchinterval()
    # after nearly every instruction it is another thread's turn
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


@pytest.fixture
def slow_preparation(monkeypatch):
    """Preparing takes so long that another thread gets its turn before and after; the list tells who did."""
    prepare, prepared = matmul._prepare, []

    def slowly(*arguments):
        time.sleep(0.001)
        made = prepare(*arguments)
        prepared.append(threading.get_ident())
        time.sleep(0.001)
        return made

    monkeypatch.setattr(matmul, "_prepare", slowly)
    return prepared


@pytest.mark.parametrize("given", [None, *ENCODINGS.values()], ids=["weights only", *ENCODINGS])
def test_one_product_serves_many_threads(slow_preparation, given):
    x, matrix, product = torch.randn(2, 9), matrix_of(torch.randn(4, 9)), Matmul()
    inputs = None if given is None else inputs_of(given)
    wanted = expected(x, matrix, None, inputs)

    def serve(dtype):
        for _ in range(10):
            result = product(x.to(dtype), matrix, None, inputs)
            assert result.dtype == dtype
            assert_near(result, wanted, 1e-5 if dtype == torch.float32 else 0.05)

    _in_threads([partial(serve, dtype) for dtype in (torch.float32, torch.bfloat16) * 3])
    # one of them prepares for all; only where the input is not quantized does its dtype matter
    assert given is None or len(slow_preparation) == 1


def test_another_thread_may_reset_a_product_at_any_moment():
    matrix, product, inputs = matrix_of(torch.randn(4, 9)), Matmul(), inputs_of(encoding())

    class Interrupted(torch.Tensor):
        """Asked for its axes when the matrix has been found and is about to be used."""

        def dim(self):
            product.reset()
            return super().dim()

    x = torch.randn(2, 9)
    for _ in range(2):
        result = product(x.as_subclass(Interrupted), matrix, None, inputs)
        assert_near(result.as_subclass(torch.Tensor), expected(x, matrix, None, inputs))


def test_a_static_range_without_a_scale_is_refused():
    static = SimpleNamespace(**encoding(range="static").model_dump())
    with pytest.raises(LmcompressError, match="a static range must have a scale"):
        Matmul()(torch.randn(2, 9), matrix_of(torch.randn(4, 9)), None, Inputs(static))


@pytest.mark.gpu
@pytest.mark.parametrize("given", ENCODINGS.values(), ids=ENCODINGS)
def test_on_a_gpu_the_product_is_that_of_the_cpu(given):
    weight, bias = torch.randn(13, 33), torch.randn(13)
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, 33)
        for name, bits in WEIGHTS:
            matrix, inputs, product = matrix_of(weight, name, bits), inputs_of(given), Matmul()
            there = replace(
                matrix, packed=matrix.packed.cuda(), scales=matrix.scales.cuda(),
                zero_points=None if matrix.zero_points is None else matrix.zero_points.cuda(),
            )  # fmt: skip
            static = [None if t is None else t.cuda() for t in (inputs.scale, inputs.zero_point)]
            result = product(x.cuda(), there, bias.cuda(), Inputs(given, *static))
            assert_near(result.cpu(), expected(x, matrix, bias, inputs), 1e-4)
            assert product.kernel == "int_mm"
