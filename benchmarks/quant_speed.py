"""How fast are packed models on this CPU, beside fp32 and beside what others make of the same models?

Random weights: times do not depend on them. Rounding to nearest, one scale for each row, no training. All models of a
question are in one process, called in turn, medians.

* Encoders: BERT of BERT-base's and MiniLM's shape at 32 x 128 and 1 x 128.
* Decoding: GPT-2 of small shape, greedy, batch 1, with its key-value cache and its head; tokens a second of whole
  calls of ``generate``, so that its Python counts as well.
* Memory: what a process holds after it has loaded GPT-2 of small shape and run it twice, above what it held before.
  ``fast`` keeps matrices ready for their kernel beside the packed bytes, ``low`` unpacks them in every call.

Others, where they are installed: torch's own dynamic int8, torchao's, bitsandbytes' 8 bits and NF4, onnxruntime's
dynamic int8, OpenVINO's int8 by nncf. They are taken as they come: what leaves GPT-2's Conv1D alone leaves it alone.
What is missing or fails is said in the rows.

    python benchmarks/quant_speed.py
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import asked, write
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from lmcompress import CompressedModel
from lmcompress.evaluation import compare_latency, size_on_disk, verdict
from lmcompress.kernels import dispatch as kernels
from lmcompress.kernels.matmul import Matmul
from lmcompress.quantization import ActivationScheme, FakeQuantized, QuantizationConfig, WeightScheme, plan

BERTS = {
    "MiniLM": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "BERT-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
}
LENGTH = 128
# how many times as fast as fp32 W8A8 must be, by shape and batch size
ASKED = {("BERT-base", 32): 2.8, ("BERT-base", 1): 3.5, ("MiniLM", 32): 2.8, ("MiniLM", 1): 2.4}
REPEATS = {("MiniLM", 32): 9, ("MiniLM", 1): 40, ("BERT-base", 32): 5, ("BERT-base", 1): 20}
ASKED_DECODING, ASKED_MEMORY = 3.0, 0.30
PROMPT, NEW_TOKENS = 8, 64
W8A8 = "lmcompress W8A8"
# a tenth of a second in place of minutes
QUICK_BERT = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, vocab_size=200)
QUICK_GPT2 = dict(n_embd=64, n_layer=1, n_head=4, vocab_size=200)


def scheme(bits: Any, *, symmetric: Any = "auto", granularity: str = "tensor") -> QuantizationConfig:
    """Round to nearest over the greatest magnitude of each row; activations of 8 bits over the range that they have."""
    weights = WeightScheme(quantizer="minmax", bits=bits, granularity="row")
    activations = ActivationScheme(bits=8, symmetric=symmetric, granularity=granularity)  # type: ignore[arg-type]
    return QuantizationConfig(weights=weights, embeddings=weights, activations=activations, attention=False)


OURS = {
    W8A8: scheme(8),
    "lmcompress W8A8, by token": scheme(8, granularity="token"),
    "lmcompress W4A8": scheme(4),
    "lmcompress W2A8": scheme(2),
}


def packed(model: Any, config: QuantizationConfig) -> Any:
    """A packed copy."""
    model = copy.deepcopy(model)
    FakeQuantized(model, plan(model, config)).finish()
    return model


class Foreign(nn.Module):
    """Another runtime's model, called like ours so that ``compare_latency`` can time it.

    Args:
        model: where it came from.
        call: ids and mask to anything.
    """

    def __init__(self, model: Any, call: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.config, self.device, self._call = model.config, torch.device("cpu"), call

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """What the other runtime gives.

        Args:
            input_ids: ``(batch, length)``.
            attention_mask: all 1.
        """
        return self._call(input_ids, attention_mask)


class _Logits(nn.Module):
    """A model from tensors to a tensor, as exporters want it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def example() -> tuple[Tensor, Tensor]:
    """Ids and mask of two short rows."""
    ids = torch.randint(2, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


def torch_dynamic(model: Any, folder: Path) -> Any:
    """torch.ao.quantization.quantize_dynamic."""
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def torchao_dynamic(model: Any, folder: Path) -> Any:
    """torchao, int8 weights and int8 activations by token."""
    torchao = importlib.import_module("torchao.quantization")
    model = copy.deepcopy(model)
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    return model


# a head of two classes is too narrow for its kernels; heads of language models are left out by default
_HEADS = ["classifier", "lm_head"]


def bitsandbytes_8(model: Any, folder: Path) -> Any:
    """bitsandbytes, LLM.int8()."""
    return _bitsandbytes(model, folder, BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_HEADS))


