"""In the graphs of torch.compile a matmul is one operation, with the result that it has outside."""

import pytest
import torch
import torch.nn.functional as F
from processors import needs_int_mm

from lmcompress.kernels import dispatch, graph
from lmcompress.kernels.dispatch import using
from lmcompress.kernels.matmul import Matmul
from lmcompress.kernels.matrix import Encoding, Inputs, Matrix
from lmcompress.numerics.grids import Grid, PerGroup, PerRow, PerTensor
from lmcompress.numerics.inputs import static_range
from lmcompress.numerics.packing import container_for, pack
from lmcompress.numerics.padding import stated
from lmcompress.numerics.quantizers.registry import quantizer_for

ENCODINGS = {
    "symmetric": Encoding(symmetric=True),
    "asymmetric": Encoding(),
    "by token": Encoding(symmetric=True, granularity="token"),
    "asymmetric by token": Encoding(granularity="token"),
    "clipped": Encoding(symmetric=True, clip=0.8),
    "4 bits": Encoding(bits=4, symmetric=True),
    "4 bits, asymmetric by token": Encoding(bits=4, granularity="token"),
    "static": Encoding(symmetric=True, range="static"),
    "static, asymmetric": Encoding(range="static"),
    "static, 4 bits, full": Encoding(bits=4, symmetric=True, range="static", full=True),
}


def matrix_of(weight, name="minmax", bits=8, granularity=None):
    granularity = granularity or PerRow()
    q = quantizer_for(name, bits).function(weight, bits=bits, granularity=granularity)
    container = container_for(q.grid)
    packed = pack(q.codes, q.grid, container).flatten()
    return Matrix(packed, q.scales, q.zero_points, tuple(weight.shape), q.grid, container, granularity)


def inputs_of(given):
    if given is None:
        return None
    return Inputs(given, *(static_range(-1.1, 1.7, given) if given.range == "static" else (None, None)))


class Layer(torch.nn.Module):
    """A matmul between operations that a compiler might fuse."""

    def __init__(self, given, name="minmax", bits=8, granularity=None, post=None):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(13), requires_grad=False)
        self.matrix, self.inputs = matrix_of(torch.randn(13, 24), name, bits, granularity), inputs_of(given)
        self.matmul, self.post = Matmul(), post

    def forward(self, x):
        return self.matmul(x * 2, self.matrix, self.bias, self.inputs, post=self.post) + 1

    def expected(self, x):
        x = (x * 2) if self.inputs is None else self.inputs.quantized(x * 2).values
        y = F.linear(x, self.matrix.values(), self.bias)
        return (y if self.post is None else F.gelu(y)) + 1


def compiled(module, **options):
    torch.compiler.reset()
    return torch.compile(module, backend="aot_eager", fullgraph=True, **options)


@pytest.mark.parametrize("given", [None, *ENCODINGS.values()], ids=["weights only", *ENCODINGS])
def test_one_graph_has_the_result_of_the_quantizer(given):
    for name, post in (("minmax", None), ("asymmetric_minmax", "gelu")):
        layer = Layer(given, name, post=post)
        model = compiled(layer)
        for size in (1.0, 30.0):
            x = torch.randn(3, 5, 24) * size
            with torch.no_grad():
                torch.testing.assert_close(model(x), layer.expected(x), rtol=1e-5, atol=1e-4 * size)


@pytest.mark.parametrize("granularity", [PerTensor(), PerGroup(8), PerGroup(1)], ids=str)
def test_other_granularities(granularity):
    for given in (None, ENCODINGS["asymmetric"]):
        layer, x = Layer(given, "minmax", 4, granularity), torch.randn(3, 5, 24)
        with torch.no_grad():
            torch.testing.assert_close(compiled(layer)(x), layer.expected(x), rtol=1e-5, atol=1e-4)


@needs_int_mm
@pytest.mark.parametrize("settings", [{"memory": "low"}, {"kernel": "reference"}, {"kernel": "int_mm"}], ids=str)
def test_settings_count_in_graphs_too(settings):
    layer, x = Layer(ENCODINGS["by token"]), torch.randn(3, 5, 24)
    model = compiled(layer)
    with torch.no_grad():
        torch.testing.assert_close(model(x), layer.expected(x), rtol=1e-5, atol=1e-4)
        with using(**settings):
            torch.testing.assert_close(model(x), layer.expected(x), rtol=1e-5, atol=1e-4)
            assert layer.matmul.kernel.startswith(settings.get("kernel", "int_mm by blocks"))


