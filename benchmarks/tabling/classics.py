"""Tables of the papers whose experiments are repeated."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tabling import form


class Seed(NamedTuple):
    """A paper whose experiment is repeated, and the two of its results that are set side by side.

    Attributes:
        paper: authors and year.
        key: of the results' rows, whose values are the next two.
        before: what is improved on.
        after: what the paper proposes.
        factor: the column that says how many times smaller it is.
        shown: what the numbers are.
    """

    paper: str
    key: str
    before: str
    after: str
    factor: str | None = None
    shown: str = "errors, MNIST"


SEED_SCRIPTS = Path(__file__).resolve().parents[1] / "seeds"
OBD_SHARE = 0.8


SEEDS = {
    "obd": Seed(
        "LeCun, Denker & Solla 1990",
        "criterion",
        "magnitude",
        "obd",
        shown=f"errors with {100 * OBD_SHARE:.0f} % removed, MNIST (asked is the loss)",
    ),
    "hinton": Seed("Hinton, Vinyals & Dean 2015", "name", "labels", "soft targets"),
    "deep_compression": Seed("Han, Mao & Dally 2016", "stage", "dense", "coded", "ratio"),
    "network_surgery": Seed("Guo, Yao & Chen 2016", "role", "dense", "surgery", "factor"),
    "iht": Seed("Jin et al. 2016", "role", "dense", "iht", shown="errors, MNIST; score, MRPC"),
    "structured_sparsity": Seed("Wen et al. 2016", "role", "dense", "group lasso"),
    "attention_transfer": Seed("Zagoruyko & Komodakis 2017", "role", "labels", "labels + AT", shown="score, GLUE"),
    "grouped": Seed("Zhang et al. 2018", "shuffle", "none", "channel", shown="score, GLUE"),
}


def seeds(results: Path) -> str | None:
    """What each repeated paper has published beside what came here; None where there are no results at all."""
    found = {name: form.read(results / f"{name}.json") for name in SEEDS}
    if not any(found.values()):
        return None
    table = []
    for name, seed in SEEDS.items():
        result, published = found[name], published_numbers(name)
        if name == "hinton":
            published = {"": (published[seed.before] / 100, published[seed.after] / 100)}
        paper = "; ".join(_change(subject, *numbers) for subject, numbers in published.items())
        table.append(
            [
                f"[{seed.paper}](../benchmarks/seeds/{name}.py)",
                f"{seed.before} → {seed.after}: {seed.shown}",
                paper or "–",
                *(["_not measured yet_", "–"] if result is None else [_measured(result, seed), _met(result)]),
            ]
        )
    return form.markdown(["paper", "what", "published", "here", "all that was asked is met"], table)


def published_numbers(name: str) -> dict[str, Any]:
    """What ``PUBLISHED`` is in a benchmark of ``seeds/``, which is not imported for it; empty where there is none."""
    tree = ast.parse((SEED_SCRIPTS / f"{name}.py").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PUBLISHED":
            return dict(ast.literal_eval(node.value))
    return {}


def _measured(result: Mapping[str, Any], seed: Seed) -> str:
    """What came of a seed: each network or task before and after."""
    subjects: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in result["rows"]:
        subjects.setdefault(row.get("network") or row.get("task", ""), {})[row[seed.key]] = row
    changes = []
    for subject, by in subjects.items():
        if {seed.before, seed.after} <= by.keys():
            before, after = by[seed.before], by[seed.after]
            factor = round(after[seed.factor], 1) if seed.factor else None
            changes.append(_change(subject, _percent(before), _percent(after), factor))
    return "; ".join(changes)


def _percent(row: Mapping[str, Any]) -> float:
    """A score, or the errors of 10,000 in per cent."""
    if "score" in row:
        return float(row["score"])
    errors = row["errors"]
    return float(errors[row["removed"].index(OBD_SHARE)] if isinstance(errors, list) else errors) / 100


def _change(subject: str, before: float, after: float, factor: float | None = None) -> str:
    named = f"{form.TASKS.get(subject, subject)}: " if subject else ""
    return f"{named}{before:.2f} → {after:.2f} %" + (f", {factor:g} ×" if factor else "")


def _met(result: Mapping[str, Any]) -> str:
    verdicts = [item["met"] for item in result["asked"] if item["target"] != "reported"]
    return form.yes(True) if all(verdicts) else f"{form.yes(False)}, {sum(verdicts)} of {len(verdicts)}"


def hinton(results: Path) -> str | None:
    """Errors of students of labels and of soft targets; None where there are no results."""

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [row["name"], "-".join(map(str, row["units"])), form.errors(row), str(row["published"])]

    return form.row_by_row(results, "hinton", ["MNIST", "units", "errors of 10,000", "published"], cells)


def network_surgery(results: Path) -> str | None:
    """Errors of LeNets whose links were cut and spliced, and what is left; None where there are no results."""
    published = published_numbers("network_surgery")

    def cells(row: Mapping[str, Any]) -> list[str]:
        before, after, factor = published[row["network"]]
        paper = {"dense": [form.count(before), "1 ×"], "surgery": [form.count(after), f"{factor} ×"]}.get(
            row["role"], ["", ""]
        )
        return [row["network"], row["role"], form.errors(row), paper[0], f"{row['factor']:.1f} ×", paper[1]]

    columns = ["MNIST", "way", "errors of 10,000", "published", "fewer parameters", "published"]
    return form.row_by_row(results, "network_surgery", columns, cells)


def structured_sparsity(results: Path) -> str | None:
    """Errors and widths of networks that lost whole units; None where there are no results."""
    published = published_numbers("structured_sparsity")

    def cells(row: Mapping[str, Any]) -> list[str]:
        before, after = published[row["network"]]
        errors = {"dense": form.count(before), "group lasso": form.count(after)}.get(row["role"], "")
        widths = "-".join(map(str, row["widths"]))
        return [row["network"], row["role"], widths, f"{row['left']:,.0f}", form.errors(row), errors]

    columns = ["MNIST", "way", "widths", "weights left", "errors of 10,000", "published"]
    return form.row_by_row(results, "structured_sparsity", columns, cells)


def iht(results: Path) -> str | None:
    """Networks that were trained by hard thresholding beside dense ones; None where there are no results."""

    def cells(row: Mapping[str, Any]) -> list[str]:
        found = form.errors(row) if "errors" in row else f"score {row['score']:.1f}"
        return [row["network"], row["role"], f"{100 * row['sparsity']:.0f} %", found]

    return form.row_by_row(results, "iht", ["from scratch", "way", "weights that are 0", "errors of 10,000"], cells)


def obd(results: Path) -> str | None:
    """Loss without retraining by what is removed, and the curves where they were drawn; None without results."""
    shares = (0.0, 0.5, 0.7, OBD_SHARE, 0.9)

    def cells(row: Mapping[str, Any]) -> list[str]:
        at = [row["removed"].index(share) for share in shares]
        return [row["network"], row["criterion"], *(f"{row['losses'][index]:.3g}" for index in at)]

    columns = ["MNIST, loss on training rows", "by", *(f"{100 * share:.0f} % removed" for share in shares)]
    table = form.row_by_row(results, "obd", columns, cells)
    if table is None or not (results / "obd.svg").is_file():
        return table
    return f"{table}\n\n![loss and errors over the share removed](../../benchmarks/results/obd.svg)"


def grouped(results: Path) -> str | None:
    """Scores of BERTs of grouped matrices by the shuffle between them; None where there are no results."""
    result = form.read(results / "grouped.json")
    if result is None:
        return None
    teachers = result["setting"]["teachers"]
    rows = [{"task": task, "shuffle": "teacher", "score": teachers[task], "spread": None} for task in teachers]
    share = max(row["share_of_products"] for row in result["rows"])
    made = f"{result['setting']['groups']} groups: {100 * share:.0f} % of the products of the matrices. "
    return f"{form.by_task([*rows, *result['rows']], 'shuffle')}\n\n{made}{form.how_made(result)}"


def attention_transfer(results: Path) -> str | None:
    """Scores of students by what they learn from; None where there are no results."""
    result = form.read(results / "attention_transfer.json")
    return None if result is None else f"{form.by_task(result['rows'], 'role')}\n\n{form.how_made(result)}"
