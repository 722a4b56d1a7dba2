"""Encoder–decoders: two stacks of blocks, attention between them, and one table of words with several owners."""

import copy

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MBartConfig,
    T5Config,
    T5EncoderModel,
)

from lmcompress.activations.capture import Capture, resolve
from lmcompress.activations.walking import Walk, calibration_batches
from lmcompress.checkpoint.cutting import keep_layers
from lmcompress.errors import LmcompressError, UnknownFamilyError
from lmcompress.evaluation import size_on_disk
from lmcompress.families import anatomy_of, family_of, with_decoder_inputs
from lmcompress.model import CompressedModel
from lmcompress.nn.packed import PackedEmbedding, TiedEmbedding, TiedHead
from lmcompress.proof import tiny_model
from lmcompress.proof.tiny import tiny_inputs
from lmcompress.pruning.structured.scoring import score
from lmcompress.quantization import ActivationScheme, QuantizationConfig, WeightScheme, quantize

GATED = T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
CONFIGS = {"bart": BartConfig(), "mbart": MBartConfig(scale_embedding=True), "t5": T5Config(), "flan-t5": GATED}


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny_model(CONFIGS[request.param])


def labelled(model, **inputs):
    batch = tiny_inputs(model, **inputs)
    labels = batch.pop("decoder_input_ids").masked_fill(batch.pop("decoder_attention_mask") == 0, -100)
    return batch | {"labels": labels}


@torch.no_grad()
def logits(model, batch):
    return model(**with_decoder_inputs(model, batch)).logits


def eight_bits(**changes):
    row = WeightScheme(quantizer="minmax", bits=8, granularity="row")
    return QuantizationConfig(weights=row, embeddings=row, **{"activations": None, "attention": False, **changes})


def test_blocks_of_both_stacks_are_numbered_one_after_the_other(model):
    anatomy = anatomy_of(model)
    assert anatomy.starts == (0, 3) and len(anatomy.blocks) == 6
    assert [block.has("cross_query") for block in anatomy.blocks] == [False] * 3 + [True] * 3
    assert not [path for block in anatomy.blocks for path in block.undescribed() if "bias" not in path]


def test_the_description_follows_the_feed_forward_network():
    assert not family_of(T5Config()).gated
    assert all(stack.gated for stack in family_of(GATED).stacks)


def test_a_model_with_one_of_its_stacks_is_refused():
    config = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=64)
    with pytest.raises(UnknownFamilyError, match="T5EncoderModel has only one of them"):
        anatomy_of(T5EncoderModel(config))


def test_all_owners_of_the_embeddings_read_one_set_of_codes(model, tmp_path):
    before, batch = logits(model, labelled(model)), labelled(model)
    quantize(model, eight_bits(), progress=False)
    packed = [module for module in model.modules() if isinstance(module, PackedEmbedding)]
    assert packed == [model.get_input_embeddings()]
    readers = [module for module in model.modules() if isinstance(module, (TiedEmbedding, TiedHead))]
    assert len(readers) == 3
    assert all(reader.__dict__["embedding"] is packed[0] for reader in readers)
    after = logits(model, batch)
    assert float((after - before).square().sum() / before.square().sum()) < 0.02
    CompressedModel(model).save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "packed"), batch), after)


def test_a_copy_reads_the_codes_of_the_copy(model):
    quantize(model, eight_bits(), progress=False)
    twin = copy.deepcopy(model)
    readers = [module for module in twin.modules() if isinstance(module, TiedEmbedding)]
    assert all(reader.__dict__["embedding"] is twin.get_input_embeddings() for reader in readers)


def test_dequantized_weights_are_tied_again(model):
    batch, tied = labelled(model), dict(model.all_tied_weights_keys)
    quantize(model, eight_bits(), progress=False)
    packed = logits(model, batch)
    model.dequantize()
    assert model.all_tied_weights_keys == tied
    table = model.get_input_embeddings().weight
    assert all(model.get_parameter(name) is table for name in tied)
    torch.testing.assert_close(logits(model, batch), packed, atol=1e-5, rtol=1e-5)


