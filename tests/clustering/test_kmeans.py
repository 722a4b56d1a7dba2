"""Clusters along a line: against scikit-learn, at their fixed point, and where values are odd."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from lmcompress.clustering.kmeans import kmeans, look_up, sum_by_cluster
from lmcompress.errors import LmcompressError

STARTS = ["linear", "density", "forgy"]


def _start(values, clusters):
    return torch.linspace(float(values.min()), float(values.max()), clusters).double().reshape(-1, 1).numpy()


@pytest.mark.parametrize("clusters", [1, 2, 7, 32])
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_scikit_learn_finds_the_same_clusters(clusters, weighted):
    values = torch.rand(2000, dtype=torch.float64)
    weights = torch.rand(2000, dtype=torch.float64) ** 4 if weighted else None
    found = kmeans(values, clusters, weights=weights, iterations=1000)
    oracle = KMeans(clusters, init=_start(values, clusters), n_init=1, max_iter=1000, tol=0.0, algorithm="lloyd")
    oracle.fit(values.reshape(-1, 1).numpy(), sample_weight=None if weights is None else weights.numpy())
    torch.testing.assert_close(found.centroids, torch.from_numpy(oracle.cluster_centers_[:, 0]))
    assert found.error == pytest.approx(oracle.inertia_)


@pytest.mark.parametrize("initial", STARTS)
def test_no_start_is_far_from_the_best_of_many_by_scikit_learn(initial):
    values = torch.randn(3000)
    oracle = KMeans(16, n_init=10, random_state=0).fit(values.reshape(-1, 1).numpy())
    assert kmeans(values, 16, initial=initial).error < 1.25 * oracle.inertia_


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40),
    st.integers(1, 12),
    st.sampled_from(STARTS),
    st.booleans(),
    st.booleans(),
)
def test_each_value_has_the_nearest_centroid_and_each_centroid_the_mean_of_its_values(
    numbers, clusters, initial, keep_zeros, weighted
):
    values = torch.tensor(numbers, dtype=torch.float64)
    weights = torch.linspace(0.5, 2, len(values), dtype=torch.float64) if weighted else None
    found = kmeans(values, clusters, initial=initial, weights=weights, keep_zeros=keep_zeros, iterations=1000)
    rest = values[values != 0] if keep_zeros else values
    assert len(found.centroids) == min(clusters, len(rest.unique()))
    assert torch.equal(found.centroids, found.centroids.sort().values)
    if keep_zeros:
        assert torch.equal(found.values() == 0, values == 0)
    if len(rest):
        distances = (rest[:, None] - found.centroids).abs()
        mine = found.values()[values != 0] if keep_zeros else found.values()
        torch.testing.assert_close((rest - mine).abs(), distances.min(1).values)
    for number in range(len(found.centroids)):
        members = found.indices == number + int(found.zero)
        assert members.any()
        mass = torch.ones_like(values) if weights is None else weights
        mean = (mass * values)[members].sum() / mass[members].sum()
        torch.testing.assert_close(found.centroids[number], mean, rtol=1e-6, atol=1e-9)


def test_two_clusters_of_few_values_are_the_best_split_there_is():
    values = torch.tensor([0.0, 0.1, 0.2, 4.0, 4.2, 4.4])
    best = min(
        sum(float((part - part.mean()).square().sum()) for part in (values[:cut], values[cut:])) for cut in range(1, 6)
    )
    for initial, clusters in itertools.product(STARTS, [2]):
        assert kmeans(values, clusters, initial=initial).error == pytest.approx(best, rel=1e-4)


def test_a_far_value_leaves_no_cluster_of_linear_steps_empty():
    values = torch.cat([torch.randn(500), torch.tensor([1e4])])
    found = kmeans(values, 32)
    counts = torch.bincount(found.indices)
    assert len(counts) == 32 and (counts > 0).all()
    assert found.error < kmeans(values, 8, initial="density").error + float(values[:-1].square().sum()) / 4


@pytest.mark.parametrize("initial", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_more_clusters_than_values_and_then_no_error(initial, dtype):
    values = torch.tensor([[3.0, 1.0, 3.0], [0.5, 1.0, 0.5]], dtype=dtype)
    found = kmeans(values, 100, initial=initial)
    assert torch.equal(found.values().to(dtype), values) and len(found.centroids) == 3
    assert found.error == 0


def test_a_constant_matrix_is_one_cluster_and_one_of_zeros_none():
    constant = kmeans(torch.full((4, 4), 0.3), 16)
    assert len(constant.centroids) == 1 and torch.equal(constant.values(), torch.full((4, 4), 0.3))
    empty = kmeans(torch.zeros(4, 4), 16, keep_zeros=True)
    assert len(empty.centroids) == 0 and torch.equal(empty.values(), torch.zeros(4, 4))


def test_zeros_stay_and_do_not_pull_at_the_others():
    values = torch.randn(1000)
    values[::3] = 0
    pruned, dense = kmeans(values, 8, keep_zeros=True), kmeans(values[values != 0], 8)
    assert torch.equal(pruned.centroids, dense.centroids)
    assert torch.equal(pruned.values() == 0, values == 0)


def test_sensitive_values_are_met_more_closely():
    values = torch.randn(4000)
    weights = torch.where(values > 1, 100.0, 1.0)
    plain, weighted = kmeans(values, 8), kmeans(values, 8, weights=weights)
    sensitive = values > 1
    errors = [float((found.values() - values)[sensitive].square().mean()) for found in (plain, weighted)]
    assert errors[1] < errors[0] / 2


def test_values_that_nobody_is_sensitive_to_make_no_nan():
    values = torch.cat([torch.linspace(0, 1, 50), torch.linspace(10, 11, 50)])
    weights = torch.cat([torch.ones(50), torch.zeros(50)])
    found = kmeans(values, 4, weights=weights)
    assert torch.isfinite(found.centroids).all() and found.values()[60] > 9


def test_where_nothing_is_sensitive_all_count_alike():
    values = torch.randn(100)
    values[:50] = 0
    on_zeros = torch.cat([torch.ones(50), torch.zeros(50)])
    plain, weighted = (kmeans(values, 4, keep_zeros=True, weights=weights) for weights in (None, on_zeros))
    assert torch.equal(plain.centroids, weighted.centroids)


def test_many_clusters_need_wider_indices():
    values = torch.randn(3000)
    assert kmeans(values, 256).indices.dtype == torch.uint8
    assert kmeans(values, 257).indices.dtype == torch.int32
    values[0] = 0
    assert kmeans(values, 256, keep_zeros=True).indices.dtype == torch.int32


def test_gradients_of_centroids_are_those_that_autograd_takes_through_the_look_up():
    values = torch.randn(50, 20)
    values[values.abs() < 0.3] = 0
    found = kmeans(values, 6, keep_zeros=True)
    centroids = found.centroids.clone().requires_grad_()
    probe = torch.randn(50, 20)
    (look_up(centroids, found.indices, zero=True) * probe).sum().backward()
    sums = sum_by_cluster(probe, found.indices, clusters=6, zero=True)
    torch.testing.assert_close(sums.float(), centroids.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clusters": 0}, r"clusters must be a whole number from 1 to 65536, got 0"),
        ({"clusters": 2.5}, r"whole number.*got 2\.5"),
        ({"initial": "random"}, r"initial must be linear, density or forgy, got 'random'"),
        ({"iterations": 0}, r"iterations must be at least 1, got 0"),
        ({"values": torch.empty(0, 3)}, r"must be values to cluster, got a tensor of shape \(0, 3\)"),
        ({"values": torch.tensor([1.0, torch.nan])}, r"must be finite, got NaN"),
        ({"weights": torch.ones(2)}, r"must have the shape of the values, \(3,\), got \(2,\)"),
        ({"weights": torch.tensor([1.0, -1.0, 1.0])}, r"must be finite and at least 0"),
    ],
)
def test_what_cannot_be_clustered_is_refused(change, message):
    given = {"values": torch.tensor([1.0, 2.0, 3.0]), "clusters": 2} | change
    with pytest.raises(LmcompressError, match=message):
        kmeans(given.pop("values"), given.pop("clusters"), **given)
