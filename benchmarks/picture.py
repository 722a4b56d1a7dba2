"""Draws the README's picture, quality against size, from the committed results.

    python benchmarks/picture.py            # write docs/images/quality_against_size.svg
    python benchmarks/picture.py --check    # write nothing; exit 1 where the picture shows other numbers

The numbers that are drawn are also in the picture's metadata, as JSON; they are what ``--check`` compares.
"""

from __future__ import annotations

import argparse
import json
import re
from html import unescape
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabling import form
from tabling.headline import points

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "quality_against_size.svg"

COLOURS = {"distillation": "#4269d0", "pruning": "#3b8132", "qat_glue": "#c4501b", "deep_compression_bert": "#8a4fa0"}
# where a label stands, from its point, in printer's points, and how it is aligned
PLACES = {
    "teacher": (0, -16, "center"),
    "50 % pruned": (8, 8, "left"),
    "75 % pruned": (-8, 6, "right"),
    "8 bits": (8, 6, "left"),
    "4 bits": (8, 6, "left"),
    "2 bits, trained": (0, -50, "center"),
    "Deep Compression": (-14, 46, "left"),
    "distilled, 3 layers": (-10, -3, "right"),
    "3 layers, no teacher": (-10, -3, "right"),
}
# three points have one size: their intervals are drawn side by side
NUDGES = {"50 % pruned": 1.02, "distilled, 3 layers": 0.985, "3 layers, no teacher": 1.0}


def drawn(results: Path = RESULTS) -> dict[str, list[float]]:
    """What the picture shows: megabytes, per cent of the teacher, half of the 95 % interval, by label."""
    found = {p.way.label: [round(p.megabytes, 1), round(p.kept, 1), round(p.interval, 1)] for p in points(results)}
    teacher = form.read(results / "distillation.json")
    if teacher is not None:
        found["teacher"] = [round(teacher["rows"][0]["bytes"] / 1e6, 1), 100.0, 0.0]
    return found


def shown(picture: Path = PICTURE) -> dict[str, list[float]]:
    """The numbers in a picture's metadata.

    Raises:
        SystemExit: If the file is missing or has no numbers.
    """
    text = picture.read_text("utf-8") if picture.is_file() else ""
    found = re.search(r"<dc:description>(.*?)</dc:description>", text, re.DOTALL)
    if found is None:
        raise SystemExit(f"{picture} has no numbers; run: python benchmarks/picture.py")
    return dict(json.loads(unescape(found[1])))


def draw(picture: Path, results: Path = RESULTS) -> None:
    """Write the picture."""
    numbers = drawn(results)
    picture.parent.mkdir(parents=True, exist_ok=True)
    about = {"Title": "Quality against size", "Description": json.dumps(numbers), "Date": None, "Creator": None}
    with matplotlib.rc_context({"svg.hashsalt": "lmcompress", "font.size": 10, "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.6, 3.9), layout="constrained")
        _plot(figure.subplots(), numbers, {point.way.label: point.way.benchmark for point in points(results)})
        figure.savefig(picture, format="svg", metadata=about)


def _plot(axes: Axes, numbers: dict[str, list[float]], benchmarks: dict[str, str]) -> None:
    axes.axhline(100, color="#999999", linewidth=0.8, zorder=0)
    for label, (megabytes, kept, interval) in numbers.items():
        colour = COLOURS.get(benchmarks.get(label, ""), "#333333")
        at = (megabytes * NUDGES.get(label, 1.0), kept)
        # the others are measured beside the teacher, which has no interval of its own
        error = interval or None
        axes.errorbar(*at, yerr=error, fmt="o" if interval else "s", color=colour, capsize=3, linewidth=1.2)
        right, up, side = PLACES.get(label, (8, 8, "left"))
        axes.annotate(label, at, (right, up), textcoords="offset points", color=colour, ha=side)
    axes.set(xlabel="file, MB (log scale)", ylabel="score, % of the teacher's", xscale="log", xlim=(6, 120))
    axes.set_ylim(90, 105.5)
    axes.set_xticks([8, 10, 15, 25, 50, 70, 90], ["8", "10", "15", "25", "50", "70", "90"])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the numbers differ")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.check:
        draw(options.picture, options.results)
        print(f"wrote {options.picture}")
    elif shown(options.picture) != drawn(options.results):
        raise SystemExit(f"{options.picture} shows other numbers; run: python benchmarks/picture.py")


if __name__ == "__main__":
    main()
