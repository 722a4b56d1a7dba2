"""Options that several verbs share, and the names listed in their help.

The names are written out here so that help does not import what they name; a test compares them with the registries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CRITERIA = (
    "fisher",
    "taylor_gates",
    "taylor_weights",
    "movement",
    "wanda",
    "apoz",
    "mean_activation",
    "activation_entropy",
    "attention_entropy",
    "block_influence",
    "l1",
    "l2",
    "random",
)
DEFAULT_CRITERION = "fisher"
PARTS = ("heads", "neurons", "attention", "ffn", "layers", "hidden")
RANKINGS = ("global", "per_layer", "isomorphic", "relative")
REPAIRS = ("none", "bias", "least_squares", "least_squares_in_order")
LABELS = ("given", "self")
ROUNDINGS = ("rtn", "gptq", "awq")
QUANTIZERS = ("mse", "minmax", "percentile", "asymmetric_mse", "asymmetric_minmax", "laq", "twn", "tbt", "binary")
FORMATS = ("native", "vanilla", "self_loading")
STORAGES = ("plain", "auto", "zstd", "huffman")
EXPORT_TASKS = (
    "sequence_classification",
    "token_classification",
    "question_answering",
    "masked_lm",
    "text_generation_with_past",
    "text_generation",
    "embeddings",
)
METRICS = (
    "accuracy",
    "f1",
    "f1_macro",
    "f1_micro",
    "matthews_correlation",
    "pearson",
    "spearmanr",
    "mse",
    "exact_match",
    "entity_f1",
    "token_perplexity",
    "word_perplexity",
    "bits_per_byte",
)

AnyModel = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a model, or its name on the Hub.")]
TrainedModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a model trained for the task, or its name on the Hub.")
]
TaskName = Annotated[
    str,
    typer.Option(
        "--task", help="Task of the model: glue/<task>, embedded/<name>, a folder, a file, or a data set on the Hub."
    ),
]
DataFolder = Annotated[
    str | None,
    typer.Option("--data", help="Folder or file with the rows; for GLUE the folder that holds glue/<task>/."),
]
TextColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--text-column", help="Column that holds the text; twice for pairs. Default: the usual names, such as text."
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option("--label-column", help="Column that holds the label. Default: the usual names, such as label."),
]
MetricNames = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        help="Metric to measure; may be given several times, the main one first. Default: those of the task. Known are "
        f"{', '.join(METRICS)}.",
    ),
]
SplitName = Annotated[str, typer.Option("--split", help="Split to measure quality on.")]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        help="Maximum length of an input in tokens. Default: 128, or what the model has positions for.",
    ),
]
RowLimit = Annotated[
    int | None,
    typer.Option("--limit", help="Maximum number of rows of each split; for language models, of blocks of tokens."),
]
LatencyBatches = Annotated[
    list[int] | None,
    typer.Option("--batch", help="Batch size to measure latency at; may be given several times. Default: 1 and 32."),
]
CalibrationRows = Annotated[int, typer.Option("--rows", help="Number of training rows to calibrate on.")]
CriterionName = Annotated[
    str,
    typer.Option(
        "--criterion",
        help=f"Measure of a unit's importance: {', '.join(CRITERIA)}; or module:attribute of a custom criterion.",
    ),
]
PartNames = Annotated[
    str, typer.Option("--parts", help=f"Kinds of units that may be pruned, comma-separated: {', '.join(PARTS)}.")
]
LabelSource = Annotated[
    str,
    typer.Option(
        "--labels", help="Labels of the calibration rows: given (the task's) or self (the model's predictions)."
    ),
]
Format = Annotated[str, typer.Option("--format", help=f"Format of the checkpoint: {', '.join(FORMATS)}.")]
StorageName = Annotated[
    str,
    typer.Option(
        "--storage",
        help="Storage of the weights: plain; or auto, zstd or huffman for a smaller, losslessly coded file.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all random choices.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values to change in the recipe, each as key.path=value. training.x=… is for all stages, "
        "stages.NAME.training.x=… for one."
    ),
]
ReportFolder = Annotated[Path | None, typer.Option("--report", help="Folder for a report with plots.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, and stop.")]
OverwriteStages = Annotated[
    bool, typer.Option("--overwrite", help="Replace stages in the folder that were made from something else.")
]
OverwriteModel = Annotated[bool, typer.Option("--overwrite", help="Replace a model in the folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
