"""What became zero, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from lmcompress.method import TextReport


@dataclass(frozen=True)
class SparseMatrix:
    """What became of one matrix.

    Attributes:
        path: of its module, relative to the base model.
        part: what the family calls it; empty for others.
        weights: how many.
        zeros: how many of them are 0.
        zeros_before: how many were before.
    """

    path: str
    part: str
    weights: int
    zeros: int
    zeros_before: int

    @property
    def sparsity(self) -> float:
        """Share that is 0."""
        return self.zeros / max(1, self.weights)


@dataclass(frozen=True)
class SparsityReport(TextReport):
    """Which matrices have how many zeros.

    Attributes:
        config: what was asked for, as JSON types.
        matrices: that were pruned, in the order of the model.
        untouched: path to reason, of the others.
        trained: whether the model was trained meanwhile.
        seconds: that choosing, and compensation, took.
    """

    config: dict[str, Any]
    matrices: list[SparseMatrix]
    untouched: dict[str, str]
    trained: bool
    seconds: float

    @property
    def sparsity(self) -> float:
        """Share of the weights of all these matrices that is 0."""
        return sum(row.zeros for row in self.matrices) / max(1, sum(row.weights for row in self.matrices))

    @property
    def factor(self) -> float:
        """How many times fewer weights are left."""
        weights = sum(row.weights for row in self.matrices)
        return weights / max(1, weights - sum(row.zeros for row in self.matrices))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        rows = [asdict(row) | {"sparsity": row.sparsity} for row in self.matrices]
        return {**asdict(self), "matrices": rows, "sparsity": self.sparsity, "factor": self.factor}

    def __rich__(self) -> Table:
        """A table for the terminal: a row for each matrix."""
        table = Table(
            title=f"sparse weights ({'trained' if self.trained else 'not trained'}): {self.sparsity:.1%} zero, "
            f"{self.factor:.1f} × fewer"
        )
        table.add_column("matrix")
        for name in ("weights", "left", "zero"):
            table.add_column(name, justify="right")
        for row in self.matrices:
            table.add_row(row.path, f"{row.weights:,}", f"{row.weights - row.zeros:,}", f"{row.sparsity:.1%}")
        return table
