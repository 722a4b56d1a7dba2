"""Tables of times: pruned and packed models beside dense ones and others'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tabling import form


def pruning_speed(results: Path) -> str | None:
    """Speed-ups beside FLOP ratios, latency targets, and what a step costs; None where there are no results."""
    result = form.read(results / "pruning_speed.json")
    if result is None:
        return None
    parts = [table] if (table := _speed_ups(result["rows"])) else []
    if targets := [row for row in result["rows"] if row["question"] == "latency target"]:
        table = [
            [
                f"{row['model']}, {row['batch']} × {row['length']}",
                *(f"{row[name]:.3f}" for name in ("target", "by_table", "measured")),
                f"{100 * (row['measured'] / row['target'] - 1):+.1f} %",
            ]
            for row in targets
        ]
        parts.append(form.markdown(["share of the dense time", "target", "by the table", "measured", "off"], table))
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
        parts.append(form.markdown(["one training step", "without pruning", "with", "ratio (quartiles)"], table))
    return "\n\n".join([*parts, f"Medians. {form.origin(result)}"])


def _speed_ups(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """Speed-ups of pruned encoders at each batch size; None where no row has one."""
    by = {
        (row["model"], row["kind"], row["sparsity"], row["batch"]): row
        for row in rows
        if row["question"] == "speed-up" and row["kind"] in ("even", "uneven")
    }
    if not by:
        return None
    batches = list(dict.fromkeys(batch for *_, batch in by))
    table = []
    for model, kind, sparsity in dict.fromkeys(key[:3] for key in by):
        cells = []
        for batch in batches:
            row = by[model, kind, sparsity, batch]
            cells += [f"{row['flop_ratio']:.1f}", f"{row['speedup']:.1f}", f"{row['of_flop_ratio']:.2f}"]
            cells.append(f"{row['ceiling']:.1f}")
        table.append([f"{model}, {100 * sparsity:.0f} %, {kind}", *cells])
    length = next(iter(by.values()))["length"]
    columns = ["encoder, share pruned"]
    for batch in batches:
        columns += [f"{batch} × {length}: FLOP ratio", "speed-up", "of FLOP ratio", "ceiling"]
    return (
        f"{form.markdown(columns, table)}\n\nCeiling: the speed-up if the time of heads and neurons were "
        "proportional to their operations and that of residual connections, norms and Python stayed as it is."
    )


def pruning_compiled(results: Path) -> str | None:
    """Speed-ups of compiled encoders beside those of others; None where there are no results."""
    result = form.read(results / "pruning_compiled.json")
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
    columns = ["encoder, share pruned", "time", "FLOP ratio", "speed-up over the dense one", "of FLOP ratio"]
    return f"{form.markdown(columns, table)}\n\nMedians; `compiled`: the dense one too. {form.origin(result)}"


def quant_speed(results: Path) -> str | None:
    """Encoders, decoding and memory of packed models beside fp32 and others; None where there are no results."""
    result = form.read(results / "quant_speed.json")
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
        parts.append(form.markdown(["encoder", *columns], table))
    if rows := [row for row in timed if row["question"] == "decoding"]:
        table = [[r["method"], f"{r['tokens_per_second']:.1f}", f"{r['speedup']:.2f} ×"] for r in rows]
        parts.append(form.markdown([f"{rows[0]['model']}, decoding, batch 1", "tokens/s", "over fp32"], table))
    if rows := [row for row in result["rows"] if row["question"] == "memory"]:
        table = [
            [
                r["method"] + ("" if r["method"] == "fp32" else f", {r['memory']}"),
                *(f"{r[name]:.1f} MiB" for name in ("file_mib", "resident_mib")), f"{100 * r['of_fp32']:.0f} %",
            ]
            for r in rows
        ]  # fmt: skip
        parts.append(form.markdown([f"{rows[0]['model']}, loaded", "file", "resident", "of fp32"], table))
    missing: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        if "not_run" in row:
            missing.setdefault((row["method"], row["not_run"]), []).append(row["model"])
    if missing:
        words = (f"{method} ({', '.join(models)}): {why}" for (method, why), models in missing.items())
        parts.append(f"Not run: {'; '.join(words)}.")
    others = ", ".join(f"{name} {version}" for name, version in result["setting"]["peers"].items() if version)
    return "\n\n".join([*parts, f"Medians, one process. {f'{others}. ' if others else ''}{form.origin(result)}"])
