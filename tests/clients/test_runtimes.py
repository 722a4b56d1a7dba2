"""ONNX Runtime and OpenVINO, by hand: exported, run, compared."""

from __future__ import annotations

import pytest
import torch
from client_drivers import SENTENCES
from client_forms import tokenizers
from client_table import client

from lmcompress.numerics.grids import Grid
from lmcompress.numerics.packing import pack, unpack

AUTO = ("AutoModelForSequenceClassification", "AutoModelForCausalLM")


def _agrees(driver, form, run, *args):
    for model, folder, auto, tokenizer in zip(
        (form.classifier, form.decoder), form.folders, AUTO, tokenizers(), strict=True
    ):
        batch = tokenizer(SENTENCES, return_tensors="pt", padding=True)
        given = {name: batch[name].tolist() for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            expected = model(**{name: batch[name] for name in given}).logits
        found = torch.tensor(run(driver, folder, auto, given, *args))
        kept = batch["attention_mask"].bool() if found.dim() == 3 else ...
        error = (found - expected)[kept].norm() / expected[kept].norm()
        assert error < 1e-3, f"{auto}: relative error {error:.2e}"


@client("ONNX Runtime, `torch.onnx.export`")
def test_onnx_of_the_new_exporter_gives_the_model_in_memory(form, run, tmp_path):
    _agrees("onnx", form, run, str(tmp_path / "model.onnx"), True)


@client("ONNX Runtime, `torch.onnx.export(dynamo=False)`")
def test_onnx_of_the_old_exporter_gives_the_model_in_memory(form, run, tmp_path):
    _agrees("onnx", form, run, str(tmp_path / "model.onnx"), False)


@client("OpenVINO, `convert_model`")
def test_openvino_gives_the_model_in_memory(form, run):
    _agrees("openvino", form, run)


class _Unpacks(torch.nn.Module):
    """A matmul with a matrix whose codes are unpacked in the graph."""

    def __init__(self, codes, grid):
        super().__init__()
        self.register_buffer("packed", pack(codes, grid))
        self.shape, self.grid = codes.shape, grid

    def forward(self, x):
        return x @ unpack(self.packed, self.shape, self.grid, check=False).float()


GRIDS = {
    "8": Grid(low=-127, levels=255),
    "8, unsigned": Grid(low=0, levels=256),
    "4": Grid(low=-7, levels=15),
    "4, unsigned": Grid(low=0, levels=16),
    "3": Grid(low=-3, levels=7),
    "2": Grid(low=-2, levels=4),
    "ternary": Grid(low=-1, levels=3),
    "1": Grid(low=-1, levels=2, stride=2),
}


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("runtime", ["onnx", "onnx, old", "openvino"])
@pytest.mark.parametrize("bits", GRIDS)
def test_codes_of_every_width_are_unpacked_right(bits, runtime, tmp_path):
    import onnxruntime
    import openvino

    grid = GRIDS[bits]
    codes = (torch.randint(0, grid.levels, (6, 20)) * grid.stride + grid.low).to(grid.dtype)
    model, x, file = _Unpacks(codes, grid).eval(), torch.randint(-8, 8, (3, 6)).float(), tmp_path / "model.onnx"
    if runtime == "openvino":
        compiled = openvino.compile_model(
            openvino.convert_model(model, example_input=x), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        found = compiled([x.numpy()])[0]
    else:
        torch.onnx.export(model, (x,), file, dynamo=runtime == "onnx", input_names=["x"], verbose=False)
        found = onnxruntime.InferenceSession(file).run(None, {"x": x.numpy()})[0]
    # sums of integers are exact in float32
    assert torch.equal(torch.from_numpy(found), x @ codes.float())
