"""models that nobody has described: quantized, made sparse, clustered and stored by their blocks alone."""

import pytest
import torch
import transformers
from families import inputs, make

from lmcompress import CompressedModel
from lmcompress.clustering import SharingConfig, share_weights
from lmcompress.errors import LmcompressError, UnknownFamilyError
from lmcompress.families import is_described, outline_of
from lmcompress.families.weights import weighted_modules
from lmcompress.pruning import full
from lmcompress.quantization import POST_TRAINING, plan, quantize

SIZES = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
PEGASUS = dict(layers=2, attention_heads=4, ffn_dim=24)


def megatron():
    return transformers.MegatronBertForMaskedLM(transformers.MegatronBertConfig(**SIZES, max_position_embeddings=40))


def olmo2():
    config = transformers.Olmo2Config(**SIZES, num_key_value_heads=2, max_position_embeddings=40, eos_token_id=0)
    return transformers.Olmo2ForCausalLM(config)


def pegasus():
    sizes = {f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in PEGASUS.items()}
    config = transformers.PegasusConfig(vocab_size=64, d_model=16, max_position_embeddings=40, **sizes)
    return transformers.PegasusForConditionalGeneration(config)


@pytest.fixture(params=[megatron, olmo2, pegasus], ids=lambda build: build.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


def batch(model, seed=0):
    given = inputs(model, seed=seed)
    return given | ({"decoder_input_ids": given["input_ids"]} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def logits(model):
    return model(**batch(model)).logits


def test_the_outline_is_the_heaviest_list_of_blocks_and_the_embeddings(model):
    assert not is_described(model)
    outline = outline_of(model)
    assert len(outline.blocks) == 2 and len({type(block.module) for block in outline.blocks}) == 1
    assert outline.embedding("word_embeddings") is model.get_input_embeddings()
    planned = weighted_modules(model)
    inside = {id(module) for block in outline.block_list for module in block.modules()}
    assert all((one.block is not None) == (id(one.module) in inside) for one in planned)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("build", [megatron, olmo2])
def test_it_is_quantized_packed_and_reloaded(build, method, tmp_path):
    torch.manual_seed(0)
    model = build().eval()
    dense = logits(model)
    config = POST_TRAINING.model_copy(update={"activations": None})
    report = quantize(model, config, [batch(model, seed) for seed in range(3)], method=method, progress=False)
    said = logits(model)
    assert float((said - dense).norm() / dense.norm()) < 0.05
    # every matrix of every block, and the embeddings
    assert len(report.matrices) >= 1 + 2 * 6
    CompressedModel(model).save_pretrained(tmp_path)
    reloaded = CompressedModel.from_pretrained(tmp_path).model
    assert type(reloaded) is type(model)
    torch.testing.assert_close(logits(reloaded), said, rtol=0, atol=1e-5)


def test_it_is_clustered_and_stored(model, tmp_path):
    share_weights(model, SharingConfig(clusters=4, embedding_clusters=4))
    # zero is not counted
    assert all(one.weight.unique().numel() <= 5 for one in weighted_modules(model) if one.default)
    said = logits(model)
    CompressedModel(model).save_pretrained(tmp_path, storage="auto")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), said)


def test_streams_hold_it_to_the_bit(model, tmp_path):
    CompressedModel(model).save_pretrained(tmp_path, storage="auto")
    assert torch.equal(logits(CompressedModel.from_pretrained(tmp_path).model), logits(model))


def test_what_needs_a_description_says_so(model):
    known = f"does not know the model family '{model.config.model_type}'.*need no description.*CONTRIBUTING"
    with pytest.raises(UnknownFamilyError, match=known):
        full(model, ["heads"])
    with pytest.raises(UnknownFamilyError, match=known):
        plan(model, POST_TRAINING.model_copy(update={"attention": True}))
    with pytest.raises(LmcompressError, match=f"knows no family {model.config.model_type}"):
        CompressedModel(model).save_pretrained("unused", format="self_loading")


def test_a_table_of_two_stacks_is_not_quantized():
    with pytest.raises(LmcompressError, match="pegasus has two stacks.*share one table.*embeddings=None"):
        plan(pegasus(), POST_TRAINING)
    planned = plan(pegasus(), POST_TRAINING.model_copy(update={"embeddings": None}))
    assert len(planned.matrices) >= 2 * 2 * 6


def test_a_model_without_a_list_of_blocks_is_refused():
    model = make("bert", "base")
    model.config.model_type = "own"
    model.encoder.layer = torch.nn.Sequential(*model.encoder.layer)
    with pytest.raises(UnknownFamilyError, match="BertModel must have a list of blocks of one class.*found none"):
        outline_of(model)
