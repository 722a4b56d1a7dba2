"""Tables of quantization: language models, classifiers, and what a step costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabling import form

QUANTIZERS = {
    "quantgpt": "QuantGPT",
    "quantgpt-no-contrast": "QuantGPT without contrast",
    "pact": "PACT",
    "lsq": "LSQ",
    "laq": "LAQ",
    "twn": "TWN",
    "tbt": "TBT, by row",
    "elastic": "ParetoQ, by row",
    "rtn": "round-to-nearest, untrained",
    "rtn-row": "the same, by row",
    "gptq-row": "GPTQ, untrained, by row",
}
CONTRASTS = {
    "quantgpt": "negatives of the teacher, memory",
    "no-memory": "negatives of the teacher, no memory",
    "student-negatives": "negatives of the student, memory",
    "student-negatives-no-memory": "negatives of the student, no memory",
    "vocabulary-negatives": "negatives of the vocabulary, memory",
    "sequences": "sequences in place of tokens",
    "quantgpt-no-contrast": "no contrast",
}


def qat_lm(results: Path) -> str | None:
    """Perplexity of a GPT-2 by quantizer and bits, and what contrast gives; None where there are no results."""
    result = form.read(results / "qat_lm.json")
    if result is None:
        return None
    teacher, rows = result["rows"][0], result["rows"][1:]
    by = {(row["part"], row["bits"], row["method"]): row for row in rows}
    bits = list(dict.fromkeys(row["bits"] for row in rows))

    def cell(part: str, method: str, of: int) -> list[str]:
        row = by.get((part, of, method))
        if row is None:
            return ["–", "–"]
        spread = f" ± {row['spread']:.1f}" if row["spread"] is not None else ""
        return [f"{form.perplexity(row['token_perplexity'])}{spread}", f"{row['rise']:+.1f} %"]

    sizes = {of: max((row for row in rows if row["bits"] == of), key=lambda row: row["bytes"]) for of in bits}
    table = [["teacher", *[form.perplexity(teacher["token_perplexity"]), ""] * len(bits)]]
    for method, name in QUANTIZERS.items():
        part = "rtn" if method.startswith(("rtn", "gptq")) else "grid"
        if any((part, of, method) in by for of in bits):
            table.append([name, *(text for of in bits for text in cell(part, method, of))])
    columns = ["token perplexity, WikiText-2, test"]
    for of in bits:
        columns += [f"{of}-{of}-8", "rise"]
    parts = [form.markdown(columns, table)]
    if ablation := _contrast_table(by):
        parts.append(ablation)
    seeds = sorted({row["seeds"] for row in rows if row["steps"]})
    size = ", ".join(f"{of} bits at most {form.megabytes(sizes[of])}" for of in bits)
    steps = max((row["steps"] for row in rows), default=0)
    trained = f"{steps} steps of {result['setting']['batch']} × {result['setting']['block']} tokens. " if steps else ""
    return "\n\n".join(
        [
            *parts,
            f"Of the packed files, loaded again: {size}; teacher {form.megabytes(teacher)}. {trained}"
            f"{form.seed_counts(seeds)}{form.origin(result)}",
        ]
    )


def _contrast_table(by: Mapping[tuple[str, int, str], Mapping[str, Any]]) -> str | None:
    """Perplexity and homogeneity of tokens by kind of contrast; None where no ablation was run."""
    if not any(part == "ablation" for part, *_ in by):
        return None
    table = []
    for method, name in CONTRASTS.items():
        row = by.get(("ablation", 2, method)) or by.get(("grid", 2, method))
        if row is not None:
            alike = f"{row['homogeneity_student']:.3f}" if "homogeneity_student" in row else "–"
            table.append([name, form.perplexity(row["token_perplexity"]), f"{row['rise']:+.1f} %", alike])
    columns = ["QuantGPT's contrast, 2-2-8", "token perplexity", "rise", "mean cosine of two tokens"]
    return form.markdown(columns, table)


def qat_glue(results: Path) -> str | None:
    """Scores of quantized BERTs by task and bits; None where there are no results."""
    result = form.read(results / "qat_glue.json")
    if result is None:
        return None
    rows = [row for row in result["rows"] if row["kind"] != "teacher"]
    teachers = {row["task"]: row for row in result["rows"] if row["kind"] == "teacher"}
    tasks = sorted(teachers, key=list(form.TASKS).index)
    mean = statistics.mean(row["score"] for row in teachers.values())
    first = teachers[tasks[0]]
    table = [["teacher", *(f"{teachers[t]['score']:.1f}" for t in tasks), "100 %", form.megabytes(first)]]
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
                *(form.score(mine.get(t)) for t in tasks),
                kept,
                form.megabytes(one),
            ]
        )
    columns = ["GLUE, validation", *(form.TASKS[task] for task in tasks), "of the teachers' mean", "weights"]
    seeds = sorted({row["seeds"] for row in rows if row["steps"]})
    return f"{form.markdown(columns, table)}\n\n{form.seed_counts(seeds)}{form.origin(result)}"


def qat_overhead(results: Path) -> str | None:
    """Time of a quantization-aware step beside what it cannot avoid; None where there are no results."""
    result = form.read(results / "qat_overhead.json")
    if result is None:
        return None
    words = {
        "baseline": "student + teacher's forward",
        "baseline, again": "the same, again",
        "distillation": "distillation",
        "qat": "quantized, distillation",
        "qat + contrast": "quantized, distillation and contrast",
        "qat, all layers": "quantized, distillation of all layers (encoders' default)",
    }

    def name(row: Mapping[str, Any]) -> str:
        way, bf16 = row["way"].removesuffix(", bf16"), row["way"].endswith(", bf16")
        return words[way] + (", bf16" if bf16 else "")

    def of_fp32(row: Mapping[str, Any]) -> str:
        way = row["way"].removesuffix(", bf16")
        return form.quartiles(row, f"over_{way}", 3) if way != row["way"] else ""

    table = [
        [
            f"{row['model']}, {row['batch']} × {row['length']}{form.on(row)}: {name(row)}",
            form.times(row),
            *(form.quartiles(row, key, 3) if key in row else "" for key in ("over_baseline", "over_qat")),
            of_fp32(row),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    columns = ["one training step", "time", "over the first (quartiles)", "over quantized", "bf16 over fp32"]
    how = form.how_timed(result["rows"], lambda row: f"{row['model']}{form.on(row)}")
    return f"{form.markdown(columns, table)}\n\n{how} {form.origin(result)}"


def bf16_training(results: Path) -> str | None:
    """Quality and time of training in bfloat16 beside float32; None where there are no results."""
    result = form.read(results / "bf16_training.json")
    if result is None:
        return None
    ways = {"qat": "4-bit weights, distilled", "pruning": "30 % pruned by gates, distilled"}

    def cell(row: Mapping[str, Any], what: str, precision: str, digits: int) -> str:
        return f"{row[f'{what}_{precision}']:.{digits}f} ± {row[f'{what}_spread_{precision}']:.{digits}f}"

    def time(row: Mapping[str, Any]) -> str:
        if "ratio" not in row:
            return "–"
        return f"{row['ratio']:.2f} ({' – '.join(f'{quartile:.2f}' for quartile in row['quartiles'])})"

    table = [
        [
            f"{row['task']}, {ways[row['way']]}",
            *(cell(row, what, precision, digits) for what, digits in (("score", 2), ("divergence", 4))
              for precision in ("float32", "bfloat16")),
            time(row),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    columns = ["", "float32", "bfloat16", "KL, float32", "KL, bfloat16", "step, bfloat16 / float32 (quartiles)"]
    seeds = sorted({row["seeds"] for row in result["rows"]})
    note = (
        "Score of GLUE, or perplexity of WikiText-2; KL divergence from the teacher's answers. CPU time of steps, one "
        f"thread. {form.seed_counts(seeds)}{form.origin(result)}"
    )
    return f"{form.markdown(columns, table)}\n\n{note}"


def quantbart(results: Path) -> str | None:
    """Bytes of a BART-base, and ROUGE of a small BART by method and bits; None where there are no results."""
    result = form.read(results / "quantbart.json")
    if result is None:
        return None
    sizes = [row for row in result["rows"] if row["part"] == "sizes"]
    forms = {"plain": "packed", "base3": "five codes in a byte", "plain_zstd": "packed, Zstandard"}
    table = [
        [f"{row['bits']}-{row['bits']}-8", *(f"{row[key] / 2**20:.1f} MiB" if key in row else "–" for key in forms)]
        for row in sizes
    ]
    files = form.markdown(["BART-base's shape, random weights", *forms.values()], table)
    rows = [row for row in result["rows"] if row["part"] != "sizes"]
    if not rows:
        return f"{files}\n\nThe summaries were not measured yet. {form.origin(result)}"
    quality = form.markdown(
        ["SAMSum, test", "ROUGE-1", "ROUGE-2", "ROUGE-L", "file", "seeds"], [_summaries(row) for row in rows]
    )
    evaluated = result["setting"]["evaluated"]
    note = f"Greedy summaries of {evaluated} dialogues; mean ± standard deviation where there are several seeds."
    return f"{files}\n\n{quality}\n\n{note} {form.origin(result)}"


def _summaries(row: Mapping[str, Any]) -> list[str]:
    keys = ("rouge1", "rouge2", "rougeL")
    spreads = [f" ± {row[f'{key}_spread']:.2f}" if f"{key}_spread" in row else "" for key in keys]
    scores = [f"{row[key]:.2f}{spread}" for key, spread in zip(keys, spreads, strict=True)]
    size = f"{row['bytes'] / 1e6:.2f} MB"
    if row["part"] == "teacher":
        return ["teacher, float32", *scores, size, "one"]
    names = {"quantbart": "QuantBART", "quantbart-no-contrast": "the same without contrast", "lsq": "LSQ", "tbt": "TBT"}
    seeds = "one" if row["seeds"] == 1 else str(row["seeds"])
    return [f"{names[row['method']]}, {row['bits']}-{row['bits']}-8", *scores, size, seeds]


def smollm2(results: Path) -> str | None:
    """Perplexity, bytes and speed of SmolLM2-135M by method; None where there are no results."""
    result = form.read(results / "smollm2.json")
    if result is None:
        return None
    setting = result["setting"]

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [
            _smollm2_name(row["method"]),
            f"{row['token_perplexity']:.2f}",
            f"{row['rise']:+.1f} %",
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['speed_over_dense']:.2f} ×",
        ]

    columns = ["SmolLM2-135M-Instruct", "token perplexity", "rise", "weights", "decoding"]
    note = (
        f"First {setting['tokens']:,} tokens of WikiText-2's test text in windows of {setting['window']}. The dense "
        "model is the values of a Q4_1 file in float32: it has already lost what 4 bits cost. Bytes with the embedding "
        f"in float32. QAT and distillation: {setting['steps']} steps of one window, one seed. Decoding: greedy, batch "
        "1, over the dense model in the same process."
    )
    return f"{form.markdown(columns, map(cells, result['rows']))}\n\n{note} {form.origin(result)}"


def _smollm2_name(method: str) -> str:
    if method.startswith("cut-"):
        _, percent, *more = method.split("-")
        after = {"repair": ", matrices re-fitted", "distilled": ", matrices re-fitted, distilled"}
        return f"{percent} % of the blocks cut{''.join(after[one] for one in more)}"
    if method.startswith("w"):
        bits, scales, how, *zeros = method.split("-")
        shared = "by row" if scales == "row" else f"groups of {scales[1:]}"
        return f"{bits[1:]} bits, {shared}{', zero points' if zeros else ''}, {how.upper()}"
    return {"dense": "dense", "nf4-bitsandbytes": "NF4, bitsandbytes"}[method]
