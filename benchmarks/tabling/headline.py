"""The README's table and the points of its picture: one teacher, compressed in several ways."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tabling import form

VALIDATION_ROWS = {"sst2": 872, "mrpc": 408, "rte": 277, "qnli": 5463}
"""Rows of GLUE's validation splits: what the interval of a score follows from."""

Z = 1.96
"""Half the width of a 95 % interval, in standard errors."""


class Way(NamedTuple):
    """One way to compress the teacher, and where its results are.

    Attributes:
        name: as the table has it.
        label: as the picture has it.
        how: how it was made.
        benchmark: whose ``rows`` are searched.
        keys: what a row must have to be of this way.
        dense: what a row must have to be of the teacher.
        speed: benchmark and keys of the row that holds the speed-up of the encoder, where one was measured.
    """

    name: str
    label: str
    how: str
    benchmark: str
    keys: Mapping[str, Any]
    dense: Mapping[str, Any]
    speed: tuple[str, Mapping[str, Any]] | None = None


def _pruned(share: float) -> tuple[str, Mapping[str, Any]]:
    return "pruning_speed", {"model": "MiniLM", "kind": "even", "sparsity": share, "batch": 32}


def _packed(method: str) -> tuple[str, Mapping[str, Any]]:
    return "quant_speed", {"question": "encoder", "model": "MiniLM", "method": method, "batch": 32}


_GRADUAL = {"kind": "schedules", "name": "gradual"}
_TEACHER = {"role": "teacher"}
_UNTRAINED = {"kind": "without training", "name": "gptq"}
_GPTQ = "GPTQ on 512 rows, activations and embeddings too"
WAYS = (
    Way(
        "distilled, 3 of 6 layers", "distilled, 3 layers",
        "logits at temperature 2, hidden states and labels; first on unlabelled sentences, then on the task",
        "distillation", {"role": "distilled"}, _TEACHER,
    ),
    Way(
        "the same 3 layers, no teacher", "3 layers, no teacher", "the teacher's first three layers, labels alone",
        "distillation", {"role": "control"}, _TEACHER,
    ),
    Way(
        "half of the encoder pruned", "50 % pruned", "heads and neurons, gradually, by Fisher scores, with a teacher",
        "pruning", _GRADUAL | {"sparsity": 0.5}, {}, _pruned(0.5),
    ),
    Way(
        "three quarters of the encoder pruned", "75 % pruned", "the same", "pruning", _GRADUAL | {"sparsity": 0.75}, {},
        _pruned(0.75),
    ),
    Way(
        "8 bits, no training", "8 bits", _GPTQ, "qat_glue", _UNTRAINED | {"bits": 8}, {"kind": "teacher"},
        _packed("lmcompress W8A8"),
    ),
    Way(
        "4 bits, no training", "4 bits", _GPTQ, "qat_glue", _UNTRAINED | {"bits": 4}, {"kind": "teacher"},
        _packed("lmcompress W4A8"),
    ),
    Way(
        "2 bits, trained", "2 bits, trained",
        "ternary matrices with a scale for every 64 weights, 4-bit embeddings, on the teacher's answers", "qat_glue",
        {"kind": "trained", "bits": 2, "name": "tbt-g64"}, {"kind": "teacher"},
    ),
    Way(
        "Deep Compression", "Deep Compression", "55 % of the blocks' weights pruned, 16 clusters, entropy-coded file",
        "deep_compression_bert", {"stage": "coded"}, {"stage": "dense"},
    ),
)  # fmt: skip


class Point(NamedTuple):
    """What a way gave.

    Attributes:
        way: which one.
        scores: a row of the results for each task.
        megabytes: of the file, in units of 10^6 bytes.
        kept: of the mean of the teacher's scores on the same tasks, in per cent.
        interval: half the width of the 95 % interval of ``kept``, in points of per cent.
        speedup: of the encoder at 32 x 128 tokens over the dense one; None where it was not measured.
    """

    way: Way
    scores: Mapping[str, Mapping[str, Any]]
    megabytes: float
    kept: float
    interval: float
    speedup: float | None


