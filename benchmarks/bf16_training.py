"""Does training in bfloat16 cost quality, and what does it save?

The same runs in float32 and with ``bf16=True`` of ``TrainingArguments`` (bfloat16 arithmetic under autocast, weights,
scales and loss terms in float32), three seeds each, everything else equal:

* ``qat``: a fine-tuned model at 4-bit weights (LSQ, by row) and 8-bit activations, distilled from itself;
* ``pruning``: 30 % of the encoder are pruned by hard-concrete gates with a Lagrangian, distilled from the dense model.

MRPC, RTE and SST-2 with the MiniLM teachers of ``benchmarks/teachers.py``, and the GPT-2 of ``--model`` on WikiText-2.
Runs are short: the question is the difference, not the quality. Beside the score stands the KL divergence of the
student's answers from the teacher's, which is not counted in rows and so shows smaller differences. All is measured in
float32, of the packed model, saved and loaded again. Step times are CPU time of the process, in turn, in random order.

    python benchmarks/bf16_training.py --data ../shared/data --model ../shared/models/gpt2-wikitext2 --work runs

Finished runs are kept in ``--work`` and not repeated; ``--report`` only writes the results of existing runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pruning
import qat_lm
import torch
from common import asked, once, train_and_report, training_parser, write
from distillation import arguments
from steps import StepByStep
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from lmcompress.distillation import LiveTeacher
from lmcompress.evaluation import perplexity
from lmcompress.model import CompressedModel
from lmcompress.pruning import HardConcrete, PruningConfig, Target
from lmcompress.quantization import QuantizationConfig, WeightScheme
from lmcompress.trainers import CompressionTrainer

TASKS = ("mrpc", "rte", "sst2")
LM = "wikitext-2"
PRECISIONS = ("float32", "bfloat16")
QAT, PRUNED = "qat", "pruning"
SEEDS = 3
# task: (steps, batch)
BUDGET = {"mrpc": (30, 16), "rte": (30, 16), "sst2": (30, 32), LM: (30, 8)}
# which task has which runs, in the order of running
WAYS = {QAT: ("sst2", LM, "mrpc", "rte"), PRUNED: ("sst2",)}
LEARNING_RATE = 5e-5
SPARSITY = 0.3
# of the test text of WikiText-2, 1.3 million; validation rows and tokens whose divergence is measured
CHARACTERS, ROWS, TOKENS = 100_000, 128, 4096


def quantization() -> QuantizationConfig:
    """Weights at 4 bits with learned scales, embeddings at 8, activations at 8."""
    return QuantizationConfig(
        weights=WeightScheme(quantizer="lsq", bits=4, granularity="row"),
        embeddings=WeightScheme(quantizer="minmax", bits=8, granularity="row"),
        scale_learning_rate=1e-4,
    )


def gates(seed: int) -> PruningConfig:
    """Hard-concrete gates, whose Lagrangian brings sparsity to its target by the middle of the run."""
    return PruningConfig(target=Target(sparsity=SPARSITY), schedule=HardConcrete(begin=0.0, end=0.6), seed=seed)


class Classifier(pruning.Bench):
    """A task of GLUE: its rows, its teacher, its students."""

    def trainer(self, folder: Path, way: str, precision: str, seed: int) -> CompressionTrainer:
        """A student to be trained."""
        set_seed(seed)
        steps, batch = BUDGET[self.task]
        # a later change of args.bf16 would do nothing
        args = arguments(folder, LEARNING_RATE, 1, seed, quick=self.options.quick, bf16=precision == "bfloat16")
        args.max_steps, args.per_device_train_batch_size = (2, 4) if self.options.quick else (steps, batch)
        asked_for = {"quantization": quantization()} if way == QAT else {"pruning": gates(seed)}
        return CompressionTrainer(
            self.model(), args, teacher=LiveTeacher(self.model()), distillation=pruning.distillation(), **asked_for,
            train_dataset=self.rows.train, data_collator=self.collate,
        )  # fmt: skip

    def measured(self, folder: Path) -> dict[str, Any]:
        """Score of a saved model, and its divergence from its teacher."""
        student = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
        teacher = self.model().eval()
        rows = self.rows.validation.select(range(16 if self.options.quick else ROWS))
        total = 0.0
        for start in range(0, len(rows), 64):
            batch = self.collate([rows[i] for i in range(start, min(start + 64, len(rows)))])
            total += _divergence(student, teacher, batch)
        return {**self.quality(student), "divergence": total / len(rows)}

    def saved(self, model: Any, folder: Path) -> dict[str, Any]:
        """Save with a round-trip check; the max abs difference after reloading."""
        batches = [self.collate([self.rows.validation[i] for i in range(16)])]
        found = CompressedModel(model).save_pretrained(
            folder / "model", tokenizer=AutoTokenizer.from_pretrained(self.folder), batches=batches
        )
        return {"reload_error": found.max_error}


class LanguageModel(qat_lm.Bench):
    """WikiText-2: its blocks, the GPT-2, and its students."""

    def trainer(self, folder: Path, way: str, precision: str, seed: int) -> CompressionTrainer:
        """A student to be trained."""
        set_seed(seed)
        config = qat_lm.scheme("lsq", 4, "row")
        config = config.model_copy(update={"scale_learning_rate": qat_lm.scale_rate(self.dense(), config)})
        steps, batch = BUDGET[LM]
        bf16 = precision == "bfloat16"
        args = arguments(folder, qat_lm.LEARNING_RATES[4], 1, seed, quick=self.options.quick, bf16=bf16)
        args.max_steps, args.per_device_train_batch_size = (2, 4) if self.options.quick else (steps, batch)
        args.train_sampling_strategy = "random"
        return CompressionTrainer(
            self.dense(), args, quantization=config, teacher=self.dense(), distillation=qat_lm.distillation(None),
            train_dataset=self.blocks,
        )  # fmt: skip

    def measured(self, folder: Path) -> dict[str, Any]:
        """Perplexity of a saved model, and its divergence from its teacher on the first blocks of the test text."""
        student, teacher = AutoModelForCausalLM.from_pretrained(folder / "model").eval(), self.dense().eval()
        text = self.test[:CHARACTERS]
        found = perplexity(student, self.tokenizer, text, max_length=qat_lm.BLOCK, progress=False)
        ids = torch.tensor(self.tokenizer(text)["input_ids"])
        ids = ids[: min(TOKENS, len(ids) // qat_lm.BLOCK * qat_lm.BLOCK)].view(-1, qat_lm.BLOCK)
        total = sum(_divergence(student, teacher, {"input_ids": part}) for part in ids.split(8))
        return {"score": found.token_perplexity, "divergence": total / ids.numel()}

    def saved(self, model: Any, folder: Path) -> dict[str, Any]:
        """Save with a round-trip check; the max abs difference after reloading."""
        batches = [{"input_ids": torch.tensor(self.blocks[:4]["input_ids"])}]
        found = CompressedModel(model).save_pretrained(folder / "model", tokenizer=self.tokenizer, batches=batches)
        return {"reload_error": found.max_error}


def _divergence(student: Any, teacher: Any, batch: dict[str, Any]) -> float:
    """KL divergence of the student's distributions from the teacher's, summed over rows or tokens."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.inference_mode():
        ours, theirs = (model(**inputs).logits.float().log_softmax(-1) for model in (student, teacher))
    return float(F.kl_div(ours, theirs, log_target=True, reduction="sum"))


