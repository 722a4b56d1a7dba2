"""The result of weight clustering, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from lmcompress.method import TextReport


@dataclass(frozen=True)
class SharedMatrix:
    """The result for one matrix.

    Attributes:
        path: path of its module, relative to the base model.
        part: the family's name of it; empty for others.
        weights: number of weights.
        zeros: number of weights that are 0.
        clusters: number of distinct values besides 0.
        bits: original bits per weight, such as 32.
        error: squared error over squared norm, right after clustering and before training.
    """

    path: str
    part: str
    weights: int
    zeros: int
    clusters: int
    bits: int
    error: float

    @property
    def index_bits(self) -> int:
        """Bits of an index into all values, zero included."""
        return max(1, (self.clusters + (self.zeros > 0) - 1).bit_length())

    @property
    def rate(self) -> float:
        """Compression ratio of the weights to codebook and indices, all positions stored.

        Deep Compression, section 3, equation 1, with the bits of an index rounded up.
        """
        return self.weights * self.bits / (self.weights * self.index_bits + self.clusters * self.bits)


@dataclass(frozen=True)
class SharingReport(TextReport):
    """Which matrices share how many values.

    Attributes:
        config: the configuration, as JSON types.
        matrices: clustered matrices, in the order of the model.
        untouched: path to reason, for the others.
        trained: whether the shared values were trained.
    """

    config: dict[str, Any]
    matrices: list[SharedMatrix]
    untouched: dict[str, str]
    trained: bool

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        rows = [asdict(row) | {"index_bits": row.index_bits, "rate": row.rate} for row in self.matrices]
        return {**asdict(self), "matrices": rows}

    def __rich__(self) -> Table:
        """A table for the terminal, one row per matrix."""
        table = Table(title=f"shared weights ({'trained' if self.trained else 'not trained'})")
        table.add_column("matrix")
        for name in ("weights", "zero", "values", "index bits", "error"):
            table.add_column(name, justify="right")
        for row in self.matrices:
            share = row.zeros / row.weights
            table.add_row(
                row.path, f"{row.weights:,}", f"{share:.1%}", str(row.clusters), str(row.index_bits), f"{row.error:.1e}"
            )
        return table
