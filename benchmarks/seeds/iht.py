"""Does a network with fewer weights match the dense one? (Jin et al. 2016, Iterative Hard Thresholding.)

Networks are trained from scratch for one fixed number of steps: dense; by hard thresholding (cycles in which each
layer's smallest weights are gone and the rest is trained, and cycles in which all come back from 0); and by cutting the
same shares once, half way. On LeNets from scratch, and on a BERT, all without three quarters of their weights. The BERT
is the MiniLM that ``benchmarks/teachers.py`` fine-tuned on MRPC, all projections of the blocks thinned (word embeddings
are frozen in all runs, and left alone), taught by the teacher's own answers in all roles, the dense one too. On labels
alone, from the pretrained model, three epochs of hard thresholding ended at the score of the most frequent class.

LeNets go by magnitude, as in the paper, the BERT by magnitude times the norm of the input (Wanda): its inputs have
lengths of their own, and by magnitude alone it ended at 76.8 where the dense one has 82.1.

    python benchmarks/seeds/iht.py --data ../shared/data --work runs

Runs that are done are kept in ``--work`` and not repeated; ``--report`` only writes the results of what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mnist
import pruning
import stages
from common import asked, once, write
from distillation import arguments
from grouped import DISTILLATION
from transformers import set_seed

from lmcompress.distillation import Distillation, StoredTeacher
from lmcompress.method import Method
from lmcompress.pruning.unstructured import HardThresholding, OneShot, Sparsity, SparsityConfig, SparsityRule
from lmcompress.trainers import CompressionTrainer

TASK = "mrpc"
EPOCHS = {"lenet-300-100": 40, "lenet-5": 10, f"bert-{TASK}": 4}
RATE = 2e-4
SPARSITY = 0.75
SCHEDULES: dict[str, Any] = {
    "iht": HardThresholding(begin=0.2, end=0.7, cycles=3, dense_share=0.5),
    "cut once": OneShot(begin=0.5),
}
# what comes back from 0 has lost what it learned before
ON_TEXT = SCHEDULES | {"iht": HardThresholding(begin=0.0, end=0.4, cycles=2, dense_share=0.3)}
ROLES = ("dense", *SCHEDULES)
NETWORKS = (*mnist.NETWORKS, f"bert-{TASK}")


def config(name: str, role: str) -> SparsityConfig:
    """How much goes, and when."""
    if name in mnist.NETWORKS:
        return SparsityConfig(sparsity=SPARSITY, schedule=SCHEDULES[role])
    # frozen: what is removed could not come back
    frozen = SparsityRule(modules="embeddings")
    return SparsityConfig(sparsity=SPARSITY, criterion="wanda", schedule=ON_TEXT[role], rules=(frozen,))


def on_images(
    options: argparse.Namespace, data: mnist.Data, name: str, seed: int, role: str, folder: Path
) -> dict[str, Any]:
    """A LeNet from scratch."""
    set_seed(seed)
    network = mnist.NETWORKS[name]()
    methods = [Sparsity(config(name, role))] if role in SCHEDULES else []
    taken = stages.trained(options, data, network, folder, epochs=EPOCHS[name], seed=seed, methods=methods)
    return taken | {"sparsity": methods[0].report.sparsity if methods and methods[0].report else 0.0}


def on_text(options: argparse.Namespace, name: str, seed: int, role: str, folder: Path) -> dict[str, Any]:
    """The teacher of a task, trained on under its own answers."""
    bench = pruning.Bench(options, TASK)
    set_seed(seed)
    model = bench.model()
    methods: list[Method] = [Sparsity(config(name, role))] if role in SCHEDULES else []
    methods.append(Distillation(DISTILLATION, StoredTeacher(bench.store)))
    args = arguments(folder, RATE, EPOCHS[name], seed, quick=options.quick)
    trainer = CompressionTrainer(
        model, args, methods=methods, train_dataset=bench.rows.train, data_collator=bench.collate
    )  # fmt: skip
    started = time.time()
    trainer.train()
    trainer.finish()
    gone = methods[0].report if isinstance(methods[0], Sparsity) else None
    return {
        "score": bench.quality(model)["score"], "steps": trainer.state.global_step, "epochs": EPOCHS[name],
        "sparsity": gone.sparsity if gone else 0.0, "seconds": round(time.time() - started),
    }  # fmt: skip


def run(options: argparse.Namespace, work: Path) -> None:
    """Everything that was asked for and is not there yet."""
    data = mnist.load(options.data, quick=options.quick)
    for seed in range(options.seeds):
        for name in options.networks:
            for role in ROLES:
                folder = work / name / str(seed) / role.replace(" ", "-")
                about = {"network": name, "seed": seed, "role": role}
                if name in mnist.NETWORKS:
                    once(folder, about, partial(on_images, options, data, name, seed, role, folder))
                else:
                    once(folder, about, partial(on_text, options, name, seed, role, folder))


def summarise(done: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, of each network and role."""
    rows = []
    for name in NETWORKS:
        for role in ROLES:
            mine = [row for row in done if (row["network"], row["role"]) == (name, role)]
            if mine:
                key = "errors" if name in mnist.NETWORKS else "score"
                rows.append(
                    {
                        "network": name, "role": role, "seeds": len(mine),
                        key: statistics.mean(r[key] for r in mine), "each": [r[key] for r in mine],
                        "sparsity": mine[0]["sparsity"], "epochs": mine[0]["epochs"], "steps": mine[0]["steps"],
                        "seconds": statistics.mean(r["seconds"] for r in mine),
                        "measured_at": sorted({r["commit"] for r in mine}),
                    }
                )  # fmt: skip
    return rows


def report(options: argparse.Namespace, work: Path) -> None:
    """Results of all runs that are there."""
    rows = summarise([json.loads(file.read_text()) for file in sorted(work.glob("*/*/*/row.json"))])
    by_name = {(row["network"], row["role"]): row for row in rows}
    wanted = []
    for name in NETWORKS:
        dense, found, once_cut = (by_name.get((name, role)) for role in ROLES)
        if dense is None or found is None:
            continue
        fewer = 1 / (1 - found["sparsity"])
        on_images = name in mnist.NETWORKS
        key, target = ("errors", f"<= {dense['errors']:g}") if on_images else ("score", f">= {dense['score']:.1f}")
        met = found[key] <= dense[key] if on_images else found[key] >= dense[key]
        what = "errors in 10 000" if on_images else "score"
        where = "weights" if on_images else "weights in the blocks"
        wanted.append(
            asked(f"{name}: {what} with {fewer:.1f} times fewer {where}", f"{target}, dense", found[key], met)
        )
        if once_cut is not None:
            wanted.append(asked(f"{name}: {key}, cut once", "reported", once_cut[key], True))
    if not wanted:
        raise SystemExit(f"there are no whole runs in {work} yet: leave out --report")
    setting = {
        "epochs": EPOCHS, "learning_rate": stages.LEARNING_RATE, "batch_size": 100,
        "bert": {"learning_rate": RATE, "batch_size": 32, "distillation": DISTILLATION.model_dump(mode="json")},
        "sparsity": {name: config(name, "iht").model_dump(mode="json", exclude_none=True) for name in options.networks},
    }  # fmt: skip
    for item in wanted:
        print(item)
    print(write("iht", rows, wanted, quick=options.quick, setting=setting))


if __name__ == "__main__":
    stages.main("iht", __doc__, run, report, networks=NETWORKS)
