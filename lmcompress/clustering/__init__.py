"""Weight clustering (weight sharing): codebooks found by k-means, then trained."""

from lmcompress.clustering.config import SharingConfig, SharingRule
from lmcompress.clustering.kmeans import Clusters, kmeans
from lmcompress.clustering.method import SharedWeight, WeightSharing, share_weights
from lmcompress.clustering.report import SharedMatrix, SharingReport
from lmcompress.clustering.sensitivity import fisher_diagonal

__all__ = [
    "Clusters",
    "SharedMatrix",
    "SharedWeight",
    "SharingConfig",
    "SharingReport",
    "SharingRule",
    "WeightSharing",
    "fisher_diagonal",
    "kmeans",
    "share_weights",
]
