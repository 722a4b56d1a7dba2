"""Writes the tables of README.md and docs/papers.md from the results, so that no number in them was typed by hand.

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``; NAME is a key of ``TABLES``. Where the results
are missing, the place says so.

    python benchmarks/tables.py            # write the pages
    python benchmarks/tables.py --check    # write nothing; exit 1 where a page and the results differ
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "papers.md")

_PLACE = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
_TASKS = {
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
    hardware = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
    return (
        f"`{result['command']}`, {result['date']}, commit {result['commit']}; {hardware}; torch {machine['torch']}, "
        f"transformers {machine['transformers']}."
    )


def distillation(results: Path) -> str | None:
    """Teacher, student with it, student without it, for every task; None where there are no results."""
    result = _read(results / "distillation.json")
    if result is None:
        return None
    rows = {(row["task"], row["role"]): row for row in result["rows"]}
    tasks = [task for task in dict.fromkeys(row["task"] for row in result["rows"]) if (task, "distilled") in rows]
    roles = ("teacher", "distilled", "control")
    table = [[_TASKS.get(task, task), *_scores([rows.get((task, role)) for role in roles])] for task in tasks]
    averaged = [task for task in tasks if task != "cola" and (task, "control") in rows]
    if len(averaged) > 1:
        means = [statistics.mean(rows[task, role]["score"] for task in averaged) for role in roles]
        shares = [f"{100 * mean / means[0]:.1f} %" for mean in means[1:]]
        name = "**mean without CoLA**" if "cola" in tasks else "**mean**"
        table.append([name, *(f"**{cell}**" for cell in [*(f"{mean:.1f}" for mean in means), *shares])])
    if not table:
        return None
    columns = [
        "GLUE, validation",
        "teacher",
        "distilled",
        "same student, labels only",
        "distilled keeps",
        "labels only keeps",
    ]
    teacher, student = (next(row for row in result["rows"] if row["role"] == role) for role in ("teacher", "distilled"))
    size = (
        f"Teacher: {_millions(teacher)} parameters, {_megabytes(teacher)}; students: {_millions(student)}, "
        f"{_megabytes(student)} (the embeddings stay as they are). "
    )
    return f"{markdown(columns, table)}\n\n{size}{_seeds(rows.values())}{origin(result)}"


def distillation_lm(results: Path) -> str | None:
    """Perplexity of a GPT-2 and of its halves; None where there are no results."""
    result = _read(results / "distillation_lm.json")
    if result is None:
        return None
    words = {
        "teacher": "teacher",
        "distilled": "half of its layers, distilled",
        "control": "half of its layers, labels only",
        "scratch": "the same shape from random weights, labels only",
    }
    table = []
    for role, name in words.items():
        rows = [row for row in result["rows"] if row["role"] == role]
        if rows:
            means = [statistics.mean(row[of] for row in rows) for of in ("token_perplexity", "word_perplexity")]
            table.append([name, *(f"{mean:.1f}" for mean in means), _millions(rows[0]), _megabytes(rows[0])])
    columns = ["GPT-2, WikiText-2, test", "token perplexity", "word perplexity", "parameters", "weights"]
    seeds = max(sum(row["role"] == role for row in result["rows"]) for role in words)
    return f"{markdown(columns, table)}\n\n{'One seed' if seeds == 1 else f'Means of {seeds} seeds'}. {origin(result)}"


def trainer_overhead(results: Path) -> str | None:
    """Time of a distillation step beside what it cannot avoid; None where there are no results."""
    result = _read(results / "trainer_overhead.json")
    if result is None:
        return None
    timed = [row for row in result["rows"] if "ratio" in row]
    table = [
        [
            f"{row['model']}, {row['rows']} × {row['length']} tokens",
            f"{row['baseline_ms']:.0f} ms",
            f"{row['lmcompress_ms']:.0f} ms",
            f"{row['ratio']:.3f} ({' – '.join(f'{quartile:.3f}' for quartile in row['ratio_quartiles'])})",
        ]
        for row in timed
    ]
    columns = ["one training step", "student + teacher's forward", "distillation", "ratio (quartiles)"]
    text = markdown(columns, table)
    for row in result["rows"]:
        if memory := row.get("peak_memory_mib"):
            parts = ", ".join(f"{way} {mib:,.0f} MiB" for way, mib in memory.items())
            text += f"\n\nPeak memory of the {row['model']} step: {parts}."
    return f"{text} {origin(result)}" if "Peak" in text else f"{text}\n\n{origin(result)}"


def pruning_speed(results: Path) -> str | None:
    """Speed-ups beside FLOP ratios, latency targets, and what a step costs; None where there are no results."""
    result = _read(results / "pruning_speed.json")
    if result is None:
        return None
    parts = []
    rows = [row for row in result["rows"] if row["question"] == "speed-up"]
    keys = dict.fromkeys((r["model"], r["kind"], r["sparsity"]) for r in rows if r["kind"] in ("even", "uneven"))
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    by = {(r["model"], r["kind"], r["sparsity"], r["batch"]): r for r in rows}
    if keys:
        table = []
        for model, kind, sparsity in keys:
            cells = []
            for batch in batches:
                row = by[model, kind, sparsity, batch]
                cells += [f"{row['flop_ratio']:.1f}", f"{row['speedup']:.1f}", f"{row['of_flop_ratio']:.2f}"]
                cells.append(f"{row['ceiling']:.1f}")
            table.append([f"{model}, {100 * sparsity:.0f} %, {kind}", *cells])
        columns = ["encoder, share cut"]
        for batch in batches:
            columns += [f"{batch} × {rows[0]['length']}: FLOP ratio", "speed-up", "of FLOP ratio", "ceiling"]
        parts.append(
            f"{markdown(columns, table)}\n\nCeiling: the speed-up if all that heads and neurons cost ran in proportion "
            "to its operations, and residual connections, norms and Python as they do."
        )
    if targets := [row for row in result["rows"] if row["question"] == "latency target"]:
        table = [
            [
                f"{row['model']}, {row['batch']} × {row['length']}",
                *(f"{row[name]:.3f}" for name in ("target", "by_table", "measured")),
                f"{100 * (row['measured'] / row['target'] - 1):+.1f} %",
            ]
            for row in targets
        ]
        parts.append(markdown(["share of the dense time", "target", "by the table", "measured", "off"], table))
    if steps := [row for row in result["rows"] if row["question"] == "step"]:
        table = [
            [
                f"{row['method']}, {row['batch']} × {row['length']} tokens",
                f"{row['baseline_ms']:.0f} ms",
                f"{row['ms'] + row['between_ms']:.0f} ms",
                f"{row['ratio']:.3f} ({' – '.join(f'{quartile:.3f}' for quartile in row['ratio_quartiles'])})",
            ]
            for row in steps
        ]
        parts.append(markdown(["one training step", "without pruning", "with", "ratio (quartiles)"], table))
    return "\n\n".join([*parts, f"Medians. {origin(result)}"])


def pruning_compiled(results: Path) -> str | None:
    """Speed-ups of compiled encoders beside those of others; None where there are no results."""
    result = _read(results / "pruning_compiled.json")
    if result is None:
        return None
    table = [
        [
            f"{row['model']}, {100 * row['sparsity']:.0f} %, {row['batch']} × {row['length']}, {row['kind']}",
            f"{row['ms']:.1f} ms", f"{row['flop_ratio']:.1f}", f"{row['speedup']:.1f}", f"{row['of_flop_ratio']:.2f}",
        ]
        for row in result["rows"]
        if row["sparsity"]
    ]  # fmt: skip
    columns = ["encoder, share cut", "time", "FLOP ratio", "speed-up over the dense one", "of FLOP ratio"]
    return f"{markdown(columns, table)}\n\nMedians; `compiled`: the dense one too. {origin(result)}"


def pruning(results: Path) -> str | None:
    """Schedules by task and sparsity, criteria by sparsity; None where there are no results."""
    result = _read(results / "pruning.json")
    if result is None:
        return None
    parts = []
    for kind, what in (("schedules", "schedule"), ("criteria", "criterion")):
        rows = {(r["task"], r["sparsity"], r["name"]): r for r in result["rows"] if r["kind"] == kind}
        tasks, sparsities, names = (list(dict.fromkeys(key[i] for key in rows)) for i in range(3))
        tasks.sort(key=list(_TASKS).index)
        if not rows:
            continue
        dense = [next(r["dense"] for key, r in rows.items() if key[0] == task) for task in tasks]
        table = []
        for sparsity in sparsities:
            found = []
            for name in names:
                mine = [rows.get((task, sparsity, name)) for task in tasks]
                kept = [100 * r["score"] / r["dense"] for r in mine if r is not None]
                if kept:
                    share = 100 * sum(r["score"] for r in mine if r) / sum(r["dense"] for r in mine if r)
                    found.append(([f"{100 * sparsity:.0f} %, {name}", *map(_score, mine)], share, len(kept)))
            # the best first, those that lack a task last
            found.sort(key=lambda row: (row[2], row[1]), reverse=True)
            table += [[*cells, f"{share:.1f} %" if count == len(tasks) else "–"] for cells, share, count in found]
        columns = [f"cut, {what}", *(_TASKS.get(task, task) for task in tasks), "of the dense mean"]
        seeds = {
            count: sorted({_TASKS[r["task"]] for r in rows.values() if r["seeds"] == count}) for count in (1, 2, 3)
        }
        words = [f"{count} ({', '.join(of)})" for count, of in seeds.items() if of]
        parts.append(
            f"{markdown(columns, [['dense', *(f'{score:.1f}' for score in dense), '100 %'], *table])}\n\n"
            f"Mean ± standard deviation; seeds: {', '.join(words)}."
        )
    return "\n\n".join([*parts, origin(result)])


def pruning_lm(results: Path) -> str | None:
    """Perplexity of a GPT-2 against sparsity, in four ways to get there; None where there are no results."""
    result = _read(results / "pruning_lm.json")
    if result is None:
        return None
    rows = result["rows"]
    words = {
        "one-shot": "one-shot",
        "one-shot, repaired": "one-shot, repaired",
        "pruned": "gradual, with recovery",
        "scratch": "same shape from scratch",
    }

    def cell(role: str, sparsity: float) -> str:
        found = [row["token_perplexity"] for row in rows if (row["role"], row["sparsity"]) == (role, sparsity)]
        return f"{statistics.mean(found):.1f}" if found else "–"

    dense = next(row for row in rows if row["role"] == "dense")
    table = [["dense", *[f"{dense['token_perplexity']:.1f}"] * len(words), _millions(dense)]]
    for sparsity in sorted({row["sparsity"] for row in rows if row["role"] != "dense"}):
        pruned = next((r for r in rows if r["role"] == "pruned" and r["sparsity"] == sparsity), dense)
        table.append([f"{100 * sparsity:.0f} %", *(cell(role, sparsity) for role in words), _millions(pruned)])
    columns = ["blocks' parameters cut", *words.values(), "parameters"]
    seeds = len({row["seed"] for row in rows if "seed" in row})
    return (
        f"{markdown(columns, table)}\n\nToken perplexity, WikiText-2, test; {result['setting']['steps']} steps of "
        f"training. {'One seed' if seeds == 1 else f'Means of {seeds} seeds'}. {origin(result)}"
    )


def pruning_peers(results: Path) -> str | None:
    """Quality, speed and saving beside torch-pruning; None where there are no results."""
    result = _read(results / "pruning_peers.json")
    if result is None:
        return None
    parts = []
    for dense in (row for row in result["rows"] if row["question"] == "dense"):
        table = [
            [
                "dense", f"{dense['score']:.1f}", "", f"{dense['ms_32']:.0f} ms", f"{dense['ms_1']:.1f} ms",
                f"{dense['encoder_gflops']:.2f}", f"{dense['encoder_parameters'] / 1e6:.2f} M", _millions(dense), "",
            ]
        ]  # fmt: skip
        setting = dense["task"], dense["target"]
        rows = [r for r in result["rows"] if r["question"] == "cut" and (r["task"], r["target"]) == setting]
        for row in rows:
            spread = f" ± {row['spread']:.1f}" if row["spread"] is not None else ""
            before = row["before_recovery"]
            error = row["reload_error"]
            reloads = "no" if error is None else "yes" if error < 1e-4 else "as another model"
            table.append(
                [
                    row["name"] + (" (extra)" if row["extra"] else ""), f"{row['score']:.1f}{spread}",
                    "–" if before is None else f"{before:.1f}", f"{row['ms_32']:.0f} ms", f"{row['ms_1']:.1f} ms",
                    f"{row['encoder_gflops']:.2f}", f"{row['encoder_parameters'] / 1e6:.2f} M", _millions(row), reloads,
                ]
            )  # fmt: skip
        seeds = max(row["seeds"] for row in rows)
        columns = [
            f"{_TASKS.get(dense['task'], dense['task'])}, {100 * dense['target']:.0f} % of the encoder cut, "
            + ("one seed" if seeds == 1 else f"{seeds} seeds"),
            "score", "before recovery", "encoder, 32 × 128", "encoder, 1 × 128", "GFLOPs", "encoder", "parameters",
            "reloads",
        ]  # fmt: skip
        parts.append(markdown(columns, table))
    gpt2 = [
        f"{row['library']} removes {100 * row['removed']:.0f} % of a GPT-2's blocks"
        + (f" ({row['failure']})" if row["failure"] else "")
        for row in result["rows"]
        if row["question"] == "gpt2"
    ]
    tables = "\n\n".join(parts)
    return (
        f"{tables}\n\nMean ± standard deviation where there are several seeds; torch-pruning "
        f"{result['setting']['torch-pruning']}. Asked for half, {' and '.join(gpt2)}. {origin(result)}"
    )


def quant_speed(results: Path) -> str | None:
    """Encoders, decoding and memory of packed models beside fp32 and others; None where there are no results."""
    result = _read(results / "quant_speed.json")
    if result is None:
        return None
    parts = []
    timed = [row for row in result["rows"] if "ms" in row]
    if rows := [row for row in timed if row["question"] == "encoder"]:
        by = {(r["method"], r["model"], r["batch"]): r for r in rows}
        places = dict.fromkeys((r["model"], r["batch"]) for r in rows)
        table = []
        for method in dict.fromkeys(row["method"] for row in rows):
            found = [by.get((method, *place)) for place in places]
            table.append([method, *(f"{r['ms']:.1f} ms, {r['speedup']:.2f} ×" if r else "–" for r in found)])
        columns = [f"{model}, {batch} × {rows[0]['length']}" for model, batch in places]
        parts.append(markdown(["encoder", *columns], table))
    if rows := [row for row in timed if row["question"] == "decoding"]:
        table = [[r["method"], f"{r['tokens_per_second']:.1f}", f"{r['speedup']:.2f} ×"] for r in rows]
        parts.append(markdown([f"{rows[0]['model']}, decoding, batch 1", "tokens/s", "over fp32"], table))
    if rows := [row for row in result["rows"] if row["question"] == "memory"]:
        table = [
            [
                r["method"] + ("" if r["method"] == "fp32" else f", {r['memory']}"),
                *(f"{r[name]:.1f} MiB" for name in ("file_mib", "resident_mib")), f"{100 * r['of_fp32']:.0f} %",
            ]
            for r in rows
        ]  # fmt: skip
        parts.append(markdown([f"{rows[0]['model']}, loaded", "file", "resident", "of fp32"], table))
    missing: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        if "not_run" in row:
            missing.setdefault((row["method"], row["not_run"]), []).append(row["model"])
    if missing:
        words = (f"{method} ({', '.join(models)}): {why}" for (method, why), models in missing.items())
        parts.append(f"Not run: {'; '.join(words)}.")
    others = ", ".join(f"{name} {version}" for name, version in result["setting"]["peers"].items() if version)
    return "\n\n".join([*parts, f"Medians, one process. {f'{others}. ' if others else ''}{origin(result)}"])


def qat_lm(results: Path) -> str | None:
    """Perplexity of a GPT-2 by quantizer and bits, and what contrast gives; None where there are no results."""
    result = _read(results / "qat_lm.json")
    if result is None:
        return None
    teacher, rows = result["rows"][0], result["rows"][1:]
    by = {(row["part"], row["bits"], row["method"]): row for row in rows}
    words = {
        "quantgpt": "QuantGPT",
        "quantgpt-no-contrast": "QuantGPT without contrast",
        "pact": "PACT",
        "lsq": "LSQ",
        "laq": "LAQ",
        "twn": "TWN",
        "tbt": "TBT, by row",
        "elastic": "ParetoQ, by row",
        "rtn": "to nearest, untrained",
        "rtn-row": "the same, by row",
        "gptq-row": "GPTQ, untrained, by row",
    }
    bits = list(dict.fromkeys(row["bits"] for row in rows))

    def cell(part: str, method: str, of: int) -> list[str]:
        row = by.get((part, of, method))
        if row is None:
            return ["–", "–"]
        spread = f" ± {row['spread']:.1f}" if row["spread"] is not None else ""
        return [f"{_perplexity(row['token_perplexity'])}{spread}", f"{row['rise']:+.1f} %"]

    sizes = {of: max((row for row in rows if row["bits"] == of), key=lambda row: row["bytes"]) for of in bits}
    table = [["teacher", *[_perplexity(teacher["token_perplexity"]), ""] * len(bits)]]
    for method, name in words.items():
        part = "rtn" if method.startswith(("rtn", "gptq")) else "grid"
        if any((part, of, method) in by for of in bits):
            table.append([name, *(text for of in bits for text in cell(part, method, of))])
    columns = ["token perplexity, WikiText-2, test"]
    for of in bits:
        columns += [f"{of}-{of}-8", "rise"]
    parts = [markdown(columns, table)]
    ablation = {
        "quantgpt": "negatives of the teacher, memory",
        "no-memory": "negatives of the teacher, no memory",
        "student-negatives": "negatives of the student, memory",
        "student-negatives-no-memory": "negatives of the student, no memory",
        "vocabulary-negatives": "negatives of the vocabulary, memory",
        "sequences": "sequences in place of tokens",
        "quantgpt-no-contrast": "no contrast",
    }
    if any(row["part"] == "ablation" for row in rows):
        table = []
        for method, name in ablation.items():
            row = by.get(("ablation", 2, method)) or by.get(("grid", 2, method))
            if row is not None:
                alike = f"{row['homogeneity_student']:.3f}" if "homogeneity_student" in row else "–"
                table.append([name, _perplexity(row["token_perplexity"]), f"{row['rise']:+.1f} %", alike])
        columns = ["QuantGPT's contrast, 2-2-8", "token perplexity", "rise", "mean cosine of two tokens"]
        parts.append(markdown(columns, table))
    seeds = sorted({row["seeds"] for row in rows if row["steps"]})
    size = ", ".join(f"{of} bits at most {_megabytes(sizes[of])}" for of in bits)
    steps = max((row["steps"] for row in rows), default=0)
    trained = f"{steps} steps of {result['setting']['batch']} × {result['setting']['block']} tokens. " if steps else ""
    return "\n\n".join(
        [
            *parts,
            f"Of the packed files, loaded again: {size}; teacher {_megabytes(teacher)}. {trained}"
            f"{_seed_counts(seeds)}{origin(result)}",
        ]
    )


def qat_glue(results: Path) -> str | None:
    """Scores of quantized BERTs by task and bits; None where there are no results."""
    result = _read(results / "qat_glue.json")
    if result is None:
        return None
    rows = [row for row in result["rows"] if row["kind"] != "teacher"]
    teachers = {row["task"]: row for row in result["rows"] if row["kind"] == "teacher"}
    tasks = sorted(teachers, key=list(_TASKS).index)
    mean = statistics.mean(row["score"] for row in teachers.values())
    first = teachers[tasks[0]]
    table = [["teacher", *(f"{teachers[t]['score']:.1f}" for t in tasks), "100 %", _megabytes(first)]]
    for bits, name in dict.fromkeys((row["bits"], row["name"]) for row in rows):
        mine = {row["task"]: row for row in rows if (row["bits"], row["name"]) == (bits, name)}
        kept = (
            f"{100 * statistics.mean(mine[task]['score'] for task in tasks) / mean:.1f} %"
            if mine.keys() == teachers.keys()
            else "–"
        )
        one = next(iter(mine.values()))
        trained = "" if one["kind"] == "trained" else ", untrained"
        table.append(
            [
                f"W{bits}-E{one['embeddings']}-A8, {name}{trained}",
                *(_score(mine.get(t)) for t in tasks),
                kept,
                _megabytes(one),
            ]
        )
    columns = ["GLUE, validation", *(_TASKS[task] for task in tasks), "of the teachers' mean", "weights"]
    seeds = sorted({row["seeds"] for row in rows if row["steps"]})
    return f"{markdown(columns, table)}\n\n{_seed_counts(seeds)}{origin(result)}"


def qat_overhead(results: Path) -> str | None:
    """Time of a quantization-aware step beside what it cannot avoid; None where there are no results."""
    result = _read(results / "qat_overhead.json")
    if result is None:
        return None
    words = {
        "baseline": "student + teacher's forward",
        "distillation": "distillation",
        "qat": "quantized, distillation",
        "qat + contrast": "quantized, distillation and contrast",
    }

    def ratio(row: Mapping[str, Any], other: str) -> str:
        if f"over_{other}" not in row:
            return ""
        quartiles = " – ".join(f"{quartile:.3f}" for quartile in row[f"over_{other}_quartiles"])
        return f"{row[f'over_{other}']:.3f} ({quartiles})"

    table = [
        [
            f"{row['model']}, {row['batch']} × {row['length']}: {words[row['way']]}",
            f"{row['ms']:.0f} ms", ratio(row, "baseline"), ratio(row, "qat"),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    columns = ["one training step", "time", "over the first (quartiles)", "over quantized (quartiles)"]
    return f"{markdown(columns, table)}\n\nMedians. {origin(result)}"


def coding(results: Path) -> str | None:
    """Entropy-coded checkpoints beside other coders; None where there are no results."""
    result = _read(results / "coding.json")
    if result is None:
        return None
    table, files = [], []
    for row in result["rows"]:
        if "not_run" in row:
            table.append([row["scheme"], row["coder"], f"not run: {row['not_run']}", "", ""])
            continue
        over = f"{row['over_shannon']:+.2f} %" if "over_shannon" in row else ""
        speed = f"{row['gb_per_second']:.1f}"
        table.append([row["scheme"], row["coder"], f"{row['bits_per_weight']:.3f}", over, speed])
        if "file_bytes" in row:
            sizes = {name: f"{size / 1e6:.1f} MB" for name, size in row["file_bytes"].items()}
            files.append([row["scheme"], *(sizes[name] for name in ("plain", "auto", "zstd", "huffman"))])
    columns = [
        "BERT-base shape, codes",
        "coder",
        "bits per weight",
        "over entropy",
        "decoded, GB of float32/s and core",
    ]
    whole = markdown(["whole file", "plain", "auto", "zstd", "huffman"], files)
    return f"{markdown(columns, table)}\n\n{whole}\n\nMedians. {origin(result)}"


def deep_compression(results: Path) -> str | None:
    """Errors and bytes of the LeNets after each stage of Deep Compression; None where there are no results."""

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [row["network"], row["stage"], _errors(row), f"{row['bytes'] / 1000:.1f} kB", f"{row['ratio']:.1f} ×"]

    columns = ["MNIST", "stage", "errors of 10,000", "file", "smaller"]
    return _row_by_row(results, "deep_compression", columns, cells)


def deep_compression_bert(results: Path) -> str | None:
    """Scores and bytes of BERTs after each stage of Deep Compression; None where there are no results."""

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [_TASKS[row["task"]], row["stage"], _score(row), _megabytes(row), f"{row['ratio']:.1f} ×"]

    columns = ["GLUE, validation", "stage", "score", "file", "smaller"]
    return _row_by_row(results, "deep_compression_bert", columns, cells)


def sparsity_overhead(results: Path) -> str | None:
    """Time of a step with sparsity or sharing over a plain one; None where there are no results."""
    result = _read(results / "sparsity_overhead.json")
    if result is None:
        return None

    def cells(row: Mapping[str, Any]) -> list[str]:
        quartiles = " – ".join(f"{quartile:.3f}" for quartile in row["ratio_quartiles"])
        return [f"{row['method']}, {row['batch']} × {row['length']}", f"{row['ratio']:.3f} ({quartiles})"]

    columns = [f"{result['rows'][0]['model']}, one training step", "over a plain one (quartiles)"]
    return f"{markdown(columns, map(cells, result['rows']))}\n\n{origin(result)}"


def hinton(results: Path) -> str | None:
    """Errors of students of labels and of soft targets; None where there are no results."""

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [row["name"], "-".join(map(str, row["units"])), _errors(row), str(row["published"])]

    return _row_by_row(results, "hinton", ["MNIST", "units", "errors of 10,000", "published"], cells)


def network_surgery(results: Path) -> str | None:
    """Errors of LeNets whose links were cut and spliced, and what is left; None where there are no results."""
    published = published_numbers("network_surgery")

    def cells(row: Mapping[str, Any]) -> list[str]:
        before, after, factor = published[row["network"]]
        paper = {"dense": [_count(before), "1 ×"], "surgery": [_count(after), f"{factor} ×"]}.get(row["role"], ["", ""])
        return [row["network"], row["role"], _errors(row), paper[0], f"{row['factor']:.1f} ×", paper[1]]

    columns = ["MNIST", "way", "errors of 10,000", "published", "fewer parameters", "published"]
    return _row_by_row(results, "network_surgery", columns, cells)


def structured_sparsity(results: Path) -> str | None:
    """Errors and widths of networks that lost whole units; None where there are no results."""
    published = published_numbers("structured_sparsity")

    def cells(row: Mapping[str, Any]) -> list[str]:
        before, after = published[row["network"]]
        errors = {"dense": _count(before), "group lasso": _count(after)}.get(row["role"], "")
        widths = "-".join(map(str, row["widths"]))
        return [row["network"], row["role"], widths, f"{row['left']:,.0f}", _errors(row), errors]

    columns = ["MNIST", "way", "widths", "weights left", "errors of 10,000", "published"]
    return _row_by_row(results, "structured_sparsity", columns, cells)


def iht(results: Path) -> str | None:
    """Networks that were trained by hard thresholding beside dense ones; None where there are no results."""

    def cells(row: Mapping[str, Any]) -> list[str]:
        found = _errors(row) if "errors" in row else f"score {row['score']:.1f}"
        return [row["network"], row["role"], f"{100 * row['sparsity']:.0f} %", found]

    return _row_by_row(results, "iht", ["from scratch", "way", "weights that are 0", "errors of 10,000"], cells)


def obd(results: Path) -> str | None:
    """Loss without retraining by what is removed, and the curves where they were drawn; None without results."""
    shares = (0.0, 0.5, 0.7, OBD_SHARE, 0.9)

    def cells(row: Mapping[str, Any]) -> list[str]:
        at = [row["removed"].index(share) for share in shares]
        return [row["network"], row["criterion"], *(f"{row['losses'][index]:.3g}" for index in at)]

    columns = ["MNIST, loss on training rows", "by", *(f"{100 * share:.0f} % removed" for share in shares)]
    table = _row_by_row(results, "obd", columns, cells)
    if table is None or not (results / "obd.svg").is_file():
        return table
    return f"{table}\n\n![loss and errors over the share removed](benchmarks/results/obd.svg)"


def grouped(results: Path) -> str | None:
    """Scores of BERTs of grouped matrices by the shuffle between them; None where there are no results."""
    result = _read(results / "grouped.json")
    if result is None:
        return None
    teachers = result["setting"]["teachers"]
    rows = [{"task": task, "shuffle": "teacher", "score": teachers[task], "spread": None} for task in teachers]
    share = max(row["share_of_products"] for row in result["rows"])
    made = f"{result['setting']['groups']} groups: {100 * share:.0f} % of the products of the matrices. "
    return f"{_by_task([*rows, *result['rows']], 'shuffle')}\n\n{made}{_how_made(result)}"


def attention_transfer(results: Path) -> str | None:
    """Scores of students by what they learn from; None where there are no results."""
    result = _read(results / "attention_transfer.json")
    return None if result is None else f"{_by_task(result['rows'], 'role')}\n\n{_how_made(result)}"


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
    found = {name: _read(results / f"{name}.json") for name in SEEDS}
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
    return markdown(["paper", "what", "published", "here", "all that was asked is met"], table)


def published_numbers(name: str) -> dict[str, Any]:
    """What ``PUBLISHED`` is in a benchmark of ``seeds/``, which is not imported for it; empty where there is none."""
    tree = ast.parse((ROOT / "benchmarks" / "seeds" / f"{name}.py").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PUBLISHED":
            return dict(ast.literal_eval(node.value))
    return {}


def asked(results: Path) -> str | None:
    """Every number that was asked of every benchmark, met or not; None where there are no results."""
    table = []
    for file in sorted(results.glob("*.json")):
        result = json.loads(file.read_text("utf-8"))
        for item in result["asked"]:
            measured = item["measured"]
            shown = f"{measured:.4g}" if isinstance(measured, (int, float)) else str(measured)
            verdict = "–" if item["target"] == "reported" else _yes(item["met"])
            table.append([f"{result['benchmark']}: {item['name']}", item["target"], shown, verdict])
    return markdown(["asked", "target", "measured", "met"], table) if table else None


TABLES: dict[str, Callable[[Path], str | None]] = {
    "distillation": distillation,
    "distillation_lm": distillation_lm,
    "trainer_overhead": trainer_overhead,
    "pruning": pruning,
    "pruning_speed": pruning_speed,
    "pruning_compiled": pruning_compiled,
    "pruning_lm": pruning_lm,
    "pruning_peers": pruning_peers,
    "qat_lm": qat_lm,
    "qat_glue": qat_glue,
    "qat_overhead": qat_overhead,
    "quant_speed": quant_speed,
    "coding": coding,
    "deep_compression": deep_compression,
    "deep_compression_bert": deep_compression_bert,
    "sparsity_overhead": sparsity_overhead,
    "network_surgery": network_surgery,
    "iht": iht,
    "structured_sparsity": structured_sparsity,
    "obd": obd,
    "hinton": hinton,
    "attention_transfer": attention_transfer,
    "grouped": grouped,
    "seeds": seeds,
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


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


def _row_by_row(
    results: Path, name: str, columns: Sequence[str], cells: Callable[[Mapping[str, Any]], list[str]]
) -> str | None:
    """A row of the table for each row of the results."""
    result = _read(results / f"{name}.json")
    return None if result is None else f"{markdown(columns, map(cells, result['rows']))}\n\n{_how_made(result)}"


def _by_task(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """Scores, a column for each task and a row for each value of the key."""
    by = {(row[key], row["task"]): row for row in rows}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    table = [[value, *(_score(by.get((value, task))) for task in tasks)] for value in dict.fromkeys(v for v, _ in by)]
    return markdown(["GLUE, validation", *(_TASKS[task] for task in tasks)], table)


def _how_made(result: Mapping[str, Any]) -> str:
    return f"{_seed_counts(sorted({row['seeds'] for row in result['rows']}))}{origin(result)}"


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
    named = f"{_TASKS.get(subject, subject)}: " if subject else ""
    return f"{named}{before:.2f} → {after:.2f} %" + (f", {factor:g} ×" if factor else "")


def _met(result: Mapping[str, Any]) -> str:
    verdicts = [item["met"] for item in result["asked"] if item["target"] != "reported"]
    return _yes(True) if all(verdicts) else f"{_yes(False)}, {sum(verdicts)} of {len(verdicts)}"


def _yes(met: bool) -> str:
    return "yes" if met else "**no**"


def _errors(row: Mapping[str, Any]) -> str:
    spread = f" ± {statistics.stdev(row['each']):.0f}" if len(row["each"]) > 1 else ""
    return f"{row['errors']:.0f}{spread}"


def _count(percent: float) -> str:
    """Per cent as errors of 10,000."""
    return f"{100 * percent:.0f}"


def _score(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    return f"{row['score']:.1f}" + (f" ± {row['spread']:.1f}" if row["spread"] is not None else "")


def _scores(rows: Sequence[Mapping[str, Any] | None]) -> list[str]:
    scores = [_score(row) for row in rows]
    return scores + [f"{row['of_teacher']:.1f} %" if row else "–" for row in rows[1:]]


def _seeds(rows: Iterable[Mapping[str, Any]]) -> str:
    by_count: dict[int, set[str]] = {}
    for row in rows:
        if row["role"] != "teacher":
            by_count.setdefault(row["seeds"], set()).add(_TASKS.get(row["task"], row["task"]))
    words = [
        f"{'one seed' if count == 1 else f'mean ± standard deviation of {count} seeds'}: {', '.join(sorted(tasks))}"
        for count, tasks in sorted(by_count.items(), reverse=True)
    ]
    return f"Students, {'; '.join(words)}. "


def _seed_counts(seeds: Sequence[int]) -> str:
    if not seeds:
        return ""
    return (
        "One seed. " if list(seeds) == [1] else f"Mean ± standard deviation of {' or '.join(map(str, seeds))} seeds. "
    )


def _perplexity(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _millions(row: Mapping[str, Any]) -> str:
    return f"{row['parameters'] / 1e6:.1f} M"


def _megabytes(row: Mapping[str, Any]) -> str:
    return f"{row['bytes'] / 1e6:.1f} MB"


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
