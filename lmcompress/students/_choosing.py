"""The matrices of a model to replace by compact layers, and their inputs on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from lmcompress.activations.hooks import valid_targets, valid_tokens
from lmcompress.activations.walking import calibration_batches, without_padding
from lmcompress.checkpoint.config import recorded_compression
from lmcompress.checkpoint.layers import PARTS, check_replaceable
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import (
    Block,
    ZeroWidthLinear,
    anatomy_of,
    in_features,
    out_features,
    refuse_foreign,
)
from lmcompress.families.coupled import ATTENTION_READERS, CROSS
from lmcompress.families.mixing import mixing_of
from lmcompress.families.tied_blocks import shared_sources

Batch = Mapping[str, Any]


class Projection(NamedTuple):
    """A matrix of a block.

    Attributes:
        path: relative to the base model.
        block: number of its block.
        part: the family's name of it.
        module: its module.
        sections: lengths of the parts of its output that are matrices of their own, such as queries, keys and values.
    """

    path: str
    block: int
    part: str
    module: nn.Module
    sections: tuple[int, ...] = ()


def check_ready(model: PreTrainedModel) -> None:
    """Refuse a model that cannot be made compact as a whole, before any long work.

    Args:
        model: a model of a known family.

    Raises:
        LmcompressError: If it is packed or quantized by another library, has adapters or another library's masks, is
            parametrized, or its blocks share parameters.
    """
    refuse_foreign(model, "make compact")
    recorded = recorded_compression(model.config)
    if recorded is not None and recorded.encoding is not None:
        raise LmcompressError(
            "cannot make a model compact whose weights are packed: make it compact first, or take the dense model that "
            "lmcompress.checkpoint.encoding.unpacked(model) gives"
        )
    for name, module in model.named_modules():
        if is_parametrized(module):
            raise LmcompressError(
                f"cannot make a model compact while {name} is parametrized: finish what does that (fake quantization, "
                "masks, shared weights) first"
            )
    blocks = list(anatomy_of(model).block_list)
    if len(set(shared_sources(blocks))) < len(blocks):
        raise LmcompressError(
            "cannot replace matrices in a model whose blocks share their parameters: replace them first, and let the "
            "blocks share afterwards (share_layers)"
        )


def projections(
    model: PreTrainedModel, parts: Sequence[str] | None, blocks: Sequence[int] | None
) -> tuple[list[Projection], dict[str, str]]:
    """Matrices of the blocks that can be replaced.

    Args:
        model: a model of a known family.
        parts: the family's names of them, or patterns: ``*`` and ``?`` are wildcards; default: all that it has.
        blocks: numbers of blocks, counted from 0; default: all.

    Returns:
        The matrices; and by path, why other requested ones must stay.

    Raises:
        LmcompressError: If a part or block does not exist, there is nothing to replace, or a matrix requested by name
            is compact already.
    """
    anatomy = anatomy_of(model)
    has = [part for part in PARTS if any(getattr(stack, part) for stack in anatomy.family.stacks)]
    patterns = ["*"] if parts is None else list(parts)
    for pattern in patterns:
        if not any(fnmatchcase(part, pattern) for part in has):
            raise LmcompressError(f"{anatomy.family.model_type} has no part {pattern!r}{nearest(pattern, has)}")
    wanted = [part for part in has if any(fnmatchcase(part, pattern) for pattern in patterns)]
    found: list[Projection] = []
    left: dict[str, str] = {}
    for index in block_numbers(model, blocks):
        block = anatomy.blocks[index]
        for part in (part for part in wanted if getattr(block.family, part)):
            path = f"{anatomy.path(index)}.{getattr(block.family, part)}"
            if mixing_of(block) is not None and part in ATTENTION_READERS:
                left[path] = "its block mixes neighbours and does not attend"
                continue
            module = block.get(part)
            if isinstance(module, ZeroWidthLinear):
                left[path] = "pruned to nothing"
                continue
            check_replaceable(module, path)
            found.append(Projection(path, index, part, module, _sections(block, part)))
    if not found:
        raise LmcompressError(f"there must be something to replace, got nothing: {_first(left)}")
    return found, left


def _sections(block: Block, part: str) -> tuple[int, ...]:
    """The parts of a matrix's output that are side by side; one if it is a single matrix."""
    for kind in ("heads", "neurons"):
        for coupled in block.coupled(kind):
            if coupled.part == part and coupled.side == "in":
                return tuple(block.units(kind) * size for size in coupled.sections)
    return (out_features(block.get(part)),)


