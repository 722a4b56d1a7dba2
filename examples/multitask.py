"""Distil two teachers, one for each task, into one small body with two heads, on the data sets in the package.

    python examples/multitask.py --output runs/multitask

Offline, half a minute on a CPU: intents of 150 kinds, and whether two sentences have one intent. With more steps and
models of your own it is TextBrewer's ``MultiTaskDistiller``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

from lmcompress.data import TaskData, collator, load_task, tokenize, train_tokenizer
from lmcompress.distillation import Distillation, DistillationConfig, Match
from lmcompress.evaluation import evaluate_classifier
from lmcompress.students import by_layers
from lmcompress.trainers import CompressionTrainer, MultiTaskDistillation, MultiTaskStudent, MultiTaskTrainer

NAMES = {"intent": "embedded/clinc150", "pairs": "embedded/clinc150_pairs"}


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/multitask"), help="folder for models")
    parser.add_argument(
        "--steps", type=int, default=100, help="optimizer steps of each teacher; the student takes twice as many"
    )
    parser.add_argument("--limit", type=int, default=2000, help="rows of each split of each task")
    return parser.parse_args()


def arguments(folder: Path, steps: int) -> TrainingArguments:
    """Batches of 32 with a learning rate for models that start from scratch."""
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        warmup_steps=steps // 10,
        logging_steps=max(1, steps // 4),
        save_strategy="no",
        report_to="none",
    )


def classifier(rows: TaskData, vocab_size: int) -> BertForSequenceClassification:
    """A BERT of four narrow layers with a head for the task."""
    shape = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256)
    labels = dict(id2label=rows.task.id2label, label2id=rows.task.label2id, problem_type=rows.task.problem_type)
    return BertForSequenceClassification(BertConfig(vocab_size=vocab_size, **shape, **labels))


def accuracy(model: Any, rows: TaskData, collate: Any) -> float:
    """Of the validation rows."""
    found = evaluate_classifier(model, rows.validation, collate, rows.task.kind, ["accuracy"], progress=False)
    return found["accuracy"]


def main() -> None:
    """Train the teachers, distil them together, print the accuracies and save the student."""
    options = parsed()
    set_seed(0)
    tasks = {task: load_task(name, limit=options.limit) for task, name in NAMES.items()}
    tokenizer = train_tokenizer(tasks["intent"].train["text"], kind="wordpiece", vocab_size=2000)
    rows = {task: tokenize(data, tokenizer, max_length=48) for task, data in tasks.items()}
    collators = {task: collator(data.task, tokenizer) for task, data in rows.items()}

    teachers = {task: classifier(data, len(tokenizer)) for task, data in rows.items()}
    for task, teacher in teachers.items():
        CompressionTrainer(
            teacher,
            arguments(options.output / "teachers" / task, options.steps),
            train_dataset=rows[task].train,
            data_collator=collators[task],
        ).train()

    # both start from layers of their teacher; the first one's body is shared
    students = {task: by_layers(teacher, 2).model for task, teacher in teachers.items()}
    config = DistillationConfig(temperature=4, matches=[Match(loss="hidden_mse", student=2, teacher=4)])
    trainer = MultiTaskTrainer(
        MultiTaskStudent(students),
        arguments(options.output, 2 * options.steps),
        [MultiTaskDistillation({task: Distillation(config, teacher) for task, teacher in teachers.items()})],
        train_datasets={task: list(data.train) for task, data in rows.items()},
        collators=collators,
        tau=0.5,
    )
    trainer.train()
    trainer.finish()
    trainer.save_model()
    for task, teacher in teachers.items():
        before, after = (accuracy(model, rows[task], collators[task]) for model in (teacher, students[task]))
        print(f"{task}: teacher {before:.3f}, student {after:.3f}, saved in {options.output / task}")


if __name__ == "__main__":
    main()
