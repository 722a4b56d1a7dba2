"""``lmcompress frontier``: one model pruned to several targets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmcompress.cli.options import (
    DEFAULT_CRITERION,
    REPAIRS,
    CalibrationRows,
    CriterionName,
    DataFolder,
    DryRun,
    LabelColumn,
    LabelSource,
    MaxLength,
    MetricNames,
    OverwriteStages,
    PartNames,
    RowLimit,
    Seed,
    SplitName,
    TaskName,
    TextColumns,
    TrainedModel,
)
from lmcompress.errors import LmcompressError

Sparsities = Annotated[
    list[float] | None,
    typer.Option(
        "--sparsity", help="Share of the blocks' parameters to remove; give several. Default: 0.25, 0.5 and 0.75."
    ),
]
LatencyShares = Annotated[
    list[float] | None,
    typer.Option("--latency-share", help="Share of the latency to keep, instead of --sparsity; give several."),
]
Steps = Annotated[
    int,
    typer.Option("--steps", help="Number of recovery steps for each target, with the dense model as teacher."),
]
LearningRate = Annotated[float, typer.Option("--learning-rate", help="Learning rate of the recovery.")]
Iterations = Annotated[int, typer.Option("--iterations", help="Number of rounds of each pruning.")]
Repair = Annotated[
    str, typer.Option("--repair", help=f"Closed-form re-fit of the remaining weights: {', '.join(REPAIRS)}.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")]


def frontier(
    model: TrainedModel,
    task: TaskName,
    data: DataFolder = None,
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    sparsity: Sparsities = None,
    latency_share: LatencyShares = None,
    steps: Steps = 0,
    learning_rate: LearningRate = 5e-5,
    parts: PartNames = "heads,neurons",
    criterion: CriterionName = DEFAULT_CRITERION,
    labels: LabelSource = "given",
    rows: CalibrationRows = 256,
    iterations: Iterations = 1,
    repair: Repair = "least_squares",
    max_length: MaxLength = None,
    limit: RowLimit = None,
    split: SplitName = "validation",
    metric: MetricNames = None,
    seed: Seed = 0,
    output: Output = Path("runs/frontier"),
    dry_run: DryRun = False,
    overwrite: OverwriteStages = False,
) -> None:
    """Prune one model to several targets, fine-tune each briefly, and plot quality against size and latency.

    One run, with a report and its plots; the same command resumes it after an interruption. Its recipe.yaml is
    in the folder, ready to be edited and run.

    Examples:

      lmcompress frontier runs/quickstart/teacher --task embedded/clinc150 --sparsity 0.3 --sparsity 0.6 --steps 200

      lmcompress frontier my-model --task reviews.csv --sparsity 0.2 --sparsity 0.4 --iterations 4 -o runs/mine
    """
    if sparsity and latency_share:
        raise LmcompressError("give --sparsity or --latency-share, not both: one axis is enough for a frontier")
    from lmcompress.cli.making import run_recipe
    from lmcompress.cli.values import evaluation_spec, messages_name_options, pruning_values, task_spec, validated
    from lmcompress.pruning.structured.config import PruningConfig
    from lmcompress.pruning.structured.targets import Target
    from lmcompress.recipes.single import frontier_recipe

    kind, amounts = ("latency_share", latency_share) if latency_share else ("sparsity", sparsity or [0.25, 0.5, 0.75])
    with messages_name_options():
        targets = [validated(Target, {kind: amount}) for amount in amounts]
        values = pruning_values(parts, iterations, repair)
        if steps and iterations > 1:
            # the second half of the steps trains the fully pruned model
            values["schedule"]["end"] = 0.5
        method = {"criterion": criterion, "labels": labels, "calibration_rows": rows}
        recipe = frontier_recipe(
            model,
            task_spec(task, data, text_column, label_column, limit, max_length),
            targets,
            pruning=validated(PruningConfig, values | method | {"target": targets[0]}),
            steps=steps,
            learning_rate=learning_rate,
            evaluation=evaluation_spec(split, metric),
            seed=seed,
        )
        run_recipe(recipe, output, dry_run=dry_run, overwrite=overwrite)
