"""What others make of our models: each a function that builds one, in this process or in a worker's.

A peer that is not installed raises ``ImportError``. In torch, they take a model; runtimes take what it is rebuilt from,
since they run in processes of their own, and a folder that they share for what they write.
"""

from __future__ import annotations

import copy
import importlib
import logging
import shutil
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

Make = Callable[[], Any]
"""Rebuilds a model, with the very weights it has in the process that compares: a function that can be pickled."""

PACKAGES = ("torchao", "bitsandbytes", "onnxruntime", "openvino", "nncf")
# a head of two classes is too narrow for its kernels; heads of language models are left out by default
_HEADS = ["classifier", "lm_head"]


def versions() -> dict[str, str | None]:
    """What of the others is installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def compiled(make: Make) -> nn.Module:
    """A model as ``torch.compile`` makes it, with weights that will not change any more.

    In a process of its own: all models of one class share what is compiled of it, and the checks that choose from it.
    """
    if shutil.which("c++") is None:
        raise ImportError("torch.compile needs a C++ compiler")
    model = make().eval()
    model.compile(dynamic=False, options={"freezing": True})
    return model


def torch_dynamic(model: Any, folder: Path) -> Any:
    """torch.ao.quantization.quantize_dynamic."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def torchao_dynamic(model: Any, folder: Path) -> Any:
    """torchao, int8 weights and int8 activations by token."""
    torchao = importlib.import_module("torchao.quantization")
    model = copy.deepcopy(model)
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    return model


def bitsandbytes_8(model: Any, folder: Path) -> Any:
    """bitsandbytes, LLM.int8()."""
    return _bitsandbytes(model, folder, BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_HEADS))


def bitsandbytes_nf4(model: Any, folder: Path) -> Any:
    """bitsandbytes, NF4."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=_HEADS)
    return _bitsandbytes(model, folder, config)


def _bitsandbytes(model: Any, folder: Path, config: BitsAndBytesConfig) -> Any:
    importlib.import_module("bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    own = folder / "dense"
    if not (own / "config.json").exists():
        model.save_pretrained(own)
    return type(model).from_pretrained(own, quantization_config=config, device_map={"": "cpu"}).eval()


class Foreign:
    """An encoder of another runtime, called like ours.

    Args:
        config: of the model it was made from.
        call: ids and mask, as arrays, to logits.
    """

    def __init__(self, config: Any, call: Callable[[Any, Any], Any]) -> None:
        self.config, self.device, self._call = config, torch.device("cpu"), call

    def eval(self) -> Foreign:
        """Itself."""
        return self

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        """The logits.

        Args:
            input_ids: ``(batch, length)``.
            attention_mask: all 1.
        """
        return (torch.as_tensor(self._call(input_ids.numpy(), attention_mask.numpy())),)


class _Logits(nn.Module):
    """A model from tensors to a tensor, as exporters want it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def example() -> tuple[Tensor, Tensor]:
    """Ids and mask of two short rows."""
    ids = torch.randint(2, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


def random_batches() -> list[Tensor]:
    """Ids that ranges are calibrated on, eight rows one by one."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 200, (1, 16), generator=generator) for _ in range(8)]


def onnxruntime_model(make: Make, folder: Path, threads: int, int8: bool) -> Foreign:
    """onnxruntime: an export by torch, as it is or after onnxruntime's quantize_dynamic."""
    runtime = importlib.import_module("onnxruntime")
    importlib.import_module("onnxscript")
    file = folder / ("ort_int8.onnx" if int8 else "ort_dense.onnx")
    model = make()
    if not file.exists() and int8:
        quantization = importlib.import_module("onnxruntime.quantization")
        onnxruntime_model(make, folder, threads, False)
        dense = folder / "ort_dense.onnx"
        quantization.quantize_dynamic(dense, file, weight_type=quantization.QuantType.QInt8)
    elif not file.exists():
        # of the batch that is exported 1 would be taken for a constant
        axes = tuple({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=512)} for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(_Logits(model), example(), file, dynamo=True, verbose=False, dynamic_shapes=axes)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # its threads would otherwise wait actively beside what is timed next
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [taken.name for taken in session.get_inputs()]
    return Foreign(model.config, lambda *given: session.run(None, dict(zip(names, given, strict=True)))[0])


def openvino_model(make: Make, folder: Path, threads: int, precision: str, int8: bool) -> Foreign:
    """OpenVINO, as it converts a model, or with nncf's post-training int8; ``precision`` is that of all else."""
    openvino, nncf = importlib.import_module("openvino"), importlib.import_module("nncf") if int8 else None
    file = folder / ("ov_int8.xml" if int8 else "ov_dense.xml")
    model = make()
    if not file.exists():
        converted = openvino.convert_model(_Logits(model), example_input=example())
        if nncf is not None:
            rows = random_batches()
            data = nncf.Dataset([(ids.numpy(), torch.ones_like(ids).numpy()) for ids in rows])
            kind = nncf.ModelType.TRANSFORMER
            converted = nncf.quantize(converted, data, model_type=kind, subset_size=len(rows))
        openvino.save_model(converted, file, compress_to_fp16=False)
    setting = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(file, "CPU", setting)
    return Foreign(model.config, lambda *given: compiled(list(given))[0])


def exported(make: Make, folder: Path, threads: int, to: str, precision: str | None) -> Any:
    """Our own export of a packed model, loaded by ``load_exported``; ``make`` makes the packed model."""
    export = importlib.import_module("lmcompress.export")
    own = folder / f"lmcompress_{to}"
    if not own.exists():
        export.export_model(make(), own, to=to)
    return export.load_exported(own, threads=threads, precision=precision)
