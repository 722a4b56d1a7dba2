"""``lmcompress benchmark``: the latency of a model, alone or next to another one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lmcompress.cli.options import AnyModel, AsJson, LatencyBatches
from lmcompress.errors import LmcompressError

GENERATED_TOKENS = 32


Against = Annotated[
    str | None, typer.Option("--against", help="Folder or name of a second model to compare with the first.")
]
Length = Annotated[
    int | None,
    typer.Option(
        "--length", help="Length of the inputs in tokens. Default: 128, or what the models have positions for."
    ),
]
Repeats = Annotated[int, typer.Option("--repeats", help="Number of timed calls of each model.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Number of torch threads. Default: torch's own.")]
Generate = Annotated[
    bool, typer.Option("--generate", help="Time greedy generation of 32 tokens instead of one forward pass.")
]


def benchmark(
    model: AnyModel,
    against: Against = None,
    batch: LatencyBatches = None,
    length: Length = None,
    repeats: Repeats = 20,
    threads: Threads = None,
    generate: Generate = False,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of a model, alone or next to another one; exported models in processes of their own.

    Models are timed in rounds of random order, and the first of them twice in each round. A model is reported as
    faster only if the quartiles of its ratio lie beyond those of the first model over itself; if that one differs from
    itself, the machine was busy, and there is no verdict.

    Examples:

      lmcompress benchmark runs/quickstart/student

      lmcompress benchmark runs/quickstart/student --against runs/quickstart/teacher --batch 1 --batch 32
    """
    from contextlib import ExitStack
    from pathlib import Path

    import torch

    from lmcompress.cli.values import messages_name_options
    from lmcompress.evaluation import Worker, compare_latency
    from lmcompress.evaluation import verdict as verdicts
    from lmcompress.evaluation.workers import can_generate
    from lmcompress.export import is_exported, load_exported
    from lmcompress.families.positions import positions_of
    from lmcompress.recipes.one_model import load_model
    from lmcompress.recipes.progress import quiet_libraries

    names = [name for name in (against, model) if name is not None]
    if len({Path(name).resolve() for name in names}) < len(names):
        raise LmcompressError(f"{model} cannot be compared with itself; name another model with --against")
    exported = [name for name in names if is_exported(name)]
    with quiet_libraries(), messages_name_options(), ExitStack() as processes:
        # runtimes compute on the CPU, and a comparison is of one device
        device = torch.device("cuda" if torch.cuda.is_available() and not exported else "cpu")
        models: dict[str, Any] = {
            name: processes.enter_context(Worker(load_exported, name, threads, threads=threads))
            if name in exported
            else load_model(name).to(device)
            for name in names
        }
        if generate and (other := next((name for name, m in models.items() if not can_generate(m)), None)):
            kind = (models[other].config.architectures or ["model"])[0]
            raise LmcompressError(f"{other} is a {kind}, which generates no text: leave out --generate")
        # the model with the fewest positions bounds the length
        limit = min(positions_of(loaded.config) for loaded in models.values())
        if generate and limit <= GENERATED_TOKENS:
            raise LmcompressError(f"--generate needs more than {GENERATED_TOKENS} positions, the models have {limit}")
        measured = compare_latency(
            models,
            batch_sizes=batch or [1, 32],
            sequence_length=min(128, limit - (GENERATED_TOKENS if generate else 0)) if length is None else length,
            repeats=repeats,
            threads=threads,
            mode="generate" if generate else "forward",
        )
        rows = [{**vars(row), "verdict": words} for row, words in zip(measured, verdicts(measured), strict=True)]
    _print(rows, models, exported, as_json)


def _print(rows: list[dict[str, Any]], models: dict[str, Any], exported: list[str], as_json: bool) -> None:
    import json
    from pathlib import Path

    from lmcompress.cli.console import output_console
    from lmcompress.evaluation import parameter_count, size_on_disk
    from lmcompress.export.folder import graph_bytes
    from lmcompress.reporting import latency_table

    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    console = output_console()
    console.print(latency_table(rows))
    for name, loaded in models.items():
        if name in exported:
            console.print(f"{name}: exported, {graph_bytes(Path(name)) / 1e6:.2f} MB on disk", highlight=False)
            continue
        weight = f", {size_on_disk(name).total_bytes / 1e6:.2f} MB on disk" if Path(name).is_dir() else ""
        console.print(f"{name}: {parameter_count(loaded):,} parameters{weight}", highlight=False)
