"""How much quality does a fine-tuned BERT keep with 8-, 4- and 2-bit weights and embeddings and 8-bit activations?

The models are the MiniLM teachers of ``benchmarks/teachers.py``. Each is quantized

* ``without training``: rounded to nearest (``rtn``) and with GPTQ, on some training rows;
* ``trained``: on the outputs of the unquantized model, logits and hidden states of three layers. No labels. By
  default one quantizer for each number of bits: by row the range that weights have at 8, and LSQ at 4; at 2 the ternary
  rule of TBT, a scale for 64 neighbours (``tbt-g64``). Others by ``--methods``. Learned scales move as in
  ``benchmarks/qat_lm.py``. As RTE's teacher comes from QNLI's, so does its student from QNLI's student.

Token embeddings have the bits of the weights, but for ``tbt`` and ``tbt-g64``, whose have 4: some thousand sentences do
not teach the words that they lack, and ternary ones of MRPC cost 2.7 points more (``tbt-e2``).

Activations are quantized as in the papers, with one range for each tensor of a batch, within attention too. Scores are
of the model that was packed, saved and loaded again; the last epoch counts, not the best.

    python benchmarks/teachers.py --data ../shared/data --work runs/teachers
    python benchmarks/qat_glue.py --data ../shared/data --work runs

Finished runs are kept in ``--work`` and not repeated; ``--report`` only writes the results of existing runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pruning
import torch
from common import asked, glue_parser, once, train_and_report, write
from distillation import MATCHED, arguments
from qat_lm import SCALE_RATE, scale_rate
from teachers import START
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from lmcompress.checkpoint.encoding import unpacked
from lmcompress.distillation import DistillationConfig, LiveTeacher, Match, StoredTeacher
from lmcompress.evaluation import size_on_disk
from lmcompress.model import CompressedModel
from lmcompress.numerics.quantizers.registry import QUANTIZERS
from lmcompress.quantization import ActivationScheme, QuantizationConfig, WeightScheme
from lmcompress.quantization.ptq import Method, quantize
from lmcompress.quantization.report import QuantizationReport
from lmcompress.trainers.quantization import QuantizationTrainer

BITS = (8, 4, 2)
# share of the teacher's mean, in per cent
ASKED = {8: 99.5, 4: 99.0, 2: 97.0}
# 8 and 4 bits; task: epochs, chosen for two hours on two cores
BUDGET: dict[str, float] = {"mrpc": 3, "sst2": 0.3, "qnli": 0.5, "rte": 3}
# 2 bits; more of MRPC, or copies of its rows in which words were replaced, did not help
TWO_BITS: dict[str, float] = {"mrpc": 3, "sst2": 0.9, "qnli": 3, "rte": 6}
# what has to be learned anew is more with fewer bits; of 1e-4, 3e-4 and 5e-4 the best for MRPC at 2
LEARNING_RATES = {8: 2e-5, 4: 5e-5, 2: 3e-4}

ROUNDED: dict[str, Method] = {"rtn": "rtn", "gptq": "gptq"}


class Trained(NamedTuple):
    """A way of quantization-aware training.

    Attributes:
        quantizer: of weights.
        granularity: which weights of a matrix share a scale; a number: groups of n neighbours of a row.
        clip: where activations are cut.
        embeddings: bits of token embeddings; None: those of the weights.
    """

    quantizer: str
    granularity: Literal["tensor", "row"] | int = "row"
    clip: float | None = None
    embeddings: Literal[4] | None = None


TRAINED = {
    "minmax": Trained("minmax"),
    "lsq": Trained("lsq"),
    "elastic": Trained("elastic"),
    "tbt": Trained("tbt", embeddings=4),
    "tbt-g64": Trained("tbt", 64, embeddings=4),
    "tbt-e2": Trained("tbt"),
    "quantgpt": Trained("dynamic_scaling", "tensor"),
    "ternarybert": Trained("twn", "tensor", 2.5),
}
CHOSEN = {8: ("minmax",), 4: ("lsq",), 2: ("tbt-g64",)}


def scheme(way: Trained, bits: int) -> QuantizationConfig:
    """Weights at the given bits, embeddings per token, activations at 8."""
    weights = WeightScheme(quantizer=way.quantizer, bits=bits, granularity=way.granularity)
    embeddings = weights.model_copy(update={"granularity": "row"})
    if way.embeddings is not None:
        embeddings = WeightScheme(quantizer="lsq", bits=way.embeddings, granularity="row")
    return QuantizationConfig(weights=weights, embeddings=embeddings, activations=ActivationScheme(clip=way.clip))


def distillation() -> DistillationConfig:
    """Logits, and the hidden states that the store has."""
    layers = [layer for _, layer in MATCHED]
    matches = tuple(Match(loss="hidden_mse", student=layer, teacher=layer) for layer in layers)
    return DistillationConfig(temperature=1.0, label_weight=0.0, matches=matches)


class Bench(pruning.Bench):
    """One task: its rows, its teacher's outputs, and the runs on both."""

    def model(self) -> Any:
        """The dense model, all of it to be trained."""
        return AutoModelForSequenceClassification.from_pretrained(self.folder)

    def finished(self, model: Any, report: QuantizationReport, folder: Path) -> dict[str, Any]:
        """Save a packed model with a round-trip check, reload it, and measure the reloaded one."""
        batches = [self.collate([self.rows.validation[i] for i in range(16)])]
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        measured = CompressedModel(model).save_pretrained(folder / "model", tokenizer=tokenizer, batches=batches)
        reloaded = AutoModelForSequenceClassification.from_pretrained(folder / "model")
        return {
            **self.quality(reloaded.to("cuda" if torch.cuda.is_available() else "cpu")),
            "bytes": size_on_disk(folder / "model").weights_bytes,
            "bits_per_weight": report.bits_per_weight,
            "packed_error": report.packed_error,
            "reload_error": measured.max_error,
        }

    def start(self, folder: Path) -> Any:
        """What a student begins as: its teacher; where that came from another task's, that task's student.

        The latter already has weights of these bits, which a few thousand rows could not restore.
        """
        if self.task not in START:
            return self.model()
        student = folder.parent.parent / START[self.task] / folder.name / "model"
        if not student.exists():
            raise SystemExit(f"{self.task} starts from the student of {START[self.task]}: train that first")
        found = unpacked(AutoModelForSequenceClassification.from_pretrained(student))
        return type(found).from_pretrained(None, config=self.model().config, state_dict=found.state_dict())

    def trained(self, folder: Path, name: str, bits: int, seed: int) -> dict[str, Any]:
        """Quantization-aware training, and what came of it."""
        set_seed(seed)
        epochs = (TWO_BITS if bits == 2 else BUDGET)[self.task]
        args = arguments(folder, LEARNING_RATES[bits], epochs, seed, quick=self.options.quick)
        if self.options.quick:
            args.max_steps = 2
        # an answer that is used once is not worth the disk
        teacher = StoredTeacher(self.store) if epochs > 1 else LiveTeacher(self.model())
        config = scheme(TRAINED[name], bits)
        config = config.model_copy(update={"scale_learning_rate": scale_rate(self.model(), config)})
        trainer = QuantizationTrainer(
            self.start(folder), args, quantization=config, teacher=teacher, distillation=distillation(),
            train_dataset=self.rows.train, data_collator=self.collate,
        )  # fmt: skip
        started = time.time()
        trainer.train()
        trainer.finish()
        taken = {"steps": trainer.state.global_step, "seconds": round(time.time() - started)}
        return taken | trainer.report.drift | self.finished(trainer.student, trainer.report, folder)

    def rounded(self, folder: Path, name: str, bits: int, seed: int) -> dict[str, Any]:
        """Quantization without training, and what came of it."""
        model = self.model()
        batches = pruning.calibration(self.rows, self.collate, seed)
        config = scheme(Trained("mse"), bits)
        report = quantize(model, config, batches, method=ROUNDED[name], progress=False)
        return {"steps": 0, "seconds": round(report.seconds), **self.finished(model, report, folder)}


