"""Tables of structured pruning: schedules and criteria, language models, another library."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabling import form


def pruning(results: Path) -> str | None:
    """Schedules by task and sparsity, criteria by sparsity; None where there are no results."""
    result = form.read(results / "pruning.json")
    if result is None:
        return None
    parts = []
    for kind, what in (("schedules", "schedule"), ("criteria", "criterion")):
        rows = {(r["task"], r["sparsity"], r["name"]): r for r in result["rows"] if r["kind"] == kind}
        tasks, sparsities, names = (list(dict.fromkeys(key[i] for key in rows)) for i in range(3))
        tasks.sort(key=list(form.TASKS).index)
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
                    found.append(([f"{100 * sparsity:.0f} %, {name}", *map(form.score, mine)], share, len(kept)))
            # the best first, those that lack a task last
            found.sort(key=lambda row: (row[2], row[1]), reverse=True)
            table += [[*cells, f"{share:.1f} %" if count == len(tasks) else "–"] for cells, share, count in found]
        columns = [f"share pruned, {what}", *(form.TASKS.get(task, task) for task in tasks), "of the dense mean"]
        seeds = {
            count: sorted({form.TASKS[r["task"]] for r in rows.values() if r["seeds"] == count}) for count in (1, 2, 3)
        }
        words = [f"{count} ({', '.join(of)})" for count, of in seeds.items() if of]
        parts.append(
            f"{form.markdown(columns, [['dense', *(f'{score:.1f}' for score in dense), '100 %'], *table])}\n\n"
            f"Mean ± standard deviation; seeds: {', '.join(words)}."
        )
    return "\n\n".join([*parts, form.origin(result)])


def pruning_lm(results: Path) -> str | None:
    """Perplexity of a GPT-2 against sparsity, in four ways to get there; None where there are no results."""
    result = form.read(results / "pruning_lm.json")
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
    table = [["dense", *[f"{dense['token_perplexity']:.1f}"] * len(words), form.millions(dense)]]
    for sparsity in sorted({row["sparsity"] for row in rows if row["role"] != "dense"}):
        pruned = next((r for r in rows if r["role"] == "pruned" and r["sparsity"] == sparsity), dense)
        table.append([f"{100 * sparsity:.0f} %", *(cell(role, sparsity) for role in words), form.millions(pruned)])
    columns = ["share of the blocks' parameters pruned", *words.values(), "parameters"]
    seeds = len({row["seed"] for row in rows if "seed" in row})
    means = "One seed" if seeds == 1 else f"Means of {seeds} seeds"
    return (
        f"{form.markdown(columns, table)}\n\nToken perplexity, WikiText-2, test; {result['setting']['steps']} steps "
        f"of training. {means}. {form.origin(result)}"
    )


def pruning_peers(results: Path) -> str | None:
    """Quality, speed and saving beside torch-pruning; None where there are no results."""
    result = form.read(results / "pruning_peers.json")
    if result is None:
        return None
    parts = []
    for dense in (row for row in result["rows"] if row["question"] == "dense"):
        table = [
            [
                "dense", f"{dense['score']:.1f}", "", *_times(dense),
                f"{dense['encoder_gflops']:.2f}", f"{dense['encoder_parameters'] / 1e6:.2f} M",
                form.millions(dense), "",
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
                    "–" if before is None else f"{before:.1f}", *_times(row),
                    f"{row['encoder_gflops']:.2f}", f"{row['encoder_parameters'] / 1e6:.2f} M",
                    form.millions(row), reloads,
                ]
            )  # fmt: skip
        seeds = max(row["seeds"] for row in rows)
        columns = [
            f"{form.TASKS.get(dense['task'], dense['task'])}, {100 * dense['target']:.0f} % of the encoder pruned, "
            + ("one seed" if seeds == 1 else f"{seeds} seeds"),
            "score", "before recovery", "encoder, 32 × 128", "encoder, 1 × 128", "GFLOPs", "encoder", "parameters",
            "reloads",
        ]  # fmt: skip
        parts.append(form.markdown(columns, table))
    gpt2 = [
        f"{row['library']} removes {100 * row['removed']:.0f} % of a GPT-2's blocks"
        + (f" ({row['failure']})" if row["failure"] else "")
        for row in result["rows"]
        if row["question"] == "gpt2"
    ]
    tables = "\n\n".join(parts)
    return (
        f"{tables}\n\nMean ± standard deviation where there are several seeds; torch-pruning "
        f"{result['setting']['torch-pruning']}. Asked for half, {' and '.join(gpt2)}. {form.origin(result)}"
    )


def vocabulary(results: Path) -> str | None:
    """Bytes of models with fewer tokens, and the other texts that are tokenized as before; None without results."""
    result = form.read(results / "vocabulary.json")
    if result is None:
        return None
    table = []
    for row in result["rows"]:
        shares = row.get("unchanged", {})
        less = 1 - row["bytes_after"] / row["bytes_before"]
        tokenizer = [f"{row[key] / 1e6:.1f}" for key in ("tokenizer_before", "tokenizer_after") if key in row]
        table.append(
            [
                row["model"],
                f"{row['rows_before']:,} → {row['rows_after']:,}",
                f"{row['bytes_before'] / 1e6:.1f} → {row['bytes_after'] / 1e6:.1f} MB",
                f"{100 * less:.1f} %",
                f"{' → '.join(tokenizer)} MB" if tokenizer else "–",
                f"{row['texts_changed']} of {row['texts']:,}" if "texts" in row else "–",
                *(f"{100 * shares[language]:.1f} %" if language in shares else "–" for language in ("en", "fr")),
                f"{row['seconds']:.0f} s",
            ]
        )
    columns = [
        "model", "tokens", "weights", "fewer bytes", "tokenizer's files", "its texts changed",
        "other English texts as before", "other French texts as before", "time",
    ]  # fmt: skip
    return f"{form.markdown(columns, table)}\n\n{form.origin(result)}"


def _times(row: Mapping[str, Any]) -> list[str]:
    """CPU and wall times of an encoder at both batch sizes."""
    found = []
    for batch in (32, 1):
        both = {key: row[f"{key}_{batch}"] for key in ("ms", "cpu_ms") if f"{key}_{batch}" in row}
        found.append(form.times(both))
    return found
