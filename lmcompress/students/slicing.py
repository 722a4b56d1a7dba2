"""Slicing a smaller model from a larger one, by squared norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError
from lmcompress.families import Block, anatomy_of, out_features, weight_view
from lmcompress.families.coupled import READ_STREAM, ROLES, WRITE_STREAM
from lmcompress.families.matrices import scale_queries


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
    for index, (block, source) in enumerate(zip(new.blocks, chosen, strict=True)):
        _slice_block(block, source, hidden)
        _keep_scale(block, source, index)


def _keep_scale(new: Block, old: Block, index: int) -> None:
    """Multiply into the queries what the teacher's attention owes to the number of its block."""
    for _, query, factor in old.number_factors(index):
        scale_queries(new.module.get_submodule(query), factor, fused=query == old.family.qkv)


def _slice_block(new: Block, old: Block, hidden: Tensor) -> None:
    family = old.family
    axes = _attention_axes(new, old)
    neurons = _best(_neuron_scores(old), new.ffn_width)
    for coupled in old.coupled("neurons"):
        kept = coupled.places(old.ffn_width, neurons)
        axes[coupled.part] = (kept, None) if coupled.side == "in" else (None, kept)
    done = set()
    for part, (rows, columns) in axes.items():
        target, source = new.get(part), old.get(part)
        rows, columns = hidden if rows is None else rows, hidden if columns is None else columns
        weight_view(target).copy_(weight_view(source)[rows][:, columns])
        if isinstance(source.bias, Tensor):
            if not isinstance(target.bias, Tensor):
                raise LmcompressError(
                    f"{part} has a bias in the teacher and none in a model that its config describes: a slice needs "
                    "stock layers; use by_layers, or initialise='random'"
                )
            target.bias.copy_(source.bias[rows])
        done.add(getattr(family, part))
    theirs = dict(old.module.named_parameters())
    for name, parameter in new.module.named_parameters():
        if name.rpartition(".")[0] not in done:
            parameter.copy_(_cut_hidden(theirs[name], parameter.shape, hidden, name))


def _neuron_scores(block: Block) -> Tensor:
    """The squared norm of all weights that are cut with each neuron."""
    width, total = block.ffn_width, torch.zeros(block.ffn_width, device=weight_view(block.get("ffn_out")).device)
    for coupled in block.coupled("neurons"):
        squares = _squares(block.get(coupled.part), 0 if coupled.side == "in" else 1)
        for view in coupled.views(squares, width):
            total = total + view.reshape(width, -1).sum(1)
    return total


def _attention_axes(new: Block, old: Block) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """For each matrix of attention the rows and columns to keep; None for the hidden size's own."""
    heads, size, queries = old.num_heads, old.head_size, old.queries
    written = _squares(old.get("attention_out"), 1)
    shapes = {"query": (heads, queries, size), "key": (heads, 1, size), "value": (heads, 1, size)}
    places = {role: old.rows(role) for role in ROLES}
    norms = {role: _squares(old.get(part), 0)[rows.to(written.device)] for role, (part, rows) in places.items()}
    of_heads = {role: norm.view(shapes[role]).sum(1) for role, norm in norms.items()}
    scores = of_heads["query"] + of_heads["key"]
    contents = of_heads["value"] + written.view(heads, queries, size).sum(1)
    best = _best((scores + contents).sum(1), new.num_heads)
    asked, told = (_best(norm[best], new.head_size) for norm in (scores, contents))

    def entries(dimensions: Tensor, copies: int) -> Tensor:
        """Places of some dimensions of the chosen heads on an axis where each head has several of its size."""
        firsts = (best[:, None] * copies + torch.arange(copies, device=best.device)) * size
        return (firsts[:, :, None] + dimensions[:, None]).flatten()

    chosen = {"query": entries(asked, queries), "key": entries(asked, 1), "value": entries(told, 1)}
    rows_kept: dict[str, Tensor] = {}
    for role, (part, rows) in places.items():
        kept = rows_kept.setdefault(part, best.new_empty(out_features(new.get(part))))
        kept[new.rows(role)[1].to(best.device)] = rows.to(best.device)[chosen[role]]
    axes: dict[str, tuple[Tensor | None, Tensor | None]] = {"attention_out": (None, entries(told, queries))}
    return axes | {part: (kept, None) for part, kept in rows_kept.items()}


def _hidden_scores(teacher: PreTrainedModel, blocks: Sequence[Block]) -> Tensor:
    embeddings = anatomy_of(teacher).embedding("word_embeddings")
    hidden = anatomy_of(teacher).hidden_size
    total = torch.zeros(hidden, device=teacher.device)
    # ELECTRA's embeddings may have a width of their own
    table = None if embeddings is None else embeddings.weight
    if isinstance(table, Tensor) and table.shape[1] == hidden:
        total += _share(table.detach().float().square().sum(0))
    for block in blocks:
        for part in READ_STREAM:
            if getattr(block.family, part):
                total += _share(_squares(block.get(part), 1))
        for part in WRITE_STREAM:
            if getattr(block.family, part):
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
