"""Weight sharing: few values for many weights, found by k-means and then trained."""

from lmcompress.sharing.config import SharingConfig, SharingRule
from lmcompress.sharing.kmeans import Clusters, kmeans
from lmcompress.sharing.method import SharedWeight, WeightSharing, share_weights
from lmcompress.sharing.report import SharedMatrix, SharingReport
from lmcompress.sharing.sensitivity import fisher_diagonal

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
