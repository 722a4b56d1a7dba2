"""Low-rank factors in place of matrices and of the token embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.layers import check_replaceable, factorized_place, low_rank_place, put, record_layers
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, in_features, out_features, weight_view
from lmcompress.families.refusal import refuse_unproven
from lmcompress.students._choosing import Batch, check_ready, projections, second_moments
from lmcompress.students.report import Before, CompactReport


class Factors:
    r"""The singular values and vectors of a matrix, in the metric of its inputs.

    With :math:`C = E[x x^T] = S S^T`, the matrix of rank r that minimizes :math:`E \|W x - \hat W x\|^2` is
    :math:`\hat W = U_r \Sigma_r V_r^T S^{-1}` where :math:`U \Sigma V^T = W S`; without data :math:`S = I` and it is
    the truncated SVD (Eckart-Young).

    Args:
        weight: ``(out, in)``.
        moment: :math:`C`, ``(in, in)``, or None.

    Raises:
        LmcompressError: If the weight is not finite.

    Reference:
        Yuan et al., *ASVD*, 2023, https://arxiv.org/abs/2312.05821, section 3; Wang et al., *SVD-LLM*, 2024,
        https://arxiv.org/abs/2403.07378, section 3.1 ("truncation-aware data whitening").

    Note:
        SVD-LLM uses the Cholesky factor of C. The symmetric root by eigenvalues is equivalent and needs no C of full
        rank: directions absent from the data are truncated first, at no cost.
    """

    def __init__(self, weight: Tensor, moment: Tensor | None = None) -> None:
        matrix = weight.detach().double().cpu()
        if not bool(torch.isfinite(matrix).all()):
            raise LmcompressError("a matrix to factorise must be finite, got NaN or infinite weights")
        self.unwhiten: Tensor | None = None
        if moment is not None:
            values, vectors = torch.linalg.eigh(moment)
            # inputs that never occur keep a small weight, so that the inverse exists
            values = values.clamp(min=float(values.max().clamp(min=1e-30)) * 1e-10)
            matrix = matrix @ (vectors * values.sqrt())
            self.unwhiten = (vectors / values.sqrt()).t()
        self.left, self.singular, self.right = torch.linalg.svd(matrix, full_matrices=False)

    def energy(self, rank: int) -> float:
        """Share of the squared output that a rank keeps, in [0, 1].

        Args:
            rank: number of singular values kept.
        """
        squares = self.singular.square()
        total = float(squares.sum())
        return float(squares[:rank].sum()) / total if total > 0 else 1.0

    def at(self, rank: int) -> tuple[Tensor, Tensor]:
        """The two factors ``(out, rank)`` and ``(rank, in)`` float64, of equal norms.

        Args:
            rank: from 1 to the smaller width.
        """
        root = self.singular[:rank].sqrt()
        right = self.right[:rank] if self.unwhiten is None else self.right[:rank] @ self.unwhiten
        up, down = self.left[:, :rank] * root, root[:, None] * right
        # with a metric, the norms differ: an optimizer step should change both equally
        balance = (up.norm() / down.norm().clamp(min=1e-30)).sqrt()
        return (up / balance, down * balance) if float(balance) > 0 else (up, down)


def factorize(
    model: PreTrainedModel,
    *,
    rank: int | None = None,
    energy: float | None = None,
    parameters: float | None = None,
    activations: Iterable[Batch] | None = None,
    parts: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
) -> CompactReport:
    """Replace matrices of the blocks by two factors: the best approximation of their rank.

    Exactly one of ``rank``, ``energy`` and ``parameters`` determines the ranks. Matrices for which factors of that rank
    would not be smaller are unchanged, and listed in the report.

    Args:
        model: modified in place once everything has been checked, including its config. On ``meta`` only shapes
            are: without values all get the same share for ``parameters``, and the highest rank that saves for
            ``energy``; ``activations`` are ignored.
        rank: rank, the same for all.
        energy: for each matrix the lowest rank that keeps this share of the squared singular values, in (0, 1).
        parameters: share of these matrices' parameters to keep in total, in (0, 1); ranks are distributed to keep the
            largest share of energy per parameter.
        activations: batches of model inputs; with them the *output* on this data is fitted instead of the matrix.
        parts: the family's names of the matrices, such as ``["ffn_in", "ffn_out"]`` or ``["ffn_*"]``; default: all
            of the blocks.
        blocks: numbers of the blocks; default: all.

    Returns:
        The replacements and their cost.

    Raises:
        LmcompressError: If not exactly one of the three is given or it is out of range, a rank exceeds a matrix's or
            saves nothing in any, a part or block does not exist, or the model is packed, parametrized or shares its
            blocks.

    Reference:
        Denil et al. 2013, https://arxiv.org/abs/1306.0543; see :class:`Factors` for the fit on data.
    """
    check_goal(rank, energy, parameters)
    check_ready(model)
    refuse_unproven(model, "compact")
    found, left = projections(model, parts, blocks)
    sizes = {one.path: (out_features(one.module), in_features(one.module)) for one in found}
    for path, size in sizes.items():
        if rank is not None and rank > min(size):
            raise LmcompressError(
                f"the rank must be at most {min(size)} for {path}, a matrix of {size[0]}×{size[1]}, got {rank}; leave "
                "it out with parts="
            )
    if parameters is not None:
        _check_budget(sizes, parameters)
    before = Before.of(model)
    factors: dict[str, Factors] = {}
    if model.device.type == "meta":
        ranks = {path: rank or _even_rank(size, parameters) for path, size in sizes.items()}
    else:
        moments = second_moments(model, {one.path: one.module for one in found}, activations)
        factors = {one.path: Factors(weight_view(one.module), moments[one.path]) for one in found}
        ranks = _ranks(sizes, factors, rank, energy, parameters)
    changed, errors = {}, {}
    chosen = []
    for one in found:
        rows, columns = sizes[one.path]
        wanted, most = ranks[one.path], _most((rows, columns))
        if wanted > most:
            left[one.path] = f"a rank of {wanted} saves nothing of a {rows}×{columns} matrix, {most} would"
        else:
            chosen.append((one, wanted))
    if not chosen:
        first, reason = next(iter(left.items()))
        raise LmcompressError(f"factors must be smaller than their matrices, got none that are: {first}: {reason}")
    for one, wanted in chosen:
        put(model, one.path, _low_rank(one.module, factors.get(one.path), wanted))
        changed[one.path] = f"rank {wanted}"
        if one.path in factors:
            errors[one.path] = 1 - factors[one.path].energy(wanted)
    record_layers(model)
    return before.report(model, changed, left, errors)


def factorize_embeddings(model: PreTrainedModel, rank: int) -> CompactReport:
    """Replace the token embeddings, and a head tied to them, by a narrow table and a matrix.

    Args:
        model: modified in place, including its config. On ``meta`` only shapes are.
        rank: width of the table.

    Returns:
        The replacements and their cost.

    Raises:
        LmcompressError: If the rank is above the table's or saves nothing, or the model is packed, parametrized or
            shares its blocks.

    Reference:
        Lan et al., *ALBERT*, 2020, https://arxiv.org/abs/1909.11942, section 3.1. There the factors are trained from
        scratch; here they start as the truncated SVD of the table.
    """
    check_ready(model)
    refuse_unproven(model, "compact")
    path = anatomy_of(model).family.word_embeddings
    old = model.get_input_embeddings()
    check_replaceable(old, path)
    if not isinstance(old, nn.Embedding):
        raise LmcompressError(f"{path} must be a plain nn.Embedding to be factorized, got a {type(old).__name__}")
    before = Before.of(model)
    new = factorized_place(old, rank)
    words, width = old.weight.shape
    most = _most((words, width))
    if rank > most:
        raise LmcompressError(
            f"the rank of the embeddings must be at most {most} to save anything of a {words}×{width} table, got {rank}"
        )
    errors = {}
    if not old.weight.is_meta:
        factors = Factors(old.weight)
        table, expand = factors.at(rank)
        with torch.no_grad():
            new.table.weight.copy_(table)
            new.expand.weight.copy_(expand.t())
        errors[path] = 1 - factors.energy(rank)
    _keep_trainable(new, old.weight)
    put(model, path, new)
    record_layers(model)
    return before.report(model, {path: f"rank {rank}"}, errors=errors)


def _low_rank(old: nn.Module, factors: Factors | None, rank: int) -> nn.Module:
    new = low_rank_place(old, rank)
    if factors is not None:
        up, down = factors.at(rank)
        with torch.no_grad():
            new.expand.weight.copy_(up)
            new.reduce.weight.copy_(down)
            if isinstance(old.bias, Tensor):
                new.expand.bias.copy_(old.bias)
    _keep_trainable(new, weight_view(old))
    return new


def _keep_trainable(new: nn.Module, old: Tensor) -> None:
    new.requires_grad_(old.requires_grad)


def check_goal(rank: int | None, energy: float | None, parameters: float | None) -> None:
    """Refuse ambiguous ranks.

    Args:
        rank: as for :func:`factorize`.
        energy: as for :func:`factorize`.
        parameters: as for :func:`factorize`.

    Raises:
        LmcompressError: If not exactly one of the three is given, or it is out of range.
    """
    given = {name: v for name, v in (("rank", rank), ("energy", energy), ("parameters", parameters)) if v is not None}
    if len(given) != 1:
        raise LmcompressError(
            f"exactly one of rank, energy and parameters must be given, got {', '.join(given) or 'none'}"
        )
    if rank is not None and rank < 1:
        raise LmcompressError(f"rank must be at least 1, got {rank}")
    for name, share in (("energy", energy), ("parameters", parameters)):
        # written this way round so that NaN fails
        if share is not None and not 0 < share < 1:
            raise LmcompressError(f"{name} must be a share between 0 and 1, got {share}")


def _ranks(
    sizes: Mapping[str, tuple[int, int]],
    factors: Mapping[str, Factors],
    rank: int | None,
    energy: float | None,
    parameters: float | None,
) -> dict[str, int]:
    if rank is not None:
        return dict.fromkeys(sizes, rank)
    if energy is not None:
        return {path: _rank_for(f, energy) for path, f in factors.items()}
    assert parameters is not None
    return _spread(sizes, factors, parameters)


def _check_budget(sizes: Mapping[str, tuple[int, int]], share: float) -> None:
    least = sum(map(sum, sizes.values())) / sum(rows * columns for rows, columns in sizes.values())
    if least > share:
        raise LmcompressError(
            f"parameters must leave at least rank 1 everywhere, {least:.3g} of these matrices, got {share}"
        )


def _most(size: tuple[int, int]) -> int:
    """The highest rank at which the factors of a matrix are smaller than it."""
    rows, columns = size
    return (rows * columns - 1) // (rows + columns)


def _even_rank(size: tuple[int, int], share: float | None) -> int:
    """The rank at which a matrix keeps a share of its parameters; without one the highest that saves anything."""
    rows, columns = size
    return max(1, _most(size) if share is None else int(share * rows * columns / (rows + columns)))


def _rank_for(factors: Factors, energy: float) -> int:
    shares = factors.singular.square().cumsum(0)
    enough = int((shares < energy * shares[-1]).sum()) + 1
    return min(enough, len(shares))


def _spread(sizes: Mapping[str, tuple[int, int]], factors: Mapping[str, Factors], share: float) -> dict[str, int]:
    """Ranks that keep the greatest sum of shares of energy within a number of parameters; at least 1 each."""
    ranks = dict.fromkeys(sizes, 1)
    used, budget = sum(map(sum, sizes.values())), share * sum(rows * columns for rows, columns in sizes.values())
    gains = []
    for path, (rows, columns) in sizes.items():
        squares = factors[path].singular.square()
        squares = squares / squares.sum().clamp(min=1e-30)
        gains += [(float(square) / (rows + columns), path) for square in squares[1 : _most((rows, columns))]]
    # singular values decrease: taking the best first keeps each matrix's in order
    for _, path in sorted(gains, key=lambda gain: -gain[0]):
        cost = sum(sizes[path])
        if used + cost <= budget:
            ranks[path] += 1
            used += cost
    return ranks
