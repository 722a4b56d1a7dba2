"""Packed models through the exporters of ONNX, old and new, and OpenVINO's converter by hand."""

import pytest
import torch
from packed_graphs import EXAMPLE, HEADS, KIND_IDS, KINDS, OTHERS, check, packed_for_export

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

NAMES = ["input_ids", "attention_mask"]
DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


def onnx_old(model, folder):
    pytest.importorskip("onnx")
    axes = {name: {0: "rows", 1: "length"} for name in NAMES}
    return _onnx(model, folder, dynamo=False, dynamic_axes=axes)


def onnx_new(model, folder):
    pytest.importorskip("onnxscript")
    return _onnx(model, folder, dynamo=True, dynamic_shapes=(DYNAMIC, DYNAMIC), verbose=False)


def _onnx(model, folder, **options):
    runtime = pytest.importorskip("onnxruntime")
    file = str(folder / "model.onnx")
    torch.onnx.export(model, EXAMPLE, file, input_names=NAMES, output_names=["logits"], **options)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda *batch: session.run(None, {name: x.numpy() for name, x in zip(names, batch, strict=True)})[0]


def openvino(model, folder):
    ov = pytest.importorskip("openvino")
    converted = ov.convert_model(model, example_input=EXAMPLE)
    compiled = ov.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda *batch: compiled([x.numpy() for x in batch])[0]


@pytest.mark.parametrize("how", [onnx_old, onnx_new, openvino], ids=lambda how: how.__name__)
@pytest.mark.parametrize(("weights", "scheme", "attention"), KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("name", HEADS)
def test_an_exported_model_gives_what_the_packed_model_gives(name, weights, scheme, attention, how, tmp_path):
    model = packed_for_export(name, weights, scheme, attention)
    with torch.no_grad():
        graph = how(model, tmp_path)
    check(graph, model, OTHERS)
