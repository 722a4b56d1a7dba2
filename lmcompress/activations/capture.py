"""Features of a running model, without ``output_attentions``: states by hooks, attention by listening to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.documents import Documents, refuse_packed
from lmcompress.activations.hooks import Hooked, hear
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import anatomy_of, head_logits
from lmcompress.families.refusal import refuse_unproven
from lmcompress.nn.listening import Heard

FEATURES = ("hidden", "scores", "probabilities", "queries", "keys", "values", "output")
_SCORES = ("scores", "probabilities")
_OF_ATTENTION = (*_SCORES, "queries", "keys", "values")
Feature = tuple[str, int]
"""A kind of feature and a layer: hidden states count from 0 (embeddings), all others from 1 (first block).

``output`` is the input of the head: the last layer's hidden states, after the final norm if there is one (GPT-2).
"""

Features = dict[Feature, Tensor]


def stack_of(model: PreTrainedModel, layer: int) -> int:
    """The stack that a layer belongs to: 1 for a decoder that reads an encoder, else 0.

    Args:
        model: any model of a known family.
        layer: number of the layer, counted from 1 over all stacks; 0 is the embeddings of the first.
    """
    return sum(layer > start for start in anatomy_of(model).starts[1:])


def numbered(model: PreTrainedModel, layer: str) -> int:
    """The number of a layer that is named by its stack.

    Args:
        model: a model with an encoder and a decoder.
        layer: ``encoder.i`` or ``decoder.i``, where i counts from 1, or is negative and counts from the stack's end.

    Raises:
        LmcompressError: If the model has one stack, or the name is of another form, or there is no such layer.
    """
    stack, _, number = layer.partition(".")
    anatomy = anatomy_of(model)
    if not anatomy.reads_encoder or stack not in _STACKS or not number.removeprefix("-").isdecimal():
        raise LmcompressError(
            f"a layer must be a number, or encoder.i or decoder.i of a model with both, got {layer!r} for a "
            f"{type(model).__name__}"
        )
    place = _STACKS.index(stack)
    first, count = anatomy.starts[place], len(anatomy.block_lists[place])
    wanted = int(number) if int(number) >= 0 else count + 1 + int(number)
    if not 1 <= wanted <= count:
        raise LmcompressError(
            f"the {stack} of a {type(model).__name__} has layers 1 to {count}, or negative from its end, got {layer!r}"
        )
    return first + wanted


_STACKS = ("encoder", "decoder")


def resolve(model: PreTrainedModel, kind: str, layer: int | str) -> Feature:
    """A feature with its layer counted from the start.

    Args:
        model: the model that must have it.
        kind: one of :data:`FEATURES`.
        layer: layer number; negative counts from the end. Of a model with an encoder and a decoder, the decoder's
            layers are counted after the encoder's, or named ``decoder.1``; see :func:`numbered`.

    Returns:
        ``(kind, layer)``.

    Raises:
        LmcompressError: If the kind is unknown or the layer does not exist.
    """
    if kind not in FEATURES:
        raise LmcompressError(f"unknown feature {kind!r}{nearest(kind, FEATURES)}")
    layer = numbered(model, layer) if isinstance(layer, str) else layer
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
    heads = block.num_heads if kind in ("keys", "values") else block.num_heads * block.queries
    return (heads, 0, 0) if kind in _SCORES else (heads, 0, block.head_size)


class Capture(Hooked):
    """Hooks and listeners on a model that keep what was asked for of its next forward pass.

    Args:
        model: the model, not wrapped; hooks on it work inside DDP and ``torch.compile`` too.
        features: what to keep, resolved (see :func:`resolve`).
        last_hidden: whether to record the output of the model without its head as well.

    Raises:
        LmcompressError: If features of attention are wanted of a block that mixes neighbours, of a class that computes
            attention by itself, or under a kernel whose masks cannot be read, such as ``flash_attention_2``.
    """

    def __init__(self, model: PreTrainedModel, features: Iterable[Feature] = (), *, last_hidden: bool = False) -> None:
        super().__init__()
        self.model = model
        self.features = sorted(set(features))
        self.active = True
        self._kept: dict[Feature, Tensor] = {}
        self._heard: dict[int, Heard] = {}
        try:
            self._attach(last_hidden)
        except BaseException:
            self.remove()
            raise

    def _attach(self, last_hidden: bool) -> None:
        refuse_unproven(self.model, "hidden_features")
        anatomy = anatomy_of(self.model)
        blocks = anatomy.blocks
        for kind, layer in self.features:
            if kind == "hidden" and layer == 0:
                hook = self._input_hook()
                self._handles.append(blocks[0].module.register_forward_pre_hook(hook, with_kwargs=True))
            elif kind == "output":
                self._handles.append(anatomy.body.register_forward_hook(self._keep(kind, layer)))
            elif kind == "hidden":
                self._handles.append(blocks[layer - 1].module.register_forward_hook(self._keep(kind, layer)))
        for layer in sorted({layer for kind, layer in self.features if kind in _OF_ATTENTION}):
            self._handles.append(hear(blocks[layer - 1], self._listener(layer)))
        if last_hidden:
            self._handles.append(anatomy.body.register_forward_hook(self._keep("last", 0)))

    def take(self, documents: Documents | None = None) -> Features:
        """The features recorded in the last forward pass; clears them.

        Args:
            documents: those packed into the rows, if any; the features then have one row for each.

        Returns:
            Tensors by feature, in the dtype the model computed them in; probabilities are float32.

        Raises:
            LmcompressError: If the model did not run or did not reach a layer.
        """
        kept, self._kept = self._kept, {}
        heard, self._heard = self._heard, {}
        if documents is not None:
            # before any scores are computed: no pair of two documents is ever in memory
            kept = {feature: documents.of_positions(tensor) for feature, tensor in kept.items()}
            heard = {layer: _by_document(one, documents) for layer, one in heard.items()}
        return {feature: self._read(kept, heard, feature) for feature in self.features}

    def take_last_hidden(self) -> Tensor:
        """The output of the model without its head, ``(batch, length, width)``; call it before :meth:`take`."""
        return self._get(self._kept, ("last", 0))

    def _keep(self, kind: str, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.active:
                self._kept[kind, layer] = output if isinstance(output, Tensor) else output[0]

        return hook

    def _listener(self, layer: int) -> Callable[[Heard], None]:
        def take(heard: Heard) -> None:
            if self.active:
                self._heard[layer] = heard

        return take

    def _input_hook(self) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            if self.active:
                self._kept["hidden", 0] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _read(self, kept: dict[Feature, Tensor], heard: dict[int, Heard], feature: Feature) -> Tensor:
        kind, layer = feature
        if kind not in _OF_ATTENTION:
            return self._get(kept, feature)
        if (one := heard.get(layer)) is None:
            raise LmcompressError(
                f"{self._left_no(feature)}, or computes attention by itself, as GPT-2 does with "
                'reorder_and_upcast_attn under eager attention: then load it with attn_implementation="sdpa"'
            )
        if kind in _SCORES:
            return one.scores() if kind == "scores" else one.probabilities()
        return {"queries": one.query, "keys": one.key, "values": one.value}[kind]

    def _get(self, kept: dict[Feature, Tensor], feature: Feature) -> Tensor:
        try:
            return kept[feature]
        except KeyError:
            raise LmcompressError(self._left_no(feature)) from None

    def _left_no(self, feature: Feature) -> str:
        kind, layer = feature
        name = type(self.model).__name__
        return f"{name} left no {kind} of layer {layer}: the forward pass did not run or did not reach it"


def _by_document(heard: Heard, documents: Documents) -> Heard:
    valid = documents.mask.bool()[:, None, None, :]
    if (mask := heard.mask) is None:
        mask = valid
    elif (mask := documents.of_pairs(mask)).dtype == torch.bool:
        mask = mask & valid
    else:
        mask = mask.masked_fill(~valid, torch.finfo(mask.dtype).min)
    query, key, value = (documents.of_heads(operand) for operand in (heard.query, heard.key, heard.value))
    bias = None if heard.bias is None else documents.of_pairs(heard.bias)
    return replace(heard, query=query, key=key, value=value, mask=mask, bias=bias)


def extract(model: PreTrainedModel, batch: Mapping[str, Any], features: Sequence[Feature]) -> tuple[Tensor, Features]:
    """Logits and features of one batch, without gradients.

    Args:
        model: the model, in its current mode.
        batch: inputs of the model.
        features: resolved features.

    Returns:
        ``(logits, features)``.

    Raises:
        LmcompressError: If documents are packed into rows, or the model returns no logits.
    """
    refuse_packed(model, batch)
    with Capture(model, features) as capture, torch.no_grad():
        logits = head_logits(model(**batch))
        if logits is None:
            raise LmcompressError(f"{type(model).__name__} does not return logits; load the model with its head")
        return logits, capture.take()
