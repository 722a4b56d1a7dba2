"""What does a distillation step cost beyond what it cannot avoid?

The baseline is a step of plain ``Trainer`` on the student plus a forward pass of the teacher without gradient, in
the same process, steps interleaved (A, B, A, B, ...), medians. BERT: MiniLM's shape, 6 layers teaching 3, a batch
of 16 × 64, logits and three hidden states. GPT-2: the full vocabulary of 50,257. Peak memory of the GPT-2 step is
measured in a process of its own for each of: plain student step with the teacher's forward, our step, and a naive
step that computes both logit matrices and the KL in float32 at once.

    python benchmarks/trainer_overhead.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import asked, write
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from lmcompress.distillation import DistillationConfig, Match
from lmcompress.distillation.losses.distributions import kl_divergence
from lmcompress.students.layers import by_layers
from lmcompress.trainers import DistillationTrainer

# GPT-2 small's width and vocabulary; fewer layers, so that it fits the hour of a small machine
GPT2 = {"n_embd": 768, "n_layer": 6, "n_head": 12}
ROWS, LENGTH = {"bert": 16, "gpt2": 4}, {"bert": 64, "gpt2": 64}


def make_teacher(kind: str) -> Any:
    """A random model: arithmetic costs the same whatever the weights."""
    set_seed(0)
    if kind == "bert":
        sizes = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        return BertForSequenceClassification(BertConfig(**sizes))
    return GPT2LMHeadModel(GPT2Config(**GPT2))


def make_batch(kind: str, device: Any) -> dict[str, torch.Tensor]:
    """One batch without padding."""
    ids = torch.randint(5, 30000, (ROWS[kind], LENGTH[kind]))
    labels = torch.randint(0, 2, (ROWS[kind],)) if kind == "bert" else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def arguments(folder: str) -> TrainingArguments:
    """Everything that is not measured is off."""
    return TrainingArguments(
        folder,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        max_steps=1000,
    )


class NaiveTrainer(Trainer):
    """What one writes in ten lines: both logit matrices whole, in float32."""

    teacher: Any

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Labels and KL of all tokens at once."""
        outputs = model(**inputs)
        with torch.no_grad():
            teacher = self.teacher(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        soft = kl_divergence(outputs.logits[:, :-1], teacher[:, :-1], temperature=2.0).mean()
        return outputs.loss + soft


def make_step(kind: str, way: str, folder: str) -> Callable[[], None]:
    """One optimizer step in one of three ways: ``baseline``, ``lmcompress``, ``naive``."""
    teacher = make_teacher(kind)
    student = by_layers(teacher, 3).model
    args = arguments(folder)
    if way == "lmcompress":
        matches = [Match(loss="hidden_mse", student=i, teacher=2 * i) for i in (1, 2, 3)] if kind == "bert" else []
        config = DistillationConfig(temperature=2.0, matches=tuple(matches))
        trainer: Trainer = DistillationTrainer(student, teacher, args, config)
    elif way == "naive":
        trainer = NaiveTrainer(student, args)
        trainer.teacher = teacher.eval().to(args.device)
    else:
        trainer = Trainer(student, args)
    teacher = teacher.eval().to(args.device)
    trainer.create_optimizer_and_scheduler(1000)
    batch = make_batch(kind, args.device)
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        _, items = trainer.get_batch_samples(iter([batch]), 1, args.device)
        trainer.training_step(trainer.model, dict(batch), items)
        if way == "baseline":
            with torch.no_grad():
                teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        if args.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def ratio(kind: str, repeats: int) -> dict[str, Any]:
    """Medians of interleaved steps, ours over the baseline."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {way: make_step(kind, way, folder) for way in ("baseline", "lmcompress")}
        times: dict[str, list[float]] = {way: [] for way in steps}
        for number in range(repeats + 2):
            for way, step in steps.items():
                start = time.perf_counter()
                step()
                if number >= 2:
                    times[way].append(time.perf_counter() - start)
    median = {way: statistics.median(values) for way, values in times.items()}
    # of pairs side by side, so that a slow minute of the machine hits both
    pairs = [ours / base for ours, base in zip(times["lmcompress"], times["baseline"], strict=True)]
    quartiles = statistics.quantiles(pairs, n=4)
    return {
        "model": kind, "rows": ROWS[kind], "length": LENGTH[kind], "baseline_ms": 1000 * median["baseline"],
        "lmcompress_ms": 1000 * median["lmcompress"], "ratio": statistics.median(pairs),
        "ratio_quartiles": quartiles[::2], "repeats": repeats,
    }  # fmt: skip


def peak_memory(way: str) -> float:
    """Peak of resident memory in MiB during two GPT-2 steps, above what it was before the first; in a fresh process."""
    output = subprocess.run(
        [sys.executable, __file__, "--memory-of", way],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    ).stdout
    return float(json.loads(output.splitlines()[-1])["mib"])


def measure_memory(way: str) -> None:
    """In the process of its own: print the peak."""
    with tempfile.TemporaryDirectory() as folder:
        step = make_step("gpt2", way, folder)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(), step()
            print(json.dumps({"mib": (torch.cuda.max_memory_allocated() - before) / 2**20}))
            return
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step(), step()
        print(json.dumps({"mib": (_status("VmHWM") - before) / 1024}))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="three repeats")
    parser.add_argument("--memory-of", choices=("baseline", "lmcompress", "naive"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    if options.memory_of:
        measure_memory(options.memory_of)
        return
    repeats = 3 if options.quick else options.repeats
    rows = [ratio(kind, repeats) for kind in ("bert", "gpt2")]
    memory = {way: peak_memory(way) for way in ("baseline", "lmcompress", "naive")}
    rows.append({"model": "gpt2", "peak_memory_mib": memory})
    wanted = [asked(f"{r['model']}: step over baseline", "<= 1.10", r["ratio"], r["ratio"] <= 1.10) for r in rows[:2]]
    saved = memory["lmcompress"] / memory["naive"]
    wanted.append(asked("gpt2: peak memory over naive", "reported", saved, True))
    for line in rows + wanted:
        print(line)
    shapes = {"gpt2": {**GPT2, "vocab_size": 50257}, "threads": torch.get_num_threads()}
    print(write("trainer_overhead", rows, wanted, quick=options.quick, setting=shapes))


if __name__ == "__main__":
    main()
