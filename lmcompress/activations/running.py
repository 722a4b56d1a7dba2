"""What every evaluation does around a model's forward pass: evaluation mode, and a bar on what takes long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel

T = TypeVar("T")


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode that it was in.

    ``no_grad`` rather than ``inference_mode``: what a module caches in its forward must be usable in training again.
    """
    # module by module: model.train() would also wake modules that their owner holds in evaluation mode
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def with_progress(items: Sequence[T], description: str, *, enabled: bool) -> Iterable[T]:
    """The items, behind a bar on standard error where that is a terminal and there is more than one item."""
    console = Console(stderr=True)
    if not enabled or len(items) < 2 or not console.is_terminal:
        return items
    return track(items, description=description, console=console, transient=True)
