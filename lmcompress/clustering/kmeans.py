"""One-dimensional k-means: exact in every step, fast on millions of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError

Initial = Literal["linear", "density", "forgy"]
MAX_CLUSTERS = 2**16
# relative to the mean: a cluster of values without sensitivity still has a mean
_LEAST_WEIGHT = 1e-9


@dataclass(frozen=True, eq=False)
class Clusters:
    """A codebook and the index of each value in it.

    Attributes:
        centroids: ``(clusters,)`` float32 (float64 for float64), ascending; the zero of ``keep_zeros`` is not
            included.
        indices: same shape as the values, uint8 for up to 256 values, otherwise int32: into ``centroids``; with
            ``zero``, 0 stands for an exact zero and ``i + 1`` for centroid ``i``.
        zero: whether exact zeros are kept.
        error: sum of (weighted) squared differences.
        iterations: number of iterations run.
    """

    centroids: Tensor
    indices: Tensor
    zero: bool
    error: float
    iterations: int

    def values(self) -> Tensor:
        """The centroid of every value, in the shape of ``indices``."""
        return look_up(self.centroids, self.indices, zero=self.zero)


def look_up(centroids: Tensor, indices: Tensor, *, zero: bool) -> Tensor:
    """The value of each index.

    Args:
        centroids: ``(clusters,)``.
        indices: any shape, as in :class:`Clusters`.
        zero: whether index 0 stands for zero.

    Returns:
        The shape of ``indices``, dtype of ``centroids``.

    Example:
        >>> look_up(torch.tensor([-1.0, 2.0]), torch.tensor([0, 2, 1]), zero=True)
        tensor([ 0.,  2., -1.])
    """
    table = torch.cat([centroids.new_zeros(1), centroids]) if zero else centroids
    return table.index_select(0, indices.reshape(-1).int()).reshape(indices.shape)


def sum_by_cluster(gradient: Tensor, indices: Tensor, *, clusters: int, zero: bool) -> Tensor:
    r"""The gradient of each centroid: the sum of the gradients of the weights that are in its cluster.

    .. math:: \partial L / \partial C_k = \sum_{ij} \partial L / \partial W_{ij} \, [I_{ij} = k]

    Args:
        gradient: gradient of the weights, any shape.
        indices: same shape, as in :class:`Clusters`.
        clusters: number of centroids.
        zero: whether index 0 stands for a zero, which has no gradient.

    Returns:
        ``(clusters,)`` float64.

    Reference:
        Han, Mao & Dally, *Deep Compression*, ICLR 2016, https://arxiv.org/abs/1510.00149, section 3.3, equation 3.

    Example:
        >>> sum_by_cluster(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1]), clusters=2, zero=False)
        tensor([1., 6.], dtype=torch.float64)
    """
    sums = torch.bincount(indices.reshape(-1), weights=gradient.reshape(-1).double(), minlength=clusters + zero)
    return sums[1:] if zero else sums


def kmeans(
    values: Tensor,
    clusters: int,
    *,
    initial: Initial = "linear",
    weights: Tensor | None = None,
    keep_zeros: bool = False,
    iterations: int = 300,
    seed: int = 0,
) -> Clusters:
    r"""Clusters of least squared error, by Lloyd's algorithm from a given start.

    .. math:: \min \sum_k \sum_{w \in c_k} h_w (w - c_k)^2

    In one dimension clusters are intervals: values are sorted once, and each step finds the ends of all intervals by
    bisection and their means from cumulative sums, at a cost of O(clusters · log values). It ends when nothing
    changes. An empty cluster is restarted at the value farthest from its centroid.

    Args:
        values: any shape, finite.
        clusters: number of clusters, 1 to 65536; fewer are returned if there are fewer distinct values, each then its
            own centroid.
        initial: ``linear``: equally spaced between the smallest and the largest value; ``density``: quantiles of the
            distribution; ``forgy``: random values.
        weights: same shape as ``values``, >= 0: weight of each value's error, such as its sensitivity; if all clustered
            values have weight 0, they count equally.
        keep_zeros: keep exact zeros, in addition to the clusters.
        iterations: maximum number of iterations.
        seed: seed of ``forgy``.

    Returns:
        The clusters, none of them empty.

    Raises:
        LmcompressError: If there are no values, values are not finite, the number of clusters or iterations is out of
            range, the start is unknown, or weights have another shape, are negative or not finite.

    Reference:
        Han, Mao & Dally, *Deep Compression*, ICLR 2016, https://arxiv.org/abs/1510.00149, section 3.1 and 3.2 (starts);
        Kim et al., *SqueezeLLM*, ICML 2024, https://arxiv.org/abs/2306.07629, section 4.1 (weights).

    Example:
        >>> found = kmeans(torch.tensor([1.0, 1.2, 5.0, 0.0]), 2, keep_zeros=True)
        >>> found.centroids, found.indices
        (tensor([1.1000, 5.0000]), tensor([1, 1, 2, 0], dtype=torch.uint8))
    """
    _check(values, clusters, initial, iterations)
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    # Apple's GPUs have no float64
    flat = values.detach().reshape(-1).to("cpu" if values.device.type == "mps" else values.device, torch.float64)
    heavy = _checked_weights(weights, values, flat)
    kept = flat != 0 if keep_zeros else torch.ones_like(flat, dtype=torch.bool)
    zero = not bool(kept.all())
    chosen = flat[kept] if zero else flat
    if not len(chosen):
        # only zeros: no centroid is needed
        none = torch.empty(0, dtype=dtype, device=values.device)
        return Clusters(none, torch.zeros_like(values, dtype=torch.uint8), True, 0.0, 0)
    heavy = None if heavy is None else heavy[kept]
    heavy = heavy if heavy is not None and bool(heavy.any()) else None
    line = _Line.of(chosen, heavy)
    centroids, done = _lloyd(line, clusters, initial, iterations, seed)
    centroids = centroids.to(dtype)
    # with the rounded centroids, so that each value has the nearest of those that are stored
    own = torch.searchsorted(_middles(centroids.double()), chosen)
    used = torch.bincount(own, minlength=len(centroids)) > 0
    if not bool(used.all()):
        # out of iterations: empty clusters are dropped
        centroids, own = centroids[used], (used.cumsum(0) - 1)[own]
    differences = (chosen - centroids.double()[own]).square()
    error = float((differences if heavy is None else differences * heavy).sum())
    small = torch.uint8 if len(centroids) + zero <= 256 else torch.int32
    indices = torch.zeros(len(flat), dtype=small, device=flat.device)
    indices[kept] = (own + int(zero)).to(small)
    return Clusters(centroids.to(values.device), indices.reshape(values.shape).to(values.device), zero, error, done)


@dataclass(frozen=True, eq=False)
class _Line:
    """Distinct values in ascending order, and cumulative sums.

    Attributes:
        values: ``(n,)``.
        weight: ``(n + 1,)``: sum over all values before each.
        moment: ``(n + 1,)``: the same, weight times value.
    """

    values: Tensor
    weight: Tensor
    moment: Tensor

    @staticmethod
    def of(values: Tensor, weights: Tensor | None) -> _Line:
        ordered, order = torch.sort(values)
        distinct, counts = torch.unique_consecutive(ordered, return_counts=True)
        if weights is None:
            mass = counts.double()
        else:
            ends = torch.cat([weights.new_zeros(1), torch.cumsum(weights[order], 0)])
            ends = ends[torch.cat([counts.new_zeros(1), counts.cumsum(0)])]
            mass = ends.diff().clamp(min=_LEAST_WEIGHT * float(ends[-1]) / len(values))
        start = mass.new_zeros(1)
        return _Line(distinct, torch.cat([start, mass.cumsum(0)]), torch.cat([start, (mass * distinct).cumsum(0)]))


def _lloyd(line: _Line, clusters: int, initial: Initial, iterations: int, seed: int) -> tuple[Tensor, int]:
    """Centroids in ascending order, and the iterations done."""
    count = len(line.values)
    if count <= clusters:
        return line.values, 0
    centroids = _start(line, clusters, initial, seed)
    ends = _ends(line, centroids)
    for done in range(1, iterations + 1):
        centroids = _means(line, _without_empty(line, ends, centroids))
        new = _ends(line, centroids)
        if torch.equal(new, ends):
            return centroids, done
        ends = new
    return centroids, iterations


def _start(line: _Line, clusters: int, initial: Initial, seed: int) -> Tensor:
    if initial == "linear":
        return torch.linspace(
            float(line.values[0]), float(line.values[-1]), clusters, dtype=torch.float64, device=line.values.device
        )
    if initial == "density":
        shares = (torch.arange(clusters, dtype=torch.float64, device=line.values.device) + 0.5) / clusters
        chosen = torch.searchsorted(line.weight[1:], shares * line.weight[-1]).clamp(max=len(line.values) - 1)
        return line.values[chosen]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(line.values), generator=generator)[:clusters].sort().values
    return line.values[chosen.to(line.values.device)]


def _middles(centroids: Tensor) -> Tensor:
    # halves, for the sum of two large values may overflow
    return centroids[1:] / 2 + centroids[:-1] / 2


def _ends(line: _Line, centroids: Tensor) -> Tensor:
    """``(clusters + 1,)``: where each cluster begins among the values, and where the last one ends."""
    inner = torch.searchsorted(line.values, _middles(centroids), right=True)
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(line.values))])


def _means(line: _Line, ends: Tensor) -> Tensor:
    """The mean of each cluster, none of which is empty."""
    weight, moment = line.weight[ends].diff(), line.moment[ends].diff()
    # a difference of sums may round beyond the cluster's own values
    low, high = line.values[ends[:-1]], line.values[ends[1:] - 1]
    return torch.minimum(torch.maximum(moment / weight, low), high)


def _without_empty(line: _Line, ends: Tensor, centroids: Tensor) -> Tensor:
    """Ends of clusters without empty ones: an empty cluster takes over the outermost end of another."""
    sizes = ends.diff()
    empty = int((sizes == 0).sum())
    while empty:
        full = sizes > 0
        starts, stops, own = ends[:-1][full], ends[1:][full], centroids[full]
        # distances of the outermost values of each cluster that has more than one
        splittable = stops - starts > 1
        below = torch.where(splittable, own - line.values[starts], -1.0)
        above = torch.where(splittable, line.values[stops - 1] - own, -1.0)
        distance = torch.maximum(below, above)
        number = min(empty, int(splittable.sum()))
        chosen = torch.topk(distance, number).indices
        cuts = torch.where(below >= above, starts + 1, stops - 1)[chosen]
        ends = torch.cat([ends[:1], stops, cuts]).unique()
        centroids = _means(line, ends)
        sizes, empty = ends.diff(), empty - number
    return ends


def _check(values: Tensor, clusters: int, initial: str, iterations: int) -> None:
    if values.numel() == 0:
        raise LmcompressError(f"there must be values to cluster, got a tensor of shape {tuple(values.shape)}")
    if not isinstance(clusters, int) or isinstance(clusters, bool) or not 1 <= clusters <= MAX_CLUSTERS:
        raise LmcompressError(f"clusters must be a whole number from 1 to {MAX_CLUSTERS}, got {clusters!r}")
    if initial not in ("linear", "density", "forgy"):
        raise LmcompressError(f"initial must be linear, density or forgy, got {initial!r}")
    if iterations < 1:
        raise LmcompressError(f"iterations must be at least 1, got {iterations}")
    if not bool(torch.isfinite(values).all()):
        raise LmcompressError("values to cluster must be finite, got NaN or infinity: the training has diverged")


def _checked_weights(weights: Tensor | None, values: Tensor, flat: Tensor) -> Tensor | None:
    if weights is None:
        return None
    if weights.shape != values.shape:
        raise LmcompressError(
            f"weights of errors must have the shape of the values, {tuple(values.shape)}, got {tuple(weights.shape)}"
        )
    heavy = weights.detach().reshape(-1).to(flat.device, torch.float64)
    if not bool(torch.isfinite(heavy).all()) or bool((heavy < 0).any()):
        raise LmcompressError(
            "weights of errors must be finite and at least 0, got others: a NaN sensitivity comes from a loss that "
            "has diverged"
        )
    return heavy
