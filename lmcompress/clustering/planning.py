"""The number of shared values of each matrix, decided and checked before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lmcompress.clustering.config import SharingConfig
from lmcompress.errors import LmcompressError
from lmcompress.families import refuse_foreign
from lmcompress.families.foreign import refuse_packed
from lmcompress.families.weights import Weighted, rules_by_path, weighted_modules


@dataclass(frozen=True, eq=False)
class Planned:
    """A matrix whose weights will be clustered.

    Attributes:
        at: its location.
        clusters: number of values, zero not counted.
    """

    at: Weighted
    clusters: int


def plan(model: nn.Module, config: SharingConfig) -> tuple[list[Planned], dict[str, str]]:
    """Decide which matrices are clustered; nothing is changed.

    Args:
        model: a ``PreTrainedModel`` or any other module.
        config: the configuration.

    Returns:
        The matrices to cluster, in the order of the model, and path to reason for the others.

    Raises:
        LmcompressError: If a rule matches nothing, something else has parametrized a matrix, the model is packed, or
            no matrix would be clustered.
    """
    refuse_packed(model, "share the weights of")
    refuse_foreign(model, "share the weights of")
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
