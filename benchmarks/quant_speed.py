"""How fast are packed models on this CPU, beside fp32, bf16 and what others make of the same models?

Random weights: times do not depend on them. Rounding to nearest, one scale for each row, no training; static ranges are
calibrated on eight random rows. All models of a question are called in rounds, in an order drawn anew in each, and fp32
twice: what it differs from itself by is what the machine does. Foreign runtimes are in processes of their own, with
idle threads that do not spin. CPU time of one thread, wall time of two; ratios are medians of pairs within rounds.

* Encoders: BERT of BERT-base's and MiniLM's shape at 32 x 128 and 1 x 128, eager, and on one thread also by
  ``torch.compile`` with frozen weights. ``bf16 rest``: all that is not an integer matmul is in bfloat16. ``deviation``:
  of logits from those of fp32.
* Decoding: GPT-2 of small shape, greedy, batch 1 and 8, with its key-value cache and its head; whole calls of
  ``generate``, so that its Python counts as well.
* Memory: what a process holds after it has loaded GPT-2 of small shape and run it twice, above what it held before.
  ``fast`` keeps matrices ready for their kernel beside the packed bytes, ``low`` unpacks them in every call.

Others, where they are installed: torch's own dynamic int8, torchao's, bitsandbytes' NF4 for decoding, ONNX Runtime,
OpenVINO with nncf. They are taken as they come: what leaves GPT-2's Conv1D alone leaves it alone. What is missing or
fails is said in the rows.

    python benchmarks/quant_speed.py
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import peers
import quant_asked
import torch
from common import write
from speeds import add_threads, timed_rows
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from lmcompress import CompressedModel
from lmcompress.evaluation import Worker, size_on_disk
from lmcompress.kernels import dispatch as kernels
from lmcompress.kernels.matmul import Matmul
from lmcompress.quantization import ActivationScheme, QuantizationConfig, WeightScheme, quantize

BERTS = {
    "MiniLM": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "BERT-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
}
LENGTH, BATCHES, DECODED = 128, (1, 32), (1, 8)
REPEATS = {("MiniLM", 32): 11, ("MiniLM", 1): 40, ("BERT-base", 32): 7, ("BERT-base", 1): 20}
PROMPT, NEW_TOKENS = 8, 16
# a tenth of a second in place of minutes
QUICK_BERT = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, vocab_size=200)
QUICK_RUNTIMES = ("lmcompress W8A8, static, compiled", "ONNX Runtime dynamic int8", "OpenVINO, our export, fp32 rest")
QUICK_GPT2 = dict(n_embd=64, n_layer=1, n_head=4, vocab_size=200)


def scheme(bits: Any, **activations: Any) -> QuantizationConfig:
    """Round to nearest over the greatest magnitude of each row; activations of 8 bits."""
    weights = WeightScheme(quantizer="minmax", bits=bits, granularity="row")
    given = ActivationScheme(bits=8, **activations)
    return QuantizationConfig(weights=weights, embeddings=weights, activations=given, attention=False)


W8A8, BY_TOKEN, STATIC = "lmcompress W8A8", "lmcompress W8A8, by token", "lmcompress W8A8, static"
OURS = {
    W8A8: scheme(8, granularity="tensor"),
    BY_TOKEN: scheme(8, granularity="token"),
    STATIC: scheme(8, range="static"),
    "lmcompress W4A8": scheme(4, granularity="tensor"),
    "lmcompress W2A8": scheme(2, granularity="tensor"),
}
FP32, BF16 = "fp32", "bf16"
BF16_REST, COMPILED = ", bf16 rest", ", compiled"


def packed(model: Any, config: QuantizationConfig) -> Any:
    """A packed copy; static ranges are those of random rows."""
    model = copy.deepcopy(model)
    static = config.activations is not None and config.activations.range == "static"
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in peers.random_batches()]
    quantize(model, config, batches if static else None, progress=False)
    return model.eval()


def encoder(name: str, quick: bool) -> Any:
    """A random BERT, the same in every process."""
    set_seed(0)
    return BertForSequenceClassification(BertConfig(**(QUICK_BERT if quick else BERTS[name]))).eval()


def packed_encoder(name: str, quick: bool, method: str) -> Any:
    """The same, as a row's name says: packed in one of our ways or not, and with its rest in bfloat16 or not."""
    method, bf16 = method.removesuffix(BF16_REST), method.endswith((BF16_REST, BF16))
    model = encoder(name, quick)
    model = packed(model, OURS[method]) if method in OURS else model
    return model.bfloat16() if bf16 else model


