"""One trained model and no recipe file: prune or quantize it without training, or draw its frontier.

Everything here is a recipe made on the spot, or a part of what carries one out.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from lmcompress.errors import LmcompressError, argument
from lmcompress.evaluation import showing_progress
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.targets import Target
from lmcompress.recipes.checks import check_writable
from lmcompress.recipes.measuring import STAGE_FILE, Entry, measure, notes_of, update_cards
from lmcompress.recipes.planning import Plan, plan
from lmcompress.recipes.progress import quiet_libraries
from lmcompress.recipes.schema import (
    EvaluationSpec,
    Recipe,
    Stage,
    StageDistillation,
    StagePruning,
    StageQuantization,
    TaskSpec,
    Training,
    VocabularySpec,
)
from lmcompress.recipes.stage_run import StageRun

DENSE, PRUNED, QUANTIZED = "dense", "pruned", "quantized"


def prune_recipe(
    model: str,
    task: TaskSpec,
    *,
    pruning: StagePruning | None = None,
    vocabulary: VocabularySpec | None = None,
    save: str = "native",
    storage: str = "plain",
    evaluation: EvaluationSpec | None = None,
    seed: int = 0,
) -> Recipe:
    """A recipe of one stage that prunes a trained model and trains nothing.

    Args:
        model: folder, or name on the Hub.
        task: that it was trained for.
        pruning: what is cut, if anything.
        vocabulary: how its vocabulary is pruned, if at all.
        save: format of the checkpoint.
        storage: how its weights lie in the file.
        evaluation: what is measured.
        seed: of calibration rows and drawn labels.

    Raises:
        LmcompressError: neither pruning nor vocabulary, or no such format or storage.
    """
    if pruning is None and vocabulary is None:
        raise LmcompressError(
            "there is nothing to do: give a target (--sparsity, --parameters, --flops-share, --latency-share, "
            "--latency-ms or --shape), or --vocabulary, or both"
        )
    stage = _stage(name=PRUNED, pruning=pruning, vocabulary=vocabulary, save=save, storage=storage)
    return Recipe(
        name="prune",
        model=model,
        task=task,
        stages=(stage,),
        evaluation=evaluation or EvaluationSpec(),
        seed=seed,
    )


def quantize_recipe(
    model: str,
    task: TaskSpec,
    quantization: StageQuantization,
    *,
    storage: str = "plain",
    evaluation: EvaluationSpec | None = None,
    seed: int = 0,
) -> Recipe:
    """A recipe of one stage that quantizes a trained model and trains nothing.

    Args:
        model: folder, or name on the Hub.
        task: that it was trained for.
        quantization: what is quantized to what, and how it is rounded.
        storage: how its weights lie in the file.
        evaluation: what is measured.
        seed: of calibration rows.

    Returns:
        The recipe.

    Raises:
        LmcompressError: no such storage.
    """
    return Recipe(
        name="quantize",
        model=model,
        task=task,
        stages=(_stage(name=QUANTIZED, quantization=quantization, storage=storage),),
        evaluation=evaluation or EvaluationSpec(),
        seed=seed,
    )


def plan_once(recipe: Recipe, output: Path, *, overwrite: bool = False, measure_times: bool = True) -> Plan:
    """Check a recipe of :func:`prune_recipe` or :func:`quantize_recipe`, and that nothing is in its way.

    Args:
        recipe: of one stage.
        output: folder of the model to be.
        overwrite: whether a model that lmcompress wrote there may be replaced.
        measure_times: measure a latency table that is not there.

    Raises:
        LmcompressError: If :func:`~lmcompress.recipes.planning.plan` refuses it, or there is something at ``output``
            already.
    """
    _refuse_what_is_there(output, overwrite)
    check_writable(output)
    try:
        return plan(recipe, output.parent, measure=measure_times)
    except LmcompressError as error:
        # a recipe that was made on the spot has a stage that nobody named
        raise type(error)(str(error).removeprefix(f"stage {recipe.stages[0].name!r}: ")) from error


def compress_once(
    recipe: Recipe, output: str | Path, *, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Prune or quantize a trained model without training, save it, and measure it beside what it was.

    Args:
        recipe: of :func:`prune_recipe` or :func:`quantize_recipe`.
        output: folder of the model to be.
        overwrite: replace a model that lmcompress wrote there.
        console: where headlines and progress go.

    Returns:
        The report, as :func:`~lmcompress.recipes.measuring.measure` gives it, of two rows: before and after.

    Raises:
        LmcompressError: If :func:`plan_once` refuses it.
    """
    console, folder = console or Console(), Path(output)
    with quiet_libraries(), showing_progress(console):
        console.print("checking rows, model and what is asked for")
        planned = plan_once(recipe, folder, overwrite=overwrite)
        entry = planned.stages[0]
        if "quantization" not in entry.plans:
            console.print(f"pruning to {entry.shape}")
        else:
            console.print(f"quantizing to about {entry.bytes_estimate / 2**20:.1f} MiB")
        run = StageRun(planned, entry, folder, "", console, resume=False)
        run.target = folder
        run.train()
        done = run.outcome
        console.print("measuring quality, size and latency before and after")
        path = str(recipe.model)
        dense = Entry(DENSE, "model", path, planned.materials)
        after = Entry(entry.stage.name, entry.role, str(folder), entry.materials, made_here=True, **done)
        try:
            report = measure([dense, after], DENSE, [*planned.notes, *notes_of(after)])
        except KeyboardInterrupt:
            # else the same command would find a model in its way
            shutil.rmtree(folder)
            raise
        update_cards(report, [folder])
    return report


