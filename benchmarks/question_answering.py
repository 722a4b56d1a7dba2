"""What does a small encoder that answers questions lose by half of its layers, half of each block, 8 bits, all three?

Teacher: MiniLM (6 layers, 384 wide) fine-tuned on the 8,844 training questions that are at hand: 4,000 of SQuAD, 3,696
of TyDi QA in English and 1,148 of MLQA's English validation set; none of their contexts is in SQuAD's dev set. SQuAD's
own 87,599 were not to be had, so **no score here is comparable with published ones**; nn_pruning's losses of F1 (0 at
1.8 x, -1 at 2.25 x, -2 at 2.6 x; BERT-base, all of SQuAD) stand in the results as another setting.

* ``layers``: three of the layers, taught logits and hidden states. ``control``: the same without a teacher.
* ``pruned``: half of the parameters of the blocks, heads and neurons, gradually, by Fisher scores, with the teacher.
* ``int8``: round to nearest, 8 bits in weights, embeddings and activations, without training.
* ``all three``: the student of three layers, half of its blocks pruned with the teacher, then 8 bits.

Trained in bfloat16 arithmetic with float32 weights: the teacher for two epochs, all else for one. F1 and exact match on
the last 10 articles of SQuAD's dev set (1,988 questions), windows of 256 tokens, in float32. One seed. Speed is the
median of paired ratios of one thread's CPU time, 8 windows of 256 tokens.

    python benchmarks/question_answering.py --data ../shared/data --work runs
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import asked, once, train_and_report, training_parser, write
from datasets import Dataset
from teachers import minilm_path
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, TrainingArguments, set_seed

from lmcompress.data import TaskData, collator, load_task, tokenize, windows
from lmcompress.distillation import DistillationConfig, Match
from lmcompress.evaluation import answer_candidates, compare_latency, predict_logits, size_on_disk, span_scores
from lmcompress.model import CompressedModel
from lmcompress.pruning import PruningConfig, Target
from lmcompress.quantization import quantize
from lmcompress.schedules import Gradual
from lmcompress.students.layers import by_layers
from lmcompress.trainers import CompressionTrainer

LENGTH, BATCH = 256, 16
# chosen so that all takes an hour and a half on one core
EPOCHS = {"teacher": 2.0, "layers": 1.0, "control": 1.0, "pruned": 1.0, "all three": 1.0}
LEARNING_RATE = {"teacher": 1e-4, "layers": 2e-4, "control": 2e-4, "pruned": 2e-4, "all three": 2e-4}
TRAIN = ("qa/squad/train_subset", "qa/tydiqa_goldp/en/train", "qa/mlqa/en/validation")
HELD_OUT = 10
PUBLISHED = {"1.8 x": 0.0, "2.25 x": -1.0, "2.6 x": -2.0}
MATCHED = ((1, 2), (2, 4), (3, 6))


class Bench:
    """The rows, and the models made of them.

    Args:
        options: of the command line.
        work: folder of the runs.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.tokenizer = AutoTokenizer.from_pretrained(minilm_path())
        self.collate = collator(self.data.task, self.tokenizer)

    @cached_property
    def data(self) -> TaskData:
        """Training questions of all sources, and the last articles of SQuAD's dev set."""
        columns = ["question", "context", "answers"]
        train = [row for name in TRAIN for row in self._table(name).select_columns(columns).to_list()]
        dev = self._table("qa/squad/validation")
        last = set(list(dict.fromkeys(dev["title"][:]))[-HELD_OUT:])
        held = dev.filter(lambda row: row["title"] in last).select_columns(columns).to_list()
        if self.options.quick:
            train, held = train[:64], held[:16]
        return load_task("questions", data={"train": train, "validation": held})

    @cached_property
    def rows(self) -> TaskData:
        """The same as windows of tokens."""
        return tokenize(self.data, self.tokenizer, max_length=LENGTH)

    def _table(self, name: str) -> Dataset:
        return Dataset.from_parquet(str(self.options.data / f"{name}.parquet"), keep_in_memory=True)

    def model(self, name: str) -> Any:
        """A finished model."""
        return AutoModelForQuestionAnswering.from_pretrained(self.work / name / "model")

    def quality(self, model: Any) -> dict[str, float]:
        """F1 and exact match in percent."""
        rows = self.data.validation
        cut = windows(self.data.task, rows, self.tokenizer, max_length=LENGTH)
        logits = predict_logits(model, cut.rows, self.collate, 32, progress=False)
        best = [candidates[0].text for candidates in answer_candidates(logits, cut)]
        scores = span_scores(best, [answers["text"] for answers in rows["answers"]])
        return {name: 100 * float(values.mean()) for name, values in scores.items()}

    def saved(self, model: Any, name: str) -> dict[str, Any]:
        """Save with the round-trip check; quality of the reloaded model, and its size."""
        folder = self.work / name / "model"
        batches = [self.collate([self.rows.validation[i] for i in range(8)])]
        CompressedModel(model).save_pretrained(folder, tokenizer=self.tokenizer, batches=batches)
        return self.quality(self.model(name)) | {"bytes": size_on_disk(folder).weights_bytes}

    def trained(self, name: str, student: Any, **methods: Any) -> dict[str, Any]:
        """Train, save, measure."""
        set_seed(0)
        student.get_input_embeddings().requires_grad_(False)
        args = TrainingArguments(
            str(self.work / name / "checkpoints"), learning_rate=LEARNING_RATE[name], num_train_epochs=EPOCHS[name],
            per_device_train_batch_size=BATCH, max_steps=6 if self.options.quick else -1, warmup_steps=0.06,
            weight_decay=0.01, optim="adamw_torch_fused", bf16=True, train_sampling_strategy="group_by_length",
            save_strategy="no", logging_steps=100, report_to="none", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = CompressionTrainer(
            student, args, train_dataset=self.rows.train, data_collator=self.collate, **methods
        )
        start = time.time()
        trainer.train()
        return {"seconds": round(time.time() - start)} | self.saved(trainer.student, name)

    def teacher(self) -> dict[str, Any]:
        """MiniLM with a head for spans, fine-tuned."""
        set_seed(0)
        return self.trained("teacher", AutoModelForQuestionAnswering.from_pretrained(minilm_path()))

    def layers(self) -> dict[str, Any]:
        """Three layers, with a teacher."""
        student = by_layers(self.model("teacher"), 3, choose="skip").model
        matches = tuple(Match(loss="hidden_mse", student=mine, teacher=theirs) for mine, theirs in MATCHED)
        config = DistillationConfig(temperature=2.0, label_weight=0.5, matches=matches)
        return self.trained("layers", student, teacher=self.model("teacher"), distillation=config)

    def control(self) -> dict[str, Any]:
        """Three layers, labels alone."""
        return self.trained("control", by_layers(self.model("teacher"), 3, choose="skip").model)

    def pruned(self) -> dict[str, Any]:
        """Half of the blocks' parameters, with a teacher."""
        return self._pruned("pruned", self.model("teacher"), last=6)

    def int8(self) -> dict[str, Any]:
        """The teacher in 8 bits."""
        model = self.model("teacher")
        quantize(model, progress=False)
        return self.saved(model, "int8")

    def all_three(self) -> dict[str, Any]:
        """The student of three layers, half of it pruned, in 8 bits."""
        found = self._pruned("all three", self.model("layers"), last=6)
        model = self.model("all three")
        quantize(model, progress=False)
        return found | self.saved(model, "all three")

    def _pruned(self, name: str, student: Any, last: int) -> dict[str, Any]:
        match = Match(loss="hidden_mse", student=-1, teacher=last)
        config = DistillationConfig(temperature=2.0, label_weight=0.5, matches=(match,))
        # quick runs have too few steps for a ramp by tens
        every = 1 if self.options.quick else 10
        pruning = PruningConfig(
            target=Target(sparsity=0.5), schedule=Gradual(begin=0.0, end=0.6, every=every), multiple_of=16
        )
        return self.trained(name, student, teacher=self.model("teacher"), distillation=config, pruning=pruning)


def run(options: argparse.Namespace, work: Path) -> None:
    """Make and measure every model that is missing."""
    bench = Bench(options, work)
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "teacher": bench.teacher, "layers": bench.layers, "control": bench.control, "pruned": bench.pruned,
        "int8": bench.int8, "all three": bench.all_three,
    }  # fmt: skip
    for name, make in made.items():
        once(work / name, {"model": name, "train_windows": len(bench.rows.train)}, make)


