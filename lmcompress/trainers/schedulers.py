"""A learning-rate schedule of the user's own, extended to parameters that methods add to its optimizer."""

from __future__ import annotations

from typing import Any

import torch

from lmcompress.method import inner_optimizer


def add_group(optimizer: torch.optim.Optimizer, scheduler: Any, group: dict[str, Any]) -> None:
    """Add a group of parameters to an optimizer, and to the scheduler that exists already, if there is one.

    A scheduler counts the groups when it is created, and later ones end in an error in its first step. The new group
    follows the schedule of the first: the same factors of its own learning rate.

    Args:
        optimizer: the optimizer.
        scheduler: its scheduler, or None if it is created later.
        group: ``params``, optionally ``lr`` and ``weight_decay``.
    """
    optimizer.add_param_group(group)
    if scheduler is None:
        return
    inner = inner_optimizer(optimizer)
    first, new = inner.param_groups[0], inner.param_groups[-1]
    start, base = float(first.get("initial_lr", first["lr"])), float(new["lr"])
    for name in first.keys() - new.keys():
        # peaks and floors of cyclic schedules are multiples of the rate; momenta are the same
        new[name] = first[name] * base / start if name.endswith("_lr") and start else first[name]
    if start:
        new["initial_lr"], new["lr"] = base, base * float(first["lr"]) / start
    _extend(scheduler, base / start if start else 1.0)


def _extend(scheduler: Any, ratio: float) -> None:
    for inner in getattr(scheduler, "_schedulers", ()):
        _extend(inner, ratio)
    for rates in ("base_lrs", "_last_lr", "min_lrs", "max_lrs"):
        values = getattr(scheduler, rates, None)
        if isinstance(values, list) and values:
            values.append(values[0] * ratio)
    for functions in ("lr_lambdas",):
        values = getattr(scheduler, functions, None)
        if isinstance(values, list) and values:
            values.append(values[0])
