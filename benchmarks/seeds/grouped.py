"""Do grouped matrices do better with a shuffle between them than without? (Zhang et al. 2018, ShuffleNet.)

The MiniLM teachers of ``benchmarks/teachers.py`` learn from themselves after all matrices of their blocks, attention's
and feed-forward network's, were cut into 4 groups: without a shuffle, with ShuffleNet's order of channels before the
matrices that write the residual stream, and with orders that were fitted to the weights. All start as the least squares
fit to the teacher's matrices on the same calibration rows, and everything else is equal: rows, their order, steps, the
teacher's logits and hidden states of layers 2, 4 and 6. The last step counts. On SST-2, as MRPC's 3,668 rows are too
few: after two epochs all three are where the most frequent class alone is (75).

    python benchmarks/teachers.py --data ../shared/data --work runs/teachers
    python benchmarks/seeds/grouped.py --data ../shared/data --work runs

Operations are those of the modules for one row of 128 tokens; products of attention's scores are not grouped. Runs that
are done are kept in ``--work`` and not repeated; ``--report`` only writes the results of what is there.
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
from distillation import arguments
from transformers import set_seed

from lmcompress.checkpoint.layers import PARTS
from lmcompress.distillation import Distillation, DistillationConfig, Match, StoredTeacher
from lmcompress.families import anatomy_of
from lmcompress.students import group, model_flops
from lmcompress.students.costs import projection_macs
from lmcompress.trainers import CompressionTrainer

GROUPS = 4
LENGTH = 128
SHUFFLES = ("none", "channel", "fitted")
# task: (epochs, seeds, learning rate)
BUDGET: dict[str, tuple[float, int, float]] = {"sst2": (0.3, 1, 5e-4)}
MATCHES = tuple(Match(loss="hidden_mse", student=layer, teacher=layer, weight=1.0) for layer in (2, 4, 6))
DISTILLATION = DistillationConfig(temperature=2.0, weight=1.0, label_weight=0.5, matches=MATCHES)


class Bench(pruning.Bench):
    """One task, and students of its teacher."""

    def student(self, folder: Path, shuffle: Any, seed: int) -> dict[str, Any]:
        """One student: group, train, save through the gate, measure."""
        set_seed(seed)
        epochs, _, learning_rate = BUDGET[self.task]
        model = self.model()
        dense = {"products": products(model), "flops": model_flops(model, length=LENGTH)}
        changed = group(
            model, GROUPS, shuffle=shuffle, activations=pruning.calibration(self.rows, self.collate, seed=0)
        )
        before = self.quality(model)["score"]
        args = arguments(folder, learning_rate, epochs, seed, quick=self.options.quick)
        trainer = CompressionTrainer(
            model, args, methods=[Distillation(DISTILLATION, StoredTeacher(self.store))],
            train_dataset=self.rows.train, data_collator=self.collate,
        )  # fmt: skip
        started = time.time()
        trainer.train()
        seconds = time.time() - started
        trainer.finish()
        saved = self.saved(model, folder)
        return {
            "epochs": epochs,
            "seconds": round(seconds),
            "before_training": before,
            "score": self.quality(model)["score"],
            "missed": statistics.mean(changed.errors.values()),
            "dense_flops": dense["flops"],
            "flops": model_flops(model, length=LENGTH),
            "share_of_products": products(model) / dense["products"],
            **{name: saved[name] for name in ("encoder_parameters", "bytes", "reload_error")},
        }


def products(model: Any) -> int:
    """Multiply-accumulates of the blocks' matrices for one token."""
    anatomy = anatomy_of(model)
    parts = [part for part in PARTS if getattr(anatomy.family, part)]
    return sum(projection_macs(block.get(part)) for block in anatomy.blocks for part in parts)


def run(options: argparse.Namespace, work: Path) -> None:
    """Everything that was asked for and is not there yet; the first seeds of all before the second of any."""
    benches: dict[str, Bench] = {}
    for seed in range(1 if options.quick else max(BUDGET[task][1] for task in options.tasks)):
        for task in options.tasks:
            if seed >= BUDGET[task][1]:
                continue
            if task not in benches:
                benches[task] = Bench(options, task)
            for shuffle in SHUFFLES:
                folder = work / task / f"{shuffle}-{seed}"
                about = {"task": task, "shuffle": shuffle, "seed": seed}
                once(folder, about, partial(benches[task].student, folder, shuffle, seed))


def summarise(done: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds of each task and shuffle."""
    rows = []
    for task in BUDGET:
        for shuffle in SHUFFLES:
            mine = [r for r in done if (r["task"], r["shuffle"]) == (task, shuffle)]
            if mine:
                scores = [r["score"] for r in mine]
                rows.append(
                    {
                        "task": task, "shuffle": shuffle, "seeds": len(mine), "score": statistics.mean(scores),
                        "spread": statistics.stdev(scores) if len(scores) > 1 else None, "scores": scores,
                        "before_training": statistics.mean(r["before_training"] for r in mine),
                        "seconds": statistics.mean(r["seconds"] for r in mine),
                        "reload_error": max(r["reload_error"] for r in mine),
                        "measured_at": sorted({r["commit"] for r in mine}),
                    }
                    | {
                        name: mine[0][name]
                        for name in (
                            "epochs", "missed", "dense_flops", "flops", "share_of_products", "encoder_parameters",
                            "bytes",
                        )
                    }
                )  # fmt: skip
    return rows


def report(options: argparse.Namespace, work: Path) -> None:
    """Results of all runs that are there."""
    done = [json.loads(file.read_text()) for file in sorted(work.glob("*/*/row.json"))]
    if not done:
        raise SystemExit(f"there are no runs in {work} yet: leave out --report")
    rows = summarise(done)
    by = {(row["task"], row["shuffle"]): row["score"] for row in rows}
    wanted = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for shuffle in ("channel", "fitted"):
            if {(task, "none"), (task, shuffle)} <= by.keys():
                gain = by[task, shuffle] - by[task, "none"]
                wanted.append(asked(f"{task}: shuffle {shuffle} minus none, points", ">= 0", gain, gain >= 0))
    share = {row["share_of_products"] for row in rows}
    wanted.append(asked("products of the matrices, share of the dense ones", "1/4", max(share), share == {1 / GROUPS}))
    error = max(row["reload_error"] for row in rows)
    wanted.append(asked("greatest difference of logits after reloading", "0", error, error == 0))
    for row in rows:
        print(f"{row['task']:5} {row['shuffle']:8} {row['score']:6.2f} ± {row['spread'] or 0:.2f} ({row['seeds']})")
    for item in wanted:
        print(item)
    teachers = {
        row["task"]: 100 * json.loads((options.work / "teachers" / row["task"] / "teacher.json").read_text())["score"]
        for row in rows
    }
    setting = {
        "groups": GROUPS, "length": LENGTH, "budget": BUDGET, "teachers": teachers,
        "distillation": DISTILLATION.model_dump(mode="json"),
    }  # fmt: skip
    print(write("grouped", rows, wanted, quick=options.quick, setting=setting))


def main() -> None:
    """Command line."""
    parser = glue_parser(__doc__, BUDGET)
    train_and_report("grouped", parser, run, report)


if __name__ == "__main__":
    main()
