"""A BERT's encoder, cut by lmcompress and by torch-pruning, with the same recovery: quality, speed, and saving.

The models are the MiniLM BERTs fine-tuned by ``benchmarks/teachers.py``. Every row is cut at once to a share of the
encoder's parameters and then trained for the same steps by the same plain ``Trainer`` on the labels alone, on the same
rows in the same order; token embeddings stay frozen. The same calibration rows give both libraries their gradients.

* MRPC, half cut: all criteria, several seeds. Its 408 rows of validation move by a point or two from chance alone, the
  same for all seeds of a method. So the better ones are cut on QNLI too (5,463 rows), by half and by three quarters.
* torch-pruning is used as in its own example for BERT: whole heads, global ranking, attention's attributes mended
  afterwards. It is asked for a share of channels, so the share that leaves the encoder's parameters wanted is searched
  for. ``hidden``: the residual stream is pruned too, as in that example; otherwise heads and neurons alone.
* Twins: the same kind of criterion in both, l1, l2 and first-order Taylor, each unit ranked by its share of the mean of
  its group (torch-pruning's ``normalizer``, ``ranking: relative`` of lmcompress). Beside them, lmcompress's other
  criteria, rankings, and its repair by least squares on the calibration rows.
* Extra rows, one seed, not compared: lmcompress pruning gradually within the same steps, without and with the dense
  model as teacher.

A last row says what both do to a GPT-2, whose matrices are ``Conv1D``.

    pip install torch-pruning==1.6.1
    python benchmarks/teachers.py --data ../shared/data --work runs/teachers --tasks mrpc qnli
    python benchmarks/pruning_peers.py --data ../shared/data --work runs

Finished runs are kept in ``--work`` and not repeated; ``--report`` only writes the results of existing runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from common import asked, once, train_and_report, training_parser, write
from distillation import arguments, load_rows
from pruning_speed import LENGTH, EncoderOnly
from speeds import timed_rows
from teachers import GroupedTrainer, train_teacher
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, set_seed

from lmcompress.distillation import DistillationConfig
from lmcompress.evaluation import evaluate_classifier, glue_score, parameter_count, size_on_disk
from lmcompress.model import CompressedModel
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.post_training import prune
from lmcompress.pruning.structured.targets import Target
from lmcompress.schedules import Gradual
from lmcompress.trainers import PruningTrainer

try:
    import torch_pruning
except ImportError as error:
    raise SystemExit("the peer is missing: pip install torch-pruning==1.6.1") from error

LEARNING_RATE, CALIBRATION_ROWS = 1e-4, 256
DISTILLATION = DistillationConfig(temperature=2.0, weight=1.0, label_weight=0.5)
PEER, OURS = "torch-pruning", "lmcompress"
HALF = 0.5


@dataclass(frozen=True)
class Entry:
    """One row: a library, what it ranks by, and what it may cut.

    Attributes:
        library: ``lmcompress`` or ``torch-pruning``.
        criterion: in the words of the library.
        twin: what is the same in both; None where there is no counterpart.
        hidden: whether the residual stream is pruned too.
        ranking: of lmcompress; torch-pruning's own is ``relative``.
        repair: whether output projections are fitted to the dense ones on the calibration rows after the cut.
        extra: what is not equal to the others: ``gradual`` or ``gradual, distilled``; None for those compared.
    """

    library: str
    criterion: str
    twin: str | None = None
    hidden: bool = False
    ranking: Literal["global", "isomorphic", "relative"] = "relative"
    repair: bool = False
    extra: str | None = None

    @property
    def name(self) -> str:
        """For tables."""
        more = {"hidden": self.hidden, "isomorphic": self.ranking == "isomorphic", "repaired": self.repair}
        told = [word for word, there in more.items() if there]
        return ", ".join([f"{self.library} {self.criterion}", *told, *([self.extra] if self.extra else [])])

    @property
    def folder(self) -> str:
        """The name as one word."""
        return self.name.replace(", ", "-").replace(" ", "-")


ENTRIES = (
    Entry(PEER, "l1", "l1"),
    Entry(PEER, "l2", "l2"),
    Entry(PEER, "taylor", "taylor"),
    Entry(PEER, "l2", "l2, hidden", hidden=True),
    Entry(PEER, "taylor", "taylor, hidden", hidden=True),
    Entry(OURS, "l1", "l1"),
    Entry(OURS, "l2", "l2"),
    Entry(OURS, "taylor_weights", "taylor"),
    Entry(OURS, "l2", "l2, hidden", hidden=True),
    Entry(OURS, "taylor_gates", "taylor, hidden", hidden=True),
    Entry(OURS, "l1", ranking="isomorphic"),
    Entry(OURS, "l2", ranking="isomorphic"),
    Entry(OURS, "taylor_weights", ranking="isomorphic"),
    Entry(OURS, "l2", hidden=True, ranking="isomorphic"),
    Entry(OURS, "taylor_gates", ranking="global"),
    Entry(OURS, "fisher", ranking="global"),
    Entry(OURS, "fisher", ranking="global", repair=True),
    Entry(OURS, "fisher", ranking="global", extra="gradual"),
    Entry(OURS, "fisher", ranking="global", extra="gradual, distilled"),
)
BETTER = tuple(
    entry for entry in ENTRIES
    if entry.extra is None and (entry.criterion == "fisher" or (entry.twin or "").startswith("taylor"))
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is cut, and by whom.

    Attributes:
        task: of GLUE.
        sparsity: share of the encoder's parameters to prune.
        epochs: of the recovery.
        rows: of training to recover on, the first after shuffling; None for all.
        seeds: at most.
        entries: rows of the table.
    """

    task: str
    sparsity: float
    epochs: int
    rows: int | None
    seeds: int
    entries: tuple[Entry, ...]

    def folder(self, entry: Entry, seed: int) -> str:
        """Where a row's run is kept."""
        return f"{self.task}-{100 * self.sparsity:.0f}-{entry.folder}-{seed}"


