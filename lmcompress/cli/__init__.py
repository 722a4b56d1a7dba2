"""The command line: everything that a recipe can do, and a few looks at models that are already there."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import click
import torch
import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from lmcompress.data import TaskKind
from lmcompress.entropy_coding import StreamInfo
from lmcompress.errors import LmcompressError, nearest
from lmcompress.evaluation import (
    compare_latency,
    evaluate_classifier,
    parameter_count,
    perplexity,
    size_on_disk,
    stream_table,
    weight_bytes,
)
from lmcompress.evaluation import tensor_table as tensors_of
from lmcompress.evaluation import verdict as verdicts
from lmcompress.families import anatomy_of
from lmcompress.kernels.dispatch import ladder
from lmcompress.model import REPORT_FILE, CompressedModel, library_version, push_folder
from lmcompress.pruning.structured.config import DEFAULT_CRITERION, PruningConfig
from lmcompress.pruning.structured.targets import Shape, Target
from lmcompress.recipes import Recipe, builtin_recipes, load_recipe, plan, recipe_schema
from lmcompress.recipes import run as run_recipe
from lmcompress.recipes.building import auto_class
from lmcompress.recipes.materials import Materials, load_tokenizer, read_task, text_of
from lmcompress.recipes.planning import shape_in_words
from lmcompress.recipes.progress import quiet_libraries
from lmcompress.recipes.schema import (
    EvaluationSpec,
    LatencySpec,
    Stage,
    StagePruning,
    StageQuantization,
    TaskSpec,
    VocabularySpec,
)
from lmcompress.recipes.single import (
    check_trained_for,
    compress_once,
    frontier_recipe,
    measure_sensitivity,
    plan_once,
    prune_recipe,
    quantize_recipe,
)
from lmcompress.reporting import (
    importance_map,
    latency_table,
    print_plan,
    results_table,
    sensitivity_curves,
    sensitivity_table,
    shape_table,
    write_report,
)

app = typer.Typer(
    name="lmcompress",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Make transformer language models small and fast without losing what they know.\n\n"
    "Start here:  [bold]lmcompress quickstart[/]  trains a teacher, distils a student from it and compares them, "
    "in some minutes on a CPU.",
)
recipes_app = typer.Typer(
    no_args_is_help=True, help="Look at the recipes that come with lmcompress.", rich_markup_mode="rich"
)
app.add_typer(recipes_app, name="recipes")

QUICKSTARTS = {"classification": "quickstart", "lm": "quickstart-lm"}

_T = TypeVar("_T", bound=BaseModel)
_debug = False


def main() -> None:
    """The entry point of ``lmcompress``."""
    sys.exit(run_app(sys.argv[1:]))


def run_app(arguments: list[str]) -> int:
    """Run a command line; errors of lmcompress become one message and exit code 2.

    Args:
        arguments: without the program's name.

    Returns:
        The exit code.
    """
    global _debug
    _debug = "--debug" in arguments
    try:
        code = app(arguments, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _errors().print("stopped; the same command goes on from the last checkpoint", style="yellow")
        return 130
    except LmcompressError as error:
        if _debug:
            raise
        _errors().print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    return code if isinstance(code, int) else 0


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.", is_eager=True)] = False,
) -> None:
    del debug
    if version:
        typer.echo(f"lmcompress {library_version()}")
        raise typer.Exit


@app.command(no_args_is_help=True)
def run(
    recipe: Annotated[
        str, typer.Argument(help="YAML file, or the name of a built-in recipe (lmcompress recipes list).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key.path=value each. training.x=… is for all stages, stages.NAME.training.x=… for one."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run; default: runs/<name>.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; train nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train stages anew that a different recipe left in the folder.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Go on from the checkpoints of an interrupted stage, or begin it anew."
        ),
    ] = True,
) -> None:
    """Run a recipe: train its stages, measure all models side by side, write one self-contained folder.

    The same command again keeps the stages that are finished and goes on where it was interrupted.

    Examples:

      lmcompress run quickstart --dry-run

      lmcompress run distil-glue task.name=glue/mrpc model=bert-base-uncased

      lmcompress run my.yaml training.learning_rate=1e-4 stages.student.training.num_train_epochs=5 -o runs/second
    """
    _run(load_recipe(recipe, overrides or []), output, dry_run=dry_run, overwrite=overwrite, resume=resume)


@app.command()
def quickstart(
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value each, as for run.")] = None,
    task: Annotated[
        str, typer.Option("--task", help="classification (CLINC150) or lm (inaugural addresses).")
    ] = "classification",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path("runs/quickstart"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; train nothing.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train stages anew that a different recipe left.")
    ] = False,
) -> None:
    """Train a small teacher on the spot, distil a student from it, and compare them; some minutes on a CPU, no network.

    The data come with the package. It is the built-in recipe [bold]quickstart[/] (or quickstart-lm): lmcompress
    recipes show quickstart

    Examples:

      lmcompress quickstart

      lmcompress quickstart --task lm --output runs/lm
    """
    if task not in QUICKSTARTS:
        raise LmcompressError(f"no quickstart for the task {task!r}{nearest(task, QUICKSTARTS)}")
    if task == "lm" and output == Path("runs/quickstart"):
        output = Path("runs/quickstart-lm")
    _run(load_recipe(QUICKSTARTS[task], overrides or []), output, dry_run=dry_run, overwrite=overwrite, resume=True)


@app.command(no_args_is_help=True)
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a model, or its name on the Hub.")],
    task: Annotated[str, typer.Option("--task", help="glue/<task>, embedded/<name>, a folder, or a Hub data set.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Folder or file with the rows; for GLUE what holds glue/<task>/.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Which rows.")] = "validation",
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Tokens of a row, or of a window for perplexity; default: 128 at most."),
    ] = None,
    stride: Annotated[int | None, typer.Option("--stride", help="Perplexity: tokens between windows.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="At most so many rows.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows of a batch.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model on a task: the GLUE metrics, or perplexity.

    Examples:

      lmcompress evaluate runs/quickstart/student --task embedded/clinc150 --split test

      lmcompress evaluate my-model --task glue/sst2 --data ../data
    """
    with quiet_libraries():
        rows = read_task(TaskSpec(name=task, data=data, limit=limit))
        if split not in rows.splits():
            raise LmcompressError(f"no split {split!r}{nearest(split, rows.splits())}")
        if (column := rows.task.label_column) is not None and column not in rows.splits()[split].column_names:
            raise LmcompressError(f"split {split!r} of {task} has no labels: it can be predicted, not scored")
        loaded = _load(model, auto_class(rows.task))
        tokenizer = load_tokenizer(model, rows.task)
        length = max_length or min(128, tokenizer.model_max_length)
        if rows.task.kind is TaskKind.CAUSAL_LM:
            found = perplexity(
                loaded, tokenizer, text_of(rows, split), stride=stride, max_length=length, batch_size=batch_size
            )
            metrics = {
                name: float(getattr(found, name)) for name in ("token_perplexity", "word_perplexity", "bits_per_byte")
            }
        else:
            check_trained_for(loaded.config, rows.task, model)
            # the runner's way from rows to batches, for one model
            spec = TaskSpec(name=task, data=data, max_length=length, limit=limit)
            recipe = Recipe(
                name="evaluate", model=model, task=spec, stages=(Stage(name="none"),), evaluation=EvaluationSpec()
            )
            materials = Materials(recipe, rows, tokenizer)
            metrics = evaluate_classifier(
                loaded,
                materials.rows().splits()[split],
                materials.collator(),
                rows.task.kind.value,
                rows.task.metrics,
                batch_size,
            )
    if as_json:
        typer.echo(
            json.dumps(
                {"model": model, "task": task, "split": split, "metrics": metrics, "notes": rows.notes}, indent=2
            )
        )
        return
    table = Table(title=f"{model} on {rows.task.name}, {split} ({rows.splits()[split].num_rows:,} rows)")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    _console().print(table)
    for note in rows.notes:
        _console().print(f"note: {note}", highlight=False)


