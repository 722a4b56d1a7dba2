"""A GPT-2 at several sparsities: cut at once, cut little by little while it learns, and the same shape from scratch.

The dense model is the 4-layer GPT-2 of ``--model`` (trained on WikiText-2). Sparsity is the share of the parameters of
its blocks; embeddings and head, which are tied, are not pruned. For each sparsity:

* ``one-shot``: cut by Fisher scores of some training blocks, nothing trained;
* ``one-shot, repaired``: the same, output projections re-fitted by least squares on those blocks;
* ``pruned``: cut gradually by Fisher scores that training itself collects, under the dense model as teacher;
* ``scratch``: the shape that ``pruned`` ended with, from random weights, for the same number of steps, on the same
blocks in the
  same order, with the same teacher and the same loss.

Perplexity is of the test text in blocks of 128 tokens, the length that the dense model was trained on.

    python benchmarks/pruning_lm.py --data ../shared/data --model ../shared/models/gpt2-wikitext2

Finished runs are kept in ``--work`` and not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import asked, once, write
from distillation_lm import read
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, TrainingArguments, set_seed

from lmcompress.data import pack_blocks
from lmcompress.distillation import Distillation, DistillationConfig, LiveTeacher
from lmcompress.evaluation import parameter_count, perplexity, size_on_disk
from lmcompress.model import CompressedModel
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.method import StructuredPruning
from lmcompress.pruning.structured.post_training import prune
from lmcompress.pruning.structured.targets import Shape, Target
from lmcompress.schedules import Gradual
from lmcompress.trainers import CompressionTrainer

BLOCK, BATCH, STEPS, LEARNING_RATE = 128, 16, 200, 1e-3
CALIBRATION_BLOCKS = 64
SPARSITIES = (0.5, 0.75, 0.25)
ROLES = ("one-shot", "one-shot, repaired", "pruned", "scratch")
CRITERION, SCHEDULE = "fisher", Gradual(end=0.5, every=10)
DISTILLATION = DistillationConfig(temperature=1.0, weight=1.0, label_weight=0.5)


class Bench:
    """The data, the dense model, and what is done with both.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        # --quick reads what little it needs
        texts = (read(options.data, "train")[:200_000], read(options.data, "test")[:8_000])
        if not options.quick:
            texts = (read(options.data, "train"), read(options.data, "test"))
        self.blocks: Any = pack_blocks([texts[0]], self.tokenizer, BLOCK)
        self.test = texts[1]

    def dense(self) -> Any:
        """The model as it was trained."""
        return AutoModelForCausalLM.from_pretrained(self.options.model)

    def calibration(self, seed: int) -> list[dict[str, torch.Tensor]]:
        """Some training blocks, drawn at random."""
        count = BATCH if self.options.quick else CALIBRATION_BLOCKS
        drawn = self.blocks.shuffle(seed=seed).select(range(count)).with_format("torch")
        return [drawn[start : start + BATCH] for start in range(0, count, BATCH)]

    def quality(self, model: Any) -> dict[str, float]:
        """Perplexities of the test text."""
        found = perplexity(model, self.tokenizer, self.test, max_length=BLOCK, progress=False)
        return {"token_perplexity": found.token_perplexity, "word_perplexity": found.word_perplexity}

    def saved(self, model: Any, folder: Path) -> dict[str, Any]:
        """Save with a round-trip check; sizes, shape, and max abs difference after reloading."""
        batches = [{"input_ids": torch.tensor(self.blocks[:4]["input_ids"])}]
        measured = CompressedModel(model).save_pretrained(folder / "model", tokenizer=self.tokenizer, batches=batches)
        return {
            "parameters": parameter_count(model),
            "block_parameters": sum(p.numel() for p in model.base_model.h.parameters()),
            "bytes": size_on_disk(folder / "model").weights_bytes,
            "reload_error": measured.max_error,
            "shape": [[block.heads, block.ffn] for block in CompressedModel(model).structure.blocks],
        }

    def trained(self, model: Any, folder: Path, seed: int, pruning: PruningConfig | None) -> dict[str, Any]:
        """Train a model with the dense one as teacher, optionally pruning it."""
        steps = 20 if self.options.quick else STEPS
        args = TrainingArguments(
            str(folder / "checkpoints"), learning_rate=LEARNING_RATE, per_device_train_batch_size=BATCH,
            max_steps=steps, warmup_steps=0.06, lr_scheduler_type="cosine", weight_decay=0.01,
            optim="adamw_torch_fused", bf16=True, seed=seed, save_strategy="no", logging_steps=50, report_to="none",
            disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        # gates are hooked first: what distillation captures is what they left
        methods: list[Any] = [] if pruning is None else [StructuredPruning(pruning)]
        methods.append(Distillation(DISTILLATION, LiveTeacher(self.dense())))
        trainer = CompressionTrainer(model, args, methods=methods, train_dataset=self.blocks)
        started = time.time()
        trainer.train()
        trainer.finish()
        return {"steps": steps, "tokens": steps * BATCH * BLOCK, "seconds": round(time.time() - started)}

    def run(self, role: str, sparsity: float, seed: int, folder: Path) -> dict[str, Any]:
        """One model in one role."""
        set_seed(seed)
        model, target = self.dense(), Target(sparsity=sparsity)
        taken: dict[str, Any] = {"steps": 0}
        if role.startswith("one-shot"):
            repair = "least_squares" if role.endswith("repaired") else "none"
            config = PruningConfig(target=target, criterion=CRITERION, repair=repair, seed=seed)
            prune(model, config, self.calibration(seed))
        elif role == "pruned":
            config = PruningConfig(target=target, criterion=CRITERION, schedule=SCHEDULE, scores="training", seed=seed)
            taken = self.trained(model, folder, seed, config)
        else:
            pruned = json.loads((folder.parent / f"pruned-{sparsity}-{seed}" / "row.json").read_text())
            model = from_scratch(model.config, pruned["shape"])
            taken = self.trained(model, folder, seed, None)
        return taken | self.saved(model.cpu(), folder) | self.quality(model)


def from_scratch(config: Any, shape: list[list[int]]) -> Any:
    """A random model of a given shape: a random dense one, cut, which leaves weights of the same distribution."""
    model = GPT2LMHeadModel(config)
    heads, ffn = zip(*shape, strict=True)
    prune(model, PruningConfig(target=Target(shape=Shape(heads=tuple(heads), ffn=tuple(ffn))), criterion="random"))
    return model


def runs(bench: Bench, work: Path) -> list[dict[str, Any]]:
    """Missing runs are made, existing ones are read."""
    rows = []
    for seed in range(1 if bench.options.quick else bench.options.seeds):
        for sparsity in SPARSITIES[1:2] if bench.options.quick else SPARSITIES:
            # in this order: the shape that is trained from scratch is that of the pruned model
            for role in ROLES:
                folder = work / f"{role.replace(', ', '-')}-{sparsity}-{seed}"
                about = {"role": role, "sparsity": sparsity, "seed": seed}
                rows.append(once(folder, about, partial(bench.run, role, sparsity, seed, folder)))
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requested against measured numbers."""
    wanted = []
    for sparsity in SPARSITIES:
        mean = {}
        for role in ROLES:
            done = [r["token_perplexity"] for r in rows if (r["role"], r["sparsity"]) == (role, sparsity)]
            if done:
                mean[role] = statistics.mean(done)
        if not set(ROLES) <= mean.keys():
            continue
        others = {"scratch": mean["scratch"], "the better one-shot": min(mean[r] for r in ROLES if "one-shot" in r)}
        for other, found in others.items():
            ratio = mean["pruned"] / found
            wanted.append(
                asked(f"{sparsity:.0%} of the blocks cut: perplexity of pruned over {other}", "< 1", ratio, ratio < 1)
            )
        dense = next(r["token_perplexity"] for r in rows if r["role"] == "dense")
        wanted.append(asked(f"{sparsity:.0%}: perplexity over dense", "reported", mean["pruned"] / dense, True))
    errors = [row["reload_error"] for row in rows if "reload_error" in row]
    wanted.append(asked("greatest difference of logits after reloading", "0", max(errors), max(errors) == 0))
    return wanted


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lm/wikitext-2/*.txt.gz")
    parser.add_argument("--model", type=Path, required=True, help="the dense GPT-2")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where models go")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="20 steps, one sparsity, and a short test text")
    options = parser.parse_args()
    bench = Bench(options)
    dense = bench.dense()
    rows: list[dict[str, Any]] = [
        {
            "role": "dense", "sparsity": 0.0, "steps": 0, **bench.quality(dense), "parameters": parameter_count(dense),
            "block_parameters": sum(p.numel() for p in dense.base_model.h.parameters()),
            "bytes": size_on_disk(options.model).weights_bytes,
        }
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        # a quick run is not to be mistaken for a real one later
        rows += runs(bench, Path(temporary) if options.quick else options.work / "pruning_lm")
    wanted = verdicts(rows)
    setting = {
        "block": BLOCK, "batch": BATCH, "steps": STEPS, "learning_rate": LEARNING_RATE, "criterion": CRITERION,
        "schedule": SCHEDULE.model_dump(mode="json"), "distillation": DISTILLATION.model_dump(mode="json"),
        "calibration_blocks": CALIBRATION_BLOCKS,
    }  # fmt: skip
    for line in rows + wanted:
        print(line)
    print(write("pruning_lm", rows, wanted, quick=options.quick, setting=setting))


if __name__ == "__main__":
    main()
