"""The table "which method?": wishes, what to take for them, and what came of it in the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tabling import form
from tabling.headline import Point, points


class Choice(NamedTuple):
    """One line of the table.

    Attributes:
        wish: what somebody wants.
        take: the answer; links are relative to ``docs/``.
        cost: of time, on a CPU, for a small model.
        result: the label of a point of the picture, or what makes the cell from the results.
    """

    wish: str
    take: str
    cost: str
    result: str | Callable[[Path], str]


def _latency(results: Path) -> str:
    """How far measured latencies are from their targets, at most."""
    result = form.read(results / "pruning_speed.json")
    rows = [row for row in result["rows"] if row["question"] == "latency target"] if result else []
    if not rows:
        return "not measured"
    off = max(abs(row["measured"] / row["target"] - 1) for row in rows)
    return f"within {100 * off:.1f} % of the target"


CHOICES = (
    Choice("a smaller, faster model, no training", "`lmcompress quantize --bits 8`", "a minute", "8 bits"),
    Choice("a much smaller one, no training", "`lmcompress quantize --bits 4 --method gptq`", "a minute", "4 bits"),
    Choice(
        "the fewest bits per weight", "[quantization-aware training](guides/quantization.md) at 2 bits", "hours",
        "2 bits, trained",
    ),
    Choice("the smallest file", "[Deep Compression](benchmarks/deep_compression.md)", "hours", "Deep Compression"),
    Choice(
        "less compute", "gradual [structured pruning](guides/pruning.md) of half of the blocks", "an hour",
        "50 % pruned",
    ),
    Choice("much less compute", "the same, three quarters", "an hour", "75 % pruned"),
    Choice(
        "half of the layers, stock architecture", "[distillation](guides/distillation.md)", "hours",
        "distilled, 3 layers",
    ),
    Choice("a given latency", "`lmcompress prune --latency-share 0.5`", "minutes", _latency),
    Choice(
        "one domain or language only", "[vocabulary pruning](guides/pruning_vocabulary.md)", "seconds",
        lambda _: "same outputs on its texts",
    ),
    Choice(
        "low-rank, grouped or shared layers", "[compact students](guides/students.md)", "an hour",
        lambda _: "see the guide",
    ),
)  # fmt: skip


def choices(results: Path, folder: str = "") -> str | None:
    """The table; None where there are no results.

    Args:
        results: the folder of the results.
        folder: of ``docs/``, seen from the page.
    """
    found = {point.way.label: point for point in points(results)}
    teacher = form.read(results / "distillation.json")
    if not found or teacher is None:
        return None
    size = teacher["rows"][0]["bytes"] / 1e6
    table = []
    for choice in CHOICES:
        if not isinstance(choice.result, str):
            cell = choice.result(results)
        elif choice.result in found:
            cell = _cell(found[choice.result], size)
        else:
            cell = "not measured"
        table.append([choice.wish, choice.take.replace("](", f"]({folder}"), choice.cost, cell])
    lines = ["| you want | take | costs | here |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in table)])


def choices_of_readme(results: Path) -> str | None:
    """The same table, with links from the README."""
    return choices(results, "docs/")


def _cell(point: Point, dense: float) -> str:
    """What is kept of the teacher's score, how much smaller the file is, and how much faster the encoder."""
    faster = "" if point.speedup is None else f", {point.speedup:.1f} × faster"
    count = len(point.scores)
    tasks = "" if count > 2 else f" on {count} task{'s' if count > 1 else ''}"
    return f"{point.kept:.0f} % of the score{tasks}, {dense / point.megabytes:.1f} × smaller{faster}"
