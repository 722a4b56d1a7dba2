"""How small is the file of a fine-tuned BERT that is pruned, shares its weights and is coded? (Han, Mao & Dally 2016.)

The models are the MiniLM teachers of ``benchmarks/teachers.py``. Three stages, trained on the outputs of the dense
model (logits, and hidden states of three layers, from the disk store of ``benchmarks/distillation.py``), no labels:

* ``pruned``: the smallest magnitudes of each matrix of the blocks are pruned along a cubic ramp; the second half of the
steps
  is recovery. Token embeddings stay: half of them pruned and 16 values for the rest are as many bytes as 6 values for
  all, which lose less;
* ``shared``: k-means of the remaining weights of each matrix and of the token embeddings, and the values are trained;
* ``coded``: the checkpoint is written as entropy-coded streams with a round-trip check.

Scores of ``coded`` are of the model that was loaded from the file by plain ``AutoModelForSequenceClassification``; the
last epoch counts, not the best. Beside the file stands the same checkpoint, uncoded, through ``zstd -19``.

    python benchmarks/teachers.py --data ../shared/data --work runs/teachers --tasks mrpc sst2
    python benchmarks/deep_compression_bert.py --data ../shared/data --work runs

Finished runs are kept in ``--work`` and not repeated; ``--report`` only writes the results of existing runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pruning
import torch
from common import asked, glue_parser, once, train_and_report, write
from distillation import arguments
from qat_glue import distillation
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from lmcompress.clustering import SharingConfig, SharingRule
from lmcompress.distillation import StoredTeacher
from lmcompress.evaluation import size_on_disk
from lmcompress.evaluation.size import stream_table
from lmcompress.model import CompressedModel
from lmcompress.pruning.unstructured import Gradual, SparsityConfig, SparsityRule
from lmcompress.trainers.sharing import SharingTrainer
from lmcompress.trainers.sparsity import SparsityTrainer

STAGES = ("dense", "pruned", "shared", "coded")
# epochs of the two stages that train
BUDGET = {"mrpc": (5.0, 2.0), "sst2": (0.4, 0.1)}
LEARNING_RATES = {"pruned": 2e-4, "shared": 5e-5}
SPARSITY = SparsityConfig(
    sparsity=0.55,
    rules=(SparsityRule(modules="embeddings"), SparsityRule(modules="pooler.dense", sparsity=0.55)),
    schedule=Gradual(begin=0.0, end=0.5, every=10),
)
SHARING = SharingConfig(clusters=16, embedding_clusters=6, rules=(SharingRule(modules="pooler.dense", clusters=16),))
ASKED_RATIO, ASKED_POINTS, ASKED_SHANNON = 12.0, 1.0, 1.01


class Bench(pruning.Bench):
    """One task: its rows, its teacher's outputs, and the stages."""

    def dense(self, folder: Path, seed: int) -> dict[str, Any]:
        """The teacher."""
        return {"steps": 0, **self.quality(self.loaded(self.folder)), "bytes": size_on_disk(self.folder).weights_bytes}

    def pruned(self, folder: Path, seed: int) -> dict[str, Any]:
        """Most weights are pruned."""
        trainer = self.trainer(SparsityTrainer, self.folder, folder, {"sparsity": SPARSITY}, "pruned", seed)
        taken = self.trained(trainer, folder, "plain")
        return taken | {"sparsity": trainer.report.sparsity}

    def shared(self, folder: Path, seed: int) -> dict[str, Any]:
        """The remaining weights are clustered."""
        start = folder.parent / "pruned" / "model"
        trainer = self.trainer(SharingTrainer, start, folder, {"sharing": SHARING}, "shared", seed)
        taken = self.trained(trainer, folder, "plain")
        return taken | {"matrices": [row.path for row in trainer.report.matrices]}

    def coded(self, folder: Path, seed: int) -> dict[str, Any]:
        """The same weights in fewer bytes, reloaded."""
        plain = folder.parent / "shared" / "model"
        started = time.time()
        model = self.loaded(plain)
        measured = self.saved_as(model, folder, "auto")
        written = time.time() - started
        paths = json.loads((folder.parent / "shared" / "row.json").read_text())["matrices"]
        info = [
            one
            for name, one in stream_table(folder / "model").items()
            if name.removesuffix(".weight").removeprefix("bert.") in paths
        ]
        assert len(info) == len(paths), "a matrix of shared values is no stream"
        streams, shannon = sum(one.bytes for one in info), sum(one.shannon_bits for one in info) / 8
        over = {"over_shannon": streams / shannon, "most_over_shannon": max(8 * i.bytes / i.shannon_bits for i in info)}
        found = {
            "steps": 0, "seconds": round(written), **self.quality(self.loaded(folder / "model")), **measured,
            "bytes_matrices": streams, "bytes_shannon": shannon, **over,
        }  # fmt: skip
        if find_spec("zstandard") is not None:
            import zstandard

            raw = (plain / "model.safetensors").read_bytes()
            found["bytes_zstd_19"] = len(zstandard.ZstdCompressor(level=19).compress(raw))
        return found

    def loaded(self, folder: Path) -> Any:
        """A checkpoint as its users load it."""
        return AutoModelForSequenceClassification.from_pretrained(folder)

    def trainer(self, kind: Any, start: Path, folder: Path, config: dict[str, Any], stage: str, seed: int) -> Any:
        """The trainer of a stage."""
        set_seed(seed)
        epochs = BUDGET[self.task][("pruned", "shared").index(stage)]
        args = arguments(folder, LEARNING_RATES[stage], epochs, seed, quick=self.options.quick)
        model = self.loaded(start)
        # not pruned: not trained either, as everywhere in these benchmarks
        model.get_input_embeddings().requires_grad_(stage == "shared")
        return kind(
            model, args, data_collator=self.collate, train_dataset=self.rows.train,
            teacher=StoredTeacher(self.store), distillation=distillation(), **config,
        )  # fmt: skip

    def trained(self, trainer: Any, folder: Path, storage: Any) -> dict[str, Any]:
        """Train, save, measure."""
        started = time.time()
        trainer.train()
        trainer.finish()
        taken = {"steps": trainer.state.global_step, "seconds": round(time.time() - started)}
        return taken | self.quality(trainer.student) | self.saved_as(trainer.student, folder, storage)

    def saved_as(self, model: Any, folder: Path, storage: Any) -> dict[str, Any]:
        """Write a model with a round-trip check."""
        batches = [self.collate([self.rows.validation[i] for i in range(16)])]
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        measured = CompressedModel(model.cpu()).save_pretrained(
            folder / "model", tokenizer=tokenizer, batches=batches, storage=storage
        )
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return {"bytes": size_on_disk(folder / "model").weights_bytes, "reload_error": measured.max_error}