@app.command(no_args_is_help=True)
def benchmark(
    model: Annotated[str, typer.Argument(help="Folder of a model, or its name on the Hub.")],
    against: Annotated[
        str | None, typer.Option("--against", help="A second model; the first is compared with it.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Batch size; may be given several times. Default: 1 and 32.")
    ] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens of a row.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed calls of each model.")] = 20,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads of torch; default: as they are.")] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Time greedy generation of 32 tokens instead of one pass.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time a model, alone or beside another one in the same process.

    A model is called faster only where the quartiles of the two do not overlap.

    Examples:

      lmcompress benchmark runs/quickstart/student --against runs/quickstart/teacher --batch 1 --batch 32
    """
    with quiet_libraries():
        names = [name for name in (against, model) if name is not None]
        if len(set(names)) < len(names):
            raise LmcompressError(f"{model} cannot be compared with itself; name another model with --against")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        models = {name: _load(name).to(device) for name in names}
        # the shortest positions bound the length that all can take
        limit = min(int(getattr(m.config, "max_position_embeddings", length)) for m in models.values())
        measured = compare_latency(
            models,
            batch_sizes=batch or [1, 32],
            sequence_length=min(length, limit - (32 if generate else 0)),
            repeats=repeats,
            threads=threads,
            mode="generate" if generate else "forward",
        )
    rows = [{**vars(row), "verdict": words} for row, words in zip(measured, verdicts(measured), strict=True)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    _console().print(latency_table(rows))
    for name, loaded in models.items():
        weight = f", {size_on_disk(name).total_bytes / 1e6:.2f} MB on disk" if Path(name).is_dir() else ""
        _console().print(f"{name}: {parameter_count(loaded):,} parameters{weight}", highlight=False)


@app.command(no_args_is_help=True)
def inspect(
    model: Annotated[str, typer.Argument(help="Folder of a model, or its name on the Hub.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its bytes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model is made of: heads and widths of each block, tensors and their bytes, codes and scales of
    packed weights, bits per number of entropy-coded ones, where it comes from, how it can be saved, what was checked.

    Examples:

      lmcompress inspect runs/quickstart/student --tensors
    """
    with quiet_libraries():
        compressed = CompressedModel.from_pretrained(model) if _exists(model) else _missing(model)
        report = compressed.report()
        folder = Path(model) if Path(model).is_dir() else None
        entries = tensors_of(folder) if folder else []
        size = size_on_disk(folder) if folder else None
        saved = (
            json.loads((folder / REPORT_FILE).read_text("utf-8")) if folder and (folder / REPORT_FILE).is_file() else {}
        )
        streams = stream_table(folder) if folder else {}
    by_part = _bytes_by_part(compressed, entries)
    packed = _packing(compressed)
    if as_json:
        listed = [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.num_bytes} for t in entries]
        files = size.by_file if size else {}
        more = {"files": files, "bytes_by_part": by_part, "packed": packed, "tensors": listed, "saved": saved}
        more["streams"] = {name: vars(info) for name, info in streams.items()}
        typer.echo(json.dumps(report | more, indent=2))
        return
    console = _console()
    console.print(f"[bold]{model}[/]: {report['architecture']}, {shape_in_words(compressed)}", highlight=False)
    console.print(f"{report['parameters']:,} parameters", highlight=False)
    console.print(shape_table([{"name": "heads + neurons", "blocks": report["blocks"]}]))
    for sublayer, what in (("heads", "attention"), ("ffn", "feed-forward network")):
        empty = [str(b.get("source", i)) for i, b in enumerate(report["blocks"]) if not b[sublayer]]
        if empty:
            console.print(f"no {what} left in block {', '.join(empty)}: only its bias is added", highlight=False)
    table = Table(title="bytes")
    for name in ("part", "tensors", "bytes", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    total = sum(entry["bytes"] for entry in by_part.values()) or 1
    for part, entry in by_part.items():
        table.add_row(part, str(entry["tensors"]), f"{entry['bytes']:,}", f"{entry['bytes'] / total:.1%}")
    if by_part:
        console.print(table)
    if packed:
        weights = Table("tensors", "bytes", title="packed weights")
        for name in ("codes", "embedding_codes", "scales", "dense"):
            weights.add_row(name.replace("_", " "), f"{packed[name]:,}")
        console.print(weights)
        console.print(
            f"{packed['bits_per_weight']:.2f} bits for each of {packed['packed_weights']:,} packed weights, scales "
            f"included; products on this machine: {packed['kernel']}",
            highlight=False,
        )
    if streams:
        console.print(_stream_listing(streams, each=tensors))
    if size is not None:
        console.print(
            "files: " + ", ".join(f"{name} {count:,}" for name, count in size.by_file.items()), highlight=False
        )
    if tensors:
        listing = Table("tensor", "dtype", "shape", "bytes")
        for tensor in entries:
            listing.add_row(tensor.name, tensor.dtype, "×".join(map(str, tensor.shape)), f"{tensor.num_bytes:,}")
        console.print(listing)
    made = report["provenance"]
    words = [f"{key.replace('_', ' ')}: {', '.join(v) if isinstance(v, list) else v}" for key, v in made.items() if v]
    console.print("provenance: " + ("; ".join(words) or "nothing recorded"), highlight=False)
    obstacle = report["vanilla_obstacle"]
    console.print(
        "stock config: " + ("can express these shapes (save: vanilla)" if obstacle is None else str(obstacle)),
        highlight=False,
    )
    if "equivalence" in saved:
        gate = saved["equivalence"]
        console.print(
            f"checked when it was saved: reloaded on {gate['batches']} batches ({gate['inputs']}), greatest difference "
            f"{gate['max_error']:.3g}",
            highlight=False,
        )


Model = Annotated[str, typer.Argument(help="Folder of a trained model, or its name on the Hub.")]
TaskName = Annotated[
    str,
    typer.Option("--task", help="What it was trained for: glue/<task>, embedded/<name>, a folder, or a Hub data set."),
]
DataFolder = Annotated[
    str | None, typer.Option("--data", help="Folder or file with the rows; for GLUE what holds glue/<task>/.")
]
StorageName = Annotated[
    str,
    typer.Option(
        "--storage", help="plain; auto, zstd or huffman: entropy-coded streams, the same weights in a smaller file."
    ),
]
MaxLength = Annotated[int, typer.Option("--max-length", help="Tokens of a row.")]
RowLimit = Annotated[int | None, typer.Option("--limit", help="At most so many rows of each split.")]
CriterionName = Annotated[
    str,
    typer.Option(
        "--criterion",
        help="What makes a unit important. fisher, taylor_gates, taylor_weights: gradients; wanda, apoz, "
        "activation_entropy, …: activations; l1, l2: weights alone; random: a control.",
    ),
]
PartNames = Annotated[
    str,
    typer.Option("--parts", help="What may go: heads, neurons, attention, ffn, layers, hidden; with commas between."),
]
LabelSource = Annotated[
    str, typer.Option("--labels", help="given: those of the task; self: the model's own answers, for rows without.")
]
CalibrationRows = Annotated[int, typer.Option("--rows", help="Training rows for scores and repair.")]


@app.command(no_args_is_help=True, rich_help_panel="Pruning")
def prune(
    model: Model,
    task: TaskName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pruned model.")],
    data: DataFolder = None,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", help="Share of the blocks' parameters that goes: 0.5.")
    ] = None,
    parameters: Annotated[int | None, typer.Option("--parameters", help="Of the whole model, at most.")] = None,
    flops_share: Annotated[
        float | None, typer.Option("--flops-share", help="Share of the blocks' operations that stays, at most.")
    ] = None,
    latency_share: Annotated[
        float | None,
        typer.Option("--latency-share", help="Share of the time that stays, by times measured here, in latency.json."),
    ] = None,
    latency_ms: Annotated[float | None, typer.Option("--latency-ms", help="Time of a batch, at most.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape", help="The shape itself: layers=6,heads=8,ffn=1024,hidden=512; or heads=8/4/0 by block."
        ),
    ] = None,
    parts: PartNames = "heads,neurons",
    criterion: CriterionName = DEFAULT_CRITERION,
    labels: LabelSource = "given",
    rows: CalibrationRows = 256,
    iterations: Annotated[
        int,
        typer.Option("--iterations", help="Rounds, each scored anew; 8 lose less than 1, and take 8 times as long."),
    ] = 1,
    ranking: Annotated[
        str,
        typer.Option("--ranking", help="global: uneven blocks, the best; per_layer: even ones; isomorphic; relative."),
    ] = "global",
    multiple_of: Annotated[
        int, typer.Option("--multiple-of", help="Neurons and hidden dimensions go in groups, for the hardware.")
    ] = 1,
    repair: Annotated[
        str,
        typer.Option(
            "--repair", help="none, bias, least_squares or least_squares_in_order: re-fit what is left, in closed form."
        ),
    ] = "least_squares",
    vocabulary: Annotated[
        int | None,
        typer.Option(
            "--vocabulary", help="Also drop tokens that the training texts have less often than this; 1 is safe."
        ),
    ] = None,
    max_length: MaxLength = 128,
    limit: RowLimit = None,
    split: Annotated[str, typer.Option("--split", help="Rows that quality is measured on.")] = "validation",
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Batch size of latencies; several times. Default: 1 and 32.")
    ] = None,
    save: Annotated[str, typer.Option("--format", help="native, vanilla or self_loading.")] = "native",
    storage: StorageName = "plain",
    report: Annotated[
        Path | None, typer.Option("--report", help="Folder for a report with plots: which heads, which widths.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of calibration rows and drawn labels.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say the shape to expect, and stop.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a pruned model in the folder.")] = False,
) -> None:
    """Cut heads, neurons, layers, hidden dimensions or tokens out of a trained model, without training.

    How much: exactly one of --sparsity, --parameters, --flops-share, --latency-share, --latency-ms, --shape; or
    --vocabulary alone. The model is measured before and after, saved only if the cut model answers as the masked one
    did and the reloaded one as the cut one, and the last line says whether stock transformers can load it.

    Without training this goes as far as about a third of the blocks, and --iterations 8 goes further than 1. For more,
    let it recover: lmcompress frontier --steps, or a recipe (lmcompress recipes show quickstart-prune).

    Examples:

      lmcompress prune runs/quickstart/teacher --task embedded/clinc150 --sparsity 0.3 -o runs/small

      lmcompress prune my-model --task glue/sst2 --data ../data --latency-share 0.6 --iterations 8 -o fast

      lmcompress prune my-model --task my-data/ --shape layers=4 --parts layers --criterion block_influence -o short

      lmcompress prune my-model --task my-data/ --vocabulary 1 -o small-vocabulary
    """
    amounts = {
        "sparsity": sparsity,
        "parameters": parameters,
        "flops_share": flops_share,
        "latency_share": latency_share,
        "latency_ms": latency_ms,
        "shape": None if shape is None else _shape(shape),
    }
    given = {name: value for name, value in amounts.items() if value is not None}
    pruning = None
    if given:
        target = _validated(Target, given)
        latency = None
        if target.kind.startswith("latency"):
            # not in the model's folder, which is replaced as a whole
            latency = LatencySpec(batch_size=(batch or [32])[-1], table=str(output.parent / "latency.json"))
        schedule = {"kind": "iterative", "rounds": iterations} if iterations > 1 else {"kind": "one_shot"}
        both = {"heads", "neurons"} & set(_parts(parts))
        values = {
            "target": target,
            "parts": _parts(parts),
            "criterion": criterion,
            "labels": labels,
            "calibration_rows": rows,
            "schedule": schedule,
            "ranking": ranking,
            "multiple_of": multiple_of,
            "repair": repair if both else "none",
            "latency": latency,
        }
        pruning = _validated(StagePruning, values)
    evaluation = _validated(EvaluationSpec, {"splits": (split,), "latency_batches": tuple(batch or (1, 32))})
    recipe = prune_recipe(
        model,
        TaskSpec(name=task, data=data, max_length=max_length, limit=limit),
        pruning=pruning,
        vocabulary=None if vocabulary is None else _validated(VocabularySpec, {"min_count": vocabulary}),
        save=save,
        storage=storage,
        evaluation=evaluation,
        seed=seed,
    )
    _compress_once(recipe, output, report=report, dry_run=dry_run, overwrite=overwrite)


