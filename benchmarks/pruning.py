"""How much quality does a fine-tuned BERT keep when half, three quarters or nine tenths of its encoder are pruned?

The models are the MiniLM teachers of ``benchmarks/teachers.py``; each is pruned and recovers under itself as teacher,
whose outputs come from the disk store of ``benchmarks/distillation.py``. Two questions:

* ``criteria``: which criterion? One-shot, then a short recovery, everything equal but the scores; MRPC, RTE and an
  eighth of SST-2 (whose 872 validation rows tell more than RTE's 277 at a teacher of 60 %). Seeds are of the
  calibration rows, what is drawn, and the order of training rows.
* ``schedules``: when? One-shot against little by little, the same criterion, the same steps, a longer recovery.

Sparsity is the pruned share of the encoder's parameters, without embeddings. The last epoch counts, not the
best.

    python benchmarks/teachers.py --data ../shared/data --work runs/teachers
    python benchmarks/pruning.py --data ../shared/data --work runs

Finished runs are kept in ``--work`` and not repeated; ``--report`` only writes the results of existing runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from common import asked, glue_parser, once, train_and_report, write
from distillation import arguments, load_rows, teacher_store
from teachers import train_teacher
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from lmcompress.distillation import Distillation, DistillationConfig, Match, StoredTeacher, TeacherStore
from lmcompress.evaluation import evaluate_classifier, glue_score, size_on_disk
from lmcompress.model import CompressedModel
from lmcompress.pruning import (
    Gradual,
    HardConcrete,
    ModelSizes,
    OneShot,
    Part,
    PruningConfig,
    Target,
    Units,
    cut,
    score,
    select,
)
from lmcompress.pruning.structured.order import Ranking
from lmcompress.trainers import CompressionTrainer, PruningTrainer

SPARSITIES = (0.5, 0.75, 0.9)
CALIBRATION_ROWS = 512

# name in the table: what scores heads, what scores neurons
CRITERIA: dict[str, tuple[str, str]] = {
    "random": ("random", "random"),
    "l1": ("l1", "l1"),
    "l2": ("l2", "l2"),
    "wanda": ("wanda", "wanda"),
    "mean_activation": ("mean_activation", "mean_activation"),
    "activation_entropy": ("activation_entropy", "activation_entropy"),
    "attention_entropy + apoz": ("attention_entropy", "apoz"),
    "movement": ("movement", "movement"),
    "taylor_weights": ("taylor_weights", "taylor_weights"),
    "taylor_gates": ("taylor_gates", "taylor_gates"),
    "fisher": ("fisher", "fisher"),
}
# scores that are changes of the loss compare across heads and neurons, and by cost; others only within their kind
IN_UNITS_OF_THE_LOSS = ("taylor_weights", "taylor_gates", "fisher")

# task: (epochs of recovery, seeds)
CRITERIA_BUDGET: dict[str, tuple[float, int]] = {"mrpc": (1, 3), "sst2": (0.12, 3), "rte": (1, 1)}
SCHEDULE_BUDGET: dict[str, tuple[float, int]] = {"mrpc": (6, 2), "rte": (3, 2), "sst2": (1, 1), "qnli": (1.5, 1)}
SCHEDULES: dict[str, Any] = {
    "one_shot": OneShot(),
    "gradual": Gradual(begin=0.0, end=0.6, every=10),
    "hard_concrete": HardConcrete(begin=0.0, end=0.7),
}
LEARNING_RATE = 2e-4
ASKED = {0.5: 98, 0.75: 95, 0.9: 90}


def distillation() -> DistillationConfig:
    """The dense model's logits, the states of its last block, and the labels."""
    last = (Match(loss="hidden_mse", student=-1, teacher=6, weight=1.0),)
    return DistillationConfig(temperature=2.0, weight=1.0, label_weight=0.5, matches=last)


