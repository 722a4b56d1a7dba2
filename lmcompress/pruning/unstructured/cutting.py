"""Removing the units of plain networks that are all zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmcompress.errors import LmcompressError

_KEEP_ZERO = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
    nn.Flatten,
    nn.MaxPool2d,
    nn.AvgPool2d,
)
"""Modules that map 0 to 0 and act on each unit separately."""


@dataclass(frozen=True)
class CutLayer:
    """The widths of one layer.

    Attributes:
        path: its path in the network.
        inputs: remaining inputs: features, or channels of a convolution.
        before: original number of outputs, or filters.
        after: remaining number.
    """

    path: str
    inputs: int
    before: int
    after: int


@torch.no_grad()
def cut_zero_units(layers: nn.Sequential) -> list[CutLayer]:
    """Remove neurons and filters whose weights are zero on either side from a chain of layers; outputs do not change.

    A unit is removed if all weights that feed it, its bias included, are 0, or all that read it. Inputs and outputs of
    the network are unchanged.

    Args:
        layers: ``Linear`` and ``Conv2d`` with one group, with modules that map 0 to 0 in between (ReLU and other
            activations, pooling, dropout, flattening); modified in place.

    Returns:
        Each layer's widths.

    Raises:
        LmcompressError: If another module is in between, a convolution has groups, or a layer would lose all its
            units.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> for parameter in net[0].parameters():
        ...     _ = parameter[1].detach().zero_()
        >>> [row.after for row in cut_zero_units(net)]
        [1, 1]
    """
    places = _places(layers)
    before = [len(layers[place].weight) for place in places]  # type: ignore[arg-type]
    changed = True
    while changed:
        changed = False
        for first, second in zip(places, places[1:], strict=False):
            keep = _alive(layers[first], layers[second])
            if not bool(keep.any()):
                raise LmcompressError(
                    f"layer {first} would lose all its {len(keep)} units: the network's output is constant"
                )
            if not bool(keep.all()):
                changed = True
                _keep_outputs(layers[first], keep)
                _keep_inputs(layers[second], keep)
    return [
        CutLayer(str(place), _read(layers[place]), was, len(layers[place].weight))  # type: ignore[arg-type]
        for place, was in zip(places, before, strict=True)
    ]


def _places(layers: nn.Sequential) -> list[int]:
    places = []
    for place, module in enumerate(layers):
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            places.append(place)
        elif not isinstance(module, _KEEP_ZERO):
            what = "a convolution with groups" if isinstance(module, nn.Conv2d) else f"a {type(module).__name__}"
            raise LmcompressError(f"layers must be Linear, Conv2d, or modules that map 0 to 0, got {what} at {place}")
    if not places:
        raise LmcompressError("there must be Linear or Conv2d layers to cut, got none")
    return places


def _alive(first: nn.Module, second: nn.Module) -> Tensor:
    fed = _weight(first).flatten(1).ne(0).any(dim=1)
    if first.bias is not None:
        fed |= first.bias != 0
    return fed & _columns(second, len(fed)).ne(0).any(dim=(0, 2))


def _columns(module: nn.Module, units: int) -> Tensor:
    """Weights that read each unit, ``(out, units, places)``."""
    return _weight(module).reshape(len(_weight(module)), units, -1)


def _keep_outputs(module: nn.Module, keep: Tensor) -> None:
    module.weight = nn.Parameter(_weight(module)[keep])
    if module.bias is not None:
        module.bias = nn.Parameter(_tensor(module, "bias")[keep])
    setattr(module, "out_channels" if isinstance(module, nn.Conv2d) else "out_features", int(keep.sum()))


def _keep_inputs(module: nn.Module, keep: Tensor) -> None:
    weight = _columns(module, len(keep))[:, keep]
    if isinstance(module, nn.Conv2d):
        module.weight = nn.Parameter(weight.reshape(len(weight), -1, *module.kernel_size))
        module.in_channels = int(keep.sum())
    else:
        module.weight = nn.Parameter(weight.reshape(len(weight), -1))
        module.in_features = module.weight.shape[1]  # type: ignore[assignment]


def _read(module: nn.Module) -> int:
    return int(_columns(module, _weight(module).shape[1]).ne(0).any(dim=(0, 2)).sum())


def _weight(module: nn.Module) -> Tensor:
    return _tensor(module, "weight")


def _tensor(module: nn.Module, name: str) -> Tensor:
    values = getattr(module, name)
    if not isinstance(values, Tensor):
        raise LmcompressError(
            f"a layer must hold its {name} as a tensor to be cut, got a {type(module).__name__} whose {name} is a "
            f"{type(values).__name__}: cut the model before it is quantized or replaced"
        )
    return values.detach()
