"""What does a training step cost more when single weights are kept at zero, or shared?

The baseline is a step of plain ``Trainer`` on labels. Beside it, in the same process, in rounds of random order, steps
of each schedule of ``Sparsity`` while weights are removed, and of ``WeightSharing``. Ratios are medians of pairs within
rounds, of CPU time on one thread, plus the mean of what schedules do between steps. MiniLM's shape, 16 x 64 tokens,
without padding, blocks and word embeddings.

    python benchmarks/sparsity_overhead.py
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from common import asked, write
from speeds import add_threads, on
from steps import StepByStep, overhead
from trainer_overhead import arguments, make_batch, make_teacher
from transformers import Trainer
from transformers.utils import logging

from lmcompress.clustering import SharingConfig
from lmcompress.pruning.unstructured import SparsityConfig, Surgery
from lmcompress.schedules import Gradual, HardThresholding, OneShot
from lmcompress.trainers.sharing import SharingTrainer
from lmcompress.trainers.sparsity import SparsityTrainer

SPARSITY = 0.7
# all of it happens within the steps that are measured
SCHEDULES: dict[str, dict[str, Any]] = {
    "one shot": {"schedule": OneShot(begin=0.0)},
    "gradual": {"schedule": Gradual(begin=0.0, end=1.0)},
    "surgery": {"schedule": Surgery(begin=0.0, end=1.0, every=20)},
    "iht": {"schedule": HardThresholding(begin=0.0, end=1.0, cycles=3)},
    "movement": {"schedule": Gradual(begin=0.0, end=1.0), "criterion": "movement"},
}
MOST = 1.15


def measure(repeats: int, threads: int) -> list[dict[str, Any]]:
    """Steps of all schedules, begun anew, over plain ones."""
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder)
        args.max_steps = repeats + 2
        batch = make_batch("bert", args.device)
        trainers = {"baseline": StepByStep(Trainer(make_teacher("bert"), args), batch)}
        for name, given in SCHEDULES.items():
            config = SparsityConfig(sparsity=SPARSITY, **given)
            trainers[name] = StepByStep(SparsityTrainer(make_teacher("bert"), args, sparsity=config), batch)
        trainers["sharing"] = StepByStep(SharingTrainer(make_teacher("bert"), args, sharing=SharingConfig()), batch)
        return [{"model": "MiniLM", **row} for row in overhead(trainers, repeats, threads)]


def verdict(row: dict[str, Any]) -> dict[str, Any]:
    """What was asked for a row, beside what came."""
    name = f"{row['method']}: step over a plain step, {on(row['threads'])}"
    return asked(name, f"<= {MOST}", row["ratio"], row["ratio"] <= MOST, busy=row["busy"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="four repeats")
    add_threads(parser, default=(1,))
    options = parser.parse_args()
    logging.set_verbosity_error()
    repeats = 4 if options.quick else options.repeats
    rows = [row for threads in options.threads for row in measure(repeats, threads)]
    wanted = [verdict(row) for row in rows if row["kind"] == "other"]
    for line in rows + wanted:
        print(line)
    print(write("sparsity_overhead", rows, wanted, quick=options.quick, setting={"sparsity": SPARSITY}))


if __name__ == "__main__":
    main()