def calibration(rows: Any, collate: Any, seed: int) -> list[Any]:
    """Batches of randomly drawn training rows."""
    drawn = rows.train.shuffle(seed=seed).select(range(min(CALIBRATION_ROWS, len(rows.train))))
    return [
        collate([drawn[i] for i in range(start, min(start + 32, len(drawn)))]) for start in range(0, len(drawn), 32)
    ]


def scores_of(model: Any, name: str, batches: list[Any], seed: int) -> Units:
    """Scores of heads and neurons by the criteria that a row of the table names."""
    heads, neurons = CRITERIA[name]
    if heads == neurons:
        return score(model, heads, ("heads", "neurons"), batches, seed=seed)
    by_part: dict[Part, str] = {"heads": heads, "neurons": neurons}
    both = {part: score(model, by, (part,), batches, seed=seed) for part, by in by_part.items()}
    return Units(heads=both["heads"].heads, neurons=both["neurons"].neurons)


class Bench:
    """One task: its rows, its teacher's outputs, and the runs on both."""

    def __init__(self, options: argparse.Namespace, task: str) -> None:
        self.options, self.task = options, task
        train_teacher(options.data, options.work / "teachers", task, quick=options.quick)
        self.folder = options.work / "teachers" / task
        self.data, self.rows, self.collate = load_rows(options, task)

    @cached_property
    def store(self) -> TeacherStore:
        """The teacher's outputs for all training rows."""
        return teacher_store(self.options, self.task, self.rows, self.collate)

    def model(self) -> Any:
        """The dense model, embeddings frozen as everywhere in these benchmarks."""
        model = AutoModelForSequenceClassification.from_pretrained(self.folder)
        model.get_input_embeddings().requires_grad_(False)
        return model

    def quality(self, model: Any) -> dict[str, float]:
        """Metrics of the validation rows and their mean, in percent."""
        found = evaluate_classifier(
            model, self.rows.validation, self.collate, self.data.task.kind, self.data.task.metrics, progress=False
        )
        return {"score": 100 * glue_score(found)} | {name: 100 * value for name, value in found.items()}

    def saved(self, model: Any, folder: Path) -> dict[str, Any]:
        """Save with a round-trip check; sizes and max abs difference after reloading."""
        batches = [self.collate([self.rows.validation[i] for i in range(16)])]
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        measured = CompressedModel(model).save_pretrained(folder / "model", tokenizer=tokenizer, batches=batches)
        encoder = sum(p.numel() for p in model.base_model.encoder.parameters())
        return {
            "encoder_parameters": encoder,
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": size_on_disk(folder / "model").weights_bytes,
            "reload_error": measured.max_error,
        }

    def criterion(self, folder: Path, seed: int, sparsity: float, name: str) -> dict[str, Any]:
        """One-shot by a criterion, and a short recovery of the cut model."""
        set_seed(seed)
        model = self.model()
        started = time.time()
        scores = scores_of(model, name, calibration(self.rows, self.collate, seed), seed)
        ranking: Ranking = "global" if name in IN_UNITS_OF_THE_LOSS else "isomorphic"
        cut(model, select(scores, ModelSizes.of(model), Target(sparsity=sparsity), ranking=ranking))
        seconds = time.time() - started
        before = self.quality(model)
        args = arguments(folder, LEARNING_RATE, CRITERIA_BUDGET[self.task][0], seed, quick=self.options.quick)
        methods = [Distillation(distillation(), StoredTeacher(self.store))]
        trainer = CompressionTrainer(
            model, args, methods=methods, train_dataset=self.rows.train, data_collator=self.collate
        )
        trainer.train()
        trainer.finish()
        after = self.quality(model)
        heads = [block.heads for block in CompressedModel(model).structure.blocks]
        return {"before_recovery": before["score"], **after, "scoring_seconds": round(seconds, 1), "heads": heads}

    def schedule(self, folder: Path, seed: int, sparsity: float, name: str) -> dict[str, Any]:
        """A schedule, and a longer recovery within the same run."""
        set_seed(seed)
        model = self.model()
        learned = name == "hard_concrete"
        config = PruningConfig(
            target=Target(sparsity=sparsity),
            schedule=SCHEDULES[name],
            criterion=None if learned else "fisher",
            calibration_rows=CALIBRATION_ROWS,
            # scoring the calibration rows anew every ten steps would cost more than the training
            scores="training" if name == "gradual" else "calibration",
            seed=seed,
        )
        args = arguments(folder, LEARNING_RATE, SCHEDULE_BUDGET[self.task][0], seed, quick=self.options.quick)
        started = time.time()
        trainer = PruningTrainer(
            model, args, pruning=config, teacher=StoredTeacher(self.store), distillation=distillation(),
            train_dataset=self.rows.train, data_collator=self.collate,
        )  # fmt: skip
        trainer.train()
        trainer.finish()
        seconds = round(time.time() - started)
        shape = [[block.heads, block.ffn] for block in trainer.report.after.blocks]
        sizes = self.saved(model, folder)
        return {**self.quality(model), **sizes, "removed": trainer.report.removed, "shape": shape, "seconds": seconds}


