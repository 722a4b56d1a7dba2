"""What every benchmark shares: the form of its results, and small helpers."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lmcompress.evaluation import machine

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The measured commit; marked if the tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, cwd=RESULTS.parent
        ).stdout

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "../lmcompress", ".").strip()
        return git("rev-parse", "--short", "HEAD").strip() + (" (changed)" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def asked(name: str, target: str, measured: float | str, met: bool, *, busy: bool = False) -> dict[str, Any]:
    """A requested number, and the measured one; whether it is met is not said if the machine was busy."""
    return {"name": name, "target": target, "measured": measured, "met": None if busy else met}


def once(folder: Path, about: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a run: read from its folder if it is finished, otherwise run and written."""
    file = folder / "row.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    row = about | run() | {"commit": commit()}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row, indent=1))
    print(json.dumps(row), flush=True)
    return row


def training_parser(description: str | None, files: str) -> Any:
    """The options that benchmarks have which train and keep their runs; :func:`train_and_report` reads them."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True, help=f"folder that holds {files}")
    made.add_argument("--work", type=Path, default=Path("runs"), help="where teachers, models and results of runs go")
    made.add_argument("--quick", action="store_true", help="a few steps on a few rows, one seed, to see that it runs")
    made.add_argument("--train-only", action="store_true", help="train what is missing, write no results")
    made.add_argument("--report", action="store_true", help="train nothing, write the results of what is there")
    return made


def glue_parser(description: str | None, tasks: Iterable[str], default: Iterable[str] | None = None) -> Any:
    """The options of :func:`training_parser`, and which tasks of GLUE."""
    made = training_parser(description, "glue/<task>/*.parquet")
    made.add_argument("--tasks", nargs="+", choices=list(tasks), default=list(tasks if default is None else default))
    return made


def train_and_report(
    name: str, parser: Any, run: Callable[[Any, Path], None], report: Callable[[Any, Path], None]
) -> None:
    """Train missing runs and write the results, as in the options; runs go to the folder ``name`` of ``--work``."""
    options = parser.parse_args()
    if options.quick:
        # neither its teachers nor its models are to be mistaken for real ones later
        options.work = options.work / "quick"
    work = options.work / name
    if not options.report:
        run(options, work)
    if not options.train_only:
        report(options, work)


def _script() -> Path:
    """The benchmark that runs, by its path in the repository."""
    script = Path(sys.argv[0]).resolve()
    return script.relative_to(RESULTS.parent.parent) if script.is_relative_to(RESULTS.parent) else Path(script.name)


def _public(argument: str) -> str:
    """An argument without machine-specific paths."""
    return Path(argument).name if argument.startswith(("/", "~")) else argument


def write(name: str, rows: list[dict[str, Any]], wanted: list[dict[str, Any]], *, quick: bool, **more: Any) -> Path:
    """Write ``results/<name>.json`` (``results/quick/`` for a quick run, which is not committed)."""
    folder = RESULTS / "quick" if quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": name,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "command": " ".join(["python", str(_script()), *map(_public, sys.argv[1:])]),
        **more,
        "rows": rows,
        "asked": wanted,
    }
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    return path
