"""config: what is written reads back the same, and what did not come from here is refused with one clear message."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcompress import CheckpointError, CompressionConfig
from lmcompress.config import FORMAT_VERSION, MAX_BLOCKS, MAX_HEADS, MAX_WIDTH, BlockShape, Provenance, Structure

blocks = st.builds(
    BlockShape,
    heads=st.integers(0, MAX_HEADS),
    ffn=st.integers(0, MAX_WIDTH),
    source=st.none() | st.integers(0, MAX_BLOCKS - 1),
)
structures = st.builds(
    Structure,
    head_size=st.integers(1, MAX_WIDTH),
    blocks=st.lists(blocks, min_size=1, max_size=5).map(tuple),
    hidden=st.none() | st.integers(1, MAX_WIDTH),
)
provenances = st.builds(
    Provenance,
    library_version=st.text(max_size=9),
    base_model=st.text(max_size=9),
    recipe=st.text(max_size=9),
    methods=st.lists(st.text(max_size=9), max_size=3).map(tuple),
)
configs = st.builds(CompressionConfig, structure=st.none() | structures, provenance=st.none() | provenances)


def valid():
    """A valid config as JSON, to be spoiled."""
    return {
        "quant_method": "lmcompress",
        "format_version": FORMAT_VERSION,
        "structure": {
            "head_size": 4,
            "blocks": [{"heads": 0, "ffn": 9}, {"heads": 1, "ffn": 0, "source": 2}],
            "hidden": 7,
        },
        "provenance": {"base_model": "bert-base-uncased", "methods": ["distillation"]},
    }


@settings(max_examples=100, deadline=None)
@given(configs)
def test_a_config_survives_json(config):
    again = CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert again == config and hash(again) == hash(config)
    assert again.structure == config.structure and again.provenance == config.provenance
    assert again.to_diff_dict() == config.to_dict()


def test_a_config_says_its_method_and_version_and_nothing_that_is_unset():
    assert CompressionConfig().to_dict() == {"quant_method": "lmcompress", "format_version": FORMAT_VERSION}
    assert CompressionConfig.from_dict(valid()).to_dict() == valid()


def test_unused_arguments_come_back_where_transformers_asks_for_them():
    config, unused = CompressionConfig.from_dict(valid(), return_unused_kwargs=True, device_map="cpu")
    assert config.to_dict() == valid() and unused == {"device_map": "cpu"}


def test_configs_of_different_shapes_are_different():
    other = valid() | {"structure": None}
    assert CompressionConfig.from_dict(valid()) != CompressionConfig.from_dict(other)
    assert CompressionConfig() != {"quant_method": "lmcompress"}


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**9])
def test_a_version_of_the_future_is_refused_with_the_way_out(version):
    with pytest.raises(CheckpointError, match=f"format version {version}.*reads up to {FORMAT_VERSION}.*pip install"):
        CompressionConfig.from_dict(valid() | {"format_version": version})


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, None, math.nan, []], ids=repr)
def test_a_version_that_is_no_number_is_refused(version):
    with pytest.raises(CheckpointError, match=r"format_version must be a whole number from 1, got"):
        CompressionConfig.from_dict(valid() | {"format_version": version})


def test_an_unknown_key_is_named_with_the_known_ones():
    with pytest.raises(
        CheckpointError, match="unknown keys: bits, strcture. Known are: format_version, provenance, structure"
    ):
        CompressionConfig.from_dict(valid() | {"strcture": {}, "bits": 4})


def test_a_future_version_is_told_before_its_unknown_keys():
    with pytest.raises(CheckpointError, match=f"format version {FORMAT_VERSION + 1}"):
        CompressionConfig.from_dict(valid() | {"format_version": FORMAT_VERSION + 1, "weights": {}})


def test_the_first_version_is_read_and_kept_as_it_says():
    structure = {"head_size": 4, "blocks": [{"heads": 2, "ffn": 9}, {"heads": 1, "ffn": 24, "source": 2}]}
    first = valid() | {"format_version": 1, "structure": structure}
    assert CompressionConfig.from_dict(first).to_dict() == first


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda s: s["blocks"][0].update(heads=0), "a block with 0 heads or neurons"),
        (lambda s: s["blocks"][1].update(ffn=0), "a block with 0 heads or neurons"),
        (lambda s: s.update(hidden=7), "a hidden size of its own"),
    ],
    ids=["heads", "ffn", "hidden"],
)
def test_the_first_version_has_no_shapes_of_the_second(change, what):
    structure = {"head_size": 4, "blocks": [{"heads": 2, "ffn": 9}, {"heads": 1, "ffn": 24}]}
    change(structure)
    with pytest.raises(CheckpointError, match=f"says format version 1 and {what}, which came with version 2"):
        CompressionConfig.from_dict(valid() | {"format_version": 1, "structure": structure})


BAD = {
    ("structure", "head_size"): [0, -1, MAX_WIDTH + 1, 10**30, "4", 4.0, True, None, math.nan, []],
    ("structure", "blocks"): [
        [],
        None,
        3,
        "blocks",
        {},
        [None],
        [3],
        [[]],
        [{"heads": 1, "ffn": 1}] * (MAX_BLOCKS + 1),
    ],
    ("structure", "blocks", 0, "heads"): [-1, MAX_HEADS + 1, 10**9, "2", 2.5, True, None, math.inf],
    ("structure", "blocks", 1, "ffn"): [-1, MAX_WIDTH + 1, 10**9, "9", 9.0, False, None, math.nan],
    ("structure", "blocks", 1, "source"): [-1, MAX_BLOCKS, "1", True, 0.5],
    ("structure", "blocks", 1, "head"): [1],
    ("structure", "hidden"): [0, -1, MAX_WIDTH + 1, 10**9, "7", 7.0, False, math.nan],
    ("structure", "paths"): [[]],
    ("structure",): [[], 3, "x", True, {}],
    ("provenance", "base_model"): [3, None, [], "x" * 1025],
    ("provenance", "methods"): ["distillation", [1], {}, ["m"] * 65],
    ("provenance", "author"): ["me"],
    ("provenance",): [[], 3, "x"],
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(path, value, id=f"{'.'.join(map(str, path))}={str(value)[:20]}")
        for path, values in BAD.items()
        for value in values
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_place(path, value):
    config = valid()
    place = config
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(
        CheckpointError, match="quantization_config is not valid: " + ".".join(map(str, path))
    ) as caught:
        CompressionConfig.from_dict(config)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("missing", ["head_size", "blocks"])
def test_a_missing_value_is_named(missing):
    config = valid()
    del config["structure"][missing]
    with pytest.raises(CheckpointError, match=f"structure.{missing}: Field required"):
        CompressionConfig.from_dict(config)


def test_validated_shapes_cannot_be_changed_afterwards():
    config = CompressionConfig.from_dict(valid())
    with pytest.raises(ValueError, match="frozen"):
        config.structure.blocks[0].heads = 10**9
