"""The surroundings of every forward pass in evaluation: evaluation mode and progress bars."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from lmcompress.errors import LmcompressError

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 5.0
"""Seconds between lines of progress where there is no terminal."""

_CONSOLE: ContextVar[Console | None] = ContextVar("_CONSOLE", default=None)
_SHOWN: list[bool] = []


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode that it was in.

    ``no_grad`` rather than ``inference_mode``: what a module caches in its forward pass must be usable in training.
    """
    with evaluation_mode(model), torch.no_grad():
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module is in the mode that it was in."""
    # module by module: model.train() would also wake modules that their owner holds in evaluation mode
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def showing_progress(console: Console | None) -> Iterator[None]:
    """Within the block, long loops report progress: as a bar on a terminal, otherwise line by line.

    Args:
        console: console for the progress; None disables it.
    """
    token = _CONSOLE.set(console)
    try:
        yield
    finally:
        _CONSOLE.reset(token)


def with_progress(items: Sequence[T], description: str, *, enabled: bool) -> Iterable[T]:
    """The items, with a progress bar if there is more than one.

    Args:
        items: items to iterate over once.
        description: label of the bar.
        enabled: show the bar on standard error if that is a terminal; :func:`showing_progress` always shows it.
    """
    shown = _CONSOLE.get()
    console = shown or Console(stderr=True)
    if len(items) < 2 or _SHOWN or not (shown or enabled and console.is_terminal):
        return items
    if console.is_terminal:
        return _outermost(track(items, description=description, console=console, transient=True))
    return _outermost(_with_lines(items, description, console))


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Numbers of rows in batches of similar length, which saves padding.

    The longest are first: a model that does not fit into memory fails at once.

    Args:
        lengths: the length of each row.
        batch_size: rows of a batch.

    Raises:
        LmcompressError: If ``batch_size`` is less than 1.
    """
    if batch_size < 1:
        raise LmcompressError(f"batch_size must be >= 1, got {batch_size}")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _outermost(items: Iterable[T]) -> Iterator[T]:
    """Iteration within these items shows no bar of its own."""
    _SHOWN.append(True)
    try:
        yield from items
    finally:
        _SHOWN.pop()


def _with_lines(items: Sequence[T], description: str, console: Console) -> Iterator[T]:
    said = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            console.print(f"  {description}: {number:,} of {len(items):,}", highlight=False)
