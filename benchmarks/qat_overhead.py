"""What does a step of quantization-aware training cost beyond what it cannot avoid, and what does contrast add?

The baseline is a step of plain ``Trainer`` on the student plus a forward pass of the teacher without gradient. Beside
it, in the same process, in rounds of random order: distillation by logits without quantization, the same with weights,
embeddings and activations quantized as QuantGPT does it at 2-2-8 bits, and that with contrast; of an encoder also what
recipes take by default, logits, hidden states and attention scores of all layers. The same in bfloat16, as
``bf16=True`` trains, over float32. Ratios are medians of pairs within rounds, of CPU time on one thread. GPT-2: the
shape of the shared model, 16 x 128 tokens; BERT: MiniLM's, 32 x 64, without padding. All weights are trained.

    python benchmarks/qat_overhead.py
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from typing import Any

import torch
from common import asked, write
from speeds import add_threads, cost_columns, on
from steps import BASELINE, StepByStep, in_turn
from trainer_overhead import arguments
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, Trainer, set_seed
from transformers.utils import logging

from lmcompress.distillation.config import Contrast
from lmcompress.distillation.presets import quantgpt, ternarybert
from lmcompress.evaluation.speed import name_again
from lmcompress.quantization import QuantizationConfig, WeightScheme
from lmcompress.trainers import DistillationTrainer
from lmcompress.trainers.quantization import QuantizationTrainer

GPT2 = {"vocab_size": 8192, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 256}
BERT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
# rows and tokens of a batch
BATCHES = {"gpt2": (16, 128), "bert": (32, 64)}
QUICK = {"gpt2": (2, 32), "bert": (2, 32)}
WAYS = {
    "gpt2": ("baseline", "distillation", "qat", "qat + contrast", "distillation, bf16", "qat, bf16"),
    "bert": (
        "baseline", "distillation", "qat", "qat + contrast", "qat, all layers", "distillation, bf16", "qat, bf16",
        "qat, all layers, bf16",
    ),
}  # fmt: skip
# of what, and how much at most
ASKED = {
    "qat": ("baseline", 1.30),
    "qat, all layers": ("baseline", 1.30),
    "qat + contrast": ("qat", 1.10),
    "distillation, bf16": ("distillation", 0.45),
    "qat, bf16": ("qat", 0.45),
    "qat, all layers, bf16": ("qat, all layers", 0.45),
}

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


def make_steps(kind: str, way: str, folder: str, quick: bool) -> StepByStep:
    """Optimizer steps of one way to train."""
    way, bf16 = way.removesuffix(", bf16"), way.endswith(", bf16")
    student, args = make_model(kind, quick), arguments(folder, bf16=bf16)
    teacher, batch = copy.deepcopy(student), make_batch(kind, args.device, quick)
    if way == "baseline":
        return StepByStep(Trainer(student, args), batch, teacher)
    if way == "distillation":
        return StepByStep(DistillationTrainer(student, args, teacher=teacher, distillation=LOGITS), batch)
    taught = {"qat + contrast": quantgpt(Contrast()), "qat, all layers": ternarybert(student.config.num_hidden_layers)}
    trainer = QuantizationTrainer(
        student, args, quantization=QUANTIZATION, teacher=teacher, distillation=taught.get(way, LOGITS)
    )
    return StepByStep(trainer, batch)


def overhead(kind: str, repeats: int, threads: int, quick: bool) -> list[dict[str, Any]]:
    """Steps of all ways in turn, each over what it is asked to be compared with; the baseline over itself."""
    with tempfile.TemporaryDirectory() as folder:
        ways = {way: make_steps(kind, way, folder, quick) for way in WAYS[kind]}
        turns, _ = in_turn(ways, repeats, threads)
    rows = []
    batch, length = (QUICK if quick else BATCHES)[kind]
    for way in (None, *WAYS[kind]):
        row: dict[str, Any] = {"model": kind, "way": way or name_again(BASELINE), "batch": batch, "length": length}
        row |= {"repeats": repeats, "kind": "again" if way is None else "other"}
        for other in dict.fromkeys((BASELINE, ASKED.get(way or BASELINE, (BASELINE, 0.0))[0])):
            costs = cost_columns(turns, way, other, threads)
            row |= {name: value for name, value in costs.items() if "ratio" not in name}
            if way != other:
                ratios = {name: value for name, value in costs.items() if "ratio" in name}
                row |= {name.replace("ratio", f"over_{other}"): value for name, value in ratios.items()}
        rows.append(row)
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requested against measured numbers."""
    wanted = []
    for row in rows:
        where = f"{row['model']}, {on(row['threads'])}"
        if row["way"] in ASKED:
            other, most = ASKED[row["way"]]
            of = "student's step + teacher's forward" if other == BASELINE else other
            found = row[f"over_{other}"]
            name = f"{where}: step of {row['way']} over {of}"
            wanted.append(asked(name, f"<= {most:.2f}", found, found <= most, busy=row["busy"]))
        elif row["way"] == "distillation":
            name = f"{where}: step of distillation without quantization over student's step + teacher's forward"
            wanted.append(asked(name, "reported", row["over_baseline"], True))
    return wanted


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--repeats", type=int, default=20)
    add_threads(parser, default=(1,))
    parser.add_argument("--quick", action="store_true", help="one layer, small batches, three repeats")
    options = parser.parse_args()
    logging.set_verbosity_error()
    rows: list[dict[str, Any]] = []
    for threads in options.threads:
        for kind in options.models:
            rows += overhead(kind, 3 if options.quick else options.repeats, threads, options.quick)
    wanted = verdicts(rows)
    for line in rows + wanted:
        print(line)
    setting = {
        "shapes": {"gpt2": GPT2, "bert": BERT},
        "quantization": QUANTIZATION.model_dump(mode="json"), "distillation": quantgpt().model_dump(mode="json"),
    }  # fmt: skip
    print(write("qat_overhead", rows, wanted, quick=options.quick, setting=setting))


if __name__ == "__main__":
    main()
