"""low_bit: every layout of fewer bits, of groups and of zero points, in both runtimes: exported = packed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import INPUTS, quantized
from torch import nn

from lmcompress.export.config import ExportConfig
from lmcompress.export.graph import ONNX_FILE, OPENVINO_FILE, write_onnx, write_openvino
from lmcompress.export.low_bit import (
    BlockedTable,
    NBitsMatmul,
    PackedTable,
    UnpackedByteMatmul,
    UnpackedMatmul,
    embedding_twin,
    head_twin,
    matmul_twin,
    unsigned,
)
from lmcompress.export.sessions import OnnxSession, session_of
from lmcompress.nn.packed import Layout, PackedEmbedding, PackedLinear, TiedHead
from lmcompress.numerics.grids import PerGroup, PerRow, PerTensor
from lmcompress.numerics.inputs import static_range
from lmcompress.numerics.packing import container_for

COLUMNS, ROWS, TOKENS = 96, 20, 70
QUANTIZERS = [
    ("minmax", 8), ("minmax", 4), ("minmax", 3), ("lsq", 2), ("elastic", 2), ("twn", "ternary"), ("binary", 1),
    ("asymmetric_minmax", 8), ("asymmetric_minmax", 4), ("asymmetric_minmax", 2),
]  # fmt: skip
GRANULARITIES = {"tensor": PerTensor(), "row": PerRow(), "group": PerGroup(32), "small group": PerGroup(12)}
WEIGHTS = [(*quantizer, name) for quantizer in QUANTIZERS for name in GRANULARITIES]
WITH_INPUTS = [
    (quantizer, bits, name, inputs)
    for quantizer, bits in (("minmax", 4), ("elastic", 2), ("asymmetric_minmax", 4))
    for name in ("row", "group", "small group")
    for inputs in INPUTS
    if inputs != "none"
]


def layout_of(made):
    return Layout(made.grid, container_for(made.grid), made.granularity, made.zero_points is not None)


def packed_linear(quantizer, bits, granularity, inputs="none", columns=COLUMNS, rows=ROWS):
    made = quantized(torch.randn(rows, columns), quantizer, bits, granularity)
    said = INPUTS[inputs]
    bias = nn.Parameter(torch.randn(rows))
    layer = PackedLinear(columns, rows, layout_of(made), said, bias)
    layer.fill(made, static_range(-3.0, 4.0, said) if said is not None and said.range == "static" else None)
    return layer.eval()


class Many(nn.Module):
    """Many twins in one graph, which saves exports; with the names that the writer of graphs reads."""

    has_rows = True

    def __init__(self, twins, x):
        super().__init__()
        self.twins, self.x = nn.ModuleList(twins), x
        self.inputs, self.outputs = ["x"], [f"y{number}" for number in range(len(twins))]
        self.model = nn.Identity()

    def forward(self, *tensors):
        return tuple(twin(tensors[0]) for twin in self.twins)

    def example(self):
        return (self.x,)

    def dynamic_shapes(self):
        return [{0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}]


def run(twins, x, to, folder):
    """The outputs of twins in a runtime, and the session; with other sizes than in the recorded example."""
    write_onnx(Many(twins, x[:2, :2]), folder / ONNX_FILE, ExportConfig(to=to))
    if to == "openvino":
        write_openvino(folder / ONNX_FILE, folder / OPENVINO_FILE, stateful=False)
        (folder / ONNX_FILE).unlink()
    session = session_of(folder, 1, "f32" if to == "openvino" else None)
    found = session.run({"x": x.numpy()})
    return [torch.from_numpy(np.asarray(found[name])) for name in session.outputs], session


def optimized(folder):
    import onnx

    OnnxSession(folder / ONNX_FILE, 1, optimized=folder / "optimized.onnx")
    return onnx.load(folder / "optimized.onnx").graph


def error(found, expected):
    """Relative error; an input between two codes may go to either, which is no more than a code among many."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_weights_alone_are_as_packed_in_every_layout(to, tmp_path):
    layers = [packed_linear(quantizer, bits, GRANULARITIES[name]) for quantizer, bits, name in WEIGHTS]
    twins = [matmul_twin(layer, layer.bias, to) for layer in layers]
    kept = [(layer, twin) for layer, twin in zip(layers, twins, strict=True) if twin is not None]
    # the others are signed bytes by row
    assert len(layers) - len(kept) == 4
    x = torch.randn(3, 5, COLUMNS)
    found, _ = run([twin for _, twin in kept], x, to, tmp_path)
    with torch.no_grad():
        for (layer, twin), output in zip(kept, found, strict=True):
            torch.testing.assert_close(
                output, layer(x), rtol=1e-4, atol=1e-4, msg=lambda text, t=twin: f"{type(t).__name__}: {text}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_quantized_inputs_are_as_packed_in_every_layout(to, tmp_path):
    layers = [
        packed_linear(quantizer, bits, GRANULARITIES[name], inputs) for quantizer, bits, name, inputs in WITH_INPUTS
    ]
    pairs = [(layer, matmul_twin(layer, layer.bias, to)) for layer in layers]
    pairs = [(layer, twin) for layer, twin in pairs if twin is not None]
    x = torch.randn(3, 5, COLUMNS)
    found, _ = run([twin for _, twin in pairs], x, to, tmp_path)
    with torch.no_grad():
        for (layer, twin), output in zip(pairs, found, strict=True):
            assert error(output, layer(x)) < 2e-3, f"{type(twin).__name__}, {layer}"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_embeddings_are_as_packed_in_every_layout(to, tmp_path):
    tables, twins = [], []
    for quantizer, bits, name in WEIGHTS[1::3]:
        made = quantized(torch.randn(TOKENS, COLUMNS), quantizer, bits, GRANULARITIES[name])
        table = PackedEmbedding(TOKENS, COLUMNS, layout_of(made))
        table.fill(made)
        twin = embedding_twin(table, to)
        if twin is not None:
            tables.append(table.eval())
            twins.append(twin)
    assert {type(twin) for twin in twins} == {PackedTable if to == "onnx" else BlockedTable}
    ids = torch.randint(0, TOKENS, (3, 5))
    found, _ = run(twins, ids, to, tmp_path)
    for table, output in zip(tables, found, strict=True):
        torch.testing.assert_close(output, table(ids), rtol=1e-6, atol=0)


class Tied(nn.Module):
    def __init__(self, embedding, head):
        super().__init__()
        self.embedding, self.head = embedding, head

    def forward(self, ids):
        return self.head(self.embedding(ids))


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_tied_head_shares_the_codes_in_the_file(to, tmp_path):
    models, twins = [], []
    for inputs, granularity in (("none", PerRow()), ("dynamic", PerRow()), ("static", PerGroup(32))):
        made, said = quantized(torch.randn(3000, COLUMNS), "minmax", 4, granularity), INPUTS[inputs]
        table = PackedEmbedding(3000, COLUMNS, layout_of(made), said)
        table.fill(made, static_range(-3.0, 4.0, said) if inputs == "static" else None)
        models.append(Tied(table, TiedHead(table)).eval())
        twin = embedding_twin(table, to)
        twins.append(Tied(twin, head_twin(table, twin, None)))
    ids = torch.randint(0, 3000, (3, 5))
    found, _ = run(twins, ids, to, tmp_path)
    with torch.no_grad():
        for model, output in zip(models, found, strict=True):
            assert error(output, model(ids)) < 2e-3
    size = sum(file.stat().st_size for file in tmp_path.iterdir() if file.suffix != ".xml")
    codes = 3 * 3000 * COLUMNS // 2
    scales = 4 * 3000 * (1 + 1 + COLUMNS // 32)
    zeros = 0 if to == "onnx" else 3000 * (1 + 1 + COLUMNS // 32)
    assert size < 1.05 * (codes + scales + zeros) + 30_000


def test_onnx_runtime_keeps_packed_weights_and_multiplies_integers(tmp_path):
    columns = 512
    alone = [packed_linear("minmax", 4, PerGroup(128), columns=columns, rows=256)]
    alone.append(packed_linear("elastic", 2, PerRow(), columns=columns, rows=256))
    integer = packed_linear("twn", "ternary", PerRow(), "dynamic", columns=columns, rows=256)
    twins = [matmul_twin(layer, layer.bias, "onnx") for layer in (*alone, integer)]
    assert [type(twin) for twin in twins] == [NBitsMatmul, NBitsMatmul, UnpackedByteMatmul]
    run(twins, torch.randn(3, 5, columns), "onnx", tmp_path)
    graph = optimized(tmp_path)
    counted = [node.op_type for node in graph.node]
    assert counted.count("MatMulNBits") == 2
    assert counted.count("MatMulIntegerToFloat") + counted.count("MatMulInteger") == 1
    # in the file: half a byte, a quarter of one, and a fifth
    codes = 256 * columns / 2 + 256 * columns / 4 + 256 * -(-columns // 5)
    assert codes < (tmp_path / ONNX_FILE).stat().st_size < 1.1 * codes + 25_000


def test_openvino_keeps_packed_weights(tmp_path):
    layers = [packed_linear("minmax", 4, granularity, columns=512) for granularity in (PerGroup(128), PerRow())]
    layers.append(packed_linear("minmax", 4, PerGroup(128), "static", columns=512))
    twins = [matmul_twin(layer, layer.bias, "openvino") for layer in layers]
    _, session = run(twins, torch.randn(3, 5, 512), "openvino", tmp_path)
    kinds = {kind: number for kind, number in session.products().items() if kind[0] == "FullyConnected"}
    assert kinds == {("FullyConnected", "u4"): 3}
    assert (tmp_path / "openvino_model.bin").stat().st_size < 1.1 * 3 * ROWS * 512 / 2 + 2000


def test_small_groups_have_no_packed_matmul_in_onnx_runtime():
    layer = packed_linear("minmax", 4, PerGroup(12))
    assert type(matmul_twin(layer, None, "onnx")) is UnpackedMatmul


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(QUANTIZERS), st.sampled_from(sorted(GRANULARITIES)), st.booleans(), st.integers(0, 1000))
def test_the_form_of_runtimes_stands_for_the_very_weights(quantizer, name, halves, seed):
    torch.manual_seed(seed)
    layer = packed_linear(*quantizer, GRANULARITIES[name])
    form = unsigned(layer, halves=halves)
    wide = COLUMNS // form.scales.shape[1]
    scales, points = (numbers.repeat_interleave(wide, 1) for numbers in (form.scales, form.zero_points))
    assert torch.equal((form.codes.float() - points) * scales, layer.dequantized())
    assert int(form.codes.max()) < 2**form.bits and 0 <= float(points.min()) <= float(points.max()) < 2**form.bits
    assert halves or torch.equal(points, points.round())
