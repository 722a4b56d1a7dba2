"""Folding permutations of channels into adjacent matrices; outputs are unchanged."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.layers import PARTS, record_layers
from lmcompress.errors import LmcompressError
from lmcompress.families import Block, anatomy_of, is_conv1d, weight_view
from lmcompress.families.mixing import mixing_of
from lmcompress.families.tied_blocks import shared_sources
from lmcompress.nn.grouped import GroupedLinear
from lmcompress.nn.low_rank import LowRankLinear
from lmcompress.students.report import Before, CompactReport


def fold_shuffles(model: PreTrainedModel) -> CompactReport:
    """Remove permutations of channels by permuting adjacent matrices; outputs are unchanged.

    Neurons of a feed-forward network have no inherent order: a permutation of the output of ``ffn_in``, or of the input
    of ``ffn_out``, is folded into the other matrix, full or grouped; where there is a gate, that of the input of
    ``ffn_out`` into both matrices before it, if they are full. Between the values and ``attention_out`` the same holds
    as long as channels stay in their head and no two query heads read one value. Permutations of the residual stream
    stay, since every block reads it, and so do those between two grouped matrices that need one of them.

    Args:
        model: modified in place, including its config. On ``meta`` permutations are assumed not to be the identity.

    Returns:
        The folded permutations.

    Raises:
        LmcompressError: If there is no permutation to fold, or the model is packed or shares its blocks.
    """
    report = fold_where_possible(model)
    if not report.changed:
        raise LmcompressError(
            "there must be an order of channels that can be folded, got none"
            + next((f": {path}: {why}" for path, why in report.left.items()), "; no matrix is shuffled")
        )
    return report


def fold_where_possible(model: PreTrainedModel) -> CompactReport:
    """The same as :func:`fold_shuffles`, for a model that may have no permutation to fold.

    Args:
        model: the model.

    Returns:
        The folded permutations, if any.

    Raises:
        LmcompressError: If the model is packed or shares its blocks.
    """
    blocks = list(anatomy_of(model).block_list)
    if len(set(shared_sources(blocks))) < len(blocks):
        raise LmcompressError("cannot fold orders in a model whose blocks share their parameters: fold before sharing")
    before = Before.of(model)
    changed, left = {}, {}
    anatomy = anatomy_of(model)
    for index, block in enumerate(anatomy.blocks):
        told = _fold_gated(block) if block.family.gated else _fold(block, "ffn_in", "ffn_out")
        # several query heads may read one value, whose channels they would have to permute alike
        if block.value_part == "value" and block.queries == 1 and mixing_of(block) is None:
            told += _fold(block, "value", "attention_out")
        for part, side, reason in told:
            path = f"{anatomy.path(index)}.{getattr(block.family, part)}.{side}"
            if reason:
                left[path] = reason
            else:
                changed[path] = "folded"
        for part in PARTS:
            module = block.get(part) if block.has(part) else None
            for side in ("input_order", "output_order"):
                path = f"{anatomy.path(index)}.{getattr(block.family, part)}.{side}"
                if isinstance(module, GroupedLinear) and getattr(module, side) is not None and path not in left:
                    left[path] = "no matrix beside it can take it"
    record_layers(model)
    return before.report(model, changed, left)


def _fold(block: Block, writer: str, reader: str) -> list[tuple[str, str, str]]:
    """Fold the permutation between two matrices: (part, side, why not) for each permutation that exists."""
    first, second = block.get(writer), block.get(reader)
    gives = first.output_order if isinstance(first, GroupedLinear) else None
    takes = second.input_order if isinstance(second, GroupedLinear) else None
    there = [(writer, "output_order")] * (gives is not None) + [(reader, "input_order")] * (takes is not None)
    if not there:
        return []
    within = block.head_size if writer == "value" else None

    def told(reason: str = "") -> list[tuple[str, str, str]]:
        return [(part, side, reason) for part, side in there]

    # channel i in between becomes channel order[i] of the writer's own
    if gives is not None and isinstance(first, GroupedLinear):
        if not _stays(gives, within):
            return told("it takes channels out of their heads")
        if isinstance(second, GroupedLinear):
            # the writer's output without its permutation, read through both
            both = second.order("input")
            both = gives[both]
            if takes is None and not _same(both, torch.arange(len(both), device=both.device)):
                return told("both matrices are grouped, one of them needs it")
            _set_order(second, "input_order", both)
        elif not _move_columns(second, gives.argsort()):
            return told(f"a {type(second).__name__} cannot take it")
        _set_bias(first, gives.argsort())
        _set_order(first, "output_order", None)
        return told()
    assert takes is not None and isinstance(second, GroupedLinear)
    if not _stays(takes, within):
        return told("it takes channels out of their heads")
    if not _move_rows(first, takes):
        return told("both matrices are grouped, one of them needs it")
    _set_order(second, "input_order", None)
    return told()


def _fold_gated(block: Block) -> list[tuple[str, str, str]]:
    """The same for a feed-forward network with a gate: a neuron has its row in two matrices, which move together."""
    second = block.get("ffn_out")
    if not isinstance(second, GroupedLinear) or second.input_order is None:
        return []
    writers = [coupled for coupled in block.coupled("neurons") if coupled.side == "in"]
    if not all(_has_rows(block.get(coupled.part)) for coupled in writers):
        return [("ffn_out", "input_order", "one of the matrices whose product it reads is grouped too")]
    for coupled in writers:
        _move_rows(block.get(coupled.part), coupled.places(block.ffn_width, second.input_order))
    _set_order(second, "input_order", None)
    return [("ffn_out", "input_order", "")]


def _has_rows(module: nn.Module) -> bool:
    """Whether a module is a full matrix whose output can be permuted."""
    return isinstance(module, (nn.Linear, LowRankLinear)) or is_conv1d(module)


def _stays(order: Tensor, within: int | None) -> bool:
    """Whether a permutation leaves all channels in their heads."""
    if within is None:
        return True
    return _same(order // within, torch.arange(len(order), device=order.device) // within)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two permutations are equal; False without values."""
    return not one.is_meta and torch.equal(one, other)


def _set_order(module: GroupedLinear, side: str, order: Tensor | None) -> None:
    if order is not None and _same(order, torch.arange(len(order), device=order.device)):
        order = None
    setattr(module, side, order)


def _set_bias(module: GroupedLinear, order: Tensor) -> None:
    if module.bias is not None:
        with torch.no_grad():
            module.bias.copy_(module.bias[order].clone())


def _move_columns(module: nn.Module, order: Tensor) -> bool:
    """Let a full matrix read permuted channels, if it is one."""
    if isinstance(module, LowRankLinear):
        module = module.reduce
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return False
    with torch.no_grad():
        weight = weight_view(module)
        weight.copy_(weight[:, order].clone())
    return True


def _move_rows(module: nn.Module, order: Tensor) -> bool:
    """Let a full matrix write permuted channels, if it is one."""
    if isinstance(module, LowRankLinear):
        module = module.expand
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return False
    with torch.no_grad():
        weight = weight_view(module)
        weight.copy_(weight[order].clone())
        if isinstance(module.bias, Tensor):
            module.bias.copy_(module.bias[order].clone())
    return True
