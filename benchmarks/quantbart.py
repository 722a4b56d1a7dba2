"""A BART at 8, 4 and 2 bits: what is left of its summaries, what does contrast give, and how large are the files?

Parts:

* ``sizes``: a BART of the base size with random weights (139 million) at W-E-A 8-8-8, 4-4-8 and 2-2-8: the bytes of
  its file, plain, with five codes in a byte (``base3``, for the ternary codes of 2 bits) and with Zstandard.
  Random weights have no zeros to spare, so that Zstandard gains least here.
* ``grid``: a small BART is trained on SAMSum, with a tokenizer of its own, and is the teacher of students that begin as
  copies of it: QuantBART (dynamic scaling, logits and contrast of tokens of the decoder), the same without contrast,
  LSQ and TBT, all for the same steps on the same rows in the same order. ROUGE is of greedy summaries of the first
  ``EVALUATED`` rows of the test split, by the model that was packed, saved and loaded again.

The published BART-base was trained on far more text than this one, whose summaries are poor: what can be read here
is how much of its teacher each student keeps.

    python benchmarks/quantbart.py --data ../shared/data --work runs

Finished runs are kept in ``--work`` and not repeated; ``--report`` only writes the results of existing runs.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from common import asked, once, train_and_report, training_parser, write
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from lmcompress.checkpoint.encoding import pack_model
from lmcompress.checkpoint.places import Packable
from lmcompress.distillation.config import Contrast
from lmcompress.distillation.presets import quantgpt
from lmcompress.evaluation import parameter_count, size_on_disk, written_scores, written_texts
from lmcompress.model import CompressedModel
from lmcompress.quantization import FakeQuantized, QuantizationConfig, WeightScheme, plan
from lmcompress.trainers.quantization import QuantizationTrainer

# chosen so that all takes an hour on one core
VOCABULARY, DIALOGUE, SUMMARY = 4000, 160, 40
BATCH, TEACHER_STEPS, STEPS = 16, 3000, 240
TEACHER_RATE, RATE, SCALE_RATE = 1e-3, 5e-4, 1e-3
EVALUATED = 200
BITS, SEEDS = (8, 4, 2), {8: 1, 4: 1, 2: 3}
ROUGE = ("rouge1", "rouge2", "rougeL")
# of the paper's table 3, at W-E-A n-n-8; its MB are 2**20 bytes: 139,420,416 float32 values are its 532.0
MIB = 2**20
PAPER = {8: 138.1, 4: 72.4, 2: 39.6}
QUANTBART, WITHOUT = "quantbart", "quantbart-no-contrast"
# name in the table: quantizer, and which weights of a matrix share a scale
METHODS: dict[str, tuple[str, Literal["tensor", "row"]]] = {
    QUANTBART: ("dynamic_scaling", "tensor"),
    WITHOUT: ("dynamic_scaling", "tensor"),
    "lsq": ("lsq", "tensor"),
    "tbt": ("tbt", "row"),
}
TERNARY = ("tbt",)


def small() -> BartConfig:
    """The BART that is trained here: 3 + 3 blocks of width 128."""
    return BartConfig(
        vocab_size=VOCABULARY, d_model=128, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=512, decoder_ffn_dim=512, max_position_embeddings=DIALOGUE,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip


def base() -> BartConfig:
    """The shape of ``facebook/bart-base``."""
    return BartConfig(
        d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12, decoder_attention_heads=12,
        encoder_ffn_dim=3072, decoder_ffn_dim=3072,
    )  # fmt: skip


def scheme(quantizer: str, bits: int, granularity: Literal["tensor", "row"]) -> QuantizationConfig:
    """W-E-A of n, n and 8 bits."""
    weights = WeightScheme(quantizer=quantizer, bits=bits, granularity=granularity)
    return QuantizationConfig(weights=weights, embeddings=weights.model_copy(update={"granularity": "row"}))


class Bench:
    """The data, the teacher, and what is done with both.

    Args:
        options: of the command line.
        work: where the teacher goes.
    """

    def __init__(self, options: Any, work: Path) -> None:
        self.quick, self.work = options.quick, work
        folder = options.data / "summarization" / "samsum"
        self.splits = {split: Dataset.from_parquet(str(folder / f"{split}.parquet")) for split in ("train", "test")}
        self.splits["test"] = self.splits["test"].select(range(4 if self.quick else EVALUATED))
        if self.quick:
            self.splits["train"] = self.splits["train"].select(range(64))
        self.tokenizer = self._tokenizer()
        self.rows, self.test = (
            rows.map(self._encoded, batched=True, remove_columns=rows.column_names) for rows in self.splits.values()
        )
        self.collator = DataCollatorForSeq2Seq(self.tokenizer)

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        file = self.work / "tokenizer.json"
        if not file.exists():
            made = ByteLevelBPETokenizer()
            texts = [text for row in self.splits["train"] for text in (row["dialogue"], row["summary"])]
            made.train_from_iterator(texts, VOCABULARY, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
            made.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
            file.parent.mkdir(parents=True, exist_ok=True)
            made.save(str(file))
        return PreTrainedTokenizerFast(
            tokenizer_file=str(file), bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
            model_max_length=DIALOGUE,
        )  # fmt: skip

    def _encoded(self, rows: dict[str, list[str]]) -> dict[str, Any]:
        inputs = self.tokenizer(rows["dialogue"], truncation=True, max_length=DIALOGUE)
        targets = self.tokenizer(text_target=rows["summary"], truncation=True, max_length=SUMMARY)
        names = ("input_ids", "attention_mask")
        return {name: inputs[name] for name in names} | {"labels": targets["input_ids"]}

    def arguments(self, folder: Path, steps: int, rate: float, seed: int) -> TrainingArguments:
        """The settings of a training."""
        return TrainingArguments(
            str(folder / "checkpoints"), learning_rate=rate, per_device_train_batch_size=4 if self.quick else BATCH,
            max_steps=2 if self.quick else steps, warmup_steps=0.06, weight_decay=0.01, seed=seed, save_strategy="no",
            logging_steps=1 if self.quick else 20, report_to="none", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip

    def dense(self) -> Any:
        """The teacher, trained before."""
        return BartForConditionalGeneration.from_pretrained(self.work / "teacher" / "model")

    def teacher(self) -> dict[str, Any]:
        """Train the teacher, and measure it."""
        set_seed(0)
        model, started = BartForConditionalGeneration(small()), time.time()
        args = self.arguments(self.work / "teacher", TEACHER_STEPS, TEACHER_RATE, 0)
        Trainer(model, args, train_dataset=self.rows, data_collator=self.collator).train()
        model.save_pretrained(self.work / "teacher" / "model")
        size = size_on_disk(self.work / "teacher" / "model").weights_bytes
        return {
            **self.quality(model),
            "parameters": parameter_count(model),
            "bytes": size,
            "seconds": round(time.time() - started),
        }

    def quality(self, model: Any) -> dict[str, float]:
        """ROUGE F-measures of greedy summaries, in per cent."""
        texts = written_texts(
            model, self.tokenizer, self.test, self.collator, batch_size=BATCH, max_new_tokens=SUMMARY, progress=False
        )
        return written_scores(ROUGE, texts, self.splits["test"]["summary"])

    def trained(self, folder: Path, name: str, bits: int, seed: int) -> dict[str, Any]:
        """Quantization-aware training, and what came of it."""
        set_seed(seed)
        quantizer, granularity = METHODS[name]
        config = scheme(quantizer, bits, granularity).model_copy(update={"scale_learning_rate": SCALE_RATE})
        contrast = Contrast() if name == QUANTBART else None
        trainer = QuantizationTrainer(
            self.dense(),
            self.arguments(folder, STEPS, RATE, seed),
            quantization=config,
            teacher=self.dense(),
            distillation=quantgpt().model_copy(update={"contrast": contrast}),
            train_dataset=self.rows,
            data_collator=self.collator,
        )
        started = time.time()
        trainer.train()
        trainer.finish()
        batch = dict(self.collator([self.rows[i] for i in range(2)]))
        saved = CompressedModel(trainer.student).save_pretrained(folder / "model", batches=[batch])
        last = [entry for entry in trainer.state.log_history if "loss_kd" in entry][-1]
        return {
            **self.quality(BartForConditionalGeneration.from_pretrained(folder / "model")),
            **{name: last[name] for name in ("loss_kd", "loss_contrast") if name in last},
            "bytes": size_on_disk(folder / "model").weights_bytes,
            "reload_error": saved.max_error,
            "steps": trainer.state.global_step,
            "seconds": round(time.time() - started),
        }


def size(folder: Path, bits: int, quick: bool) -> dict[str, Any]:
    """The bytes of a file of random weights, in all forms of storage."""
    set_seed(0)
    model = BartForConditionalGeneration(small() if quick else base()).eval()
    found: dict[str, Any] = {"parameters": parameter_count(model)}
    fake = FakeQuantized(model, plan(model, scheme("mse", bits, "tensor")))
    # ternary codes are kept five to a byte, unless they are given two bits each
    containers: dict[str, Any] = {"plain": bits} | ({"base3": "base3"} if bits == 2 else {})
    quantized = fake.quantized()
    fake.remove()
    for name, container in containers.items():
        twin = copy.deepcopy(model)
        pack_model(twin, {path: Packable(one, container=container) for path, one in quantized.items()})
        for storage in ("plain", "zstd"):
            key = name if storage == "plain" else f"{name}_zstd"
            CompressedModel(twin).save_pretrained(folder / key, storage=storage)
            found[key] = size_on_disk(folder / key).weights_bytes
    return found


def run(options: Any, work: Path) -> None:
    """All runs that do not exist yet; the first seeds of all before the second of any."""
    for bits in BITS:
        once(
            work / "sizes" / str(bits),
            {"part": "sizes", "bits": bits},
            partial(size, work / "models", bits, options.quick),
        )
    bench = Bench(options, work)
    once(work / "teacher", {"part": "teacher"}, bench.teacher)
    for seed in range(1 if options.quick else max(SEEDS.values())):
        for bits in (2, 8, 4):
            for name in METHODS:
                if seed < SEEDS[bits] and not (name in TERNARY and bits != 2):
                    folder = work / "grid" / f"{name}-{bits}-{seed}"
                    about = {"part": "grid", "bits": bits, "method": name, "seed": seed}
                    once(folder, about, partial(bench.trained, folder, name, bits, seed))


def summarise(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sizes, the teacher, and the mean over seeds of each method and number of bits."""
    rows = [row for row in done if row["part"] != "grid"]
    for bits in BITS:
        for name in METHODS:
            mine = [r for r in done if r["part"] == "grid" and (r["bits"], r["method"]) == (bits, name)]
            if mine:
                means = {key: statistics.mean(r[key] for r in mine) for key in (*ROUGE, "seconds", "loss_kd")}
                spread = {f"{key}_spread": statistics.stdev(r[key] for r in mine) for key in ROUGE if len(mine) > 1}
                rows.append(
                    {"part": "grid", "bits": bits, "method": name, "seeds": len(mine), "steps": mine[0]["steps"]}
                    | means | spread
                    | {"bytes": mine[0]["bytes"], "reload_error": max(r["reload_error"] for r in mine)}
                )  # fmt: skip
    return rows


