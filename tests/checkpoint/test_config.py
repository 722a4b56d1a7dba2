"""config: what is written reads back the same, and what did not come from here is refused with one clear message."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcompress import CheckpointError, CompressionConfig
from lmcompress.checkpoint.config import FORMAT_VERSION
from lmcompress.checkpoint.schema import (
    MAX_BLOCKS,
    MAX_HEADS,
    MAX_WIDTH,
    ActivationEncoding,
    AttentionEncoding,
    BlockShape,
    Encoding,
    FactorizedEmbeddings,
    GridEncoding,
    GroupedLayers,
    LowRankLayers,
    Provenance,
    SeparableLayers,
    SharedBlocks,
    Structure,
    WeightEncoding,
)
from lmcompress.numerics.grids import PER_TENSOR, Grid, PerGroup, PerRow
from lmcompress.numerics.packing import CONTAINERS, container_for

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
activations = st.builds(
    ActivationEncoding,
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    granularity=st.sampled_from(["tensor", "token"]),
    clip=st.none() | st.floats(1e-3, 1e3),
) | st.builds(
    lambda bits, symmetric, full: ActivationEncoding(
        bits=bits, symmetric=symmetric, range="static", full=full and symmetric
    ),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.booleans(),
)


@st.composite
def encodings(draw):
    entries = []
    for number in range(draw(st.integers(0, 3))):
        grid = draw(
            st.sampled_from([Grid(-127, 255), Grid(-8, 16), Grid(-1, 3), Grid(-3, 4, 2), Grid(-1, 2, 2), Grid(0, 256)])
        )
        fitting = CONTAINERS[CONTAINERS.index(container_for(grid)) :]
        entries.append(
            WeightEncoding(
                grid=GridEncoding(low=grid.low, levels=grid.levels, stride=grid.stride),
                container=draw(st.sampled_from(fitting)),
                granularity=draw(st.sampled_from(["tensor", "row", 1, 64])),
                zero_points=grid.low == 0 and draw(st.booleans()),
                inputs=draw(st.none() | activations),
                modules=tuple(f"h.{number}.{name}" for name in draw(st.sets(st.sampled_from("abc"), min_size=1))),
            )
        )
    attention = st.none() | st.builds(AttentionEncoding, queries=st.none() | activations, values=activations)
    return Encoding(weights=tuple(entries), attention=draw(attention))


paths = st.sampled_from(["h.0.mlp.c_fc", "wte", "h.1.attn.c_attn"]).map(lambda path: (path,))
layers = st.one_of(
    st.builds(LowRankLayers, kind=st.just("low_rank"), rank=st.integers(1, MAX_WIDTH), modules=paths),
    st.builds(FactorizedEmbeddings, kind=st.just("factorized_embedding"), rank=st.integers(1, 9), modules=paths),
    st.builds(
        GroupedLayers,
        kind=st.just("grouped"),
        groups=st.integers(1, 9),
        input_order=st.booleans(),
        output_order=st.booleans(),
        modules=paths,
    ),
    st.builds(SeparableLayers, kind=st.just("separable"), kernel=st.integers(1, 9), blocks=st.just((0, 3))),
    st.builds(SharedBlocks, kind=st.just("shared"), sources=st.just((0, 0, 2, 2))),
)

configs = st.builds(
    CompressionConfig,
    structure=st.none() | structures,
    provenance=st.none() | provenances,
    encoding=st.none() | encodings(),
    layers=st.none() | st.lists(layers, max_size=1).map(tuple),
)


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
        "encoding": {
            "weights": [
                {"grid": {"low": -1, "levels": 3}, "container": "base3", "granularity": "row", "modules": ["wte"]},
                {
                    "grid": {"low": 0, "levels": 16},
                    "container": 4,
                    "granularity": 64,
                    "zero_points": True,
                    "inputs": {"bits": 8, "symmetric": False, "range": "static"},
                    "modules": ["h.0.attn.c_attn", "h.0.attn.c_proj"],
                },
            ],
            "attention": {"queries": {"bits": 8, "granularity": "token", "clip": 2.5}},
        },
        "provenance": {"base_model": "bert-base-uncased", "methods": ["distillation"]},
    }


@settings(max_examples=100, deadline=None)
@given(configs)
def test_a_config_survives_json(config):
    again = CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert again == config and hash(again) == hash(config)
    assert again.structure == config.structure and again.provenance == config.provenance
    assert again.encoding == config.encoding and again.layers == config.layers
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
        CheckpointError,
        match=r"unknown keys: bits, strcture\. Known are: encoding, format_version, layers, provenance, storage, "
        r"structure\.",
    ):
        CompressionConfig.from_dict(valid() | {"strcture": {}, "bits": 4})


def test_a_future_version_is_told_before_its_unknown_keys():
    with pytest.raises(CheckpointError, match=f"format version {FORMAT_VERSION + 1}"):
        CompressionConfig.from_dict(valid() | {"format_version": FORMAT_VERSION + 1, "weights": {}})


def test_the_first_version_is_read_and_kept_as_it_says():
    structure = {"head_size": 4, "blocks": [{"heads": 2, "ffn": 9}, {"heads": 1, "ffn": 24, "source": 2}]}
    first = valid() | {"format_version": 1, "structure": structure}
    del first["encoding"]
    assert CompressionConfig.from_dict(first).to_dict() == first


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_versions_have_no_encoding(version):
    old = valid() | {"format_version": version, "structure": None}
    with pytest.raises(CheckpointError, match=f"has format version {version} and an encoding, which needs"):
        CompressionConfig.from_dict(old)


def test_an_encoding_speaks_the_language_of_lowbit():
    words, matrices = CompressionConfig.from_dict(valid()).encoding.weights
    assert words.grid.grid() == Grid(-1, 3) and words.grouping() == PerRow()
    assert matrices.grid.grid() == Grid(0, 16) and matrices.grouping() == PerGroup(64)
    assert words.model_copy(update={"granularity": "tensor"}).grouping() == PER_TENSOR
    by_module = CompressionConfig.from_dict(valid()).encoding.by_module()
    assert by_module == {"wte": words, "h.0.attn.c_attn": matrices, "h.0.attn.c_proj": matrices}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["weights"][0].update(container=1), "container 1 holds 2 levels, the grid has 3: at least 'base3'"),
        (lambda e: e["weights"][0].update(zero_points=True), "zero points need a grid whose codes are 0 or more"),
        (lambda e: e["weights"][0]["grid"].update(low=-127, levels=256), "codes must fit one byte"),
        (lambda e: e["weights"][0].update(modules=["wte", "wte"]), "module wte is encoded twice"),
        (lambda e: e["weights"][0].update(modules=["h.0.attn.c_proj"]), "module h.0.attn.c_proj is encoded twice"),
        (lambda e: e["weights"][1]["inputs"].update(granularity="token"), "a static range must have granularity"),
        (lambda e: e["weights"][1]["inputs"].update(clip=1.0), "a static range must have .* no clip"),
        (lambda e: e["weights"][1]["inputs"].update(full=True), "full is for symmetric static ranges only"),
        (lambda e: e["attention"]["queries"].update(full=True), "full is for symmetric static ranges only"),
    ],
)
def test_an_encoding_that_contradicts_itself_is_refused(change, message):
    config = valid()
    change(config["encoding"])
    with pytest.raises(CheckpointError, match=f"quantization_config is not valid: encoding.*{message}"):
        CompressionConfig.from_dict(config)


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
    with pytest.raises(CheckpointError, match=f"has format version 1 and {what}, which needs version 2"):
        CompressionConfig.from_dict({"format_version": 1, "structure": structure})


ENTRY = ("encoding", "weights", 1)
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
    (*ENTRY, "grid", "low"): [-129, 256, "0", 0.0, None, True, math.nan],
    (*ENTRY, "grid", "levels"): [1, 257, 0, -3, 10**9, "16", 16.0, None, True],
    (*ENTRY, "grid", "stride"): [0, -1, 256, 1.0, "1", None],
    (*ENTRY, "grid", "high"): [3],
    (*ENTRY, "container"): [5, 0, -1, "4", "base2", 4.0, True, None, [], 16],
    (*ENTRY, "granularity"): [0, -1, MAX_WIDTH + 1, "group", "64", 64.0, True, None, math.nan, []],
    (*ENTRY, "zero_points"): [1, "yes", None],
    (*ENTRY, "inputs", "bits"): [2, 16, "8", 8.0, None, True],
    (*ENTRY, "inputs", "symmetric"): ["auto", 1, None],
    (*ENTRY, "inputs", "range"): ["learned", None, 3],
    (*ENTRY, "inputs", "granularity"): ["row", 64, None],
    (*ENTRY, "inputs", "clip"): [0.0, -1.0, math.nan, math.inf, "2.5", True],
    (*ENTRY, "inputs", "scale"): [1.0],
    (*ENTRY, "modules"): [[], None, "wte", {}, 3, ["w"] * 70_000],
    (*ENTRY, "modules", 0): ["", "../wte", "a b", "h..0", ".h", "h.", "x" * 257, 3, None, "wte\n"],
    ("encoding", "weights"): [None, 3, "x", {}, [None], [[]]],
    ("encoding", "attention", "queries", "bits"): [3, "8"],
    ("encoding", "attention", "scores"): [None],
    ("encoding",): [[], 3, "x", True],
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
