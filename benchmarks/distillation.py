"""How much of a teacher does half of it keep, with a teacher to learn from and without?

Teachers: the MiniLM BERT (6 layers, 384 wide) fine-tuned by ``benchmarks/teachers.py``. Students: three layers, word
embeddings taken over and frozen. With a teacher, they learn twice, as in TinyBERT: first, once for all tasks, from the
pretrained MiniLM on the unlabelled sentences of the tasks and of MNLI, QQP and SNLI (hidden states only, no labels, no
validation rows); then for each task from the fine-tuned teacher (logits, hidden states, and the labels), whose outputs
come from a disk store that is written once for all epochs and seeds. RTE's teacher comes from QNLI's, and so does its
student. Without a teacher (control), they are the first
three layers of the fine-tuned model, trained on the labels for the same number of steps. ``direct`` is between the two:
as the control, but taught by the fine-tuned teacher. The last epoch counts, not the best.

    python benchmarks/teachers.py --data ../shared/data --work runs/teachers
    python benchmarks/distillation.py --data ../shared/data --work runs

Finished runs are kept in ``--work`` and not repeated; ``--report`` only writes the results of existing runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import asked, glue_parser, once, train_and_report, write
from datasets import Dataset
from teachers import MAX_LENGTH, START, TASKS, minilm_path, train_teacher
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    IntervalStrategy,
    TrainingArguments,
    set_seed,
)

from lmcompress.activations.capture import extract
from lmcompress.data import collator, load_task, tokenize
from lmcompress.distillation import Distillation, DistillationConfig, LiveTeacher, Match, StoredTeacher, TeacherStore
from lmcompress.evaluation import evaluate_classifier, glue_score, size_on_disk
from lmcompress.model import CompressedModel
from lmcompress.students.layers import by_layers
from lmcompress.trainers import CompressionTrainer

LAYERS = 3
# task: (epochs, seeds, learning rate), chosen for what two cores do in an hour and a half
BUDGET: dict[str, tuple[float, int, float]] = {
    "mrpc": (6, 3, 2e-4),
    "stsb": (8, 3, 2e-4),
    "sst2": (2, 1, 2e-4),
    "qnli": (2, 1, 2e-4),
    "rte": (4, 3, 1e-4),
    "cola": (5, 1, 2e-4),
}
MATCHED = ((1, 2), (2, 4), (3, 6))
GENERAL_LENGTH = 64
ROLES = ("distilled", "direct", "control")


def matches() -> tuple[Match, ...]:
    """Each layer of the student beside the teacher's of the same relative depth."""
    return tuple(Match(loss="hidden_mse", student=mine, teacher=theirs, weight=1.0) for mine, theirs in MATCHED)


def distillation_config() -> DistillationConfig:
    """Logits at temperature 2, hidden states, labels."""
    return DistillationConfig(temperature=2.0, weight=1.0, label_weight=0.5, matches=matches())


def sentences(options: argparse.Namespace, tokenizer: Any) -> Dataset:
    """Training texts of GLUE and SNLI as model inputs, without labels, each once, in random order."""
    files = {
        task: (columns, options.data / "glue" / task / f"{split}.parquet")
        for task, (columns, split, *_) in TASKS.items()
    }
    files["mnli"] = (("premise", "hypothesis"), options.data / "glue" / "mnli" / "train_subset.parquet")
    files["qqp"] = (("question1", "question2"), options.data / "glue" / "qqp" / "train_subset.parquet")
    files["snli"] = (("premise", "hypothesis"), options.data / "extra" / "snli" / "train_subset.parquet")
    texts: dict[tuple[str, ...], None] = {}
    for columns, file in files.values():
        table = Dataset.from_parquet(str(file), keep_in_memory=True)
        texts |= dict.fromkeys(zip(*(table[column] for column in columns), strict=True))
    rows = sorted(texts)
    random.Random(0).shuffle(rows)
    rows = rows[:200] if options.quick else rows

    def encode(batch: dict[str, list[Any]]) -> Any:
        pairs = [tuple(row) if len(row) == 2 else row[0] for row in batch["text"]]
        return tokenizer(pairs, truncation=True, max_length=GENERAL_LENGTH)

    made = Dataset.from_dict({"text": [list(row) for row in rows]})
    return made.map(encode, batched=True, remove_columns=["text"])