def run(options: argparse.Namespace, work: Path) -> None:
    """All requested runs that do not exist yet; the first seeds of all before the second of any."""
    benches: dict[str, Bench] = {}
    budgets = {"criteria": CRITERIA_BUDGET, "schedules": SCHEDULE_BUDGET}
    names = {
        "criteria": {n: CRITERIA[n] for n in options.criteria},
        "schedules": {n: SCHEDULES[n] for n in options.schedules},
    }
    sparsities = options.sparsities or SPARSITIES
    for kind in options.parts:
        budget = budgets[kind]
        tasks = [task for task in options.tasks if task in budget]
        for seed in range(1 if options.quick else max((budget[task][1] for task in tasks), default=0)):
            for task in tasks:
                if seed >= budget[task][1]:
                    continue
                for sparsity in sparsities:
                    for name in names[kind]:
                        folder = work / kind / task / f"{name}-{sparsity}-{seed}".replace(" ", "")
                        about = {"kind": kind, "task": task, "name": name, "sparsity": sparsity, "seed": seed}
                        if task not in benches:
                            benches[task] = Bench(options, task)
                        bench = benches[task]
                        step = bench.criterion if kind == "criteria" else bench.schedule
                        once(folder, about, lambda step=step, at=(folder, seed, sparsity, name): step(*at))  # type: ignore[misc]


def summarise(runs: list[dict[str, Any]], dense: dict[str, float]) -> list[dict[str, Any]]:
    """Mean and spread over seeds, of each kind, task, name and sparsity."""
    rows: list[dict[str, Any]] = []
    for key in sorted({(r["kind"], r["task"], r["sparsity"], r["name"]) for r in runs}):
        kind, task, sparsity, name = key
        mine = [r for r in runs if (r["kind"], r["task"], r["sparsity"], r["name"]) == key]
        found = [r["score"] for r in mine]
        mean = statistics.mean(found)
        row = {
            "kind": kind, "task": task, "sparsity": sparsity, "name": name, "seeds": len(mine), "dense": dense[task],
            "score": mean, "spread": statistics.stdev(found) if len(found) > 1 else None,
            "of_dense": 100 * mean / dense[task], "scores": found, "measured_at": sorted({r["commit"] for r in mine}),
        }  # fmt: skip
        if kind == "criteria":
            row["before_recovery"] = statistics.mean(r["before_recovery"] for r in mine)
        else:
            row["reload_error"] = max(r["reload_error"] for r in mine)
            row |= {name: statistics.mean(r[name] for r in mine) for name in ("encoder_parameters", "bytes", "removed")}
        rows.append(row)
    return rows


