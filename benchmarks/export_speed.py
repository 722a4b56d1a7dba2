"""How fast are exported models in their runtimes, beside torch and beside what the runtimes make of the same models?

Random weights: times do not depend on them. Rounding to nearest, one scale for each row, no training; static ranges
are those of random rows. Every model is in a process of its own and called in turn, in random order; the first is
timed twice in every round.

* Decoding: GPT-2 of small shape, whole calls of ``generate`` with its head and its keys and values: greedy, batches of
  1 and of 8 rows. What ONNX Runtime decodes is bound by memory: at batch 1 all codes are read for every token.
* Pruned encoders: BERT of MiniLM's shape, half pruned and unevenly, a block without heads, W8A8, at 1 x 128 and
  32 x 128, over the dense model in torch.

What is not installed is said in the rows.

    python benchmarks/export_speed.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from common import asked, write
from quant_speed import BF16, FP32, LENGTH, OURS, PROMPT, STATIC, W8A8, encoder, gpt2, made, packed
from speeds import add_threads, timed_rows
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from lmcompress.checkpoint.cutting import drop_heads, keep_heads, keep_neurons
from lmcompress.evaluation import Worker
from lmcompress.families import anatomy_of

NEW_TOKENS, SHAPE = 16, "MiniLM"
# shares of the heads and of the neurons of each block that stay: half of all, and none of one block's heads
HEADS, NEURONS = (0.75, 0.25, 0.5, 0.0, 0.6, 0.9), (0.6, 0.3, 0.5, 0.5, 0.4, 0.7)
TORCH_STATIC, ORT_STATIC, ORT_DYNAMIC = STATIC, "ONNX Runtime, our export, static", "ONNX Runtime, our export, dynamic"
OV_FP32, OV_BF16 = "OpenVINO, our export, fp32 rest", "OpenVINO, our export, bf16 rest"
# how many times as fast as fp32 in torch, by question and batch size
ASKED = {
    ("decoding", 1): {ORT_STATIC: 5.0},
    ("decoding", 8): {ORT_STATIC: 5.0},
    ("pruned encoder", 1): {ORT_DYNAMIC: 5.5, OV_FP32: 7.2, OV_BF16: 7.3},
    ("pruned encoder", 32): {ORT_DYNAMIC: 5.0, OV_FP32: 9.5, OV_BF16: 11.0},
}
Built = Mapping[str, tuple[Any, ...]]
"""What builds a model in its process and its arguments, by the name of the row."""


def half_pruned(quick: bool) -> Any:
    """An encoder with half of its heads and neurons, unevenly."""
    model = encoder(SHAPE, quick)
    set_seed(1)
    for block, heads, neurons in zip(anatomy_of(model).blocks, HEADS, NEURONS, strict=False):
        count = round(heads * block.num_heads)
        drop_heads(block) if count == 0 else keep_heads(block, torch.randperm(block.num_heads)[:count].tolist())
        width = round(neurons * block.ffn_width)
        keep_neurons(block, sorted(torch.randperm(block.ffn_width)[:width].tolist()))
    return model.eval()


def variant(question: str, quick: bool, way: str) -> Any:
    """A model of torch: as it is, cast, or packed in one of our ways."""
    model = gpt2(quick) if question == "decoding" else half_pruned(quick)
    if way == BF16:
        return model.bfloat16()
    return packed(model, OURS[way]) if way in OURS else model


def torch_dynamic(question: str, quick: bool) -> Any:
    """torch's own dynamic int8."""
    return peers.torch_dynamic(variant(question, quick, FP32), Path())


def exported(question: str, quick: bool, way: str, to: str, precision: str | None, folder: Path, threads: int) -> Any:
    """An export of ours, made in the process that runs it."""
    own = folder / f"{question} {way} {to}".replace(" ", "_")
    own.mkdir(exist_ok=True)
    return peers.exported(partial(variant, question, quick, way), own, threads, to, precision)


def ours(question: str, quick: bool, folder: Path, threads: int) -> dict[str, tuple[Any, ...]]:
    """Packed models in torch, and exports."""
    built: dict[str, tuple[Any, ...]] = {way: (variant, question, quick, way) for way in (BF16, W8A8, STATIC)}
    built["torch dynamic int8"] = (torch_dynamic, question, quick)
    exports = {
        "ONNX Runtime, fp32": (FP32, "onnx", None),
        ORT_STATIC: (STATIC, "onnx", None),
        ORT_DYNAMIC: (W8A8, "onnx", None),
        "OpenVINO, fp32": (FP32, "openvino", "f32"),
        OV_FP32: (STATIC, "openvino", "f32"),
        OV_BF16: (STATIC, "openvino", "bf16"),
    }
    for row, how in exports.items():
        built[row] = (exported, question, quick, *how, folder, threads)
    return built


