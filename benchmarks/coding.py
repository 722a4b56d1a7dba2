"""How small do entropy-coded checkpoints get, and how fast are they decoded?

BERT of BERT-base's shape with random normal weights (how they are distributed is all that counts here): weights and
embeddings ternary by TWN's rule, W2-E2-A8, as in TernaryBERT, whose paper counts 28 MB; and rounded to 4 and to 8 bits.
Each is packed, saved as it is and as streams, and loaded again.

* Bits: of the file over all its numbers, and of packed matrices over their weights; beside the zero-order entropy.
* Speed: one thread decodes all streams of the packed matrices; bytes of decoded float32 per second of CPU time. All
  coders take turns in rounds of random order, ours twice in each: its ratio to itself says how busy the machine was.
* Memory: the greatest sum of tensors while loading, over that of the loaded model.
* Others, on the bytes of the same tensors: zstd level 19, rANS of constriction on unpacked codes, ZipNN where it is
  installed.

    python benchmarks/coding.py
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from common import asked, write
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, BertModel, set_seed
from transformers.utils import logging

from lmcompress import CompressedModel
from lmcompress.checkpoint.encoding import packed_modules
from lmcompress.entropy_coding import decode, describe, encode
from lmcompress.evaluation import size_on_disk, take_turns, timed
from lmcompress.evaluation.timing import is_one
from lmcompress.nn.packed import Packed
from lmcompress.numerics.packing import unpack
from lmcompress.quantization import QuantizationConfig, Rule, WeightScheme, quantize

QUICK = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, vocab_size=500)
SCHEMES: dict[str, tuple[str, Any]] = {"ternary": ("twn", "ternary"), "4 bits": ("mse", 4), "8 bits": ("minmax", 8)}
# of the whole file in MB, of a ternary weight in bits, over the entropy in per cent, of float32 in GB a second
ASKED_MB, ASKED_BITS, ASKED_OVER, ASKED_SPEED = 28.0, 1.6, 1.0, 1.0
REPEATS = 9


Decoder = tuple[dict[str, Any], Callable[[], Any]]
"""A row with the bytes that a coder needs, and what decodes them."""


def others(modules: list[Packed]) -> tuple[list[Decoder], list[dict[str, Any]]]:
    """Other coders on the same codes, and rows of those that cannot be run."""
    found: list[Decoder] = []
    missing: list[dict[str, Any]] = []
    blobs = [module.weight.numpy().tobytes() for module in modules]
    coded = [zstandard.ZstdCompressor(level=19).compress(blob) for blob in blobs]
    row = {"coder": "zstd level 19 of packed codes", "bytes": sum(map(len, coded))}
    found.append((row, lambda: [zstandard.ZstdDecompressor().decompress(blob) for blob in coded]))
    try:
        found.append(_constriction(modules))
    except ImportError:
        missing.append({"coder": "rANS of single codes (constriction)", "not_run": "not installed"})
    try:
        found.append(_zipnn(blobs))
    except ImportError:
        missing.append({"coder": "ZipNN of packed codes", "not_run": "not installed"})
    except Exception as error:
        missing.append({"coder": "ZipNN of packed codes", "not_run": f"{type(error).__name__}: {error}"})
    return found, missing


def _constriction(modules: list[Packed]) -> Decoder:
    constriction: Any = importlib.import_module("constriction")
    words = []
    for module in modules:
        layout = module.layout
        codes = unpack(module.weight, module.shape, layout.grid, layout.container).flatten().numpy()
        symbols = ((codes.astype(np.int32) - layout.grid.low) // layout.grid.stride).astype(np.int32)
        counts = np.bincount(symbols)
        model = constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(symbols, model)
        words.append((coder.get_compressed(), model, len(symbols)))
    row = {"coder": "rANS of single codes (constriction)", "bytes": sum(4 * len(w) for w, _, _ in words)}
    return row, lambda: [constriction.stream.stack.AnsCoder(w).decode(model, n) for w, model, n in words]


def _zipnn(blobs: list[bytes]) -> Decoder:
    zipnn: Any = importlib.import_module("zipnn").ZipNN(method="auto", bytearray_dtype="float32")
    coded = [zipnn.compress(blob) for blob in blobs]
    row = {"coder": "ZipNN of packed codes", "bytes": sum(map(len, coded))}
    return row, lambda: [zipnn.decompress(blob) for blob in coded]


def decoded(decoders: list[Decoder], dense_bytes: int, repeats: int) -> list[dict[str, Any]]:
    """Rows with bytes of float32 per second of CPU time, all coders in rounds, the first of them twice."""
    calls = {row["coder"]: timed(call) for row, call in decoders}
    turns = take_turns(calls, repeats=repeats, warmup=1)
    itself = turns.itself("cpu")
    rows = []
    for row, _ in decoders:
        lower, median, upper = (1000 * dense_bytes / ms / 1e9 for ms in turns.milliseconds(row["coder"], "cpu"))
        speed = {"gb_per_second": median, "gb_per_second_quartiles": [upper, lower]}
        rows.append(row | speed | {"wall_ms": turns.milliseconds(row["coder"], "wall").median})
    rows[0] |= {"itself": itself, "busy": not is_one(itself)}
    return rows


def measure(name: str, quick: bool) -> list[dict[str, Any]]:
    """One scheme: files, bits, speed, memory, and what others make of it."""
    set_seed(0)
    model = BertModel(BertConfig(**(QUICK if quick else {})))
    quantizer, bits = SCHEMES[name]
    weights = WeightScheme(quantizer=quantizer, bits=bits, granularity="row")
    # the pooler as well, as TernaryBERT counts it
    rules = (Rule(modules="pooler.dense", weights=weights),)
    quantize(model, QuantizationConfig(weights=weights, embeddings=weights, rules=rules), method="rtn", progress=False)
    modules = [module for _, module in packed_modules(model)]
    count = sum(module.shape[0] * module.shape[1] for module in modules)
    repeats = 3 if quick else REPEATS
    with tempfile.TemporaryDirectory() as scratch:
        sizes = {}
        for storage in ("plain", "auto", "zstd", "huffman"):
            folder = Path(scratch) / storage
            measured = CompressedModel(model).save_pretrained(folder, storage=storage)
            sizes[storage] = size_on_disk(folder).weights_bytes
        loaded = AutoModel.from_pretrained(Path(scratch) / "auto").state_dict()
        same = all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())
        stored = load_file(Path(scratch) / "auto" / "model.safetensors")
    decoded_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    # each stream is given up once its tensor is there
    held = most = sum(tensor.nbytes for tensor in stored.values())
    final = {key.removeprefix("bert."): value for key, value in model.state_dict().items()}
    for key, tensor in stored.items():
        held += final[key.removeprefix("bert.")].nbytes
        most = max(most, held)
        held -= tensor.nbytes
    streams = [encode(module.weight) for module in modules]
    told = [describe(stream) for stream in streams]
    shannon = sum(one.shannon_bits for one in told)
    size = sum(map(len, streams))
    ours = {
        "coder": "lmcompress", "weights": count, "file_bytes": sizes, "equal": same,
        "reload_error": measured.max_error, "bytes": size, "over_shannon": 100 * (8 * size / shannon - 1),
        "greatest_memory_over_model": most / decoded_bytes,
    }  # fmt: skip
    found, missing = others(modules)
    mine: Decoder = (ours, lambda: [decode(stream) for stream in streams])
    rows = decoded([mine, *found], 4 * count, repeats)
    for row in rows:
        row["bits_per_weight"] = 8 * row["bytes"] / count
    return [{"scheme": name, **row} for row in [*rows, *missing]]


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requested against measured numbers."""
    ours = {row["scheme"]: row for row in rows if row["coder"] == "lmcompress"}
    ternary = ours["ternary"]
    size, bits = ternary["file_bytes"]["auto"] / 1e6, ternary["bits_per_weight"]
    wanted = [
        asked("BERT-base shape, W2-E2-A8: file, MB", f"<= {ASKED_MB:g}", size, size <= ASKED_MB),
        asked("the same: bits for a ternary weight", f"<= {ASKED_BITS}", bits, bits <= ASKED_BITS),
    ]
    for name, row in ours.items():
        over, speed, memory = row["over_shannon"], row["gb_per_second"], row["greatest_memory_over_model"]
        wanted.append(asked(f"{name}: stored over zero-order entropy, %", "<= 1", over, over <= ASKED_OVER))
        what, met = f"{name}: decoding, GB of float32 a second and core", speed >= ASKED_SPEED
        wanted.append(asked(what, f">= {ASKED_SPEED:g}", speed, met, busy=row["busy"]))
        wanted.append(asked(f"{name}: greatest memory while loading over the model", "reported", memory, True))
    wanted.append(asked("loaded tensors equal to the bit", "all", str(all(row["equal"] for row in ours.values())),
                        all(row["equal"] for row in ours.values())))  # fmt: skip
    return wanted


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that it runs")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = [row for name in SCHEMES for row in measure(name, options.quick)]
    wanted = verdicts(rows)
    peers: dict[str, str | None] = {}
    for name in ("zstandard", "constriction", "zipnn"):
        try:
            peers[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            peers[name] = None
    for row in rows:
        print(row)
    for item in wanted:
        print(item)
    print(write("coding", rows, wanted, quick=options.quick, setting={"repeats": REPEATS, "peers": peers}))


if __name__ == "__main__":
    main()
