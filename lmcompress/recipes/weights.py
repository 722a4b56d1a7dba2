"""What a stage's sparsity and sharing need beside the trainer: checks before training, batches, words for a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from transformers import PreTrainedModel

from lmcompress.activations.gradients import MAX_CLASSES
from lmcompress.clustering import SharingConfig, share_weights
from lmcompress.clustering.planning import plan as plan_sharing
from lmcompress.data import Task, TaskKind
from lmcompress.errors import LmcompressError
from lmcompress.pruning.unstructured import SparsityConfig, prune_weights
from lmcompress.pruning.unstructured.planning import plan as plan_sparsity
from lmcompress.recipes.building import Materials, drawn_batches
from lmcompress.recipes.schema import Stage

AnyConfig = TypeVar("AnyConfig", SparsityConfig, SharingConfig)


def seeded(config: AnyConfig, seed: int) -> AnyConfig:
    """A stage's configuration with the recipe's seed, unless it has its own.

    Args:
        config: as the recipe says it.
        seed: of the recipe.
    """
    return config if "seed" in config.model_fields_set else config.model_copy(update={"seed": seed})


def check_weights(stage: Stage, model: PreTrainedModel, task: Task, steps: int) -> None:
    """Refuse what sparsity or sharing of a stage cannot do with its model.

    Args:
        stage: that perhaps has one or both.
        model: in the shapes that it will have; it is left as it is.
        task: what its outputs are.
        steps: optimizer steps of the stage.

    Raises:
        LmcompressError: a rule that names nothing, a pattern that does not divide a matrix, nothing to do, too few
            steps for the schedule, or the criterion ``obd`` for outputs that it is not for.
    """
    if stage.sparsity is not None:
        plan_sparsity(model, stage.sparsity)
        if stage.trains:
            stage.sparsity.events(steps)
        if stage.sparsity.chosen_criterion.needs == "classes":
            _check_classes(task)
    if stage.sharing is not None:
        plan_sharing(model, stage.sharing)


def _check_classes(task: Task) -> None:
    by_word = task.kind in (TaskKind.CAUSAL_LM, TaskKind.TOKEN_CLASSIFICATION)
    if by_word or task.num_labels > MAX_CLASSES:
        got = f"a task of the kind {task.kind}" if by_word else f"{task.num_labels} classes"
        raise LmcompressError(
            f"the criterion obd must have at most {MAX_CLASSES} classes a row, got {got}; use the criterion fisher"
        )


def change_weights(stage: Stage, model: PreTrainedModel, materials: Materials, seed: int) -> dict[str, dict[str, Any]]:
    """Make weights zero, and let them share values, without training.

    Args:
        stage: that perhaps asks for one or both.
        model: changed in place.
        materials: of the stage; rows are drawn from it where scores need data.
        seed: of the recipe.

    Returns:
        What was done, by the name of the method, as JSON types.
    """
    done: dict[str, dict[str, Any]] = {}
    if stage.sparsity is not None:
        sparsity = seeded(stage.sparsity, seed)
        rows, size = sparsity.calibration_rows, sparsity.calibration_batch_size
        batches = drawn_batches(materials, rows, size, sparsity.seed) if sparsity.needs_data else None
        done["sparsity"] = prune_weights(model, sparsity, batches).to_dict()
    if stage.sharing is not None:
        sharing = seeded(stage.sharing, seed)
        rows = sharing.calibration_rows
        # squares of gradients are of single rows
        batches = drawn_batches(materials, rows, 1, sharing.seed) if sharing.sensitivity else None
        done["sharing"] = share_weights(model, sharing, batches).to_dict()
    return done


def weights_notes(name: str, sparsity: Mapping[str, Any] | None, sharing: Mapping[str, Any] | None) -> list[str]:
    """What a reader of a table must know of how the weights of a model were changed.

    Args:
        name: of the model.
        sparsity: what became zero, as JSON types; None if nothing did.
        sharing: what shares values, as JSON types; None if nothing does.
    """
    notes = []
    if sparsity is not None:
        count = len(sparsity["matrices"])
        notes.append(f"{name}: {sparsity['sparsity']:.1%} of the weights of {count} matrices are zero")
    if sharing is not None:
        values = [row["clusters"] for row in sharing["matrices"]]
        least, most = min(values), max(values)
        words = str(most) if least == most else f"{least} to {most}"
        notes.append(f"{name}: each of {len(values)} matrices has {words} values beside zero")
    if notes:
        notes.append(
            f"{name}: zeros and shared values make the file smaller where the stage has storage, not the model"
        )
    return notes
