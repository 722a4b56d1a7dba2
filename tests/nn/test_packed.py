"""modules: packed modules compute what their dense doubles do with the weights that the codes stand for."""

import copy
import pickle

import pytest
import torch
from packing import INPUTS, quantized
from torch import nn

from lmcompress import CheckpointError, LmcompressError
from lmcompress.nn.packed import Layout, PackedConv1D, PackedEmbedding, PackedLinear, TiedHead
from lmcompress.numerics.grids import PerGroup, PerRow, PerTensor
from lmcompress.numerics.inputs import quantize_input, static_range
from lmcompress.numerics.packing import container_for

QUANTIZERS = [
    ("minmax", 8), ("minmax", 4), ("minmax", 3), ("lsq", 2), ("elastic", 2), ("twn", "ternary"), ("binary", 1),
    ("asymmetric_minmax", 8), ("asymmetric_minmax", 4),
]  # fmt: skip
GRANULARITIES = {"tensor": PerTensor(), "row": PerRow(), "group": PerGroup(5)}


def layout_of(made):
    return Layout(made.grid, container_for(made.grid), made.granularity, made.zero_points is not None)


def linear(quantizer="minmax", bits=8, granularity=None, inputs="none", bias=True, kind=PackedLinear):
    """A packed layer from 10 to 6, and what it was made of."""
    generator = torch.Generator().manual_seed(3)
    made = quantized(torch.randn(6, 10, generator=generator), quantizer, bits, granularity or PerRow())
    said = INPUTS[inputs]
    given = static_range(-3.0, 4.0, said) if said is not None and said.range == "static" else None
    parameter = nn.Parameter(torch.randn(6, generator=generator)) if bias else None
    layer = kind(10, 6, layout_of(made), said, parameter)
    layer.fill(made, given)
    return layer.eval(), made, given


def table(bits=8, granularity=None, quantizer="minmax", **given):
    made = quantized(
        torch.randn(12, 10, generator=torch.Generator().manual_seed(4)), quantizer, bits, granularity or PerRow()
    )
    embedding = PackedEmbedding(12, 10, layout_of(made), **given)
    embedding.fill(made)
    return embedding.eval(), made


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", [PackedLinear, PackedConv1D])
@pytest.mark.parametrize(("quantizer", "bits"), QUANTIZERS, ids=str)
def test_a_packed_layer_is_the_product_of_quantized_numbers(quantizer, bits, kind, inputs):
    layer, made, given = linear(quantizer, bits, inputs=inputs, kind=kind)
    x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(5))
    read = x if layer.inputs is None else quantize_input(x, layer.inputs, *(given or (None, None))).values
    expected = torch.nn.functional.linear(read, made.values, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.dequantized(), made.values)
    assert layer.weight.dim() == 1 and layer.weight.dtype == torch.uint8


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_granularities_and_no_bias(granularity):
    layer, made, _ = linear("minmax", 4, GRANULARITIES[granularity], bias=False)
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(layer(x), x @ made.values.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("quantizer", "bits"), QUANTIZERS, ids=str)
def test_an_embedding_looks_rows_up(quantizer, bits, granularity):
    embedding, made = table(bits, GRANULARITIES[granularity], quantizer)
    ids = torch.tensor([[3, 0, 11], [3, 3, 7]])
    assert torch.equal(embedding(ids), made.values[ids])
    for beyond in (12, -1):
        with pytest.raises(IndexError):
            embedding(torch.tensor([beyond]))


