"""How much can go without retraining, by second derivatives and by magnitude? (LeCun, Denker & Solla 1990, OBD.)

From one dense network, weights are set to 0 in the order of their saliency, without training: exact second derivatives
(``obd``), the empirical Fisher information (``fisher``), magnitudes and chance. All are compared over the whole
network, biases left alone. What saliencies foretell is the loss on the training rows, which is what the curves show
beside the errors on the test rows. Second derivatives are those on ``ROWS`` training rows.

Saliencies are of single weights, as if each went alone. So that the network fits that: each pixel has mean 0 over the
training rows (LeCun et al. 1998, *Efficient BackProp*, section 4.3; a pixel that is the same in all images is a second
bias, and what many small weights of it add up to is no sum of squares), and training stops while the loss can still be
told from 0, where all derivatives are 0 too. Without the first, magnitudes do better on LeNet-300-100 from 40 % on;
after five times the epochs, between 35 and 70 %.

    python benchmarks/seeds/obd.py --data ../shared/data --work runs

The curves are drawn to ``results/obd.svg``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import mnist
import stages
import torch
from common import RESULTS, asked, once, write
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lmcompress.pruning.unstructured import SparsityConfig
from lmcompress.pruning.unstructured.planning import choose, plan
from lmcompress.pruning.unstructured.scoring import score

CRITERIA = ("obd", "fisher", "magnitude", "random")
SHARES = tuple(round(0.05 * step, 2) for step in range(20))
FROM = 0.2
ROWS, LOSS_ROWS = 2000, 10000
EPOCHS = 8


def curve(options: argparse.Namespace, data: mnist.Data, name: str, seed: int, criterion: str) -> dict[str, Any]:
    """Loss and errors at each share."""
    make = mnist.NETWORKS[name]
    network = stages.loaded(make, stages.dense(options, data, name, make, seed, kind="centred", epochs=EPOCHS))
    config = SparsityConfig(sparsity=0.5, criterion=criterion, scope="global")
    planned, _ = plan(network, config)
    count = 50 if options.quick else ROWS
    batches = [data.train.__getitems__(range(start, min(start + 100, count))) for start in range(0, count, 100)]
    scores = score(network, planned, criterion, batches, seed=seed)
    dense = [one.weight.detach().clone() for one in planned]
    losses, errors = [], []
    for share in SHARES:
        masks = choose(planned, config, scores, share / 0.5)
        with torch.no_grad():
            for one, mask, weight in zip(planned, masks, dense, strict=True):
                one.weight.copy_(weight.masked_fill(~one.stored(mask), 0.0))
        losses.append(loss(network, data.train))
        errors.append(mnist.errors(network, data.test))
    return {"losses": losses, "errors": errors, "weights": sum(weight.numel() for weight in dense)}


@torch.no_grad()
def loss(network: mnist.Network, rows: mnist.Images) -> float:
    """Mean cross entropy of the first rows."""
    count = min(LOSS_ROWS, len(rows))
    frozen = copy.deepcopy(network).eval()
    total = 0.0
    for start in range(0, count, 1000):
        batch = rows.__getitems__(range(start, min(start + 1000, count)))
        total += float(frozen(**batch)["loss"]) * len(batch["labels"])
    return total / count


def run(options: argparse.Namespace, work: Path) -> None:
    """Everything that was asked for and is not there yet."""
    data = mnist.load(options.data, quick=options.quick).centred()
    for seed in range(options.seeds):
        for name in options.networks:
            for criterion in CRITERIA:
                about = {"network": name, "seed": seed, "criterion": criterion}
                folder = work / name / str(seed) / criterion
                once(folder, about, partial(curve, options, data, name, seed, criterion))


def summarise(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of each curve."""
    rows = []
    for name in mnist.NETWORKS:
        for criterion in CRITERIA:
            mine = [row for row in done if (row["network"], row["criterion"]) == (name, criterion)]
            if mine:
                means = {
                    key: [statistics.mean(values) for values in zip(*(r[key] for r in mine), strict=True)]
                    for key in ("losses", "errors")
                }
                rows.append(
                    {
                        "network": name, "criterion": criterion, "seeds": len(mine), "removed": SHARES, **means,
                        "weights": mine[0]["weights"], "measured_at": sorted({r["commit"] for r in mine}),
                    }
                )  # fmt: skip
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss and errors over the share that is removed, a column for each network."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(4.5 * len(names), 6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(2, len(names), squeeze=False, sharex=True)
    for column, name in enumerate(names):
        for key, label, axis in (
            ("losses", "loss on training rows", axes[0][column]),
            ("errors", "errors of 10 000", axes[1][column]),
        ):
            for row in rows:
                if row["network"] == name:
                    axis.plot(row["removed"], row[key], label=row["criterion"])
            axis.set(yscale="log", ylabel=label, title=name if key == "losses" else "")
            axis.grid(alpha=0.3)
        axes[1][column].set_xlabel("share of weights removed, without retraining")
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def report(options: argparse.Namespace, work: Path) -> None:
    """Results of all runs that are there."""
    rows = summarise([json.loads(file.read_text()) for file in sorted(work.glob("*/*/*/row.json"))])
    by_name = {(row["network"], row["criterion"]): row for row in rows}
    wanted = []
    for name in mnist.NETWORKS:
        if not {(name, "obd"), (name, "magnitude")} <= by_name.keys():
            continue
        second, first = by_name[name, "obd"], by_name[name, "magnitude"]
        for key, target in (("losses", f"all below magnitude's from {FROM:.0%}"), ("errors", "reported")):
            pairs = [
                (share, a < b)
                for share, a, b in zip(SHARES, second[key], first[key], strict=True)
                if share >= FROM
            ]  # fmt: skip
            below = sum(under for _, under in pairs)
            met = below == len(pairs) or target == "reported"
            wanted.append(asked(f"{name}: OBD's {key}", target, f"{below} of {len(pairs)} shares below", met))
    if not wanted:
        raise SystemExit(f"there are no whole runs in {work} yet: leave out --report")
    for item in wanted:
        print(item)
    path = write(
        "obd", rows, wanted, quick=options.quick, setting={"rows": ROWS, "loss_rows": LOSS_ROWS, "epochs": EPOCHS}
    )
    draw(rows, (path.parent if options.quick else RESULTS) / "obd.svg")
    print(path)


if __name__ == "__main__":
    stages.main("obd", __doc__, run, report, networks=mnist.NETWORKS)
