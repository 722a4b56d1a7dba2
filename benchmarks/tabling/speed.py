"""Tables of times: pruned and packed models beside dense ones and others'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabling import form


def pruning_speed(results: Path) -> str | None:
    """Speed-ups beside FLOP ratios, latency targets, and what a step costs; None where there are no results."""
    result = form.read(results / "pruning_speed.json")
    if result is None:
        return None
    parts = [table] if (table := _speed_ups(result["rows"])) else []
    if targets := [row for row in result["rows"] if row["question"] == "latency target" and "target" in row]:
        table = [
            [
                _place(row),
                *(f"{row[name]:.3f}" for name in ("target", "by_table", "measured")),
                f"{100 * (row['measured'] / row['target'] - 1):+.1f} %",
            ]
            for row in targets
        ]
        parts.append(form.markdown(["share of the dense time", "target", "by the table", "measured", "off"], table))
    if steps := [row for row in result["rows"] if row["question"] == "step"]:
        table = [
            [
                f"{row['method']}, {row['batch']} × {row['length']} tokens{form.on(row)}",
                f"{row['baseline_ms']:.0f} ms",
                form.times(row),
                form.quartiles(row, "ratio", 3),
            ]
            for row in steps
        ]
        parts.append(form.markdown(["one training step", "without pruning", "with", "ratio (quartiles)"], table))
    how = form.how_timed(result["rows"], _place)
    return "\n\n".join([*parts, f"{how} {form.origin(result)}"])


def _place(row: Mapping[str, Any]) -> str:
    """Where a row was timed."""
    batch, length = row["batch"], row.get("length", row.get("prompt"))
    return f"{row['model']}, {batch} × {length}{form.on(row)}"


def _speed_ups(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """Speed-ups of pruned encoders at each batch size, a table for each number of threads; None without any."""
    found = [row for row in rows if row["question"] == "speed-up" and _named(row)]
    if not found:
        return None
    parts = []
    for threads in dict.fromkeys(row.get("threads") for row in found):
        by = {(_named(row), row["batch"]): row for row in found if row.get("threads") == threads}
        batches = list(dict.fromkeys(batch for _, batch in by))
        table = []
        for name in dict.fromkeys(name for name, _ in by):
            cells = []
            for batch in batches:
                row = by[name, batch]
                cells += [form.times(row), f"{row['flop_ratio']:.1f}", form.quartiles(row, "speedup")]
                cells += [f"{row['of_flop_ratio']:.2f}", f"{row['ceiling']:.1f}"]
            table.append([name, *cells])
        row = next(iter(by.values()))
        columns = [f"encoder, share pruned{form.on(row)}"]
        for batch in batches:
            columns += [f"{batch} × {row['length']}: time", "FLOP ratio", "speed-up", "of FLOP ratio", "ceiling"]
        parts.append(form.markdown(columns, table))
    return "\n\n".join(
        [
            *parts,
            "Ceiling: the speed-up if the time of heads and neurons were proportional to their operations and that of "
            "residual connections, norms and Python stayed as it is.",
        ]
    )


def _named(row: Mapping[str, Any]) -> str | None:
    """Name of an encoder's row; None for those that are not shown."""
    if row.get("timing") == "again" or row["kind"] == "bf16":
        return f"{row['model']}, {'dense, again' if row['kind'] == 'dense' else 'dense, bf16'}"
    if row["kind"] not in ("even", "uneven"):
        return None
    return f"{row['model']}, {100 * row['sparsity']:.0f} %, {row['kind']}"


def pruning_compiled(results: Path) -> str | None:
    """Speed-ups of compiled encoders beside those of others; None where there are no results."""
    result = form.read(results / "pruning_compiled.json")
    if result is None:
        return None
    table = [
        [
            f"{row['model']}, {100 * row['sparsity']:.0f} %, {row['batch']} × {row['length']}{form.on(row)}, "
            + ("again" if row.get("timing") == "again" else row["kind"]),
            form.times(row), f"{row['flop_ratio']:.1f}", f"{row['speedup']:.2f}", f"{row['of_flop_ratio']:.2f}",
        ]
        for row in result["rows"]
        if row["sparsity"] or row.get("timing") == "again"
    ]  # fmt: skip
    columns = ["encoder, share pruned", "time", "FLOP ratio", "speed-up over the dense one", "of FLOP ratio"]
    how = form.how_timed(result["rows"], _place)
    return f"{form.markdown(columns, table)}\n\n{how} `compiled`: the dense one too. {form.origin(result)}"