def report(options: Any, work: Path) -> None:
    """Results of all existing runs."""
    files = sorted([*work.glob("sizes/*/row.json"), *work.glob("teacher/row.json"), *work.glob("grid/*/row.json")])
    if not files:
        raise SystemExit(f"there are no runs in {work} yet: leave out --report")
    rows = summarise([json.loads(file.read_text()) for file in files])
    wanted = [
        asked(f"BART-base's shape at {row['bits']}-{row['bits']}-8, MiB", f"{PAPER[row['bits']]} ± 0.5",
              row["plain"] / MIB, abs(row["plain"] / MIB - PAPER[row["bits"]]) <= 0.5)
        for row in rows if row["part"] == "sizes"
    ]  # fmt: skip
    grid = {(row["bits"], row["method"]): row for row in rows if row["part"] == "grid"}
    for bits in BITS:
        if {(bits, QUANTBART), (bits, WITHOUT)} <= grid.keys():
            gain = grid[bits, QUANTBART]["rougeL"] - grid[bits, WITHOUT]["rougeL"]
            wanted.append(asked(f"{bits}-{bits}-8: ROUGE-L with contrast over without", "reported", gain, True))
    errors = [row["reload_error"] for row in grid.values()]
    if errors:
        wanted.append(asked("greatest difference of logits after reloading", "0", max(errors), max(errors) == 0))
    setting = {
        "vocabulary": VOCABULARY, "lengths": [DIALOGUE, SUMMARY], "batch": BATCH, "steps": STEPS,
        "teacher_steps": TEACHER_STEPS, "learning_rates": [TEACHER_RATE, RATE, SCALE_RATE], "evaluated": EVALUATED,
        "methods": METHODS, "distillation": quantgpt().model_dump(mode="json"),
    }  # fmt: skip
    for row in rows:
        print(row)
    for item in wanted:
        print(item)
    print(write("quantbart", rows, wanted, quick=options.quick, setting=setting))


def main() -> None:
    """Command line."""
    parser = training_parser(__doc__, "summarization/samsum/*.parquet")
    train_and_report("quantbart", parser, run, report)


if __name__ == "__main__":
    main()
