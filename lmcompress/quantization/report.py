"""The result of quantization, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table

from lmcompress.method import TextReport, noted
from lmcompress.numerics.packing import stored_bytes
from lmcompress.numerics.quantizers.base import Quantized
from lmcompress.quantization.planning import Planned


@dataclass(frozen=True)
class QuantizedMatrix:
    """The result for one matrix.

    Attributes:
        path: of its module, relative to the base model.
        part: what the family calls it; empty for others.
        quantizer: key of :data:`~lmcompress.numerics.quantizers.registry.QUANTIZERS`.
        bits: of a weight, or ``ternary``.
        granularity: ``tensor``, ``row``, or the size of a group.
        method: rounding method: ``rtn``, ``gptq``, or ``awq`` if its inputs were scaled.
        error: squared error over squared norm of ``measured``.
        measured: ``output``: the module's output on the calibration data; ``weights`` without data.
        weights: number of weights.
        bytes_before: bytes of the dense matrix.
        bytes_after: bytes of codes, scales, zero points and static input range.
        inputs: bits of its input, or None if that is not quantized.
        note: why another method was used, or empty.
    """

    path: str
    part: str
    quantizer: str
    bits: int | str
    granularity: int | str
    method: str
    error: float
    measured: Literal["output", "weights"]
    weights: int
    bytes_before: int
    bytes_after: int
    inputs: int | None = None
    note: str = ""


def matrix_row(
    planned: Planned,
    quantized: Quantized,
    *,
    method: str,
    error: float,
    measured: Literal["output", "weights"] = "weights",
    note: str = "",
) -> QuantizedMatrix:
    """The row of one matrix.

    Args:
        planned: its planned quantization.
        quantized: its quantized values.
        method: rounding method.
        error: squared error over squared norm of ``measured``.
        measured: ``output`` or ``weights``.
        note: why another method was used, or empty.
    """
    scheme, inputs = planned.weights, planned.inputs
    fixed = 0 if inputs is None or inputs.range == "dynamic" else 4 if inputs.symmetric else 5
    return QuantizedMatrix(
        path=planned.path,
        part=planned.part,
        quantizer=scheme.name,
        bits=scheme.bits,
        granularity=scheme.granularity,
        method=method,
        error=error,
        measured=measured,
        weights=quantized.values.numel(),
        bytes_before=quantized.values.numel() * quantized.source.element_size(),
        bytes_after=stored_bytes(quantized) + fixed,
        inputs=None if inputs is None else inputs.bits,
        note=note,
    )


@dataclass(frozen=True)
class QuantizationReport(TextReport):
    """What was quantized to what, at which price.

    Attributes:
        method: ``rtn``, ``gptq``, ``awq``, or ``trained``.
        config: the configuration, as JSON types.
        matrices: quantized matrices, in the order of the model.
        dense: path to reason, for modules that could have been quantized and are not.
        bytes_before: bytes of all the model's tensors, tied ones once.
        bytes_after: the same, packed.
        hidden_error: error of the last block's output on the calibration data, without padding: squared error over
            squared norm; None without data.
        tokens: number of tokens of the calibration data, without padding.
        attention: bits of queries, keys, values and probabilities, or None.
        seconds: wall time, without training.
        packed_error: after training, the max abs difference between the outputs of the trained model and the
            packed one, relative to the max abs output; None if their shapes differ. Inputs may round differently.
        drift: after training, the relative change of learned scales and ranges since their start, by kind of module.
        unrecovered: what was done at once at the end of training, and not trained any more, because training ended
            before the schedule; None if nothing.
    """

    method: str
    config: dict[str, Any]
    matrices: list[QuantizedMatrix]
    dense: dict[str, str]
    bytes_before: int
    bytes_after: int
    hidden_error: float | None = None
    tokens: int = 0
    attention: int | None = None
    seconds: float = 0.0
    packed_error: float | None = None
    drift: dict[str, float] = field(default_factory=dict)
    unrecovered: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """Average bits per quantized weight, scales included."""
        return 8 * sum(row.bytes_after for row in self.matrices) / max(1, sum(row.weights for row in self.matrices))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}

    def __rich__(self) -> Table:
        """A table for the terminal, one row for all matrices of one kind."""
        hidden = "" if self.hidden_error is None else f" · error of the last hidden state {self.hidden_error:.2e}"
        table = Table(
            title=f"quantized ({self.method}): {_mib(self.bytes_before)} → {_mib(self.bytes_after)}",
            caption="\n".join([f"{self.bits_per_weight:.2f} bits a weight{hidden}", *_reasons(self.dense)])
            + noted(self.unrecovered),
            caption_justify="left",
        )
        for name in ("", "bits", "by", "method"):
            table.add_column(name)
        for name in ("matrices", "before", "after", "error", "worst"):
            table.add_column(name, justify="right")
        for rows in _alike(self.matrices):
            first, worst = rows[0], max(rows, key=lambda row: row.error)
            table.add_row(
                first.part or first.path,
                f"{first.bits}" + ("" if first.inputs is None else f" × {first.inputs}"),
                str(first.granularity),
                first.method,
                str(len(rows)),
                _mib(sum(row.bytes_before for row in rows)),
                _mib(sum(row.bytes_after for row in rows)),
                f"{sum(row.error for row in rows) / len(rows):.1e}",
                f"{worst.error:.1e} {worst.path}" if len(rows) > 1 else "",
            )
        return table


def _alike(matrices: Iterable[QuantizedMatrix]) -> list[list[QuantizedMatrix]]:
    kinds: dict[tuple[Any, ...], list[QuantizedMatrix]] = {}
    for row in matrices:
        kind = (row.part or row.path, row.bits, row.granularity, row.method, row.inputs, row.quantizer)
        kinds.setdefault(kind, []).append(row)
    return list(kinds.values())


def _reasons(dense: dict[str, str]) -> list[str]:
    """The dense modules and why, one line per reason."""
    paths: dict[str, list[str]] = {}
    for path, reason in dense.items():
        paths.setdefault(reason, []).append(path)
    return [
        f"dense: {', '.join(some[:3])}{f' and {len(some) - 3} more' if len(some) > 3 else ''}: {reason}"
        for reason, some in paths.items()
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
