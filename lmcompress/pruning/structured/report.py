"""The result of pruning, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from lmcompress.checkpoint.schema import Structure
from lmcompress.method import noted


@dataclass(frozen=True)
class PruningReport:
    """Counts before and after pruning, and the difference between the cut and the masked model.

    Attributes:
        before: original shapes.
        after: pruned shapes.
        coverage: counts of every part and of parameters before and after (see
            :func:`~lmcompress.pruning.structured.surgery.coverage`).
        target: the requested target, as JSON types.
        unit: unit of the target's cost.
        removed: pruned share of the cost.
        asked: requested share.
        method: schedule, criterion, ranking and repair, as JSON types.
        masked_error: max abs difference between the outputs of the masked and the cut model, relative to the max abs
            output.
        repaired: for each re-fitted sub-layer, its error before and after.
        stock: whether the result loads without lmcompress, why not, and the nearest shape that would.
        seconds: wall time of scoring, choosing and cutting, without training.
        kept_heads: for each original block, the numbers of the remaining heads.
        unrecovered: what was done at once at the end of training, and not trained any more, because training ended
            before the schedule; None if nothing.
    """

    before: Structure
    after: Structure
    coverage: dict[str, Any]
    target: dict[str, Any]
    unit: str
    removed: float
    asked: float
    method: dict[str, Any]
    masked_error: float
    repaired: list[dict[str, Any]] = field(default_factory=list)
    stock: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    kept_heads: list[list[int]] = field(default_factory=list)
    unrecovered: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        values = dict(vars(self))
        for name in ("before", "after"):
            values[name] = getattr(self, name).model_dump(mode="json", exclude_none=True)
        return values

    def __rich__(self) -> Table:
        """A table for the terminal: one row for each part and one for each block."""
        table = Table(
            title=f"pruned: {self.removed:.1%} of {self.unit} ({self.asked:.1%} requested)",
            caption=f"masked against cut: {self.masked_error:.1e} · "
            + ("loads with stock transformers" if self.stock.get("loads") else "needs lmcompress to load")
            + noted(self.unrecovered),
        )
        for name, justify in (("", "left"), ("before", "right"), ("after", "right"), ("pruned", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for name, row in self.coverage.items():
            if isinstance(row, dict) and "before" in row:
                table.add_row(name.replace("_", " "), f"{row['before']:,}", f"{row['after']:,}", f"{row['cut']:.1%}")
        table.add_section()
        sources = [index if block.source is None else block.source for index, block in enumerate(self.after.blocks)]
        left = dict(zip(sources, self.after.blocks, strict=True))
        offset = [index if block.source is None else block.source for index, block in enumerate(self.before.blocks)]
        for number, old in zip(offset, self.before.blocks, strict=True):
            new = left.get(number)
            shape = "–" if new is None else f"{new.heads} heads + {new.ffn}"
            table.add_row(f"block {number}", f"{old.heads} heads + {old.ffn}", shape, "whole" if new is None else "")
        return table
