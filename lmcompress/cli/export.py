"""``lmcompress export``: a model for ONNX Runtime, OpenVINO, as compressed-tensors or GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmcompress.cli.options import EXPORT_TASKS, AnyModel, AsJson, MaxLength, TextColumns
from lmcompress.errors import LmcompressError

if TYPE_CHECKING:
    from lmcompress.export.compressed_tensors import CompressedTensorsReport
    from lmcompress.export.gguf import GGUFReport
    from lmcompress.export.report import ExportReport

To = Annotated[str, typer.Option("--to", help="Target: onnx (ONNX Runtime), openvino, compressed-tensors or gguf.")]
Weights = Annotated[
    str,
    typer.Option("--weights", help="For gguf: auto keeps the model's codes; or f32, f16, q8_0, q4_0, q4_1 for all."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "--out",
        "-o",
        help="Folder to write. Default: one in the current folder, named MODEL's last part, - and the target: "
        "student-onnx.",
    ),
]
ExportTask = Annotated[
    str | None,
    typer.Option(
        "--task",
        help=f"What the graph computes: {', '.join(EXPORT_TASKS)}. Default: what the model's class is for; embeddings "
        "takes any encoder without its head.",
    ),
]
Pooling = Annotated[
    str | None,
    typer.Option(
        "--pooling", help="Pooling of embeddings: mean, cls or max. Default: the vectors of tokens are not pooled."
    ),
]
Normalize = Annotated[bool, typer.Option("--normalize", help="Scale pooled embeddings to length 1.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Real texts to calibrate ranges on and to check the export with: a file, glue/<task> or embedded/<name>. "
        "Default: none; the check takes random tokens.",
    ),
]
Rows = Annotated[int, typer.Option("--rows", help="Number of texts to take.")]
Activations = Annotated[
    str,
    typer.Option(
        "--activations",
        help="Ranges of activations in the graph: auto (as in the model, but static for OpenVINO), static, dynamic, or "
        "none to quantize weights only.",
    ),
]
Stateful = Annotated[
    bool,
    typer.Option(
        help="Let OpenVINO keep the keys and values of a language model between calls; otherwise they are inputs and "
        "outputs, as they always are for ONNX Runtime."
    ),
]
Opset = Annotated[int | None, typer.Option("--opset", help="Version of ONNX's operators. Default: 21.")]
Tolerance = Annotated[
    float | None,
    typer.Option("--tolerance", help="Largest relative error of outputs that is accepted. Default: 0.1."),
]
Agreement = Annotated[
    float | None,
    typer.Option("--agreement", help="Smallest share of equal answers that is accepted. Default: any."),
]


def export(
    model: AnyModel,
    to: To,
    output: Output = None,
    task: ExportTask = None,
    pooling: Pooling = None,
    normalize: Normalize = False,
    data: Data = None,
    text_column: TextColumns = None,
    rows: Rows = 64,
    max_length: MaxLength = None,
    activations: Activations = "auto",
    weights: Weights = "auto",
    stateful: Stateful = True,
    opset: Opset = None,
    tolerance: Tolerance = None,
    agreement: Agreement = None,
    as_json: AsJson = False,
) -> None:
    """Export a model for ONNX Runtime, OpenVINO, as compressed-tensors or GGUF, pruned and quantized as it is: the same
    codes, scales and ranges.

    The folder stands alone: graph, config, tokenizer, and a card with code that needs neither lmcompress nor torch. It
    is written only if the graph, loaded by its runtime, gives the outputs of the model; then the table says how many
    matmuls the runtime computes in integers. OpenVINO does that for static ranges only: give --data to calibrate those
    of a model whose ranges are dynamic. compressed-tensors is a stock checkpoint of 4- and 8-bit weights for
    Transformers and vLLM, and takes --activations (auto or none) and --tolerance. gguf is one file for llama.cpp, and
    takes --weights too.

    Examples:

      lmcompress export runs/quickstart/student --to onnx

      lmcompress export runs/quickstart/student --to openvino --data reviews.csv -o runs/student-openvino
    """
    from transformers import AutoTokenizer

    from lmcompress.cli.values import messages_name_options, validated
    from lmcompress.export import ExportConfig, export_model
    from lmcompress.export.optional import check_exporter
    from lmcompress.families.positions import positions_of
    from lmcompress.recipes.lookup import has_tokenizer
    from lmcompress.recipes.one_model import load_model
    from lmcompress.recipes.progress import quiet_libraries
    from lmcompress.recipes.texts import text_batches

    given = {"to": to, "task": task, "pooling": pooling, "normalize": normalize, "activations": activations}
    given["weights"] = weights
    limits = {"stateful": stateful, "opset": opset, "tolerance": tolerance, "agreement": agreement}
    with messages_name_options(), quiet_libraries():
        config = validated(ExportConfig, given | limits)
        check_exporter(config.to)
        loaded = load_model(model)
        tokenizer = AutoTokenizer.from_pretrained(model) if has_tokenizer(model) else None
        batches = None
        if data is not None:
            if tokenizer is None:
                raise LmcompressError(f"{model} holds no tokenizer to read --data with; save the model's there")
            length = min(max_length or 128, positions_of(loaded.config))
            batches = text_batches(data, tokenizer, rows=rows, max_length=length, text_columns=text_column)
        folder = output or Path(f"{Path(model).name or 'model'}-{to}")
        report = export_model(loaded, folder, config, batches=batches, tokenizer=tokenizer)
    _print(report, as_json)


def _print(report: ExportReport | CompressedTensorsReport | GGUFReport, as_json: bool) -> None:
    import json

    from lmcompress.cli.console import output_console, print_notes

    if as_json:
        typer.echo(json.dumps({"path": str(report.path)} | report.as_dict(), indent=2))
        return
    console = output_console()
    console.print(report)
    print_notes(console, report.notes)
    console.print(f"{report.path}/README.md has the code that runs it", highlight=False, soft_wrap=True)
