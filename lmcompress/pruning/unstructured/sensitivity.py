"""The sensitivity of a model to the sparsity of each matrix, and the rules that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmcompress.activations.batches import batches_for
from lmcompress.errors import LmcompressError
from lmcompress.pruning.unstructured.config import SparsityConfig, SparsityRule
from lmcompress.pruning.unstructured.planning import choose, plan
from lmcompress.pruning.unstructured.scoring import score


@dataclass(frozen=True)
class Scan:
    """The evaluation of a model with one matrix at a time made sparse.

    Attributes:
        dense: result for the unpruned model.
        shares: sparsities that were tried.
        values: path to the result at each share.
    """

    dense: float
    shares: tuple[float, ...]
    values: Mapping[str, tuple[float, ...]]

    def rules(self, tolerance: float) -> tuple[SparsityRule, ...]:
        """For each matrix the highest share at which the evaluation grows by no more than the tolerance.

        Args:
            tolerance: in the unit of the evaluation, >= 0.

        Returns:
            A rule for each matrix; it stays dense if no share is acceptable.

        Raises:
            LmcompressError: If the tolerance is negative.
        """
        if not tolerance >= 0:
            raise LmcompressError(f"the tolerance must be >= 0, got {tolerance}")
        rules = []
        for path, values in self.values.items():
            fits = [value <= self.dense + tolerance for value in values]
            count = fits.index(False) if False in fits else len(fits)
            rules.append(SparsityRule(modules=path, sparsity=self.shares[count - 1] if count else None))
        return tuple(rules)


def sensitivity_scan(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    shares: Sequence[float] = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95),
    *,
    config: SparsityConfig | None = None,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
) -> Scan:
    """Make one matrix at a time sparse, at each share, without training, and evaluate the model.

    Args:
        model: a ``PreTrainedModel`` or any other module; restored afterwards.
        evaluate: function of the model, lower is better: an error or a loss.
        shares: sparsities to try, increasing.
        config: matrices, criterion and pattern; its shares are ignored; default: magnitude.
        batches: for a criterion that needs data.

    Returns:
        The results.

    Raises:
        LmcompressError: If shares do not increase, or as :func:`~lmcompress.pruning.unstructured.prune_weights`.

    Reference:
        Han et al. 2015, https://arxiv.org/abs/1506.02626, section 5, figure 6.
    """
    if not shares or list(shares) != sorted(set(shares)) or not 0 < shares[0] <= shares[-1] < 1:
        raise LmcompressError(f"shares must increase within (0, 1), got {list(shares)}")
    asked = SparsityConfig(sparsity=shares[-1]) if config is None else config
    planned, _ = plan(model, asked)
    data = None if batches is None else batches_for(model, batches)
    scores = score(model, planned, asked.chosen_criterion, data, seed=asked.seed)
    values: dict[str, tuple[float, ...]] = {}
    for one, ranked in zip(planned, scores, strict=True):
        kept = one.weight.detach().clone()
        found = []
        try:
            for share in shares:
                (mask,) = choose([one], asked, [ranked], share / (one.sparsity or 1.0))
                with torch.no_grad():
                    one.weight.copy_(kept.masked_fill(~one.stored(mask), 0.0))
                found.append(float(evaluate(model)))
        finally:
            with torch.no_grad():
                one.weight.copy_(kept)
        values[one.path] = tuple(found)
    return Scan(float(evaluate(model)), tuple(shares), values)