def verdicts(rows: list[dict[str, Any]], dense: dict[str, float]) -> list[dict[str, Any]]:
    """Requested against measured numbers."""
    wanted = []

    def mean_of(kind: str, name: str, sparsity: float, tasks: list[str]) -> float | None:
        found = {r["task"]: r["score"] for r in rows if (r["kind"], r["name"], r["sparsity"]) == (kind, name, sparsity)}
        return statistics.mean(found[t] for t in tasks) if tasks and all(t in found for t in tasks) else None

    schedule_tasks = [t for t in SCHEDULE_BUDGET if any(r["kind"] == "schedules" and r["task"] == t for r in rows)]
    for sparsity, share in ASKED.items():
        found = {name: mean_of("schedules", name, sparsity, schedule_tasks) for name in SCHEDULES}
        done = {name: value for name, value in found.items() if value is not None}
        if not done:
            continue
        teacher = statistics.mean(dense[t] for t in schedule_tasks)
        best = max((n for n in done if n != "one_shot"), key=lambda n: done[n], default=None)
        if best is not None:
            kept = 100 * done[best] / teacher
            name = (
                f"{sparsity:.0%} of the encoder cut, {best}: share of the dense mean kept ({', '.join(schedule_tasks)})"
            )
            wanted.append(asked(name, f">= {share} %", kept, kept >= share))
            both = [t for t in schedule_tasks if mean_of("schedules", "one_shot", sparsity, [t]) is not None]
            if both:
                pair = [mean_of("schedules", name, sparsity, both) for name in (best, "one_shot")]
                gain = (pair[0] or 0.0) - (pair[1] or 0.0)
                of = f"{sparsity:.0%}: {best} minus one-shot ({', '.join(both)}), points"
                wanted.append(asked(of, "> 0", gain, gain > 0))
    for sparsity in ASKED:
        # where all of them are there, so that all are means over the same tasks
        criteria_tasks = [t for t in CRITERIA_BUDGET if all(mean_of("criteria", n, sparsity, [t]) for n in CRITERIA)]
        found = {name: mean_of("criteria", name, sparsity, criteria_tasks) for name in CRITERIA}
        done = {name: value for name, value in found.items() if value is not None}
        if not {"random", "l1"} <= done.keys():
            continue
        best = max(done, key=lambda n: done[n])
        gain = done[best] - max(done["random"], done["l1"])
        wanted.append(
            asked(
                f"{sparsity:.0%}: best criterion ({best}) minus the better of random and l1 "
                f"({', '.join(criteria_tasks)}), points",
                "> 0",
                gain,
                gain > 0,
            )
        )
    errors = [r["reload_error"] for r in rows if r.get("reload_error") is not None]
    if errors:
        wanted.append(asked("greatest difference of logits after reloading", "0", max(errors), max(errors) == 0))
    return wanted


def report(options: argparse.Namespace, work: Path) -> None:
    """Results of all existing runs."""
    runs = [json.loads(f.read_text()) for f in sorted(work.glob("*/*/*/row.json"))]
    runs = [r for r in runs if r["task"] in options.tasks]
    dense = {
        task: 100 * json.loads((options.work / "teachers" / task / "teacher.json").read_text())["score"]
        for task in sorted({r["task"] for r in runs})
    }
    rows = summarise(runs, dense)
    wanted = verdicts(rows, dense)
    setting = {
        "distillation": distillation().model_dump(mode="json"),
        "schedules": {name: schedule.model_dump(mode="json") for name, schedule in SCHEDULES.items()},
        "criteria_budget": CRITERIA_BUDGET,
        "schedule_budget": SCHEDULE_BUDGET,
        "learning_rate": LEARNING_RATE,
        "calibration_rows": CALIBRATION_ROWS,
    }
    path = write("pruning", rows, wanted, quick=options.quick, setting=setting)
    for row in rows:
        print(f"{row['kind']:9} {row['task']:5} {row['sparsity']:.2f} {row['name']:26} {row['of_dense']:6.1f} %")
    for item in wanted:
        print(item)
    print(path)


def main() -> None:
    """Command line."""
    parser = glue_parser(__doc__, SCHEDULE_BUDGET)
    parser.add_argument("--parts", nargs="+", choices=("criteria", "schedules"), default=("schedules", "criteria"))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--sparsities", nargs="+", type=float, help="default: 0.5 0.75 0.9")
    train_and_report("pruning", parser, run, report)


if __name__ == "__main__":
    main()
