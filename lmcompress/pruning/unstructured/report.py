"""The resulting zeros, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from lmcompress.method import TextReport, noted


@dataclass(frozen=True)
class SparseMatrix:
    """The result for one matrix.

    Attributes:
        path: path of its module, relative to the base model.
        part: the family's name of it; empty for others.
        weights: number of weights.
        zeros: number of weights that are 0.
        zeros_before: number of weights that were 0 before.
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
        config: the configuration, as JSON types.
        matrices: pruned matrices, in the order of the model.
        untouched: path to reason, for the others.
        trained: whether the model was trained meanwhile.
        seconds: wall time of choosing and compensation.
        unrecovered: what was done at once at the end of training, and not trained any more, because training ended
            before the schedule; None if nothing.
    """

    config: dict[str, Any]
    matrices: list[SparseMatrix]
    untouched: dict[str, str]
    trained: bool
    seconds: float
    unrecovered: str | None = None

    @property
    def sparsity(self) -> float:
        """Share of the weights of all these matrices that is 0."""
        return sum(row.zeros for row in self.matrices) / max(1, sum(row.weights for row in self.matrices))

    @property
    def factor(self) -> float:
        """The compression ratio: all weights over the remaining ones."""
        weights = sum(row.weights for row in self.matrices)
        return weights / max(1, weights - sum(row.zeros for row in self.matrices))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        rows = [asdict(row) | {"sparsity": row.sparsity} for row in self.matrices]
        return {**asdict(self), "matrices": rows, "sparsity": self.sparsity, "factor": self.factor}

    def __rich__(self) -> Table:
        """A table for the terminal, one row per matrix."""
        table = Table(
            title=f"sparse weights ({'trained' if self.trained else 'not trained'}): {self.sparsity:.1%} zero, "
            f"{self.factor:.1f} × fewer",
            caption=noted(self.unrecovered).strip() or None,
        )
        table.add_column("matrix")
        for name in ("weights", "left", "zero"):
            table.add_column(name, justify="right")
        for row in self.matrices:
            table.add_row(row.path, f"{row.weights:,}", f"{row.weights - row.zeros:,}", f"{row.sparsity:.1%}")
        return table
