"""A causal language model as a function of tensors alone: one step, with the keys and values of earlier ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError
from lmcompress.export.config import ExportConfig
from lmcompress.export.heads import BATCH, LENGTH, Head
from lmcompress.families import anatomy_of, in_features
from lmcompress.families.positions import first_position
from lmcompress.kernels.dispatch import using
from lmcompress.numerics.graphs import recording

PAST_LENGTH = "past_sequence_length"
PAST, PRESENT = "past_key_values", "present"
"""How the names of keys and values begin that go in, and that come out, as Optimum and transformers.js have them."""

HIDDEN = -65504.0
"""Added to the scores of hidden tokens. Their probability is zero, and a row of padding, where every token is hidden,
stays finite in bfloat16 and float16 too: there float32's minimum is an infinity, and its softmax not a number."""


@dataclass(frozen=True)
class CachedLayer:
    """The keys and values that one block keeps of earlier tokens.

    Attributes:
        index: number of the block.
        heads: number of its heads.
        head_size: width of a head.
    """

    index: int
    heads: int
    head_size: int

    @property
    def inputs(self) -> tuple[str, str]:
        """Names of keys and values as inputs."""
        return f"{PAST}.{self.index}.key", f"{PAST}.{self.index}.value"

    @property
    def outputs(self) -> tuple[str, str]:
        """Names of keys and values as outputs."""
        return f"{PRESENT}.{self.index}.key", f"{PRESENT}.{self.index}.value"


