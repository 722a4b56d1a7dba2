"""The round-trip check of an export: the graph in its runtime against the packed model, on real batches."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmcompress.errors import EquivalenceError
from lmcompress.export.config import ExportConfig
from lmcompress.export.graph import ONNX_FILE, OPENVINO_FILE
from lmcompress.export.heads import Head
from lmcompress.export.optional import library
from lmcompress.export.runtime import array
from lmcompress.export.sessions import RUNTIMES, OnnxSession, OpenVinoSession, Session
from lmcompress.kernels.dispatch import using

TOLERANCE = 0.1
"""The relative error allowed unless another is asked for: sums round at 1e-6, but a number between two codes may go to
either side, and a deep model carries that on; a wrong graph is wrong by 1."""

_INTEGER = {
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
    "MatMulInteger",
    "QLinearMatMul",
    "QGemm",
}
_PACKED = "MatMulNBits"
_FLOAT = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm"}


@dataclass(frozen=True)
class Comparison:
    """The measurements of a round-trip check.

    Attributes:
        max_error: max abs difference of any output.
        relative_error: norm of the difference over the norm of the packed model's output, the greatest of all batches
            and outputs.
        tolerance: the relative error allowed.
        agreement: share of equal answers, or None if the output has none.
        answers: number of answers compared.
        batches: number of batches.
        inputs: ``"given"`` or ``"random"``.
    """

    max_error: float
    relative_error: float
    tolerance: float
    agreement: float | None
    answers: int
    batches: int
    inputs: str


def expected_outputs(head: Head, batches: Sequence[Mapping[str, Tensor]]) -> list[tuple[Tensor, ...]]:
    """The outputs of a head with the packed model, computed by the reference: kernels round in ways of their own.

    Args:
        head: the packed model in it is in evaluation mode.
        batches: inputs by name.

    Returns:
        For each batch the outputs, in order.
    """
    with torch.no_grad(), using(kernel="reference"):
        return [tuple(output.float() for output in head(*head.arguments(batch))) for batch in batches]


def compare(
    head: Head,
    session: Session,
    batches: Sequence[Mapping[str, Tensor]],
    expected: Sequence[tuple[Tensor, ...]],
    *,
    tolerance: float,
    inputs: str,
) -> Comparison:
    """Compare all outputs of a graph with those expected.

    Args:
        head: names the inputs and outputs.
        session: the loaded graph.
        batches: inputs by name.
        expected: of :func:`expected_outputs`.
        tolerance: recorded in the result; nothing is refused here.
        inputs: origin of the batches, recorded in the result.

    Returns:
        The measurements: the greatest relative error of all outputs; answers of the first.
    """
    worst, error, same, count = 0.0, 0.0, 0, 0
    for batch, wanted in zip(batches, expected, strict=True):
        arguments = head.arguments(batch)
        found = session.run({name: array(x) for name, x in zip(head.inputs, arguments, strict=True)})
        mask = batch.get("attention_mask")
        for index, name in enumerate(head.outputs):
            got, want = torch.as_tensor(found[name]), wanted[index]
            largest, relative = difference(got, want, mask)
            # written this way round so that NaN stays
            worst = worst if relative <= worst else relative
            error = error if largest <= error else largest
            if head.answers and index == 0:
                equal = (got.argmax(-1) == want.argmax(-1))[_valid(got, mask)[..., 0] if got.dim() == 3 else ...]
                same, count = same + int(equal.sum()), count + equal.numel()
    agreement = same / count if count else None
    return Comparison(error, worst, tolerance, agreement, count, len(batches), inputs)


def _valid(x: Tensor, mask: Tensor | None) -> Tensor:
    """Where an output does not belong to padding; broadcast to the output."""
    if mask is None or x.dim() < 2 or x.shape[:2] != mask.shape:
        return torch.ones_like(x, dtype=torch.bool)
    return mask.bool().reshape(*mask.shape, *(1,) * (x.dim() - 2)).expand_as(x)


def difference(got: Tensor, want: Tensor, mask: Tensor | None) -> tuple[float, float]:
    """Max abs difference, and norm of the difference over the norm of what is expected; infinite for other shapes.

    Args:
        got: from a runtime.
        want: expected.
        mask: ``(batch, length)``; padding does not count where the output has these axes.
    """
    if got.shape != want.shape:
        return float("inf"), float("inf")
    valid = _valid(want, mask)
    apart, size = (got - want)[valid], float(want[valid].norm())
    return float(apart.abs().max()), float(apart.norm()) / (size or 1.0)


def refuse(measured: Comparison, config: ExportConfig, where: str | None) -> None:
    """Refuse an export whose outputs differ.

    Args:
        measured: the measurements.
        config: names the runtime.
        where: the first layer that differs, if known.

    Raises:
        EquivalenceError: Always.
    """
    at = f" The first layer that differs is {where}." if where else ""
    raise EquivalenceError(
        f"the exported model differs in {RUNTIMES[config.to]} from the packed one by {measured.max_error:.3g} "
        f"({measured.relative_error:.3g} relative, allowed {measured.tolerance:.3g}) on {measured.batches} batches; "
        f"nothing was written.{at}"
    )


def refuse_unless_agreeing(measured: Comparison, config: ExportConfig) -> None:
    """Refuse an export that gives other answers.

    Args:
        measured: the measurements against the packed model as it was given.
        config: its ``agreement`` is the least share of equal answers.

    Raises:
        EquivalenceError: If fewer answers are equal.
    """
    wanted, found = config.agreement, measured.agreement
    if wanted is not None and found is not None and found < wanted:
        raise EquivalenceError(
            f"the exported model must give the packed model's answer in {RUNTIMES[config.to]} to at least {wanted:.2%} "
            f"of the rows, got {found:.2%} of {measured.answers}; nothing was written"
        )


@dataclass(frozen=True)
class Products:
    """The matmuls with weights in a compiled graph.

    Attributes:
        integer: number computed in integers.
        total: number of all; those within attention, of two activations, do not count.
        packed: number computed in float32 from codes that stay packed in memory, as weights alone are.
    """

    integer: int
    total: int
    packed: int = 0


def products(folder: Path) -> Products:
    """Count the matmuls with weights in the graph that a runtime compiles.

    Args:
        folder: an exported folder.
    """
    if (folder / OPENVINO_FILE).is_file():
        found = OpenVinoSession(folder / OPENVINO_FILE, threads=1, saturating=True).products()
        of_weights = {precision: n for (kind, precision), n in found.items() if kind == "FullyConnected"}
        # of weights alone it is the precision of the codes
        return Products(
            sum(n for precision, n in of_weights.items() if precision in ("i8", "u8")),
            sum(of_weights.values()),
            sum(n for precision, n in of_weights.items() if precision in ("i4", "u4")),
        )
    onnx = library("onnx", "onnx")
    with tempfile.TemporaryDirectory() as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        OnnxSession(folder / ONNX_FILE, threads=1, optimized=optimized)
        graph = onnx.load(optimized, load_external_data=False).graph
    return _counted(graph)


def _counted(graph: Any) -> Products:
    constant = {one.name for one in graph.initializer}
    for node in graph.node:
        # dequantized weights; what depends on constants only is one
        if node.input and all(name in constant or not name for name in node.input):
            constant.update(node.output)
    integer = sum(node.op_type in _INTEGER for node in graph.node)
    floats = [node for node in graph.node if node.op_type in _FLOAT]
    packed = sum(node.op_type == _PACKED for node in graph.node)
    total = integer + packed + sum(any(name in constant for name in node.input[:2]) for node in floats)
    return Products(integer, total, packed)
