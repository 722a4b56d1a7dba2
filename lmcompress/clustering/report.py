"""What weight clustering did, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from lmcompress.method import TextReport


@dataclass(frozen=True)
class SharedMatrix:
    """What became of one matrix.

    Attributes:
        path: of its module, relative to the base model.
        part: what the family calls it; empty for others.
        weights: how many.
        zeros: how many of them are 0.
        clusters: different values beside 0.
        bits: of a weight as it was, such as 32.
        error: squared error over squared norm, when it was shared and before anything was trained.
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
        """Bits of an index that tells all values apart, zero among them."""
        return max(1, (self.clusters + (self.zeros > 0) - 1).bit_length())

    @property
    def rate(self) -> float:
        """How many times less codebook and indices take than the weights, all positions stored.

        Deep Compression, section 3, equation 1, with the bits of an index rounded up.
        """
        return self.weights * self.bits / (self.weights * self.index_bits + self.clusters * self.bits)


@dataclass(frozen=True)
class SharingReport(TextReport):
    """Which matrices share how many values.

    Attributes:
        config: what was asked for, as JSON types.
        matrices: that share, in the order of the model.
        untouched: path to reason, of the others.
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
        """A table for the terminal: a row for each matrix."""
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