def test_generation_of_a_packed_model_is_the_same_with_a_cache(model):
    quantize(model, eight_bits(), progress=False)
    settings = model.generation_config
    settings.eos_token_id = settings.forced_eos_token_id = settings.forced_bos_token_id = None
    batch = {name: value[:1] for name, value in labelled(model).items() if name != "labels"}
    answers = [model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert answers[0].shape == (1, 6) and torch.equal(*answers)


def test_the_range_of_what_a_decoder_reads_does_not_depend_on_padding(model):
    quantize(model, eight_bits(activations=ActivationScheme(bits=8, range="dynamic"), attention=True), progress=False)
    batch = labelled(model, rows=1, length=9, padded=False)
    padded = dict(batch)
    # as long as the targets, and full of other tokens than padding
    padded["input_ids"] = torch.cat([batch["input_ids"], torch.full((1, 4), 7)], dim=1)
    padded["attention_mask"] = torch.cat([batch["attention_mask"], torch.zeros(1, 4, dtype=torch.long)], dim=1)
    torch.testing.assert_close(logits(model, padded), logits(model, batch), atol=1e-5, rtol=1e-5)


def test_a_walk_over_both_stacks_is_the_forward_pass(model):
    data = calibration_batches(model, [labelled(model, seed=seed) for seed in (1, 2)])
    with torch.no_grad():
        walk = Walk(model, data)
        expected = walk.last_hidden(len(data))
        walk.start()
        for index in range(6):
            walk.step(index)
        for mine, theirs in zip(walk.hidden(), expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_calibration_needs_targets(model):
    batch = {name: value for name, value in labelled(model).items() if name != "labels"}
    with pytest.raises(LmcompressError, match="must have decoder_input_ids, or labels"):
        calibration_batches(model, [batch])


@pytest.mark.parametrize("shorter", [0, 3])
def test_scores_of_labels_are_those_with_the_decoder_s_inputs_given(model, shorter):
    batch = labelled(model)
    batch["labels"] = batch["labels"][:, : batch["labels"].shape[1] - shorter]
    given = with_decoder_inputs(model, batch)
    of_labels, of_both = (score(model, "fisher", ("neurons",), [one]).neurons for one in (batch, given))
    assert of_labels and of_both
    torch.testing.assert_close(of_labels, of_both, rtol=0, atol=0)


def test_layers_are_named_by_their_stack(model):
    assert resolve(model, "hidden", "decoder.2") == resolve(model, "hidden", 5) == ("hidden", 5)
    assert resolve(model, "scores", "encoder.-1") == ("scores", 3)
    with pytest.raises(LmcompressError, match=r"the decoder of a \w+ has layers 1 to 3"):
        resolve(model, "hidden", "decoder.4")


def test_the_output_is_what_the_head_reads(model):
    batch = tiny_inputs(model)
    with Capture(model, [("output", 6)]) as capture, torch.no_grad():
        answer = model(**batch, output_hidden_states=True)
        found = capture.take()["output", 6]
    torch.testing.assert_close(found, answer.decoder_hidden_states[-1])


def test_a_decoder_keeps_some_of_its_layers(model, tmp_path):
    keep_layers(model, [0, 2, 3])
    assert anatomy_of(model).starts == (0, 2)
    CompressedModel(model).save_pretrained(tmp_path / "fewer")
    with pytest.raises(LmcompressError, match="some of the encoder .* then some of the decoder"):
        keep_layers(model, [0, 1])


@pytest.mark.parametrize(("bits", "container"), [(8, 1.0), (4, 0.5), (2, 0.25)])
def test_a_bart_is_as_large_as_its_matrices(bits, container, tmp_path):
    config = BartConfig(
        vocab_size=500, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=40,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    matrices = 500 * 32 + (4 * 32 * 32 + 2 * 32 * 64) + 2 * (8 * 32 * 32 + 2 * 32 * 64)
    scale = WeightScheme(quantizer="mse", bits=bits, granularity="tensor")
    row = scale.model_copy(update={"granularity": "row"})
    quantize(
        model, QuantizationConfig(weights=scale, embeddings=row, activations=None, attention=False), progress=False
    )
    rest = sum(p.numel() for p in model.parameters()) + 500 + 500 + 6 + 20
    CompressedModel(model).save_pretrained(tmp_path / "model")
    found = size_on_disk(tmp_path / "model").weights_bytes
    # names of tensors besides
    assert matrices * container + 4 * rest <= found <= matrices * container + 4 * rest + 20_000
    assert isinstance(BartForConditionalGeneration.from_pretrained(tmp_path / "model"), BartForConditionalGeneration)