def cached_layers(model: PreTrainedModel) -> tuple[CachedLayer, ...]:
    """The blocks of a model that keep keys and values: those with heads.

    Args:
        model: of a family that :mod:`lmcompress.families` describes; packed, or with twins of packed modules.
    """
    found = []
    for index, block in enumerate(anatomy_of(model).blocks):
        output: Any = block.get("attention_out")
        # a twin has its widths, and no weight to read them from
        width = output.in_features if hasattr(output, "in_features") else in_features(output)
        if width:
            found.append(CachedLayer(index, width // block.head_width, block.head_size))
    return tuple(found)


def refuse_not_causal(model: PreTrainedModel) -> None:
    """Refuse a model that does not generate text token by token from a prompt alone.

    Args:
        model: with a language model head.

    Raises:
        LmcompressError: If earlier tokens see later ones, or the model has cross-attention.
    """
    anatomy, name = anatomy_of(model), type(model).__name__
    if not anatomy.causal:
        flag = anatomy.family.causal_flag
        raise LmcompressError(
            f"earlier tokens see later ones in this {name}, so it generates no text: a model that was trained to do so "
            f"has {flag or 'causal attention'} in its config; if this one was, load it with {flag}=True"
        )
    if getattr(model.config, "add_cross_attention", False):
        raise LmcompressError(
            f"this {name} has cross-attention, which reads the outputs of an encoder; only models that generate from a "
            "prompt alone are exported"
        )


class TextGeneration(Head):
    """``logits (batch, length, tokens)`` of a causal model that reads the whole text at every call.

    Args:
        model: packed for the expected outputs, with twins for the graph.
        config: the settings of the export.

    Attributes:
        layers: the blocks whose keys and values go in and out.
        stateful: whether these become states of the runtime.

    Raises:
        LmcompressError: If the model is not causal; see :func:`refuse_not_causal`.
    """

    task = "text_generation"
    with_past: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, config: ExportConfig) -> None:
        super().__init__(model, config)
        refuse_not_causal(model)
        self.layers = cached_layers(model) if self.with_past else ()
        self.stateful = bool(self.layers) and config.to == "openvino" and config.stateful
        self.inputs = ("input_ids", "attention_mask", *(name for layer in self.layers for name in layer.inputs))
        self.outputs = ("logits", *(name for layer in self.layers for name in layer.outputs))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The logits of the tokens, and the keys and values of all tokens so far.

        Positions follow from the attention mask, so that a prompt padded on the left gives what it gives alone. What
        is added to the scores is computed here, by the same few operations for all families and releases of
        Transformers.

        Args:
            *tensors: ``input_ids (batch, length)``, the new tokens; ``attention_mask (batch, past length + length)``,
                both int64; keys and values of each layer, ``(batch, heads, past length, head size)``.

        Returns:
            Logits ``(batch, length, tokens)``, and keys and values ``(batch, heads, past length + length, head size)``.
        """
        ids, mask, *past = tensors
        length, config = ids.shape[1], self.model.config
        before = past[0].shape[2] if past else mask.shape[1] - length
        kept = _GivenPast({layer.index: past[2 * i : 2 * i + 2] for i, layer in enumerate(self.layers)}, before)
        more = {"token_type_ids": torch.zeros_like(ids)} if getattr(config, "type_vocab_size", 0) else {}
        with _plain_attention(self.model):
            answer = self.model(
                input_ids=ids,
                # a model in half precision has it in its own dtype, and graphs are float32
                attention_mask=_added_to_scores(mask, length, before).to(self.model.dtype),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -length:] + first_position(config),
                past_key_values=kept if self.with_past else None,
                use_cache=self.with_past,
                **more,
            )
        return (answer.logits, *(tensor for layer in self.layers for tensor in kept.present[layer.index]))

    def arguments(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The tensors of a batch; the first half of its tokens is the past, computed by this model.

        Args:
            batch: ``input_ids``, ``(batch, length)``, and an attention mask.
        """
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        if not self.layers:
            return ids, mask
        half = ids.shape[1] // 2
        empty = [
            ids.new_zeros(len(ids), x.heads, 0, x.head_size, dtype=torch.float32) for x in self.layers for _ in (0, 1)
        ]
        if half == 0:
            return ids, mask, *empty
        # whoever asks gets the same past
        with torch.no_grad(), using(kernel="reference"):
            _, *past = self(ids[:, :half], mask[:, :half], *empty)
        return ids[:, half:], mask, *(tensor.float() for tensor in past)

    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace with, none of whose sizes are equal."""
        rows, length, before = 2, 3, 5 if self.layers else 0
        ids = torch.arange(rows * length).view(rows, length) % int(self.model.config.vocab_size)
        past = [torch.zeros(rows, layer.heads, before, layer.head_size) for layer in self.layers for _ in range(2)]
        return ids, torch.ones(rows, before + length, dtype=torch.int64), *past

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """The axes of each input that may have any size."""
        batch, length, before = (torch.export.Dim(name) for name in (BATCH, LENGTH, PAST_LENGTH))
        # past length and length together, which torch.export finds by itself
        tokens = torch.export.Dim.AUTO if self.layers else length
        return {0: batch, 1: length}, {0: batch, 1: tokens}, *({0: batch, 2: before} for _ in self.inputs[2:])


class TextGenerationWithPast(TextGeneration):
    """The same with keys and values of earlier tokens as inputs and outputs, so that a call reads new tokens only.

    A block without heads keeps nothing, and is not among the inputs.
    """

    task = "text_generation_with_past"
    with_past = True


class _GivenPast:
    """Keys and values of earlier tokens by block: what a model takes for a cache of Transformers while it is traced."""

    is_compileable = False

    def __init__(self, past: Mapping[int, Sequence[Tensor]], length: int) -> None:
        self.past, self.length = past, length
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens of a block."""
        if layer_idx in self.past:
            before = [tensor.to(keys.dtype) for tensor in self.past[layer_idx]]
            keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
            self.present[layer_idx] = keys, values
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of earlier tokens."""
        return self.length


def _added_to_scores(mask: Tensor, length: int, before: int) -> Tensor:
    """``(batch, 1, length, past length + length)``, added to the scores of each query with each key."""
    number = torch.arange(mask.shape[1], device=mask.device)
    earlier = number[None, :] <= number[before:, None]
    visible = earlier[None, None] & mask.bool()[:, None, None, :]
    return torch.where(visible, 0.0, HIDDEN)


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """In graphs, attention without a search for rows that see nothing, which exporters write out over all scores."""
    config: Any = model.config
    before = config._attn_implementation
    if recording() and before == "sdpa":
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before
