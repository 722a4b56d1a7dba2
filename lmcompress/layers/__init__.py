"""Modules that compute with fewer numbers than a full matrix: factors, groups, local mixing. No model is known here."""

from lmcompress.layers.base import Compact
from lmcompress.layers.embedding import FactorizedEmbedding, FactorizedHead
from lmcompress.layers.grouped import GroupedLinear, channel_shuffle
from lmcompress.layers.low_rank import LowRankLinear
from lmcompress.layers.separable import SeparableMixing

__all__ = [
    "Compact",
    "FactorizedEmbedding",
    "FactorizedHead",
    "GroupedLinear",
    "LowRankLinear",
    "SeparableMixing",
    "channel_shuffle",
]
