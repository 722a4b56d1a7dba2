"""What a stage's compact layers need beside the trainer: checks before training, batches, words for a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError
from lmcompress.recipes.building import Materials, drawn_batches
from lmcompress.students import CompactReport
from lmcompress.students.config import OnData, Replacement, ShareLayers


@dataclass(frozen=True)
class CompactPlan:
    """What a stage's replacements will do, as far as shapes tell.

    Attributes:
        reports: of each, without errors.
        unknown: what only values tell, in words, or None where parameters and operations are exact.
    """

    reports: tuple[CompactReport, ...]
    unknown: str | None


def plan_compact(replacements: Sequence[Replacement], model: PreTrainedModel, *, unknown_before: bool) -> CompactPlan:
    """Make a model without values compact, by which everything is checked that shapes can tell.

    Args:
        replacements: of the stage, in order.
        model: on ``meta``; changed in place.
        unknown_before: whether a stage before has given it ranks that are not known yet.

    Returns:
        The plan.

    Raises:
        LmcompressError: what the functions of :mod:`lmcompress.students` refuse, or blocks that are to share and will
            have different ranks.
    """
    reports: list[CompactReport] = []
    unknown: str | None = None
    for number, replacement in enumerate(replacements):
        if isinstance(replacement, ShareLayers) and (unknown_before or unknown):
            raise LmcompressError(
                f"compact.{number} (share_layers): blocks that share must have the same ranks, and those that energy "
                "or parameters choose differ from block to block; give factorize a rank"
            )
        reports.append(_applied(replacement, model, [], number))
        unknown = unknown or replacement.unknown
    return CompactPlan(tuple(reports), unknown)


def make_compact(
    replacements: Sequence[Replacement], model: PreTrainedModel, materials: Materials, seed: int
) -> list[CompactReport]:
    """Put compact layers in place of those that a model has.

    Args:
        replacements: of the stage, in order; each sees what those before it left.
        model: changed in place.
        materials: of the stage; rows are drawn from it where something is fitted on data.
        seed: of the recipe.

    Returns:
        What each did.
    """
    if torch.cuda.is_available():
        model.to("cuda")
    reports = []
    for number, replacement in enumerate(replacements):
        batches: list[Any] = []
        if isinstance(replacement, OnData) and replacement.needs_data:
            rows, size = replacement.calibration_rows, replacement.calibration_batch_size
            batches = drawn_batches(materials, rows, size, seed)
        reports.append(_applied(replacement, model, batches, number))
    return reports


def compact_notes(name: str, reports: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """What a reader of a table must know of the compact layers of a model.

    Args:
        name: of the model.
        reports: of each replacement, as JSON types; None if there was none.
    """
    if not reports:
        return []
    errors = [error for report in reports for error in report["errors"].values()]
    missed = f", {max(errors):.1%} of a module's output or matrix missed at most" if errors else ""
    shares = (reports[-1][what][1] / reports[0][what][0] for what in ("parameters", "flops"))
    parameters, operations = (f"{share:.1%}" for share in shares)
    # orders that were folded are no modules
    count = len({path for report in reports for path in report["changed"] if not path.endswith("_order")})
    return [
        f"{name}: {count} modules replaced before training{missed}; parameters {parameters}, operations {operations} "
        "of what they were"
    ]


def _applied(replacement: Replacement, model: PreTrainedModel, batches: list[Any], number: int) -> CompactReport:
    try:
        return replacement.apply(model, batches)
    except LmcompressError as error:
        raise type(error)(f"compact.{number} ({replacement.kind}): {error}") from error
