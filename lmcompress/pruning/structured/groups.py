"""The coupled weights of heads and neurons, as views of the parameters: changes to them change the model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError
from lmcompress.families import Block, Coupled, anatomy_of, is_conv1d
from lmcompress.pruning.proximal import group_norms, proximal_factor
from lmcompress.pruning.structured.units import Units

GroupPart = Literal["heads", "neurons"]
Side = Literal["in", "out"]
"""Weights that feed a unit (query, key and value rows; the first matrix), or read it (columns of the projections)."""

GROUP_PARTS: tuple[GroupPart, ...] = ("heads", "neurons")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def unit_views(
    block: Block,
    part: GroupPart,
    sides: Collection[Side] = ("in", "out"),
    pick: Callable[[Tensor], Tensor | None] = lambda parameter: parameter.detach(),
) -> list[Tensor]:
    """The weights that are cut together with each head or neuron of a block.

    Args:
        block: a block of any model.
        part: heads or neurons.
        sides: ``in``, ``out``, or both.
        pick: from a parameter to the tensor of its shape to view: itself, or an optimizer's moment of it;
            parameters for which it returns None are skipped.

    Returns:
        Views whose first axis is the unit, with any further axes; changing them changes the picked tensors.

    Raises:
        LmcompressError: If the part is neither.
    """
    if part not in ("heads", "neurons"):
        raise LmcompressError(f"coupled weights must be of heads or neurons, got {part!r}: other parts have no groups")
    views: list[Tensor] = []
    units = block.units(part)

    def add(module: nn.Module, coupled: Coupled) -> None:
        out = coupled.side == "out"
        # bypasses the module's attribute, which in a fake-quantized one is the quantized weight
        stored = module._parameters.get("weight")
        weight = pick(module.get_parameter("weight") if stored is None else stored)
        if weight is not None:
            oriented = weight.t() if is_conv1d(module) else weight
            views.extend(coupled.views(oriented.t() if out else oriented, units))
        bias = None if out or module.bias is None else pick(module.get_parameter("bias"))
        if bias is not None:
            views.extend(coupled.views(bias, units))

    for coupled in block.coupled(part):
        if coupled.side in sides:
            add(block.get(coupled.part), coupled)
    return views


def unit_norms(model: PreTrainedModel, parts: Collection[GroupPart], sides: Collection[Side] = ("in", "out")) -> Units:
    """l2 norms of the coupled weights of every head and neuron.

    Args:
        model: a model of a known family.
        parts: heads, neurons, or both.
        sides: weights that feed units, that read them, or both.

    Returns:
        Norms, float32; a block without units has an empty tensor.
    """
    blocks = anatomy_of(model).blocks

    def norms(part: GroupPart) -> tuple[Tensor, ...] | None:
        return tuple(_norms(block, part, sides) for block in blocks) if part in parts else None

    return Units(heads=norms("heads"), neurons=norms("neurons"))


def zero_units(model: PreTrainedModel, parts: Collection[GroupPart] = ("heads", "neurons")) -> Units:
    """Units that :func:`~lmcompress.pruning.structured.surgery.cut` can remove without changing the output: those
    that are all zero.

    Whatever made them zero, such as a group lasso on rows or columns of single matrices
    (:class:`lmcompress.pruning.unstructured.GroupSparsity`): a unit is pruned if all weights that read it, or all that
    feed it, are 0, biases included (activations of these families are 0 at 0).

    Args:
        model: a model of a known family.
        parts: heads, neurons, or both.

    Returns:
        A mask, False where a unit is zero.
    """
    fed, read = (unit_norms(model, parts, (side,)) for side in ("in", "out"))
    return fed.zip(read, lambda one, other: (one > 0) & (other > 0))


@torch.no_grad()
def shrink_(
    model: PreTrainedModel,
    parts: Collection[GroupPart],
    step: float,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    norms: Units | None = None,
) -> None:
    r"""One proximal step of the group lasso on every head and neuron, in place: small groups become exactly 0.

    An optimizer's moments of a group that became 0 are set to 0 too, so that momentum does not reactivate it.

    Args:
        model: modified in place.
        parts: heads, neurons, or both.
        step: :math:`\eta \lambda`, learning rate times strength; the threshold of a group of n weights is
            :math:`\eta \lambda \sqrt n`.
        optimizer: the model's optimizer.
        norms: result of :func:`unit_norms`, if known.

    Reference:
        Wen et al., 2016, https://arxiv.org/abs/1608.03665, equation 1, with the proximal step for the subgradient.
    """
    known = unit_norms(model, parts) if norms is None else norms
    died: list[tuple[Block, GroupPart, Tensor]] = []
    for index, block in enumerate(anatomy_of(model).blocks):
        for part in parts:
            views, norm = unit_views(block, part), known.tensors(part)[index]
            if not len(norm):
                continue
            factor = proximal_factor(norm, step * sum(view[0].numel() for view in views) ** 0.5)
            for view in views:
                view.mul_(_broadcast(factor.to(view), view))
            died.append((block, part, (factor == 0) & (norm > 0)))
    # one transfer for all, instead of waiting for the GPU at every block
    if optimizer is not None and died and bool(torch.cat([units for _, _, units in died]).any()):
        for block, part, units in died:
            _forget(block, part, ("in", "out"), ~units, optimizer)


@torch.no_grad()
def silence_(
    model: PreTrainedModel,
    mask: Units,
    sides: Collection[Side] = ("in", "out"),
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Set the weights of masked heads, neurons and sub-layers to 0, with the optimizer's moments of them.

    A unit whose weights are 0 on both sides has no gradient, without moments the optimizer does not move it, and
    weight decay leaves 0 at 0: it stays pruned. With ``sides=("out",)`` it has no effect either, but can be
        reactivated:
    the weights that read it restart from 0 and have a gradient as soon as its gate is open.

    Args:
        model: modified in place.
        mask: bool; False units are zeroed. Layers and hidden dimensions are left to their gates.
        sides: sides of heads and neurons to zero.
        optimizer: its moments of both sides are set to 0.
    """
    for index, block in enumerate(anatomy_of(model).blocks):
        for part in GROUP_PARTS:
            tensors = mask.tensors(part)
            if not tensors or bool(tensors[index].all()):
                continue
            for view in unit_views(block, part, sides):
                kept = tensors[index].to(view.device)
                view.mul_(_broadcast(kept.to(view.dtype), view))
            if optimizer is not None:
                _forget(block, part, ("in", "out"), tensors[index], optimizer)
        for tensors, name in ((mask.tensors("attention"), "attention_out"), (mask.tensors("ffn"), "ffn_out")):
            if tensors and not bool(tensors[0][index]):
                for parameter in block.get(name).parameters():
                    parameter.zero_()
                    for moment in _moments(parameter, optimizer):
                        moment.zero_()


def _norms(block: Block, part: GroupPart, sides: Collection[Side]) -> Tensor:
    views = unit_views(block, part, sides)
    return group_norms(views) if len(views[0]) else torch.zeros(0, device=views[0].device)


def _forget(block: Block, part: GroupPart, sides: Collection[Side], kept: Tensor, optimizer: Any) -> None:
    for name in _MOMENTS:
        for moment in unit_views(block, part, sides, lambda parameter: _moment(parameter, name, optimizer)):  # noqa: B023
            moment.mul_(_broadcast(kept.to(device=moment.device, dtype=moment.dtype), moment))


def _moment(parameter: Tensor, name: str, optimizer: Any) -> Tensor | None:
    moment = optimizer.state.get(parameter, {}).get(name)
    return moment if isinstance(moment, Tensor) and moment.shape == parameter.shape else None


def _moments(parameter: Tensor, optimizer: Any) -> list[Tensor]:
    if optimizer is None:
        return []
    return [moment for name in _MOMENTS if (moment := _moment(parameter, name, optimizer)) is not None]


def _broadcast(per_unit: Tensor, view: Tensor) -> Tensor:
    return per_unit.reshape(-1, *(1,) * (view.dim() - 1))