def general_student(options: argparse.Namespace) -> Any:
    """Three layers that give the hidden states of the pretrained six; trained once."""
    folder = options.work / "distillation" / "general"
    if not (folder / "model").exists():
        set_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(minilm_path())
        teacher = AutoModelForSequenceClassification.from_pretrained(minilm_path())
        student = by_layers(teacher, LAYERS, choose="first").model
        student.get_input_embeddings().requires_grad_(False)
        config = DistillationConfig(weight=0.0, label_weight=0.0, matches=matches())
        args = arguments(folder, 5e-4, 1, 0, quick=options.quick)
        args.save_strategy, args.save_steps, args.save_total_limit = IntervalStrategy.STEPS, 500, 1
        trainer = CompressionTrainer(
            student, args, methods=[Distillation(config, LiveTeacher(teacher))],
            train_dataset=sentences(options, tokenizer), data_collator=DataCollatorWithPadding(tokenizer),
        )  # fmt: skip
        start = time.time()
        trainer.train(resume_from_checkpoint=any((folder / "checkpoints").glob("checkpoint-*")))
        trainer.finish()
        print(f"general distillation: {time.time() - start:.0f} s", trainer.state.log_history[-2:], flush=True)
        CompressedModel(student).save_pretrained(folder / "model", tokenizer=tokenizer)
    return AutoModelForSequenceClassification.from_pretrained(folder / "model")


def taught_before(options: argparse.Namespace, task: str) -> Any:
    """Where a distilled student starts: where its teacher came from another task, with that task's student."""
    if task not in START:
        return general_student(options)
    path = options.work / "distillation" / START[task] / "distilled-0" / "model"
    if not path.exists():
        raise SystemExit(f"{task} starts from the student of {START[task]}: run --tasks {START[task]} {task}")
    return AutoModelForSequenceClassification.from_pretrained(path)


def arguments(
    folder: Path, learning_rate: float, epochs: float, seed: int, *, quick: bool, bf16: bool = True
) -> TrainingArguments:
    """How every student is trained."""
    return TrainingArguments(
        str(folder / "checkpoints"),
        learning_rate=learning_rate,
        per_device_train_batch_size=32,
        num_train_epochs=1 if quick else epochs,
        max_steps=20 if quick else -1,
        warmup_steps=0.06,
        weight_decay=0.01,
        optim="adamw_torch_fused",
        bf16=bf16,
        seed=seed,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


def train_student(
    options: argparse.Namespace,
    folder: Path,
    task: str,
    seed: int,
    role: str,
    data: Any,
    rows: Any,
    store: TeacherStore | None,
) -> dict[str, Any]:
    """One student: train, measure, save."""
    epochs, _, learning_rate = BUDGET[task]
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(options.work / "teachers" / task)
    teacher = AutoModelForSequenceClassification.from_pretrained(options.work / "teachers" / task)
    student = by_layers(teacher, LAYERS, choose="first").model
    if role == "distilled":
        taught = taught_before(options, task).base_model
        student.base_model.embeddings.load_state_dict(taught.embeddings.state_dict())
        student.base_model.encoder.load_state_dict(taught.encoder.state_dict())
    student.get_input_embeddings().requires_grad_(False)
    methods = []
    if role != "control":
        source = StoredTeacher(store) if store is not None else LiveTeacher(teacher)
        methods = [Distillation(distillation_config(), source)]
    args = arguments(folder, learning_rate, epochs, seed, quick=options.quick)
    collate = collator(data.task, tokenizer)
    trainer = CompressionTrainer(student, args, methods=methods, train_dataset=rows.train, data_collator=collate)
    start = time.time()
    trainer.train()
    seconds = time.time() - start
    trainer.finish()
    metrics = evaluate_classifier(student, rows.validation, collate, data.task.kind, data.task.metrics, progress=False)
    batches = [collate([rows.validation[i] for i in range(16)])]
    measured = CompressedModel(student).save_pretrained(folder / "model", tokenizer=tokenizer, batches=batches)
    return {
        "epochs": epochs,
        "rows": len(rows.train),
        "seconds": round(seconds),
        "score": 100 * glue_score(metrics),
        **{name: 100 * value for name, value in metrics.items()},
        "parameters": sum(p.numel() for p in student.parameters()),
        "bytes": size_on_disk(folder / "model").weights_bytes,
        "reload_error": measured.max_error,
    }


def load_rows(options: argparse.Namespace, task: str) -> tuple[Any, Any, Any]:
    """A task's rows as they are and as the teacher's inputs, and what makes batches of them."""
    split = {"train": TASKS[task][1], "validation": "validation"}
    data = load_task(f"glue/{task}", data=options.data, splits=split, limit=200 if options.quick else None)
    tokenizer = AutoTokenizer.from_pretrained(options.work / "teachers" / task)
    return data, tokenize(data, tokenizer, max_length=MAX_LENGTH), collator(data.task, tokenizer)


def teacher_store(options: argparse.Namespace, task: str, rows: Any, collate: Any) -> TeacherStore:
    """The teacher's logits and hidden states for all training rows, computed once."""
    teacher = AutoModelForSequenceClassification.from_pretrained(options.work / "teachers" / task)
    folder = options.work / "distillation" / task / "store"
    if not folder.exists():
        start = time.time()
        features = [("hidden", layer) for _, layer in MATCHED]

        def in_bf16(model: Any, batch: Any, wanted: Any) -> Any:
            with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16):
                return extract(model, batch, wanted)

        TeacherStore.build(
            folder, teacher, rows.train, collate, extract=in_bf16, features=features, progress=False
        )  # fmt: skip
        print(f"store of {task}: {time.time() - start:.0f} s", flush=True)
    return TeacherStore.open(folder, teacher=teacher)