def gpt2(quick: bool) -> Any:
    """A random GPT-2 of small shape."""
    set_seed(0)
    return GPT2LMHeadModel(GPT2Config(**(QUICK_GPT2 if quick else {}), bos_token_id=0, eos_token_id=0)).eval()


Makers = Mapping[str, Callable[[], Any]]
"""What makes each model, by the name of its row."""


def in_torch(model: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    """Encoders of this process."""
    models = {name: packed(model, config) for name, config in OURS.items()}
    models |= {name + BF16_REST: copy.deepcopy(models[name]).bfloat16() for name in (W8A8, BY_TOKEN, STATIC)}
    eager = {FP32: model, BF16: copy.deepcopy(model).bfloat16()} | models
    makers: dict[str, Callable[[], Any]] = {name: partial(_itself, each) for name, each in eager.items()}
    makers["torch dynamic int8"] = partial(peers.torch_dynamic, model, folder)
    makers["torchao int8 dynamic"] = partial(peers.torchao_dynamic, model, folder)
    return makers


def _itself(model: Any) -> Any:
    return model


def runtimes(name: str, quick: bool, folder: Path, threads: int, stack: ExitStack) -> dict[str, Callable[[], Any]]:
    """Encoders of other runtimes and compiled ones, each in a process of its own that ends with the stack.

    Compiled ones on one thread only, as a compiler takes a minute for each.
    """
    make, static = partial(encoder, name, quick), partial(packed_encoder, name, quick, STATIC)
    names = (BF16, BY_TOKEN, STATIC, STATIC + BF16_REST) if threads == 1 else ()
    built: dict[str, tuple[Any, ...]] = {
        row + COMPILED: (peers.compiled, partial(packed_encoder, name, quick, row)) for row in names
    }
    built |= {
        "ONNX Runtime fp32": (peers.onnxruntime_model, make, folder, threads, False),
        "ONNX Runtime dynamic int8": (peers.onnxruntime_model, make, folder, threads, True),
        "ONNX Runtime, our export, static": (peers.exported, static, folder, threads, "onnx", None),
        "OpenVINO fp32": (peers.openvino_model, make, folder, threads, "f32", False),
        "OpenVINO bf16": (peers.openvino_model, make, folder, threads, "bf16", False),
        "OpenVINO int8 by nncf, fp32 rest": (peers.openvino_model, make, folder, threads, "f32", True),
        "OpenVINO int8 by nncf, bf16 rest": (peers.openvino_model, make, folder, threads, "bf16", True),
        "OpenVINO, our export, fp32 rest": (peers.exported, static, folder, threads, "openvino", "f32"),
        "OpenVINO, our export, bf16 rest": (peers.exported, static, folder, threads, "openvino", "bf16"),
    }

    if quick:
        built = {row: arguments for row, arguments in built.items() if row in QUICK_RUNTIMES}

    def start(arguments: tuple[Any, ...]) -> Worker:
        return stack.enter_context(Worker(*arguments, threads=threads))

    return {row: partial(start, arguments) for row, arguments in built.items()}


def made(makers: Makers, call: Callable[[Any], Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """All models that can be made and called, and of the others, why not."""
    models, missing = {}, {}
    for name, make in makers.items():
        try:
            model = make()
            with torch.inference_mode():
                call(model)
            models[name] = model
        except ImportError as error:
            missing[name] = f"not installed: {error}"
        # whatever goes wrong in another library is its result
        except Exception as error:
            missing[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return models, missing


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """What an encoder answers, in float32."""
    outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return (outputs[0] if isinstance(outputs, tuple) else outputs.logits).float()


def kernel_of(model: Any) -> str | None:
    """Which kernel multiplied, in a packed model."""
    matmuls = (getattr(module, "_matmul", None) for module in model.modules())
    names = sorted({matmul.kernel for matmul in matmuls if isinstance(matmul, Matmul) and matmul.kernel})
    return ", ".join(names) or None


def encoders(name: str, threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One shape of BERT at both batch sizes."""
    quick, length = options.quick, 16 if options.quick else LENGTH
    ids = torch.randint(2, 200, (8, length), generator=torch.Generator().manual_seed(1))
    answers: dict[str, Tensor] = {}
    rows = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        model = encoder(name, quick)
        makers = in_torch(model, Path(scratch)) | runtimes(name, quick, Path(scratch), threads, stack)
        chosen = {row: make for row, make in makers.items() if row == FP32 or options.methods in row}
        models, missing = made(chosen, lambda each: logits_of(each, ids[:2]))
        with torch.inference_mode():
            answers = {row: logits_of(each, ids) for row, each in models.items() if COMPILED not in row}
        for batch in options.batches:
            about = {"question": "encoder", "model": name, "asked_batch": batch, "length": length}
            rows += timed_rows(
                about, models, threads=threads, batch_sizes=(min(batch, 2) if quick else batch,),
                sequence_length=length, warmup=2, repeats=options.repeats or (3 if quick else REPEATS[name, batch]),
            )  # fmt: skip
    for row in rows:
        method = row["method"].removesuffix(COMPILED)
        if method in answers:
            row["deviation"] = float((answers[method] - answers[FP32]).abs().max())
            row["kernel"] = kernel_of(models[method]) if isinstance(models[method], torch.nn.Module) else None
    about = {"question": "encoder", "model": name, "threads": threads}
    return rows + [{**about, "method": method, "not_run": why} for method, why in missing.items()]


def decoders(model: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    """GPT-2s of this process; those of ONNX Runtime and OpenVINO are in ``export_speed.py``."""
    models = {name: packed(model, OURS[name]) for name in (W8A8, BY_TOKEN, "lmcompress W4A8", "lmcompress W2A8")}
    models[BY_TOKEN + BF16_REST] = copy.deepcopy(models[BY_TOKEN]).bfloat16()
    eager = {FP32: model, BF16: copy.deepcopy(model).bfloat16()} | models
    makers: dict[str, Callable[[], Any]] = {name: partial(_itself, each) for name, each in eager.items()}
    makers["torch dynamic int8"] = partial(peers.torch_dynamic, model, folder)
    makers["bitsandbytes NF4"] = partial(peers.bitsandbytes_nf4, model, folder)
    return makers


def decoding(threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens a second of greedy generation."""
    model, new = gpt2(options.quick), 4 if options.quick else NEW_TOKENS
    prompt = torch.zeros(1, PROMPT, dtype=torch.long)

    def generates(peer: Any) -> None:
        peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False, pad_token_id=0)

    about = {"question": "decoding", "model": "GPT-2 small", "prompt": PROMPT, "new_tokens": new}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        models, missing = made(decoders(model, Path(scratch)), generates)
        for batch in DECODED:
            rows += timed_rows(
                about, models, threads=threads, batch_sizes=(batch,), sequence_length=PROMPT, mode="generate",
                new_tokens=new, warmup=1, repeats=options.repeats or (3 if options.quick else 9),
            )  # fmt: skip
    for row in rows:
        row["tokens_per_second"] = 1000 * new * row["batch"] / row["cpu_ms" if row["clock"] == "cpu" else "ms"]
    return rows + [{**about, "threads": threads, "method": peer, "not_run": why} for peer, why in missing.items()]


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


def held_bytes(folder: Path, way: kernels.Memory, threads: int) -> int:
    """What a process holds more after loading a model and running it twice than before."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    ids = torch.zeros(1, 32, dtype=torch.long)
    # what libraries take when they are first used is not the model's
    warm = gpt2(quick=True)
    for model in (warm, packed(warm, OURS[W8A8])):
        _answer(model, ids)
    del model, warm
    before = _resident()
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with kernels.using(memory=way):
        for _ in range(2):
            _answer(loaded, ids)
    return _resident() - before


@torch.inference_mode()
def _answer(model: Any, ids: Tensor) -> None:
    model(input_ids=ids)


def _resident() -> int:
    gc.collect()
    # what was freed and not given back would count
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def main() -> None:
    """Command line."""
    questions = ("encoders", "decoding", "memory")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", choices=questions, default=questions)
    parser.add_argument("--models", nargs="+", choices=BERTS, default=list(BERTS), help="of the encoders")
    parser.add_argument("--batches", nargs="+", type=int, choices=BATCHES, default=BATCHES, help="of the encoders")
    parser.add_argument("--methods", default="", help="only encoders whose names contain this, beside fp32")
    parser.add_argument("--repeats", type=int, help="rounds of every question; default: more for shorter calls")
    parser.add_argument("--quick", action="store_true", help="a layer of 64 for each model, few rows and rounds")
    add_threads(parser)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    for threads in options.threads[:1] if options.quick else options.threads:
        torch.set_num_threads(threads)
        if "encoders" in options.questions:
            for name in options.models[:1] if options.quick else options.models:
                rows += encoders(name, threads, options)
        if "decoding" in options.questions:
            rows += decoding(threads, options)
    if "memory" in options.questions:
        rows += memory(options.quick)
    wanted = quant_asked.verdicts(rows)
    for line in rows + wanted:
        print(line)
    setting = {
        "shapes": BERTS, "kernels": kernels.ladder("cpu"), "peers": peers.versions(),
        "ours": {name: config.model_dump(mode="json") for name, config in OURS.items()},
    }  # fmt: skip
    print(write("quant_speed", rows, wanted, quick=options.quick, setting=setting))


if __name__ == "__main__":
    main()
