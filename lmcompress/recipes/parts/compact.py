"""Compact layers in recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from transformers import PreTrainedModel

from lmcompress.checkpoint.layers import layers_of
from lmcompress.errors import LmcompressError
from lmcompress.recipes.materials import drawn_batches
from lmcompress.recipes.parts.base import Planning, Running, StagePart, Work
from lmcompress.students import CompactReport
from lmcompress.students.config import OnData, Replacement, ShareLayers

if TYPE_CHECKING:
    from lmcompress.recipes.schema import Stage

Replacements = tuple[Replacement, ...]

_NOT_BESIDE = {
    "pruning": "a compact model cannot be cut; prune in an earlier stage",
    "quantization": "a compact model cannot be quantized; leave one of them out",
    "sparsity": "make single weights zero in a stage after it",
    "sharing": "let single weights share values in a stage after it",
}


@dataclass(frozen=True)
class CompactPlan:
    """The effect of a stage's replacements, as far as shapes determine it.

    Attributes:
        reports: reports of each, without errors.
        unknown: quantities that depend on values, in words, or None if parameters and operations are exact.
    """

    reports: tuple[CompactReport, ...]
    unknown: str | None


class CompactPart(StagePart[Replacements]):
    """Layers with fewer parameters replace the student's before it is trained."""

    key = "compact"
    schema = Annotated[
        Replacements | None,
        Field(
            min_length=1,
            description="Layers with fewer parameters that replace the student's before it is trained, one replacement "
            "after the other.",
        ),
    ]
    applied = "compact layers"
    role = "compact"

    def check(self, stage: Stage, spec: Replacements) -> None:
        for name, way_out in _NOT_BESIDE.items():
            if getattr(stage, name) is not None:
                raise ValueError(f"compact and {name} cannot be in one stage: {way_out}")
        if stage.save != "native":
            raise ValueError(f"save: {stage.save} is not possible with compact: compact layers need lmcompress")

    def prepare(self, spec: Replacements, work: Work) -> CompactPlan | list[CompactReport]:
        if isinstance(work, Planning):
            return _planned(spec, work)
        assert isinstance(work, Running)
        work.to_gpu()
        reports = []
        for number, replacement in enumerate(spec):
            batches: list[Any] = []
            if isinstance(replacement, OnData) and replacement.needs_data:
                rows, size = replacement.calibration_rows, replacement.calibration_batch_size
                batches = drawn_batches(work.materials, rows, size, work.recipe.seed)
            reports.append(_applied(replacement, work.model, batches, number))
        return reports

    def words(self, planned: CompactPlan) -> list[str]:
        unknown = [] if planned.unknown is None else [planned.unknown]
        return [*(str(report).replace("\n", "; ") for report in planned.reports), *unknown]

    def notes(self, report: Sequence[Mapping[str, Any]]) -> list[str]:
        errors = [error for one in report for error in one["errors"].values()]
        missed = f", {max(errors):.1%} of a module's output or matrix missed at most" if errors else ""
        shares = (report[-1][what][1] / report[0][what][0] for what in ("parameters", "flops"))
        parameters, operations = (f"{share:.1%}" for share in shares)
        # folded permutations are not modules
        count = len({path for one in report for path in one["changed"] if not path.endswith("_order")})
        return [
            f"{count} modules replaced before training{missed}; parameters {parameters}, operations {operations} "
            "of what they were"
        ]


def _planned(spec: Replacements, work: Planning) -> CompactPlan:
    """Make a model without values compact, which checks everything that depends on shapes."""
    reports: list[CompactReport] = []
    unknown: str | None = None
    unknown_before = work.unknown_ranks and bool(layers_of(work.model))
    for number, replacement in enumerate(spec):
        if isinstance(replacement, ShareLayers) and (unknown_before or unknown):
            raise LmcompressError(
                f"compact.{number} (share_layers): blocks that share must have the same ranks, and those that energy "
                "or parameters choose differ from block to block; give factorize a rank"
            )
        reports.append(_applied(replacement, work.model, [], number))
        unknown = unknown or replacement.unknown
    work.unknown_ranks = work.unknown_ranks or unknown is not None
    return CompactPlan(tuple(reports), unknown)


def _applied(replacement: Replacement, model: PreTrainedModel, batches: list[Any], number: int) -> CompactReport:
    try:
        return replacement.apply(model, batches)
    except LmcompressError as error:
        raise type(error)(f"compact.{number} ({replacement.kind}): {error}") from error