def methods(options: argparse.Namespace, bits: int) -> list[str]:
    """The runs at a number of bits."""
    wanted = options.methods or [*ROUNDED, *CHOSEN[bits]]
    return [name for name in wanted if name in ROUNDED or bits in QUANTIZERS[TRAINED[name].quantizer].bits]


def runs(options: argparse.Namespace) -> Iterator[tuple[str, int, str, int]]:
    """Task, bits, method and seed; the first seeds of all before the second of any."""
    for seed in range(1 if options.quick else options.seeds):
        for task in options.tasks:
            for bits in options.bits:
                # rows to calibrate on are the same for all
                yield from (
                    (task, bits, name, seed) for name in methods(options, bits) if not seed or name not in ROUNDED
                )


def run(options: argparse.Namespace, work: Path) -> None:
    """All requested runs that do not exist yet."""
    benches: dict[str, Bench] = {}
    for task, bits, name, seed in runs(options):
        if task not in benches:
            benches[task] = Bench(options, task)
        bench, folder = benches[task], work / task / f"{name}-{bits}-{seed}"
        kind = "without training" if name in ROUNDED else "trained"
        step = bench.rounded if name in ROUNDED else bench.trained
        about = {"kind": kind, "task": task, "bits": bits, "name": name, "seed": seed}
        once(folder, about, partial(step, folder, name, bits, seed))


