"""units: one container for masks, scores and gates; foretelling shapes needs no model."""

import pytest
import torch
from families import FFN, HEADS, HIDDEN, LAYERS, make
from hypothesis import given
from hypothesis import strategies as st

from lmcompress.checkpoint.schema import BlockShape, Structure
from lmcompress.checkpoint.structure import structure_of
from lmcompress.errors import LmcompressError
from lmcompress.pruning import PARTS, Units, full, masked_structure

SHAPES = Structure(head_size=4, blocks=(BlockShape(heads=4, ffn=9), BlockShape(heads=2, ffn=5, source=7)))


def test_full_has_the_shapes_of_the_model(family):
    units = full(make(family), PARTS)
    assert units.parts() == PARTS
    assert [tuple(t.shape) for t in units.heads] == [(HEADS,)] * LAYERS
    assert [tuple(t.shape) for t in units.neurons] == [(FFN,)] * LAYERS
    assert units.attention.shape == units.ffn.shape == units.layers.shape == (LAYERS,)
    assert units.hidden.shape == (HIDDEN,)
    assert all(tensor.dtype == torch.bool and tensor.all() for _, _, tensor in units.items())
    some = full(make(family), ["ffn"], 0.5, torch.float64)
    assert some.parts() == ("ffn",) and some.ffn.tolist() == [0.5] * LAYERS and some.ffn.dtype == torch.float64


def test_full_refuses_a_part_that_is_none():
    with pytest.raises(LmcompressError, match="unknown part 'neuron'; did you mean 'neurons'"):
        full(make("bert"), ["neuron"])


def test_items_say_part_and_block():
    units = full(make("bert"), ["heads", "layers"])
    assert [(part, block) for part, block, _ in units.items()] == [
        ("heads", 0), ("heads", 1), ("heads", 2), ("layers", 0),
    ]  # fmt: skip


@given(st.sets(st.sampled_from(PARTS)))
def test_a_state_comes_back(parts):
    units = full(make("gpt2"), parts, 1.0, torch.float32).map(torch.rand_like)
    again = Units.from_state_dict(units.state_dict())
    assert again.parts() == units.parts()
    for (_, _, one), (_, _, other) in zip(units.items(), again.items(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["head.0"], "unknown part 'head'"),
        (["heads"], "named like heads.0 or attention, got 'heads'"),
        (["ffn.0"], "named like heads.0 or attention, got 'ffn.0'"),
        (["heads.x"], "got 'heads.x'"),
        (["heads.0", "heads.2"], r"every block from 0, got blocks \[0, 2\]"),
    ],
)
def test_a_state_of_something_else_is_refused(names, message):
    with pytest.raises(LmcompressError, match=message):
        Units.from_state_dict({name: torch.ones(2) for name in names})


def test_map_and_zip_go_through_every_tensor():
    model = make("bert")
    ones = full(model, ["heads", "ffn"], 1.0, torch.float32)
    both = ones.map(lambda x: x * 3).zip(full(model, ["ffn", "layers"], 2.0, torch.float32), torch.mul)
    assert both.parts() == ("ffn",) and both.ffn.tolist() == [6.0] * LAYERS
    assert ones.ffn.tolist() == [1.0] * LAYERS
    with pytest.raises(LmcompressError, match="same number of blocks on both sides, got 3 and 2"):
        ones.zip(Units(heads=ones.heads[:2]), torch.add)


def test_updated_replaces_parts():
    units = full(make("bert"), ["heads"])
    assert units.updated(ffn=torch.ones(LAYERS)).parts() == ("heads", "ffn")
    assert units.updated(heads=None).parts() == ()
    with pytest.raises(LmcompressError, match="unknown part 'fnn'; did you mean 'ffn'"):
        units.updated(fnn=torch.ones(LAYERS))


def test_a_mask_of_ones_foretells_the_same_shapes(family):
    model = make(family)
    assert masked_structure(structure_of(model), full(model, PARTS)) == structure_of(model)
    assert masked_structure(SHAPES, Units()) == SHAPES


def test_shapes_after_a_cut_are_counted():
    heads = (torch.tensor([True, False, True, True]), torch.tensor([False, False]))
    neurons = (torch.arange(9) < 4, torch.ones(5, dtype=torch.bool))
    after = masked_structure(SHAPES, Units(heads=heads, neurons=neurons))
    assert [(b.heads, b.ffn, b.source) for b in after.blocks] == [(3, 4, None), (0, 5, 7)]
    after = masked_structure(SHAPES, Units(heads=heads, attention=torch.tensor([False, True])))
    assert [b.heads for b in after.blocks] == [0, 0]
    after = masked_structure(SHAPES, Units(ffn=torch.tensor([True, False]), hidden=torch.arange(16) < 10))
    assert [b.ffn for b in after.blocks] == [9, 0] and after.hidden == 10


def test_blocks_that_stay_say_which_they_were():
    after = masked_structure(SHAPES, Units(layers=torch.tensor([False, True])))
    assert [b.source for b in after.blocks] == [7]
    after = masked_structure(SHAPES, Units(layers=torch.tensor([True, False])))
    assert [b.source for b in after.blocks] == [0]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Units(layers=torch.zeros(2, dtype=torch.bool)), "at least one of the layers"),
        (Units(hidden=torch.zeros(16, dtype=torch.bool)), "at least one hidden dimension"),
        (Units(ffn=torch.ones(2)), "must be bool, got torch.float32 for ffn"),
        (Units(ffn=torch.ones(3, dtype=torch.bool)), r"a mask of ffn must have the model's shapes \(2,\), got \(3,\)"),
        (Units(heads=(torch.ones(4, dtype=torch.bool),)), r"shapes \[\(4,\), \(2,\)\], got \[\(4,\)\]"),
    ],
)
def test_a_mask_that_cannot_be_is_refused(mask, message):
    with pytest.raises(LmcompressError, match=message):
        masked_structure(SHAPES, mask)
