"""One trained model without a recipe file: pruned or quantized without training, or its frontier.

Everything here is a recipe created on the fly, or a part of running one.
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
from lmcompress.model import REPORT_FILE
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.targets import Target
from lmcompress.recipes.checks import check_writable
from lmcompress.recipes.measuring import STAGE_FILE, Entry, measure, notes_of, update_cards
from lmcompress.recipes.parts.distillation import StageDistillation
from lmcompress.recipes.parts.pruning import StagePruning
from lmcompress.recipes.parts.quantization import StageQuantization
from lmcompress.recipes.parts.vocabulary import VocabularySpec
from lmcompress.recipes.planning import Plan, plan
from lmcompress.recipes.progress import quiet_libraries
from lmcompress.recipes.schema import Recipe, Stage
from lmcompress.recipes.specs import EvaluationSpec, TaskSpec
from lmcompress.recipes.stage_run import StageRun
from lmcompress.recipes.training import Training

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
    """A recipe of one stage that prunes a trained model without training.

    Args:
        model: folder, or name on the Hub.
        task: task that it was trained for.
        pruning: structured pruning, if any.
        vocabulary: vocabulary pruning, if any.
        save: format of the checkpoint.
        storage: storage of its weights in the file.
        evaluation: measurements.
        seed: seed of calibration rows and sampled labels.

    Raises:
        LmcompressError: If there is neither pruning nor vocabulary, or the format or storage does not exist.
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
        # nothing is trained
        dtype="auto",
    )


def quantize_recipe(
    model: str,
    task: TaskSpec,
    quantization: StageQuantization,
    *,
    save: str = "native",
    storage: str = "plain",
    evaluation: EvaluationSpec | None = None,
    seed: int = 0,
) -> Recipe:
    """A recipe of one stage that quantizes a trained model without training.

    Args:
        model: folder, or name on the Hub.
        task: task that it was trained for.
        quantization: the quantization, including the rounding method.
        save: format of its folder, ``native`` or ``self_loading``.
        storage: storage of its weights in the file.
        evaluation: measurements.
        seed: seed of calibration rows.

    Returns:
        The recipe.

    Raises:
        LmcompressError: If the format or storage does not exist, or the format does not hold such weights.
    """
    return Recipe(
        name="quantize",
        model=model,
        task=task,
        stages=(_stage(name=QUANTIZED, quantization=quantization, save=save, storage=storage),),
        evaluation=evaluation or EvaluationSpec(),
        seed=seed,
        # nothing is trained
        dtype="auto",
    )


def plan_once(recipe: Recipe, output: Path, *, overwrite: bool = False, measure_times: bool = True) -> Plan:
    """Check a recipe of :func:`prune_recipe` or :func:`quantize_recipe`, and that nothing is in its way.

    Args:
        recipe: recipe of one stage.
        output: folder of the resulting model.
        overwrite: whether a model that lmcompress wrote there may be replaced.
        measure_times: whether to measure a missing latency table.

    Raises:
        LmcompressError: If :func:`~lmcompress.recipes.planning.plan` refuses it, or there is something at ``output``
            already.
    """
    refuse_what_is_there(output, overwrite)
    check_writable(output)
    try:
        return plan(recipe, output.parent, measure=measure_times)
    except LmcompressError as error:
        # the stage of a recipe created on the fly has no name for the user
        raise type(error)(str(error).removeprefix(f"stage {recipe.stages[0].name!r}: ")) from error


def compress_once(
    recipe: Recipe, output: str | Path, *, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Prune or quantize a trained model without training, save it, and measure it before and after.

    Args:
        recipe: from :func:`prune_recipe` or :func:`quantize_recipe`.
        output: folder of the resulting model.
        overwrite: whether to replace a model that lmcompress wrote there.
        console: console for headlines and progress.

    Returns:
        The report, from :func:`~lmcompress.recipes.measuring.measure`, with two rows: before and after.

    Raises:
        LmcompressError: If :func:`plan_once` refuses it.
    """
    console, folder = console or Console(), Path(output)
    with quiet_libraries(), showing_progress(console):
        console.print("checking rows, model and options")
        planned = plan_once(recipe, folder, overwrite=overwrite)
        entry = planned.stages[0]
        if "quantization" not in entry.plans:
            console.print(f"pruning to {entry.shape}")
        else:
            console.print(f"quantizing to about {entry.bytes_estimate / 2**20:.1f} MiB")
        run = StageRun(planned, entry, folder, None, console, resume=False)
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
    """A recipe that prunes one trained model to several targets, each with a short fine-tuning.

    Args:
        model: folder, or name on the Hub.
        task: task that it was trained for.
        targets: at least one; each is a separate stage, from the dense model.
        pruning: configuration of pruning; its target is ignored.
        steps: number of recovery steps, with the dense model as teacher; 0: none.
        learning_rate: learning rate of the recovery.
        evaluation: measurements.
        seed: seed of everything.

    Returns:
        The recipe; :func:`~lmcompress.recipes.runner.run` carries it out and draws the frontier.

    Raises:
        LmcompressError: If there are no targets, one is given twice, or there are fewer than 0 steps.
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
    """The name of a stage for a target.

    Args:
        target: any target except a shape.

    Raises:
        LmcompressError: If it is a shape.

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


def refuse_what_is_there(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds something which must not be replaced.

    Args:
        folder: need not exist.
        overwrite: whether a model that lmcompress wrote there may be replaced.

    Raises:
        LmcompressError: If it holds a model and ``overwrite`` is false, or anything else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    written = any((folder / name).is_file() for name in (STAGE_FILE, REPORT_FILE))
    ours = written and (folder / "config.json").is_file()
    if not ours:
        raise LmcompressError(f"{folder} holds something that is no model of lmcompress; name another --output")
    if not overwrite:
        raise LmcompressError(f"{folder} holds a model already; name another --output, or pass --overwrite")
