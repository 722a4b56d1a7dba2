"""Listening to attention: what its function is given, after rotary positions and norms, under any kernel with masks.

The attention modules of Transformers ask ``AttentionInterface.get_interface`` for their function in every forward pass.
While there is a listener, that method hands out the same function with a call of the module's listeners before it.
Modules without listeners compute what they always do; once the last listener is removed, it is the stock method again.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from lmcompress.errors import LmcompressError

_LISTENERS = "attention_listeners"
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Heard:
    """The operands of one call of an attention function.

    Attributes:
        query: ``(batch, heads, queries, size)``.
        key: ``(batch, key heads, keys, size)``; each is read by ``heads / key heads`` query heads, side by side.
        value: ``(batch, key heads, keys, size)``.
        scaling: factor of ``q·k``.
        mask: ``(batch or 1, heads or 1, queries, keys)``: bool, true where a key is visible, or added to the scores;
            None: all keys are visible, as far as ``causal`` allows.
        causal: whether keys after the query are hidden too; only without a mask that is added.
        softcap: bound ``c`` of ``c tanh(s / c)``, which replaces the scaled score ``s`` (Gemma 2); None: no bound.
        bias: ``(batch or 1, heads or 1, queries, keys)``, added to the scores (T5); None: no bias.
        sinks: ``(heads,)``, the score of one more key, whose value is zero (gpt-oss); None: there is none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    mask: Tensor | None = None
    causal: bool = False
    softcap: float | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None

    def scores(self) -> Tensor:
        """Scaled and bounded scores, with biases, but before keys are hidden by the mask.

        Returns:
            ``(batch, heads, queries, keys)``, of the dtype of the queries.
        """
        scores = self._products()
        return scores if self._added is None else scores + self._added.masked_fill(_hides(self._added), 0.0)

    def visible(self) -> Tensor | None:
        """Which keys each query sees: bool, broadcastable to the scores; None: all."""
        seen = self.mask if self._added is None else ~_hides(self._added)
        if self.causal:
            size = self.query.shape[-2], self.key.shape[-2]
            earlier = torch.ones(size, dtype=torch.bool, device=self.query.device).tril()
            seen = earlier if seen is None else seen & earlier
        return seen

    def probabilities(self) -> Tensor:
        """Attention probabilities before dropout.

        Returns:
            ``(batch, heads, queries, keys)``, float32; zeros for a query that sees no key.
        """
        scores, visible = self._products().float(), self.visible()
        if self._added is not None:
            # infinity would make a row without visible keys NaN
            scores = scores + self._added.float().clamp_min(torch.finfo(torch.float32).min)
        if self.sinks is not None:
            sinks = self.sinks.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks], dim=-1)
            visible = None if visible is None else nn.functional.pad(visible, (0, 1), value=True)
        if visible is None or self._added is None:
            probabilities = masked_softmax(scores, visible)
        else:
            # the mask is in the scores already
            probabilities = scores.softmax(dim=-1).masked_fill(~visible, 0.0)
        return probabilities if self.sinks is None else probabilities[..., :-1]

    @property
    def _added(self) -> Tensor | None:
        """The mask, if it is added."""
        return None if self.mask is None or self.mask.dtype == torch.bool else self.mask

    def _products(self) -> Tensor:
        scores = torch.matmul(self.query, for_each_query(self.key, self.query).transpose(-1, -2)) * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores if self.bias is None else scores + self.bias


