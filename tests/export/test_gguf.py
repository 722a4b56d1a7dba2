"""gguf: the codes of a packed model in GGUF's blocks, read back by the package and by Transformers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from packing import quantized
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lmcompress import EquivalenceError, LmcompressError
from lmcompress.checkpoint.saving import outputs_of, random_batches
from lmcompress.export import ExportConfig, export_model
from lmcompress.export.gguf_blocks import blocks_of
from lmcompress.nn.packed import Layout, PackedLinear
from lmcompress.numerics.grids import PerGroup, PerRow, PerTensor
from lmcompress.numerics.packing import container_for
from lmcompress.quantization import QuantizationConfig, WeightScheme
from lmcompress.quantization.ptq import quantize

gguf = pytest.importorskip("gguf")

SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=60, max_position_embeddings=64, initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=1,
)  # fmt: skip


def model_of(name="Llama", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def rounded(model, quantizer="minmax", bits=4, granularity=32, embeddings=None):
    weights = WeightScheme(quantizer=quantizer, bits=bits, granularity=granularity)
    config = QuantizationConfig(weights=weights, embeddings=embeddings, activations=None, attention=False)
    quantize(model, config, progress=False)
    return model


def packed_linear(quantizer, bits, granularity, columns=64):
    torch.manual_seed(0)
    made = quantized(torch.randn(6, columns), quantizer, bits, granularity)
    layout = Layout(made.grid, container_for(made.grid), made.granularity, made.zero_points is not None)
    layer = PackedLinear(columns, 6, layout, None)
    layer.fill(made, None)
    return layer


@pytest.mark.parametrize("granularity", [PerTensor(), PerRow(), PerGroup(32), PerGroup(64)], ids=str)
@pytest.mark.parametrize(
    ("quantizer", "bits", "kind"),
    [("minmax", 8, "Q8_0"), ("minmax", 4, "Q4_0"), ("lsq", 2, "Q4_0"), ("twn", "ternary", "Q4_0"),
     ("asymmetric_minmax", 4, "Q4_1"), ("asymmetric_minmax", 2, "Q4_1")],
)  # fmt: skip
def test_the_package_reads_from_the_blocks_what_the_codes_stand_for(quantizer, bits, kind, granularity):
    layer = packed_linear(quantizer, bits, granularity)
    blocks = blocks_of("layer", layer)
    assert blocks.kind == kind
    read = gguf.quants.dequantize(blocks.data.numpy(), gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(read, blocks.values.numpy())
    # a scale and a minimum of half precision: 11 bits each
    expected = layer.dequantized()
    assert float((blocks.values - expected).abs().max()) <= 2 * 2**-11 * float(expected.abs().max()) * 16
    assert blocks.exact is torch.equal(blocks.values, expected)


def test_scales_of_half_precision_are_kept_exactly():
    layer = packed_linear("minmax", 4, PerGroup(32))
    layer.weight_scales.copy_(layer.weight_scales.half().float())
    blocks = blocks_of("layer", layer)
    assert blocks.exact and torch.equal(blocks.values, layer.dequantized())


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (("minmax", 4, PerGroup(16)), "has one for 16 of a row of 64: quantize by row or in groups"),
        (("asymmetric_minmax", 8, PerRow()), "GGUF has no 8-bit block with zero points, which layer has"),
    ],
)
def test_codes_that_no_block_holds_are_refused(layer, words):
    with pytest.raises(LmcompressError, match=words):
        blocks_of("layer", packed_linear(*layer))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
def test_transformers_reads_the_model_from_the_file(name, tied, tmp_path):
    model = model_of(name, tie_word_embeddings=tied)
    report = export_model(model, tmp_path / "dense", to="gguf")
    assert set(report.kinds) == {"F32"} and report.equivalence.relative_error <= 1e-5
    packed = rounded(copy.deepcopy(model), embeddings=WeightScheme(quantizer="minmax", granularity="row"))
    report = export_model(packed, tmp_path / "packed", to="gguf")
    assert report.kinds["Q4_0"] == 14 and report.kinds["Q8_0"] == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", gguf_file="model.gguf")
    batches = random_batches(packed)
    for ours, theirs in zip(outputs_of(packed, batches), outputs_of(loaded, batches), strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-2 * float(ours.abs().max())
    assert any("scales are rounded to half precision" in note for note in report.notes)


def test_dense_matrices_are_converted_where_that_is_asked_for_and_said(tmp_path):
    report = export_model(model_of(), tmp_path / "out", to="gguf", weights="q8_0")
    assert 0 < report.equivalence.relative_error < 0.5
    with pytest.raises(EquivalenceError, match="differs from the one in memory"):
        export_model(model_of(), tmp_path / "strict", to="gguf", weights="q4_0", tolerance=1e-4)
    assert report.kinds["Q8_0"] == 16
    assert any("16 matrices were rounded to Q8_0" in note for note in report.notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "plain rotary positions, got"),
        ({"mlp_bias": True}, "feed-forward networks without biases"),
        ({"attention_bias": True}, "written for llama without biases of attention"),
    ],
)
def test_what_the_format_lacks_is_refused_before_anything_is_written(changes, words, tmp_path):
    with pytest.raises(LmcompressError, match=words):
        export_model(model_of(**changes), tmp_path / "out", to="gguf")
    assert not list(tmp_path.iterdir())


def test_other_families_and_quantized_inputs_are_refused(tmp_path):
    from families import make

    with pytest.raises(LmcompressError, match="gguf is written for causal models of llama, qwen2, qwen3, got BertFor"):
        export_model(make("bert"), tmp_path / "out", to="gguf")
    model = model_of()
    config = QuantizationConfig(weights=WeightScheme(quantizer="minmax", granularity="row"), attention=False)
    quantize(model, config.model_copy(update={"embeddings": None}), progress=False)
    with pytest.raises(LmcompressError, match="gguf quantizes no activations"):
        export_model(model, tmp_path / "out", to="gguf")
    assert export_model(model, tmp_path / "out", to="gguf", activations="none").kinds["Q8_0"] == 14


def test_settings_of_other_targets_are_refused():
    with pytest.raises(ValueError, match="weights must be left out for onnx, got 'f16'"):
        ExportConfig(to="onnx", weights="f16")
    with pytest.raises(ValueError, match="opset must be left out for gguf"):
        ExportConfig(to="gguf", opset=20)
    with pytest.raises(
        ValueError, match="activations must be auto or none for gguf, which quantizes none, got 'static'"
    ):
        ExportConfig(to="gguf", activations="static")


def byte_level_tokenizer(texts):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<end>")


def test_a_byte_level_tokenizer_is_in_the_file(tmp_path):
    tokenizer = byte_level_tokenizer(["the bank of the river was flooded", "the river bank"] * 4)
    model = model_of(vocab_size=len(tokenizer) + 4)
    report = export_model(model, tmp_path / "out", to="gguf", tokenizer=tokenizer)
    assert not any("has no tokenizer" in note for note in report.notes)
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "the river was flooded: été"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    fields = gguf.GGUFReader(tmp_path / "out/model.gguf").fields
    assert len(fields["tokenizer.ggml.tokens"].data) == model.config.vocab_size


def test_a_file_without_a_tokenizer_says_so(tmp_path):
    report = export_model(model_of(), tmp_path / "out", to="gguf")
    assert any("The file has no tokenizer: none was given" in note for note in report.notes)
