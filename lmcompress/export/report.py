"""What an export was measured to be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lmcompress.export.check import Comparison, Products
from lmcompress.export.sessions import RUNTIMES


@dataclass(frozen=True)
class ExportReport:
    """The result of an export.

    Attributes:
        path: the folder.
        to: the runtime.
        task: what the graph computes.
        activations: how activations are quantized in the graph: ``static``, ``dynamic``, ``none``.
        bytes: size of the graph with its weights.
        comparison: the round-trip check, against the packed model with the ranges of the graph.
        products: matmuls with weights in the compiled graph.
        against_original: the same against the packed model as it was given, if its ranges are others.
        versions: versions of the libraries that made and checked it.
        notes: what is not as one would expect, one sentence each.
    """

    path: Path
    to: str
    task: str
    activations: str
    bytes: int
    comparison: Comparison
    products: Products
    against_original: Comparison | None
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON types, without the path: the record in the folder says nothing of the machine."""
        found = asdict(self)
        del found["path"]
        found["notes"] = list(self.notes)
        return found

    def __rich__(self) -> Table:
        """The report as a table."""
        checked = self.comparison
        table = Table("", "", title=f"{self.path}", show_header=False)
        table.add_row("runtime", RUNTIMES[self.to])
        table.add_row("task", self.task)
        table.add_row("activations", self.activations)
        table.add_row("size", f"{self.bytes / 1e6:.2f} MB")
        table.add_row("integer matmuls", f"{self.products.integer} of {self.products.total}")
        if self.products.packed:
            table.add_row("weights packed in memory", f"{self.products.packed} of {self.products.total}")
        table.add_row("max difference of outputs", _difference(checked))
        if checked.agreement is not None:
            table.add_row("same answers", f"{checked.agreement:.2%} of {checked.answers}")
        if self.against_original is not None:
            table.add_row("from the model with its own ranges", _difference(self.against_original))
            if self.against_original.agreement is not None:
                table.add_row("same answers as that", f"{self.against_original.agreement:.2%}")
        return table


def _difference(checked: Comparison) -> str:
    return (
        f"{checked.max_error:.3g} (relative error {checked.relative_error:.2g}, allowed {checked.tolerance:.2g}) on "
        f"{checked.batches} {checked.inputs} batches"
    )
