"""How few weights do LeNets need when links may be spliced back? (Guo, Yao & Chen 2016, Dynamic Network Surgery.)

From a dense network, surgery cuts weights whose magnitude falls below a threshold and splices those that have grown
again behind the mask; thresholds follow the weights, so that each layer comes to the share that it is to keep. Beside
it stand the dense network, one that was trained on for as many steps, and the same shares by magnitude without
splicing (gradual), all trained by SGD with momentum and an L2 penalty, as in the paper: weights behind the mask are to
move as far as their gradients say, and with Adam's steps of one size for all they come back at random. In the end
neurons and filters go that nothing feeds or nothing reads (Han et al. 2015, section 3.5), which changes no answer. Of
``factor``, all parameters of the dense network are counted, biases included, over those that are left and not 0.

    python benchmarks/seeds/network_surgery.py --data ../shared/data --work runs

Runs that are done are kept in ``--work`` and not repeated; ``--report`` only writes the results of what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mnist
import stages
from common import asked, once, write

from lmcompress.pruning.unstructured import Gradual, Sparsity, SparsityConfig, SparsityRule, Surgery, cut_zero_units

# errors in per cent of the paper, before and after, and how many times fewer parameters
PUBLISHED = {"lenet-300-100": (2.28, 1.99, 56), "lenet-5": (0.91, 0.91, 108)}
# share of the weights of each layer that stays
KEPT = {
    "lenet-300-100": {"layers.1": 0.0148, "layers.3": 0.022, "layers.5": 0.12},
    "lenet-5": {"layers.0": 0.35, "layers.2": 0.055, "layers.5": 0.0052, "layers.7": 0.045},
}
EPOCHS = {"lenet-300-100": 30, "lenet-5": 30}
# chosen on the last 10,000 training rows: of the second network 145 wrong at 0.01 and 110 at 0.03 after 12 epochs
LEARNING_RATES = {"lenet-300-100": 0.05, "lenet-5": 0.03}
TRAINING: dict[str, Any] = {"optimizer": "sgd", "optim_args": "momentum=0.9", "weight_decay": 5e-4}
SCHEDULES: dict[str, Any] = {
    "surgery": Surgery(begin=0.0, end=0.4),
    "without splicing": Gradual(begin=0.0, end=0.4, every=20),
}
ROLES = ("dense", *SCHEDULES, "trained on")


def sparsity(name: str, role: str) -> SparsityConfig:
    """What stays of each layer, and when the rest goes."""
    rules = tuple(SparsityRule(modules=path, sparsity=1 - share) for path, share in KEPT[name].items())
    return SparsityConfig(rules=rules, schedule=SCHEDULES[role])


def train(
    options: argparse.Namespace, data: mnist.Data, name: str, seed: int, role: str, folder: Path
) -> dict[str, Any]:
    """One network in one role."""
    make = mnist.NETWORKS[name]
    start = stages.dense(options, data, name, make, seed)
    network = stages.loaded(make, start)
    if role == "dense":
        total, left = stages.parameters(network)
        row = json.loads((start / "row.json").read_text())
        return {key: row[key] for key in ("errors", "steps", "seconds")} | {"parameters": total, "left": left}
    methods = [Sparsity(sparsity(name, role))] if role in SCHEDULES else []
    taken = stages.trained(
        options,
        data,
        network,
        folder,
        epochs=EPOCHS[name],
        seed=seed,
        methods=methods,
        learning_rate=LEARNING_RATES[name],
        **TRAINING,
    )
    total, left = stages.parameters(network)
    if methods:
        assert methods[0].report is not None
        taken["kept"] = {row.path: 1 - row.sparsity for row in methods[0].report.matrices}
        taken["left_before_cut"] = left
        taken["widths"] = [row.after for row in cut_zero_units(network.layers)][:-1]
        _, left = stages.parameters(network)
        stages.keep(network, folder)
        taken["errors"] = mnist.errors(network, data.test)
    return taken | {"parameters": total, "left": left}


def run(options: argparse.Namespace, work: Path) -> None:
    """Everything that was asked for and is not there yet."""
    data = mnist.load(options.data, quick=options.quick)
    for seed in range(options.seeds):
        for name in options.networks:
            for role in ROLES:
                folder = work / name / str(seed) / role.replace(" ", "-")
                about = {"network": name, "seed": seed, "role": role}
                once(folder, about, partial(train, options, data, name, seed, role, folder))


def summarise(done: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, of each network and role."""
    rows = []
    for name in PUBLISHED:
        for role in ROLES:
            mine = [row for row in done if (row["network"], row["role"]) == (name, role)]
            if mine:
                rows.append(
                    {
                        "network": name, "role": role, "seeds": len(mine),
                        "errors": statistics.mean(r["errors"] for r in mine), "each": [r["errors"] for r in mine],
                        "parameters": mine[0]["parameters"], "left": statistics.mean(r["left"] for r in mine),
                        "factor": statistics.mean(r["parameters"] / r["left"] for r in mine),
                        "kept": mine[0].get("kept"), "widths": mine[0].get("widths"),
                        "left_before_cut": mine[0].get("left_before_cut"), "steps": mine[0]["steps"],
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
    for name, (before, after, factor) in PUBLISHED.items():
        if (name, "surgery") not in by_name or (name, "dense") not in by_name:
            continue
        found, dense = by_name[name, "surgery"], by_name[name, "dense"]
        wanted += [
            asked(f"{name}: times fewer parameters", f">= {factor}", found["factor"], found["factor"] >= factor),
            asked(
                f"{name}: errors in 10 000 (published: {before} % before, {after} % after)", f"<= {100 * after:g}",
                found["errors"], found["errors"] <= 100 * after,
            ),
            asked(
                f"{name}: errors more than the dense net's {dense['errors']:g}", "reported",
                found["errors"] - dense["errors"], True,
            ),
        ]  # fmt: skip
    if not wanted:
        raise SystemExit(f"there are no whole runs in {work} yet: leave out --report")
    setting = {
        "epochs": {"dense": stages.EPOCHS, **EPOCHS}, "learning_rates": LEARNING_RATES, **TRAINING, "batch_size": 100,
        "sparsity": {n: sparsity(n, "surgery").model_dump(mode="json", exclude_none=True) for n in options.networks},
    }  # fmt: skip
    for item in wanted:
        print(item)
    print(write("network_surgery", rows, wanted, quick=options.quick, setting=setting))


if __name__ == "__main__":
    stages.main("network_surgery", __doc__, run, report, networks=mnist.NETWORKS)