def bench_of(options: argparse.Namespace, task: str) -> Classifier | LanguageModel:
    """What a task is trained and measured with."""
    return LanguageModel(options) if task == LM else Classifier(options, task)


def trained(bench: Any, folder: Path, way: str, precision: str, seed: int) -> dict[str, Any]:
    """One run, and what came of it."""
    trainer = bench.trainer(folder, way, precision, seed)
    started = time.process_time()
    trainer.train()
    trainer.finish()
    seconds = time.process_time() - started
    saved = bench.saved(trainer.student, folder)
    return {"steps": trainer.state.global_step, "cpu_seconds": seconds, **saved, **bench.measured(folder)}


def runs(options: argparse.Namespace) -> Iterator[tuple[str, str, int, str]]:
    """Task, way, seed and precision; the first seeds of all tasks before the second of any."""
    for way, tasks in WAYS.items():
        for seed in range(1 if options.quick else SEEDS):
            for task in tasks:
                if task in options.tasks:
                    yield from ((task, way, seed, precision) for precision in PRECISIONS)


def run(options: argparse.Namespace, work: Path) -> None:
    """All requested runs that do not exist yet, then the times."""
    torch.set_num_threads(options.threads)
    benches: dict[str, Any] = {}
    for task, way, seed, precision in runs(options):
        folder = work / task / f"{way}-{precision}-{seed}".replace(" ", "")
        if task not in benches:
            benches[task] = bench_of(options, task)
        about = {"kind": "quality", "task": task, "way": way, "seed": seed, "precision": precision}
        once(folder, about, partial(trained, benches[task], folder, way, precision, seed))
    for way, tasks in WAYS.items():
        for task in (each for each in tasks if each in options.tasks):
            folder = work / task / f"time-{way}".replace(" ", "")
            about = {"kind": "time", "task": task, "way": way}
            once(folder, about, lambda t=task, w=way, f=folder: timed(options, benches, t, w, f))  # type: ignore[misc]


