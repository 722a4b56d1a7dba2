"""What does a step of quantization-aware training cost beyond what it cannot avoid, and what does contrast add?

The baseline is a step of plain ``Trainer`` on the student plus a forward pass of the teacher without gradient. Beside
it, in the same process and in turn: distillation by logits without quantization, the same with weights, embeddings and
activations quantized as QuantGPT does it at 2-2-8 bits, and that with contrast. Ratios are medians of pairs side by
side. GPT-2: the shape of the shared model, 16 x 128 tokens; BERT: MiniLM's, 32 x 64, without padding. All weights are
trained, in float32.

    python benchmarks/qat_overhead.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from typing import Any

import torch
from common import asked, write
from trainer_overhead import arguments
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, Trainer, set_seed
from transformers.utils import logging

from lmcompress.distillation.config import Contrast
from lmcompress.distillation.presets import quantgpt
from lmcompress.quantization import QuantizationConfig, WeightScheme
from lmcompress.trainers import DistillationTrainer
from lmcompress.trainers.quantization import QuantizationTrainer

GPT2 = {"vocab_size": 8192, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 256}
BERT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
# rows and tokens of a batch
BATCHES = {"gpt2": (16, 128), "bert": (32, 64)}
QUICK = {"gpt2": (2, 32), "bert": (2, 32)}
WAYS = ("baseline", "distillation", "qat", "qat + contrast")
# of what, and how much at most
ASKED = {"qat": ("baseline", 1.30), "qat + contrast": ("qat", 1.10)}

LOGITS = quantgpt().model_copy(update={"contrast": None})
QUANTIZATION = QuantizationConfig(weights=WeightScheme(bits=2), embeddings=WeightScheme(bits=2, granularity="row"))


def make_model(kind: str, quick: bool) -> Any:
    """A random model: arithmetic costs the same whatever the weights."""
    set_seed(0)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**BERT | ({"num_hidden_layers": 1} if quick else {})))
    return GPT2LMHeadModel(GPT2Config(**GPT2 | ({"n_layer": 1} if quick else {}), bos_token_id=0, eos_token_id=0))


def make_batch(kind: str, device: Any, quick: bool) -> dict[str, torch.Tensor]:
    """One batch without padding."""
    shape = (QUICK if quick else BATCHES)[kind]
    ids = torch.randint(5, 8000, shape, generator=torch.Generator().manual_seed(0))
    labels = ids if kind == "gpt2" else torch.arange(shape[0]) % 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


class Steps:
    """Optimizer steps of one way to train, one at a time, so that several can take turns.

    Args:
        kind: ``gpt2`` or ``bert``.
        way: one of ``WAYS``.
        folder: for what the trainer may write.
        quick: whether the model is to be tiny.
    """

    def __init__(self, kind: str, way: str, folder: str, quick: bool) -> None:
        student, args = make_model(kind, quick), arguments(folder)
        teacher = copy.deepcopy(student)
        self.trainer: Any
        if way == "baseline":
            self.trainer = Trainer(student, args)
        elif way == "distillation":
            self.trainer = DistillationTrainer(student, teacher, args, LOGITS)
        else:
            taught = quantgpt(Contrast()) if way == "qat + contrast" else LOGITS
            self.trainer = QuantizationTrainer(student, args, QUANTIZATION, teacher, taught)
        self._teacher = teacher.eval().to(args.device) if way == "baseline" else None
        self._batch = make_batch(kind, args.device, quick)
        self.trainer.create_optimizer_and_scheduler(args.max_steps)
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.state.max_steps = args.max_steps
        self.trainer.callback_handler.optimizer = self.trainer.optimizer
        self._tell("on_train_begin")

    def seconds(self) -> float:
        """One step: schedules, forward, backward, optimizer."""
        trainer, started = self.trainer, time.perf_counter()
        self._tell("on_step_begin")
        _, items = trainer.get_batch_samples(iter([self._batch]), 1, trainer.args.device)
        trainer.training_step(trainer.model, dict(self._batch), items)
        if self._teacher is not None:
            with torch.no_grad():
                self._teacher(input_ids=self._batch["input_ids"], attention_mask=self._batch["attention_mask"])
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        # contrast writes its memory when a step is over
        trainer.state.global_step += 1
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def _tell(self, event: str) -> None:
        getattr(self.trainer.callback_handler, event)(self.trainer.args, self.trainer.state, self.trainer.control)


def overhead(kind: str, repeats: int, quick: bool, warmup: int = 2) -> list[dict[str, Any]]:
    """Steps of all ways in turn, each over what it is asked to be compared with."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        steps = {way: Steps(kind, way, folder, quick) for way in WAYS}
        for number in range(repeats + warmup):
            for way, one in steps.items():
                taken = one.seconds()
                if number >= warmup:
                    times[way].append(taken)
    rows = []
    batch, length = (QUICK if quick else BATCHES)[kind]
    for way in WAYS:
        row: dict[str, Any] = {"model": kind, "way": way, "batch": batch, "length": length, "repeats": repeats}
        row["ms"] = 1000 * statistics.median(times[way])
        for other in dict.fromkeys(("baseline", ASKED.get(way, ("baseline", 0.0))[0])):
            if way != other:
                # of pairs side by side, so that a slow minute of the machine hits both
                pairs = [ours / theirs for ours, theirs in zip(times[way], times[other], strict=True)]
                lower, median, upper = statistics.quantiles(pairs, n=4)
                row |= {f"over_{other}": median, f"over_{other}_quartiles": [lower, upper]}
        rows.append(row)
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requested against measured numbers."""
    wanted = []
    for row in rows:
        if row["way"] in ASKED:
            other, most = ASKED[row["way"]]
            of = "student's step + teacher's forward" if other == "baseline" else other
            found = row[f"over_{other}"]
            name = f"{row['model']}: step of {row['way']} over {of}"
            wanted.append(asked(name, f"<= {most:.2f}", found, found <= most))
        elif row["way"] == "distillation":
            name = f"{row['model']}: step of distillation without quantization over student's step + teacher's forward"
            wanted.append(asked(name, "reported", row["over_baseline"], True))
    return wanted


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="one layer, small batches, three repeats")
    options = parser.parse_args()
    logging.set_verbosity_error()
    rows: list[dict[str, Any]] = []
    for kind in options.models:
        rows += overhead(kind, 3 if options.quick else options.repeats, options.quick)
    wanted = verdicts(rows)
    for line in rows + wanted:
        print(line)
    setting = {
        "shapes": {"gpt2": GPT2, "bert": BERT}, "threads": torch.get_num_threads(),
        "quantization": QUANTIZATION.model_dump(mode="json"), "distillation": quantgpt().model_dump(mode="json"),
    }  # fmt: skip
    print(write("qat_overhead", rows, wanted, quick=options.quick, setting=setting))


if __name__ == "__main__":
    main()
