"""How many bytes do the LeNets of Deep Compression take on disk, at no more errors than before? (Han et al. 2016.)

Three stages, as in the paper, each with the trainer's one loop:

* ``pruned``: magnitudes, gradually (Zhu & Gupta's cubic schedule), each layer to a share of its own, with retraining;
* ``shared``: k-means with linear start on what is left (256 values for convolutions, 32 for the others), and the
  values are trained;
* ``coded``: weights and biases as entropy-coded streams in a safetensors file, once with Huffman's code alone as in
  the paper, once with the smaller of zstd and Huffman.

Errors of ``coded`` are those of a network that was loaded from the file. Beside the dense network, which is trained
first and from which pruning starts, stands one that was trained on for as many steps as pruning and sharing took. All
that is trained after the dense network has dropout, as the paper's retraining (Han et al. 2015, section 3.2): less of
it, as fewer weights are left to overfit.

    python benchmarks/seeds/deep_compression.py --data ../shared/data --work runs

Networks and runs that are done are kept in ``--work`` and not repeated; ``--report`` only writes the results.
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
from torch import nn

from lmcompress import entropy_coding as coding
from lmcompress.clustering import SharingConfig, WeightSharing
from lmcompress.pruning.unstructured import Gradual, Sparsity, SparsityConfig, SparsityRule

# error in per cent and ratio of the paper, before and after
PUBLISHED = {"lenet-300-100": (1.64, 1.58, 40), "lenet-5": (0.80, 0.74, 39)}
# share of the weights of each layer that stays
KEPT = {
    "lenet-300-100": {"layers.1": 0.065, "layers.3": 0.12, "layers.5": 0.45},
    "lenet-5": {"layers.0": 0.6, "layers.2": 0.2, "layers.5": 0.05, "layers.7": 0.2},
}
EPOCHS = {"lenet-300-100": {"pruned": 40, "shared": 5}, "lenet-5": {"pruned": 8, "shared": 1}}
# shares of the pixels and of the hidden units
DROPOUT = (0.1, 0.2)
LEARNING_RATES = {"pruned": 1e-3, "shared": 1e-4}
SHARING = SharingConfig()
CODERS: tuple[coding.Coder, ...] = ("huffman", "auto")


class Bench:
    """One network with one seed, and the folder of its stages."""

    def __init__(self, options: argparse.Namespace, data: mnist.Data, name: str, seed: int, work: Path) -> None:
        self.options, self.data, self.name, self.seed = options, data, name, seed
        self.folder = work / name / str(seed)

    def run(self) -> None:
        """All stages that are not done yet."""
        for stage in (self.dense, self.pruned, self.shared, self.coded, self.trained_on):
            name = stage.__name__
            about = {"network": self.name, "seed": self.seed, "stage": name.replace("_", " ")}
            once(self.folder / name, about, partial(stage, self.folder / name))

    def dense(self, folder: Path) -> dict[str, Any]:
        start = stages.dense(self.options, self.data, self.name, mnist.NETWORKS[self.name], self.seed)
        stages.keep(stages.loaded(mnist.NETWORKS[self.name], start), folder)
        row = json.loads((start / "row.json").read_text())
        return {key: row[key] for key in ("errors", "steps", "seconds")} | {"bytes": size(folder)}

    def trained_on(self, folder: Path) -> dict[str, Any]:
        epochs = sum(EPOCHS[self.name].values())
        return self.trained(self.network("dense"), folder, "pruned", epochs=epochs)

    def pruned(self, folder: Path) -> dict[str, Any]:
        method = Sparsity(sparsity(self.name))
        taken = self.trained(self.network("dense"), folder, "pruned", methods=[method])
        assert method.report is not None
        kept = {row.path: 1 - row.sparsity for row in method.report.matrices}
        return taken | {"factor": method.report.factor, "kept": kept}

    def shared(self, folder: Path) -> dict[str, Any]:
        method = WeightSharing(SHARING)
        taken = self.trained(self.network("pruned"), folder, "shared", methods=[method])
        assert method.report is not None
        return taken | {"clusters": {row.path: row.clusters for row in method.report.matrices}}

    def coded(self, folder: Path) -> dict[str, Any]:
        tensors = self.network("shared").state_dict()
        folder.mkdir(parents=True, exist_ok=True)
        sizes = {
            coder: coding.save_file(tensors, folder / f"{coder}.safetensors", coder) for coder in ("huffman", "auto")
        }
        network = mnist.NETWORKS[self.name]()
        network.load_state_dict(coding.load_file(folder / "auto.safetensors"))
        info = coding.describe_file(folder / "auto.safetensors").values()
        shannon = sum(one.shannon_bits for one in info) / 8
        streams = sum(one.bytes for one in info)
        return {
            "errors": mnist.errors(network, self.data.test), "bytes": sizes["auto"], "bytes_huffman": sizes["huffman"],
            "bytes_streams": streams, "bytes_shannon": shannon,
        }  # fmt: skip

    def network(self, stage: str) -> mnist.Network:
        """The network as a stage has left it."""
        return stages.loaded(mnist.NETWORKS[self.name], self.folder / stage)

    def trained(self, network: nn.Module, folder: Path, stage: str, **given: Any) -> dict[str, Any]:
        """Train, keep the weights, and count errors and bytes."""
        given = {"epochs": EPOCHS[self.name][stage], "learning_rate": LEARNING_RATES[stage]} | given
        with mnist.dropout(network, *DROPOUT):
            taken = stages.trained(self.options, self.data, network, folder, seed=self.seed, **given)
        return taken | {"bytes": size(folder)}


def size(folder: Path) -> int:
    """Bytes of the network that a stage has left."""
    return (folder / stages.FILE).stat().st_size


def sparsity(name: str) -> SparsityConfig:
    """What stays of each layer, and when the rest goes: half of the steps are left for retraining."""
    rules = tuple(SparsityRule(modules=path, sparsity=1 - share) for path, share in KEPT[name].items())
    return SparsityConfig(rules=rules, schedule=Gradual(begin=0.0, end=0.5))


def run(options: argparse.Namespace, work: Path) -> None:
    """Everything that was asked for and is not there yet."""
    data = mnist.load(options.data, quick=options.quick)
    for seed in range(options.seeds):
        for name in options.networks:
            Bench(options, data, name, seed, work).run()


def summarise(done: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, of each network and stage."""
    rows = []
    for name in PUBLISHED:
        for stage in ("dense", "trained on", "pruned", "shared", "coded"):
            mine = [row for row in done if (row["network"], row["stage"]) == (name, stage)]
            if not mine:
                continue
            dense = statistics.mean(r["bytes"] for r in done if (r["network"], r["stage"]) == (name, "dense"))
            row = {
                "network": name, "stage": stage, "seeds": len(mine),
                "errors": statistics.mean(r["errors"] for r in mine), "each": [r["errors"] for r in mine],
                "bytes": statistics.mean(r["bytes"] for r in mine),
                "measured_at": sorted({r["commit"] for r in mine}),
            }  # fmt: skip
            row["ratio"] = dense / row["bytes"]
            row |= {key: mine[0][key] for key in ("factor", "kept", "clusters", "steps") if key in mine[0]}
            for key in ("bytes_huffman", "bytes_streams", "bytes_shannon", "seconds"):
                if key in mine[0]:
                    row[key] = statistics.mean(r[key] for r in mine)
            rows.append(row)
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked, against what came."""
    wanted = []
    by_name = {(row["network"], row["stage"]): row for row in rows}
    for name, (before, after, ratio) in PUBLISHED.items():
        if (name, "coded") not in by_name:
            continue
        dense, coded = by_name[name, "dense"], by_name[name, "coded"]
        wanted += [
            asked(f"{name}: dense file over coded file", f">= {ratio}", coded["ratio"], coded["ratio"] >= ratio),
            asked(
                f"{name}: errors in 10 000 (published: {before} % before, {after} % after)",
                f"<= {dense['errors']:g}, the dense net's", coded["errors"], coded["errors"] <= dense["errors"],
            ),
            asked(
                f"{name}: the same with Huffman's code alone", "reported", dense["bytes"] / coded["bytes_huffman"], True
            ),
        ]  # fmt: skip
    return wanted


def report(options: argparse.Namespace, work: Path) -> None:
    """Results of all runs that are there."""
    done = [json.loads(file.read_text()) for file in sorted(work.glob("*/*/*/row.json"))]
    rows = summarise([row for row in done if row["network"] in options.networks])
    wanted = verdicts(rows)
    if not wanted:
        raise SystemExit(f"there are no whole runs in {work} yet: leave out --report")
    setting = {
        "epochs": {"dense": stages.EPOCHS} | EPOCHS, "learning_rates": LEARNING_RATES, "kept": KEPT,
        "batch_size": 100, "dropout": DROPOUT,
        "sharing": SHARING.model_dump(mode="json"),
        "sparsity": {name: sparsity(name).model_dump(mode="json", exclude_none=True) for name in options.networks},
    }  # fmt: skip
    for row in rows:
        print(f"{row['network']:14} {row['stage']:10} {row['errors']:6.1f} errors {row['bytes']:10.0f} bytes", end=" ")
        print(f"{row['ratio']:6.1f} x")
    for item in wanted:
        print(item)
    print(write("deep_compression", rows, wanted, quick=options.quick, setting=setting))


if __name__ == "__main__":
    stages.main("deep_compression", __doc__, run, report, networks=mnist.NETWORKS)
