"""Matches of intermediate features: how far the student's inside is from the teacher's, for each example.

Every match is a pure function ``f(student, teacher, mask, **options) -> (batch,)``: for each example the float32 *sum*
over what its unit counts, so that the caller divides once by the count over the whole optimizer step. Gradients flow
to the student only; what stands at padding never matters. Losses are 0 where student and teacher agree, but for the
cross-entropies, which keep the teacher's entropy.
"""

from lmcompress.distillation.matches.features import (
    attention_ce,
    attention_ce_mean,
    attention_mse,
    attention_mse_mean,
    hidden_cosine,
    hidden_mse,
    pkd,
)
from lmcompress.distillation.matches.registry import MATCHES, MatchLoss, match_for
from lmcompress.distillation.matches.relations import (
    attention_kl,
    attention_transfer,
    gram,
    nst,
    relation_kl,
    value_relation_kl,
)

__all__ = [
    "MATCHES",
    "MatchLoss",
    "attention_ce",
    "attention_ce_mean",
    "attention_kl",
    "attention_mse",
    "attention_mse_mean",
    "attention_transfer",
    "gram",
    "hidden_cosine",
    "hidden_mse",
    "match_for",
    "nst",
    "pkd",
    "relation_kl",
    "value_relation_kl",
]
