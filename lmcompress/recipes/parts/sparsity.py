"""Unstructured pruning in recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from lmcompress.activations.gradients import MAX_CLASSES
from lmcompress.data import Task
from lmcompress.errors import LmcompressError
from lmcompress.pruning.unstructured import Sparsity, SparsityConfig, SparsityReport, prune_weights
from lmcompress.pruning.unstructured.planning import plan as plan_sparsity
from lmcompress.recipes.materials import drawn_batches
from lmcompress.recipes.parts.base import Planning, Running, StagePart, needs_training, seeded

if TYPE_CHECKING:
    from lmcompress.recipes.schema import Stage

FILE_NOT_MODEL = "zeros and shared values make the file smaller if the stage has storage, not the model"
"""Note on weights that are zero or share few values."""


class SparsityPart(StagePart[SparsityConfig]):
    """Single weights are set to zero, during training or without it."""

    key = "sparsity"
    schema = Annotated[
        SparsityConfig | None,
        Field(
            description="Unstructured pruning: single weights are set to zero during training or, with max_steps: 0, "
            "without; storage makes the file smaller by it."
        ),
    ]
    applied = "sparsity"
    role = "pruned"
    begins = True
    shrinks = True

    def check(self, stage: Stage, spec: SparsityConfig) -> None:
        needs_training(stage, spec)

    def plan(self, spec: SparsityConfig, work: Planning) -> None:
        plan_sparsity(work.model, spec)
        if work.stage.trains:
            spec.events(work.steps)
        if spec.chosen_criterion.needs == "classes":
            check_classes(work.materials.task)

    def method(self, spec: SparsityConfig, work: Running) -> Sparsity:
        return Sparsity(seeded(spec, work.recipe.seed))

    def apply(self, spec: SparsityConfig, work: Running) -> SparsityReport:
        work.to_gpu()
        config = seeded(spec, work.recipe.seed)
        rows, size = config.calibration_rows, config.calibration_batch_size
        batches = drawn_batches(work.materials, rows, size, config.seed) if config.needs_data else None
        return prune_weights(work.model, config, batches)

    def notes(self, report: Mapping[str, Any]) -> list[str]:
        share, count = report["sparsity"], len(report["matrices"])
        return [f"{share:.1%} of the weights of {count} matrices are zero", FILE_NOT_MODEL]

    def columns(self, report: Mapping[str, Any]) -> dict[str, str]:
        return {"zeros": f"{report['sparsity']:.1%}"}


def check_classes(task: Task) -> None:
    """Refuse the criterion ``obd`` if it needs too many exact second derivatives.

    Args:
        task: task of the recipe.

    Raises:
        LmcompressError: If the task has labels for single tokens, or too many classes.
    """
    by_word = task.kind.per_token
    if by_word or task.num_labels > MAX_CLASSES:
        got = f"a task of the kind {task.kind}" if by_word else f"{task.num_labels} classes"
        raise LmcompressError(
            f"the criterion obd must have at most {MAX_CLASSES} classes per row, got {got}; use the criterion fisher"
        )