def run(options: argparse.Namespace, work: Path) -> None:
    """All requested runs that do not exist yet."""
    for task in options.tasks:
        run_task(options, work, task)


def run_task(options: argparse.Namespace, work: Path, task: str) -> None:
    """Teacher, store, and all students of one task."""
    print("teacher", train_teacher(options.data, options.work / "teachers", task, quick=options.quick), flush=True)
    data, rows, collate = load_rows(options, task)
    store = teacher_store(options, task, rows, collate)
    for seed in range(1 if options.quick else BUDGET[task][1]):
        for role in options.roles:
            folder = work / task / f"{role}-{seed}"
            about = {"task": task, "role": role, "seed": seed}
            once(folder, about, partial(train_student, options, folder, task, seed, role, data, rows, store))


def report(options: argparse.Namespace, work: Path) -> None:
    """Results of all existing runs."""
    rows: list[dict[str, Any]] = []
    for task in options.tasks:
        file = options.work / "teachers" / task / "teacher.json"
        if not file.exists():
            continue
        teacher = json.loads(file.read_text())
        folder = options.work / "teachers" / task
        runs = [json.loads(f.read_text()) for f in sorted((work / task).glob("*/row.json"))]
        score = 100 * teacher["score"]
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        base = {"task": task, "epochs": teacher["epochs"], "train_rows": teacher["rows"]}
        rows.append(
            base
            | {
                "role": "teacher", "score": score, "spread": None, "seeds": 1, "of_teacher": 100.0,
                "parameters": sum(p.numel() for p in model.parameters()), "bytes": size_on_disk(folder).weights_bytes,
                "seconds": teacher["seconds"], "reload_error": None,
            }
        )  # fmt: skip
        for role in ROLES:
            mine = [run for run in runs if run["role"] == role]
            if not mine:
                continue
            scores = [run["score"] for run in mine]
            mean = statistics.mean(scores)
            rows.append(
                {
                    "task": task, "epochs": mine[0]["epochs"], "train_rows": mine[0]["rows"], "role": role,
                    "score": mean,
                    "spread": statistics.stdev(scores) if len(scores) > 1 else None, "seeds": len(scores),
                    "of_teacher": 100 * mean / score, "parameters": mine[0]["parameters"], "bytes": mine[0]["bytes"],
                    "seconds": statistics.mean(run["seconds"] for run in mine),
                    "reload_error": max(run["reload_error"] for run in mine), "scores": scores,
                    "trained_at": sorted({run["commit"] for run in mine}),
                }
            )  # fmt: skip
    by = {(row["task"], row["role"]): row for row in rows}
    complete = [t for t in options.tasks if (t, "distilled") in by and (t, "control") in by]
    without_cola = [t for t in complete if t != "cola"]
    wanted = []
    if without_cola:
        mean = {
            r: statistics.mean(by[t, r]["score"] for t in without_cola) for r in ("teacher", "distilled", "control")
        }
        kept = 100 * mean["distilled"] / mean["teacher"]
        control = 100 * mean["control"] / mean["teacher"]
        wanted.append(
            asked(f"share of the teacher's mean kept ({', '.join(without_cola)})", ">= 97 %", kept, kept >= 97)
        )
        wanted.append(asked("the same for the control", "reported", control, True))
    for task in complete:
        gain = by[task, "distilled"]["score"] - by[task, "control"]["score"]
        wanted.append(asked(f"{task}: distilled minus control, points", "> 0", gain, gain > 0))
    errors = [row["reload_error"] for row in rows if row["reload_error"] is not None]
    if errors:
        wanted.append(asked("greatest difference of logits after reloading", "0", max(errors), max(errors) == 0))
    setting = {"layers": LAYERS, "distillation": distillation_config().model_dump(mode="json"), "budget": BUDGET}
    path = write("distillation", rows, wanted, quick=options.quick, setting=setting)
    for row in rows:
        spread = row["spread"] or 0
        print(f"{row['task']:6} {row['role']:10} {row['score']:6.2f} ± {spread:.2f}  {row['of_teacher']:.1f} %")
    for item in wanted:
        print(item)
    print(path)


def main() -> None:
    """Command line."""
    parser = glue_parser(__doc__, BUDGET)
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES)
    train_and_report("distillation", parser, run, report)


if __name__ == "__main__":
    main()
