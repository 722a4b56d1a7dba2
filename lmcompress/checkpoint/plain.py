"""Packed weights in plain PyTorch: waiting for their codes, unpacked to dense modules, with quantized inputs.

This module depends only on torch and on how padding is known: the self-loading format carries its source text. What it
computes is what :mod:`lmcompress.nn.packed` computes with its reference kernel, in the memory of dense weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmcompress.nn.padding import follow_padding
from lmcompress.numerics.padding import without_padding


class Waiting(nn.Module):
    """A place for the tensors of a packed module in the files, until its dense module can take their values.

    Args:
        dense: the module that waits; its weight is a matrix.
        entry: the encoding of its weight and input, as in ``config.json``.
    """

    weight: Tensor

    def __init__(self, dense: nn.Module, entry: Mapping[str, Any]) -> None:
        super().__init__()
        stored = cast(Any, dense).weight
        # Conv1D stores (in, out), codes are (out, in)
        shape = tuple(reversed(stored.shape)) if hasattr(dense, "nx") else tuple(stored.shape)
        self.rows, self.columns, self.entry = *shape, dict(entry)
        # not a submodule: the files have no tensors of it but the bias
        self.__dict__["dense"] = dense
        self.register_parameter("bias", cast(Any, getattr(dense, "bias", None)))
        inputs = entry.get("inputs") or {}
        static, grouping = inputs.get("range") == "static", entry["granularity"]
        groups = self.columns // grouping if isinstance(grouping, int) else 1
        scales = (1 if grouping == "tensor" else self.rows, groups)
        size = self.rows * bytes_of_row(self.columns, entry["container"])
        self.add("weight", (size,), torch.uint8)
        self.add("weight_scales", scales, torch.float32)
        if entry.get("zero_points"):
            self.add("weight_zero_points", scales, torch.uint8)
        if static:
            self.add("input_scale", (1,), torch.float32)
        if static and not inputs.get("symmetric", True):
            self.add("input_zero_point", (1,), torch.uint8)

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Register a buffer without values on the device of the dense module.

        Args:
            name: its name.
            shape: its shape.
            dtype: its dtype.
        """
        device = cast(Any, self.__dict__["dense"]).weight.device
        self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

    def unpacked(self) -> nn.Module:
        """The dense module with its values.

        Raises:
            ValueError: If the codes were left on disk.
        """
        dense = cast(Any, self.__dict__["dense"])
        if self.weight.is_meta:
            raise ValueError("packed weights must be in memory to be unpacked: leave nothing on disk in device_map")
        grid = self.entry["grid"]
        index = digits(self.weight.view(self.rows, -1), self.columns, self.entry["container"])
        if int(index.max()) >= grid["levels"]:
            raise ValueError("a packed weight has codes beyond its grid: the checkpoint is damaged, fetch it again")
        values = (index * grid.get("stride", 1) + grid["low"]).float()
        scales: Tensor = cast(Tensor, self.weight_scales)
        if "weight_zero_points" in self._buffers:
            values = values - self._spread(cast(Tensor, self.weight_zero_points).float())
        values = values * self._spread(scales)
        if isinstance(dense, nn.Embedding) or not self.entry.get("inputs"):
            values = values.to(dense.weight.dtype)
        dense.weight = nn.Parameter(values.t().contiguous() if hasattr(dense, "nx") else values)
        if "bias" in self._parameters and self.bias is not None:
            dense.bias = self.bias
        return dense.train(self.training)

    def with_quantized_inputs(self, dense: nn.Module) -> nn.Module:
        """A module that quantizes its input as the entry says, or the dense module if it says nothing.

        Args:
            dense: the dense module; for embeddings the head that is tied to them.
        """
        inputs = self.entry.get("inputs")
        return dense if inputs is None else InputQuantized(dense, inputs, self._buffers)

    def _spread(self, scales: Tensor) -> Tensor:
        return scales.repeat_interleave(self.columns // scales.shape[1], dim=1)


class InputQuantized(nn.Linear):
    """A linear layer whose input is quantized; float32 whatever the autocast, as packed modules compute.

    Args:
        dense: gives weight and bias: a ``Linear``, or ``Conv1D``.
        entry: description of the input, as in ``config.json``.
        ranges: ``input_scale`` and ``input_zero_point`` of static ranges.
    """

    def __init__(self, dense: Any, entry: Mapping[str, Any], ranges: Mapping[str, Tensor | None]) -> None:
        weight = nn.Parameter(dense.weight.t().contiguous()) if hasattr(dense, "nx") else dense.weight
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight, self.bias, self.entry = weight, dense.bias, dict(entry)
        for name in ("input_scale", "input_zero_point"):
            self.register_buffer(name, ranges.get(name))
        self.train(dense.training)

    def forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b`` of the quantized input.

        Args:
            x: ``(..., in)``, floating.

        Returns:
            ``(..., out)`` of the dtype of ``x``.
        """
        scale, zero = (self._buffers[name] for name in ("input_scale", "input_zero_point"))
        with torch.autocast(x.device.type, enabled=False):
            values = quantized_input(x, self.entry, scale, zero)
            if x.requires_grad and torch.is_grad_enabled():
                # rounding has no gradient: that of an adapter further down passes straight through
                values = values.detach() + (x - x.detach()).float()
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(values, self.weight.float(), bias).to(x.dtype)


def bytes_of_row(columns: int, container: int | str) -> int:
    """Bytes of one row of codes.

    Args:
        columns: number of codes.
        container: bits of each, or ``"base3"``.
    """
    return -(-columns // 5) if container == "base3" else -(-columns * int(container) // 8)


def digits(packed: Tensor, columns: int, container: int | str) -> Tensor:
    """The indices of codes in their grid.

    Args:
        packed: ``(rows, bytes)`` uint8, each row starting at a new byte.
        columns: codes of a row.
        container: bits of each, or ``"base3"`` for five ternary digits in a byte.

    Returns:
        ``(rows, columns)`` int32.
    """
    words = packed.to(torch.int32)
    if container == 3:
        # eight codes in three bytes, little-endian
        words = nn.functional.pad(words, (0, -words.shape[1] % 3)).view(len(words), -1, 3)
        words = words[..., 0] + 256 * words[..., 1] + 65536 * words[..., 2]
    base, each = (3, 5) if container == "base3" else (2 ** int(container), 8 if container == 3 else 8 // int(container))
    parts = [words // base**place % base for place in range(each)]
    return torch.stack(parts, dim=-1).view(len(words), -1)[:, :columns]


def quantized_input(x: Tensor, entry: Mapping[str, Any], scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """An activation rounded to its codes and back.

    Args:
        x: any shape, floating.
        entry: its description, as in ``config.json``.
        scale: one number, for static ranges.
        zero: one number, for static ranges that are not symmetric.

    Returns:
        The same shape, float32.
    """
    x, symmetric, high = x.float(), entry.get("symmetric", True), 2 ** entry["bits"] - 1
    top = 2 ** (entry["bits"] - 1) - 1
    if scale is not None and symmetric:
        return (x / scale).round().clamp(-top - 1 if entry.get("full") else -top, top) * scale
    if scale is not None and zero is not None:
        return (((x / scale).round() + zero).clamp(0, high) - zero) * scale
    if entry.get("clip") is not None:
        x = x.clamp(-entry["clip"], entry["clip"])
    by_token = entry.get("granularity") == "token"
    # a range of the whole tensor is not that of its padding, where the mask is known
    axes, ranged = ((-1,), x) if by_token else (tuple(range(x.dim())), without_padding(x))
    least, greatest = ranged.amin(axes, keepdim=True), ranged.amax(axes, keepdim=True)
    if symmetric:
        alpha = torch.maximum(greatest, -least)
        return (x / _divisor(alpha) * top).round().clamp(-top, top) * (alpha / top)
    least, greatest = least.clamp(max=0.0), greatest.clamp(min=0.0)
    unit = greatest / high - least / high
    first = (-least / _divisor(unit)).round().clamp(0, high)
    return (((x / _divisor(unit)).round() + first).clamp(0, high) - first) * unit


def wait_for_codes(model: nn.Module, entries: Mapping[str, Mapping[str, Any]], embedding: str) -> list[str]:
    """Replace the modules that are packed in the files by places for their tensors.

    Args:
        model: a ``PreTrainedModel`` without values; modified in place.
        entries: encodings by path, relative to the base model or, of a head, to the model.
        embedding: path of the token embeddings in the base model.

    Returns:
        Paths of the modules in the model, those that it lacks left out.
    """
    stock, found = cast(Any, model), []
    paths = {name.removeprefix(f"{stock.base_model_prefix}."): name for name, _ in model.named_modules()}
    head = stock.get_output_embeddings()
    for path, entry in entries.items():
        if path in paths:
            dense = model.get_submodule(paths[path])
            tied = next((f"{n}.weight" for n, m in model.named_modules() if m is head), None)
            if path == embedding and tied in stock.all_tied_weights_keys:
                # Transformers would tie the bytes, or fill the head with random values
                source = stock.all_tied_weights_keys.pop(tied)
                stock._tied_weights_keys = {k: v for k, v in stock._tied_weights_keys.items() if k != tied}
                _put(model, cast(str, tied).removesuffix(".weight"), WaitingHead(head, source))
            _put(model, paths[path], Waiting(dense, entry))
            found.append(paths[path])
    return found


class WaitingHead(nn.Module):
    """A head that is tied to embeddings whose codes are awaited: a bias, and no matrix.

    Args:
        head: the dense head.
        source: name of the tensor that it is tied to.
    """

    def __init__(self, head: nn.Module, source: str) -> None:
        super().__init__()
        self.__dict__["dense"], self.source = head, source
        self.register_parameter("bias", cast(Any, head).bias)


def unpack_codes(model: nn.Module, paths: list[str]) -> None:
    """Replace the places by their dense modules, and tie the head again.

    Args:
        model: with the values of the files; modified in place.
        paths: from :func:`wait_for_codes`.
    """
    stock = cast(Any, model)
    if any(cast(Waiting, model.get_submodule(path)).entry.get("inputs") for path in paths):
        follow_padding(stock)
    heads = [(name, module) for name, module in model.named_modules() if isinstance(module, WaitingHead)]
    for path in paths:
        waiting = cast(Waiting, model.get_submodule(path))
        dense = waiting.unpacked()
        is_table = isinstance(dense, nn.Embedding)
        _put(model, path, dense if is_table else waiting.with_quantized_inputs(dense))
        for name, place in heads if is_table else ():
            head = place.__dict__["dense"]
            head.weight, head.bias = dense.weight, place.bias
            _put(model, name, waiting.with_quantized_inputs(head))
            model.__dict__.pop("_tied_weights_keys", None)
            stock.all_tied_weights_keys[f"{name}.weight"] = place.source


def _divisor(unit: Tensor) -> Tensor:
    """The unit, or infinity where it is 0: then 0 / unit is 0, not NaN."""
    return torch.where(unit > 0, unit, torch.inf)


def _put(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
