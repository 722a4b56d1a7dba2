"""Attention whose two matmuls read quantized activations: queries and keys, then probabilities and values.

The function is registered with transformers' ``AttentionInterface`` under :data:`ATTENTION`. A model uses it when
its config names it, and each attention module holds its own quantizers; without any it is ``sdpa``.

A cache holds keys and values unquantized. They are quantized when they are read, so that with per-tensor ranges
a step of ``generate`` has the ranges of all tokens so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lmcompress.errors import LmcompressError
from lmcompress.nn.configs import own_config
from lmcompress.nn.listening import announce, announces, for_each_query, masked_softmax
from lmcompress.numerics.inputs import InputEncoding, quantize_input
from lmcompress.numerics.padding import of_keys

ATTENTION = "lmcompress_quantized"
"""Name of the implementation, as ``attn_implementation`` has it."""

Role = Literal["queries", "keys", "values", "probabilities"]
ROLES: tuple[Role, ...] = ("queries", "keys", "values", "probabilities")
"""The activations within attention."""

_QUANTIZERS, _BEFORE, _GUARD = "attention_quantizers", "_attention_before", "_attention_guard"


class AttentionEncodings(Protocol):
    """What is told of the activations within attention; :class:`lmcompress.checkpoint.schema.AttentionEncoding` is
    one."""

    @property
    def queries(self) -> InputEncoding | None:
        """Operand of the matmul before the softmax."""

    @property
    def keys(self) -> InputEncoding | None:
        """Operand of the matmul before the softmax."""

    @property
    def values(self) -> InputEncoding | None:
        """Operand of the matmul after the softmax."""

    @property
    def probabilities(self) -> InputEncoding | None:
        """Operand of the matmul after the softmax."""


class RoleQuantizers(Protocol):
    """The quantizers that an attention module holds."""

    def active(self) -> bool:
        """Whether anything is currently quantized."""

    def __call__(self, role: Role, x: Tensor) -> Tensor:
        """Quantize one of the four.

        Args:
            role: name of the activation.
            x: ``(batch, heads, length, head size)``; probabilities ``(batch, heads, length, length)``.

        Returns:
            The same shape and dtype.
        """


class AttentionQuantizers(nn.Module):
    """Quantizes within one attention module as described; scales of static ranges are its buffers.

    Args:
        encodings: the description.
        device: device of the buffers.
    """

    def __init__(self, encodings: AttentionEncodings, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.encodings: dict[str, InputEncoding] = {
            role: encoding for role in ROLES if (encoding := getattr(encodings, role)) is not None
        }
        for role, encoding in self.encodings.items():
            if encoding.range == "static":
                self.register_buffer(f"{role}_scale", torch.ones(1, dtype=torch.float32, device=device))
                if not encoding.symmetric:
                    self.register_buffer(f"{role}_zero_point", torch.zeros(1, dtype=torch.uint8, device=device))

    def active(self) -> bool:
        """Whether anything is quantized."""
        return bool(self.encodings)

    def forward(self, role: Role, x: Tensor) -> Tensor:
        """One of the four activations, quantized if the description says so.

        Args:
            role: name of the activation.
            x: ``(batch, heads, length, ...)``.

        Returns:
            The same shape and dtype.
        """
        encoding = self.encodings.get(role)
        if encoding is None:
            return x
        scale, zero_point = getattr(self, f"{role}_scale", None), getattr(self, f"{role}_zero_point", None)
        return quantize_input(x, encoding, scale, zero_point).values.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> AttentionQuantizers:
        # a scale rounded to bfloat16 is a different scale
        scales = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, old in scales.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


def quantize_attention(model: PreTrainedModel, attentions: Iterable[nn.Module], encodings: AttentionEncodings) -> None:
    """Let a model quantize within attention; in place.

    With static ranges each of ``attentions`` gets buffers, ``attention_quantizers.queries_scale`` and so on,
    which belong to its state: call this before weights are loaded.

    Args:
        model: its config will name :data:`ATTENTION`.
        attentions: its attention modules with heads, such as ``block.get("attention")`` of each block.
        encodings: the quantization, the same in all of them.

    Raises:
        LmcompressError: If attention is quantized already, or there is none.
    """
    modules = list(attentions)
    device = next(model.parameters()).device
    attach(model, {module: AttentionQuantizers(encodings, device) for module in modules}, register=True)


def attach(model: PreTrainedModel, quantizers: Mapping[nn.Module, RoleQuantizers], *, register: bool = False) -> None:
    """Let attention modules quantize by custom quantizers; in place.

    Args:
        model: its config will name :data:`ATTENTION`.
        quantizers: quantizers by attention module.
        register: whether the quantizers become submodules, whose state is part of the model's.

    Raises:
        LmcompressError: If attention is quantized already, or there is none.
    """
    if not quantizers:
        raise LmcompressError(
            f"{type(model).__name__} has no attention to quantize: no block has heads; leave attention out"
        )
    if any(hasattr(module, _QUANTIZERS) for module in quantizers):
        raise LmcompressError(
            f"attention of this {type(model).__name__} is quantized already; release_attention removes that first"
        )
    before = own_config(model)._attn_implementation
    for module, own in quantizers.items():
        if register:
            module.add_module(_QUANTIZERS, cast(nn.Module, own))
        else:
            # not a submodule: its trained parameters are not the model's
            module.__dict__[_QUANTIZERS] = own
        module.__dict__[_BEFORE] = before
        module.__dict__[_GUARD] = module.register_forward_pre_hook(_refuse_another)
    for config in _configs(model):
        config._attn_implementation = ATTENTION


def release_attention(model: PreTrainedModel) -> None:
    """Remove what :func:`quantize_attention` or :func:`attach` added; safe to call twice.

    Args:
        model: the model given to these; its attention is restored.
    """
    for module in model.modules():
        if _BEFORE not in module.__dict__:
            continue
        before = module.__dict__.pop(_BEFORE)
        for config in _configs(model):
            config._attn_implementation = before
        module.__dict__.pop(_GUARD).remove()
        module.__dict__.pop(_QUANTIZERS, None)
        module._modules.pop(_QUANTIZERS, None)


def _configs(model: PreTrainedModel) -> list[Any]:
    """The model's config, and those of its stacks: T5's have copies of their own."""
    held = [model.config, *(module.__dict__["config"] for module in model.modules() if "config" in module.__dict__)]
    return list({id(config): config for config in held}.values())


def attention_quantizers(module: nn.Module) -> RoleQuantizers | None:
    """The quantizers of an attention module.

    Args:
        module: any module.

    Returns:
        The quantizers set by :func:`quantize_attention` or :func:`attach`, or ``None``.
    """
    return cast("RoleQuantizers | None", getattr(module, _QUANTIZERS, None))


@announces
def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    r"""Attention of quantized queries, keys, values and probabilities.

    .. math:: P = \mathrm{softmax}(s\, Q(q) Q(k)^T + m), \quad o = \mathrm{dropout}(Q(P))\, Q(v)

    The softmax is float32. A query without visible keys gets zeros. Listeners (:mod:`lmcompress.nn.listening`) are told
    quantized queries, keys and values.

    Args:
        module: an attention module; without quantizers this is ``sdpa``.
        query: ``(batch, heads, queries, head size)``.
        key: ``(batch, key/value heads, keys, head size)``; their number divides that of the query heads.
        value: the same.
        attention_mask: ``(batch, 1 or heads, queries, keys)``: bool, true where a key is visible, or added to the
            scores.
        dropout: share of the probabilities that is set to zero.
        scaling: factor of the scores; default: one over the square root of the head size.
        is_causal: whether, without a mask, later keys are hidden; default: the module's setting.
        position_bias: ``(1 or batch, heads, queries, keys)``, added to the scores.
        **kwargs: passed to ``sdpa``.

    Returns:
        ``(batch, queries, heads, head size)``, and the probabilities after dropout; ``None`` for ``sdpa``.

    Note:
        TernaryBERT's code applies dropout before it quantizes. Here dropout comes after, so that ranges are those of
        inference: dropout scales up the remaining values, which a calibrated range would clip.

    Reference:
        Zhang et al. 2020 (TernaryBERT), https://arxiv.org/abs/2009.12812, section 3.1.
    """
    quantize = attention_quantizers(module)
    if quantize is None or not quantize.active():
        biased = kwargs | {"position_bias": position_bias}
        announce(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **biased)
        answer: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **biased
        )
        return answer
    queries = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and queries > 1:
        # as in sdpa: the mask begins at the upper left, and keys beyond it are an empty part of a cache
        key, value = key[:, :, :queries], value[:, :, :queries]
        attention_mask = torch.ones(queries, queries, dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = quantize("queries", query)
    with of_keys():
        key, value = quantize("keys", key), quantize("values", value)
    announce(module, query, key, value, attention_mask, scaling=scale, is_causal=False, position_bias=position_bias)
    scores = torch.matmul(query, for_each_query(key, query).transpose(-1, -2)).float() * scale
    if position_bias is not None:
        scores = scores + position_bias[..., : scores.shape[-1]].float()
    probabilities = quantize("probabilities", _softmax(scores, attention_mask)).to(value.dtype)
    probabilities = nn.functional.dropout(probabilities, dropout)
    answers = torch.matmul(probabilities, for_each_query(value, query))
    return answers.transpose(1, 2).contiguous(), probabilities


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        return (scores + mask.float()).softmax(dim=-1)
    return masked_softmax(scores, mask)


def _refuse_another(module: nn.Module, args: Any) -> None:
    """The hook on each attention module that quantizes."""
    named = cast(Any, module).config._attn_implementation
    if named != ATTENTION:
        raise LmcompressError(
            f"attention of this model is quantized, so its attn_implementation must be {ATTENTION!r}, got {named!r}: "
            "leave it as it was loaded, or take the quantization of attention away with "
            "lmcompress.nn.quantized_attention.release_attention(model)"
        )


Mask = Callable[..., "Tensor | None"]

AttentionInterface.register(ATTENTION, quantized_attention)
# without a mask function of that name, no masks are created at all
AttentionMaskInterface.register(ATTENTION, cast(Mask, sdpa_mask))
