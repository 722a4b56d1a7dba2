"""``lmcompress quantize``: quantize one trained model, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmcompress.cli.options import (
    QUANTIZERS,
    ROUNDINGS,
    CalibrationRows,
    DataFolder,
    DryRun,
    LabelColumn,
    LatencyBatches,
    MaxLength,
    MetricNames,
    OverwriteModel,
    ReportFolder,
    RowLimit,
    Seed,
    SplitName,
    StorageName,
    TaskName,
    TextColumns,
    TrainedModel,
)
from lmcompress.errors import LmcompressError

Output = Annotated[Path, typer.Option("--output", "--out", "-o", help="Folder of the quantized model.")]
Bits = Annotated[str, typer.Option("--bits", help="Bit-width of the weights: 8, 4, 3, 2 or ternary.")]
EmbeddingBits = Annotated[
    str | None,
    typer.Option(
        "--embedding-bits", help="Bit-width of the token embeddings; none keeps them dense. Default: that of --bits."
    ),
]
Activations = Annotated[
    str,
    typer.Option("--activations", help="Bit-width of the activations: 8, 4, or none to keep them in floating point."),
]
Static = Annotated[
    bool,
    typer.Option("--static", help="Calibrate the ranges of activations once instead of computing them per input."),
]
Attention = Annotated[
    bool, typer.Option("--attention", help="Also quantize queries, keys, values and attention probabilities.")
]
Rounding = Annotated[
    str,
    typer.Option(
        "--method",
        help=f"Rounding method: {', '.join(ROUNDINGS)}. rtn rounds to nearest, the others calibrate.",
    ),
]
Quantizer = Annotated[
    str, typer.Option("--quantizer", help=f"Method that sets the scales of the weights: {', '.join(QUANTIZERS)}.")
]
Granularity = Annotated[
    str, typer.Option("--granularity", help="Weights that share a scale: row, tensor, or a group size such as 64.")
]
Leave = Annotated[
    list[str] | None,
    typer.Option("--leave", help="Path of a module to keep dense, with * as wildcard; may be given several times."),
]


def quantize(
    model: TrainedModel,
    task: TaskName,
    output: Output,
    data: DataFolder = None,
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    bits: Bits = "8",
    embedding_bits: EmbeddingBits = None,
    activations: Activations = "8",
    static: Static = False,
    attention: Attention = False,
    method: Rounding = "rtn",
    quantizer: Quantizer = "mse",
    granularity: Granularity = "row",
    leave: Leave = None,
    rows: CalibrationRows = 64,
    max_length: MaxLength = 128,
    limit: RowLimit = None,
    split: SplitName = "validation",
    metric: MetricNames = None,
    batch: LatencyBatches = None,
    storage: StorageName = "plain",
    report: ReportFolder = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    overwrite: OverwriteModel = False,
) -> None:
    """Quantize a trained model without training, and pack it: a small file, and integer matmuls.

    The model is measured before and after, and saved only if the reloaded model's outputs match the packed one's. At 8
    bits little accuracy is lost; at 4 try --method gptq or --activations none, and below that train the quantized
    model: lmcompress recipes show quickstart-quantize.

    Examples:

      lmcompress quantize runs/quickstart/teacher --task embedded/clinc150 --bits 8 --out runs/int8

      lmcompress quantize my-model --task reviews.csv --bits 4 --method gptq --activations none -o small
    """
    if static and activations == "none":
        raise LmcompressError("--static is of the activations, which --activations none leaves as they are: drop one")
    from lmcompress.cli.making import compress
    from lmcompress.cli.values import evaluation_spec, messages_name_options, number_or_word, task_spec, validated
    from lmcompress.recipes.parts.quantization import StageQuantization
    from lmcompress.recipes.single import quantize_recipe

    ranges = {"bits": number_or_word(activations), "range": "static" if static else "dynamic"}
    with messages_name_options():
        quantization = validated(
            StageQuantization,
            {
                "weights": _scheme(quantizer, bits, granularity),
                "embeddings": _scheme(quantizer, embedding_bits or bits, "row"),
                "activations": None if activations == "none" else ranges,
                "attention": attention,
                "rules": tuple({"modules": pattern, "weights": None} for pattern in leave or ()),
                "calibration_rows": rows,
                "method": method,
            },
        )
        recipe = quantize_recipe(
            model,
            task_spec(task, data, text_column, label_column, limit, max_length),
            quantization,
            storage=storage,
            evaluation=evaluation_spec(split, metric, batch),
            seed=seed,
        )
        compress(recipe, output, report=report, dry_run=dry_run, overwrite=overwrite)


def _scheme(quantizer: str, width: str, granularity: str) -> dict[str, Any] | None:
    from lmcompress.cli.values import number_or_word

    values = {"quantizer": quantizer, "bits": number_or_word(width), "granularity": number_or_word(granularity)}
    return None if width == "none" else values
