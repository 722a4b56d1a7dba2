"""``lmcompress benchmark``: the latency of a model, alone or next to another one."""

from __future__ import annotations

from typing import Annotated

import typer

from lmcompress.cli.options import AnyModel, AsJson, LatencyBatches
from lmcompress.errors import LmcompressError

GENERATED_TOKENS = 32


def benchmark(
    model: AnyModel,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Folder or name of a second model to compare with the first."),
    ] = None,
    batch: LatencyBatches = None,
    length: Annotated[int, typer.Option("--length", help="Length of the inputs in tokens.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", help="Number of timed calls of each model.")] = 20,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Number of torch threads. Default: torch's own.")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Time greedy generation of 32 tokens instead of one forward pass.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of a model, alone or next to another one in the same process.

    A model is reported as faster only if the interquartile ranges of the two do not overlap.

    Examples:

      lmcompress benchmark runs/quickstart/student

      lmcompress benchmark runs/quickstart/student --against runs/quickstart/teacher --batch 1 --batch 32
    """
    import json
    from pathlib import Path

    import torch

    from lmcompress.cli.console import output_console
    from lmcompress.evaluation import compare_latency, parameter_count, size_on_disk
    from lmcompress.evaluation import verdict as verdicts
    from lmcompress.recipes.one_model import load_model
    from lmcompress.recipes.progress import quiet_libraries
    from lmcompress.reporting import latency_table

    names = [name for name in (against, model) if name is not None]
    if len(set(names)) < len(names):
        raise LmcompressError(f"{model} cannot be compared with itself; name another model with --against")
    with quiet_libraries():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        models = {name: load_model(name).to(device) for name in names}
        # the model with the fewest positions bounds the length
        limit = min(int(getattr(m.config, "max_position_embeddings", length)) for m in models.values())
        measured = compare_latency(
            models,
            batch_sizes=batch or [1, 32],
            sequence_length=min(length, limit - (GENERATED_TOKENS if generate else 0)),
            repeats=repeats,
            threads=threads,
            mode="generate" if generate else "forward",
        )
    rows = [{**vars(row), "verdict": words} for row, words in zip(measured, verdicts(measured), strict=True)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    console = output_console()
    console.print(latency_table(rows))
    for name, loaded in models.items():
        weight = f", {size_on_disk(name).total_bytes / 1e6:.2f} MB on disk" if Path(name).is_dir() else ""
        console.print(f"{name}: {parameter_count(loaded):,} parameters{weight}", highlight=False)
