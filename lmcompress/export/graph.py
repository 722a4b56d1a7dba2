"""Writing the graph of a model: ONNX by torch's exporter, and OpenVINO's format from that."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lmcompress.errors import LmcompressError, argument
from lmcompress.export.config import ExportConfig
from lmcompress.export.heads import Head
from lmcompress.export.low_bit import BlockedWeight
from lmcompress.export.optional import library
from lmcompress.export.stateful import make_stateful

ONNX_FILE, OPENVINO_FILE = "model.onnx", "openvino_model.xml"
"""The names that sentence-transformers and Optimum look for."""

OPSET = 21
"""Version of ONNX's operators unless another is asked for: the first with codes of 4 bits and groups of scales."""

# a file of protobuf ends at 2 GiB
_LARGE = 1_800_000_000
_SMALL = 1024


def write_graph(head: Head, folder: Path, config: ExportConfig) -> None:
    """Write the graph of a head in the format of a runtime.

    Args:
        head: the model inside has no packed modules.
        folder: an existing folder.
        config: the runtime, and the version of ONNX's operators.

    Raises:
        LmcompressError: If the version of the operators has no codes of 4 bits and the model has, torch cannot record
            the graph, or OpenVINO not read it.
    """
    if (config.opset or OPSET) < OPSET and any(isinstance(module, BlockedWeight) for module in head.modules()):
        raise LmcompressError(
            f"weights of fewer than 8 bits, or with scales by group, need opset {OPSET} or later for OpenVINO, got "
            f"{config.opset}; leave out {argument('opset')}"
        )
    write_onnx(head, folder / ONNX_FILE, config)
    if config.to == "openvino":
        write_openvino(folder / ONNX_FILE, folder / OPENVINO_FILE, stateful=config.stateful)
        for leftover in folder.glob(f"{ONNX_FILE}*"):
            leftover.unlink()


def write_onnx(head: Head, file: Path, config: ExportConfig) -> None:
    """Write the graph of a head with an exportable model as ONNX; weights lie in the same file if that can hold them.

    Args:
        head: the model inside has no packed modules.
        file: the file to write.
        config: its ``opset`` is taken.

    Raises:
        LmcompressError: If torch cannot record the model's graph, or only for the number of rows or tokens of the
            example.
    """
    ir = library("onnx_ir", "onnx")
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                head,
                head.example(),
                dynamo=True,
                verbose=False,
                opset_version=config.opset or OPSET,
                # below, with a limit: packed codes would be unpacked in the file
                optimize=False,
                dynamic_shapes=_shapes(head),
                input_names=list(head.inputs),
                output_names=list(head.outputs),
            )
    except Exception as error:
        raise LmcompressError(
            f"torch could not record the graph of this {type(head.model).__name__} ({type(error).__name__}): "
            f"{_cause(error)}"
        ) from error
    if program is None:
        raise LmcompressError(f"torch recorded no graph of this {type(head.model).__name__}")
    model = program.model
    _refuse_fixed_axes(model, head)
    with _quiet():
        library("onnxscript.optimizer", "onnx").optimize(model, input_size_limit=_SMALL, output_size_limit=_SMALL)
    _narrow(model)
    _share(model)
    _anonymous(model)
    ir.save(model, file, external_data=external_data(file.name) if _bytes(model) > _LARGE else None)


def write_openvino(onnx_file: Path, file: Path, *, stateful: bool) -> None:
    """Convert a graph to OpenVINO's format, weights as they are.

    Args:
        onnx_file: the graph as ONNX.
        file: the ``.xml`` to write; weights lie beside it as ``.bin``.
        stateful: whether past keys and values, if there are any, become states of the runtime.

    Raises:
        LmcompressError: If OpenVINO has no such operators.
    """
    openvino = library("openvino", "openvino")
    try:
        model = openvino.Core().read_model(str(onnx_file))
        # its default rounds the inputs of weights in 4 bits to 8 bits, by themselves
        model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        if stateful:
            make_stateful(model)
        openvino.save_model(model, str(file), compress_to_fp16=False)
    except RuntimeError as error:
        if "space" in str(error):
            raise
        raise LmcompressError(
            f"OpenVINO {openvino.__version__} cannot read this model's graph: {_cause(error)}"
        ) from error


def external_data(name: str) -> str:
    """Name of the file beside an ONNX file for weights that are too many for it.

    Args:
        name: name of the ONNX file.
    """
    return f"{name}_data"


def _shapes(head: Head) -> Any:
    """Dynamic axes in the form of ``forward(*tensors)``."""
    return (tuple(head.dynamic_shapes()),)


def _refuse_fixed_axes(model: Any, head: Head) -> None:
    """Refuse a graph that holds for one batch size or length only."""
    wanted = [(value, tuple(axes)) for value, axes in zip(model.graph.inputs, head.dynamic_shapes(), strict=True)]
    # of outputs, the rows, and the tokens of those that have vectors of tokens
    outputs = model.graph.outputs if head.has_rows else ()
    wanted += [(value, (0, 1) if len(value.shape or ()) == 3 else (0,)) for value in outputs]
    for value, axes in wanted:
        for axis in axes:
            if value.shape is not None and isinstance(value.shape[axis], int):
                raise LmcompressError(
                    f"the graph of this {type(head.model).__name__} must hold for any number of rows and tokens, got "
                    f"{value.shape[axis]} alone on axis {axis} of {value.name}: its forward pass makes a Python number "
                    "of a size, or decides by one; nothing was written"
                )


def _bytes(model: Any) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


def _share(model: Any) -> None:
    """Store equal initializers once: tied matrices, which exporters write out twice.

    Small ones stay apart: ONNX Runtime changes zero points by name, and fails on one that two operators read.
    """
    first: dict[tuple[Any, ...], Any] = {}
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor.nbytes < _SMALL:
            continue
        key = (tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest())
        kept = first.setdefault(key, value)
        if kept is not value and not value.is_graph_output():
            value.replace_all_uses_with(kept)
            model.graph.initializers.pop(value.name)


def _narrow(model: Any) -> None:
    """Store codes of 4 bits that DequantizeLinear reads in 4 bits: torch has no such tensors."""
    ir = library("onnx_ir", "onnx")
    byte, nibble = ir.DataType.UINT8, ir.DataType.UINT4
    for node in model.graph.all_nodes():
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
            continue
        operands = [node.inputs[0], node.inputs[2]]
        tensors = [value.const_value for value in operands]
        # several operators may read the same zero points
        if not all(tensor is not None and tensor.dtype in (byte, nibble) and tensor.size for tensor in tensors):
            continue
        if max(int(tensor.numpy().max()) for tensor in tensors) > 15:
            continue
        for value, tensor in zip(operands, tensors, strict=True):
            value.const_value = ir.Tensor(tensor.numpy().astype(nibble.numpy()), dtype=nibble, name=value.name)
            value.dtype = nibble


def _anonymous(model: Any) -> None:
    """Take from a graph what torch notes of its making: source files, stack traces."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.initializers.values(), *model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _cause(error: BaseException) -> str:
    """The first line of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:400]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress and hints."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
