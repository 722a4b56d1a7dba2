"""One trained model and no recipe file: prune it without training, look at what it can lose, draw its frontier.

Everything here is a recipe made on the spot, or a part of what carries one out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Value
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from lmcompress.data import Task, TaskData, TaskKind
from lmcompress.data.columns import find_label_column, find_text_columns, is_list
from lmcompress.data.sources import read_files
from lmcompress.errors import LmcompressError, argument
from lmcompress.evaluation import showing_progress
from lmcompress.model import CompressedModel
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.scoring import score
from lmcompress.pruning.structured.sensitivity import sensitivity
from lmcompress.pruning.structured.targets import Target
from lmcompress.recipes.building import auto_class
from lmcompress.recipes.checks import check_lengths, check_writable, positions_of
from lmcompress.recipes.lookup import found
from lmcompress.recipes.materials import Materials, check_split, load_tokenizer, read_task
from lmcompress.recipes.measuring import STAGE_FILE, Entry, measure, notes_of, quality, update_cards
from lmcompress.recipes.metrics import LOWER_IS_BETTER, measured_metrics, with_metrics
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


def plan_once(recipe: Recipe, output: Path, *, overwrite: bool = False, measure_times: bool = True) -> Plan:
    """Check a recipe of :func:`prune_recipe` or :func:`quantize_recipe`, and that its model is trained for its task.

    Args:
        recipe: of one stage.
        output: folder of the model to be.
        overwrite: whether a model that lmcompress wrote there may be replaced.
        measure_times: measure a latency table that is not there.

    Raises:
        LmcompressError: If :func:`~lmcompress.recipes.planning.plan` refuses it, the model has another head, or there
            is something at ``output`` already.
    """
    _refuse_what_is_there(output, overwrite)
    check_writable(output)
    assert isinstance(recipe.model, str)
    try:
        planned = plan(recipe, output.parent, measure=measure_times)
    except LmcompressError as error:
        # a recipe that was made on the spot has a stage that nobody named
        raise type(error)(str(error).removeprefix(f"stage {recipe.stages[0].name!r}: ")) from error
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
    evaluation: EvaluationSpec | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Scores of a model's units, and its quality with a share of one block's heads or neurons masked, block by block.

    Args:
        model: folder, or name on the Hub.
        task: that it was trained for; its ``limit`` makes this quick.
        config: criterion, parts (of heads and neurons), labels and calibration rows; its target is not looked at.
        shares: of a block's units.
        evaluation: its first split and main metric are what quality is.
        console: where progress goes; None: it is not shown.

    Returns:
        JSON types: ``model``, ``task``, ``split``, ``metric``, ``lower_is_better``, ``criterion``, ``scores`` (by part,
        of each block) and ``rows`` (see :class:`~lmcompress.pruning.structured.sensitivity.SensitivityRow`).

    Raises:
        LmcompressError: If there is no such split, the model is of another task, or the criterion refuses it.
    """
    evaluation = evaluation or EvaluationSpec()
    split = evaluation.splits[0]
    with quiet_libraries(), showing_progress(console):
        materials, loaded = _ready(model, read_task(task), task, evaluation)
        criterion, seed = config.criterion_name, config.seed
        batches = calibration_batches(materials, config)
        scores = score(loaded, config.chosen_criterion, config.parts, batches, labels=config.labels, seed=seed)
        metric = measured_metrics(materials.task)[0]
        rows = sensitivity(loaded, scores, lambda gated: quality(materials, gated, split)[metric], shares=shares)
    return {
        "model": model,
        "task": materials.task.name,
        "split": split,
        "metric": metric,
        "lower_is_better": metric in LOWER_IS_BETTER,
        "criterion": criterion,
        "notes": list(materials.data.notes),
        "scores": {part: [tensor.tolist() for tensor in scores.tensors(part)] for part in scores.parts()},
        "rows": [row.as_dict() for row in rows],
    }