def block_numbers(model: PreTrainedModel, blocks: Sequence[int] | None) -> list[int]:
    """Numbers of blocks, checked.

    Args:
        model: the model.
        blocks: counted from 0; default: all.

    Returns:
        The numbers.

    Raises:
        LmcompressError: If there are none, one is repeated, or one does not exist.
    """
    count = len(anatomy_of(model).block_list)
    numbers = list(range(count)) if blocks is None else list(blocks)
    if not numbers or len(set(numbers)) != len(numbers) or not all(0 <= number < count for number in numbers):
        raise LmcompressError(f"blocks must be numbers from 0 to {count - 1}, without repetition, got {numbers}")
    return numbers


def second_moments(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], batches: Iterable[Batch] | None
) -> dict[str, Tensor | None]:
    """Second moments of modules' inputs, as the mean of ``x xᵀ`` over real tokens.

    Args:
        model: temporarily in evaluation mode.
        modules: by name.
        batches: model inputs; None: no statistics.

    Returns:
        By name ``(in, in)`` float64 on the CPU, or None for all.

    Raises:
        LmcompressError: If there is no batch, or none with a token that is not padding.
    """
    if batches is None:
        return {name: None for name in modules}
    sums = {name: torch.zeros(in_features(m), in_features(m), dtype=torch.float64) for name, m in modules.items()}
    tokens = dict.fromkeys(modules, 0)

    def take(name: str) -> Callable[[Tensor, Tensor], None]:
        def add(x: Tensor, mask: Tensor) -> None:
            # DistilBERT and GPT-2 may flatten rows and positions
            rows = without_padding(x.reshape(*mask.shape, -1), mask).double().cpu()
            sums[name] += rows.t() @ rows
            tokens[name] += len(rows)

        return add

    run(model, batches, {module: take(name) for name, module in modules.items()})
    return {name: total / max(tokens[name], 1) for name, total in sums.items()}


def run(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    reads: Mapping[nn.Module, Callable[[Tensor, Tensor], None]],
    writes: Mapping[nn.Module, Callable[[Tensor, Tensor], None]] | None = None,
) -> None:
    """Run a model over data and pass on inputs and outputs of modules.

    Args:
        model: switched to evaluation mode and back.
        batches: model inputs; entries the model does not take are ignored.
        reads: called with a module's input and the mask ``(rows, length)``, by module.
        writes: called with a module's output in the same way.

    Raises:
        LmcompressError: If there is no batch, or none with a token that is not padding.
    """
    mask = targets = torch.ones(0)
    of_decoder = _of_decoder(model)
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, take=take: take(args[0].detach(), targets if module in of_decoder else mask)
        )
        for module, take in reads.items()
    ]
    handles += [
        module.register_forward_hook(
            lambda module, args, output, take=take: take(output.detach(), targets if module in of_decoder else mask)
        )
        for module, take in (writes or {}).items()
    ]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            for batch in calibration_batches(model, batches):
                mask = valid_tokens(batch)
                targets = valid_targets(batch) if of_decoder else mask
                model(**batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def _of_decoder(model: PreTrainedModel) -> set[nn.Module]:
    """The modules of a decoder that see its own tokens, and not those of the encoder that it reads."""
    blocks = [block for block in anatomy_of(model).blocks if block.looks_back]
    of_encoder = {block.get(part) for block in blocks for part in CROSS[1:3]}
    return {module for block in blocks for module in block.module.modules()} - of_encoder


def _first(left: Mapping[str, str]) -> str:
    return "; ".join(f"{path}: {why}" for path, why in list(left.items())[:3])
