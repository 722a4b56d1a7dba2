"""Block-diagonal matrices with shuffled channels between them; and folding the shuffles away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.layers import grouped_place, put, record_layers
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import weight_view
from lmcompress.families.refusal import refuse_unproven
from lmcompress.nn.grouped import GroupedLinear, channel_shuffle, check_groups
from lmcompress.students._choosing import Batch, Projection, check_ready, projections, second_moments
from lmcompress.students.report import Before, CompactReport

Shuffle = Literal["none", "channel", "fitted"]
SHUFFLES: tuple[Shuffle, ...] = ("none", "channel", "fitted")
_SHUFFLED = ("attention_out", "ffn_out")


def group(
    model: PreTrainedModel,
    groups: int,
    *,
    shuffle: Shuffle = "fitted",
    activations: Iterable[Batch] | None = None,
    parts: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
) -> CompactReport:
    """Replace matrices of the blocks by block-diagonal ones: ``1 / groups`` of their parameters and operations.

    ========= =============================================================================================
    shuffle   input and output channels of each group
    ========= =============================================================================================
    none      adjacent channels. Groups never mix except through attention probabilities and norms
    channel   adjacent channels; but ``attention_out`` and ``ffn_out`` read the channels in ShuffleNet's order, so
              that each of their groups reads every group before them
    fitted    the channels whose weights hold the most energy together, alternating between rows and columns
    ========= =============================================================================================

    Each block is the least-squares fit to its part of the matrix: the matrix's own entries, or on data the weights that
    best reproduce the outputs from the remaining inputs, ``W C[:, J] C[J, J]^-1`` with ``C`` the second
    moment of the input.

    Args:
        model: modified in place once everything has been checked, including its config. On ``meta`` only shapes
            are; fitted channels are assumed to be permuted, and ``activations`` are ignored.
        groups: a divisor of all widths concerned, at least 2.
        shuffle: see above.
        activations: batches of model inputs to fit on.
        parts: the family's names of the matrices, or patterns such as ``ffn_*``; default: all of the blocks.
        blocks: numbers of the blocks; default: all.

    Returns:
        The replacements and their cost.

    Raises:
        LmcompressError: If groups do not divide a width, the shuffle is unknown, a part or block does not exist, or the
            model is packed, parametrized or shares its blocks.

    Reference:
        Zhang et al., *ShuffleNet*, CVPR 2018, https://arxiv.org/abs/1707.01083, section 3.1; Iandola et al.,
        *SqueezeBERT*, 2020, https://arxiv.org/abs/2006.11316, section 3, which groups without shuffling.

    Note:
        Both train from scratch. Query, key and value of GPT-2 are one matrix: each is grouped separately.
    """
    if shuffle not in SHUFFLES:
        raise LmcompressError(f"unknown shuffle {shuffle!r}{nearest(str(shuffle), SHUFFLES)}")
    if groups < 2:
        raise LmcompressError(f"groups must be at least 2, got {groups}; one group is the matrix that is there")
    check_ready(model)
    refuse_unproven(model, "compact")
    found, left = projections(model, parts, blocks)
    for one in found:
        columns = weight_view(one.module).shape[1]
        try:
            for section in one.sections:
                check_groups(groups, columns, section)
        except LmcompressError as error:
            raise LmcompressError(f"{one.path}: {error}") from error
    before = Before.of(model)
    on_meta = model.device.type == "meta"
    moments = second_moments(model, {one.path: one.module for one in found}, None if on_meta else activations)
    made, errors = {}, {}
    for one in found:
        if on_meta:
            made[one.path] = _grouped_shape(one, groups, shuffle)
        else:
            made[one.path], errors[one.path] = _grouped(one, groups, shuffle, moments[one.path])
    # all at once: an error leaves the model unchanged
    for path, new in made.items():
        put(model, path, new)
    record_layers(model)
    changed = dict.fromkeys(made, f"{groups} groups, shuffle {shuffle}")
    return before.report(model, changed, left, errors)


def assign_channels(energy: Tensor, groups: int, *, rounds: int = 20) -> tuple[Tensor, Tensor]:
    """Assign rows and columns of a matrix to equal groups, so that as much energy as possible is within groups.

    Rows are assigned by their energy in each group of columns, then columns by rows, until nothing is gained. Each
    half first assigns those that would lose the most elsewhere. It starts from the existing order, so the
    result is never worse than that.

    Args:
        energy: ``(rows, columns)``, at least 0.
        groups: a divisor of both.
        rounds: maximum number of rounds.

    Returns:
        Orders ``(rows,)`` and ``(columns,)`` int64: members of group 0 first, increasing within a group.
    """
    rows, columns = energy.shape
    of_rows = torch.arange(rows) // (rows // groups)
    of_columns = torch.arange(columns) // (columns // groups)
    best = _held(energy, of_rows, of_columns)
    for _ in range(rounds):
        new_rows = _balanced(_by_group(energy, of_columns, groups), rows // groups)
        new_columns = _balanced(_by_group(energy.t(), new_rows, groups), columns // groups)
        held = _held(energy, new_rows, new_columns)
        if not held > best * (1 + 1e-9):
            break
        best, of_rows, of_columns = held, new_rows, new_columns
    return of_rows.argsort(stable=True), of_columns.argsort(stable=True)


def fit_groups(weight: Tensor, row_order: Tensor, column_order: Tensor, groups: int, moment: Tensor | None) -> Tensor:
    """Diagonal blocks that best fit a matrix for given groups.

    Args:
        weight: ``(out, in)`` float64.
        row_order: order of the rows, members of group 0 first.
        column_order: order of the columns, members of group 0 first.
        groups: number of groups.
        moment: ``(in, in)`` second moment of the input, or None.

    Returns:
        ``(groups, out / groups, in / groups)`` float64.
    """
    blocks = []
    for rows, columns in zip(row_order.chunk(groups), column_order.chunk(groups), strict=True):
        if moment is None:
            blocks.append(weight[rows][:, columns])
            continue
        inner = moment[columns][:, columns]
        damping = 1e-8 * inner.diagonal().mean().clamp(min=1e-30)
        inner = inner + damping * torch.eye(len(columns), dtype=inner.dtype)
        blocks.append(torch.linalg.solve(inner, (weight[rows] @ moment[:, columns]).t()).t())
    return torch.stack(blocks)


def _grouped_shape(one: Projection, groups: int, shuffle: Shuffle) -> GroupedLinear:
    """The result of :func:`_grouped`, without values."""
    fitted = shuffle == "fitted"
    reads = fitted or (shuffle == "channel" and one.part in _SHUFFLED)
    new = grouped_place(one.module, groups, input_order=reads, output_order=fitted or len(one.sections) > 1)
    return new.requires_grad_(weight_view(one.module).requires_grad)


def _grouped(one: Projection, groups: int, shuffle: Shuffle, moment: Tensor | None) -> tuple[GroupedLinear, float]:
    old, weight = one.module, weight_view(one.module).detach().double().cpu()
    if not bool(torch.isfinite(weight).all()):
        raise LmcompressError(f"{one.path} must be finite to be grouped, got NaN or infinite weights")
    rows, columns = weight.shape
    column_order = torch.arange(columns)
    # group j has the j-th part of each section: of the queries, of the keys and of the values
    sections = [section.chunk(groups) for section in torch.arange(rows).split(list(one.sections))]
    row_order = torch.cat([part for parts in zip(*sections, strict=True) for part in parts])
    if shuffle == "fitted":
        scale = torch.ones(columns, dtype=torch.float64) if moment is None else moment.diagonal()
        energy = weight.square() * scale
        given_rows = row_order
        row_order, column_order = assign_channels(energy[given_rows], groups)
        row_order = given_rows[row_order]
    elif shuffle == "channel" and one.part in _SHUFFLED:
        column_order = channel_shuffle(columns, groups)
    blocks = fit_groups(weight, row_order, column_order, groups, moment)
    reads = not torch.equal(column_order, torch.arange(columns))
    writes = not torch.equal(row_order, torch.arange(rows))
    new = grouped_place(old, groups, input_order=reads, output_order=writes)
    with torch.no_grad():
        new.weight.copy_(blocks)
        if new.input_order is not None:
            new.input_order.copy_(column_order)
        if new.output_order is not None:
            new.output_order.copy_(row_order.argsort())
        if new.bias is not None and isinstance(old.bias, Tensor):
            new.bias.copy_(old.bias)
    new.requires_grad_(weight_view(old).requires_grad)
    missed = weight - new.matrix().detach().double().cpu()
    metric = torch.eye(columns, dtype=torch.float64) if moment is None else moment
    whole = float(((weight @ metric) * weight).sum())
    return new, float(((missed @ metric) * missed).sum()) / whole if whole > 0 else 0.0


def _by_group(energy: Tensor, of_columns: Tensor, groups: int) -> Tensor:
    """``(rows, groups)``: energy of each row in each group of columns."""
    return energy @ nn.functional.one_hot(of_columns, groups).to(energy.dtype)


def _balanced(gains: Tensor, size: int) -> Tensor:
    """A group for each row, ``size`` rows in each: first those that lose the most by their second choice."""
    ranked = gains.argsort(dim=1, descending=True, stable=True)
    top = gains.gather(1, ranked[:, :2])
    hurry = (top[:, 0] - top[:, 1]).argsort(descending=True, stable=True)
    room = [size] * gains.shape[1]
    chosen = torch.empty(len(gains), dtype=torch.long)
    choices = ranked.tolist()
    for row in hurry.tolist():
        where = next(j for j in choices[row] if room[j])
        room[where] -= 1
        chosen[row] = where
    return chosen


def _held(energy: Tensor, of_rows: Tensor, of_columns: Tensor) -> float:
    return float(energy[of_rows[:, None] == of_columns[None, :]].sum())
