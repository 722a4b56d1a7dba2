"""Which matmuls of a packed model may be computed together, from the description of its family."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation

from lmcompress.families.base import Block
from lmcompress.families.narrow import Derived, derive
from lmcompress.kernels.posts import Post
from lmcompress.nn.fusion import Asking, Followed, Joined, follow_passes, is_activated, release_passes
from lmcompress.nn.packed import PackedConv1D, PackedLinear

_PROJECTIONS = ("query", "key", "value")


class _Asking(Asking, Derived):
    """An activation function that leaves its input as it is where the matmul has applied it."""

    prefix = "Fused"

    def forward(self, x: Tensor) -> Tensor:
        """The function of ``x``.

        Args:
            x: any shape.
        """
        return x if is_activated(x) else cast(Any, super()).forward(x)


class _Uncast(Derived):
    """T5's feed-forward network, without the cast of its inner states to the dtype of codes."""

    prefix = "Uncast"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The output of the network.

        Args:
            hidden_states: ``(..., width)``.
        """
        network = cast(Any, self)
        if hasattr(network, "wi"):
            inner = network.act(network.wi(hidden_states))
        else:
            inner = network.act(network.wi_0(hidden_states)) * network.wi_1(hidden_states)
        return cast(Tensor, network.wo(network.dropout(inner)))


def fuse(model: PreTrainedModel, blocks: list[Block]) -> None:
    """Let packed modules compute together what a family's forward pass allows; safe to call twice.

    Names, state and results are the same: see :mod:`lmcompress.nn.fusion`.

    Args:
        model: modified in place.
        blocks: its blocks.
    """
    for block in blocks:
        _join(block)
        _follow(block)
        if block.family.casts and isinstance(block.get("ffn_out"), PackedLinear):
            network = block.get("casts")
            if not isinstance(network, _Uncast):
                derive(network, _Uncast)
    follow_passes(model.base_model)


def compare_ranges(model: nn.Module) -> None:
    """Find out which static ranges are equal, before ``torch.compile`` asks: a graph reads no values.

    Args:
        model: with its values; fused or not.
    """
    for module in model.modules():
        joined = getattr(module, "joined", None)
        if isinstance(joined, Joined) and not cast(PackedLinear, module).weight.is_meta:
            joined.fit(joined.modules())


def unfuse(model: PreTrainedModel) -> None:
    """Undo :func:`fuse`; safe to call twice.

    Args:
        model: modified in place.
    """
    release_passes(model.base_model)
    for module in model.modules():
        if isinstance(module, (PackedLinear, PackedConv1D)):
            module.forget()
            module.__dict__.pop("joined", None)
            module.__dict__.pop("followed", None)
        elif isinstance(module, (_Asking, _Uncast)):
            module.__class__ = module.stock


def _join(block: Block) -> None:
    if not all(block.has(part) for part in _PROJECTIONS):
        return
    paths = [getattr(block.family, part) for part in _PROJECTIONS]
    modules = [block.get(part) for part in _PROJECTIONS]
    parents, names = zip(*(path.rpartition(".")[::2] for path in paths), strict=True)
    if len(set(parents)) > 1 or not all(isinstance(module, (PackedLinear, PackedConv1D)) for module in modules):
        return
    joined = Joined(block.module.get_submodule(parents[0]), names)
    for module in modules:
        cast(PackedLinear, module).joined = joined


def _follow(block: Block) -> None:
    if not block.has("activation") or not block.has("ffn_in"):
        return
    module, function = block.get("ffn_in"), block.get("activation")
    post, family = _post(function), block.family
    if post is None or not isinstance(module, (PackedLinear, PackedConv1D)):
        return
    if not isinstance(function, _Asking):
        derive(function, _Asking)
    module.followed = Followed(block.module, (family.ffn_in, family.activation, family.ffn_out), post)


def _post(function: nn.Module) -> Post | None:
    """The name of an activation function that matmuls can apply."""
    kind = function.stock if isinstance(function, _Asking) else type(function)
    computes = getattr(function, "act", None)
    if kind is NewGELUActivation:
        return "gelu_tanh"
    if kind is GELUActivation and computes is nn.functional.gelu:
        return "gelu"
    if kind is GELUTanh and isinstance(computes, partial) and computes.func is nn.functional.gelu:
        return "gelu_tanh"
    return None