def quant_speed(results: Path) -> str | None:
    """Encoders, decoding and memory of packed models beside fp32 and others; None where there are no results."""
    result = form.read(results / "quant_speed.json")
    if result is None:
        return None
    timed = [row for row in result["rows"] if "ms" in row]
    parts = _by_question(timed)
    parts += _deviations(timed)
    if rows := [row for row in result["rows"] if row["question"] == "memory"]:
        table = [
            [
                r["method"] + ("" if r["method"] == "fp32" else f", {r['memory']}"),
                *(f"{r[name]:.1f} MiB" for name in ("file_mib", "resident_mib")), f"{100 * r['of_fp32']:.0f} %",
            ]
            for r in rows
        ]  # fmt: skip
        parts.append(form.markdown([f"{rows[0]['model']}, loaded", "file", "resident", "of fp32"], table))
    return "\n\n".join([*parts, *_how_made(result, timed)])


def export_speed(results: Path) -> str | None:
    """Exported models in their runtimes beside torch and the runtimes' own quantization; None without results."""
    result = form.read(results / "export_speed.json")
    if result is None:
        return None
    timed = [row for row in result["rows"] if "ms" in row]
    return "\n\n".join([*_by_question(timed), *_how_made(result, timed)])


def _by_question(timed: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table for each question and number of threads."""
    places = dict.fromkeys((row["question"], row.get("threads")) for row in timed)
    return [_side_by_side([r for r in timed if (r["question"], r.get("threads")) == place]) for place in places]


def _how_made(result: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was not run and why, and how times came about."""
    missing: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        if "not_run" in row:
            missing.setdefault((row["method"], row["not_run"]), []).append(row["model"])
    words = (f"{method} ({', '.join(dict.fromkeys(of))}): {why}" for (method, why), of in missing.items())
    others = ", ".join(f"{name} {version}" for name, version in result["setting"]["peers"].items() if version)
    how = f"{form.how_timed(timed, _place)} {f'{others}. ' if others else ''}{form.origin(result)}"
    return [f"Not run: {'; '.join(words)}.", how] if missing else [how]


def _side_by_side(rows: Sequence[Mapping[str, Any]]) -> str:
    """Times of one question on one number of threads: a row for each method, two columns for each model and batch."""
    by = {(row["method"], row["model"], row["batch"]): row for row in rows}
    places = dict.fromkeys((row["model"], row["batch"]) for row in rows)
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for place in places:
            row = by.get((method, *place))
            speed = f", {row['tokens_per_second']:.0f} tokens/s" if row and "tokens_per_second" in row else ""
            cells += [form.times(row) + speed, f"{form.quartiles(row, 'speedup')} ×"] if row else ["–", "–"]
        table.append([method, *cells])
    decodes = rows[0]["question"] == "decoding"
    columns = [f"{rows[0]['question']}{form.on(rows[0])}"]
    for model, batch in places:
        of = f"{model}, batch {batch}" if decodes else f"{model}, {batch} × {rows[0]['length']}"
        columns += [of, "over fp32"]
    return form.markdown(columns, table)


def _deviations(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """How far logits are from those of fp32, a column for each model; nothing where it was not measured."""
    by = {(row["method"], row["model"]): row["deviation"] for row in rows if row.get("deviation")}
    models = list(dict.fromkeys(model for _, model in by))
    table = [
        [method, *(f"{by[method, model]:.4f}" if (method, model) in by else "–" for model in models)]
        for method in dict.fromkeys(method for method, _ in by)
        if "compiled" not in method
    ]
    return [form.markdown(["max abs difference of logits from fp32", *models], table)] if table else []
