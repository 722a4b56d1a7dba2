"""Several runs on one page: their models in one table, measured again together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from lmcompress.data.tasks import auto_class_name
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import compare_latency, verdict
from lmcompress.reporting.comparison import Run, comparison_view
from lmcompress.reporting.evidence import decode
from lmcompress.reporting.models import collect
from lmcompress.reporting.report import render
from lmcompress.reporting.wording import Report


def compare_runs(
    folders: Sequence[Path], output: Path, names: Sequence[str] | None = None, *, time_again: bool = True
) -> Path:
    """Put the models of several runs into one page of HTML.

    A model that is in several runs, such as their teacher, is shown once. Differences of scores are paired row by row
    with the reference of the first run. If all models still exist, their latencies are measured again in one process,
    since latencies of different times cannot be compared.

    Args:
        folders: folders of at least two runs, with ``results.json`` each.
        output: path of the page; missing parent folders are created.
        names: names of the runs, in the same order; default: the names of their folders.
        time_again: whether to measure latency again; otherwise the runs' own times are shown, with a note.

    Returns:
        ``output``.

    Raises:
        LmcompressError: If a folder is not a run or its run is unfinished, if there are fewer than two, or if the runs
            measured another task, split, metric, or other rows.
    """
    runs = _runs([Path(folder) for folder in folders], names)
    _check_alike(runs)
    rows, sources = _merged(runs)
    timed, obstacle = False, "it was not requested"
    if time_again:
        timed, obstacle = _timed(runs, rows)
    view = comparison_view(runs, rows, sources, Path(output), None if timed else obstacle)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render("compare.html.j2", v=view), "utf-8")
    return output


def load_run(folder: Path, name: str | None = None) -> Run:
    """A finished run.

    Args:
        folder: folder written by :func:`~lmcompress.recipes.runner.run`.
        name: name of the run; default: that of the folder.

    Raises:
        LmcompressError: If it is not a run, or is unfinished, or its ``results.json`` cannot be read.
    """
    file = folder / "results.json"
    if not file.is_file():
        if (folder / "recipe.yaml").is_file():
            again = f"lmcompress run {folder / 'recipe.yaml'} --output {folder}"
            raise LmcompressError(f"{folder} is an unfinished run: it has no results.json; {again} goes on with it")
        raise LmcompressError(f"{folder} is no run: it has no results.json")
    try:
        report = json.loads(file.read_text("utf-8"))
        collect(report)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise LmcompressError(f"{file} is not what a run has written: {error!r}") from error
    return Run(name or folder.resolve().name, folder, report)


def _runs(folders: Sequence[Path], names: Sequence[str] | None) -> list[Run]:
    if len(folders) < 2:
        raise LmcompressError(f"there must be at least two runs to compare, got {len(folders)}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise LmcompressError(f"runs must be different folders, got {', '.join(map(str, folders))}")
    if names is not None and len(names) != len(folders):
        raise LmcompressError(f"there must be a name for each run, got {len(names)} names and {len(folders)} runs")
    runs = [load_run(folder, names[i] if names else None) for i, folder in enumerate(folders)]
    shown = [run.name for run in runs]
    if len(set(shown)) == len(shown):
        return runs
    if names is not None:
        raise LmcompressError(f"names of runs must differ, got {', '.join(names)}")
    # folders of one name in different places
    return [Run(str(run.folder), run.folder, run.report) for run in runs]


def _check_alike(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for key in ("task", "kind", "split", "metric"):
            ours, theirs = first.report[key], run.report[key]
            if ours != theirs:
                raise LmcompressError(
                    f"runs must have one {key} to be compared: {first.name} has {ours!r}, {run.name} has {theirs!r}"
                )
        ours, theirs = (_labels(one.report) for one in (first, run))
        if ours is not None and theirs is not None and ours != theirs:
            raise LmcompressError(
                f"runs must be measured on the same rows of {first.report['split']} to be compared: those of "
                f"{first.name} ({len(ours):,}) and {run.name} ({len(theirs):,}) differ"
            )


def _labels(report: Report) -> list[Any] | None:
    packed = ((report.get("evidence") or {}).get(report["split"]) or {}).get("labels")
    return None if packed is None else list(decode(packed).tolist())


def _merged(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All rows under distinct names, and the runs of each; models in several runs are included once."""
    rows: list[dict[str, Any]] = []
    sources: dict[str, str] = {}
    for run in runs:
        for row in run.report["rows"]:
            known = next((other for other in rows if _same(other, row)), None)
            if known is not None:
                sources[known["name"]] += f", {run.name}"
                continue
            name = str(row["name"])
            if name in sources:
                name = f"{run.name}/{name}"
            rows.append({**row, "name": name})
            sources[name] = run.name
    return rows, sources


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    keys = ("role", "metrics", "parameters", "size_bytes", "blocks", "evidence")
    return all(one.get(key) == other.get(key) for key in keys) and one["name"].endswith(other["name"])


def _timed(runs: Sequence[Run], rows: Sequence[dict[str, Any]]) -> tuple[bool, str]:
    """Measure all models again, in place; whether that was possible, and why not."""
    entries = [entry for row in rows for entry in row["latency"]]
    if not entries:
        return False, "the runs have not measured it"
    missing = [row["name"] for row in rows if not (Path(row["folder"]) / "config.json").is_file()]
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        return False, f"models are no longer where their run left them ({some})"
    head = getattr(transformers, auto_class_name(str(runs[0].report["kind"])))
    try:
        with _quiet():
            models = {row["name"]: head.from_pretrained(row["folder"]).eval() for row in rows}
    except Exception as error:  # whatever is wrong with a folder, the page can do without
        return False, f"a model could not be loaded: {error}"
    length = min(entry["sequence_length"] for entry in entries)
    batches = sorted({entry["batch_size"] for entry in entries})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = compare_latency(models, batch_sizes=batches, sequence_length=length, device=device)
    for row in rows:
        row["latency"] = []
    by_name = {row["name"]: row for row in rows}
    for found, words in zip(measured, verdict(measured), strict=True):
        if found.kind != "again":
            by_name[found.model]["latency"].append({**vars(found), "verdict": words})
    return True, ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block, Transformers prints only errors."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
