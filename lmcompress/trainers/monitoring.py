"""Monitoring of loss terms: their shares of the gradient, and detection of dead terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lmcompress.errors import LmcompressError

DEAD_STEPS = 50


def gradient_shares(terms: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> dict[str, float]:
    """Each term's share of the sum of the norms of the terms' gradients, in [0, 1]; the graph is kept.

    Args:
        terms: weighted, 0-d, by name.
        parameters: parameters to differentiate with respect to.
    """
    norms = {}
    for name, value in terms.items():
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        norms[name] = sum(float(g.float().square().sum()) for g in gradients if g is not None) ** 0.5
    total = sum(norms.values())
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}


def check_alive(name: str, silent: int) -> None:
    """Raise if a term has been exactly zero for long.

    Args:
        name: name of the term.
        silent: number of optimizer steps for which it has been zero.

    Raises:
        LmcompressError: If there are :data:`DEAD_STEPS` of them.
    """
    if silent >= DEAD_STEPS:
        raise LmcompressError(
            f"the loss term {name!r} has been exactly zero for {silent} steps, and so has its gradient. Usual "
            "causes: teacher and student are the same model, a softmax over a single output (use the mse loss), or "
            "a mask that hides all tokens. Remove the term if it is meant to be zero."
        )
