"""``lmcompress quantize``: quantize one trained model, without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmcompress.cli.options import (
    QUANTIZERS,
    ROUNDINGS,
    CalibrationRows,
    DataFolder,
    DryRun,
    Format,
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
    TextColumns,
    TrainedModel,
)
from lmcompress.errors import LmcompressError

if TYPE_CHECKING:
    from lmcompress.recipes.parts.quantization import StageQuantization

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
ByToken = Annotated[
    bool,
    typer.Option(
        "--by-token",
        help="Compute the range of activations for each token instead of the whole batch: slower, but the answer to a "
        "text is the same whatever it is batched with.",
    ),
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
OptionalTask = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="Task of the model, as for evaluate. Without one, as for encoders without a head, the model is quantized "
        "and not measured; --data is then a file of texts to calibrate on.",
    ),
]
Leave = Annotated[
    list[str] | None,
    typer.Option("--leave", help="Path of a module to keep dense, with * as wildcard; may be given several times."),
]


def quantize(
    model: TrainedModel,
    output: Output,
    task: OptionalTask = None,
    data: DataFolder = None,
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    bits: Bits = "8",
    embedding_bits: EmbeddingBits = None,
    activations: Activations = "8",
    static: Static = False,
    by_token: ByToken = False,
    attention: Attention = False,
    method: Rounding = "rtn",
    quantizer: Quantizer = "mse",
    granularity: Granularity = "row",
    leave: Leave = None,
    rows: CalibrationRows = 64,
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
    """Quantize a trained model without training, and pack it: a small file, and integer matmuls.

    The model is measured before and after, and saved only if the reloaded model's outputs match the packed one's. At 8
    bits little accuracy is lost; at 4 try --method gptq or --activations none, and below that train the quantized
    model: lmcompress recipes show quickstart-quantize.

    Examples:

      lmcompress quantize runs/quickstart/teacher --task embedded/clinc150 --bits 8 --out runs/int8

      lmcompress quantize my-model --task reviews.csv --bits 4 --method gptq --activations none -o small

      lmcompress quantize my-model --data reviews.csv -o without-measuring
    """
    from lmcompress.cli.making import compress
    from lmcompress.cli.values import evaluation_spec, messages_name_options, task_spec
    from lmcompress.recipes.single import quantize_recipe

    ranges = _ranges(static, by_token, activations)
    with messages_name_options():
        widths = {"bits": bits, "embedding_bits": embedding_bits or bits, "quantizer": quantizer}
        found = _quantization(widths, granularity, ranges, attention=attention, leave=leave, rows=rows, method=method)
        if task is None:
            only = {"--label-column": label_column, "--limit": limit, "--metric": metric, "--batch": batch}
            _refuse_without_task(only | {"--report": report, "--dry-run": dry_run or None})
            saving = {"save": save, "storage": storage, "seed": seed, "overwrite": overwrite}
            _quantize_without_task(model, output, found, data, text_column, max_length=max_length, **saving)
            return
        recipe = quantize_recipe(
            model,
            task_spec(task, data, text_column, label_column, limit, max_length),
            found,
            save=save,
            storage=storage,
            evaluation=evaluation_spec(split, metric, batch),
            seed=seed,
        )
        compress(recipe, output, report=report, dry_run=dry_run, overwrite=overwrite)


def _quantization(
    widths: Mapping[str, str],
    granularity: str,
    ranges: dict[str, Any] | None,
    *,
    leave: list[str] | None,
    rows: int,
    **more: Any,
) -> StageQuantization:
    from lmcompress.cli.values import validated
    from lmcompress.recipes.parts.quantization import StageQuantization

    values = {
        "weights": _scheme(widths["quantizer"], widths["bits"], granularity),
        "embeddings": _scheme(widths["quantizer"], widths["embedding_bits"], "row"),
        "activations": ranges,
        "rules": tuple({"modules": pattern, "weights": None} for pattern in leave or ()),
        "calibration_rows": rows,
    }
    return validated(StageQuantization, values | more)


def _quantize_without_task(
    model: str,
    output: Path,
    quantization: StageQuantization,
    data: str | None,
    text_column: list[str] | None,
    **options: Any,
) -> None:
    from lmcompress.cli.making import print_alone
    from lmcompress.recipes.without_task import quantize_without_task, read_texts

    texts = read_texts(data, text_column) if data is not None else []
    print_alone(quantize_without_task(model, output, quantization, texts=texts, **options), output)


def _refuse_without_task(options: Mapping[str, Any]) -> None:
    if given := [name for name, value in options.items() if value is not None]:
        raise LmcompressError(f"{', '.join(given)}: for models that are measured on a task; give --task, or drop it")


def _ranges(static: bool, by_token: bool, activations: str) -> dict[str, Any] | None:
    if static and activations == "none":
        raise LmcompressError("--static is of the activations, which --activations none leaves as they are: drop one")
    if by_token and (static or activations == "none"):
        other = "--static calibrates" if static else "--activations none does not quantize"
        raise LmcompressError(f"--by-token is of ranges computed per input, which {other}: drop one")
    from lmcompress.cli.values import number_or_word

    ranges = {"bits": number_or_word(activations), "range": "static" if static else "dynamic"}
    return None if activations == "none" else ranges | ({"granularity": "token"} if by_token else {})


def _scheme(quantizer: str, width: str, granularity: str) -> dict[str, Any] | None:
    from lmcompress.cli.values import number_or_word

    values = {"quantizer": quantizer, "bits": number_or_word(width), "granularity": number_or_word(granularity)}
    return None if width == "none" else values
