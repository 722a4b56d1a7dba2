"""Surgery: cutting a model by a mask, folding gate values into its weights, and counting the changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.behaviour import behave
from lmcompress.checkpoint.config import CompressionConfig, recorded_compression
from lmcompress.checkpoint.cutting import drop_heads, drop_neurons, keep_heads, keep_hidden, keep_layers, keep_neurons
from lmcompress.checkpoint.encoding import weight_count
from lmcompress.checkpoint.layers import refuse_compact
from lmcompress.checkpoint.schema import BlockShape
from lmcompress.checkpoint.structure import (
    recorded_structure,
    same_shapes,
    set_stock_shapes,
    structure_of,
    why_not_vanilla,
)
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, refuse_foreign, weight_view
from lmcompress.families.norms import is_norm, scaled_parameters
from lmcompress.families.refusal import refuse_unproven
from lmcompress.nn.configs import own_config
from lmcompress.pruning.structured.gates import gated_hidden
from lmcompress.pruning.structured.units import Units, check_units, masked_structure, unit_shapes


def cut(model: PreTrainedModel, mask: Units) -> None:
    """Remove the masked units of a model, so that it computes what it would with the mask as gates.

    The model's config has the new shapes afterwards, so that any ``save_pretrained`` writes a checkpoint that reloads;
    if blocks were dropped, it records the remaining ones. Tied weights stay tied. Hooks on projections that are cut
    are lost with them: remove gates first.

    Args:
        model: modified in place, once everything has been checked.
        mask: bool, True is kept, in the model's current shapes. Its meaning: see
            :class:`~lmcompress.pruning.structured.units.Units`.

    Raises:
        LmcompressError: If the mask keeps everything, no block or no hidden dimension, or has other shapes, or the
            model is quantized by another library, or its family cannot lose one of the parts.
    """
    anatomy = anatomy_of(model)
    refuse_quantized(model)
    refuse_unproven(model, *mask.parts())
    before = recorded_structure(model)
    check_units(mask, unit_shapes(before, anatomy.hidden_size), "a mask")
    after = masked_structure(before, mask)
    silenced = _silenced(model, mask)
    if all(bool(tensor.all()) for _, _, tensor in mask.items()) or (same_shapes(before, after) and not silenced):
        raise LmcompressError(
            "a mask must prune something, got one that keeps every remaining unit; nothing would be cut"
        )
    layers = _kept(mask.layers) if mask.layers is not None else list(range(len(anatomy.blocks)))
    if mask.hidden is not None and not bool(mask.hidden.all()):
        # first: it is the part that can be refused
        keep_hidden(model, _kept(mask.hidden))
    with torch.no_grad():
        for index in layers:
            block = anatomy.blocks[index]
            heads = None if mask.heads is None else mask.heads[index]
            neurons = None if mask.neurons is None else mask.neurons[index]
            if mask.attention is not None and not mask.attention[index]:
                _silence(block.get("attention_out"))
                heads = torch.zeros(block.num_heads, dtype=torch.bool)
            if mask.ffn is not None and not mask.ffn[index]:
                _silence(block.get("ffn_out"))
                neurons = torch.zeros(block.ffn_width, dtype=torch.bool)
            if heads is not None and not bool(heads.all()):
                keep_heads(block, _kept(heads)) if bool(heads.any()) else drop_heads(block)
            if neurons is not None and not bool(neurons.all()):
                keep_neurons(block, _kept(neurons)) if bool(neurons.any()) else drop_neurons(block)
    if len(layers) < len(anatomy.blocks):
        keep_layers(model, layers)
    _record(model, after.blocks)


def refuse_quantized(model: PreTrainedModel) -> None:
    """Refuse a model that cannot be cut, before any long work on it.

    Args:
        model: a model of a known family.

    Raises:
        LmcompressError: If it is quantized by another library, has adapters or another library's masks, is packed, or
            has compact layers.
    """
    refuse_foreign(model, "cut")
    refuse_compact(model, "cut")
    recorded = recorded_compression(model.config)
    if recorded is not None and recorded.encoding is not None:
        raise LmcompressError(
            "cannot cut a model whose weights are packed: prune first, then quantize the result, or cut the dense "
            "model that lmcompress.checkpoint.encoding.unpacked(model) gives"
        )


def fold(model: PreTrainedModel, values: Units) -> None:
    """Multiply gate values into the weights, so that the model without gates computes the same.

    A value of 0 for a block, or for a hidden dimension, cannot be a weight: the model computes the same once these are
    :func:`cut`, which ``cut(model, values.map(torch.Tensor.bool))`` does afterwards, together with all others that are
    0.

    Args:
        model: modified in place.
        values: floats or bools, one for each unit, in the model's current shapes. Those of ``layers`` are 0 or 1.

    Raises:
        LmcompressError: If shapes differ, a value is not finite, or a value of a layer is neither 0 nor 1.

    Note:
        If the output matrix of a causal language model is tied to its embeddings, folded hidden values are in that
        matrix and not in the norm before it: logits are the same, hidden states after that norm are not.
    """
    anatomy = anatomy_of(model)
    check_units(values, unit_shapes(structure_of(model), anatomy.hidden_size), "values")
    for part, _, tensor in values.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise LmcompressError(f"values of {part} must be finite, got {_first_infinite(tensor)}; the gates diverged")
    if values.layers is not None and bool(((values.layers != 0) & (values.layers != 1)).any()):
        raise LmcompressError(
            f"values of layers must be 0 or 1 to be folded, got {values.layers.tolist()}: half a block has no weights. "
            "Round them, or gate attention and ffn instead"
        )
    with torch.no_grad():
        for index, block in enumerate(anatomy.blocks):
            attention_out, ffn_out = block.get("attention_out"), block.get("ffn_out")
            if values.heads is not None:
                columns = values.heads[index].repeat_interleave(block.head_width)
                weight_view(attention_out).mul_(_like(columns, attention_out))
            if values.neurons is not None:
                weight_view(ffn_out).mul_(_like(values.neurons[index], ffn_out))
            for factors, module in ((values.attention, attention_out), (values.ffn, ffn_out)):
                if factors is not None:
                    for parameter in module.parameters():
                        parameter.mul_(_like(factors[index], module))
        if values.hidden is not None:
            _fold_hidden(model, values.hidden)


def census(model: PreTrainedModel) -> dict[str, Any]:
    """Counts of a model's units and parameters, for comparison by :func:`coverage`.

    Args:
        model: a model of a known family.

    Returns:
        JSON types: ``layers``, ``heads``, ``neurons`` (of all blocks), ``attention`` and ``ffn`` (blocks that have
        any), ``hidden``; ``parameters`` (tied ones once) and ``block_parameters``; ``blocks``, a list of the shape
        of each.
    """
    anatomy, structure = anatomy_of(model), recorded_structure(model)
    return {
        "layers": len(structure.blocks),
        "heads": sum(block.heads for block in structure.blocks),
        "neurons": sum(block.ffn for block in structure.blocks),
        "attention": sum(block.heads > 0 for block in structure.blocks),
        "ffn": sum(block.ffn > 0 for block in structure.blocks),
        "hidden": anatomy.hidden_size,
        "parameters": weight_count(model),
        "block_parameters": weight_count(anatomy.block_list),
        "blocks": [block.model_dump(exclude_none=True) for block in structure.blocks],
    }


def coverage(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Pruned counts and shares.

    Args:
        before: the :func:`census` of the original model.
        after: that of the current model.

    Returns:
        JSON types: for each number of the census ``{"before": ..., "after": ..., "cut": ...}``, the last as a share in
        [0, 1]; ``sparsity``, the pruned share of the parameters of blocks; ``blocks``, the remaining shapes;
        and ``unchanged``, whether nothing was cut.
    """
    counts = [name for name in before if name != "blocks"]
    report: dict[str, Any] = {
        name: {
            "before": before[name],
            "after": after[name],
            "cut": 1 - after[name] / before[name] if before[name] else 0.0,
        }
        for name in counts
    }
    return report | {
        "sparsity": report["block_parameters"]["cut"],
        "blocks": list(after["blocks"]),
        "unchanged": all(before[name] == after[name] for name in counts),
    }