SETTINGS = (
    Setting("mrpc", 0.5, 3, None, 3, ENTRIES),
    # as many rows as MRPC's three epochs
    Setting("qnli", 0.5, 1, 11_004, 1, BETTER),
    Setting("qnli", 0.75, 1, 11_004, 1, BETTER),
)


class Bench:
    """A task, the dense model, and what is done with both.

    Args:
        options: of the command line.
        setting: what is cut.
    """

    def __init__(self, options: argparse.Namespace, setting: Setting) -> None:
        self.options, self.setting = options, setting
        train_teacher(options.data, options.work / "teachers", setting.task, quick=options.quick)
        self.folder = options.work / "teachers" / setting.task
        self.data, self.rows, self.collate = load_rows(options, setting.task)
        train = self.rows.train
        count = len(train) if setting.rows is None else min(setting.rows, len(train))
        self.train = train if setting.rows is None else train.shuffle(seed=0).select(range(count))

    def dense(self) -> Any:
        """The model as it was fine-tuned."""
        return AutoModelForSequenceClassification.from_pretrained(self.folder).eval()

    def calibration(self, seed: int) -> list[Any]:
        """Batches of randomly drawn training rows."""
        drawn = self.rows.train.shuffle(seed=seed).select(range(min(CALIBRATION_ROWS, len(self.rows.train))))
        rows = [drawn[i] for i in range(len(drawn))]
        return [self.collate(rows[start : start + 32]) for start in range(0, len(rows), 32)]

    def quality(self, model: Any) -> dict[str, float]:
        """Metrics of the validation rows and their mean, in percent."""
        task = self.data.task
        found = evaluate_classifier(model, self.rows.validation, self.collate, task.kind, task.metrics, progress=False)
        return {"score": 100 * glue_score(found)} | {name: 100 * value for name, value in found.items()}

    def probe(self) -> list[Any]:
        """A batch of validation rows, to compare outputs on."""
        return [self.collate([self.rows.validation[i] for i in range(16)])]

    def run(self, entry: Entry, seed: int, folder: Path) -> dict[str, Any]:
        """Cut, recover, measure, save."""
        set_seed(seed)
        model, started = self.dense(), time.time()
        args = arguments(folder, LEARNING_RATE, self.setting.epochs, seed, quick=self.options.quick)
        before = None
        if entry.extra:
            self._gradual(entry, model, args)
        else:
            cut = by_torch_pruning if entry.library == PEER else by_lmcompress
            model = cut(model, entry, self.setting.sparsity, self.calibration(seed))
            before = self.quality(model)["score"]
            model.get_input_embeddings().requires_grad_(False)
            GroupedTrainer(model, args, train_dataset=self.train, data_collator=self.collate).train()
        seconds = time.time() - started
        model = model.cpu().eval()
        dense = self.dense()
        row = {
            "seconds": round(seconds),
            "before_recovery": before,
            **self.quality(model),
            "sparsity": 1 - encoder_parameters(model) / encoder_parameters(dense),
            "encoder_parameters": encoder_parameters(model),
            "parameters": parameter_count(model),
            "encoder_gflops": encoder_flops(model) / 1e9,
            "flop_ratio": encoder_flops(dense) / encoder_flops(model),
            "shape": shape_of(model),
            **(saved_by_lmcompress if entry.library == OURS else saved_by_transformers)(model, self.probe()),
        }
        if seed == 0:
            folder.mkdir(parents=True, exist_ok=True)
            # as a module: no checkpoint can hold what torch-pruning leaves, and this folder is ours
            torch.save(model, folder / "module.pt")
        return row

    def _gradual(self, entry: Entry, model: Any, args: Any) -> None:
        model.get_input_embeddings().requires_grad_(False)
        config = PruningConfig(
            target=Target(sparsity=self.setting.sparsity), criterion=entry.criterion, scores="training",
            ranking=entry.ranking, schedule=Gradual(end=0.5, every=10), seed=args.seed,
        )  # fmt: skip
        taught = {"teacher": self.dense(), "distillation": DISTILLATION} if "distilled" in (entry.extra or "") else {}
        trainer = PruningTrainer(
            model, args, pruning=config, train_dataset=self.train, data_collator=self.collate, **taught
        )
        trainer.train()
        trainer.finish()


