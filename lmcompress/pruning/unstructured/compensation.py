"""Pruning whose error the remaining weights compensate: SparseGPT's optimal brain surgeon, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.activations.hessian import check_hessian, exact, inverse_factor, output_error
from lmcompress.activations.running import evaluating
from lmcompress.activations.walking import Walk, calibration_batches, without_padding
from lmcompress.errors import LmcompressError
from lmcompress.families import FAMILIES, STAGES
from lmcompress.pruning.unstructured.config import SparsityConfig
from lmcompress.pruning.unstructured.patterns import Blocks, NOfM, Unstructured, keep_largest, masks_of
from lmcompress.pruning.unstructured.planning import Planned, choose
from lmcompress.pruning.unstructured.scoring import look

Choose = Callable[[Tensor, int], Tensor]
"""``(scores (out, columns), number of the first column) -> bool of that shape``, True where the weight is kept."""

BLOCK = 128


def compensate(
    weight: Tensor, hessian: Tensor, choose: Choose, *, damping: float = 0.01, block_size: int = BLOCK
) -> tuple[Tensor, Tensor]:
    r"""Prune weights column by column; the later columns compensate the error of the output.

    With H = XᵀX of the inputs and :math:`H^{-1} = U^T U`, U upper triangular, removing :math:`w_j` costs
    :math:`w_j^2 / U_{jj}^2`, the score passed to ``choose``, and for each column j in turn

    .. math:: e = w_j (1 - m_j) / U_{jj}, \qquad w_k \leftarrow w_k - e\, U_{jk} \quad (k > j)

    Rows that would have a larger error are left uncompensated, so that the result is never worse than the mask alone in
    error of :func:`~lmcompress.activations.hessian.output_error`.

    Args:
        weight: ``(out, in)``, floating.
        hessian: ``(in, in)``, Σ x xᵀ over the module's inputs, any scale.
        choose: selects the weights to keep; called once per block of columns, with weights that compensate earlier
            ones.
        damping: fraction of the mean of H's diagonal that is added to the diagonal, > 0.
        block_size: columns of a block.

    Returns:
        ``(out, in)`` float32 with exact zeros, and the mask.

    Raises:
        LmcompressError: If the Hessian has another shape, is not finite or is all zero, a weight is NaN or
            infinite, or damping or block size is not > 0.

    Reference:
        Frantar & Alistarh, *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot*, ICML 2023,
        https://arxiv.org/abs/2301.00774, algorithm 1, sections 3.2 to 3.4; Hassibi & Stork, *Optimal Brain Surgeon*,
        1993, for the score and the update. They do not check for rows whose error grows.

    Example:
        >>> both = torch.tensor([[2.0, 2.0], [2.0, 2.0]])  # two inputs that are always the same
        >>> second_alone = lambda scores, first: torch.tensor([[False, True]])
        >>> compensate(torch.tensor([[1.0, 1.0]]), both, second_alone, damping=1e-6)[0]
        tensor([[0.0000, 2.0000]])
    """
    check_hessian(weight, hessian, damping, block_size)
    h, left = exact(hessian), exact(weight).clone()
    if weight.numel() == 0:
        return weight.detach().float(), torch.ones_like(weight, dtype=torch.bool)
    upper = inverse_factor(h, damping)
    columns = weight.shape[1]
    mask = torch.ones_like(left, dtype=torch.bool)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, errors = left[:, start:end], torch.empty_like(left[:, start:end])
        scores = (block / upper.diagonal()[start:end]).square()
        mask[:, start:end] = choose(scores.float(), start).to(mask.device)
        for j in range(start, end):
            column = block[:, j - start]
            error = torch.where(mask[:, j], 0.0, column) / upper[j, j]
            errors[:, j - start] = error
            block[:, j - start + 1 :] -= torch.outer(error, upper[j, j + 1 : end])
        left[:, end:] -= errors @ upper[start:end, end:]
    values, plain = (torch.where(mask, one, 0.0) for one in (left, exact(weight)))
    better = output_error(weight, values.float(), h) <= output_error(weight, plain, h)
    values = torch.where(better[:, None], values, plain)
    return values.float().to(weight.device), mask.to(weight.device)


def choosing(sparsity: float, pattern: Unstructured | NOfM | Blocks, kept: Tensor | None = None) -> tuple[Choose, int]:
    """SparseGPT's choice: the same share of each block of columns is pruned.

    Args:
        sparsity: share to remove, as for :func:`~lmcompress.pruning.unstructured.patterns.masks_of`.
        pattern: pattern of the zeros.
        kept: ``(out, in)`` bool: False for pruned weights, which stay pruned whatever their score.

    Returns:
        The ``choose`` of :func:`compensate`, and the number of columns it must be called with.
    """
    done = [0, 0]

    def choose(scores: Tensor, first: int) -> Tensor:
        before = None if kept is None else kept[:, first : first + scores.shape[1]]
        if before is not None:
            scores = scores.masked_fill(~before, -1.0)
        if isinstance(pattern, Unstructured):
            # shares of blocks are rounded so that the sum is exact
            done[0] += scores.numel()
            wanted = max(0, round(sparsity * done[0]) - done[1])
            mask = keep_largest([scores], scores.numel() - wanted)[0]
        else:
            mask = masks_of([scores], sparsity, pattern)[0]
        mask = mask if before is None else mask & before
        done[1] += int((~mask).sum())
        return mask

    if isinstance(pattern, NOfM):
        return choose, pattern.m
    columns = pattern.columns if isinstance(pattern, Blocks) else 1
    return choose, max(columns, BLOCK // columns * columns)


def given(mask: Tensor) -> Choose:
    """The choice given by a known mask.

    Args:
        mask: ``(out, in)`` bool.

    Returns:
        The ``choose`` of :func:`compensate`.
    """
    return lambda scores, first: mask[:, first : first + scores.shape[1]]


def compensated(
    one: Planned,
    weight: Tensor,
    hessian: Tensor | None,
    config: SparsityConfig,
    share: float,
    kept: Tensor,
    chosen: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Prune one matrix as configured, using the statistics of its inputs.

    Args:
        one: the matrix.
        weight: ``(out, in)``.
        hessian: ``(in, in)``, Σ x xᵀ over its inputs; None for embeddings, whose rows are read one at a time.
        config: configuration with pattern and damping.
        share: share of the way to the target.
        kept: ``(out, in)`` bool, False for pruned weights.
        chosen: ``(out, in)`` bool, the mask of a criterion; None: SparseGPT's choice.

    Returns:
        ``(out, in)`` float32, None if the remaining weights do not change, and the mask.

    Raises:
        LmcompressError: As :func:`compensate`.
    """
    if hessian is None or not bool((hessian.diagonal() > 0).any()):
        mask = choose([one], config, [weight.float().abs()], share)[0] if chosen is None else chosen
        return None, mask & kept
    if chosen is None:
        choice, size = choosing((one.sparsity or 0.0) * share, config.pattern, kept)
    else:
        choice, size = given(chosen & kept), BLOCK
    try:
        return compensate(weight, hessian.to(weight.device), choice, damping=config.damping, block_size=size)
    except LmcompressError as error:
        raise LmcompressError(f"{one.path}: {error}") from error