def for_each_query(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values, one for each query head, of which several may read the same.

    Args:
        x: ``(batch, heads, length, head size)``.
        query: ``(batch, query heads, length, head size)``, a whole number of query heads for each head.
    """
    return x if x.shape[1] == query.shape[1] else x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def masked_softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """The softmax over the visible keys.

    Args:
        scores: ``(batch, heads, queries, keys)``.
        visible: bool, broadcastable to that; None: all are.

    Returns:
        The same shape and dtype; a query without visible keys has zeros, also in its gradient.
    """
    if visible is None:
        return scores.softmax(dim=-1)
    # not infinity, which makes a row without visible keys NaN, in its gradient too
    hidden = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return hidden.softmax(dim=-1).masked_fill(~visible, 0.0)


Take = Callable[[Heard], None]


class Listener:
    """A function that listens, until :meth:`remove`.

    Args:
        attention: the module that it listens to.
        take: the function.
    """

    def __init__(self, attention: nn.Module, take: Take) -> None:
        self.take = take
        self._attention = attention

    def remove(self) -> None:
        """Stop listening. Safe to call twice."""
        with _LOCK:
            kept = _Listeners(one for one in _listeners(self._attention) if one is not self)
            if kept:
                self._attention.__dict__[_LISTENERS] = kept
            else:
                self._attention.__dict__.pop(_LISTENERS, None)
            _LIVE.discard(self)
            if not _LIVE and AttentionInterface.get_interface is _announcing_interface:
                AttentionInterface.get_interface = _stock_interface


class _Listeners(tuple[Listener, ...]):
    """Those of one module. Copies and pickles of the module have none."""

    def __reduce__(self) -> Any:
        return tuple, ()


_LOCK = threading.Lock()
# a listener that was dropped with its model counts no longer
_LIVE: weakref.WeakSet[Listener] = weakref.WeakSet()
_stock_interface = AttentionInterface.get_interface


def listen(attention: nn.Module, take: Take) -> Listener:
    """Pass on what an attention module gives its attention function, in every forward pass.

    What the module computes does not change.

    Args:
        attention: the module that calls the function, such as a ``BertSelfAttention`` or a ``LlamaAttention``.
        take: receives it, before the function is called; with gradients, if there are any.

    Returns:
        A handle to stop.

    Raises:
        LmcompressError: If this class computes attention without an attention function of Transformers, or its kernel
            gets masks that cannot be read. The latter is also raised by the forward pass.
    """
    global _stock_interface
    if not _calls_interface(type(attention)):
        raise LmcompressError(
            f"{type(attention).__name__} computes attention by itself, without an attention function of Transformers: "
            "its scores, probabilities, queries, keys and values cannot be captured, use hidden states"
        )
    _check_readable(cast(Any, attention).config._attn_implementation)
    listener = Listener(attention, take)
    with _LOCK:
        attention.__dict__[_LISTENERS] = _Listeners((*_listeners(attention), listener))
        _LIVE.add(listener)
        if AttentionInterface.get_interface is not _announcing_interface:
            _stock_interface = AttentionInterface.get_interface
            AttentionInterface.get_interface = _announcing_interface
    return listener


def announce(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> None:
    """Tell a module's listeners of a call of its attention function; arguments are those of the function.

    Args:
        module: the attention module.
        query: ``(batch, heads, queries, size)``.
        key: ``(batch, key heads, keys, size)``.
        value: the same.
        attention_mask: ``(batch or 1, heads or 1, queries, keys)`` or None.
        dropout: not told.
        scaling: factor of ``q·k``; default: one over the square root of the head size.
        is_causal: whether, without a mask, later keys are hidden; default: the module's setting.
        softcap: bound of the scores.
        position_bias: added to the scores.
        s_aux: scores of a key without value, one for each head.
        **kwargs: not told.

    Raises:
        LmcompressError: If there are listeners and the mask is of another kind.
    """
    listeners = _listeners(module)
    if not listeners:
        return
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4):
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise LmcompressError(
            f"attention is heard with a mask (batch, heads, queries, keys) or none, {type(module).__name__} got a "
            f"{type(attention_mask).__name__} of shape {shape}: {_INSTEAD}"
        )
    # as sdpa does
    causal = attention_mask is None and query.shape[2] > 1
    causal = causal and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    heard = Heard(query, key, value, scaling, attention_mask, bool(causal), softcap, position_bias, s_aux)
    for listener in listeners:
        listener.take(heard)


_ANNOUNCE: list[Callable[..., Any]] = []


def announces(function: F) -> F:
    """Mark an attention function that calls :func:`announce` itself, so that nothing is told twice.

    Args:
        function: the function.

    Returns:
        The same.
    """
    _ANNOUNCE.append(function)
    return function


_INSTEAD = 'load the model with attn_implementation="sdpa" or "eager"'


def _announcing_interface(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
    """``AttentionInterface.get_interface`` while anything listens."""
    return partial(_attend, _stock_interface(self, attn_implementation, default), attn_implementation)


def _attend(function: Callable[..., Any], implementation: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if _listeners(module) and function not in _ANNOUNCE:
        _check_readable(implementation)
        told = kwargs
        if implementation == "eager":
            # without a mask, eager attention hides nothing
            told = {**kwargs, "is_causal": False}
        announce(module, *args, **told)
    return function(module, *args, **kwargs)


def _listeners(module: nn.Module) -> tuple[Listener, ...]:
    return cast("tuple[Listener, ...]", getattr(module, _LISTENERS, ()))


def _check_readable(implementation: str | None) -> None:
    known = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
    if implementation is not None and known not in (sdpa_mask, eager_mask):
        raise LmcompressError(
            f"the masks of attn_implementation {implementation!r} cannot be read: to capture scores, probabilities, "
            f"queries, keys or values, {_INSTEAD}"
        )


def _calls_interface(kind: type) -> bool:
    methods = (member for owner in kind.__mro__ for member in vars(owner).values() if inspect.isfunction(member))
    return any("get_interface" in inspect.unwrap(method).__code__.co_names for method in methods)


def _hides(mask: Tensor) -> Tensor:
    """Where a mask that is added hides a key: the lowest number of its dtype, or infinity, and no bias of positions."""
    return mask <= torch.finfo(mask.dtype).min / 2