def bitsandbytes_nf4(model: Any, folder: Path) -> Any:
    """bitsandbytes, NF4."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=_HEADS)
    return _bitsandbytes(model, folder, config)


def _bitsandbytes(model: Any, folder: Path, config: BitsAndBytesConfig) -> Any:
    importlib.import_module("bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not (folder / "config.json").exists():
        model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}).eval()


def onnxruntime_dynamic(model: Any, folder: Path) -> Any:
    """onnxruntime's quantize_dynamic of an export by torch."""
    runtime = importlib.import_module("onnxruntime")
    quantization = importlib.import_module("onnxruntime.quantization")
    importlib.import_module("onnxscript")
    dense, small = folder / "dense.onnx", folder / "int8.onnx"
    # of the batch that is exported 1 would be taken for a constant
    axes = {name: {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=512)} for name in ("ids", "mask")}
    torch.onnx.export(_Logits(model), example(), dense, dynamo=True, verbose=False, dynamic_shapes=tuple(axes.values()))
    quantization.quantize_dynamic(dense, small, weight_type=quantization.QuantType.QInt8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(small, options, providers=["CPUExecutionProvider"])
    names = [taken.name for taken in session.get_inputs()]
    return Foreign(model, lambda *given: session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)}))


def openvino_int8(model: Any, folder: Path) -> Any:
    """OpenVINO with nncf's post-training int8; ranges from eight random batches."""
    openvino, nncf = importlib.import_module("openvino"), importlib.import_module("nncf")
    converted = openvino.convert_model(_Logits(model), example_input=example())
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(2, 200, (1, 16), generator=generator) for _ in range(8)]
    data = nncf.Dataset([(ids.numpy(), torch.ones_like(ids).numpy()) for ids in batches])
    small = nncf.quantize(converted, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))
    compiled = openvino.compile_model(small, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
    return Foreign(model, lambda *given: compiled([t.numpy() for t in given]))


IN_TORCH = {
    "torch dynamic int8": torch_dynamic,
    "torchao int8 dynamic": torchao_dynamic,
    "bitsandbytes 8-bit": bitsandbytes_8,
    "bitsandbytes NF4": bitsandbytes_nf4,
}
PACKAGES = ("torchao", "bitsandbytes", "onnxruntime", "openvino", "nncf")
RUNTIMES = {"onnxruntime dynamic int8": onnxruntime_dynamic, "OpenVINO int8": openvino_int8}


def made(
    model: Any, peers: Mapping[str, Callable[[Any, Path], Any]], folder: Path, call: Callable[[Any], Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """fp32, ours and the others of one model, and of those that there are none of, why.

    Args:
        model: fp32.
        peers: how to make the others.
        folder: for what they write.
        call: something that each must be able to do.
    """
    models: dict[str, Any] = {"fp32": model} | {name: packed(model, config) for name, config in OURS.items()}
    missing = {}
    for name, make in peers.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                own = folder / make.__name__.partition("_")[0]
                own.mkdir(exist_ok=True)
                models[name] = make(model, own)
                with torch.inference_mode():
                    call(models[name])
        except ImportError as error:
            missing[name] = f"not installed: {error}"
        # whatever goes wrong in another library is its result
        except Exception as error:
            missing[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if name in missing:
            models.pop(name, None)
    return models, missing


def versions() -> dict[str, str | None]:
    """What of the others is installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def timed_rows(about: dict[str, Any], models: dict[str, Any], **how: Any) -> list[dict[str, Any]]:
    """A row for each model, of one size."""
    timed = compare_latency(models, **how)
    return [
        {
            **about, "batch": row.batch_size, "method": row.model, "ms": row.median_ms,
            "quartiles_ms": [row.lower_ms, row.upper_ms], "speedup": row.speedup_vs_first, "verdict": said,
            "kernel": kernel_of(models[row.model]),
        }
        for row, said in zip(timed, verdict(timed), strict=True)
    ]  # fmt: skip


def kernel_of(model: Any) -> str | None:
    """Which kernel multiplied, in a packed model."""
    matmuls = (getattr(module, "_matmul", None) for module in model.modules())
    names = sorted({matmul.kernel for matmul in matmuls if isinstance(matmul, Matmul)})
    return ", ".join(names) or None


def encoders(name: str, quick: bool) -> list[dict[str, Any]]:
    """One shape of BERT at both batch sizes."""
    set_seed(0)
    model = BertForSequenceClassification(BertConfig(**(QUICK_BERT if quick else BERTS[name]))).eval()
    ids, mask = example()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        models, missing = made(
            model, IN_TORCH | RUNTIMES, Path(scratch), lambda peer: peer(input_ids=ids, attention_mask=mask)
        )
        for batch in (32, 1):
            about = {"question": "encoder", "model": name, "asked_batch": batch, "length": 16 if quick else LENGTH}
            rows += timed_rows(
                about, models, batch_sizes=(2 if quick else batch,), sequence_length=about["length"],
                warmup=2, repeats=3 if quick else REPEATS[name, batch],
            )  # fmt: skip
    about = {"question": "encoder", "model": name}
    return rows + [{**about, "method": peer, "not_run": why} for peer, why in missing.items()]


def gpt2(quick: bool) -> Any:
    """A random GPT-2 of small shape."""
    set_seed(0)
    return GPT2LMHeadModel(GPT2Config(**(QUICK_GPT2 if quick else {}), bos_token_id=0, eos_token_id=0)).eval()


def decoding(quick: bool) -> list[dict[str, Any]]:
    """Tokens a second of greedy generation."""
    model, new = gpt2(quick), 4 if quick else NEW_TOKENS
    prompt = torch.zeros(1, PROMPT, dtype=torch.long)

    def generates(peer: Any) -> None:
        peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False, pad_token_id=0)

    about = {"question": "decoding", "model": "GPT-2 small", "prompt": PROMPT, "new_tokens": new}
    with tempfile.TemporaryDirectory() as scratch:
        models, missing = made(model, IN_TORCH, Path(scratch), generates)
        rows = timed_rows(
            about, models, batch_sizes=(1,), sequence_length=PROMPT, mode="generate", new_tokens=new,
            warmup=1, repeats=3 if quick else 7,
        )  # fmt: skip
    missing |= dict.fromkeys(RUNTIMES, "no decoder with a key-value cache was made for it")
    for row in rows:
        row["tokens_per_second"] = 1000 * new / row["ms"]
    return rows + [{**about, "method": peer, "not_run": why} for peer, why in missing.items()]


def memory(quick: bool) -> list[dict[str, Any]]:
    """Resident memory of loaded models, each in a process of its own."""
    model = gpt2(quick)
    ways = [("fp32", None, "fast"), (W8A8, OURS[W8A8], "fast")]
    ways += [("lmcompress W4A8", OURS["lmcompress W4A8"], way) for way in ("fast", "low")]
    rows: list[dict[str, Any]] = []
    for method, config, way in ways:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            CompressedModel(model if config is None else packed(model, config)).save_pretrained(folder)
            # spawned, so that it begins without this process's memory
            with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
                held = pool.submit(held_bytes, folder, way, torch.get_num_threads()).result()
            rows.append(
                {
                    "question": "memory", "model": "GPT-2 small", "method": method, "memory": way,
                    "resident_mib": held / 2**20, "file_mib": size_on_disk(folder).weights_bytes / 2**20,
                    "of_fp32": held / 2**20 / rows[0]["resident_mib"] if rows else 1.0,
                }
            )  # fmt: skip
    return rows


@torch.inference_mode()
def held_bytes(folder: Path, way: kernels.Memory, threads: int) -> int:
    """What a process holds more after loading a model and running it twice than before."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    ids = torch.zeros(1, 32, dtype=torch.long)
    # what libraries take when they are first used is not the model's
    warm = gpt2(quick=True)
    for model in (warm, packed(warm, OURS[W8A8])):
        model(input_ids=ids)
    del model, warm
    before = _resident()
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with kernels.using(memory=way):
        for _ in range(2):
            loaded(input_ids=ids)
    return _resident() - before


def _resident() -> int:
    gc.collect()
    # what was freed and not given back would count
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for, beside what came."""
    wanted = []
    for row in rows:
        if row["method"] == W8A8 and row["question"] == "encoder":
            target = ASKED[row["model"], row["asked_batch"]]
            name = f"W8A8 {row['model']} shape, {row['asked_batch']} x {LENGTH}, over fp32"
            wanted.append(asked(name, f">= {target}", row["speedup"], row["speedup"] >= target))
        elif row["method"] == W8A8 and row["question"] == "decoding":
            name = "W8A8 GPT-2 small shape, decoding at batch 1, tokens a second over fp32"
            wanted.append(asked(name, f">= {ASKED_DECODING}", row["speedup"], row["speedup"] >= ASKED_DECODING))
        elif row["method"] == "lmcompress W4A8" and row["question"] == "memory" and row["memory"] == "low":
            name = "resident memory of the 4-bit GPT-2 small shape over fp32's, memory='low'"
            wanted.append(asked(name, f"<= {ASKED_MEMORY}", row["of_fp32"], row["of_fp32"] <= ASKED_MEMORY))
    return wanted


def main() -> None:
    """Command line."""
    questions = ("encoders", "decoding", "memory")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", choices=questions, default=questions)
    parser.add_argument("--models", nargs="+", choices=BERTS, default=list(BERTS), help="of the encoders")
    parser.add_argument("--quick", action="store_true", help="a layer of 64 in place of each model, few repeats")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    if "encoders" in options.questions:
        for name in options.models:
            rows += encoders(name, options.quick)
    if "decoding" in options.questions:
        rows += decoding(options.quick)
    if "memory" in options.questions:
        rows += memory(options.quick)
    wanted = verdicts(rows)
    for line in rows + wanted:
        print(line)
    setting = {
        "shapes": BERTS, "threads": torch.get_num_threads(), "kernels": kernels.ladder("cpu"),
        "peers": versions(),
        "ours": {name: config.model_dump(mode="json") for name, config in OURS.items()},
    }  # fmt: skip
    print(write("quant_speed", rows, wanted, quick=options.quick, setting=setting))


if __name__ == "__main__":
    main()