def by_lmcompress(model: Any, entry: Entry, sparsity: float, batches: Sequence[Any]) -> Any:
    """Cut at once, in place."""
    config = PruningConfig(
        target=Target(sparsity=sparsity),
        criterion=entry.criterion,
        parts=("heads", "neurons", "hidden") if entry.hidden else ("heads", "neurons"),
        ranking=entry.ranking,
        repair="least_squares" if entry.repair else "none",
    )
    prune(model, config, batches)
    return model


def by_torch_pruning(model: Any, entry: Entry, sparsity: float, batches: Sequence[Any]) -> Any:
    """The copy whose encoder is nearest to the sparsity, by bisection over the share of channels."""
    model.train(False)
    for batch in batches if entry.criterion == "taylor" else ():
        model(**batch).loss.backward()
    importance = {
        "l1": torch_pruning.importance.GroupMagnitudeImportance(p=1),
        "l2": torch_pruning.importance.GroupMagnitudeImportance(p=2),
        "taylor": torch_pruning.importance.GroupTaylorImportance(),
    }[entry.criterion]
    low, high, best, distance = 0.0, 1.0, model, 1.0
    for _ in range(10):
        share = (low + high) / 2
        tried = with_torch_pruning(model, importance, share, hidden=entry.hidden)
        reached = 1 - encoder_parameters(tried) / encoder_parameters(model)
        if abs(reached - sparsity) < distance:
            best, distance = tried, abs(reached - sparsity)
        if distance < 0.002:
            break
        low, high = (share, high) if reached < sparsity else (low, share)
    best.zero_grad()
    return best


