"""Sensitivity: each row is the model with exactly those units gone, and the model is left as it was."""

import copy

import pytest
import torch
from families import FFN, HEADS, LAYERS, inputs, make

from lmcompress.errors import LmcompressError
from lmcompress.pruning.structured.scoring import score
from lmcompress.pruning.structured.sensitivity import mean_loss, sensitivity
from lmcompress.pruning.structured.surgery import cut
from lmcompress.pruning.structured.units import full


def labelled(model, seed=0):
    return {**inputs(model, seed=seed), "labels": torch.tensor([0, 1, 2])}


def test_a_row_is_the_loss_of_the_model_that_was_cut_so(family):
    model = make(family)
    batches = [labelled(model), labelled(model, 1)]
    scores = score(model, "l1", ["heads", "neurons"])
    evaluate = mean_loss(batches)
    before = evaluate(model)
    rows = sensitivity(model, scores, evaluate, shares=(0.5, 1.0))
    assert len(rows) == 1 + 2 * LAYERS * 2 and rows[0].quality == before == evaluate(model)
    for row in (rows[1], rows[-1]):
        small = copy.deepcopy(model)
        mask = full(small, [row.part])
        order = scores.tensors(row.part)[row.block].argsort(stable=True)
        mask.tensors(row.part)[row.block][order[: row.removed]] = False
        cut(small, mask)
        assert evaluate(small) == pytest.approx(row.quality, rel=1e-4)
    assert {(row.part, row.units) for row in rows[1:]} == {("heads", HEADS), ("neurons", FFN)}
    assert rows[1].as_dict()["share"] == 0.5


def test_equal_counts_are_measured_once():
    model = make("bert")
    calls = []
    scores = score(model, "l1", ["heads"])
    rows = sensitivity(model, scores, lambda m: calls.append(m) or 1.0, shares=(0.01, 0.25, 0.26))
    assert len(calls) == 1 + LAYERS and len(rows) == 1 + 3 * LAYERS


def test_the_model_has_no_hooks_afterwards_whatever_happens():
    model = make("bert")
    scores = score(model, "l1", ["heads"])

    def fails(model):
        if any(m._forward_pre_hooks for m in model.modules()):
            raise RuntimeError("evaluation broke")
        return 0.0

    with pytest.raises(RuntimeError, match="evaluation broke"):
        sensitivity(model, scores, fails)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_mean_loss_is_that_of_the_model():
    model = make("bert")
    batch = labelled(model)
    assert mean_loss([batch])(model) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-5)


def test_bad_input_is_refused():
    model = make("bert")
    scores = score(model, "l1", ["heads"])
    with pytest.raises(LmcompressError, match=r"shares must be in \(0, 1\] and at least one, got \[0\]"):
        sensitivity(model, scores, lambda m: 0.0, shares=[0])
    with pytest.raises(LmcompressError, match="must have scores of heads or neurons, got layers"):
        sensitivity(model, score(model, "l1", ["layers"]), lambda m: 0.0)
    with pytest.raises(LmcompressError, match="needs labels in every batch"):
        mean_loss([inputs(model)])(model)
    nothing = {**inputs(make("bert", "tokens")), "labels": torch.full((3, 9), -100)}
    with pytest.raises(LmcompressError, match="labels that count, got only -100"):
        mean_loss([nothing])(make("bert", "tokens"))