@needs_int_mm
@pytest.mark.parametrize("only", ["int_mm", "reference"])
@pytest.mark.parametrize("given", ["symmetric", "asymmetric", "asymmetric by token", "static, asymmetric"])
def test_where_there_is_no_onednn(monkeypatch, only, given):
    left = [kernel for kernel in dispatch.KERNELS if kernel.name in (only, "reference")]
    monkeypatch.setattr(dispatch, "KERNELS", tuple(left))
    dispatch._tried.cache_clear()
    try:
        for name in ("minmax", "asymmetric_minmax"):
            layer, x = Layer(ENCODINGS[given], name, post="gelu"), torch.randn(3, 5, 24)
            with torch.no_grad():
                torch.testing.assert_close(compiled(layer)(x), layer.expected(x), rtol=1e-5, atol=1e-4)
            assert layer.matmul.kernel == only
    finally:
        dispatch._tried.cache_clear()


def test_other_sizes_are_the_same_graph():
    layer = Layer(ENCODINGS["by token"])
    model = compiled(layer, dynamic=True)
    for shape in ((3, 5, 24), (2, 7, 24), (4, 24), (0, 24), (24,)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(model(x), layer.expected(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays(dtype):
    layer, x = Layer(ENCODINGS["static"]), torch.randn(3, 5, 24).to(dtype)
    with torch.no_grad():
        y = compiled(layer)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer.expected(x.float()), rtol=0.05, atol=0.15)


def test_padding_widens_no_range():
    layer, x = Layer(ENCODINGS["symmetric"]), torch.randn(2, 5, 24)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    x[1, 2:] *= 100
    for settings in ({}, {"memory": "low"}):

        @torch.compile(backend="aot_eager", fullgraph=True)
        def run(x, mask):
            with stated(mask):
                return layer(x)

        with torch.no_grad(), using(**settings):
            given = run(x, mask)
            with stated(mask):
                wanted = layer(x)
        torch.testing.assert_close(given[mask], wanted[mask], rtol=1e-4, atol=1e-4)


# Dynamo's, where a graph with a gradient breaks
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_gradient_is_the_references():
    layer, x = Layer(ENCODINGS["by token"], post="gelu"), torch.randn(3, 24, requires_grad=True)
    torch.compiler.reset()
    (ours,) = torch.autograd.grad(torch.compile(layer, backend="aot_eager")(x).sum(), x)
    torch.testing.assert_close(ours, torch.autograd.grad(layer.expected(x).sum(), x)[0], rtol=1e-4, atol=1e-4)


def test_what_changes_is_made_ready_again():
    layer, x = Layer(ENCODINGS["static"]), torch.randn(3, 24)
    model = compiled(layer)
    with torch.no_grad():
        for tensor in (layer.matrix.scales, layer.bias, layer.inputs.scale):
            model(x)
            tensor.mul_(1.5)
            torch.testing.assert_close(model(x), layer.expected(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("container", [8, 2, "base3"])
@pytest.mark.parametrize("granularity", [PerRow(), PerTensor(), PerGroup(1), PerGroup(32)], ids=str)
@pytest.mark.parametrize("given", [None, *ENCODINGS.values()], ids=["weights only", *ENCODINGS])
def test_a_layout_is_written_and_read(container, granularity, given):
    matrix = Matrix(torch.empty(0), torch.empty(0), None, (3, 64), Grid(-3, 4, 2), container, granularity)
    written = graph._written(matrix, None if given is None else Inputs(given))
    assert graph._read(written) == (((3,), 64, matrix.grid, container, granularity), given)


@pytest.mark.parametrize("given", ["symmetric", "asymmetric by token"])
def test_the_operations_are_what_torch_expects(given):
    layer, x = Layer(ENCODINGS[given]), torch.randn(3, 24)
    operands = graph._tensors(layer.matrix, layer.bias)
    written, number = graph._written(layer.matrix, layer.inputs), layer.matmul._number
    tests = ("test_schema", "test_faketensor")
    whole = (x, *operands, None, None, None, None, number, written, "gelu")
    torch.library.opcheck(torch.ops.lmcompress.matmul.default, whole, test_utils=tests)
    q = layer.inputs.quantized(x)
    codes = (q.levels + 128 if q.zero_points is None else q.levels).to(torch.uint8)
    of_codes = (codes, q.scales, q.zero_points, *operands, number, written, "", torch.bfloat16)
    torch.library.opcheck(torch.ops.lmcompress.matmul_of_codes.default, of_codes, test_utils=tests)
