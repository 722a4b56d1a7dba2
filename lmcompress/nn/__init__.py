"""Modules with fewer parameters than a full matrix: factors, groups, local mixing. Independent of model families."""

from lmcompress.nn.base import Compact
from lmcompress.nn.embedding import FactorizedEmbedding, FactorizedHead
from lmcompress.nn.grouped import GroupedLinear, channel_shuffle
from lmcompress.nn.low_rank import LowRankLinear
from lmcompress.nn.separable import SeparableMixing

__all__ = [
    "Compact",
    "FactorizedEmbedding",
    "FactorizedHead",
    "GroupedLinear",
    "LowRankLinear",
    "SeparableMixing",
    "channel_shuffle",
]
