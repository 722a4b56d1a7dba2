"""Weight clustering in recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from lmcompress.clustering import SharingConfig, SharingReport, WeightSharing, share_weights
from lmcompress.clustering.planning import plan as plan_sharing
from lmcompress.recipes.materials import drawn_batches
from lmcompress.recipes.parts.base import Planning, Running, StagePart, seeded
from lmcompress.recipes.parts.sparsity import FILE_NOT_MODEL

if TYPE_CHECKING:
    from lmcompress.recipes.schema import Stage


class SharingPart(StagePart[SharingConfig]):
    """The weights of a matrix share few values, which are trained or only found."""

    key = "sharing"
    schema = Annotated[
        SharingConfig | None,
        Field(
            description="Weight clustering: number of shared values, which are trained or, with max_steps: 0, "
            "only found; zeros stay. storage makes the file smaller by it."
        ),
    ]
    applied = "weight sharing"
    role = "shared"
    shrinks = True

    def check(self, stage: Stage, spec: SharingConfig) -> None:
        for name in ("pruning", "sparsity"):
            if stage.trains and getattr(stage, name) is not None:
                raise ValueError(
                    f"sharing and {name} cannot be in one stage that trains: {name} changes weights that share their "
                    "values already; give sharing a stage of its own after it"
                )
        if stage.quantization is not None:
            raise ValueError(
                "sharing and quantization both say which values weights have: choose one, or share in one stage and "
                "quantize in a later one"
            )

    def plan(self, spec: SharingConfig, work: Planning) -> None:
        plan_sharing(work.model, spec)

    def method(self, spec: SharingConfig, work: Running) -> WeightSharing:
        return WeightSharing(seeded(spec, work.recipe.seed))

    def apply(self, spec: SharingConfig, work: Running) -> SharingReport:
        config = seeded(spec, work.recipe.seed)
        # squared gradients of single rows
        rows = config.calibration_rows
        batches = drawn_batches(work.materials, rows, 1, config.seed) if config.sensitivity else None
        return share_weights(work.model, config, batches)

    def notes(self, report: Mapping[str, Any]) -> list[str]:
        return [f"each of {len(report['matrices'])} matrices has {_values(report)} values beside zero", FILE_NOT_MODEL]

    def columns(self, report: Mapping[str, Any]) -> dict[str, str]:
        return {"values a matrix": _values(report)}


def _values(report: Mapping[str, Any]) -> str:
    values = [row["clusters"] for row in report["matrices"]]
    least, most = min(values), max(values)
    return str(most) if least == most else f"{least} to {most}"
