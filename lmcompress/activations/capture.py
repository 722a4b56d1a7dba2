"""Features captured from a running model by hooks, independent of ``output_attentions``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.hooks import Hooked
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import Block, anatomy_of

FEATURES = ("hidden", "scores", "probabilities", "queries", "keys", "values", "output")
# what is computed of queries and keys
_SCORES = ("scores", "probabilities")
Feature = tuple[str, int]
"""A kind of feature and a layer: hidden states count from 0 (embeddings), all others from 1 (first block).

``output`` is the input of the head: the last layer's hidden states, after the final norm if there is one (GPT-2).
"""

Features = dict[Feature, Tensor]


def resolve(model: PreTrainedModel, kind: str, layer: int) -> Feature:
    """A feature with its layer counted from the start.

    Args:
        model: the model that must have it.
        kind: one of :data:`FEATURES`.
        layer: layer number; negative counts from the end.

    Returns:
        ``(kind, layer)``.

    Raises:
        LmcompressError: If the kind is unknown or the layer does not exist.
    """
    if kind not in FEATURES:
        raise LmcompressError(f"unknown feature {kind!r}{nearest(kind, FEATURES)}")
    count = len(anatomy_of(model).block_list)
    first = {"hidden": 0, "output": count}.get(kind, 1)
    wanted = layer if layer >= 0 else count + 1 + layer
    if not first <= wanted <= count:
        hint = "0 is the embeddings' output, " if kind == "hidden" else ""
        raise LmcompressError(
            f"{type(model).__name__} has no layer {layer} for the feature {kind!r}: it has {count} blocks "
            f"({hint}{first} to {count}, or negative from the end)"
        )
    return kind, wanted


def shape_of(model: PreTrainedModel, feature: Feature) -> tuple[int, ...]:
    """Shape of a feature for one example.

    Args:
        model: the model; it is not run.
        feature: resolved (see :func:`resolve`).

    Returns:
        The shape without the batch axis; 0 where a size is the sequence length.
    """
    kind, layer = feature
    if kind in ("hidden", "output"):
        return (0, anatomy_of(model).hidden_size)
    block = anatomy_of(model).blocks[layer - 1]
    return (block.num_heads, 0, 0) if kind in _SCORES else (block.num_heads, 0, block.head_size)


class Capture(Hooked):
    """Hooks on a model that keep what was asked for of its next forward pass.

    Args:
        model: the model, not wrapped; hooks on it work inside DDP and ``torch.compile`` too.
        features: what to keep, resolved (see :func:`resolve`).
        last_hidden: whether to record the output of the model without its head as well.
    """

    def __init__(self, model: PreTrainedModel, features: Iterable[Feature] = (), *, last_hidden: bool = False) -> None:
        super().__init__()
        self.model = model
        self.features = sorted(set(features))
        self.causal = anatomy_of(model).family.causal
        self.active = True
        self._kept: dict[tuple[str, int], Tensor] = {}
        anatomy = anatomy_of(model)
        blocks = anatomy.blocks
        self._scalings = {layer: blocks[layer - 1].scaling for kind, layer in self.features if kind in _SCORES}
        needed = {need for feature in self.features for need in _needs(feature)}
        for kind, layer in sorted(needed):
            if kind == "hidden" and layer == 0:
                hook = self._input_hook()
                self._handles.append(blocks[0].module.register_forward_pre_hook(hook, with_kwargs=True))
            elif kind == "output":
                self._handles.append(anatomy.base.register_forward_hook(self._keep(kind, layer)))
            elif kind == "hidden":
                self._handles.append(blocks[layer - 1].module.register_forward_hook(self._keep(kind, layer)))
            else:
                module, select = _projection(blocks[layer - 1], kind)
                self._handles.append(module.register_forward_hook(self._keep(kind, layer, select)))
        if last_hidden:
            self._handles.append(anatomy.base.register_forward_hook(self._keep("last", 0)))

    def take(self, attention_mask: Tensor | None = None) -> Features:
        """The features recorded in the last forward pass; clears them.

        Args:
            attention_mask: ``(batch, length)`` of that pass, 1 = real token; needed for ``probabilities`` where
                there is padding.

        Returns:
            Tensors by feature, in the dtype the model computed them in.

        Raises:
            LmcompressError: If the model did not run or did not reach a layer.
        """
        kept, self._kept = self._kept, {}
        return {feature: self._read(kept, feature, attention_mask) for feature in self.features}

    def take_last_hidden(self) -> Tensor:
        """The output of the model without its head, ``(batch, length, width)``; call it before :meth:`take`."""
        return self._get(self._kept, "last", 0)

    def _keep(self, kind: str, layer: int, select: Callable[[Tensor], Tensor] | None = None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.active:
                tensor = output if isinstance(output, Tensor) else output[0]
                self._kept[kind, layer] = tensor if select is None else select(tensor)

        return hook

    def _input_hook(self) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            if self.active:
                self._kept["hidden", 0] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _read(self, kept: dict[tuple[str, int], Tensor], feature: Feature, mask: Tensor | None) -> Tensor:
        kind, layer = feature
        if kind not in _SCORES:
            return self._get(kept, kind, layer)
        query, key = self._get(kept, "queries", layer), self._get(kept, "keys", layer)
        scores = torch.matmul(query, key.transpose(-1, -2)) * self._scalings[layer]
        return scores if kind == "scores" else masked_softmax(scores, mask, causal=self.causal)

    def _get(self, kept: dict[tuple[str, int], Tensor], kind: str, layer: int) -> Tensor:
        try:
            return kept[kind, layer]
        except KeyError:
            raise LmcompressError(
                f"{type(self.model).__name__} left no {kind} of layer {layer}: the forward pass did not run or "
                "did not reach it"
            ) from None


def masked_softmax(scores: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """Attention probabilities as a model computes them from its scores.

    Args:
        scores: ``(batch, heads, length, length)``, scaled.
        mask: ``(batch, length)``, 1 = real token; None: all are.
        causal: whether later positions are hidden.

    Returns:
        The same shape, float32; rows of queries that see no key are zero.
    """
    scores = scores.float()
    length = scores.shape[-1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=scores.device)
    if causal:
        allowed = allowed.tril()
    allowed = allowed[None, None]
    if mask is not None:
        allowed = allowed & mask.bool()[:, None, None, :]
    return torch.softmax(scores.masked_fill(~allowed, float("-inf")), dim=-1).nan_to_num(0.0)


def extract(model: PreTrainedModel, batch: Mapping[str, Any], features: Sequence[Feature]) -> tuple[Tensor, Features]:
    """Logits and features of one batch, without gradients.

    Args:
        model: the model, in its current mode.
        batch: inputs of the model.
        features: resolved features.

    Returns:
        ``(logits, features)``.
    """
    with Capture(model, features) as capture, torch.no_grad():
        logits = model(**batch).logits
        return logits, capture.take(batch.get("attention_mask"))


def _needs(feature: Feature) -> list[Feature]:
    kind, layer = feature
    return [("queries", layer), ("keys", layer)] if kind in _SCORES else [feature]


def _projection(block: Block, kind: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The module whose output holds queries, keys or values, and its reading as ``(batch, heads, length, size)``."""
    size = block.head_size

    def split(tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (-1, size)).transpose(1, 2)

    if not block.family.qkv:
        return block.get({"queries": "query", "keys": "key", "values": "value"}[kind]), split
    part = ("queries", "keys", "values").index(kind)
    return block.get("qkv"), lambda fused: split(fused.chunk(3, dim=-1)[part])
