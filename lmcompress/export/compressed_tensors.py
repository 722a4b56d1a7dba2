"""Export as a stock checkpoint of the compressed-tensors format, which Transformers and vLLM read without lmcompress.

What is written is a stock config, with a ``quantization_config`` of the method ``compressed-tensors``, and one
``model.safetensors`` (:mod:`lmcompress.export.pack_quantized`). The package compressed-tensors is needed for the check
that precedes the rename, not for writing. Transformers computes with the dequantized weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcompress.checkpoint.encoding import encoding_of, packed_modules, unpack
from lmcompress.checkpoint.layers import layers_of
from lmcompress.checkpoint.saving import (
    Batch,
    Equivalence,
    check_round_trip,
    outputs_of,
    random_batches,
    replaced_folder,
)
from lmcompress.checkpoint.structure import recorded_structure, set_stock_shapes, why_not_vanilla
from lmcompress.errors import LmcompressError
from lmcompress.export.config import ExportConfig
from lmcompress.export.folder import RECORD, write_record
from lmcompress.export.optional import library
from lmcompress.export.pack_quantized import Entry, entry_of, why_not_expressible
from lmcompress.families import name_of
from lmcompress.kernels.dispatch import using
from lmcompress.nn.packed import Packed, PackedConv1D, PackedEmbedding, TiedHead
from lmcompress.nn.quantized_attention import release_attention
from lmcompress.numerics.inputs import InputEncoding

EXTRA: Final = "compressed-tensors"

_INSTEAD = 'activations="none" exports the weights alone'


@dataclass(frozen=True)
class CompressedTensorsReport:
    """What was exported.

    Attributes:
        path: the folder.
        bytes: bytes of ``model.safetensors``.
        equivalence: measured differences between the packed model and what Transformers loads.
        matrices: number of matrices stored as codes.
        notes: what is stored otherwise than in the packed model, one sentence each.
    """

    path: Path
    bytes: int
    equivalence: Equivalence
    matrices: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON types, without the path."""
        return {"to": EXTRA, "bytes": self.bytes, "matrices": self.matrices, "notes": list(self.notes)} | {
            "equivalence": vars(self.equivalence)
        }

    def __rich__(self) -> Table:
        """The report as a table."""
        checked = self.equivalence
        table = Table("", "", title=f"{self.path}", show_header=False)
        table.add_row("format", EXTRA)
        table.add_row("size", f"{self.bytes / 1e6:.2f} MB")
        table.add_row("matrices stored as codes", f"{self.matrices}")
        table.add_row(
            "max difference of outputs",
            f"{checked.max_error:.3g} ({checked.relative_error:.2g} of the largest) on {checked.batches} "
            f"{checked.inputs} batches",
        )
        return table


