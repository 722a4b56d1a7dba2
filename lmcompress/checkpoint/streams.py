"""Checkpoints whose tensors are entropy-coded streams: writing them, and decoding them while a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from lmcompress.checkpoint.guard import FIELD, NATIVE
from lmcompress.checkpoint.schema import Storage
from lmcompress.entropy_coding import Coder, decode, stream_shape, stream_tensor
from lmcompress.errors import CheckpointError, LmcompressError


def store_as_streams(folder: Path, coder: Coder) -> Storage:
    """Rewrite the weights of a checkpoint as streams where that saves bytes, and record it in its config.

    Tensors are read and coded one at a time, and each file is replaced once its new form is complete. Vectors stay as
    they are: norms and biases are small, and software without lmcompress must not find a stream of exactly the shape
    that it expects.

    Args:
        folder: a checkpoint with safetensors weights that nothing else is using yet.
        coder: one of :data:`lmcompress.entropy_coding.CODERS`.

    Returns:
        The new storage entry of the config.

    Raises:
        LmcompressError: If the coder is unknown or the checkpoint was not written by lmcompress.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    described = config.get("quantization_config")
    if not isinstance(described, dict):
        raise LmcompressError(f"{folder} must be a checkpoint of lmcompress to hold streams, its config has no entry")
    streams: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        with safe_open(str(file), framework="pt") as source:
            metadata = source.metadata()
            for name in source.keys():
                tensor = source.get_tensor(name)
                if tensor.dim() > 1 or tensor.dtype is torch.uint8:
                    stream = stream_tensor(tensor, coder)
                    if len(stream) < tensor.nbytes:
                        streams[name], tensor = len(stream), stream
                tensors[name] = tensor
        temporary = file.with_suffix(".streams")
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(file)
    _restate_size(folder)
    storage = Storage(coder=coder, streams=streams)
    config[FIELD] = NATIVE
    described["storage"] = storage.model_dump(mode="json", exclude_defaults=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    return storage


class Place(NamedTuple):
    """The destination of a tensor in a skeleton once its stream is decoded.

    Attributes:
        name: name in the model.
        shape: shape of the tensor.
        dtype: dtype in the model.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def open_streams(
    model: PreTrainedModel, storage: Storage, files: Iterable[Path] = (), fixed: Collection[str] = ()
) -> list[Place]:
    """Give a skeleton buffers for streams, which the ordinary loader fills.

    A stream of a head whose shape differs from the skeleton's gets no buffer, so that Transformers finds the mismatch
    and treats it as usual: an error, or a new head with ``ignore_mismatched_sizes``.

    Args:
        model: in its final shapes, on ``meta``; modified in place.
        storage: storage entry of a checkpoint's config.
        files: the safetensors files of the checkpoint.
        fixed: names of the tensors that no user may replace: all except those of a head.

    Returns:
        The places, for :func:`decode_streams`.

    Raises:
        CheckpointError: If a stream of a head is damaged.
    """
    # Transformers makes the bias of a tied head as long as the tied matrix, which is still a stream here
    model._adjust_bias = lambda *_: None
    prefix = model.base_model_prefix + "."
    # a checkpoint of a task model has its base under a prefix, one of a base model has none
    keys = {name: name_in_model(model, name).removeprefix(prefix) for name in storage.streams}
    lengths = {keys[name]: length for name, length in storage.streams.items()}
    heads = lengths.keys() - {name.removeprefix(prefix) for name in fixed}
    shapes = _stream_shapes(files, {name: key for name, key in keys.items() if key in heads})
    tied = set(model.all_tied_weights_keys)
    places = []
    for name, owner, own, tensor in list(_tensors(model)):
        key = name.removeprefix(prefix)
        length = lengths.get(key)
        if length is None or name in tied or shapes.get(key, tensor.shape) != tensor.shape:
            continue
        places.append(Place(name, tuple(tensor.shape), tensor.dtype))
        _put(owner, own, torch.empty(length, dtype=torch.uint8, device=tensor.device))
        if not owner._buffers and sum(one is not None for one in owner._parameters.values()) == 1:
            # Pegasus' table of positions is initialized by its shape, which a stream has not
            owner._is_hf_initialized = True  # type: ignore[assignment]
    return places


def name_in_model(model: PreTrainedModel, name: str) -> str:
    """The name in the model of a tensor that files have under an older name, such as GPT-NeoX's ``embed_out``.

    Args:
        model: the model or its skeleton.
        name: name in the files.
    """
    for transform in get_model_conversion_mapping(model, add_legacy=False):
        if isinstance(transform, WeightRenaming):
            name = transform.rename_source_key(name)[0]
    return name


def decode_streams(model: PreTrainedModel, places: list[Place]) -> None:
    """Replace streams by their tensors, one at a time, releasing each stream once it is decoded.

    Memory holds the tensors decoded so far, the remaining streams, and one tensor: less than the decoded model and one.

    Args:
        model: with its streams; modified in place.
        places: from :func:`open_streams`.

    Raises:
        CheckpointError: If a stream is damaged, or its tensor has another shape or type.
    """
    model.__dict__.pop("_adjust_bias", None)
    # a head tied to the embeddings received their stream as well
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, owner, own, tensor in _tensors(model):
        holders.setdefault(id(tensor), []).append((owner, own))
    for name, shape, dtype in places:
        module, _, own = name.rpartition(".")
        stream = getattr(model.get_submodule(module), own)
        tensor = decode(stream.data, name, shape=shape)
        if tensor.is_floating_point() != dtype.is_floating_point or not (
            tensor.is_floating_point() or tensor.dtype == dtype
        ):
            raise CheckpointError(
                f"tensor {name} is stored as {tensor.dtype}, its config says {dtype}: config.json and the weights do "
                "not belong together; fetch or copy both again"
            )
        tensor = tensor.to(device=stream.device, dtype=dtype)
        kept: Tensor | None = None
        for owner, slot in holders[id(stream)]:
            kept = _put(owner, slot, tensor if kept is None else kept)
        del stream


def _stream_shapes(files: Iterable[Path], keys: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the streams in files, by key, from names in the files to keys."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files if keys else ():
        # the loader, which reads all files, reports their damage
        with suppress(SafetensorError), safe_open(str(file), framework="pt") as source:
            for name in set(source.keys()).intersection(keys):
                stream = source.get_tensor(name)
                if stream.dtype is torch.uint8 and stream.dim() == 1:
                    shapes[keys[name]] = stream_shape(stream, name)
    return shapes


def _tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every slot of a model's state dict: full name, owner, name there, tensor; tied tensors once for each holder."""
    for path, module in model.named_modules():
        held = [*module._parameters.items(), *module._buffers.items()]
        for own, tensor in held:
            if tensor is not None and own not in module._non_persistent_buffers_set:
                yield (f"{path}.{own}" if path else own), module, own, tensor


def _put(owner: nn.Module, own: str, tensor: Tensor) -> Tensor:
    """Replace a tensor of a module by another of any shape; parameters stay parameters."""
    if own in owner._parameters:
        old = owner._parameters[own]
        if not isinstance(tensor, nn.Parameter):
            wants = bool(old is not None and old.requires_grad) or tensor.is_floating_point()
            tensor = nn.Parameter(tensor, requires_grad=wants and tensor.is_floating_point())
        owner._parameters[own] = tensor
    else:
        owner._buffers[own] = tensor
    return tensor


def _restate_size(folder: Path) -> None:
    """Update the byte count in the index of a sharded checkpoint."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text("utf-8"))
        files = {folder / name for name in content["weight_map"].values()}
        content.setdefault("metadata", {})["total_size"] = sum(file.stat().st_size for file in files)
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