def report(options: argparse.Namespace, work: Path) -> None:
    """Write the results of all finished runs."""
    rows = [json.loads(file.read_text()) for file in sorted(work.glob("*/row.json"))]
    bench = Bench(options, work)
    names = ["teacher", *(row["model"] for row in rows if row["model"] not in ("teacher", "control"))]
    repeats = 3 if options.quick else 20
    models = {name: bench.model(name) for name in names}
    timed = compare_latency(models, batch_sizes=(8,), sequence_length=LENGTH, repeats=repeats, threads=1)
    ratio = {row.model: row.cpu_speedup_vs_first for row in timed if row.kind != "again"}
    for row in rows:
        row["cpu_speedup"] = ratio.get(row["model"], ratio["layers"])
    by = {row["model"]: row for row in rows}
    wanted = [
        asked(
            "three layers: distilled against the control", "better in F1",
            f"{by['layers']['f1']:.2f} against {by['control']['f1']:.2f}", by["layers"]["f1"] > by["control"]["f1"],
        )
    ]  # fmt: skip
    write(
        "question_answering", rows, wanted, quick=options.quick, latency=[vars(row) for row in timed],
        published_losses_of_nn_pruning=PUBLISHED, seeds=1, max_length=LENGTH, epochs=EPOCHS,
        data="8,844 training questions (SQuAD 4,000, TyDi QA, MLQA); last 10 articles of SQuAD's dev set",
    )  # fmt: skip


if __name__ == "__main__":
    train_and_report("question_answering", training_parser(__doc__, "qa/squad, qa/tydiqa_goldp, qa/mlqa"), run, report)
