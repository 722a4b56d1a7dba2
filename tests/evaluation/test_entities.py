"""entities: F1 against a count of spans by hand."""

from __future__ import annotations

import builtins

import numpy as np
import pytest

from lmcompress.errors import LmcompressError
from lmcompress.evaluation import entity_f1

NAMES = ("O", "B-place", "I-place", "B-person", "I-person")


def spans(tags):
    found, start, kind = set(), None, None
    for place, tag in enumerate([*tags, "O"]):
        if start is not None and (tag == "O" or tag[0] == "B" or tag[2:] != kind):
            found.add((start, place, kind))
            start = None
        if start is None and tag != "O":
            start, kind = place, tag[2:]
    return found


def test_it_is_the_f1_of_spans_with_their_types():
    pytest.importorskip("nervaluate")
    drawn = np.random.default_rng(0)
    labels = [drawn.integers(0, 5, size=n) for n in (3, 7, 1, 9, 5)]
    predictions = [np.where(drawn.random(len(row)) < 0.7, row, drawn.integers(0, 5, size=len(row))) for row in labels]
    for row in labels[1:3]:
        row[0] = -100
    hits = said = right = 0
    for given, truth in zip(predictions, labels, strict=True):
        mine, theirs = ([NAMES[i] for i in row[truth != -100]] for row in (given, truth))
        hits, said, right = hits + len(spans(mine) & spans(theirs)), said + len(spans(mine)), right + len(spans(theirs))
    assert 0 < hits < right
    assert entity_f1(predictions, labels, NAMES) == pytest.approx(2 * hits / (said + right))
    kept = [np.where(row == -100, 0, row) for row in labels]
    assert entity_f1(kept, labels, NAMES) == 1.0


def test_what_can_not_be_counted_is_refused(monkeypatch):
    pytest.importorskip("nervaluate")
    with pytest.raises(LmcompressError, match=r"labels in the IOB scheme \(O, B-type, I-type\), got NOUN, VERB"):
        entity_f1([np.zeros(1, int)], [np.zeros(1, int)], ("NOUN", "VERB"))
    with pytest.raises(LmcompressError, match="row 1 must have a label for each prediction, got 1 and 2"):
        entity_f1([np.zeros(1, int), np.zeros(2, int)], [np.zeros(1, int), np.zeros(1, int)], NAMES)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "nervaluate":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LmcompressError, match=r'entity_f1 needs nervaluate: pip install "lmcompress\[ner\]"'):
        entity_f1([np.zeros(1, int)], [np.zeros(1, int)], NAMES)
