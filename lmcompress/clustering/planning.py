"""Which matrices of a model share how many values, decided and checked before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lmcompress.clustering.config import SharingConfig
from lmcompress.errors import LmcompressError
from lmcompress.families.weights import Weighted, rules_by_path, weighted_modules


@dataclass(frozen=True, eq=False)
class Planned:
    """A matrix that will share its values.

    Attributes:
        at: where it is.
        clusters: how many values, zero not counted.
    """

    at: Weighted
    clusters: int


def plan(model: nn.Module, config: SharingConfig) -> tuple[list[Planned], dict[str, str]]:
    """Decide which matrix gets what; nothing is changed.

    Args:
        model: a ``PreTrainedModel`` or any other module.
        config: what is wanted.

    Returns:
        What shares, in the order of the model, and path to reason of what does not.

    Raises:
        LmcompressError: If a rule names nothing, something else has parametrized a matrix, or nothing would share
            values.
    """
    candidates = weighted_modules(model)
    rules = rules_by_path(candidates, config.rules)
    by_kind = {
        "linear": config.clusters,
        "convolution": config.convolution_clusters,
        "embedding": config.embedding_clusters,
    }
    planned: list[Planned] = []
    untouched: dict[str, str] = {}
    for candidate in candidates:
        rule = rules.get(candidate.path)
        if rule is None and not candidate.default:
            untouched[candidate.path] = "not chosen by default; a rule that names it would share it"
            continue
        clusters = by_kind[candidate.kind] if rule is None else rule.clusters
        if clusters is None:
            untouched[candidate.path] = "the config leaves it as it is"
            continue
        if not candidate.weight.is_floating_point():
            raise LmcompressError(
                f"{candidate.path} must have numbers to share, got {candidate.weight.dtype}: it is packed already"
            )
        planned.append(Planned(candidate, clusters))
    if not planned:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(untouched.items())[:4])
        raise LmcompressError(
            f"nothing of this {type(model).__name__} would share weights: {reasons or 'it has no matrices'}. Give the "
            "config clusters, or take rules away that leave all as it is"
        )
    return planned, untouched
