"""Scores of single weights against independent computations."""

from __future__ import annotations

import pytest
import torch
from families import inputs, make
from nets import batches, convolutional, mlp, rows
from torch import nn
from torch.func import functional_call

from lmcompress import LmcompressError
from lmcompress.activations.gradients import class_gradients
from lmcompress.pruning.unstructured.config import SparsityConfig
from lmcompress.pruning.unstructured.criteria import quality_threshold, splice, surgery_threshold
from lmcompress.pruning.unstructured.planning import plan
from lmcompress.pruning.unstructured.scoring import score, vectors


def planned_of(model, criterion="magnitude"):
    return plan(model, SparsityConfig(sparsity=0.5, criterion=criterion))[0]


def by_finite_differences(net, data, weight, index, step=2e-5):
    """Second derivative of the mean loss by one weight, in float64."""
    values = []
    with torch.no_grad():
        for shift in (-step, 0.0, step):
            weight.view(-1)[index] += shift
            values.append(sum(float(net(**batch)["loss"]) * len(batch["labels"]) for batch in data))
            weight.view(-1)[index] -= shift
    return (values[0] - 2 * values[1] + values[2]) / step**2


@pytest.mark.parametrize("image", [False, True], ids=["linear", "convolution"])
def test_obd_is_the_second_derivative_of_networks_of_relus(image):
    net = (convolutional() if image else mlp()).double()
    data = batches([{k: v.double() if v.is_floating_point() else v for k, v in r.items()} for r in rows(image=image)])
    planned = planned_of(net, "obd")
    scores = score(net, planned, "obd", data)
    for one, found in zip(planned, scores, strict=True):
        for index in range(0, one.weight.numel(), max(1, one.weight.numel() // 5)):
            # the last layers are smooth in their weights, and the kinks of the others are rarely within a step
            second = by_finite_differences(net, data, one.weight, index)
            expected = second * float(one.weight.detach().view(-1)[index]) ** 2 / 2
            assert float(found.reshape(-1)[index]) == pytest.approx(expected, rel=2e-2, abs=1e-3)


def test_obd_is_the_diagonal_of_the_gauss_newton_matrix_of_any_network():
    net = mlp(nn.Tanh)
    data = batches(rows(6))
    weight = net.layers[0].weight
    found = torch.zeros_like(weight)
    for factor, (gradient,) in class_gradients(net, [weight], data):
        found += factor * gradient.square()
    names = {k: v.detach() for k, v in net.named_parameters()}
    expected = torch.zeros_like(weight)
    for row in rows(6):

        def logits(w, x=row["pixel_values"][None]):
            return functional_call(net, names | {"layers.0.weight": w}, (x,))["logits"][0]

        jacobian = torch.func.jacrev(logits)(weight.detach())
        p = logits(weight.detach()).softmax(-1)
        hessian = torch.diag(p) - torch.outer(p, p)
        expected += torch.einsum("cij,cd,dij->ij", jacobian, hessian, jacobian)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "movement"])