def frontier_recipe(
    model: str,
    task: TaskSpec,
    targets: Sequence[Target],
    *,
    pruning: PruningConfig,
    steps: int = 0,
    learning_rate: float = 5e-5,
    evaluation: EvaluationSpec | None = None,
    seed: int = 0,
) -> Recipe:
    """A recipe that prunes one trained model to several targets, each with a short recovery.

    Args:
        model: folder, or name on the Hub.
        task: that it was trained for.
        targets: at least one; each is a stage of its own, from the dense model.
        pruning: how; its target is not looked at.
        steps: optimizer steps of recovery, with the dense model as teacher; 0: none.
        learning_rate: of the recovery.
        evaluation: what is measured.
        seed: of everything.

    Returns:
        The recipe; :func:`~lmcompress.recipes.runner.run` carries it out and draws the frontier.

    Raises:
        LmcompressError: no targets, the same one twice, or fewer than 0 steps.
    """
    if steps < 0:
        raise LmcompressError(f"{argument('steps')} must be >= 0, got {steps}")
    names = [target_name(target) for target in targets]
    if not names or len(set(names)) < len(names):
        raise LmcompressError(f"targets must be at least one, and none twice, got {', '.join(names) or 'none'}")
    values = {name: getattr(pruning, name) for name in pruning.model_fields_set if name != "target"}
    training = Training(max_steps=steps, learning_rate=learning_rate, save_strategy="no")
    taught = StageDistillation(teachers=(DENSE,), temperature=2.0) if steps else None
    stages = [
        Stage(
            name=name,
            start=DENSE,
            pruning=StagePruning(**values | {"target": target}),
            distillation=taught,
            training=training,
        )
        for name, target in zip(names, targets, strict=True)
    ]
    return Recipe(
        name="frontier",
        description="One model, pruned to several targets"
        + (f", each with {steps} steps of recovery." if steps else ", without training."),
        model=model,
        task=task,
        stages=(Stage(name=DENSE, training=Training(max_steps=0)), *stages),
        evaluation=evaluation or EvaluationSpec(),
        seed=seed,
    )


def target_name(target: Target) -> str:
    """A target as the name of a stage.

    Args:
        target: any but a shape.

    Raises:
        LmcompressError: it is a shape.

    Example:
        >>> target_name(Target(sparsity=0.75))
        'sparsity-0.75'
    """
    if target.shape is not None:
        raise LmcompressError("a frontier must be of sparsities or of shares, got a shape; write a recipe for shapes")
    return f"{target.kind.replace('_', '-')}-{getattr(target, target.kind)}"


def _stage(**values: Any) -> Stage:
    try:
        return Stage(training=Training(max_steps=0), **values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        raise LmcompressError(f"{argument(where)}: {message}" if where else message) from error


def _refuse_what_is_there(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    ours = (folder / STAGE_FILE).is_file() and (folder / "config.json").is_file()
    if not ours:
        raise LmcompressError(f"{folder} holds something that is no model of lmcompress; name another --output")
    if not overwrite:
        raise LmcompressError(f"{folder} holds a model already; name another --output, or pass --overwrite")


__all__ = [
    "compress_once",
    "frontier_recipe",
    "plan_once",
    "prune_recipe",
    "quantize_recipe",
    "target_name",
]