def export_compressed_tensors(
    model: PreTrainedModel,
    path: str | Path,
    config: ExportConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batches: Sequence[Batch] | None = None,
) -> CompressedTensorsReport:
    """Write a packed model in the compressed-tensors format, once Transformers has loaded it with equal outputs.

    Args:
        model: a packed model whose shapes are expressible in a stock config.
        path: the folder; replaced as a whole once everything has been checked.
        config: ``activations``: ``auto`` quantizes activations as the model does, and refuses what the format lacks;
            ``none`` exports the weights alone. ``tolerance``: default 1e-5, and 2e-2 with quantized activations, where
            sums in another order may take a number to the next code.
        tokenizer: saved beside the model.
        batches: inputs to compare on; default: two batches of random token ids.

    Returns:
        Size, measured differences, and notes.

    Raises:
        LmcompressError: If the model is not packed, the format or a stock config lacks something of it, or the package
            compressed-tensors is not installed; nothing is written.
        EquivalenceError: If Transformers computes other outputs; nothing is written.
    """
    config = ExportConfig(to=EXTRA) if config is None else config
    activations, tolerance = config.activations, config.tolerance
    refuse_inexpressible(model, activations=activations)
    library("compressed_tensors", extra=EXTRA)
    stated = without_activations(model) if activations == "none" else model
    inputs, batches = ("random", random_batches(model)) if batches is None else ("given", list(batches))
    _refuse_vectors(stated, batches)
    entries = {
        name_of(stated, module): entry_of(module, inputs=module.inputs)
        for _, module in packed_modules(stated)
        if _stored_as_codes(module)
    }
    dense = stock_copy(stated)
    if tolerance is None:
        tolerance = 2e-2 if any("input_activations" in entry.scheme for entry in entries.values()) else 1e-5
    with replaced_folder(Path(path), marker=RECORD) as temporary:
        _write(dense, entries, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        # the kernel that computes as Transformers does
        with using(kernel="reference"):
            before = outputs_of(stated, batches)
        with _loading(entries):
            measured = check_round_trip(
                dense, temporary, batches, before, tolerance=tolerance, inputs=inputs, format=EXTRA
            )
        notes = _notes(stated, entries, activations)
        card = _card(type(model).__name__, measured, notes)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        size = (temporary / "model.safetensors").stat().st_size
        report = CompressedTensorsReport(Path(path), size, measured, len(entries), notes)
        write_record(report.as_dict(), temporary)
    return report


def refuse_inexpressible(model: PreTrainedModel, *, activations: str = "auto") -> None:
    """Refuse a model not expressible in a stock checkpoint of the compressed-tensors format.

    Args:
        model: the model.
        activations: as for :func:`export_compressed_tensors`.

    Raises:
        LmcompressError: If it is not expressible; the message names what would work.
    """
    if activations not in ("auto", "none"):
        raise LmcompressError(
            f"activations must be auto or none for compressed-tensors, got {activations!r}: the format has the ranges "
            "of the model, or none; nothing is calibrated on the way"
        )
    packed = [(path, module) for path, module in packed_modules(model) if _stored_as_codes(module)]
    if not packed:
        raise LmcompressError(
            "compressed-tensors needs a model with packed matrices, got none; run lmcompress quantize first, or save "
            "it with format='vanilla'"
        )
    obstacle = why_not_vanilla(recorded_structure(model), model.config)
    if layers_of(model):
        obstacle = "a stock checkpoint has full matrices, and every block its own"
    if obstacle:
        raise LmcompressError(
            f"compressed-tensors has the shapes of stock configs: {obstacle}. Export to onnx or openvino instead, "
            "which hold every structure"
        )
    conv = [path for path, module in packed if isinstance(module, PackedConv1D)]
    if conv:
        raise LmcompressError(
            f"compressed-tensors knows nn.Linear and nn.Embedding, not the Conv1D of {model.config.model_type}, such "
            f"as {conv[0]}: loaded, its codes would stay unread. Export to onnx or openvino instead"
        )
    if activations == "none":
        return
    encoding = encoding_of(model)
    if encoding is not None and encoding.attention is not None:
        raise LmcompressError(
            f"compressed-tensors quantizes no queries, keys, values and probabilities, this model does; {_INSTEAD}, "
            "and quantize with attention=False keeps the other activations"
        )
    for path, module in packed_modules(model):
        _refuse_inputs(path, module.inputs, vectors=False)
        if module.inputs is not None and not _stored_as_codes(module):
            raise LmcompressError(
                f"{path} is tied to a head whose input is quantized, and compressed-tensors stores tied matrices "
                f"densely; {_INSTEAD}"
            )


def _refuse_inputs(path: str, inputs: InputEncoding | None, *, vectors: bool) -> None:
    reason = None if inputs is None else why_not_expressible(inputs, vectors=vectors)
    if reason:
        raise LmcompressError(
            f"compressed-tensors cannot express how the input of {path} is quantized: {reason}. {_INSTEAD}; "
            "exact are static ranges with symmetric=False, learned ones, and dynamic ones by token with symmetric=False"
        )


def _refuse_vectors(model: PreTrainedModel, batches: Sequence[Batch]) -> None:
    """Refuse dynamic ranges of inputs that have no axis of tokens, which a forward pass shows."""
    dynamic = {
        path: module
        for path, module in packed_modules(model)
        if module.inputs is not None and module.inputs.range == "dynamic" and not isinstance(module, PackedEmbedding)
    }
    with _dimensions(dynamic) as dimensions:
        if dynamic:
            outputs_of(model, batches[:1])
    for path, count in dimensions.items():
        _refuse_inputs(path, dynamic[path].inputs, vectors=count == 2)


@contextmanager
def _dimensions(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Number of axes of each module's input, seen while the block runs."""
    found: dict[str, int] = {}

    def seen(path: str) -> Any:
        return lambda _, args: found.update({path: args[0].dim()})

    handles = [module.register_forward_pre_hook(seen(path)) for path, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _stored_as_codes(module: Packed) -> bool:
    """Whether a matrix is stored as codes: embeddings are not, see :func:`_notes`."""
    return not isinstance(module, PackedEmbedding)


def without_activations(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that quantizes nothing but its weights.

    Args:
        model: unchanged.
    """
    model = copy.deepcopy(model)
    release_attention(model)
    for _, module in packed_modules(model):
        module.inputs = module.input_scale = module.input_zero_point = None
        module.forget()
    return model


def stock_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A dense copy with a stock config.

    Args:
        model: unchanged.
    """
    dense = unpack(copy.deepcopy(model))
    set_stock_shapes(dense.config, recorded_structure(dense))
    # what a config without codes still records, such as the numbers of the layers that were kept
    if hasattr(dense.config, "quantization_config"):
        del dense.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        dense.__dict__.pop(name, None)
    return dense


@contextmanager
def _loading(entries: Mapping[str, Entry]) -> Iterator[None]:
    """Explain the one error that the package is known to make on a right checkpoint."""
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error) or not any(map(_has_packed_zero_points, entries.values())):
            raise
        raise LmcompressError(
            "compressed-tensors from 0.18 on cannot load packed zero points with Transformers 5 (it expects them "
            "unpacked), and 4-bit weights with zero points have no other form; nothing was written. Quantize to 4 bits "
            'without zero points, to 8 bits, or `pip install "compressed-tensors<0.18"`, here and where it is loaded'
        ) from error


def _has_packed_zero_points(entry: Entry) -> bool:
    return "weight_packed" in entry.tensors and "weight_zero_point" in entry.tensors


def _write(dense: PreTrainedModel, entries: Mapping[str, Entry], folder: Path) -> None:
    """A stock checkpoint of the dense model, and the codes in place of its weights."""
    dense.save_pretrained(folder, max_shard_size="1000GB")
    file = folder / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    for name, entry in entries.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{own}": tensor for own, tensor in entry.tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(dense, entries)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def quantization_config(dense: PreTrainedModel, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The format's description of a model, as it is in ``config.json``.

    Args:
        dense: the stock model.
        entries: the matrices stored as codes, by the name of their module.
    """
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for name, entry in entries.items():
        known = next((names for scheme, names in groups if scheme == entry.scheme), None)
        if known is None:
            groups.append((entry.scheme, [name]))
        else:
            known.append(name)
    others = [name for name, module in dense.named_modules() if isinstance(module, nn.Linear) and name not in entries]
    # one scheme for all is what other programs read most readily; names else, with and without a head's prefix
    prefix = f"{dense.base_model_prefix}."
    described = {
        f"group_{number}": scheme
        | {
            "targets": ["Linear"]
            if len(groups) == 1
            else [f"re:^({_escaped(prefix)})?{_escaped(name.removeprefix(prefix))}$" for name in names]
        }
        for number, (scheme, names) in enumerate(groups)
    }
    formats = {scheme["format"] for scheme, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": described,
        "ignore": others,
    }


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _notes(model: PreTrainedModel, entries: Mapping[str, Entry], activations: str) -> tuple[str, ...]:
    """What is stored otherwise than in the packed model."""
    notes = []
    tables = [path for path, module in packed_modules(model) if not _stored_as_codes(module)]
    if tables:
        tied = any(isinstance(module, TiedHead) for module in model.modules())
        notes.append(
            f"{', '.join(tables)}: stored as dense float32 of the same values, since Transformers cannot load codes of "
            f"embeddings in this format{'; the head is tied to it' if tied else ''}."
        )
    wider = [path for path, module in packed_modules(model) if module.layout.container in (1, 2, 3, "base3")]
    wider = [path for path in wider if path not in tables]
    if wider:
        notes.append(
            f"{len(wider)} matrices of fewer than 4 bits are stored in 4 bits, such as {wider[0]}: the layout of fewer "
            "differs between versions of the package."
        )
    if any(map(_has_packed_zero_points, entries.values())):
        notes.append(
            "Zero points of 4-bit weights: Transformers 5 loads them with compressed-tensors 0.15 to 0.17 only."
        )
    if activations == "none":
        notes.append("Activations are not quantized.")
    return tuple(notes)


def _card(architecture: str, measured: Equivalence, notes: Sequence[str]) -> str:
    """The README of the folder."""
    lines = "\n".join(f"* {note}" for note in notes)
    return f"""---
library_name: transformers
tags: [lmcompress, compressed-tensors]
---

# {architecture} in the compressed-tensors format

Compressed and exported by lmcompress; needs `pip install transformers compressed-tensors` and nothing of lmcompress:

```python
from transformers import {architecture}

model = {architecture}.from_pretrained("path/to/this/folder")
```

Loaded through Transformers, its outputs differ from those of the packed model by at most {measured.relative_error:.1e}
of the largest output ({measured.batches} batches, {measured.inputs} inputs). Transformers computes with the dequantized
weights: the file is small, the memory in use is that of the dense model. vLLM reads the format; it was not run.

{lines}
"""
