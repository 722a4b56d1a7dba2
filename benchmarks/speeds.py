"""Rows of times, as all benchmarks write them: wall and CPU time, ratios of pairs, and the first model over itself.

Programs that share the machine take wall time from a call, and next to no CPU time. On one thread of a CPU the ratios
that count are therefore of CPU time; on several threads, which wait for each other, and on a GPU they are of wall time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from lmcompress.evaluation import Clock, LatencyRow, Quartiles, Turns, compare_latency, verdict
from lmcompress.evaluation.timing import is_one, steady_clock, waited

Row = dict[str, Any]


def clock_of(threads: int) -> Clock:
    """The clock whose ratios count."""
    return steady_clock(threads, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def on(threads: int) -> str:
    """For names: ``1 thread``, ``2 threads``."""
    return f"{threads} thread" + ("" if threads == 1 else "s")


def add_threads(parser: Any, default: tuple[int, ...] = (1, 2)) -> None:
    """The option that says on how many threads to measure."""
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--threads", nargs="+", type=int, choices=range(1, cores + 1), metavar="N",
        default=[count for count in default if count <= cores],
        help=f"torch's and the runtimes' threads; everything is measured with each (default: {default})",
    )  # fmt: skip


def timed_rows(about: Mapping[str, Any], models: Mapping[str, Any], *, threads: int, **how: Any) -> list[Row]:
    """A row for each model and one for the second timing of the first, at one batch size.

    Args:
        about: what every row begins with.
        models: see ``compare_latency``.
        threads: torch's threads; workers have been built with theirs.
        how: further arguments of ``compare_latency``.
    """
    timed, clock = compare_latency(models, threads=threads, **how), clock_of(threads)
    busy = any(
        not is_one(row.speedup(clock)) or _crowded(row.median_ms, row.cpu_ms, clock)
        for row in timed
        if row.kind == "again"
    )
    return [
        {**about, "batch": row.batch_size, "method": row.model, **_columns(row, clock), "verdict": said, "busy": busy}
        for row, said in zip(timed, verdict(timed, clock), strict=True)
    ]


def _crowded(wall_ms: float, cpu_ms: float, clock: Clock) -> bool:
    """Whether other programs had much of the one core that a call ran on."""
    return clock == "cpu" and waited(wall_ms, cpu_ms)


def _columns(row: LatencyRow, clock: Clock) -> Row:
    found: Row = {
        "kind": row.kind, "threads": row.threads, "clock": clock,
        "ms": row.median_ms, "quartiles_ms": [row.lower_ms, row.upper_ms],
        "cpu_ms": row.cpu_ms, "cpu_quartiles_ms": [row.cpu_lower_ms, row.cpu_upper_ms],
    }  # fmt: skip
    ratios = {"": row.speedup(clock), "wall_": row.speedup("wall"), "cpu_": row.speedup("cpu")}
    for name, ratio in ratios.items():
        found |= {f"{name}speedup": ratio.median, f"{name}speedup_quartiles": [ratio.lower, ratio.upper]}
    return found


def cost_columns(turns: Turns, name: str | None, other: str, threads: int, added: float = 0.0) -> Row:
    """What one call costs over another: ratios of pairs by the clock that counts, and by both.

    Args:
        turns: the times.
        name: which call; None: the first, timed again.
        other: over what.
        threads: torch's threads while they were taken.
        added: what comes on top of the ratio, as it does not come in every call.
    """
    clock = clock_of(threads)
    first = (turns.milliseconds(None, each).median for each in ("wall", "cpu"))
    busy = not is_one(turns.itself(clock)) or _crowded(*first, clock)
    found: Row = {"threads": threads, "clock": clock, "busy": busy}
    found |= {"ms": turns.milliseconds(name, "wall").median, "cpu_ms": turns.milliseconds(name, "cpu").median}
    ratios: dict[str, Quartiles] = {
        "": turns.ratio(name, other, clock),
        "wall_": turns.ratio(name, other, "wall"),
        "cpu_": turns.ratio(name, other, "cpu"),
    }
    for prefix, ratio in ratios.items():
        found[f"{prefix}ratio"] = ratio.median + added
        found[f"{prefix}ratio_quartiles"] = [ratio.lower + added, ratio.upper + added]
    return found