def test_gradients_are_those_of_single_examples_whatever_the_batch(criterion):
    net, examples = mlp(), rows(12)
    planned = planned_of(net, criterion)
    expected = [torch.zeros_like(one.weight) for one in planned]
    for row in examples:
        loss = net(row["pixel_values"][None], row["labels"][None])["loss"]
        gradients = torch.autograd.grad(loss, [one.weight for one in planned])
        for total, one, gradient in zip(expected, planned, gradients, strict=True):
            product = one.weight * gradient
            total += {"fisher": product.square() / 2, "taylor": product.abs(), "movement": -product}[criterion].detach()
    for size in (1, 5, 12):
        scores = score(net, planned, criterion, batches(examples, size))
        for found, wanted in zip(scores, expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_wanda_looks_at_what_a_convolution_multiplies():
    net, data = convolutional(), batches(rows(8, image=True))
    planned = planned_of(net, "wanda")
    scores = score(net, planned, "wanda", data)
    x = torch.cat([batch["pixel_values"] for batch in data])
    module = net.layers[0]
    patches = vectors(module, x, None)
    product = (patches @ module.weight.flatten(1).t()).reshape(len(x), -1, 4).transpose(1, 2).reshape(len(x), 4, 10, 10)
    torch.testing.assert_close(product + module.bias[:, None, None], module(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[0], module.weight.flatten(1).detach().abs() * patches.norm(dim=0))


def test_padding_counts_for_nothing():
    model = make("bert")
    batch = inputs(model)
    planned = planned_of(model, "wanda")
    scores = score(model, planned, "wanda", [batch])
    other = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7))
    for one, two in zip(scores, score(model, planned, "wanda", [other]), strict=True):
        torch.testing.assert_close(one, two)
    words = next(n for n, one in enumerate(planned) if one.at.part == "embeddings")
    counts = torch.bincount(batch["input_ids"][batch["attention_mask"] == 1], minlength=64)
    weight = planned[words].weight.detach()
    torch.testing.assert_close(scores[words], weight.abs() * counts.float().sqrt()[:, None])


def test_every_family_is_scored_by_every_criterion(family, make_model):
    model = make_model(family)
    batch = inputs(model) | {"labels": torch.tensor([0, 1, 2])}
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    for criterion in ("magnitude", "obd", "fisher", "taylor", "movement", "wanda", "random"):
        planned = planned_of(model, criterion)
        for one, scores in zip(planned, score(model, planned, criterion, [batch]), strict=True):
            assert scores.shape == one.matrix(one.weight).shape and scores.isfinite().all()
            assert criterion in ("movement",) or (scores >= 0).all()
    assert all(p.grad is None for p in model.parameters()) and not model.training


def test_missing_data_are_named():
    net = mlp()
    planned = planned_of(net)
    with pytest.raises(LmcompressError, match="the criterion taylor must have data, got none"):
        score(net, planned, "taylor", None)
    with pytest.raises(LmcompressError, match="need at least one example, got none"):
        score(net, planned, "taylor", [])
    with pytest.raises(LmcompressError, match="must have at least one batch, got none"):
        score(net, planned, "wanda", [])
    unlabelled = [{"pixel_values": torch.randn(2, 12)}]
    with pytest.raises(LmcompressError, match="returns none for batches with pixel_values"):
        score(net, planned, "fisher", unlabelled)
    with pytest.raises(LmcompressError, match=r"logits \(rows, at most 64\), got \(1, 9, 64\)"):
        model = make("gpt2", "language")
        score(model, planned_of(model, "obd"), "obd", [inputs(model)])
    with pytest.raises(LmcompressError, match="chooses while it compensates"):
        score(net, planned, "sparsegpt", unlabelled)


def test_random_scores_are_those_of_the_seed():
    net = mlp()
    planned = planned_of(net)
    one, two, other = (score(net, planned, "random", None, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_thresholds_look_at_weights_that_are_left():
    weight = torch.randn(50)
    padded = torch.cat([weight, torch.zeros(30)])
    torch.testing.assert_close(quality_threshold(padded, 1.5), 1.5 * weight.std())
    torch.testing.assert_close(
        surgery_threshold(padded, -0.5), (weight.abs().mean() - 0.5 * weight.abs().std(correction=0))
    )
    assert float(surgery_threshold(weight, -100.0)) == 0 == float(surgery_threshold(torch.zeros(4), 1.0))
    assert float(quality_threshold(torch.zeros(4), 1.0)) == 0


def test_surgery_leaves_what_lies_between_the_thresholds():
    weight, mask = torch.tensor([0.1, 0.1, 1.0, 1.0, -2.0, -2.0]), torch.tensor([True, False] * 3)
    assert splice(mask, weight, torch.tensor(0.5), torch.tensor(1.5)).tolist() == [
        False,
        False,
        True,
        False,
        True,
        True,
    ]
