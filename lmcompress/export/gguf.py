"""Export as a GGUF file, which llama.cpp reads: stock shapes of Llama, Qwen2 and Qwen3, with the model's own codes.

The file is written with the package gguf, read back tensor by tensor, and loaded by Transformers' own reader, whose
outputs are compared with the model's. llama.cpp itself is not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.checkpoint.encoding import packed_modules
from lmcompress.checkpoint.layers import layers_of
from lmcompress.checkpoint.saving import (
    Batch,
    Equivalence,
    compared,
    outputs_of,
    random_batches,
    replaced_folder,
    tolerance_of,
)
from lmcompress.checkpoint.structure import recorded_structure, why_not_vanilla
from lmcompress.errors import EquivalenceError, LmcompressError
from lmcompress.export.compressed_tensors import stock_copy, without_activations
from lmcompress.export.config import ExportConfig
from lmcompress.export.folder import RECORD, write_config, write_record, write_tokenizer
from lmcompress.export.gguf_blocks import BLOCK, Blocks, blocks_of
from lmcompress.export.gguf_tokenizer import add_tokenizer
from lmcompress.export.optional import library
from lmcompress.families import name_of
from lmcompress.kernels.dispatch import using

EXTRA: Final = "gguf"
FILE: Final = "model.gguf"

ARCHITECTURES: Final = ("llama", "qwen2", "qwen3")
"""Model types that are written, which llama.cpp calls by the same names."""

_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class GGUFReport:
    """What was exported.

    Attributes:
        path: the folder.
        bytes: bytes of ``model.gguf``.
        equivalence: measured differences between the model and what Transformers loads from the file.
        kinds: number of tensors by their GGUF type.
        notes: what is stored otherwise than in the model, one sentence each.
    """

    path: Path
    bytes: int
    equivalence: Equivalence
    kinds: Mapping[str, int]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON types, without the path."""
        return {"to": EXTRA, "bytes": self.bytes, "kinds": dict(self.kinds), "notes": list(self.notes)} | {
            "equivalence": vars(self.equivalence)
        }

    def __rich__(self) -> Table:
        """The report as a table."""
        checked = self.equivalence
        table = Table("", "", title=f"{self.path / FILE}", show_header=False)
        table.add_row("tensors", ", ".join(f"{count} {kind}" for kind, count in self.kinds.items()))
        table.add_row("size", f"{self.bytes / 1e6:.2f} MB")
        table.add_row("max difference of outputs", f"{checked.max_error:.3g} ({checked.relative_error:.2g} relative)")
        return table


@dataclass(frozen=True)
class _Stored:
    """A tensor as it is written: its GGUF type, the bytes, and the values they stand for."""

    kind: str
    data: Any
    values: Any


def export_gguf(
    model: PreTrainedModel,
    path: str | Path,
    config: ExportConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batches: Sequence[Batch] | None = None,
) -> GGUFReport:
    """Write a model as ``model.gguf``, once the file has been read back with equal outputs.

    Packed matrices keep their codes: 8 bits as Q8_0, 4 and fewer as Q4_0, with zero points as Q4_1. What is dense stays
    so, in the type of its own. With ``weights`` other than ``auto``, every matrix is stored in that type instead,
    rounded by the package gguf where it is not of it.

    Args:
        model: packed or dense, of a stock shape.
        path: the folder; replaced as a whole once everything has been checked.
        config: ``weights``, ``activations`` (``none`` where the model quantizes inputs) and ``tolerance``: the
            difference from the model's outputs that is allowed, by default 1e-2, since scales are rounded to half
            precision, and any if ``weights`` converts them.
        tokenizer: byte-level BPE is written into the file; saved beside it in any case.
        batches: inputs to compare on; default: two batches of random token ids.

    Returns:
        Size, measured differences, and notes.

    Raises:
        LmcompressError: If llama.cpp has no such model or block, or the package gguf is not installed; nothing is
            written.
        EquivalenceError: If the file holds other numbers, Transformers computes something else with them, or their
            rounding changes outputs by more than the tolerance; nothing is written.
    """
    config = ExportConfig(to=EXTRA) if config is None else config
    refuse_unknown(model, activations=config.activations)
    gguf = library("gguf", extra=EXTRA)
    stated = without_activations(model) if config.activations == "none" else model
    inputs, batches = ("random", random_batches(model)) if batches is None else ("given", list(batches))
    dense = stock_copy(stated)
    tensors, notes = _tensors(gguf, stated, dense, config.weights)
    tolerance = config.tolerance or (1e-2 if config.weights == "auto" else float("inf"))
    with replaced_folder(Path(path), marker=RECORD) as temporary:
        notes += _write(gguf, temporary / FILE, dense, tensors, tokenizer)
        _refuse_other_numbers(gguf, temporary / FILE, tensors)
        loaded = type(dense).from_pretrained(temporary, gguf_file=FILE, dtype=dense.dtype).to(dense.device)
        after = outputs_of(loaded, batches)
        # the file against the numbers it holds, then these against the model
        compared(after, outputs_of(dense, batches), max(1e-4, tolerance_of(dense.dtype)), inputs, EXTRA)
        with using(kernel="reference"):
            before = outputs_of(stated, batches)
        measured = compared(after, before, tolerance, inputs, EXTRA)
        write_config(dense, temporary)
        write_tokenizer(tokenizer, temporary)
        kinds = [stored.kind for stored in tensors.values()]
        counts = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
        report = GGUFReport(Path(path), (temporary / FILE).stat().st_size, measured, counts, tuple(notes))
        (temporary / "README.md").write_text(_card(type(model).__name__, report), encoding="utf-8")
        write_record(report.as_dict(), temporary)
    return report