def timed(options: argparse.Namespace, benches: dict[str, Any], task: str, way: str, folder: Path) -> dict[str, Any]:
    """CPU times of steps on the same batches in both precisions, in random order."""
    bench = benches.setdefault(task, bench_of(options, task))
    steps = {}
    # bfloat16 last: accelerate's state is that of the process, and asked by those alone that compute in 16 bits
    for precision in PRECISIONS:
        trainer = bench.trainer(folder, way, precision, 0)
        # where Trainer puts autocast around the model
        trainer.model = trainer.accelerator.prepare_model(trainer.model)
        batch = next(iter(trainer.get_train_dataloader()))
        steps[precision] = StepByStep(trainer, batch)
    times: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    order = random.Random(0)
    for number in range(3 if options.quick else options.repeats + 1):
        for precision in order.sample(PRECISIONS, len(PRECISIONS)):
            started = time.process_time()
            steps[precision].between()
            steps[precision].step()
            if number:
                times[precision].append(time.process_time() - started)
    pairs = [theirs / ours for theirs, ours in zip(times["bfloat16"], times["float32"], strict=True)]
    lower, ratio, upper = statistics.quantiles(pairs, n=4)
    shape = list(steps["float32"].batch["input_ids"].shape)
    medians = {f"{name}_ms": 1000 * statistics.median(found) for name, found in times.items()}
    return {"shape": shape, **medians, "ratio": ratio, "quartiles": [lower, upper], "repeats": len(pairs)}


def summarise(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of both precisions side by side, for each task and way."""
    rows: list[dict[str, Any]] = []
    for way, tasks in WAYS.items():
        for task in tasks:
            found = {
                precision: [
                    r
                    for r in done
                    if r["kind"] == "quality" and (r["task"], r["way"], r["precision"]) == (task, way, precision)
                ]
                for precision in PRECISIONS
            }
            both = {r["seed"] for r in found["float32"]} & {r["seed"] for r in found["bfloat16"]}
            if len(both) < 2:
                continue
            row: dict[str, Any] = {"task": task, "way": way, "seeds": len(both), "steps": found["float32"][0]["steps"]}
            for what in ("score", "divergence"):
                for precision, mine in found.items():
                    values = [r[what] for r in sorted(mine, key=lambda r: r["seed"]) if r["seed"] in both]
                    row |= {
                        f"{what}_{precision}": statistics.mean(values),
                        f"{what}_spread_{precision}": statistics.stdev(values),
                        f"{what}s_{precision}": values,
                    }
            row["reload_error"] = max(r["reload_error"] for mine in found.values() for r in mine)
            times = [r for r in done if r["kind"] == "time" and (r["task"], r["way"]) == (task, way)]
            row |= {name: times[0][name] for name in ("ratio", "quartiles", "shape") if times}
            row["measured_at"] = sorted({r["commit"] for mine in found.values() for r in mine})
            rows.append(row)
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requested against measured numbers."""
    wanted = []
    for row in rows:
        of = f"{row['task']}, {row['way']}"
        for what in ("score", "divergence"):
            found = abs(row[f"{what}_bfloat16"] - row[f"{what}_float32"])
            most = max(row[f"{what}_spread_{precision}"] for precision in PRECISIONS)
            name = f"{of}: {what} in bfloat16 minus in float32, of the means, in spreads of seeds"
            shown = found / most if most else 0.0 if not found else float("inf")
            wanted.append(asked(name, "<= 1", shown, shown <= 1))
        if "ratio" in row:
            wanted.append(asked(f"{of}: step in bfloat16 over float32", "<= 0.45", row["ratio"], row["ratio"] <= 0.45))
    errors = [row["reload_error"] for row in rows]
    wanted.append(asked("greatest difference of logits after reloading", "0", max(errors), max(errors) == 0))
    return wanted


def report(options: argparse.Namespace, work: Path) -> None:
    """Results of all existing runs."""
    done = [json.loads(file.read_text()) for file in sorted(work.glob("*/*/row.json"))]
    rows = summarise(done)
    if not rows:
        raise SystemExit(f"{work} has no task with two seeds in both precisions yet")
    wanted = verdicts(rows)
    setting = {
        "budget": BUDGET, "learning_rate": LEARNING_RATE, "sparsity": SPARSITY,
        "characters": CHARACTERS, "rows": ROWS, "tokens": TOKENS,
        "quantization": quantization().model_dump(mode="json"), "threads": options.threads,
        "distillation": pruning.distillation().model_dump(mode="json"),
    }  # fmt: skip
    for item in wanted:
        print(item)
    print(write("bf16_training", rows, wanted, quick=options.quick, setting=setting))


def main() -> None:
    """Command line."""
    parser = training_parser(__doc__, "glue/<task>/*.parquet and lm/wikitext-2/*.txt.gz")
    parser.add_argument("--model", type=Path, required=True, help="the GPT-2 that is quantized")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, LM], default=[*TASKS, LM])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10, help="steps of each precision that are timed")
    train_and_report("bf16_training", parser, run, report)


if __name__ == "__main__":
    main()
