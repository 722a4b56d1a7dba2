"""The result of making a model compact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from lmcompress.checkpoint.encoding import weight_count
from lmcompress.students.costs import model_flops


@dataclass(frozen=True)
class CompactReport:
    """The replaced modules, the unchanged ones and why, and the model's new cost.

    Attributes:
        changed: the replacement of each module, by its path relative to the base model.
        left: why a module was left unchanged, by path.
        errors: squared error over squared norm of each replaced module: of its matrix, or of its output
            on data if there were any; 0 is exact.
        parameters: number of the model's parameters, tied and shared ones once: before and after.
        flops: FLOPs of one row of ``length`` tokens, before and after; see :func:`model_flops`.
        length: number of tokens that ``flops`` refer to.
    """

    changed: Mapping[str, str]
    left: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    flops: tuple[int, int] = (0, 0)
    length: int = 128

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            "changed": dict(self.changed),
            "left": dict(self.left),
            "errors": dict(self.errors),
            "parameters": list(self.parameters),
            "flops": list(self.flops),
            "length": self.length,
        }

    def __str__(self) -> str:
        kinds: dict[str, list[str]] = {}
        for path, what in self.changed.items():
            kinds.setdefault(what, []).append(path)
        for path, why in self.left.items():
            kinds.setdefault(f"left: {why}", []).append(path)
        lines = [f"{what}: {_some(paths)}" for what, paths in kinds.items()]
        for what, (before, after) in (
            ("parameters", self.parameters),
            (f"FLOPs of {self.length} tokens", self.flops),
        ):
            lines.append(f"{what}: {before:,} -> {after:,} ({after / max(before, 1):.1%})")
        return "\n".join(lines)


@dataclass(frozen=True)
class Before:
    """The cost of a model before it is changed."""

    parameters: int
    flops: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Before:
        """Measure a model.

        Args:
            model: a model of a known family.
        """
        return cls(weight_count(model), model_flops(model))

    def report(
        self,
        model: PreTrainedModel,
        changed: Mapping[str, str],
        left: Mapping[str, str] | None = None,
        errors: Mapping[str, float] | None = None,
    ) -> CompactReport:
        """Compare with the same model, changed.

        Args:
            model: the changed model.
            changed: see :class:`CompactReport`.
            left: see :class:`CompactReport`.
            errors: see :class:`CompactReport`.

        Returns:
            The report.
        """
        return CompactReport(
            changed,
            left or {},
            errors or {},
            (self.parameters, weight_count(model)),
            (self.flops, model_flops(model)),
        )


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