def refuse_unknown(model: PreTrainedModel, *, activations: str = "auto") -> None:
    """Refuse a model that llama.cpp has no place for.

    Args:
        model: the model.
        activations: as for :func:`export_gguf`.

    Raises:
        LmcompressError: If it is of another family or class, has other shapes than a stock one, scaled rotary
            positions, biases that the format lacks, or quantized inputs that are to be kept.
    """
    config: Any = model.config
    if config.model_type not in ARCHITECTURES or not type(model).__name__.endswith("ForCausalLM"):
        raise LmcompressError(
            f"gguf is written for causal models of {', '.join(ARCHITECTURES)}, got {type(model).__name__}: export to "
            "onnx or openvino instead"
        )
    obstacle = why_not_vanilla(recorded_structure(model), config)
    if layers_of(model):
        obstacle = "a stock model has full matrices, and every block its own"
    if obstacle:
        raise LmcompressError(f"gguf has stock shapes: {obstacle}. Prune with uniform: true, or export to onnx instead")
    if (rope := _rope(config).get("rope_type", "default")) != "default":
        raise LmcompressError(f"gguf is written for plain rotary positions, got rope_type {rope!r}")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", False):
        raise LmcompressError("gguf is written for full attention, this model has a sliding window")
    if config.model_type != "qwen2" and getattr(config, "attention_bias", False):
        raise LmcompressError(
            f"gguf is written for {config.model_type} without biases of attention, this model has them"
        )
    if getattr(config, "mlp_bias", False):
        raise LmcompressError("gguf is written for feed-forward networks without biases, this model has them")
    quantized = [path for path, module in packed_modules(model) if module.inputs is not None]
    if quantized and activations != "none":
        raise LmcompressError(
            f"gguf quantizes no activations, and the input of {quantized[0]} is quantized; activations='none' exports "
            "the weights alone"
        )