Prune = Callable[[Planned, Tensor | None], None]
"""``(matrix, Σ x xᵀ of its inputs or None if it receives none)``: prunes the matrix in place."""


def in_order(model: nn.Module, planned: Sequence[Planned], batches: Iterable[Mapping[str, Any]], prune: Prune) -> None:
    """Prune matrices one after another, each on the outputs of those before it.

    In a known family block by block (query, key and value, then the modules they feed); in other models in the order of
    the model's modules. Embeddings have no sum that other weights could compensate, and come first.

    Args:
        model: in any mode, which is restored.
        planned: matrices to prune.
        batches: inputs of the model.
        prune: called once for each matrix.

    Raises:
        LmcompressError: If there are no data.
    """
    for one in planned:
        if isinstance(one.at.module, nn.Embedding):
            prune(one, None)
    rest = [one for one in planned if not isinstance(one.at.module, nn.Embedding)]
    if isinstance(model, PreTrainedModel) and model.config.model_type in FAMILIES:
        _by_blocks(model, rest, batches, prune)
        return
    data = list(batches)
    for one in rest:
        moments = _Moments(one)
        look(model, {one.at.module: moments.take}, data)
        prune(one, moments.hessian)


def _by_blocks(
    model: PreTrainedModel, planned: Sequence[Planned], batches: Iterable[Mapping[str, Any]], prune: Prune
) -> None:
    walk = Walk(model, calibration_batches(model, batches))

    def stage(matrices: Sequence[Planned], index: int | None) -> None:
        if not matrices:
            return
        moments = {one.path: _Moments(one) for one in matrices}
        takes = {one.at.module: moments[one.path].take_masked for one in matrices}
        if index is None:
            walk.look_outside(takes)
        else:
            walk.look(index, takes)
        for one in matrices:
            prune(one, moments[one.path].hessian)

    with evaluating(model):
        for one in planned:
            if one.at.part == "embedding_projection":
                stage([one], None)
        walk.start()
        for index in range(1 + max((one.at.block for one in planned if one.at.block is not None), default=-1)):
            own = [one for one in planned if one.at.block == index]
            for parts in STAGES:
                stage([one for one in own if one.at.part in parts], index)
            walk.step(index)
        for one in planned:
            if one.at.block is None and one.at.part != "embedding_projection":
                stage([one], None)


class _Moments:
    """Second moments of a module's inputs."""

    def __init__(self, planned: Planned) -> None:
        self._module = planned.at.module
        self.hessian: Tensor | None = None

    def take(self, x: Tensor) -> None:
        rows = x.float()
        if len(rows):
            square = exact(rows.T @ rows)
            self.hessian = square if self.hessian is None else self.hessian + square

    def take_masked(self, x: Tensor, mask: Tensor) -> None:
        self.take(without_padding(x, mask))