def summarise(done: list[dict[str, Any]], dense: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds, of each task, method and number of bits."""
    rows: list[dict[str, Any]] = []
    for task, found in dense.items():
        rows.append({"kind": "teacher", "task": task, "name": "teacher", "seeds": 1, "spread": None, **found})
    order = [*ROUNDED, *TRAINED]
    keys = {(r["task"], r["bits"], r["name"]) for r in done}
    for task, bits, name in sorted(keys, key=lambda key: (-key[1], order.index(key[2]), key[0])):
        mine = [r for r in done if (r["task"], r["bits"], r["name"]) == (task, bits, name)]
        scores = [r["score"] for r in mine]
        mean = statistics.mean(scores)
        rows.append(
            {
                "kind": mine[0]["kind"], "task": task, "bits": bits, "name": name,
                "embeddings": (TRAINED[name].embeddings if name in TRAINED else None) or bits,
                "seeds": len(mine), "score": mean,
                "spread": statistics.stdev(scores) if len(scores) > 1 else None, "scores": scores,
                "of_teacher": 100 * mean / dense[task]["score"], "steps": mine[0]["steps"],
                "seconds": statistics.mean(r["seconds"] for r in mine), "bytes": mine[0]["bytes"],
                "bits_per_weight": mine[0]["bits_per_weight"],
                "reload_error": max(r["reload_error"] for r in mine),
                "packed_error": max((r["packed_error"] for r in mine if r["packed_error"] is not None), default=None),
                "measured_at": sorted({r["commit"] for r in mine}),
            }
        )  # fmt: skip
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requested against measured numbers."""
    wanted = []
    tasks = [row["task"] for row in rows if row["kind"] == "teacher"]
    teacher = statistics.mean(row["score"] for row in rows if row["kind"] == "teacher")
    for bits, share in ASKED.items():
        names = dict.fromkeys(row["name"] for row in rows if row.get("bits") == bits)
        scores = {n: [r["score"] for r in rows if r["name"] == n and r.get("bits") == bits] for n in names}
        kept = {n: 100 * statistics.mean(s) / teacher for n, s in scores.items() if len(s) == len(tasks)}
        where = f"share of the teacher's mean kept ({', '.join(tasks)})"
        if kept:
            best = max(kept, key=lambda name: kept[name])
            wanted.append(asked(f"W{bits}A8, {best}: {where}", f">= {share} %", kept[best], kept[best] >= share))
            for name in sorted(kept.keys() - {best}):
                wanted.append(asked(f"W{bits}A8, {name}: {where}", "reported", kept[name], True))
    errors = [row["reload_error"] for row in rows if "reload_error" in row]
    wanted.append(asked("greatest difference of logits after reloading", "0", max(errors), max(errors) == 0))
    return wanted


def report(options: argparse.Namespace, work: Path) -> None:
    """Results of all existing runs."""
    done = [json.loads(file.read_text()) for file in sorted(work.glob("*/*/row.json"))]
    done = [r for r in done if r["task"] in options.tasks and r["bits"] in options.bits]
    if not done:
        raise SystemExit(f"there are no runs in {work} yet: leave out --report")
    dense = {}
    for task in sorted({r["task"] for r in done}, key=list(BUDGET).index):
        folder = options.work / "teachers" / task
        score = 100 * json.loads((folder / "teacher.json").read_text())["score"]
        dense[task] = {"score": score, "of_teacher": 100.0, "bytes": size_on_disk(folder).weights_bytes}
    rows = summarise(done, dense)
    wanted = verdicts(rows)
    setting = {
        "distillation": distillation().model_dump(mode="json"), "epochs": BUDGET, "two_bits": TWO_BITS,
        "learning_rates": LEARNING_RATES,
        "scale_rate": SCALE_RATE, "calibration_rows": pruning.CALIBRATION_ROWS,
        "methods": {name: way._asdict() for name, way in TRAINED.items()},
        "quantization": scheme(TRAINED["minmax"], 8).model_dump(mode="json"),
    }  # fmt: skip
    for row in rows:
        print(f"{row['task']:5} {row.get('bits', 32):2} {row['name']:12} {row['of_teacher']:6.1f} %")
    for item in wanted:
        print(item)
    print(write("qat_glue", rows, wanted, quick=options.quick, setting=setting))


def main() -> None:
    """Command line."""
    parser = glue_parser(__doc__, BUDGET)
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=list(BITS))
    parser.add_argument("--methods", nargs="+", choices=[*ROUNDED, *TRAINED], help="default: see above")
    parser.add_argument("--seeds", type=int, default=1)
    train_and_report("qat_glue", parser, run, report)


if __name__ == "__main__":
    main()