def _tensors(
    gguf: Any, model: PreTrainedModel, dense: PreTrainedModel, weights: str
) -> tuple[dict[str, _Stored], list[str]]:
    """All tensors by their names in the file, whose values the dense model has then, and notes on what was rounded."""
    names = gguf.get_tensor_name_map(_architecture(gguf, dense), dense.config.num_hidden_layers)
    codes = {f"{name_of(model, module)}.weight": (path, module) for path, module in packed_modules(model)}
    found, rounded, inexact = {}, [], 0
    # a tied head is no parameter of its own: llama.cpp takes the token embeddings where there is none
    for name, parameter in list(dense.named_parameters()):
        tensor = parameter.detach().cpu()
        base, _, suffix = name.rpartition(".")
        mapped = names.get_name(base)
        if mapped is None:
            raise LmcompressError(f"gguf has no name for the tensor {name} of {dense.config.model_type}")
        rows = _order(dense, name, tensor)
        if name in codes and weights == "auto":
            blocks = blocks_of(*codes[name])
            inexact += not blocks.exact
            stored = _in_order(blocks, rows)
        else:
            kind = "F32" if tensor.dim() == 1 else _DENSE[tensor.dtype] if weights == "auto" else weights.upper()
            stored = _converted(gguf, name, tensor if rows is None else tensor[rows], kind)
            if kind not in ("F32", _DENSE[tensor.dtype]):
                rounded.append(name)
        values = torch.from_numpy(np.ascontiguousarray(stored.values)).to(tensor.dtype)
        with torch.no_grad():
            dense.get_parameter(name)[slice(None) if rows is None else rows] = values.to(dense.device)
        found[f"{mapped}.{suffix}"] = stored
    notes = []
    if inexact:
        notes.append(
            f"The codes of {inexact} matrices are the model's own, their scales are rounded to half precision."
        )
    if rounded:
        notes.append(
            f"{len(rounded)} matrices were rounded to {weights.upper()} by the package gguf, such as {rounded[0]}."
        )
    return found, notes


def _order(dense: PreTrainedModel, name: str, tensor: Tensor) -> Tensor | None:
    """The order of a projection's rows in the file: llama.cpp rotates neighbouring dimensions of Llama's heads."""
    if dense.config.model_type != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return None
    keys = name.endswith("k_proj.weight")
    heads = dense.config.num_key_value_heads if keys else dense.config.num_attention_heads
    return torch.arange(len(tensor)).view(heads, 2, -1).transpose(1, 2).flatten()


def _in_order(blocks: Blocks, rows: Tensor | None) -> _Stored:
    data, values = (t if rows is None else t[rows] for t in (blocks.data, blocks.values))
    return _Stored(blocks.kind, data.numpy(), values.numpy())


def _converted(gguf: Any, name: str, tensor: Tensor, kind: str) -> _Stored:
    if kind.startswith("Q") and tensor.shape[-1] % BLOCK:
        raise LmcompressError(
            f"{kind} has blocks of {BLOCK} neighbours, and rows of {name} have {tensor.shape[-1]}: take weights='f16'"
        )
    qtype = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(np.ascontiguousarray(tensor.float().numpy()), qtype)
    return _Stored(kind, data, gguf.quants.dequantize(data, qtype))


def _write(
    gguf: Any,
    file: Path,
    dense: PreTrainedModel,
    tensors: Mapping[str, _Stored],
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[str]:
    config: Any = dense.config
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_name(type(dense).__name__)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(_rope(config)["rope_theta"]))
    size = recorded_structure(dense).head_size
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config.vocab_size)
    notes = add_tokenizer(gguf, writer, tokenizer, config)
    for name, stored in tensors.items():
        plain = stored.kind in ("F32", "F16")
        writer.add_tensor(name, stored.data, raw_dtype=None if plain else gguf.GGMLQuantizationType[stored.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes


def _refuse_other_numbers(gguf: Any, file: Path, tensors: Mapping[str, _Stored]) -> None:
    """Read the file, and compare every tensor bit by bit with what was to be written."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, stored in tensors.items():
        values = gguf.quants.dequantize(found[name].data, found[name].tensor_type) if name in found else None
        if values is None or not np.array_equal(values.reshape(stored.values.shape), stored.values):
            raise EquivalenceError(f"{name} read from the GGUF file is not what was written; nothing was exported")


def _architecture(gguf: Any, model: PreTrainedModel) -> Any:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == model.config.model_type)


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _card(architecture: str, report: GGUFReport) -> str:
    """The README of the folder."""
    lines = "\n".join(f"* {note}" for note in report.notes)
    return f"""---
tags: [lmcompress, gguf]
---

# {architecture} as GGUF

Compressed and exported by lmcompress. For llama.cpp (`llama-cli -m {FILE}`), and for Transformers with the
package gguf:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", gguf_file="{FILE}")
```

Read by Transformers, its outputs differ from those of the model by at most {report.equivalence.relative_error:.1e} of
the largest output ({report.equivalence.batches} batches, {report.equivalence.inputs} inputs). llama.cpp was not run.

{lines}
"""