def _record(model: PreTrainedModel, blocks: tuple[BlockShape, ...]) -> None:
    set_stock_shapes(own_config(model), structure_of(model))
    # read again: shapes that the stock config now expresses are not in the structure
    structure = structure_of(model)
    structure = structure.model_copy(update={"blocks": blocks})
    old = recorded_compression(model.config)
    stock = why_not_vanilla(structure, model.config) is None and all(block.source is None for block in blocks)
    if old is not None or not stock:
        model.config.quantization_config = CompressionConfig(None if stock else structure, old and old.provenance)
    behave(model)


def _silenced(model: PreTrainedModel, mask: Units) -> bool:
    """Whether the mask removes a bias of a block that has no heads or neurons left anyway."""
    blocks = anatomy_of(model).blocks
    for part, name in ((mask.attention, "attention_out"), (mask.ffn, "ffn_out")):
        for block, stays in zip(blocks, part if part is not None else (), strict=False):
            bias = block.get(name).bias
            if not stays and isinstance(bias, Tensor) and bool(bias.any()):
                return True
    return False


def _silence(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()


def _fold_hidden(model: PreTrainedModel, values: Tensor) -> None:
    family = anatomy_of(model).family
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    norm = anatomy_of(model).base.get_submodule(family.final_norm) if family.final_norm and tied else None
    for module in gated_hidden(model):
        # the tied matrix already has the values that the norm's output is multiplied by
        if module is norm:
            continue
        value = _like(values, module)
        if isinstance(module, nn.Embedding):
            module.weight.mul_(value)
            continue
        if is_norm(module):
            for parameter, scaled in scaled_parameters(module, value.mul, family.norm_offset):
                parameter.copy_(scaled)
            continue
        weight_view(module).mul_(value[:, None])
        if isinstance(module.bias, Tensor):
            module.bias.mul_(value)


def _like(value: Tensor, module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return value.to(weight)


def _kept(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def _first_infinite(tensor: Tensor) -> float:
    return float(tensor[~torch.isfinite(tensor)][0])
