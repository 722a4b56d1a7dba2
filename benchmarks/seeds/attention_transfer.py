"""Does attention transfer help a student, and does it beyond soft labels? (Zagoruyko & Komodakis 2017.)

The paper's ablation on a BERT: the MiniLM teachers of ``benchmarks/teachers.py``, students of their first three layers,
trained on the labels alone, with the teacher's saliency maps (the student's layers 1, 2 and 3 beside the teacher's 2, 4
and 6; tokens for pixels, hidden dimensions for channels; weight 1000 as in the authors' code), with its soft labels
(temperature 2), and with both. Everything else is equal: start, rows, their order, steps. The last epoch counts.

    python benchmarks/teachers.py --data ../shared/data --work runs/teachers
    python benchmarks/seeds/attention_transfer.py --data ../shared/data --work runs

Runs that are done are kept in ``--work`` and not repeated; ``--report`` only writes the results of what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

# benchmarks/ itself, for what its scripts share
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pruning
from common import asked, glue_parser, once, train_and_report, write
from distillation import BUDGET, LAYERS, MATCHED, arguments
from transformers import set_seed

from lmcompress.distillation import Distillation, DistillationConfig, Match, StoredTeacher
from lmcompress.students.layers import by_layers
from lmcompress.trainers import CompressionTrainer

TASKS = ("mrpc", "rte")
EPOCHS = 3
MAPS = tuple(Match(loss="attention_transfer", student=mine, teacher=theirs, weight=1000.0) for mine, theirs in MATCHED)
ROLES: dict[str, DistillationConfig | None] = {
    "labels": None,
    "labels + AT": DistillationConfig(weight=0.0, label_weight=1.0, matches=MAPS),
    "labels + KD": DistillationConfig(temperature=2.0, weight=1.0, label_weight=0.5),
    "labels + KD + AT": DistillationConfig(temperature=2.0, weight=1.0, label_weight=0.5, matches=MAPS),
}


class Bench(pruning.Bench):
    """One task, and students of its teacher."""

    def student(self, folder: Path, role: str, seed: int) -> dict[str, Any]:
        """One student: train, save through the gate, measure."""
        set_seed(seed)
        _, _, learning_rate = BUDGET[self.task]
        model = by_layers(self.model(), LAYERS, choose="first").model
        model.get_input_embeddings().requires_grad_(False)
        config = ROLES[role]
        methods = [] if config is None else [Distillation(config, StoredTeacher(self.store))]
        args = arguments(folder, learning_rate, EPOCHS, seed, quick=self.options.quick)
        trainer = CompressionTrainer(
            model, args, methods=methods, train_dataset=self.rows.train, data_collator=self.collate
        )  # fmt: skip
        started = time.time()
        trainer.train()
        seconds = time.time() - started
        trainer.finish()
        return {
            "epochs": EPOCHS,
            "seconds": round(seconds),
            "score": self.quality(model)["score"],
            "reload_error": self.saved(model, folder)["reload_error"],
        }


def run(options: argparse.Namespace, work: Path) -> None:
    """Everything that was asked for and is not there yet."""
    benches: dict[str, Bench] = {}
    for seed in range(1 if options.quick else options.seeds):
        for task in options.tasks:
            if task not in benches:
                benches[task] = Bench(options, task)
            for role in ROLES:
                folder = work / task / f"{role.replace(' + ', '-').lower()}-{seed}"
                once(
                    folder,
                    {"task": task, "role": role, "seed": seed},
                    partial(benches[task].student, folder, role, seed),
                )


def summarise(done: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds of each task and role."""
    rows = []
    for task in TASKS:
        for role in ROLES:
            mine = [r for r in done if (r["task"], r["role"]) == (task, role)]
            if mine:
                scores = [r["score"] for r in mine]
                rows.append(
                    {
                        "task": task, "role": role, "seeds": len(mine), "score": statistics.mean(scores),
                        "spread": statistics.stdev(scores) if len(scores) > 1 else None, "scores": scores,
                        "epochs": mine[0]["epochs"], "seconds": statistics.mean(r["seconds"] for r in mine),
                        "reload_error": max(r["reload_error"] for r in mine),
                        "measured_at": sorted({r["commit"] for r in mine}),
                    }
                )  # fmt: skip
    return rows


def report(options: argparse.Namespace, work: Path) -> None:
    """Results of all runs that are there."""
    done = [json.loads(file.read_text()) for file in sorted(work.glob("*/*/row.json"))]
    if not done:
        raise SystemExit(f"there are no runs in {work} yet: leave out --report")
    rows = summarise(done)
    by = {(row["task"], row["role"]): row["score"] for row in rows}
    wanted = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for without, name in (("labels", "labels + AT"), ("labels + KD", "labels + KD + AT")):
            if {(task, without), (task, name)} <= by.keys():
                gain = by[task, name] - by[task, without]
                wanted.append(asked(f"{task}: {name} minus {without}, points", "reported", gain, True))
    error = max(row["reload_error"] for row in rows)
    wanted.append(asked("greatest difference of logits after reloading", "0", error, error == 0))
    for row in rows:
        print(f"{row['task']:5} {row['role']:18} {row['score']:6.2f} ± {row['spread'] or 0:.2f} ({row['seeds']})")
    for item in wanted:
        print(item)
    setting = {
        "epochs": EPOCHS,
        "learning_rates": {task: BUDGET[task][2] for task in TASKS},
        "roles": {name: config and config.model_dump(mode="json") for name, config in ROLES.items()},
    }
    print(write("attention_transfer", rows, wanted, quick=options.quick, setting=setting))


def main() -> None:
    """Command line."""
    parser = glue_parser(__doc__, TASKS, default=["mrpc"])
    parser.add_argument("--seeds", type=int, default=3)
    train_and_report("attention_transfer", parser, run, report)


if __name__ == "__main__":
    main()
