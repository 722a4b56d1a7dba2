"""How well does a sentence encoder of half or a third of the layers rate similarity, and one in 8 bits?

Teacher: all-MiniLM-L6-v2 (6 layers, 384 wide) as it is published, which was not trained on STS-B. Students: 3 and 2 of
its layers. ``cut`` is the layers alone, ``distilled`` the same layers after some hundred steps on unlabelled sentences
(GLUE's training sentences and SNLI's, no validation rows, no ratings): the squared distance of its normalized sentence
embeddings to the teacher's, in bfloat16 arithmetic with float32 weights. Both have the same shape, so the same latency.
``int8`` is round to nearest, 8 bits in weights, embeddings and activations, without training.

Spearman's correlation of cosines and ratings × 100 on STS-B's 1,500 validation pairs (its test ratings are not at
hand). Speed is the median of paired ratios of one thread's CPU time in one process, 32 sentences of 32 tokens.

    python benchmarks/sentence_embeddings.py --data ../shared/data --work runs
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import asked, once, train_and_report, training_parser, write
from datasets import Dataset
from teachers import minilm_path
from transformers import DataCollatorWithPadding, TrainingArguments, set_seed

from lmcompress.distillation import DistillationConfig, Match
from lmcompress.evaluation import compare_latency, similarity_metrics, size_on_disk
from lmcompress.quantization import quantize
from lmcompress.sentences import SentenceEncoder
from lmcompress.students.layers import by_layers
from lmcompress.trainers import DistillationTrainer

LAYERS = (3, 2)
SEEDS = 3
STEPS, BATCH, LENGTH = 400, 64, 48
LEARNING_RATE = 3e-4
SOURCES = {
    "glue/stsb/train": ("sentence1", "sentence2"),
    "glue/mnli/train_subset": ("premise", "hypothesis"),
    "glue/qqp/train_subset": ("question1", "question2"),
    "glue/mrpc/train": ("sentence1", "sentence2"),
    "extra/snli/train_subset": ("premise", "hypothesis"),
}
# sentence-transformers' figures for a 12-layer teacher: Spearman × 100 of the teacher, of 6 layers, of 3 layers
PUBLISHED = {"teacher": 85.44, "half of the layers (1.7 x)": 85.23, "a quarter of the layers (2.8 x)": 84.39}


def encoder_of(folder: Path | None = None) -> SentenceEncoder:
    """The published encoder, or one of those made here."""
    return SentenceEncoder.from_pretrained(minilm_path() if folder is None else folder)


def table(data: Path, name: str) -> Dataset:
    """One split as it lies in the data folder."""
    return Dataset.from_parquet(str(data / f"{name}.parquet"), keep_in_memory=True)


@cache
def texts_of(data: Path) -> tuple[str, ...]:
    """Unlabelled training sentences, each once, in random order."""
    texts = {
        text
        for name, columns in SOURCES.items()
        if (data / f"{name}.parquet").is_file()
        for column in columns
        for text in table(data, name)[column]
    }
    drawn = sorted(texts)
    random.Random(0).shuffle(drawn)
    return tuple(drawn)


def spearman(encoder: SentenceEncoder, options: argparse.Namespace) -> float:
    """Spearman × 100 on the validation pairs."""
    rows = table(options.data, "glue/stsb/validation")
    rows = rows.select(range(64)) if options.quick else rows
    first, second = (encoder.encode(rows[column][:], 64) for column in ("sentence1", "sentence2"))
    return 100 * similarity_metrics(first, second, rows["label"][:])["spearmanr"]


def measured(encoder: SentenceEncoder, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Save, and what the saved folder is worth."""
    encoder.save_pretrained(folder, batches=[encoder.tokenize(texts_of(options.data)[:16])])
    again = encoder_of(folder)
    return {"spearman": spearman(again, options), "bytes": size_on_disk(folder).weights_bytes}