def test_a_tied_head_owns_nothing_but_its_bias_and_follows_copies():
    embedding, made = table()
    model = nn.ModuleDict({"words": embedding, "head": TiedHead(embedding, nn.Parameter(torch.ones(12)))}).eval()
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(5))
    expected = torch.nn.functional.linear(x, made.values, torch.ones(12))
    torch.testing.assert_close(model["head"](x), expected, rtol=1e-5, atol=1e-5)
    assert {name for name in model.state_dict() if name.startswith("head")} == {"head.bias"}
    assert not hasattr(model["head"], "weight") and len(list(model.modules())) == 3
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again["head"].__dict__["embedding"] is again["words"] is not embedding
        again["words"].weight_scales.mul_(2.0)
        torch.testing.assert_close(again["head"](x) - 1, 2 * (expected - 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model["head"](x), expected, rtol=1e-5, atol=1e-5)


def test_scales_stay_float32_whatever_the_model_is_cast_to():
    layer, made, _ = linear(inputs="static asymmetric")
    embedding, words = table()
    x, ids = torch.randn(3, 10), torch.tensor([1, 4])
    layer(x)
    for module in (layer.to(torch.bfloat16), embedding.bfloat16()):
        assert module.weight_scales.dtype == torch.float32 and module.weight.dtype == torch.uint8
    assert layer.input_scale.dtype == torch.float32 and layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.dequantized(), made.values)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(embedding(ids), words.values[ids].bfloat16())
    assert torch.equal(embedding.float()(ids), words.values[ids])


def test_loading_another_state_is_seen_by_the_product():
    (layer, _, _), (other, made, _) = linear("minmax", 8), linear("mse", 8)
    x = torch.randn(3, 10)
    layer(x)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, made.values, other.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["layer", "embedding", "head"])
def test_training_is_refused_with_the_way_out(what):
    layer, (embedding, _) = linear()[0], table()
    head = TiedHead(embedding)
    x = torch.randn(3, 10)
    embedding.train()
    run = {
        "layer": lambda: layer.train()(x),
        "embedding": lambda: embedding(torch.tensor([1])),
        "head": lambda: head(x),
    }
    with pytest.raises(LmcompressError, match=r"cannot be trained.*lmcompress.checkpoint.encoding.unpacked\(model\)"):
        run[what]()
    with torch.no_grad():
        run[what]()


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("weight_scales", (2, 0), -1.0, "scales must be finite and not negative, got -1.0"),
        ("weight_scales", (2, 0), float("nan"), "scales must be finite and not negative, got nan"),
        ("weight_scales", (2, 0), float("inf"), "scales must be finite and not negative, got inf"),
        ("weight", (3,), 255, "packed codes must be below 15"),
        ("input_scale", (0,), 0.0, "scale of h.0's input must be finite and above 0"),
    ],
)
def test_tensors_that_no_packing_writes_are_refused(name, place, value, message):
    layer, _, _ = linear("minmax", 4, inputs="static")
    getattr(layer, name)[place] = value
    with pytest.raises(CheckpointError, match=message) as caught:
        layer.check("h.0")
    assert "h.0" in str(caught.value)


def test_a_zero_point_that_is_no_code_is_refused():
    layer, _, _ = linear("asymmetric_minmax", 4)
    layer.weight_zero_points[1] = 16
    with pytest.raises(CheckpointError, match="h.0.weight: zero points must be codes, at most 15, got 16"):
        layer.check("h.0")


def test_what_is_filled_in_must_fit():
    layer, made, _ = linear("minmax", 4, inputs="static")
    with pytest.raises(LmcompressError, match="a static range must come with its scale"):
        layer.fill(made)
    other = quantized(torch.randn(10, 6), "minmax", 4, PerRow())
    with pytest.raises(LmcompressError, match=r"must have shape \(6, 10\), as \(out, in\), got \(10, 6\)"):
        layer.fill(other, (torch.ones(1), None))
    with pytest.raises(LmcompressError, match="must be made as the layout says, Layout.*got Layout"):
        layer.fill(quantized(torch.randn(6, 10), "asymmetric_minmax", 3, PerRow()), (torch.ones(1), None))
    with pytest.raises(LmcompressError, match="must come with a zero point where it is not symmetric, and only there"):
        layer.fill(made, (torch.ones(1), torch.ones(1, dtype=torch.uint8)))
    weight = torch.randn(6, 10)
    weight[0, 0] = float("nan")
    with pytest.raises(LmcompressError, match="weights must be finite to be quantized, got 1 of 60"):
        layer.fill(quantized(weight, "minmax", 4, PerRow()), (torch.ones(1), None))


def test_autocast_changes_nothing():
    layer, _, _ = linear(inputs="dynamic")
    x = torch.randn(3, 10)
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain)
