"""A model without values becomes what one with values becomes; entries of recipes are calls of functions."""

import copy

import pytest
import torch
from compacting import batches
from families import make
from pydantic import TypeAdapter, ValidationError

from lmcompress import LmcompressError
from lmcompress.students import factorize, group
from lmcompress.students.config import Replacement

ENTRIES = [
    [{"kind": "factorize", "rank": 3, "parts": ["ffn_*"], "activations": True}],
    [{"kind": "factorize_embeddings", "rank": 3}],
    [{"kind": "group", "groups": 2, "activations": True}],
    [{"kind": "group", "groups": 2, "shuffle": "channel"}],
    [{"kind": "group", "groups": 2, "parts": ["ffn_in"]}, {"kind": "fold_shuffles"}],
    [{"kind": "separate", "blocks": [0], "kernel": 3}, {"kind": "share_layers", "every": 2}],
    [{"kind": "share_layers", "values": "mean"}],
]


def entries(values):
    return TypeAdapter(list[Replacement]).validate_python(values)


def on_meta(model):
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


@pytest.mark.parametrize("values", ENTRIES[:5], ids=lambda values: values[0]["kind"])
def test_costs_are_known_without_values(family, values):
    model = make(family)
    bare, data = on_meta(model), batches(model)
    for entry in entries(values):
        real, planned = entry.apply(model, data), entry.apply(bare, [])
        assert (planned.parameters, planned.flops) == (real.parameters, real.flops)
        assert planned.errors == {} and set(real.changed) <= set(planned.changed)


@pytest.mark.parametrize("values", ENTRIES[5:], ids=lambda values: values[0]["kind"])
def test_blocks_become_the_same_without_values(values):
    # three blocks, of which the first two share
    values = [entry | ({"blocks": [0, 1]} if entry["kind"] == "separate" else {}) for entry in values]
    model = make("bert")
    bare, data = on_meta(model), batches(model)
    for entry in entries(values):
        real, planned = entry.apply(model, data), entry.apply(bare, [])
        assert (planned.parameters, planned.flops, planned.changed) == (real.parameters, real.flops, real.changed)


@pytest.mark.parametrize("goal", [{"parameters": 0.4}, {"energy": 0.6}], ids=str)
def test_ranks_that_follow_from_values_are_guessed_and_it_is_said(goal):
    (entry,) = entries([{"kind": "factorize", **goal}])
    model = make("bert")
    real, planned = entry.apply(model, []), entry.apply(on_meta(make("bert")), [])
    assert "singular values" in entry.unknown
    assert planned.parameters[1] == pytest.approx(real.parameters[1], rel=0.1 if "parameters" in goal else 0.5)


def test_an_order_that_turns_out_to_be_none_stops_no_recipe():
    grouped, fold = entries([{"kind": "group", "groups": 2, "shuffle": "none"}, {"kind": "fold_shuffles"}])
    model, bare = make("bert"), on_meta(make("bert"))
    for one in (model, bare):
        grouped.apply(one, [])
    assert fold.apply(model, []).changed == {}
    with pytest.raises(LmcompressError, match="no matrix is shuffled"):
        fold.apply(bare, [])


def test_a_pattern_names_parts():
    one, other = make("bert"), make("bert")
    assert set(factorize(one, rank=2, parts=["ffn_*", "query"]).changed) == set(
        factorize(other, rank=2, parts=["query", "ffn_in", "ffn_out"]).changed
    )
    with pytest.raises(LmcompressError, match=r"bert has no part '\*qkv'. Valid are: attention_out"):
        group(make("bert"), 2, parts=["ffn_in", "*qkv"])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kind": "factorize"}, "exactly one of rank, energy and parameters must be given, got none"),
        ({"kind": "factorize", "energy": 1.0}, "energy must be a share between 0 and 1"),
        ({"kind": "group", "groups": 1}, "greater than or equal to 2"),
        ({"kind": "separate", "kernel": 3}, "blocks"),
        ({"kind": "fold"}, "fold_shuffles"),
    ],
)
def test_entries_are_checked_when_they_are_read(values, message):
    with pytest.raises(ValidationError, match=message):
        entries([values])
