"""The tokens of the current forward pass that are not padding: ranges computed from inputs are theirs alone.

A model states them for the time of its forward pass (:mod:`lmcompress.nn.padding`); quantizers ask here. Every thread
has its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """The masks of a forward pass, bool, true where a token is not padding.

    Attributes:
        now: ``(batch, length)`` of the tokens in this pass.
        keys: ``(batch, past + length)`` with those in a cache; in attention to an encoder, those of the encoder.
        source: in attention to an encoder, its output.
        encoder: in a decoder that reads an encoder, the output of the encoder, and the mask of its tokens.
    """

    now: Tensor
    keys: Tensor
    source: Tensor | None = None
    encoder: tuple[Tensor, Tensor] | None = None


class _Now(threading.local):
    """The masks of nested forward passes, the innermost first."""

    def __init__(self) -> None:
        self.scope: tuple[Tokens | None, int, Any] | None = None


_NOW = _Now()


def begin(tokens: Tokens | None, owner: int = 0) -> None:
    """State the tokens of a forward pass until :func:`end`.

    Args:
        tokens: their masks; None if none is known to be padding.
        owner: number of the model that states them. None runs within itself: what it stated before was interrupted
            (Ctrl-C runs no hooks), and goes, with all that came after. 0: nobody's.
    """
    outer = _NOW.scope
    while owner and outer is not None and outer[1] != owner:
        outer = outer[2]
    if owner and outer is not None:
        _NOW.scope = outer[2]
    _NOW.scope = (tokens, owner, _NOW.scope)


def end() -> None:
    """Return to what was stated before; does nothing outside of a forward pass."""
    if _NOW.scope is not None:
        _NOW.scope = _NOW.scope[2]


def current() -> Tokens | None:
    """The masks of the innermost forward pass, if it has any."""
    return None if _NOW.scope is None else _NOW.scope[0]


@contextmanager
def stated(mask: Tensor, encoder: tuple[Tensor, Tensor] | None = None) -> Iterator[None]:
    """Within the block the tokens are those of a mask, for parts of a model that run alone.

    Args:
        mask: ``(batch, length)`` bool, true for tokens that are not padding.
        encoder: for a block of a decoder, as in :class:`Tokens`.
    """
    begin(Tokens(mask, mask, encoder=encoder))
    try:
        yield
    finally:
        end()


@contextmanager
def of_keys() -> Iterator[None]:
    """Within the block, in attention to an encoder, the tokens are the encoder's, to which keys and values belong."""
    tokens = current()
    begin(tokens if tokens is None or tokens.source is None else Tokens(tokens.keys, tokens.keys))
    try:
        yield
    finally:
        end()


def real(x: Tensor) -> Tensor | None:
    """Which numbers of an activation do not belong to padding.

    Args:
        x: ``(batch, length, width)``, or ``(batch, heads, length, ...)``.

    Returns:
        A mask that broadcasts over ``x``; None if no token is known to be padding, or ``x`` has other axes.
    """
    tokens = current()
    if tokens is None:
        return None
    mask, keys = tokens.now, tokens.keys
    if x is tokens.source and x.shape[:2] == keys.shape:
        return keys.unsqueeze(-1)
    if x.dim() == 3 and x.shape[:2] == mask.shape:
        return mask.unsqueeze(-1)
    if x.dim() == 4:
        for of_axis in (mask, keys):
            if x.shape[0] == of_axis.shape[0] and x.shape[2] == of_axis.shape[1]:
                return of_axis[:, None, :, None]
    return None


def without_padding(x: Tensor) -> Tensor:
    """An activation with zeros in place of padding, which no range is widened by: all of them include 0.

    Args:
        x: as for :func:`real`.

    Returns:
        The same tensor if no token is known to be padding.
    """
    mask = real(x)
    return x if mask is None else x.masked_fill(~mask, 0.0)