def distilled(options: argparse.Namespace, folder: Path, layers: int, seed: int) -> dict[str, Any]:
    """A student of some of the layers, taught the embeddings."""
    set_seed(seed)
    teacher, made = encoder_of(), encoder_of()
    student = by_layers(teacher.model, layers, choose="skip").model
    student.get_input_embeddings().requires_grad_(False)
    steps = 5 if options.quick else STEPS
    texts = texts_of(options.data)
    chosen = [texts[i] for i in torch.randperm(len(texts))[: steps * BATCH].tolist()]
    rows = Dataset.from_dict(dict(teacher.tokenizer(chosen, truncation=True, max_length=LENGTH)))
    match = Match(loss="embedding_mse", student=-1, teacher=-1, options={"pooling": teacher.pooling})
    args = TrainingArguments(
        str(folder / "checkpoints"), learning_rate=LEARNING_RATE, per_device_train_batch_size=BATCH, max_steps=steps,
        warmup_steps=0.06, optim="adamw_torch_fused", bf16=True, seed=seed, train_sampling_strategy="group_by_length",
        save_strategy="no", logging_steps=50, report_to="none", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = DistillationTrainer(
        student, args, teacher=teacher.model, train_dataset=rows,
        distillation=DistillationConfig(weight=0.0, label_weight=0.0, matches=(match,)),
        data_collator=DataCollatorWithPadding(teacher.tokenizer),
    )  # fmt: skip
    start = time.time()
    trainer.train()
    made.model = student.eval()
    return {"seconds": round(time.time() - start), "steps": steps} | measured(made, folder / "model", options)


def cut(options: argparse.Namespace, folder: Path, layers: int) -> dict[str, Any]:
    """The same layers, not trained."""
    made = encoder_of()
    made.model = by_layers(made.model, layers, choose="skip").model.eval()
    return measured(made, folder / "model", options)


def packed(options: argparse.Namespace, folder: Path, source: Path | None) -> dict[str, Any]:
    """An encoder in 8 bits, without training."""
    made = encoder_of(source)
    quantize(made.model, progress=False)
    return measured(made, folder / "model", options)


def run(options: argparse.Namespace, work: Path) -> None:
    """Make and measure every encoder that is missing."""
    first, eight = work / "teacher", work / "int8"
    once(first, {"model": "teacher", "layers": 6}, lambda: measured(encoder_of(), first / "model", options))
    once(eight, {"model": "int8", "layers": 6}, lambda: packed(options, eight, None))
    for layers in LAYERS:
        folder = work / f"cut-{layers}"
        once(folder, {"model": "cut", "layers": layers}, lambda f=folder, n=layers: cut(options, f, n))
        for seed in range(1 if options.quick else SEEDS):
            folder = work / f"distilled-{layers}-{seed}"
            about = {"layers": layers, "seed": seed}
            once(folder, {"model": "distilled"} | about, lambda f=folder, n=layers, s=seed: distilled(options, f, n, s))
            target = work / f"distilled-int8-{layers}-{seed}"
            both = {"model": "distilled, int8"} | about
            once(target, both, lambda f=target, s=folder: packed(options, f, s / "model"))


def speeds(work: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Times of one of each shape, beside the teacher."""
    names = ["teacher", "int8", *(f"{kind}-{n}-0" for n in LAYERS for kind in ("distilled", "distilled-int8"))]
    models = {name: encoder_of(work / name / "model").model for name in names}
    rows = compare_latency(models, batch_sizes=(32,), sequence_length=32, repeats=3 if quick else 30, threads=1)
    return [vars(row) for row in rows]


def summary(rows: list[dict[str, Any]], timed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each kind of encoder: mean and range over seeds, bytes, speed."""
    ratio = {row["model"]: row["cpu_speedup_vs_first"] for row in timed if row["kind"] != "again"}
    found = []
    for model, layers in dict.fromkeys((row["model"], row["layers"]) for row in rows):
        own = [row for row in rows if (row["model"], row["layers"]) == (model, layers)]
        scores = [row["spearman"] for row in own]
        prefix = "distilled-int8" if "int8" in model and layers < 6 else "distilled"
        place = model if layers == 6 else f"{prefix}-{layers}-0"
        found.append(
            {
                "model": model, "layers": layers, "seeds": len(own), "spearman": statistics.mean(scores),
                "least": min(scores), "greatest": max(scores), "bytes": own[0]["bytes"], "cpu_speedup": ratio[place],
            }
        )  # fmt: skip
    return found


def report(options: argparse.Namespace, work: Path) -> None:
    """Write the results of all finished runs."""
    rows = [json.loads(file.read_text()) for file in sorted(work.glob("*/row.json"))]
    timed = speeds(work, quick=options.quick)
    found = summary(rows, timed)
    by = {(row["model"], row["layers"]): row for row in found}
    wanted = [
        asked(
            f"{layers} layers: distilled against cut at equal latency", "better in Spearman × 100",
            f"{by['distilled', layers]['spearman']:.2f} against {by['cut', layers]['spearman']:.2f}",
            by["distilled", layers]["least"] > by["cut", layers]["spearman"],
        )
        for layers in LAYERS
    ]  # fmt: skip
    write(
        "sentence_embeddings", found, wanted, quick=options.quick, runs=rows, latency=timed, published=PUBLISHED,
        data="STS-B validation, 1,500 pairs", batch=BATCH, learning_rate=LEARNING_RATE,
    )  # fmt: skip


if __name__ == "__main__":
    train_and_report("sentence_embeddings", training_parser(__doc__, "glue/stsb, extra/snli, …"), run, report)
