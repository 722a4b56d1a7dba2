"""Writes the tables of README.md, docs/benchmarks/ and docs/papers.md from the results: no number was typed by hand.

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``; NAME is a key of ``TABLES``. Where the results
are missing, the place says so.

    python benchmarks/tables.py            # write the pages
    python benchmarks/tables.py --check    # write nothing; exit 1 where a page and the results differ
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Callable
from pathlib import Path

from tabling import choices, classics, distillation, form, headline, pruning, quantization, speed, storage, tasks

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "benchmarks").glob("*.md")),
    *(ROOT / "docs" / f for f in ("which_method.md", "papers.md")),
)

_PLACE = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)


def asked(results: Path) -> str | None:
    """Every number that was asked of every benchmark, met or not; None where there are no results."""
    table: list[list[str]] = []
    verdicts: list[bool] = []
    undecided = 0
    for file in sorted(results.glob("*.json")):
        result = json.loads(file.read_text("utf-8"))
        for item in result["asked"]:
            measured = item["measured"]
            shown = f"{measured:.4g}" if isinstance(measured, (int, float)) else str(measured)
            if item["target"] != "reported" and item["met"] is None:
                undecided += 1
            elif item["target"] != "reported":
                verdicts.append(item["met"])
            verdict = "–" if item["target"] == "reported" else form.yes(item["met"])
            table.append([f"{result['benchmark']}: {item['name']}", item["target"], shown, verdict])
    if not table:
        return None
    met = f"{sum(verdicts)} of {len(verdicts)} targets are met."
    if undecided:
        met += f" Of {undecided} there is no verdict: the machine was busy when they were measured."
    return f"{form.markdown(['asked', 'target', 'measured', 'met'], table)}\n\n{met}"


TABLES: dict[str, Callable[[Path], str | None]] = {
    "headline": headline.headline,
    "headline_sources": headline.sources,
    "choices": choices.choices_of_readme,
    "choices_of_docs": choices.choices,
    "distillation": distillation.distillation,
    "distillation_lm": distillation.distillation_lm,
    "trainer_overhead": distillation.trainer_overhead,
    "pruning": pruning.pruning,
    "pruning_lm": pruning.pruning_lm,
    "pruning_peers": pruning.pruning_peers,
    "vocabulary": pruning.vocabulary,
    "pruning_speed": speed.pruning_speed,
    "pruning_compiled": speed.pruning_compiled,
    "quant_speed": speed.quant_speed,
    "export_speed": speed.export_speed,
    "qat_lm": quantization.qat_lm,
    "qat_glue": quantization.qat_glue,
    "qat_overhead": quantization.qat_overhead,
    "bf16_training": quantization.bf16_training,
    "quantbart": quantization.quantbart,
    "smollm2": quantization.smollm2,
    "coding": storage.coding,
    "deep_compression": storage.deep_compression,
    "deep_compression_bert": storage.deep_compression_bert,
    "sparsity_overhead": storage.sparsity_overhead,
    "network_surgery": classics.network_surgery,
    "iht": classics.iht,
    "structured_sparsity": classics.structured_sparsity,
    "obd": classics.obd,
    "hinton": classics.hinton,
    "attention_transfer": classics.attention_transfer,
    "grouped": classics.grouped,
    "seeds": classics.seeds,
    "sentence_embeddings": tasks.sentence_embeddings,
    "question_answering": tasks.question_answering,
    "asked": asked,
}


def fill(text: str, results: Path = RESULTS) -> str:
    """A page with its tables made anew.

    Raises:
        SystemExit: a place names no table.
    """

    def make(place: re.Match[str]) -> str:
        name = place["name"]
        if name not in TABLES:
            raise SystemExit(f"no table {name!r}; there are: {', '.join(TABLES)}")
        table = TABLES[name](results) or "_Not measured yet._"
        return f"{place[1]}{table}\n{place[4]}"

    return _PLACE.sub(make, text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where a page and the results differ"
    )
    parser.add_argument("--page", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    differences: list[str] = []
    for page in options.page:
        before = page.read_text("utf-8")
        after = fill(before, options.results)
        if options.check:
            name = str(page)
            differences += difflib.unified_diff(before.splitlines(), after.splitlines(), name, "results", lineterm="")
        elif after != before:
            page.write_text(after, "utf-8")
            print(f"wrote {page}")
    if differences:
        raise SystemExit("\n".join([*differences, "run: python benchmarks/tables.py"]))


if __name__ == "__main__":
    main()
