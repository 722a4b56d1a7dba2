"""Lengths of a recipe against the positions of its models: capped where nobody chose them, else refused."""

from __future__ import annotations

from transformers import AutoConfig, PreTrainedTokenizerBase

from lmcompress.data import TaskKind
from lmcompress.errors import LmcompressError, argument
from lmcompress.families.positions import positions_of
from lmcompress.recipes.lookup import check_weights, found
from lmcompress.recipes.schema import Recipe
from lmcompress.recipes.specs import FromScratch

WINDOW = 384
"""Default tokens of a window of question answering, as in the scripts of BERT and Transformers."""


def fitted_lengths(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, kind: TaskKind | None = None
) -> tuple[Recipe, tuple[str, ...]]:
    """A recipe whose lengths all its models have positions for.

    A ``task.max_length`` that is not in the recipe is capped, and a note says so; every other length is refused.

    Args:
        recipe: validated recipe.
        tokenizer: tokenizer of its model; what it takes at most counts as well.
        kind: kind of its task; windows of question answering have :data:`WINDOW` tokens where nobody chose a length.

    Returns:
        The recipe, and notes for readers of the numbers.

    Raises:
        LmcompressError: If the recipe's model or a teacher from outside has no weights, or fewer positions than
            ``task.max_length``, ``evaluation.sequence_length`` or a stage's ``pruning.latency.length``; or
            ``evaluation.stride`` is greater than ``task.max_length``.
    """
    positions = positions_by_model(recipe)
    if kind is TaskKind.QUESTION_ANSWERING and "max_length" not in recipe.task.model_fields_set:
        # a copy has every field that it is given in model_fields_set
        most_tokens = min(WINDOW, tokenizer.model_max_length, *positions.values())
        recipe = recipe.model_copy(update={"task": recipe.task.model_copy(update={"max_length": most_tokens})})
    name, most = min(positions.items(), key=lambda item: item[1])
    if tokenizer.model_max_length < most:
        name, most = f"the tokenizer of {name}", int(tokenizer.model_max_length)
    notes: tuple[str, ...] = ()
    if "max_length" not in recipe.task.model_fields_set and recipe.task.max_length > most:
        task = recipe.task.model_copy(update={"max_length": most})
        notes = (f"max_length is {most}, the number of positions of {name} (the default is {recipe.task.max_length})",)
        recipe = recipe.model_copy(update={"task": task})
    _check(recipe, positions)
    return recipe, notes


def positions_by_model(recipe: Recipe) -> dict[str, int]:
    """The number of positions of every model that exists before the run.

    Args:
        recipe: validated recipe.

    Returns:
        By name: the recipe's model and the teachers from outside.

    Raises:
        LmcompressError: If one of them does not exist, or its files are damaged.
    """
    stages = {stage.name for stage in recipe.stages}
    named = [recipe.model] if isinstance(recipe.model, str) else []
    named += [name for s in recipe.stages if s.distillation for name in s.distillation.teachers if name not in stages]
    positions = {"the model": recipe.model.positions} if isinstance(recipe.model, FromScratch) else {}
    for name in dict.fromkeys(named):
        with found(name, "model"):
            positions[name] = positions_of(AutoConfig.from_pretrained(name))
        check_weights(name)
    return positions


def _check(recipe: Recipe, positions: dict[str, int]) -> None:
    lengths: dict[str, int | None] = {
        "max_length": recipe.task.max_length,
        "evaluation.sequence_length": recipe.evaluation.sequence_length,
    }
    for stage in recipe.stages:
        if stage.pruning is not None and stage.pruning.latency is not None:
            lengths[f"stages.{stage.name}.pruning.latency.length"] = stage.pruning.latency.length
    stride = recipe.evaluation.stride
    if stride is not None and stride > recipe.task.max_length:
        raise LmcompressError(
            f"{argument('evaluation.stride')} must be at most max_length = {recipe.task.max_length}, got {stride}; a "
            "greater one would leave tokens out"
        )
    for name, most in positions.items():
        for what, length in lengths.items():
            if length is not None and length > most:
                raise LmcompressError(
                    f"{argument(what)} must be at most {most}, the number of positions of {name}, got {length}"
                )
