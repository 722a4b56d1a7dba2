"""Cells, lines and small tables that the pages share."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TASKS = {
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "rte": "RTE",
    "stsb": "STS-B",
    "qnli": "QNLI",
    "cola": "CoLA",
    "mnli": "MNLI",
}


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def origin(result: Mapping[str, Any]) -> str:
    """One line: command, date, commit and machine of a result."""
    machine = result["machine"]
    # none is an answer, too; earlier results have no such field
    sets = machine.get("instructions")
    known = "instruction sets not recorded" if sets is None else sets or "without avx2"
    hardware = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores ({known})"
    return (
        f"`{result['command']}`, {result['date']}, commit {result['commit']}; {hardware}; torch {machine['torch']}, "
        f"transformers {machine['transformers']}."
    )


def read(file: Path) -> dict[str, Any] | None:
    """A result; None where the file is missing."""
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


def row_by_row(
    results: Path, name: str, columns: Sequence[str], cells: Callable[[Mapping[str, Any]], list[str]]
) -> str | None:
    """A row of the table for each row of the results."""
    result = read(results / f"{name}.json")
    return None if result is None else f"{markdown(columns, map(cells, result['rows']))}\n\n{how_made(result)}"


def by_task(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """Scores, a column for each task and a row for each value of the key."""
    by = {(row[key], row["task"]): row for row in rows}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    table = [[value, *(score(by.get((value, task))) for task in tasks)] for value in dict.fromkeys(v for v, _ in by)]
    return markdown(["GLUE, validation", *(TASKS[task] for task in tasks)], table)


def how_made(result: Mapping[str, Any]) -> str:
    """Seeds and origin of a result whose rows have ``seeds``."""
    return f"{seed_counts(sorted({row['seeds'] for row in result['rows']}))}{origin(result)}"


def seeds_by_task(rows: Iterable[Mapping[str, Any]]) -> str:
    """How many seeds each task's students have."""
    by_count: dict[int, set[str]] = {}
    for row in rows:
        if row["role"] != "teacher":
            by_count.setdefault(row["seeds"], set()).add(TASKS.get(row["task"], row["task"]))
    words = [
        f"{'one seed' if count == 1 else f'mean ± standard deviation of {count} seeds'}: {', '.join(sorted(tasks))}"
        for count, tasks in sorted(by_count.items(), reverse=True)
    ]
    return f"Students, {'; '.join(words)}. "


def seed_counts(seeds: Sequence[int]) -> str:
    """How many seeds, as a sentence; empty for none."""
    if not seeds:
        return ""
    return (
        "One seed. " if list(seeds) == [1] else f"Mean ± standard deviation of {' or '.join(map(str, seeds))} seeds. "
    )


def score(row: Mapping[str, Any] | None) -> str:
    """A score with its spread over seeds; a dash without a row."""
    if row is None:
        return "–"
    return f"{row['score']:.1f}" + (f" ± {row['spread']:.1f}" if row["spread"] is not None else "")


def scores(rows: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Scores, the first of them the teacher's, and the share of it that the others keep."""
    return [score(row) for row in rows] + [f"{row['of_teacher']:.1f} %" if row else "–" for row in rows[1:]]


def errors(row: Mapping[str, Any]) -> str:
    """Errors with their spread over seeds."""
    spread = f" ± {statistics.stdev(row['each']):.0f}" if len(row["each"]) > 1 else ""
    return f"{row['errors']:.0f}{spread}"


def count(percent: float) -> str:
    """Per cent as errors of 10,000."""
    return f"{100 * percent:.0f}"


def yes(met: bool | None) -> str:
    """Whether something that was asked is met; None: the machine was busy."""
    return "no verdict: busy" if met is None else "yes" if met else "**no**"


def times(row: Mapping[str, Any]) -> str:
    """CPU and wall time of a call."""
    wall = f"{row['ms']:.1f} ms"
    return f"{row['cpu_ms']:.1f} ms CPU, {wall}" if "cpu_ms" in row else wall


def quartiles(row: Mapping[str, Any], key: str, digits: int = 2) -> str:
    """A ratio and, where they were written, its quartiles."""
    ratio = f"{row[key]:.{digits}f}"
    if f"{key}_quartiles" not in row:
        return ratio
    return f"{ratio} ({' – '.join(f'{end:.{digits}f}' for end in row[f'{key}_quartiles'])})"


def on(row: Mapping[str, Any]) -> str:
    """For columns: on how many threads a row was timed; empty where that was not written."""
    return "" if "threads" not in row else ", 1 thread" if row["threads"] == 1 else f", {row['threads']} threads"


def how_timed(rows: Iterable[Mapping[str, Any]], place: Callable[[Mapping[str, Any]], str]) -> str:
    """How ratios came about, and where the first model differs from itself so that they support no verdict."""
    timed = [row for row in rows if "busy" in row]
    if not timed:
        return "Medians."
    busy = dict.fromkeys(place(row) for row in timed if row["busy"])
    told = f" **The machine was busy, no verdict: {'; '.join(busy)}.**" if busy else ""
    return (
        "Medians of rounds in random order, ratios of pairs within rounds (quartiles): of CPU time on one thread, of "
        f"wall time on several. *again*: the first one, timed a second time in each round.{told}"
    )


def perplexity(value: float) -> str:
    """A perplexity, without decimals from 1,000."""
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def millions(row: Mapping[str, Any]) -> str:
    """Parameters of a row."""
    return f"{row['parameters'] / 1e6:.1f} M"


def megabytes(row: Mapping[str, Any]) -> str:
    """Bytes of a row, in units of 10^6."""
    return f"{row['bytes'] / 1e6:.1f} MB"