@app.command("quantize", no_args_is_help=True)
def quantize_command(
    model: Model,
    task: TaskName,
    output: Annotated[Path, typer.Option("--output", "--out", "-o", help="Folder of the quantized model.")],
    data: DataFolder = None,
    bits: Annotated[str, typer.Option("--bits", help="Of weights: 8, 4, 3, 2 or ternary.")] = "8",
    embedding_bits: Annotated[
        str | None, typer.Option("--embedding-bits", help="Of word embeddings; default: as --bits; none: dense.")
    ] = None,
    activations: Annotated[
        str, typer.Option("--activations", help="Bits of what enters a product: 8, 4, or none.")
    ] = "8",
    static: Annotated[
        bool, typer.Option("--static", help="Ranges of activations are calibrated once, not taken from each input.")
    ] = False,
    attention: Annotated[
        bool, typer.Option("--attention", help="Also quantize queries, keys, values and attention probabilities.")
    ] = False,
    method: Annotated[
        str,
        typer.Option("--method", help="rtn: round to nearest; gptq and awq use calibration rows, for 4 bits or fewer."),
    ] = "rtn",
    quantizer: Annotated[str, typer.Option("--quantizer", help="mse, minmax, asymmetric_mse, tbt, …")] = "mse",
    granularity: Annotated[
        str, typer.Option("--granularity", help="row, tensor, or so many weights to a scale: 64.")
    ] = "row",
    leave: Annotated[
        list[str] | None, typer.Option("--leave", help="A part or path that stays dense, * for any; several times.")
    ] = None,
    rows: CalibrationRows = 64,
    max_length: MaxLength = 128,
    limit: RowLimit = None,
    split: Annotated[str, typer.Option("--split", help="Rows that quality is measured on.")] = "validation",
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Batch size of latencies; several times. Default: 1 and 32.")
    ] = None,
    storage: StorageName = "plain",
    report: Annotated[Path | None, typer.Option("--report", help="Folder for a report with plots.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of calibration rows.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say the size to expect, and stop.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the folder.")] = False,
) -> None:
    """Quantize a trained model without training, and pack it: a small file, and products of whole numbers.

    The model is measured before and after, and saved only if the reloaded one answers as the packed one did. At 8 bits
    little is lost; at 4 try --method gptq or --activations none, and below that let it train: lmcompress recipes show
    quickstart-quantize.

    Examples:

      lmcompress quantize runs/quickstart/teacher --task embedded/clinc150 --bits 8 --out runs/int8

      lmcompress quantize my-gpt2 --task my-texts/ --bits 4 --method gptq --granularity 64 --activations none -o small
    """
    scheme: dict[str, Any] = {"quantizer": quantizer, "granularity": _number_or_word(granularity)}
    words = embedding_bits or bits
    values = {
        "weights": scheme | {"bits": _number_or_word(bits)},
        "embeddings": None
        if words == "none"
        else {"quantizer": quantizer, "granularity": "row", "bits": _number_or_word(words)},
        "activations": None
        if activations == "none"
        else {"bits": _number_or_word(activations), "range": "static" if static else "dynamic"},
        "attention": attention,
        "rules": tuple({"modules": pattern, "weights": None} for pattern in leave or ()),
        "calibration_rows": rows,
        "method": method,
    }
    recipe = quantize_recipe(
        model,
        TaskSpec(name=task, data=data, max_length=max_length, limit=limit),
        _validated(StageQuantization, values),
        storage=storage,
        evaluation=_validated(EvaluationSpec, {"splits": (split,), "latency_batches": tuple(batch or (1, 32))}),
        seed=seed,
    )
    _compress_once(recipe, output, report=report, dry_run=dry_run, overwrite=overwrite)


