"""One trained model and no recipe file: prune it without training, look at what it can lose, draw its frontier.

Everything here is a recipe made on the spot, or a part of what carries one out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoConfig, PretrainedConfig

from lmcompress.data import Task, TaskKind
from lmcompress.errors import LmcompressError
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.scoring import score
from lmcompress.pruning.structured.sensitivity import sensitivity
from lmcompress.pruning.structured.targets import Target
from lmcompress.recipes.building import auto_class
from lmcompress.recipes.folder import STAGE_FILE
from lmcompress.recipes.materials import Materials, load_tokenizer, read_task
from lmcompress.recipes.measuring import Entry, measure, notes_of, quality, update_cards
from lmcompress.recipes.parts.pruning import calibration_batches
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


def plan_once(recipe: Recipe, output: Path, *, measure_times: bool = True) -> Plan:
    """Check a recipe of :func:`prune_recipe` or :func:`quantize_recipe`, and that its model is trained for its task.

    Args:
        recipe: of one stage.
        output: folder of the model to be.
        measure_times: measure a latency table that is not there.

    Raises:
        LmcompressError: as :func:`~lmcompress.recipes.planning.plan`, or the model has another head.
    """
    planned = plan(recipe, output.parent, measure=measure_times)
    assert isinstance(recipe.model, str)
    check_trained_for(AutoConfig.from_pretrained(recipe.model), planned.materials.task, recipe.model)
    return planned


def compress_once(
    recipe: Recipe, output: str | Path, *, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Prune or quantize a trained model without training, save it, and measure it beside what it was.

    Args:
        recipe: of :func:`prune_recipe` or :func:`quantize_recipe`.
        output: folder of the model to be.
        overwrite: replace a model that lmcompress wrote there.
        console: where headlines go.

    Returns:
        The report, as :func:`~lmcompress.recipes.measuring.measure` gives it, of two rows: before and after.

    Raises:
        LmcompressError: as :func:`plan_once`, or there is something at ``output`` already.
    """
    console, folder = console or Console(), Path(output)
    _refuse_what_is_there(folder, overwrite)
    with quiet_libraries():
        console.print("checking rows, model and what is asked for")
        planned = plan_once(recipe, folder)
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
        report = measure([dense, after], DENSE, [*planned.notes, *notes_of(after)])
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
        LmcompressError: no targets, or the same one twice.
    """
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


def measure_sensitivity(
    model: str,
    task: TaskSpec,
    config: PruningConfig,
    *,
    shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    split: str = "validation",
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores of a model's units, and its quality with a share of one block's heads or neurons gone, block by block.

    Args:
        model: folder, or name on the Hub.
        task: that it was trained for; its ``limit`` makes this quick.
        config: criterion, parts (of heads and neurons), labels and calibration rows; its target is not looked at.
        shares: of a block's units.
        split: that quality is measured on.
        batch_size: of that.
        progress: shows bars, on a terminal.

    Returns:
        JSON types: ``model``, ``task``, ``split``, ``metric``, ``lower_is_better``, ``criterion``, ``scores`` (by part,
        of each block) and ``rows`` (see :class:`~lmcompress.pruning.structured.sensitivity.SensitivityRow`).

    Raises:
        LmcompressError: no such split, a model of another task, or what the criterion refuses.
    """
    with quiet_libraries():
        data = read_task(task)
        if split not in data.splits():
            raise LmcompressError(f"no split {split!r}; {data.task.name} has: {', '.join(data.splits())}")
        check_trained_for(AutoConfig.from_pretrained(model), data.task, model)
        evaluation = EvaluationSpec(splits=(split,), batch_size=batch_size, latency_batches=())
        recipe = Recipe(name="sensitivity", model=model, task=task, stages=(Stage(name="none"),), evaluation=evaluation)
        materials = Materials(recipe, data, load_tokenizer(model, data.task))
        loaded = auto_class(data.task).from_pretrained(model).eval()
        if torch.cuda.is_available():
            loaded.to("cuda")
        batches = calibration_batches(materials, config)
        scores = score(
            loaded,
            config.criterion_name,
            config.parts,
            batches,
            labels=config.labels,
            seed=config.seed,
            progress=progress,
        )
        causal = data.task.kind is TaskKind.CAUSAL_LM
        metric = "token_perplexity" if causal else data.task.metrics[0]
        rows = sensitivity(
            loaded, scores, lambda gated: quality(materials, gated, split)[metric], shares=shares, progress=progress
        )
    return {
        "model": model,
        "task": data.task.name,
        "split": split,
        "metric": metric,
        "lower_is_better": causal,
        "criterion": config.criterion_name,
        "notes": list(data.notes),
        "scores": {part: [tensor.tolist() for tensor in scores.tensors(part)] for part in scores.parts()},
        "rows": [row.as_dict() for row in rows],
    }


def check_trained_for(config: PretrainedConfig, task: Task, name: str) -> None:
    """Refuse a model whose head is for other labels than the task's, or that has none.

    Args:
        config: of the model.
        task: that it is to be measured on.
        name: of the model, for the message.

    Raises:
        LmcompressError: it was not trained for this task.
    """
    wanted = auto_class(task).__name__.removeprefix("AutoModel")
    if config.architectures and not any(wanted in known or "LMHead" in known for known in config.architectures):
        raise LmcompressError(
            f"{name} is a {', '.join(config.architectures)}, without a trained head for {task.kind}: fine-tune it first"
        )
    if task.kind is TaskKind.CAUSAL_LM:
        return
    if config.num_labels != task.num_labels:
        raise LmcompressError(
            f"{name} has {config.num_labels} labels, {task.name} has {task.num_labels}: "
            "it was not trained for this task"
        )
    names = [str(config.id2label.get(i, i)) for i in range(task.num_labels)]
    if task.label_names and names != list(task.label_names) and names != [f"LABEL_{i}" for i in range(task.num_labels)]:
        raise LmcompressError(
            f"{name} calls its labels {names[:5]}, {task.name} {list(task.label_names)[:5]}: numbers would not agree"
        )


def _stage(**values: Any) -> Stage:
    try:
        return Stage(training=Training(max_steps=0), **values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise LmcompressError(f"{where}: {message}" if where else message) from error


def _refuse_what_is_there(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    ours = (folder / STAGE_FILE).is_file() and (folder / "config.json").is_file()
    if not ours:
        raise LmcompressError(f"{folder} holds something that is no model of lmcompress; name another --output")
    if not overwrite:
        raise LmcompressError(f"{folder} holds a model already; name another --output, or pass --overwrite")


__all__ = [
    "check_trained_for",
    "compress_once",
    "frontier_recipe",
    "measure_sensitivity",
    "plan_once",
    "prune_recipe",
    "quantize_recipe",
    "target_name",
]
