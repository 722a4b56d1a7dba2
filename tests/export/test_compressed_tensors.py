"""compressed_tensors, pack_quantized: the tensors of the format, and what it refuses; loading is in tests/clients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import INPUTS, pack_model, parts_of, quantized
from packing import packed_with_attention as with_attention

from lmcompress import LmcompressError
from lmcompress.checkpoint.cutting import keep_heads
from lmcompress.checkpoint.schema import ActivationEncoding
from lmcompress.export import compressed_tensors, export_model
from lmcompress.export.compressed_tensors import export_compressed_tensors, refuse_inexpressible
from lmcompress.export.pack_quantized import entry_of, packed_words, why_not_expressible
from lmcompress.families import anatomy_of
from lmcompress.nn.packed import Layout, PackedLinear
from lmcompress.numerics.grids import PerGroup, PerRow, PerTensor
from lmcompress.numerics.inputs import static_range
from lmcompress.numerics.packing import container_for

QUANTIZERS = [
    ("minmax", 8), ("minmax", 4), ("minmax", 3), ("lsq", 2), ("elastic", 2), ("twn", "ternary"), ("binary", 1),
    ("asymmetric_minmax", 8), ("asymmetric_minmax", 4), ("asymmetric_minmax", 2),
]  # fmt: skip


def packed_linear(quantizer, bits, granularity, inputs=None, columns=10):
    made = quantized(torch.randn(6, columns), quantizer, bits, granularity)
    layout = Layout(made.grid, container_for(made.grid), made.granularity, made.zero_points is not None)
    layer = PackedLinear(columns, 6, layout, inputs)
    layer.fill(made, static_range(-3.0, 4.0, inputs) if inputs is not None and inputs.range == "static" else None)
    return layer


def words_to_codes(words, bits, columns):
    """The format as it is described, one code at a time."""
    rows = []
    for row in words.tolist():
        stream = sum((word % 2**32) << (32 * number) for number, word in enumerate(row))
        rows.append([(stream >> (bits * i)) % 2**bits - 2 ** (bits - 1) for i in range(columns)])
    return torch.tensor(rows)


def decoded(entry, shape):
    """The weights that the tensors of the format stand for."""
    tensors, arguments = entry.tensors, entry.scheme["weights"]
    plain = entry.scheme["format"] == "int-quantized"
    codes = tensors["weight"].long() if plain else words_to_codes(tensors["weight_packed"], entry.bits, shape[1])
    scales = tensors["weight_scale"]
    zero_points = torch.zeros_like(scales)
    if not arguments["symmetric"]:
        stored = tensors["weight_zero_point"]
        zero_points = stored if plain else words_to_codes(stored.t(), entry.bits, shape[0]).t()
    wide = shape[1] // scales.shape[1]
    return (codes - zero_points.repeat_interleave(wide, 1)).float() * scales.repeat_interleave(wide, 1)


@pytest.mark.parametrize("granularity", [PerTensor(), PerRow(), PerGroup(5)], ids=str)
@pytest.mark.parametrize(("quantizer", "bits"), QUANTIZERS, ids=str)
def test_the_tensors_of_the_format_stand_for_the_very_weights(quantizer, bits, granularity):
    layer = packed_linear(quantizer, bits, granularity)
    entry = entry_of(layer, inputs=None)
    assert torch.equal(decoded(entry, layer.shape), layer.dequantized())
    assert entry.bits == (8 if bits == 8 else 4)
    expected = ("group", 5) if isinstance(granularity, PerGroup) else ("channel", None)
    assert (entry.scheme["weights"]["strategy"], entry.scheme["weights"].get("group_size")) == expected


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.sampled_from([4, 8]), st.integers(0, 2**31))
def test_codes_lie_in_words_from_the_lowest_bit_on(columns, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns), generator=generator).to(torch.int8)
    words = packed_words(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (3, math.ceil(columns * bits / 32))
    assert torch.equal(words_to_codes(words, bits, columns), codes.long())


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (ActivationEncoding(bits=8), "symmetric dynamic scale"),
        (ActivationEncoding(bits=8, granularity="token"), "symmetric dynamic scale"),
        (ActivationEncoding(bits=8, symmetric=False), "include the padding"),
        (ActivationEncoding(bits=8, symmetric=False, granularity="token", clip=2.5), "does not clip"),
        (ActivationEncoding(bits=8, range="static"), "go down to -128, ours to -127"),
        (ActivationEncoding(bits=8, symmetric=False, granularity="token"), None),
        (ActivationEncoding(bits=8, symmetric=False, range="static"), None),
        (ActivationEncoding(bits=8, range="static", full=True), None),
    ],
)
def test_activations_are_expressible_or_not(inputs, reason):
    found = why_not_expressible(inputs, vectors=False)
    assert (found is None) if reason is None else (reason in found)


def test_a_static_range_has_its_zero_point_in_twos_complement():
    inputs = ActivationEncoding(bits=8, symmetric=False, range="static")
    layer = packed_linear("minmax", 8, PerRow(), inputs)
    tensors = entry_of(layer, inputs=inputs).tensors
    assert torch.equal(tensors["input_scale"], layer.input_scale)
    assert int(tensors["input_zero_point"]) == int(layer.input_zero_point) - 128
    assert tensors["weight"].dtype == torch.int8


def test_dynamic_ranges_by_token_of_vectors_are_refused():
    by_token = ActivationEncoding(bits=8, symmetric=False, granularity="token")
    assert "one vector" in why_not_expressible(by_token, vectors=True)


def packed(make_model, family="bert", **options):
    model = make_model(family).eval()
    pack_model(model, parts_of(model, granularity=PerRow(), **options))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda make: make("bert"), "needs a model with packed matrices"),
        (lambda make: packed(make, "gpt2"), "knows nn.Linear and nn.Embedding, not the Conv1D of gpt2"),
        (lambda make: packed(make, inputs="dynamic"), 'activations="none" exports the weights alone'),
        (lambda make: with_attention(make("bert"), INPUTS["static"]), "quantizes no queries, keys, values"),
    ],
)
def test_what_the_format_cannot_express_is_refused(make, message, make_model):
    with pytest.raises(LmcompressError, match=message):
        refuse_inexpressible(make(make_model))


def test_uneven_shapes_are_refused(make_model):
    model = make_model("bert").eval()
    keep_heads(anatomy_of(model).blocks[0], [0, 2])
    pack_model(model, parts_of(model))
    with pytest.raises(LmcompressError, match="has the shapes of stock configs: .* Export to onnx or openvino instead"):
        refuse_inexpressible(model)


def test_weights_alone_are_always_expressible(make_model):
    refuse_inexpressible(packed(make_model, inputs="dynamic"), activations="none")
    with pytest.raises(LmcompressError, match="must be auto or none"):
        refuse_inexpressible(packed(make_model), activations="static")


def test_the_package_is_named_where_it_is_missing(make_model, monkeypatch, tmp_path):
    def missing(name, extra):
        raise LmcompressError(f'pip install "lmcompress[{extra}]"')

    monkeypatch.setattr(compressed_tensors, "library", missing)
    with pytest.raises(LmcompressError, match=r"lmcompress\[compressed-tensors\]"):
        export_compressed_tensors(packed(make_model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_of_graphs_are_refused(make_model, tmp_path):
    with pytest.raises(LmcompressError, match="opset, task must be left out for compressed-tensors"):
        export_model(packed(make_model), tmp_path / "out", to="compressed-tensors", opset=21, task="embeddings")