@app.command("sensitivity", no_args_is_help=True, rich_help_panel="Pruning")
def show_sensitivity(
    model: Model,
    task: TaskName,
    data: DataFolder = None,
    share: Annotated[
        list[float] | None,
        typer.Option("--share", help="Of a block's units; several times. Default: 0.25, 0.5, 0.75 and 1."),
    ] = None,
    parts: PartNames = "heads,neurons",
    criterion: CriterionName = DEFAULT_CRITERION,
    labels: LabelSource = "given",
    rows: CalibrationRows = 256,
    max_length: MaxLength = 128,
    limit: RowLimit = 1000,
    split: Annotated[str, typer.Option("--split", help="Rows that quality is measured on.")] = "validation",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for sensitivity.json, sensitivity.png, importance.png."),
    ] = None,
) -> None:
    """Which block can lose what: quality with a share of one block's heads or neurons gone, block by block.

    Nothing is cut and nothing trained: the least important units of one block at a time are masked. It also scores
    every head. One evaluation for each block, part and share: with --limit 1000 some minutes for a BERT on a CPU.

    Examples:

      lmcompress sensitivity runs/quickstart/teacher --task embedded/clinc150 --limit 500 -o runs/sensitivity
    """
    config = _validated(
        PruningConfig,
        {
            "target": Target(sparsity=0.5),
            "parts": _parts(parts),
            "criterion": criterion,
            "labels": labels,
            "calibration_rows": rows,
        },
    )
    console = _console()
    found = measure_sensitivity(
        model,
        TaskSpec(name=task, data=data, max_length=max_length, limit=limit),
        config,
        shares=tuple(share or (0.25, 0.5, 0.75, 1.0)),
        split=split,
        progress=console.is_terminal,
    )
    console.print(sensitivity_table(found))
    for note in found["notes"]:
        console.print(f"note: {note}", highlight=False)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "sensitivity.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        quality = found["metric"].replace("_", " ")
        files = [
            sensitivity_curves(
                found["rows"],
                output / "sensitivity.png",
                quality=quality,
                lower_is_better=found["lower_is_better"],
            )
        ]
        if "heads" in found["scores"]:
            files.append(
                importance_map(found["scores"]["heads"], output / "importance.png", title=f"heads by {criterion}")
            )
        console.print(f"written: {', '.join(map(str, [output / 'sensitivity.json', *files]))}", highlight=False)


