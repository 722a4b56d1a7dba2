"""Every kernel multiplies what the quantizers say, and one that cannot is never used."""

import copy
import logging
import pickle
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcompress.checkpoint.schema import ActivationEncoding
from lmcompress.errors import CheckpointError, LmcompressError
from lmcompress.kernels import blockwise, matrix
from lmcompress.kernels import dispatch as kernels
from lmcompress.kernels.dispatch import using
from lmcompress.kernels.matmul import Matmul
from lmcompress.kernels.matrix import Inputs, Matrix
from lmcompress.numerics.grids import PerGroup, PerRow, PerTensor
from lmcompress.numerics.inputs import static_range
from lmcompress.numerics.packing import container_for, pack
from lmcompress.numerics.quantizers.registry import quantizer_for

WORKING = [name for name, said in kernels.ladder().items() if said.startswith("works")]
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
    if given.range == "static" and wrong == torch.inf:
        # a given range cuts it
        assert_near(result, expected(x, matrix, None, inputs))
        return
    assert result[1].isnan().all()
    if given.granularity == "token":
        assert not result[[0, 2]].isnan().any()


@pytest.mark.parametrize("granularity", [PerRow(), PerTensor(), GROUPS], ids=str)
def test_weights_only_and_groups_are_multiplied_by_the_reference(granularity):
    x, bias = torch.randn(2, 3, 16), torch.randn(7)
    matrix, product = matrix_of(torch.randn(7, 16), "minmax", 4, granularity), Matmul()
    assert_near(product(x, matrix, bias), expected(x, matrix, bias), 1e-6)
    assert product.kernel == "reference"
    if granularity == GROUPS:
        inputs = inputs_of(encoding())
        assert_near(product(x, matrix, bias, inputs), expected(x, matrix, bias, inputs))
        assert product.kernel == "reference"


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
        integers = given is not None and granularity != GROUPS
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
    ready = product._prepacked
    check()
    assert product._prepacked is ready
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
    assert product.kernel == WORKING[0]


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
    assert product.kernel == "" and product._prepacked is None


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


class _Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix, self.inputs, self.product = matrix_of(torch.randn(4, 9)), inputs_of(encoding()), Matmul()

    def forward(self, x):
        return self.product(x * 2, self.matrix, None, self.inputs) + 1

    def expected(self, x):
        return expected(x * 2, self.matrix, None, self.inputs) + 1


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
    assert "use reference where it accepts them (" in message and "tinygemm: for CUDA devices" in message


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


def test_without_vnni_codes_that_may_saturate_go_elsewhere(monkeypatch, fresh_choice):
    test = kernels.self_test

    def saturating(kernel, device, greatest):
        return "its results are wrong" if kernel.name == "fbgemm" and greatest > 64 else test(kernel, device, greatest)

    monkeypatch.setattr(kernels, "self_test", saturating)
    assert kernels.ladder()["fbgemm"] == "works up to codes of 64"
    for bits, uses in ((8, WORKING[1]), (4, "fbgemm")):
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
