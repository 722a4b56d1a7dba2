"""Slicing a smaller model from a larger one, by squared norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError
from lmcompress.families import Block, anatomy_of, weight_view


def refuse_growth(new: Block, old: Sequence[Block]) -> None:
    """Refuse a block that is larger than those it is to be sliced from.

    Args:
        new: shape of the student's block.
        old: shapes of the teacher's blocks.

    Raises:
        LmcompressError: If it has more heads or neurons, or wider heads.
    """
    sizes = {
        "num_heads": (new.num_heads, min(block.num_heads for block in old)),
        "the width of a head": (new.head_size, min(block.head_size for block in old)),
        "intermediate_size": (new.ffn_width, min(block.ffn_width for block in old)),
    }
    for what, (wanted, there) in sizes.items():
        if wanted > there:
            raise LmcompressError(
                f"a slice cannot be larger than the teacher: {what} would be {wanted}, the teacher's blocks have "
                f"{there}. Ask for at most {there}, or use initialise='random'"
            )


def slice_into(student: PreTrainedModel, teacher: PreTrainedModel, kept: Sequence[int]) -> None:
    """Copy into a student the parts of a teacher's tensors that have the largest norms.

    Args:
        student: modified in place.
        teacher: at least as large.
        kept: for each block of the student the teacher's block.

    Raises:
        LmcompressError: If the student is wider than the teacher.
    """
    new, old = anatomy_of(student), anatomy_of(teacher)
    if new.hidden_size > old.hidden_size:
        raise LmcompressError(
            f"a slice cannot be wider than the teacher: hidden_size {new.hidden_size}, the teacher has "
            f"{old.hidden_size}. Use initialise='random'"
        )
    chosen = [old.blocks[i] for i in kept]
    hidden = _best(_hidden_scores(teacher, chosen), new.hidden_size)
    inside = {id(parameter) for parameter in new.block_list.parameters()}
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    for name, parameter in student.named_parameters():
        if id(parameter) not in inside and name in theirs:
            parameter.copy_(_cut_hidden(theirs[name], parameter.shape, hidden, name))
    for block, source in zip(new.blocks, chosen, strict=True):
        _slice_block(block, source, hidden)


def _slice_block(new: Block, old: Block, hidden: Tensor) -> None:
    family = old.family
    axes = _attention_axes(new, old)
    neurons = _best(_squares(old.get("ffn_in"), 0) + _squares(old.get("ffn_out"), 1), new.ffn_width)
    axes |= {"ffn_in": (neurons, None), "ffn_out": (None, neurons)}
    done = set()
    for part, (rows, columns) in axes.items():
        target, source = new.get(part), old.get(part)
        rows, columns = hidden if rows is None else rows, hidden if columns is None else columns
        weight_view(target).copy_(weight_view(source)[rows][:, columns])
        if isinstance(source.bias, Tensor):
            assert isinstance(target.bias, Tensor)
            target.bias.copy_(source.bias[rows])
        done.add(getattr(family, part))
    theirs = dict(old.module.named_parameters())
    for name, parameter in new.module.named_parameters():
        if name.rpartition(".")[0] not in done:
            parameter.copy_(_cut_hidden(theirs[name], parameter.shape, hidden, name))


def _attention_axes(new: Block, old: Block) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """For each matrix of attention the rows and columns to keep; None for the hidden size's own."""
    heads, size = old.num_heads, old.head_size
    width = heads * size
    if old.family.qkv:
        norms = list(_squares(old.get("qkv"), 0).split(width))
    else:
        norms = [_squares(old.get(part), 0) for part in ("query", "key", "value")]
    scores = (norms[0] + norms[1]).view(heads, size)
    contents = (norms[2] + _squares(old.get("attention_out"), 1)).view(heads, size)
    best = _best((scores + contents).sum(1), new.num_heads)
    queries, values = (
        (best[:, None] * size + _best(norm[best], new.head_size)).flatten() for norm in (scores, contents)
    )
    axes: dict[str, tuple[Tensor | None, Tensor | None]] = {"attention_out": (None, values)}
    if old.family.qkv:
        return axes | {"qkv": (torch.cat([queries, queries + width, values + 2 * width]), None)}
    return axes | {"query": (queries, None), "key": (queries, None), "value": (values, None)}


def _hidden_scores(teacher: PreTrainedModel, blocks: Sequence[Block]) -> Tensor:
    embeddings = anatomy_of(teacher).embedding("word_embeddings")
    hidden = anatomy_of(teacher).hidden_size
    total = torch.zeros(hidden, device=teacher.device)
    # ELECTRA's embeddings may have a width of their own
    table = None if embeddings is None else embeddings.weight
    if isinstance(table, Tensor) and table.shape[1] == hidden:
        total += _share(table.detach().float().square().sum(0))
    for block in blocks:
        for part, axis in (("qkv", 1), ("query", 1), ("key", 1), ("value", 1), ("ffn_in", 1)):
            if getattr(block.family, part):
                total += _share(_squares(block.get(part), axis))
        for part in ("attention_out", "ffn_out"):
            total += _share(_squares(block.get(part), 0))
    return total


def _squares(module: nn.Module, axis: int) -> Tensor:
    """The squared norm of each row (``axis`` 0) or column (1) of a matrix seen as ``(out, in)``."""
    return weight_view(module).detach().float().square().sum(1 - axis)


def _share(squares: Tensor) -> Tensor:
    return squares / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)


def _best(scores: Tensor, keep: int) -> Tensor:
    """Indices of the ``keep`` highest scores on the last axis, increasing; among equal scores the first ones."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :keep].sort(dim=-1).values


def _cut_hidden(source: Tensor, shape: torch.Size, hidden: Tensor, name: str) -> Tensor:
    """``source`` sliced to ``shape``: outside a block's matrices, the axes that differ are of the hidden size."""
    for axis, (old, new) in enumerate(zip(source.shape, shape, strict=True)):
        if old != new:
            if new != len(hidden) or old <= new:
                raise LmcompressError(f"{name} has shape {tuple(source.shape)} in the teacher, {tuple(shape)} here")
            source = source.index_select(axis, hidden)
    return source
