"""behaviour: a compressed model answers what a stock model's methods answer, or says why not."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from compacting import embeddings, everything
from families import FAMILIES, FFN, HEAD_SIZE, HEADS, HIDDEN, auto_class, cut_to_nothing, cut_unevenly, make, outputs
from packing import INPUTS, packed_with_attention, parts_of
from safetensors import safe_open
from transformers import AutoModel, BertModel, GenerationConfig, GPT2LMHeadModel, Trainer, TrainingArguments

from lmcompress import CompressedModel, LmcompressError
from lmcompress.checkpoint.cutting import drop_heads, drop_neurons, keep_heads, keep_hidden, keep_layers, keep_neurons
from lmcompress.checkpoint.encoding import pack_model, unpacked, weight_count
from lmcompress.families import anatomy_of

HALF = [torch.float16, torch.bfloat16]


def packed(name="gpt2", head="language", **options):
    model = make(name, head)
    pack_model(model, parts_of(model, **options))
    return model


def reloaded(model, folder):
    CompressedModel(model).save_pretrained(folder)
    return type(model).from_pretrained(folder)


@pytest.fixture(params=["in memory", "loaded"])
def found(request, tmp_path):
    """``found(model)``: the model itself, or what its checkpoint gives."""
    return lambda model: model if request.param == "in memory" else reloaded(model, tmp_path / "m")


@pytest.mark.parametrize("name", [str(family) for family in FAMILIES])
def test_parameters_of_a_packed_model_are_those_of_the_dense_one(name, found):
    dense = make(name, "language")
    model = found(packed(name))
    assert model.num_parameters() == dense.num_parameters() == weight_count(model)
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    # of a packed model only what is not packed could be trained
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters(only_trainable=True) == trainable < dense.num_parameters()
    assert copy.deepcopy(model).num_parameters() == dense.num_parameters()


def test_a_copy_counts_its_own_parameters_and_a_pickle_loads():
    model = packed("bert", "base")
    twin = copy.deepcopy(model)
    twin.pooler = None
    assert twin.num_parameters() < model.num_parameters()
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model))), outputs(model))


def test_the_memory_of_a_packed_model_is_what_its_file_holds(tmp_path):
    model = reloaded(packed(bits=4), tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        held = sum(file.get_tensor(name).nbytes for name in file.keys())
    assert model.get_memory_footprint() == held < make("gpt2", "language").get_memory_footprint() / 2


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_packed_model_is_cast_like_a_dense_one(name, dtype, found):
    model = found(packed(name, "classification", inputs="dynamic"))
    before = outputs(model)
    cast = {torch.float16: model.half, torch.bfloat16: model.bfloat16}[dtype]()
    assert cast is model and model.dtype == dtype and outputs(model).dtype == dtype
    assert {name for name, tensor in model.named_buffers() if tensor.dtype == dtype} == set()
    torch.testing.assert_close(outputs(model).float(), before, rtol=0.1, atol=0.1)
    assert model.float() is model and outputs(model).dtype == torch.float32


@pytest.mark.parametrize("shape", [cut_unevenly, cut_to_nothing])
def test_a_loaded_pruned_model_is_cast_like_any_other(family, shape, tmp_path):
    model = reloaded(shape(make(family)), tmp_path / "m")
    expected = outputs(shape(make(family)).half())
    assert torch.equal(outputs(model.half()), expected) and model.dtype == torch.float16
    assert model.float().dtype == torch.float32


@pytest.mark.parametrize("inputs", ["none", "dynamic"])
def test_dequantizing_gives_the_dense_model_in_place(found, inputs):
    model = found(packed(inputs=inputs))
    expected = outputs(unpacked(model))
    assert model.dequantize() is model
    assert torch.equal(outputs(model), expected)
    assert not hasattr(model.config, "quantization_config") and "num_parameters" not in vars(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(ValueError, match="first quantize"):
        model.dequantize()


def test_dequantizing_keeps_pruned_shapes_and_takes_a_dtype(tmp_path):
    model = cut_unevenly(make("bert"))
    pack_model(model, parts_of(model))
    model = reloaded(model, tmp_path / "m")
    assert not model.hf_quantizer.is_trainable
    expected = outputs(unpacked(model).to(torch.bfloat16))
    model.dequantize(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and torch.equal(outputs(model), expected)
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_qat_trainable
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "dense")), expected)


def test_dequantizing_a_pruned_model_changes_nothing(tmp_path):
    model = reloaded(cut_unevenly(make("bert")), tmp_path / "m")
    assert torch.equal(outputs(model.dequantize()), outputs(cut_unevenly(make("bert"))))


def test_attention_is_no_longer_quantized_after_dequantizing(tmp_path):
    model = make("bert")
    model = reloaded(packed_with_attention(model, INPUTS["dynamic"]), tmp_path / "m")
    expected = outputs(unpacked(model))
    assert torch.equal(outputs(model.dequantize()), expected) and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("compress", ["pack", "factorize"])
def test_embeddings_that_cannot_grow_are_refused(compress, found):
    model = found(packed() if compress == "pack" else embeddings(make("gpt2", "language")))
    before = outputs(model)
    with pytest.raises(LmcompressError, match="cannot resize the token embeddings of this model from 64 to 70"):
        model.resize_token_embeddings(70)
    # what training scripts ask for when nothing is to be resized
    assert model.resize_token_embeddings() is model.resize_token_embeddings(64) is model.get_input_embeddings()
    assert torch.equal(outputs(model), before)


def test_dense_embeddings_of_a_packed_model_grow(found, tmp_path):
    model = found(packed("bert", "classification", embeddings=False))
    before = outputs(model)
    model.resize_token_embeddings(70)
    assert torch.equal(outputs(model), before) and model.config.vocab_size == 70
    assert torch.equal(outputs(reloaded(model, tmp_path / "larger")), before)


@pytest.mark.parametrize("shape", [cut_unevenly, cut_to_nothing])
def test_embeddings_of_a_pruned_model_grow(family, shape, found, tmp_path):
    model = found(shape(make(family, "language")))
    before = outputs(model)
    model.resize_token_embeddings(70, mean_resizing=False)
    torch.testing.assert_close(outputs(model)[..., :64], before)
    model.save_pretrained(tmp_path / "larger")
    assert torch.equal(outputs(auto_class(family, "language").from_pretrained(tmp_path / "larger")), outputs(model))


def arguments(folder):
    return TrainingArguments(
        output_dir=str(folder), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=2, per_device_eval_batch_size=2, dataloader_pin_memory=False,
    )  # fmt: skip


def test_a_trainer_measures_a_packed_model_and_does_not_train_it(found, tmp_path):
    model = found(packed("bert", "classification"))
    rows = [dict(input_ids=[5, 6, 7], labels=i % 3) for i in range(4)]
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows, eval_dataset=rows)
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7]] * 4), labels=torch.tensor([0, 1, 2, 0])).loss
    # the mean of the means of two batches
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(LmcompressError, match="a packed model cannot be trained"):
        trainer.train()


def test_what_can_be_trained_says_so(tmp_path):
    pruned = reloaded(cut_unevenly(make("bert")), tmp_path / "pruned")
    assert pruned.hf_quantizer.is_trainable and pruned.hf_quantizer.is_qat_trainable
    codes = reloaded(packed("bert"), tmp_path / "packed")
    assert not codes.hf_quantizer.is_trainable and not codes.hf_quantizer.is_qat_trainable


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_on_codes_are_refused_with_the_way_out(found):
    peft = pytest.importorskip("peft")
    model = found(packed("bert", "classification"))
    with pytest.raises(ValueError, match=r"codes, not trainable: model\.dequantize\(\) first\) is not supported"):
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]))
    model = found(packed("bert", "classification")).dequantize()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    merged = adapted.merge_and_unload()
    assert torch.isfinite(outputs(merged)).all() and "num_parameters" not in vars(merged)


# Caches


def causal_shapes():
    def fewer(model):
        for block in anatomy_of(model).blocks:
            keep_heads(block, [0, 2])
        return model

    return [cut_unevenly, cut_to_nothing, fewer]


@pytest.mark.parametrize("shape", causal_shapes(), ids=lambda f: f.__name__)
def test_continuous_batching_of_uneven_heads_is_refused_before_the_first_token(shape, found):
    model = found(shape(make("gpt2", "language")))
    with pytest.raises(LmcompressError, match=r"lays out one cache of 4 heads for all blocks, and those .* have \["):
        model.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=2))


def test_continuous_batching_of_quantized_attention_is_refused(found):
    model = found(packed_with_attention(make("gpt2", "language"), INPUTS["token"]))
    with pytest.raises(LmcompressError, match="its own attention in place of the quantized one"):
        model.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=2))


@pytest.mark.slow
def test_continuous_batching_of_whole_heads_answers_as_generate_does(found):
    model = make("gpt2", "language")
    keep_layers(model, [0, 2])
    keep_neurons(anatomy_of(model).blocks[0], range(5))
    model = found(model)
    how = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=1)
    answer = next(iter(model.generate_batch([[5, 6, 7]], generation_config=how, warmup=False).values()))
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)[0, 3:]
    assert answer.generated_tokens == expected.tolist()


@pytest.mark.parametrize("shape", causal_shapes(), ids=lambda f: f.__name__)
def test_static_caches_of_uneven_heads_are_right(shape, found):
    model = found(shape(make("gpt2", "language")))
    ids = torch.tensor([[5, 6, 7, 8], [1, 9, 10, 11]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    how = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=None)
    expected = model.generate(ids, use_cache=False, **how)
    for cache in ("static", "dynamic"):
        assert torch.equal(model.generate(ids, cache_implementation=cache, **how), expected)


# Models without a pooler


@pytest.mark.parametrize("format", ["native", "vanilla", "self_loading"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_model_without_a_pooler_is_saved_and_reloads_without_one(name, format, tmp_path):
    stock = make(name, "base")
    model = type(stock)(stock.config, add_pooling_layer=False)
    model.load_state_dict(stock.state_dict(), strict=False)
    if format != "vanilla":
        cut_unevenly(model)
    CompressedModel(model.eval()).save_pretrained(tmp_path / "m", format=format)
    again = AutoModel.from_pretrained(tmp_path / "m", **({"add_pooling_layer": False} if format == "vanilla" else {}))
    assert again.pooler is None and torch.equal(outputs(again), outputs(model))


def test_a_pooler_that_lost_a_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    CompressedModel(make("bert", "base")).save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    del tensors["pooler.dense.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LmcompressError, match="tensor pooler.dense.bias is missing"):
        BertModel.from_pretrained(tmp_path / "m")


# Cuts and the config

CUTS = {
    "heads": lambda model: keep_heads(anatomy_of(model).blocks[0], [1]),
    "no heads": lambda model: drop_heads(anatomy_of(model).blocks[1]),
    "neurons": lambda model: keep_neurons(anatomy_of(model).blocks[2], range(5)),
    "no neurons": lambda model: drop_neurons(anatomy_of(model).blocks[0]),
    "layers": lambda model: keep_layers(model, [2, 0]),
    "hidden": lambda model: keep_hidden(model, range(HIDDEN - 3)),
    "one width": lambda model: [keep_neurons(block, range(7)) for block in anatomy_of(model).blocks],
    "hidden and heads": lambda model: [
        keep_hidden(model, range(HIDDEN - HEAD_SIZE)),
        *(keep_heads(block, range(HEADS - 1)) for block in anatomy_of(model).blocks),
    ],
}
STOCK = ("layers", "one width", "hidden and heads")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("head", ["base", "language"])
def test_a_cut_model_saved_by_transformers_reloads(family, cut, head, tmp_path):
    model = make(family, head)
    CUTS[cut](model)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path)), outputs(model))
    described = "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    # a stock config says it where it can, and the checkpoint is then a stock one
    assert described == (cut not in STOCK)


@pytest.mark.parametrize("change", [*CUTS, "pack", "attention", "compact"])
def test_models_of_one_config_do_not_share_its_changes(change):
    config = make("bert").config
    one, other = (transformers.BertForSequenceClassification(config).eval() for _ in range(2))
    written, attention = config.to_json_string(), config._attn_implementation
    changes = CUTS | {
        "pack": lambda model: pack_model(model, parts_of(model)),
        "attention": lambda model: packed_with_attention(model, INPUTS["dynamic"]),
        "compact": everything,
    }
    changes[change](one)
    assert other.config is config and config.to_json_string() == written
    assert config._attn_implementation == attention
    assert all(module.config is one.config for module in one.modules() if hasattr(module, "config"))


def test_a_model_quantized_by_another_library_is_not_cut():
    model = make("bert")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    for cut in CUTS.values():
        with pytest.raises(LmcompressError, match=r"quantized by another library \(gptq\), as its config is"):
            cut(model)
    assert anatomy_of(model).blocks[0].ffn_width == FFN


def test_a_cut_loaded_model_is_recorded_with_its_provenance(tmp_path):
    model = reloaded(packed("bert", "language"), tmp_path / "m").dequantize()
    keep_heads(anatomy_of(model).blocks[0], [2])
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "again")), outputs(model))
    assert isinstance(reloaded(cut_unevenly(make("gpt2", "language")), tmp_path / "g"), GPT2LMHeadModel)