def evaluate_once(
    model: str, task: TaskSpec, evaluation: EvaluationSpec, *, split: str | None = None
) -> dict[str, Any]:
    """The quality of a model on one split, or on a task that is one file, whole.

    Args:
        model: folder, or name on the Hub.
        task: that it was trained for.
        evaluation: metrics, batch size, stride of perplexity.
        split: of the task; None: ``validation``, or all of a task that is one file.

    Returns:
        JSON types: ``task``, ``split``, ``rows``, ``metrics`` and ``notes``.

    Raises:
        LmcompressError: If there is no such split, a split is named of one file, or the model is of another task.
    """
    with quiet_libraries():
        named = task.name.partition("/")[0] in ("glue", "embedded")
        file = Path(task.data or task.name)
        whole = file.is_file() and not named
        if whole and split is not None:
            raise LmcompressError(
                f"{file} is one file, which is evaluated whole: leave out {argument('evaluation.splits')}"
            )
        data = read_task(task, _whole(file, task, model) if whole else None)
        chosen = "validation" if whole else split or "validation"
        evaluation = evaluation.model_copy(update={"splits": (chosen,)})
        materials, loaded = _ready(model, data, task, evaluation)
        metrics = quality(materials, loaded, chosen)
    rows = materials.data.splits()[chosen].num_rows
    return {
        "task": materials.task.name,
        "split": "all rows" if whole else chosen,
        "rows": rows,
        "metrics": metrics,
        "notes": _notes_of_whole(materials.data.notes) if whole else list(materials.data.notes),
    }


def load_compressed(name: str, auto_class: Any = None) -> CompressedModel:
    """A model from a folder or the Hub.

    Args:
        name: folder, or name on the Hub.
        auto_class: such as ``AutoModelForCausalLM``; None: the class that wrote the checkpoint.

    Raises:
        LmcompressError: If there is none.
    """
    with found(name, "model"):
        return CompressedModel.from_pretrained(name, auto_class)


def load_model(name: str, auto_class: Any = None) -> PreTrainedModel:
    """The model of :func:`load_compressed` itself, in evaluation mode.

    Args:
        name: folder, or name on the Hub.
        auto_class: such as ``AutoModelForCausalLM``; None: the class that wrote the checkpoint.
    """
    return load_compressed(name, auto_class).model.eval()


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


def _ready(model: str, data: TaskData, task: TaskSpec, evaluation: EvaluationSpec) -> tuple[Materials, PreTrainedModel]:
    """Rows and a trained model, each checked against the other, where quality can be measured."""
    data = with_metrics(data, evaluation.metrics)
    check_split(data, evaluation.splits[0])
    loaded = load_model(model, auto_class(data.task))
    check_trained_for(loaded.config, data.task, model)
    tokenizer = load_tokenizer(model, data.task)
    most = min(tokenizer.model_max_length, positions_of(loaded.config))
    if "max_length" not in task.model_fields_set:
        task = task.model_copy(update={"max_length": min(task.max_length, most)})
    # the runner's way from rows to batches, for one model
    recipe = Recipe(name="one", model=model, task=task, stages=(Stage(name="none"),), evaluation=evaluation)
    check_lengths(recipe)
    return Materials(recipe, data, tokenizer), loaded.to("cuda" if torch.cuda.is_available() else "cpu")


def _whole(file: Path, task: TaskSpec, model: str) -> dict[str, Dataset]:
    """A file as a split to evaluate; its labels are the model's, for it need not have a row of each."""
    rows = read_files([file])
    texts = find_text_columns(rows.column_names, task.text_columns)
    label = find_label_column(rows.column_names, texts, task.label_column, task.kind)
    if label is not None and not is_list(rows.features[label]) and task.kind is not TaskKind.REGRESSION:
        with found(model, "model"):
            config = AutoConfig.from_pretrained(model)
        names = [str(config.id2label.get(i, i)) for i in range(config.num_labels)]
        numbers = [str(i) for i in range(len(names))] if names == [f"LABEL_{i}" for i in range(len(names))] else names
        if len(names) > 1 and {str(value) for value in rows.unique(label)} <= set(numbers):
            rows = rows.cast_column(label, Value("string")).cast_column(label, ClassLabel(names=numbers))
    return {"train": rows, "validation": rows}


def _notes_of_whole(notes: Sequence[str]) -> list[str]:
    """Without what was said of the training rows, which are the same."""
    told = [note for note in notes if not note.startswith("train ")]
    return [note.replace("validation is", "what is evaluated is") for note in told]


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
    "check_trained_for",
    "compress_once",
    "evaluate_once",
    "frontier_recipe",
    "load_compressed",
    "load_model",
    "measure_sensitivity",
    "plan_once",
    "prune_recipe",
    "quantize_recipe",
    "target_name",
]