def with_torch_pruning(model: Any, importance: Any, share: float, *, hidden: bool) -> Any:
    """A copy of a BERT classifier without a share of its channels, after torch-pruning's ``prune_hf_bert.py``."""
    result = copy.deepcopy(model)
    for copied, parameter in zip(result.parameters(), model.parameters(), strict=True):
        # deepcopy leaves gradients behind
        copied.grad = None if parameter.grad is None else parameter.grad.clone()
    layers = result.bert.encoder.layer
    attentions = [layer.attention.self for layer in layers]
    ignored = [result.classifier, result.bert.pooler]
    if not hidden:
        # whatever writes into the residual stream
        ignored += [result.bert.embeddings]
        ignored += [out for layer in layers for out in (layer.attention.output.dense, layer.output.dense)]
    ids = torch.randint(5, 1000, (2, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    pruner = torch_pruning.pruner.BasePruner(
        result, inputs, importance=importance, global_pruning=True, pruning_ratio=share, head_pruning_ratio=share,
        num_heads={m: a.num_attention_heads for a in attentions for m in (a.query, a.key, a.value)},
        prune_num_heads=True, prune_head_dims=False, ignored_layers=ignored,
        output_transform=lambda outputs: outputs.logits.sum(),
        # its defaults are dictionaries that all pruners share
        in_channel_groups={}, out_channel_groups={},
    )  # fmt: skip
    pruner.step()
    for attention in attentions:
        attention.all_head_size = attention.query.out_features
        attention.num_attention_heads = attention.all_head_size // attention.attention_head_size
    return result


def encoder_parameters(model: Any) -> int:
    """Parameters of the blocks."""
    return sum(p.numel() for p in model.base_model.encoder.parameters())


@torch.inference_mode()
def encoder_flops(model: Any) -> int:
    """Operations of the blocks on one row of 128 tokens, as torch counts them: matmuls and attention."""
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        EncoderOnly(model)(ids)
    return int(counter.get_total_flops())


def shape_of(model: Any) -> dict[str, Any]:
    """Width of the residual stream, and heads and neurons of each block."""
    layers = model.base_model.encoder.layer
    blocks = [[layer.attention.self.num_attention_heads, layer.intermediate.dense.out_features] for layer in layers]
    return {"hidden": layers[0].output.dense.out_features, "blocks": blocks}


def saved_by_lmcompress(model: Any, batches: list[Any]) -> dict[str, Any]:
    """Save with a round-trip check; max abs difference of the reloaded model's outputs."""
    with tempfile.TemporaryDirectory() as folder:
        measured = CompressedModel(model).save_pretrained(Path(folder) / "model", batches=batches)
        return {"reload_error": measured.max_error, "bytes": size_on_disk(Path(folder) / "model").weights_bytes}


@torch.inference_mode()
def saved_by_transformers(model: Any, batches: list[Any]) -> dict[str, Any]:
    """Save as Transformers does, and what comes of loading it; torch-pruning itself pickles the module."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        row: dict[str, Any] = {"reload_error": None, "bytes": size_on_disk(folder).weights_bytes}
        try:
            loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        except (RuntimeError, ValueError) as error:
            return row | {"reload_failure": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        differences = [(model(**b).logits - loaded(**b).logits).abs().max() for b in batches]
        return row | {"reload_error": float(torch.stack(differences).max())}


def gpt2_rows() -> list[dict[str, Any]]:
    """What both make of a small GPT-2 of which half is to go."""
    set_seed(0)
    config = GPT2Config(
        n_embd=128,
        n_layer=2,
        n_head=4,
        vocab_size=1000,
        n_positions=64,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    rows = []
    for library in (OURS, PEER):
        model = GPT2LMHeadModel(config).eval()
        before = sum(p.numel() for p in model.transformer.h.parameters())
        failure = None
        try:
            if library == OURS:
                prune(model, PruningConfig(target=Target(sparsity=HALF), criterion="l2"))
            else:
                torch_pruning.pruner.BasePruner(
                    model, {"input_ids": torch.randint(1000, (2, 16))}, global_pruning=True, pruning_ratio=HALF,
                    importance=torch_pruning.importance.GroupMagnitudeImportance(p=2), ignored_layers=[model.lm_head],
                    output_transform=lambda outputs: outputs.logits.sum(),
                    in_channel_groups={}, out_channel_groups={},
                ).step()  # fmt: skip
        except Exception as error:  # whatever a peer raises is what is to be told
            failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        after = sum(p.numel() for p in model.transformer.h.parameters())
        rows.append(
            {
                "question": "gpt2", "library": library, "block_parameters_before": before,
                "block_parameters_after": after, "removed": 1 - after / before, "failure": failure,
            }
        )  # fmt: skip
    return rows


def latencies(bench: Bench, folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Encoders of all first seeds and of the dense model, in rounds, on one thread."""
    encoders = {"dense": EncoderOnly(bench.dense())}
    for entry in bench.setting.entries:
        file = folder / bench.setting.folder(entry, 0) / "module.pt"
        if file.exists():
            encoders[entry.name] = EncoderOnly(torch.load(file, weights_only=False))
    rows = []
    for batch, repeats in ((32, 15), (1, 40)):
        rows += timed_rows(
            {"asked_batch": batch, "length": LENGTH}, encoders, threads=1, warmup=2,
            batch_sizes=(min(batch, 4) if quick else batch,), sequence_length=LENGTH, repeats=3 if quick else repeats,
        )  # fmt: skip
    return rows


def summarise(setting: Setting, work: Path, timed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds, with sizes and times of the first."""
    rows = []
    for entry in setting.entries:
        files = [work / setting.folder(entry, seed) / "row.json" for seed in range(setting.seeds)]
        mine = [json.loads(file.read_text()) for file in files if file.exists()]
        if not mine:
            continue
        scores = [run["score"] for run in mine]
        speed = {row["asked_batch"]: row for row in timed if row["method"] == entry.name}
        rows.append(
            mine[0]
            | {
                "question": "cut", "task": setting.task, "target": setting.sparsity, "seeds": len(mine),
                "scores": scores, "score": statistics.mean(scores),
                "spread": statistics.stdev(scores) if len(scores) > 1 else None,
                **{f"ms_{batch}": row["ms"] for batch, row in speed.items()},
                **{f"quartiles_ms_{batch}": row["quartiles_ms"] for batch, row in speed.items()},
                **{f"cpu_ms_{batch}": row["cpu_ms"] for batch, row in speed.items()},
                **{f"cpu_quartiles_ms_{batch}": row["cpu_quartiles_ms"] for batch, row in speed.items()},
                **{f"speedup_{batch}": row["speedup"] for batch, row in speed.items()},
                "busy": any(row["busy"] for row in speed.values()),
                **{
                    name: statistics.mean(run[name] for run in mine)
                    for name in ("accuracy", "f1", "seconds")
                    if name in mine[0]
                },
            }
        )  # fmt: skip
    return rows


def verdicts(setting: Setting, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requested against measured numbers."""
    wanted = []
    where = f"{setting.task} {setting.sparsity:.0%}"
    equal = [row for row in rows if row["extra"] is None]
    of = {library: [row for row in equal if row["library"] == library] for library in (PEER, OURS)}
    if of[PEER] and of[OURS]:
        best = {library: max(found, key=lambda row: row["score"]) for library, found in of.items()}
        gain = best[OURS]["score"] - best[PEER]["score"]
        wanted.append(asked(f"{where}: best of {OURS} minus best of {PEER}, points", ">= 0", gain, gain >= 0))
        for batch in (32, 1):
            ratio = best[OURS][f"cpu_ms_{batch}"] / best[PEER][f"cpu_ms_{batch}"]
            # slower is what lies outside the noise of both
            slower = best[OURS][f"cpu_quartiles_ms_{batch}"][0] > best[PEER][f"cpu_quartiles_ms_{batch}"][1]
            name = f"{where}, encoder at {batch} × {LENGTH}: best of {OURS} over best of {PEER}, time"
            busy = best[OURS]["busy"]
            wanted.append(asked(name, "<= 1, or quartiles overlap", ratio, not slower, busy=busy))
    for row in of[OURS]:
        for other in of[PEER]:
            if row["twin"] is not None and row["twin"] == other["twin"]:
                gain = row["score"] - other["score"]
                wanted.append(
                    asked(f"{where}, {row['twin']}: {OURS} minus {PEER}, points", ">= 0", gain, gain >= 0)
                )  # fmt: skip
    errors = [row["reload_error"] for row in rows if row["library"] == OURS]
    if errors:
        wanted.append(
            asked(f"{where}: greatest difference of logits after reloading", "0", max(errors), not max(errors))
        )
    return wanted


def verdicts_gpt2(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pruned shares of a GPT-2 against the requested ones."""
    wanted = []
    for row in rows:
        name = f"share of a GPT-2's blocks removed by {row['library']}"
        if row["library"] == OURS:
            wanted.append(asked(name, f">= {HALF}", row["removed"], row["removed"] >= HALF - 1e-6))
        else:
            wanted.append(asked(name, "reported", row["removed"], True))
    return wanted


def run(options: argparse.Namespace, work: Path) -> None:
    """All requested runs that do not exist yet; the first seeds of all before the second of any."""
    quick = options.quick
    for setting in SETTINGS[:1] if quick else SETTINGS:
        if setting.task not in options.tasks:
            continue
        bench = Bench(options, setting)
        for seed in range(1 if quick else min(options.seeds, setting.seeds)):
            for entry in setting.entries:
                # what is not compared needs no spread
                if entry.library not in options.libraries or (seed and entry.extra):
                    continue
                if not quick or entry.twin == "l2" or entry.extra:
                    place = work / setting.folder(entry, seed)
                    about = {"name": entry.name, **vars(entry), "seed": seed}
                    once(place, about, partial(bench.run, entry, seed, place))


def report(options: argparse.Namespace, work: Path) -> None:
    """Results of all existing runs of both libraries, and the latencies of their encoders."""
    if not list(work.glob("*/row.json")):
        raise SystemExit(f"there are no runs in {work} yet: leave out --report")
    lines, wanted = [], []
    for setting in SETTINGS[:1] if options.quick else SETTINGS:
        bench = Bench(options, setting)
        timed = latencies(bench, work, options.quick)
        rows = summarise(setting, work, timed)
        if not rows:
            continue
        dense = bench.dense()
        lines.append(
            {
                "question": "dense", "task": setting.task, "target": setting.sparsity, "name": "dense",
                **bench.quality(dense), "encoder_parameters": encoder_parameters(dense),
                "parameters": parameter_count(dense), "encoder_gflops": encoder_flops(dense) / 1e9,
                "shape": shape_of(dense),
                **{f"ms_{row['asked_batch']}": row["ms"] for row in timed if row["method"] == "dense"},
                **{f"cpu_ms_{row['asked_batch']}": row["cpu_ms"] for row in timed if row["method"] == "dense"},
                **{f"itself_{r['asked_batch']}": r["speedup_quartiles"] for r in timed if r["kind"] == "again"},
            }
        )  # fmt: skip
        lines += rows
        wanted += verdicts(setting, rows)
    gpt2 = gpt2_rows()
    wanted += verdicts_gpt2(gpt2)
    for line in [*lines, *gpt2, *wanted]:
        print(line)
    setting = {
        "settings": [{**vars(s), "entries": [entry.name for entry in s.entries]} for s in SETTINGS],
        "learning_rate": LEARNING_RATE, "calibration_rows": CALIBRATION_ROWS, "torch-pruning": version("torch-pruning"),
        "distillation": DISTILLATION.model_dump(mode="json"),
    }  # fmt: skip
    print(write("pruning_peers", [*lines, *gpt2], wanted, quick=options.quick, setting=setting))


def main() -> None:
    """Command line."""
    parser = training_parser(__doc__, "glue/{mrpc,qnli}/*.parquet")
    parser.add_argument("--seeds", type=int, default=3)
    tasks = sorted({setting.task for setting in SETTINGS})
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks, help="to train on")
    parser.add_argument("--libraries", nargs="+", choices=(OURS, PEER), default=(OURS, PEER), help="to train with")
    # of torch-pruning, about parameters that it finds by itself
    warnings.filterwarnings("ignore", module="torch_pruning")
    train_and_report("pruning_peers", parser, run, report)


if __name__ == "__main__":
    main()