def run(options: argparse.Namespace, work: Path) -> None:
    """All requested runs that do not exist yet; the first seeds of all before the second of any."""
    benches: dict[str, Bench] = {}
    for seed in range(1 if options.quick else options.seeds):
        for task in options.tasks:
            if task not in benches:
                benches[task] = Bench(options, task)
            for stage in STAGES:
                folder = work / task / str(seed) / stage
                step = partial(getattr(benches[task], stage), folder, seed)
                once(folder, {"task": task, "seed": seed, "stage": stage}, step)


def summarise(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds, of each task and stage."""
    rows = []
    for task in BUDGET:
        for stage in STAGES:
            mine = [row for row in done if (row["task"], row["stage"]) == (task, stage)]
            if not mine:
                continue
            dense = next(r["bytes"] for r in done if (r["task"], r["stage"]) == (task, "dense"))
            scores = [r["score"] for r in mine]
            numbers = (
                "sparsity", "seconds", "bytes_matrices", "bytes_shannon", "over_shannon", "most_over_shannon",
                "bytes_zstd_19",
            )  # fmt: skip
            rows.append(
                {
                    "task": task, "stage": stage, "seeds": len(mine), "score": statistics.mean(scores),
                    "spread": statistics.stdev(scores) if len(scores) > 1 else None, "scores": scores,
                    "bytes": statistics.mean(r["bytes"] for r in mine), "steps": mine[0]["steps"],
                    "reload_error": max(r.get("reload_error", 0.0) for r in mine),
                    "measured_at": sorted({r["commit"] for r in mine}),
                }
                | {name: statistics.mean(r[name] for r in mine) for name in numbers if name in mine[0]}
            )  # fmt: skip
            rows[-1]["ratio"] = dense / rows[-1]["bytes"]
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requested against measured numbers."""
    wanted = []
    by_name: Mapping[tuple[str, str], dict[str, Any]] = {(row["task"], row["stage"]): row for row in rows}
    for task in BUDGET:
        if (task, "coded") not in by_name:
            continue
        dense, coded = by_name[task, "dense"], by_name[task, "coded"]
        lost, over, ratio = dense["score"] - coded["score"], coded["over_shannon"], coded["ratio"]
        wanted += [
            asked(f"{task}: dense file over coded file", f">= {ASKED_RATIO:g}", ratio, ratio >= ASKED_RATIO),
            asked(f"{task}: points lost", f"<= {ASKED_POINTS:g}", lost, lost <= ASKED_POINTS),
            asked(
                f"{task}: shared matrices over their zero-order entropy",
                f"<= {ASKED_SHANNON}",
                over,
                over <= ASKED_SHANNON,
            ),
            asked(
                f"{task}: greatest difference after reloading", "0", coded["reload_error"], not coded["reload_error"]
            ),
        ]
    return wanted


def report(options: argparse.Namespace, work: Path) -> None:
    """Results of all existing runs."""
    done = [json.loads(file.read_text()) for file in sorted(work.glob("*/*/*/row.json"))]
    rows = summarise([row for row in done if row["task"] in options.tasks])
    wanted = verdicts(rows)
    if not wanted:
        raise SystemExit(f"there are no whole runs in {work} yet: leave out --report")
    setting = {
        "epochs": BUDGET, "learning_rates": LEARNING_RATES, "sharing": SHARING.model_dump(mode="json"),
        "sparsity": SPARSITY.model_dump(mode="json", exclude_none=True),
        "distillation": distillation().model_dump(mode="json"),
    }  # fmt: skip
    for row in rows:
        print(f"{row['task']:5} {row['stage']:7} {row['score']:6.2f} {row['bytes']:11,.0f} bytes {row['ratio']:6.1f} x")
    for item in wanted:
        print(item)
    print(write("deep_compression_bert", rows, wanted, quick=options.quick, setting=setting))


def main() -> None:
    """Command line."""
    parser = glue_parser(__doc__, BUDGET)
    parser.add_argument("--seeds", type=int, default=1)
    train_and_report("deep_compression_bert", parser, run, report)


if __name__ == "__main__":
    main()
