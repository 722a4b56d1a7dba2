"""Sparsity patterns: anywhere, n of every m, or in blocks; and masks of exact size from scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from lmcompress.errors import LmcompressError


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Unstructured(_Part):
    """Zeros anywhere."""

    kind: Literal["unstructured"] = "unstructured"


class NOfM(_Part):
    """Of every m successive weights in a row, n are kept: sparse tensor cores need 2:4."""

    kind: Literal["n_of_m"] = "n_of_m"
    n: Annotated[int, Field(ge=1, description="Number of weights kept in a group.")] = 2
    m: Annotated[int, Field(ge=2, description="Group size; must divide the inputs of every matrix.")] = 4

    @model_validator(mode="after")
    def _fits(self) -> NOfM:
        if self.n > self.m:
            raise ValueError(f"n must be at most m, got {self.n}:{self.m}: of {self.m} weights {self.n} cannot stay")
        return self


class Blocks(_Part):
    """Zeros in blocks, which must divide all matrices."""

    kind: Literal["blocks"] = "blocks"
    rows: Annotated[int, Field(ge=1, description="Number of outputs of a block.")] = 4
    columns: Annotated[int, Field(ge=1, description="Number of inputs of a block.")] = 4


Pattern = Annotated[Unstructured | NOfM | Blocks, Field(discriminator="kind")]


def keep_largest(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Masks of the highest scores of several tensors together, with exactly the requested number.

    Args:
        scores: of any shapes, on one device, without NaN.
        keep: number of weights to keep; all if there are no more.

    Returns:
        For each tensor a bool of its shape, True where the weight is kept. Among equal scores the earlier ones are
        kept.

    Raises:
        LmcompressError: If a number is negative, or a score NaN.

    Example:
        >>> keep_largest([torch.tensor([1.0, 3.0]), torch.tensor([3.0, 3.0])], 2)
        [tensor([False,  True]), tensor([ True, False])]
    """
    if keep < 0:
        raise LmcompressError(f"the number of weights to keep must be at least 0, got {keep}")
    flat = torch.cat([tensor.reshape(-1) for tensor in scores])
    if bool(flat.isnan().any()):
        raise LmcompressError("scores must be numbers, got NaN: are weights, gradients and data finite?")
    if keep == 0 or keep >= len(flat):
        mask = torch.full_like(flat, keep > 0, dtype=torch.bool)
    else:
        least = flat.kthvalue(len(flat) - keep + 1).values
        mask = flat > least
        equal = (flat == least).nonzero().reshape(-1)
        mask[equal[: keep - int(mask.sum())]] = True
    pieces = mask.split([tensor.numel() for tensor in scores])
    return [piece.reshape(tensor.shape) for piece, tensor in zip(pieces, scores, strict=True)]


def keep_in_rows(scores: Tensor, keep: int) -> Tensor:
    """The highest scores of each row separately.

    Args:
        scores: ``(rows, columns)``, without NaN.
        keep: number of weights to keep in each row.

    Returns:
        Bool of the same shape. Among equal scores the earlier ones are kept.

    Raises:
        LmcompressError: If more are to be kept than exist, or a score is NaN.

    Example:
        >>> keep_in_rows(torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0]]), 2)
        tensor([[ True,  True, False],
                [False,  True,  True]])
    """
    if not 0 <= keep <= scores.shape[1]:
        raise LmcompressError(f"0 to {scores.shape[1]} of {scores.shape[1]} weights of a row can be kept, got {keep}")
    if bool(scores.isnan().any()):
        raise LmcompressError("scores must be numbers, got NaN: are weights, gradients and data finite?")
    chosen = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Of every m neighbours in a row, the n with the highest scores.

    Args:
        scores: ``(out, in)``.
        n: number of weights to keep.
        m: size of a group.

    Returns:
        Bool of the same shape. Among equal scores the earlier ones are kept.

    Raises:
        LmcompressError: If m does not divide the inputs, or n is greater than m.

    Reference:
        Mishra et al., *Accelerating Sparse Deep Neural Networks*, 2021, https://arxiv.org/abs/2104.08378, section 3.

    Example:
        >>> keep_n_of_m(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2, 4)
        tensor([[False,  True,  True, False]])
    """
    if n > m:
        raise LmcompressError(f"n must be at most m, got {n}:{m}")
    if scores.shape[1] % m:
        raise LmcompressError(
            f"m must divide the inputs of a matrix, got {m} for {tuple(scores.shape)}; leave the matrix out by a rule"
        )
    return keep_in_rows(scores.reshape(-1, m), n).reshape(scores.shape)


def block_scores(scores: Tensor, rows: int, columns: int) -> Tensor:
    """The sum of the scores in each block.

    Args:
        scores: ``(out, in)``.
        rows: rows of a block.
        columns: columns of a block.

    Returns:
        ``(out / rows, in / columns)``.

    Raises:
        LmcompressError: If blocks do not divide the matrix.

    Example:
        >>> block_scores(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 1, 2)
        tensor([[3., 7.]])
    """
    out, inputs = scores.shape
    if out % rows or inputs % columns:
        raise LmcompressError(
            f"blocks must divide a matrix, got {rows} × {columns} for {out} × {inputs}; leave the matrix out by a rule"
        )
    return scores.reshape(out // rows, rows, inputs // columns, columns).sum(dim=(1, 3))


def expand_blocks(mask: Tensor, rows: int, columns: int) -> Tensor:
    """The mask of weights for a mask of blocks.

    Args:
        mask: ``(blocks along out, blocks along in)``.
        rows: rows of a block.
        columns: columns of a block.

    Returns:
        ``(out, in)``.

    Example:
        >>> expand_blocks(torch.tensor([[True, False]]), 1, 2)
        tensor([[ True,  True, False, False]])
    """
    return mask.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)


def masks_of(scores: Sequence[Tensor], sparsity: float, pattern: Unstructured | NOfM | Blocks) -> list[Tensor]:
    """Masks of matrices that are compared with one another.

    Args:
        scores: scores of each matrix, ``(out, in)``.
        sparsity: share of the weights to remove, in [0, 1]; share of the blocks if zeros come in blocks. For n of m it
            is the share of the way: at 1 n are kept, at 0 all m.
        pattern: pattern of the zeros.

    Returns:
        For each matrix a bool of its shape, True where the weight is kept.

    Raises:
        LmcompressError: If the share is outside [0, 1], a score is NaN, or the pattern does not divide a matrix.
    """
    if not 0 <= sparsity <= 1:
        raise LmcompressError(f"sparsity must be in [0, 1], got {sparsity}")
    if isinstance(pattern, NOfM):
        keep = pattern.m - round(sparsity * (pattern.m - pattern.n))
        return [keep_n_of_m(one, keep, pattern.m) for one in scores]
    if isinstance(pattern, Blocks):
        sums = [block_scores(one, pattern.rows, pattern.columns) for one in scores]
        kept = keep_largest(sums, _kept(sums, sparsity))
        return [expand_blocks(mask, pattern.rows, pattern.columns) for mask in kept]
    return keep_largest(scores, _kept(scores, sparsity))


def _kept(scores: Sequence[Tensor], sparsity: float) -> int:
    total = sum(one.numel() for one in scores)
    return total - round(sparsity * total)
