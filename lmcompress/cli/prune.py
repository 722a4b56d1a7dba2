"""``lmcompress prune``: structured pruning of one trained model, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmcompress.cli.options import (
    DEFAULT_CRITERION,
    RANKINGS,
    REPAIRS,
    CalibrationRows,
    CriterionName,
    DataFolder,
    DryRun,
    Format,
    LabelColumn,
    LabelSource,
    LatencyBatches,
    MaxLength,
    MetricNames,
    OverwriteModel,
    PartNames,
    ReportFolder,
    RowLimit,
    Seed,
    SplitName,
    StorageName,
    TaskName,
    TextColumns,
    TrainedModel,
)

if TYPE_CHECKING:
    from lmcompress.recipes.parts.pruning import StagePruning

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the pruned model.")]
Sparsity = Annotated[
    float | None, typer.Option("--sparsity", help="Target: share of the blocks' parameters to remove, such as 0.5.")
]
Parameters = Annotated[
    int | None, typer.Option("--parameters", help="Target: maximum number of parameters of the whole model.")
]
FlopsShare = Annotated[
    float | None, typer.Option("--flops-share", help="Target: maximum share of the blocks' FLOPs to keep.")
]
LatencyShare = Annotated[
    float | None,
    typer.Option(
        "--latency-share", help="Target: maximum share of the latency to keep, as measured here (latency.json)."
    ),
]
LatencyMs = Annotated[
    float | None, typer.Option("--latency-ms", help="Target: maximum latency of a batch in milliseconds.")
]
ShapeWords = Annotated[
    str | None,
    typer.Option(
        "--shape", help="Target: the shape itself, layers=6,heads=8,ffn=1024,hidden=512; heads=8/4/0 per block."
    ),
]
Iterations = Annotated[
    int,
    typer.Option(
        "--iterations", help="Number of rounds, each with new scores; 8 lose less quality than 1 and take longer."
    ),
]
Ranking = Annotated[
    str,
    typer.Option(
        "--ranking",
        help=f"Comparison of units: {', '.join(RANKINGS)}. global prunes blocks unevenly and loses least quality.",
    ),
]
MultipleOf = Annotated[
    int,
    typer.Option("--multiple-of", "--round-to", help="Group size of neurons and hidden dimensions, for the hardware."),
]
Uniform = Annotated[
    bool,
    typer.Option(
        "--uniform", help="Keep as many heads and neurons in every block, so that stock Transformers and vLLM load it."
    ),
]
Repair = Annotated[
    str, typer.Option("--repair", help=f"Closed-form re-fit of the remaining weights: {', '.join(REPAIRS)}.")
]
Vocabulary = Annotated[
    int | None,
    typer.Option(
        "--vocabulary",
        help="Also drop tokens that occur less often than this in the training texts; rows of other splits that are "
        "then split differently are counted.",
    ),
]


def prune(
    model: TrainedModel,
    task: TaskName,
    output: Output,
    data: DataFolder = None,
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    sparsity: Sparsity = None,
    parameters: Parameters = None,
    flops_share: FlopsShare = None,
    latency_share: LatencyShare = None,
    latency_ms: LatencyMs = None,
    shape: ShapeWords = None,
    parts: PartNames = "heads,neurons",
    criterion: CriterionName = DEFAULT_CRITERION,
    labels: LabelSource = "given",
    rows: CalibrationRows = 256,
    iterations: Iterations = 1,
    ranking: Ranking = "global",
    multiple_of: MultipleOf = 1,
    uniform: Uniform = False,
    repair: Repair = "least_squares",
    vocabulary: Vocabulary = None,
    max_length: MaxLength = None,
    limit: RowLimit = None,
    split: SplitName = "validation",
    metric: MetricNames = None,
    batch: LatencyBatches = None,
    save: Format = "native",
    storage: StorageName = "plain",
    report: ReportFolder = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    overwrite: OverwriteModel = False,
) -> None:
    """Prune heads, neurons, layers, hidden dimensions or tokens of a trained model, without training.

    The target is exactly one of --sparsity, --parameters, --flops-share, --latency-share, --latency-ms, --shape; or
    --vocabulary alone. The model is measured before and after, saved only if the outputs of the cut model match those
    of the masked one and the reloaded one matches too, and the last line says whether stock transformers can load it.

    Without training, about a third of the blocks can go, and --iterations 8 goes further than 1. To prune more,
    fine-tune the pruned model: lmcompress frontier --steps, or a recipe (lmcompress recipes show quickstart-prune).

    Examples:

      lmcompress prune runs/quickstart/teacher --task embedded/clinc150 --sparsity 0.3 -o runs/small

      lmcompress prune my-model --task reviews.csv --sparsity 0.3 --iterations 8 -o small

      lmcompress prune my-model --task reviews.csv --shape layers=1 --parts layers --criterion block_influence -o short

      lmcompress prune my-model --task reviews.csv --vocabulary 1 -o small-vocabulary
    """
    from lmcompress.cli.making import compress
    from lmcompress.cli.values import evaluation_spec, messages_name_options, shape_of, task_spec, validated
    from lmcompress.recipes.parts.vocabulary import VocabularySpec
    from lmcompress.recipes.single import prune_recipe

    amounts: dict[str, Any] = {"sparsity": sparsity, "parameters": parameters, "flops_share": flops_share}
    amounts |= {"latency_share": latency_share, "latency_ms": latency_ms}
    amounts["shape"] = None if shape is None else shape_of(shape)
    method = {"criterion": criterion, "labels": labels, "calibration_rows": rows, "ranking": ranking}
    method |= {"multiple_of": multiple_of, "uniform": uniform}
    with messages_name_options():
        recipe = prune_recipe(
            model,
            task_spec(task, data, text_column, label_column, limit, max_length),
            evaluation=evaluation_spec(split, metric, batch),
            pruning=_pruning(amounts, method, parts, iterations, repair, batch, output),
            vocabulary=None if vocabulary is None else validated(VocabularySpec, {"min_count": vocabulary}),
            save=save,
            storage=storage,
            seed=seed,
        )
        compress(recipe, output, report=report, dry_run=dry_run, overwrite=overwrite)


def _pruning(
    amounts: Mapping[str, Any],
    method: Mapping[str, Any],
    parts: str,
    iterations: int,
    repair: str,
    batch: Sequence[int] | None,
    output: Path,
) -> StagePruning | None:
    from lmcompress.cli.values import pruning_values, validated
    from lmcompress.pruning.structured.targets import Target
    from lmcompress.recipes.parts.pruning import LatencySpec, StagePruning

    given = {name: value for name, value in amounts.items() if value is not None}
    if not given:
        return None
    target = validated(Target, given)
    latency = None
    if target.kind.startswith("latency"):
        # not in the model's folder, which is replaced as a whole
        sizes = {"batch_size": (batch or [32])[-1], "table": str(output.parent / "latency.json")}
        latency = validated(LatencySpec, sizes)
    values = pruning_values(parts, iterations, repair) | dict(method)
    return validated(StagePruning, values | {"target": target, "latency": latency})
