"""Distil two teachers, one for each task, into one small body with two heads.

    python examples/multitask.py --output runs/multitask

Offline and under a minute on a CPU, on sentences that are in the package: ten of their intents, and whether a sentence
is a question. With models of your own and more steps it is TextBrewer's ``MultiTaskDistiller``.
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

INTENTS, QUESTIONS = 10, ("what", "how", "when", "where", "who", "why", "is", "are", "do", "does", "can", "could")


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/multitask"), help="folder for models")
    parser.add_argument(
        "--steps", type=int, default=100, help="optimizer steps of each teacher; the student takes twice as many"
    )
    return parser.parse_args()


def tasks() -> dict[str, TaskData]:
    """The same sentences with two kinds of labels."""
    whole = load_task("embedded/clinc150")
    kept: dict[str, dict[str, list[dict[str, Any]]]] = {"intent": {}, "question": {}}
    for split, rows in (("train", whole.train), ("validation", whole.validation)):
        few = [row for row in rows if row["intent"] < INTENTS]
        kept["intent"][split] = [{"text": row["text"], "label": row["intent"]} for row in few]
        kept["question"][split] = [{"text": r["text"], "label": int(r["text"].startswith(QUESTIONS))} for r in few]
    return {task: load_task(task, data=rows) for task, rows in kept.items()}


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
    data = tasks()
    tokenizer = train_tokenizer(data["intent"].train["text"], kind="wordpiece", vocab_size=1000)
    rows = {task: tokenize(one, tokenizer, max_length=32) for task, one in data.items()}
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
        methods=[MultiTaskDistillation({task: Distillation(config, teacher) for task, teacher in teachers.items()})],
        train_datasets={task: list(data.train) for task, data in rows.items()},
        collators=collators,
        tau=0.5,
    )
    trainer.train()
    trainer.save_model()
    for task, teacher in teachers.items():
        before, after = (accuracy(model, rows[task], collators[task]) for model in (teacher, students[task]))
        print(f"{task}: teacher {before:.3f}, student {after:.3f}, saved in {options.output / task}")


if __name__ == "__main__":
    main()
