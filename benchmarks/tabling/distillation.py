"""Tables of distillation: classifiers, language models, and what a step costs."""

from __future__ import annotations

import statistics
from pathlib import Path

from tabling import form


def distillation(results: Path) -> str | None:
    """Teacher, student with it, student without it, for every task; None where there are no results."""
    result = form.read(results / "distillation.json")
    if result is None:
        return None
    rows = {(row["task"], row["role"]): row for row in result["rows"]}
    tasks = [task for task in dict.fromkeys(row["task"] for row in result["rows"]) if (task, "distilled") in rows]
    roles = ("teacher", "distilled", "control")
    table = [[form.TASKS.get(task, task), *form.scores([rows.get((task, role)) for role in roles])] for task in tasks]
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
        f"Teacher: {form.millions(teacher)} parameters, {form.megabytes(teacher)}; students: "
        f"{form.millions(student)}, {form.megabytes(student)} (the embeddings are not compressed). "
    )
    return f"{form.markdown(columns, table)}\n\n{size}{form.seeds_by_task(rows.values())}{form.origin(result)}"


def distillation_lm(results: Path) -> str | None:
    """Perplexity of a GPT-2 and of its halves; None where there are no results."""
    result = form.read(results / "distillation_lm.json")
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
            table.append([name, *(f"{mean:.1f}" for mean in means), form.millions(rows[0]), form.megabytes(rows[0])])
    columns = ["GPT-2, WikiText-2, test", "token perplexity", "word perplexity", "parameters", "weights"]
    seeds = max(sum(row["role"] == role for row in result["rows"]) for role in words)
    means = "One seed" if seeds == 1 else f"Means of {seeds} seeds"
    return f"{form.markdown(columns, table)}\n\n{means}. {form.origin(result)}"


def trainer_overhead(results: Path) -> str | None:
    """Time of a distillation step beside what it cannot avoid; None where there are no results."""
    result = form.read(results / "trainer_overhead.json")
    if result is None:
        return None
    timed = [row for row in result["rows"] if "ratio" in row]
    table = [
        [
            f"{row['model']}, {row.get('batch', row.get('rows'))} × {row['length']} tokens{form.on(row)}"
            + (", again" if row.get("kind") == "again" else ""),
            f"{row['baseline_ms']:.0f} ms",
            form.times({"ms": row.get("lmcompress_ms")} | row),
            form.quartiles(row, "ratio", 3),
        ]
        for row in timed
    ]
    columns = ["one training step", "student + teacher's forward", "distillation", "ratio (quartiles)"]
    text = form.markdown(columns, table)
    for row in result["rows"]:
        if memory := row.get("peak_memory_mib"):
            parts = ", ".join(f"{way} {mib:,.0f} MiB" for way, mib in memory.items())
            text += f"\n\nPeak memory of the {row['model']} step: {parts}."
    how = form.how_timed(timed, lambda row: f"{row['model']}{form.on(row)}")
    return f"{text}\n\n{how} {form.origin(result)}"