@app.command(no_args_is_help=True, rich_help_panel="Pruning")
def frontier(
    model: Model,
    task: TaskName,
    data: DataFolder = None,
    sparsity: Annotated[
        list[float] | None, typer.Option("--sparsity", help="Several times. Default: 0.25, 0.5 and 0.75.")
    ] = None,
    latency_share: Annotated[
        list[float] | None, typer.Option("--latency-share", help="Instead of sparsities; several times.")
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", help="Optimizer steps of recovery for each, with the dense model as teacher.")
    ] = 0,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of the recovery.")] = 5e-5,
    parts: PartNames = "heads,neurons",
    criterion: CriterionName = DEFAULT_CRITERION,
    labels: LabelSource = "given",
    rows: CalibrationRows = 256,
    iterations: Annotated[int, typer.Option("--iterations", help="Rounds of each pruning.")] = 1,
    repair: Annotated[str, typer.Option("--repair", help="As for prune.")] = "least_squares",
    max_length: MaxLength = 128,
    limit: RowLimit = None,
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path("runs/frontier"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make stages anew that another recipe left.")] = False,
) -> None:
    """Prune one model to several targets, let each recover for a while, and draw quality against size and latency.

    One run, with a report and plots/frontier.png; the same command goes on where it was interrupted. Its recipe.yaml is
    in the folder, to be changed and run by itself.

    Examples:

      lmcompress frontier runs/quickstart/teacher --task embedded/clinc150 --sparsity 0.3 --sparsity 0.6 --steps 200

      lmcompress frontier my-model --task glue/sst2 --data ../data --latency-share 0.7 --latency-share 0.5 --steps 1000
    """
    if sparsity and latency_share:
        raise LmcompressError("give --sparsity or --latency-share, not both: one axis is enough for a frontier")
    kind, amounts = ("latency_share", latency_share) if latency_share else ("sparsity", sparsity or [0.25, 0.5, 0.75])
    targets = [_validated(Target, {kind: amount}) for amount in amounts]
    begun = {"end": 0.5} if steps else {}
    values = {
        "target": targets[0],
        "parts": _parts(parts),
        "criterion": criterion,
        "labels": labels,
        "calibration_rows": rows,
        "schedule": {"kind": "iterative", "rounds": iterations} | begun if iterations > 1 else {"kind": "one_shot"},
        "repair": repair if {"heads", "neurons"} & set(_parts(parts)) else "none",
    }
    recipe = frontier_recipe(
        model,
        TaskSpec(name=task, data=data, max_length=max_length, limit=limit),
        targets,
        pruning=_validated(PruningConfig, values),
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
    )
    _run(recipe, output, dry_run=dry_run, overwrite=overwrite, resume=True)


@app.command(no_args_is_help=True)
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, as a run wrote it.")],
    repository: Annotated[str, typer.Argument(help="user/name on the Hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="A repository made now is private.")] = False,
) -> None:
    """Upload a model with its card and report to the Hugging Face Hub (log in first: hf auth login).

    Examples:

      lmcompress push runs/quickstart/student my-name/clinc150-small
    """
    if repository.count("/") != 1:
        raise LmcompressError(f"the repository must be user/name, got {repository!r}")
    typer.echo(push_folder(folder, repository, private=private or None))


@recipes_app.command("list")
def list_recipes() -> None:
    """List the built-in recipes."""
    table = Table("recipe", "what it does", "stages")
    for name in builtin_recipes():
        recipe = load_recipe(name)
        table.add_row(name, recipe.description.strip(), ", ".join(stage.name for stage in recipe.stages))
    _console().print(table)


@recipes_app.command("show", no_args_is_help=True)
def show_recipe(name: Annotated[str, typer.Argument(help="Of lmcompress recipes list.")]) -> None:
    """Print a built-in recipe, to read or to start one's own from.

    Examples:

      lmcompress recipes show quickstart > my.yaml
    """
    library = builtin_recipes()
    if name not in library:
        raise LmcompressError(f"no built-in recipe {name!r}{nearest(name, library)}")
    console = _console()
    if console.is_terminal:
        console.print(Syntax(library[name], "yaml", background_color="default"))
    else:
        typer.echo(library[name], nl=False)


@recipes_app.command("schema")
def show_schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML.

    Examples:

      lmcompress recipes schema > recipe.schema.json
    """
    typer.echo(json.dumps(recipe_schema(), indent=2))


def _run(recipe: Recipe, output: Path | None, *, dry_run: bool, overwrite: bool, resume: bool) -> None:
    console = _console()
    if dry_run:
        with quiet_libraries():
            print_plan(plan(recipe), console)
        return
    result = run_recipe(recipe, output, overwrite=overwrite, resume=resume, console=console)
    console.print(results_table(result.report))
    for note in result.report["notes"]:
        console.print(f"note: {note}", highlight=False)
    console.print(
        f"report: {result.folder / 'report.html'} (also .md, results.json, plots)", highlight=False, soft_wrap=True
    )
    _print_how_to_load(console, result.report)


def _compress_once(recipe: Recipe, output: Path, *, report: Path | None, dry_run: bool, overwrite: bool) -> None:
    """What ``prune`` and ``quantize`` do with their recipe: plan or make the model, and say what came."""
    console = _console()
    if dry_run:
        with quiet_libraries():
            print_plan(plan_once(recipe, output, measure_times=False), console)
        return
    found = compress_once(recipe, output, overwrite=overwrite, console=console)
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        write_report(found, report)
    console.print(results_table(found))
    if any(stage.quantization is None for stage in recipe.stages):
        console.print(shape_table(found["rows"]))
    for note in found["notes"]:
        console.print(f"note: {note}", highlight=False)
    _print_how_to_load(console, found)


def _print_how_to_load(console: Console, report: dict[str, Any]) -> None:
    last = next(
        (row for row in reversed(report["rows"]) if row["role"] not in ("teacher", "control", "model")),
        report["rows"][-1],
    )
    head = auto_class_name(report["kind"])
    needed = "" if last["format"] == "vanilla" else "import lmcompress; "
    console.print(
        f"load it:\n  {needed}from transformers import {head}\n"
        f"  model = {head}.from_pretrained({str(last['folder'])!r})",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def auto_class_name(kind: str) -> str:
    """The ``AutoModelFor...`` of a kind of task, as it is imported.

    Args:
        kind: of :class:`~lmcompress.data.TaskKind`.
    """
    heads = {"causal_lm": "CausalLM", "token_classification": "TokenClassification"}
    return f"AutoModelFor{heads.get(kind, 'SequenceClassification')}"


def _number_or_word(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.replace(" ", ",").split(",") if part)


def _shape(text: str) -> Shape:
    """``layers=6,heads=8/4/0`` as a shape."""
    sizes: dict[str, Any] = {}
    for piece in _parts(text):
        name, equals, value = piece.partition("=")
        counts = value.split("/")
        if not equals or not all(count.isdecimal() for count in counts):
            raise LmcompressError(f"--shape must look like layers=6,heads=8,ffn=1024 or heads=8/4/0, got {piece!r}")
        sizes[name] = int(value) if len(counts) == 1 else tuple(map(int, counts))
    return _validated(Shape, sizes)


def _validated(kind: type[_T], values: dict[str, Any]) -> _T:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "--" + "-".join(str(key).replace("_", "-") for key in first["loc"][:1]) + ": " if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"unknown{nearest(str(first['loc'][-1]), kind.model_fields)}"
        raise LmcompressError(f"{where}{message[:1].lower()}{message[1:]}") from error


def _load(name: str, cls: Any = None) -> Any:
    if not _exists(name):
        _missing(name)
    try:
        return CompressedModel.from_pretrained(name, cls).model.eval()
    except OSError as error:
        raise LmcompressError(f"could not load the model {name!r}: {str(error).splitlines()[0][:300]}") from error


def _exists(name: str) -> bool:
    # whatever looks like user/name may be on the Hub
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    folder = Path(name)
    return (folder / "config.json").is_file() or not (is_path or folder.exists())


def _missing(name: str) -> Any:
    folder = Path(name)
    there = sorted(p.parent.name for p in folder.glob("*/config.json")) if folder.is_dir() else []
    hint = f"; its models are: {', '.join(str(folder / name) for name in there)}" if there else ""
    raise LmcompressError(f"{name} holds no model (no config.json){hint}")


def _bytes_by_part(model: CompressedModel, tensors: list[Any]) -> dict[str, dict[str, int]]:
    """Bytes on disk by part of the model: embeddings, each block, and the rest."""
    anatomy = anatomy_of(model.model)
    blocks, base = anatomy.family.blocks, model.model.base_model_prefix
    parts: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        name = tensor.name.removeprefix(f"{base}.")
        if name.startswith(f"{blocks}."):
            part = f"block {name[len(blocks) + 1 :].split('.')[0]}"
        elif name.startswith(("embeddings", "wte", "wpe")):
            part = "embeddings"
        else:
            part = "head and rest"
        entry = parts.setdefault(part, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.num_bytes
    order = sorted(
        parts, key=lambda p: (p != "embeddings", p == "head and rest", int(p[6:]) if p.startswith("block ") else 0)
    )
    return {part: parts[part] for part in order}


def _stream_listing(streams: Mapping[str, StreamInfo], *, each: bool) -> Table:
    """Bits per number of entropy-coded tensors, of all and of each."""
    table = Table(title="entropy-coded tensors, bits per number")
    for name in ("tensor", "form", "numbers", "dense", "fixed width", "Huffman", "stored", "Shannon"):
        table.add_column(name, justify="left" if name in ("tensor", "form") else "right")

    def add(name: str, form: str, infos: Collection[StreamInfo]) -> None:
        numbers = sum(info.numbers for info in infos)
        bits = [
            sum(getattr(info, what) * times for info in infos) / max(numbers, 1)
            for what, times in (
                ("dense_bytes", 8), ("fixed_bits", 1), ("huffman_bits", 1), ("bytes", 8), ("shannon_bits", 1),
            )
        ]  # fmt: skip
        table.add_row(name, form, f"{numbers:,}", *(f"{value:.3f}" for value in bits))

    for name, info in streams.items() if each else ():
        add(name, info.form, [info])
    add("all", "", streams.values())
    return table


def _packing(model: CompressedModel) -> dict[str, Any]:
    """Bytes of packed weights by what they are, and the kernel that multiplies them; empty where all is dense."""
    sizes = weight_bytes(model.model)
    if not sizes.packed_weights:
        return {}
    working = [name for name, said in ladder(model.model.device).items() if said.startswith("works")]
    return vars(sizes) | {"bits_per_weight": sizes.bits_per_weight, "kernel": working[0]}


def _console() -> Console:
    console = Console()
    # not a terminal: a log or a pipe, where tables should not be squeezed into 80 columns
    return console if console.is_terminal else Console(width=120)


def _errors() -> Console:
    return Console(stderr=True)


if __name__ == "__main__":
    main()