def points(results: Path) -> list[Point]:
    """A point for every way that has results, in the order of ``WAYS``.

    The interval follows from the number of validation rows and, where there are several seeds, from their spread:
    a score is taken for the share of right answers among independent rows (MRPC's and its F1's mean, too).
    """
    found = []
    for way in WAYS:
        rows = _rows(results, way.benchmark)
        scores = {row["task"]: row for row in _matching(rows, way.keys) if row["task"] in VALIDATION_ROWS}
        if not scores:
            continue
        dense = {row["task"]: row["score"] for row in _matching(rows, way.dense)} if way.dense else {}
        dense = {task: dense.get(task, row.get("dense")) for task, row in scores.items()}
        teacher = statistics.mean(dense.values())
        mean = statistics.mean(row["score"] for row in scores.values())
        error = math.sqrt(sum(_variance(task, row) for task, row in scores.items())) / len(scores)
        sizes = [row["bytes"] for row in scores.values()]
        found.append(
            Point(
                way, scores, max(sizes) / 1e6, 100 * mean / teacher, 100 * Z * error / teacher, _speedup(results, way)
            )
        )
    return found


def headline(results: Path) -> str | None:
    """The teacher and what each way made of it; None where there are no results."""
    found = points(results)
    teacher = {row["task"]: row for row in _matching(_rows(results, "distillation"), _TEACHER)}
    if not found or not teacher:
        return None
    tasks = [task for task in VALIDATION_ROWS if task in teacher]
    size = form.megabytes(teacher[tasks[0]])
    table = [["teacher: MiniLM, 6 layers × 384", *(form.score(teacher[t]) for t in tasks), "100 %", size, "1 ×"]]
    for point in found:
        kept = f"{point.kept:.1f} %" + ("" if len(point.scores) == len(tasks) else f" (of {len(point.scores)})")
        speed = "–" if point.speedup is None else f"{point.speedup:.1f} ×"
        cells = (form.score(point.scores.get(task)) for task in tasks)
        table.append([point.way.name, *cells, kept, f"{point.megabytes:.1f} MB", speed])
    columns = ["GLUE, validation", *(form.TASKS[t] for t in tasks), "of the teacher", "file", "encoder, 32 × 128"]
    return f"{form.markdown(columns, table)}\n\n{_caption(found)}"


def sources(results: Path) -> str | None:
    """How each row of the table was made, and the commands that measured it; None where there are no results."""
    found = points(results)
    table = []
    for point in found:
        names = [point.way.benchmark, *([point.way.speed[0]] if point.way.speed else [])]
        read = [form.read(results / f"{name}.json") for name in names]
        commands = "<br>".join(f"`{result['command']}`" for result in read if result is not None)
        table.append([point.way.name, point.way.how, commands])
    lines = ["| row | made by | measured by (quality, speed) |", "|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in table)]) if table else None


def _caption(found: Iterable[Point]) -> str:
    several = sorted({form.TASKS[t] for point in found for t, row in point.scores.items() if row["seeds"] > 1})
    seeds = f"± is the standard deviation of 3 seeds ({', '.join(several)}); all else is one seed" if several else ""
    return (
        f"{seeds or 'One seed'}. Pruned and distilled models were trained longer than the teacher, with it as teacher: "
        "above 100 % does not mean that pruning helps. Speed: PyTorch on a CPU, encoders of these shapes (pruned: "
        "all blocks alike); –: not measured."
    )


def _rows(results: Path, benchmark: str) -> list[Mapping[str, Any]]:
    result = form.read(results / f"{benchmark}.json")
    return [] if result is None else list(result["rows"])


def _matching(rows: Iterable[Mapping[str, Any]], keys: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row.get(key) == value for key, value in keys.items())]


def _variance(task: str, row: Mapping[str, Any]) -> float:
    """Of a score's mean over seeds, in squared points."""
    share = row["score"] / 100
    return 1e4 * share * (1 - share) / VALIDATION_ROWS[task] + (row["spread"] or 0.0) ** 2 / row["seeds"]


def _speedup(results: Path, way: Way) -> float | None:
    if way.speed is None:
        return None
    rows = _matching(_rows(results, way.speed[0]), way.speed[1])
    return float(rows[0]["speedup"]) if rows else None