def theirs(quick: bool, folder: Path, threads: int) -> dict[str, tuple[Any, ...]]:
    """What the runtimes' own quantization makes of the pruned encoder."""
    make = partial(half_pruned, quick)
    return {
        "ONNX Runtime's quantize_dynamic": (peers.onnxruntime_model, make, folder, threads, True),
        "OpenVINO int8 by nncf, fp32 rest": (peers.openvino_model, make, folder, threads, "f32", True),
        "OpenVINO int8 by nncf, bf16 rest": (peers.openvino_model, make, folder, threads, "bf16", True),
    }


def measured(question: str, first: tuple[Any, ...], built: Built, threads: int, options: Any) -> list[dict[str, Any]]:
    """Rows of a question at both batch sizes."""
    quick, decodes = options.quick, question == "decoding"
    prompt = torch.zeros(1, 4, dtype=torch.long)
    chosen = {name: how for name, how in built.items() if not options.methods or options.methods in name}
    length = PROMPT if decodes else 16 if quick else LENGTH
    rows: list[dict[str, Any]] = []
    about = {"question": question, "model": "GPT-2 small" if decodes else SHAPE, "length": length}
    how: dict[str, Any] = {"mode": "generate", "new_tokens": 3 if quick else NEW_TOKENS} if decodes else {}
    with ExitStack() as stack:

        def start(arguments: tuple[Any, ...]) -> Worker:
            return stack.enter_context(Worker(*arguments, threads=threads))

        makers = {name: partial(start, arguments) for name, arguments in {FP32: first, **chosen}.items()}
        models, missing = made(makers, lambda model: model(input_ids=prompt, attention_mask=torch.ones_like(prompt)))
        for batch in (1, 2 if quick else 8 if decodes else 32):
            rows += timed_rows(
                about, models, threads=threads, batch_sizes=(batch,), sequence_length=length, warmup=1,
                repeats=options.repeats or (3 if quick else 9), **how,
            )  # fmt: skip
    if decodes:
        for row in rows:
            spent = row["cpu_ms" if row["clock"] == "cpu" else "ms"]
            row["tokens_per_second"] = 1000 * how["new_tokens"] * row["batch"] / spent
    return rows + [{**about, "threads": threads, "method": name, "not_run": why} for name, why in missing.items()]


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked, on one thread."""
    found = []
    for row in rows:
        wanted = ASKED.get((row["question"], row.get("batch", 0)), {}).get(row["method"])
        if wanted is not None and row["threads"] == 1:
            name = f"{row['question']}, {row['method']}, batch {row['batch']}, over fp32 in torch"
            met = row["speedup"] >= wanted
            found.append(asked(name, f">= {wanted}", row["speedup"], met, busy=row["busy"]))
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    questions = ("decoding", "pruned encoder")
    parser.add_argument("--questions", nargs="+", choices=questions, default=questions)
    parser.add_argument("--methods", default="", help="only models whose names contain this, beside fp32")
    parser.add_argument("--repeats", type=int, help="rounds of every question; default: 9")
    parser.add_argument("--quick", action="store_true", help="a layer of 64 for each model, few rows and rounds")
    add_threads(parser, (1,))
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for threads in options.threads[:1] if options.quick else options.threads:
            torch.set_num_threads(threads)
            for question in options.questions:
                quick = options.quick
                built, first = ours(question, quick, folder, threads), (encoder, SHAPE, quick)
                if question == "decoding":
                    first = (gpt2, quick)
                else:
                    built |= {"fp32, pruned": (half_pruned, quick)} | theirs(quick, folder, threads)
                rows += measured(question, first, built, threads, options)
    wanted = verdicts(rows)
    for line in rows + wanted:
        print(line)
    setting = {"peers": peers.versions(), "heads": HEADS, "neurons": NEURONS, "new_tokens": NEW_TOKENS}
    print(write("export_speed", rows, wanted, quick=options.quick, setting=setting))


if __name__ == "__main__":
    main()
