"""Does a student of soft targets make half as many errors as a student of labels? (Hinton, Vinyals & Dean 2015.)

The paper's experiment on MNIST (section 3): a teacher of 2 × 1200 ReLU units is trained with dropout and with images
that are shifted by up to two pixels; a student of 2 × 800 units has neither. It is trained on the labels alone, and on
the teacher's answers at temperature 20, on the very images of the training set, none of them shifted. Everything else
of the two students is equal: start, order of the rows, steps. The paper has 67, 146 and 74 errors.

    python benchmarks/seeds/hinton.py --data ../shared/data --work runs

Networks and runs that are done are kept in ``--work`` and not repeated; ``--report`` only writes the results.
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
import stages
import torch
from common import asked, once, write
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import set_seed

from lmcompress.distillation.losses.distributions import kl_divergence
from lmcompress.method import Method, Step, Term

WIDTHS = {"teacher": (1200, 1200), "student": (800, 800)}
PUBLISHED = {"teacher": 67, "labels": 146, "soft targets": 74}
TEMPERATURE, LABEL_WEIGHT, JITTER = 20.0, 0.1, 2
EPOCHS = {"teacher": 400, "student": 150}
BATCH_SIZE = 250
# of 1e-3, 3e-3 and 1e-2 the best for the student of soft targets, on 10 000 held-out training rows
LEARNING_RATES = {"teacher": 1e-3, "student": 3e-3}


class SoftTargets(Method):
    """The teacher's answers of the column ``teacher_logits``, softened, and the labels with a small weight."""

    name = "soft_targets"
    max_norm = None

    def loss_terms(self, step: Step) -> dict[str, Term]:
        answers = step.inputs["teacher_logits"]
        total = kl_divergence(step.outputs["logits"], answers, temperature=TEMPERATURE).sum()
        return {"kd": Term(total, "examples")}

    def label_weight(self, progress: float) -> float:
        return LABEL_WEIGHT

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []

    def modules(self) -> dict[str, nn.Module]:
        return {}


def teacher(folder: Path, data: mnist.Data, *, quick: bool) -> dict[str, Any]:
    """Train the teacher, keep its weights, count its errors."""
    set_seed(0)
    network = mnist.mlp(WIDTHS["teacher"], dropout=0.5, input_dropout=0.2)
    taken = _trained(network, data.train.jittered(JITTER), folder, "teacher", 0, quick=quick)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu() for name, tensor in network.state_dict().items()}, folder / "teacher.safetensors")
    return taken | {"errors": mnist.errors(network, data.test)}


def student(folder: Path, data: mnist.Data, answers: Path | None, seed: int, *, quick: bool) -> dict[str, Any]:
    """Train a student on labels, or on the answers of a teacher, and count its errors."""
    rows, methods = data.train, []
    if answers is not None:
        network = mnist.mlp(WIDTHS["teacher"], dropout=0.5, input_dropout=0.2)
        network.load_state_dict(load_file(answers))
        rows, methods = rows.with_columns(teacher_logits=mnist.logits_of(network, rows)), [SoftTargets()]
    set_seed(seed)
    network = mnist.mlp(WIDTHS["student"])
    taken = _trained(network, rows, folder, "student", seed, quick=quick, methods=methods)
    return taken | {"errors": mnist.errors(network, data.test)}


def _trained(
    network: nn.Module, rows: mnist.Images, folder: Path, role: str, seed: int, *, quick: bool, **given: Any
) -> dict[str, Any]:
    started = time.time()
    limit = {"max_steps": 5} if quick else {}
    trainer = mnist.train(
        network, rows, folder / "trainer", epochs=EPOCHS[role], learning_rate=LEARNING_RATES[role],
        batch_size=BATCH_SIZE, bf16=True, seed=seed, **limit, **given,
    )  # fmt: skip
    return {"steps": trainer.state.global_step, "seconds": round(time.time() - started)}


def run(options: argparse.Namespace, work: Path) -> None:
    """Everything that was asked for and is not there yet."""
    data = mnist.load(options.data, quick=options.quick)
    quick = options.quick
    once(work / "teacher", {"name": "teacher", "seed": 0}, partial(teacher, work / "teacher", data, quick=quick))
    for seed in range(options.seeds):
        for name, answers in (("labels", None), ("soft targets", work / "teacher" / "teacher.safetensors")):
            folder = work / f"{name.replace(' ', '-')}-{seed}"
            about = {"name": name, "seed": seed}
            once(folder, about, partial(student, folder, data, answers, seed, quick=quick))


def summarise(done: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean errors over seeds."""
    rows = []
    for name, published in PUBLISHED.items():
        mine = [row for row in done if row["name"] == name]
        if mine:
            rows.append(
                {
                    "name": name, "units": WIDTHS["teacher" if name == "teacher" else "student"], "seeds": len(mine),
                    "errors": statistics.mean(row["errors"] for row in mine),
                    "each": [row["errors"] for row in mine], "published": published, "steps": mine[0]["steps"],
                    "seconds": statistics.mean(row["seconds"] for row in mine),
                    "measured_at": sorted({row["commit"] for row in mine}),
                }
            )  # fmt: skip
    return rows


def report(options: argparse.Namespace, work: Path) -> None:
    """Results of all runs that are there."""
    rows = summarise([json.loads(file.read_text()) for file in sorted(work.glob("*/row.json"))])
    errors = {row["name"]: row["errors"] for row in rows}
    if not errors.keys() >= PUBLISHED.keys():
        raise SystemExit(f"runs are missing in {work}: leave out --report")
    ratio = errors["soft targets"] / errors["labels"]
    wanted = [
        asked("MNIST, 2×800: errors with soft targets over errors with labels", "<= 0.5", ratio, ratio <= 0.5),
        asked("MNIST, 2×1200 teacher: errors (published: 67)", "reported", errors["teacher"], True),
    ]
    setting = {
        "temperature": TEMPERATURE, "label_weight": LABEL_WEIGHT, "jitter": JITTER, "epochs": EPOCHS,
        "batch_size": BATCH_SIZE, "precision": "bfloat16 autocast", "learning_rates": LEARNING_RATES,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }  # fmt: skip
    for row in rows:
        print(f"{row['name']:13} {row['errors']:6.1f} errors (published: {row['published']})")
    for item in wanted:
        print(item)
    print(write("hinton", rows, wanted, quick=options.quick, setting=setting))


if __name__ == "__main__":
    stages.main("hinton", __doc__, run, report)
