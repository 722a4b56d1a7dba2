"""encoding: packed models answer as their codes say, in memory and from disk; nothing else loads as if it were one."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from families import BY_NAME, FAMILIES, HEAD_SIZE, auto_class, cut_to_nothing, cut_unevenly, inputs, make, outputs
from packing import INPUTS, packed, packed_with_attention, parts_of, projections, quantized
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments, pipeline
from transformers.pytorch_utils import Conv1D

from lmcompress import CheckpointError, CompressedModel, LmcompressError
from lmcompress.checkpoint.config import recorded_compression
from lmcompress.checkpoint.encoding import (
    Packable,
    encoded_names,
    encoding_of,
    matrices,
    pack_model,
    tied_head,
    unpacked,
    weight_count,
)
from lmcompress.checkpoint.structure import structure_of
from lmcompress.families import anatomy_of, weight_view
from lmcompress.nn.packed import Packed, PackedConv1D, PackedEmbedding, PackedLinear, TiedHead
from lmcompress.numerics.grids import PerGroup, PerRow, PerTensor
from lmcompress.pruning.structured.surgery import refuse_quantized

QUANTIZERS = [("minmax", 8), ("elastic", 4), ("minmax", 3), ("elastic", 2), ("twn", "ternary"), ("binary", 1),
              ("asymmetric_minmax", 4)]  # fmt: skip


@pytest.fixture(params=FAMILIES, ids=str)
def family(request):
    return request.param


def whole(model):
    return model


SHAPES = [whole, cut_unevenly, cut_to_nothing]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(family, head, shape)``: a packed model and the folder it was saved to."""
    made = {}

    def save(family, head="classification", shape=whole):
        key = (str(family), head, shape.__name__)
        if key not in made:
            model = packed(shape(make(family, head)), "minmax", 4, inputs="dynamic")
            folder = tmp_path_factory.mktemp("packed") / "-".join(key)
            CompressedModel(model).save_pretrained(folder)
            made[key] = model, folder
        return made[key]

    return save


@pytest.fixture
def damaged(saved, tmp_path):
    """``damaged(family)``: a copy of a packed checkpoint that a test may spoil."""

    def copied(family="bert", head="classification"):
        return shutil.copytree(saved(family, head)[1], tmp_path / "damaged")

    return copied


def fake_quantized(model, parts):
    """The dense model with the numbers that codes stand for in place of its weights."""
    model, known = copy.deepcopy(model), matrices(model)
    doubles = matrices(model)
    for path, part in parts.items():
        weight = known[path].weight if isinstance(known[path], nn.Embedding) else weight_view(known[path])
        with torch.no_grad():
            target = doubles[path].weight if weight is known[path].weight else weight_view(doubles[path])
            target.copy_(part.quantized.values)
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head", ["classification", "language"])
def test_packed_is_dense_with_quantized_weights(family, head, shape):
    model = shape(make(family, head))
    parts = parts_of(model, "minmax", 4)
    expected = outputs(fake_quantized(model, parts))
    pack_model(model, parts)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    kinds = {path: type(module) for path, module in matrices(model).items()}
    assert {kinds[path] for path in parts} <= {PackedLinear, PackedConv1D, PackedEmbedding}
    assert sum(issubclass(kind, Packed) for kind in kinds.values()) == len(parts)


@pytest.mark.parametrize(("quantizer", "bits"), QUANTIZERS, ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_every_quantizer_survives_the_files(name, quantizer, bits, tmp_path):
    model = make(name, "language")
    granularity = [PerTensor(), PerRow(), PerGroup(HEAD_SIZE)][QUANTIZERS.index((quantizer, bits)) % 3]
    parts = parts_of(model, quantizer, bits, granularity=granularity)
    expected = outputs(fake_quantized(model, parts))
    pack_model(model, parts)
    CompressedModel(model).save_pretrained(tmp_path / "m")
    reloaded = auto_class(BY_NAME[name], "language").from_pretrained(tmp_path / "m")
    assert torch.equal(outputs(reloaded), outputs(model))
    torch.testing.assert_close(outputs(reloaded), expected, rtol=1e-5, atol=1e-5)
    assert encoding_of(reloaded) == encoding_of(model)


@pytest.mark.parametrize("said", INPUTS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_every_description_of_inputs_survives_the_files(name, said, tmp_path):
    model = packed(make(name, "language"), "minmax", 8, inputs=said)
    before = outputs(model)
    measured = CompressedModel(model).save_pretrained(tmp_path / "m")
    reloaded = auto_class(BY_NAME[name], "language").from_pretrained(tmp_path / "m")
    assert torch.equal(outputs(reloaded), before) and measured.relative_error == 0
    assert {entry.inputs for entry in encoding_of(reloaded).weights} == {INPUTS[said]}


@pytest.mark.parametrize(
    ("head", "shape"), [("base", whole), ("language", cut_unevenly), ("classification", cut_to_nothing)]
)
def test_the_reloaded_model_gives_exactly_the_same_logits(family, head, shape, saved):
    model, folder = saved(family, head, shape)
    reloaded = auto_class(family, head).from_pretrained(folder)
    assert type(reloaded) is type(model) and structure_of(reloaded) == structure_of(model)
    assert torch.equal(outputs(reloaded), outputs(model))
    assert torch.equal(outputs(CompressedModel.from_pretrained(folder).model), outputs(model))
    half = auto_class(family, head).from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    kept = encoded_names(half)
    for name, tensor in half.state_dict().items():
        own = torch.uint8 if name.endswith("weight") else torch.float32
        assert tensor.dtype == (own if name in kept else torch.bfloat16)
        assert name not in kept or torch.equal(tensor, model.state_dict()[name])
    assert outputs(half).dtype == torch.bfloat16 and outputs(half).isfinite().all()


@pytest.mark.parametrize("head", ["classification", "language"])
def test_a_checkpoint_with_a_head_loads_without_it_and_saves_again(family, head, saved, tmp_path):
    model, folder = saved(family, head)
    base = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        expected = model.base_model(**inputs(model))[0]
    assert torch.equal(outputs(base), expected)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path / "base")), expected)


def test_a_head_that_is_packed_is_left_behind_with_it(tmp_path):
    model = make("bert")
    pack_model(model, parts_of(model, more=("pooler.dense", "classifier")))
    CompressedModel(model).save_pretrained(tmp_path / "m")
    assert "classifier" in json.dumps(json.loads((tmp_path / "m" / "config.json").read_text()))
    base = AutoModel.from_pretrained(tmp_path / "m")
    assert "classifier" not in encoding_of(base).by_module() and "pooler.dense" in encoding_of(base).by_module()
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path / "base")), outputs(base))


def test_a_checkpoint_without_a_head_loads_for_a_task(family, saved):
    model, folder = saved(family, "base")
    reloaded = auto_class(family, "classification").from_pretrained(folder, num_labels=5)
    assert torch.equal(outputs(reloaded.base_model), outputs(model))
    tokens = auto_class(family, "language").from_pretrained(folder)
    assert torch.equal(outputs(tokens.base_model), outputs(model))
    assert isinstance(tokens.get_output_embeddings(), TiedHead) == (tied_head(make(family, "language")) is not None)


def test_the_tied_head_has_one_set_of_codes(family, saved):
    model, folder = saved(family, "language")
    head = model.get_output_embeddings()
    if tied_head(make(family, "language")) is None:
        assert isinstance(head, nn.Linear) and family.name == "electra-projected"
        return
    assert isinstance(head, TiedHead) and head.__dict__["embedding"] is model.get_input_embeddings()
    words = [
        name
        for name, t in load_file(folder / "model.safetensors").items()
        if t.dtype == torch.uint8 and t.numel() >= 512
    ]
    assert len(words) <= 1 + len(projections(make(family, "language")))
    reloaded = auto_class(family, "language").from_pretrained(folder)
    reloaded.tie_weights()
    assert torch.equal(outputs(reloaded), outputs(model))


def test_codes_are_one_row_of_bytes_so_that_nothing_takes_them_for_weights(family, saved):
    model, folder = saved(family, "language")
    tensors = load_file(folder / "model.safetensors")
    prefix = model.base_model_prefix + "."
    for path in encoding_of(model).by_module():
        name = f"{path}.weight" if f"{path}.weight" in tensors else f"{prefix}{path}.weight"
        assert tensors[name].dtype == torch.uint8 and tensors[name].dim() == 1
        assert tensors[f"{name}_scales"].dtype == torch.float32


_LOAD_PLAIN = """
# past the word that refuses the config (tests/checkpoint/test_entry_point.py), to the shapes in the files
how = {"experts_implementation": "eager"}
for auto, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        getattr(transformers, auto).from_pretrained(folder, **how)
        print("loaded", auto)
    except RuntimeError as error:
        print("refused", auto)
"""


def test_without_lmcompress_a_packed_checkpoint_is_refused(saved, without_lmcompress):
    asked = []
    for name, auto in (("bert", "AutoModelForMaskedLM"), ("gpt2", "AutoModelForCausalLM")):
        folder = saved(name, "language")[1]
        asked += ["AutoModel", folder, auto, folder]
    answer = without_lmcompress(_LOAD_PLAIN, *asked)
    assert "loaded" not in answer.stdout and answer.stdout.count("refused") == 4, answer.stdout + answer.stderr


def test_a_reloaded_model_saves_with_stock_transformers_and_loads_again(family, saved, tmp_path):
    model, folder = saved(family, "language", cut_unevenly)
    auto_class(family, "language").from_pretrained(folder).save_pretrained(tmp_path / "again", max_shard_size="2KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = auto_class(family, "language").from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(again), outputs(model))
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert new["quantization_config"] == old["quantization_config"]


def test_a_packed_model_saves_with_stock_transformers_straight_away(family, tmp_path):
    model = packed(make(family, "language"))
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(outputs(auto_class(family, "language").from_pretrained(tmp_path / "m")), outputs(model))


def test_copies_are_whole_and_independent(family, saved):
    model, _ = saved(family, "language")
    again = copy.deepcopy(model)
    expected = outputs(model)
    assert torch.equal(outputs(again), expected)
    for module in again.modules():
        if isinstance(module, Packed):
            module.weight_scales.zero_()
    assert torch.equal(outputs(model), expected) and not torch.equal(outputs(again), expected)


def test_generation_with_a_cache_and_pipelines_just_work(saved):
    model, folder = saved("gpt2", "language")
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = inputs(model)["input_ids"]
    how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert torch.equal(reloaded.generate(ids, **how), model.generate(ids, **how))


def test_packed_weights_alone_generate_the_same_with_and_without_a_cache():
    model = packed(make("gpt2", "language"), "minmax", 8)
    ids = inputs(model)["input_ids"]
    how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=1)
    assert torch.equal(model.generate(ids, use_cache=True, **how), model.generate(ids, use_cache=False, **how))


def test_a_pipeline_runs(saved):
    model, folder = saved("bert")
    reloaded = auto_class(BY_NAME["bert"], "classification").from_pretrained(folder)
    vocabulary = {f"w{i}": i for i in range(60)} | {"[UNK]": 60, "[CLS]": 61, "[SEP]": 62, "[PAD]": 63}
    file = folder.parent / "vocab.txt"
    file.write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizer(str(file))
    answer = pipeline("text-classification", model=reloaded, tokenizer=tokenizer, device="cpu")("w1 w2 w3")
    assert answer[0]["label"].startswith("LABEL_")


def test_a_format_that_has_no_codes_is_refused_with_the_reason(saved, tmp_path):
    model, _ = saved("bert")
    with pytest.raises(LmcompressError, match="no vanilla form.*codes"):
        CompressedModel(model).save_pretrained(tmp_path / "m", format="vanilla")
    assert not (tmp_path / "m").exists()
    assert CompressedModel(model).report()["vanilla"] is False


def test_training_a_packed_model_is_refused_with_the_way_out(saved, tmp_path):
    model, folder = saved("bert")
    reloaded = auto_class(BY_NAME["bert"], "classification").from_pretrained(folder)
    rows = [dict(input_ids=row, labels=i % 3) for i, row in enumerate(inputs(model, rows=4)["input_ids"])]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=4, dataloader_pin_memory=False, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(reloaded, arguments, train_dataset=rows, eval_dataset=rows)
    with pytest.raises(LmcompressError, match=r"cannot be trained.*unpacked\(model\)"):
        trainer.train()
    assert "eval_loss" in trainer.evaluate()
    dense = unpacked(reloaded)
    Trainer(dense, arguments, train_dataset=rows).train()
    assert all(parameter.isfinite().all() for parameter in dense.parameters())


@pytest.mark.parametrize(
    ("head", "shape"), [("classification", cut_to_nothing), ("language", cut_unevenly), ("language", whole)]
)
def test_unpacked_is_dense_with_the_weights_of_the_codes(family, head, shape, tmp_path):
    stock = shape(make(family, head))
    parts = parts_of(stock, "minmax", 3)
    expected = fake_quantized(stock, parts)
    model = copy.deepcopy(stock)
    pack_model(model, parts)
    dense = unpacked(model)
    assert torch.equal(outputs(dense), outputs(expected))
    wanted, found = expected.state_dict(), dense.state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert encoding_of(dense) is None and encoding_of(model) is not None
    tied = stock.get_output_embeddings() is not None and tied_head(stock) is not None
    if tied:
        assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert weight_count(model) == weight_count(dense) == sum(p.numel() for p in dense.parameters())
    CompressedModel(dense).save_pretrained(tmp_path / "m")
    # and quantized again: the very same codes
    pack_model(dense, parts)
    assert torch.equal(outputs(dense), outputs(model)) and encoding_of(dense) == encoding_of(model)


def test_unpacked_from_disk_is_stock_again(saved, tmp_path):
    _, folder = saved("gpt2", "language")
    dense = unpacked(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    assert {p.dtype for p in dense.parameters()} == {torch.float32}
    assert isinstance(dense.transformer.h[0].attn.c_attn, Conv1D)
    provenance = recorded_compression(dense.config)
    assert provenance is None or provenance.encoding is None
    CompressedModel(dense).save_pretrained(tmp_path / "m", format="vanilla")


def test_the_config_of_a_packed_model_is_short_and_says_the_bits(saved):
    _, folder = saved("bert", "language")
    encoding = json.loads((folder / "config.json").read_text())["quantization_config"]["encoding"]
    assert [entry["granularity"] for entry in encoding["weights"]] == ["row", "tensor"]
    assert {entry["container"] for entry in encoding["weights"]} == {4}
    assert encoding["weights"][0]["modules"] == ["embeddings.word_embeddings"]


@pytest.mark.parametrize(("range_", "shape"), [("dynamic", whole), ("static", cut_to_nothing)])
def test_attention_is_quantized_on_both_sides_of_the_files(family, range_, shape, tmp_path):
    said = INPUTS["dynamic" if range_ == "dynamic" else "static asymmetric"]
    model, plain = shape(make(family, "language")), shape(make(family, "language"))
    packed_with_attention(model, said)
    packed(plain)
    CompressedModel(model).save_pretrained(tmp_path / "m")
    reloaded = auto_class(family, "language").from_pretrained(tmp_path / "m")
    assert torch.equal(outputs(reloaded), outputs(model)) and not torch.equal(outputs(reloaded), outputs(plain))
    base = AutoModel.from_pretrained(tmp_path / "m")
    assert set(encoding_of(base).attention.model_dump()) == {"queries", "keys", "values", "probabilities"}
    assert encoding_of(base).attention.keys == said
    dense = unpacked(reloaded)
    assert torch.equal(outputs(dense), outputs(unpacked(plain)))
    assert encoding_of(dense) is None


# what is wrong in memory


def test_packing_nothing_or_what_is_not_there_is_refused():
    model = make("bert")
    before = outputs(model)
    parts = parts_of(model)
    with pytest.raises(LmcompressError, match="at least one module to pack, got none"):
        pack_model(model, {})
    path = "encoder.layer.0.attention.self.query"
    with pytest.raises(
        LmcompressError, match=r"no module encoder.layer.0.attention.self.qeury to pack; did you mean .*query"
    ):
        pack_model(model, {**parts, "encoder.layer.0.attention.self.qeury": parts[path]})
    with pytest.raises(LmcompressError, match=r"must have shape \(24, 16\), as \(out, in\), got \(16, 16\)"):
        pack_model(model, {**parts, "encoder.layer.0.intermediate.dense": parts[path]})
    asked = parts["embeddings.word_embeddings"]._replace(inputs=INPUTS["dynamic"])
    with pytest.raises(LmcompressError, match="input of embeddings.word_embeddings cannot be quantized"):
        pack_model(model, {**parts, "embeddings.word_embeddings": asked})
    with pytest.raises(LmcompressError, match="container 2 holds 4 levels"):
        pack_model(model, {path: parts[path]._replace(container=2)})
    assert torch.equal(outputs(model), before) and encoding_of(model) is None
    packed(model)
    with pytest.raises(LmcompressError, match="is packed already"):
        pack_model(model, {path: parts[path]})


def test_a_tied_head_cannot_be_packed_by_itself():
    model = make("gpt2", "language")
    with pytest.raises(LmcompressError, match="there is no module lm_head to pack"):
        pack_model(model, {"lm_head": Packable(quantized(model.lm_head.weight, "minmax", 8, PerRow()))})


def test_a_packed_model_is_packed_further():
    model = make("bert")
    parts = parts_of(model, embeddings=False)
    words = parts_of(model)["embeddings.word_embeddings"]
    pack_model(model, parts)
    pack_model(model, {"embeddings.word_embeddings": words})
    assert encoding_of(model).by_module().keys() == {*parts, "embeddings.word_embeddings"}


def test_a_parametrized_module_is_refused():
    model = make("bert")
    parts = parts_of(model)
    torch.nn.utils.parametrize.register_parametrization(
        model.bert.encoder.layer[0].attention.self.query, "weight", nn.Identity()
    )
    with pytest.raises(LmcompressError, match="must be packed without parametrizations"):
        pack_model(model, parts)


def test_a_packed_matrix_cannot_be_looked_at_as_numbers(saved):
    model, _ = saved("bert")
    with pytest.raises(LmcompressError, match="has codes and no matrix: use the dense model"):
        weight_view(anatomy_of(model).blocks[0].get("ffn_in"))


def test_a_packed_model_is_not_pruned(saved):
    model, _ = saved("bert")
    with pytest.raises(LmcompressError, match=r"weights are packed: prune first.*unpacked\(model\)"):
        refuse_quantized(model)
    refuse_quantized(unpacked(model))


# what is wrong in a checkpoint


def spoil(folder, change):
    """Change ``quantization_config`` of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def spoil_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


def _with_module(config, path):
    config["encoding"]["weights"][1]["modules"].append(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: _with_module(c, "encoder.layer.7.output.dense"),
            "names a module encoder.layer.7.output.dense, which",
        ),
        (lambda c: _with_module(c, "regressor"), "names a module regressor, which this BertForSequenceClassification"),
        (lambda c: _with_module(c, "encoder.layer.0"), "names a module encoder.layer.0, which"),
        (lambda c: _with_module(c, "embeddings.LayerNorm"), "names a module embeddings.LayerNorm, which"),
        (lambda c: _with_module(c, "classifier"), r"classifier.weight has shape \(3, 16\) in the checkpoint|missing"),
        (lambda c: _with_module(c, "embeddings.word_embeddings"), "embeddings.word_embeddings is encoded twice"),
        (lambda c: c["encoding"]["weights"][1].update(container=8), r"has shape \(128,\) in the checkpoint.*\(256,\)"),
        (
            lambda c: c["encoding"]["weights"][1].update(granularity=7),
            "does not fit module .*: the size of a group must",
        ),
        (lambda c: c["encoding"]["weights"][1].update(granularity="row"), r"has shape \(1, 1\) in the checkpoint"),
        (lambda c: c["encoding"]["weights"][0].update(granularity=8), r"has shape \(64, 1\) in the checkpoint"),
        (lambda c: c["encoding"]["weights"][1]["modules"].pop(), "weight has shape .*its config says|has a tensor"),
        (lambda c: c.pop("encoding"), "has a tensor .*weight_scales, which its config excludes"),
        (lambda c: c["encoding"]["weights"][1].update(bits=4), "encoding.weights.1.bits: Extra inputs"),
        (lambda c: c.update(format_version=2), "has format version 2 and an encoding, which needs version 3"),
        (
            lambda c: c["encoding"].update(attention={"queries": {"bits": 8, "range": "static"}}),
            "queries_scale is missing from the checkpoint",
        ),
        (
            lambda c: c["encoding"]["weights"][1].update(inputs={"bits": 8, "range": "static"}),
            "input_scale is missing from the checkpoint",
        ),
    ],
)
def test_a_config_that_lies_is_refused(damaged, change, message):
    folder = damaged()
    spoil(folder, change)
    with pytest.raises(CheckpointError, match=message):
        transformers.BertForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({QUERY: t[QUERY][:-1].clone()}), r"query.weight has shape \(127,\) in the checkpoint"),
        (lambda t: t.update({QUERY: torch.cat([t[QUERY], t[QUERY]])}), r"query.weight has shape \(256,\)"),
        (lambda t: t.update({QUERY: t[QUERY].reshape(16, 8)}), r"query.weight has shape \(16, 8\)"),
        (lambda t: t.update({QUERY: t[QUERY].float()}), "query.weight is stored as F32, its config says U8"),
        (lambda t: t.update({QUERY: t[QUERY] | 0xFF}), "query.weight: packed codes must be below 15"),
        (
            lambda t: t.update({QUERY + "_scales": -t[QUERY + "_scales"]}),
            "query.weight: scales must be finite and not neg",
        ),
        (lambda t: t.update({QUERY + "_scales": t[QUERY + "_scales"] / 0}), "query.weight: scales must be finite"),
        (lambda t: t.update({QUERY + "_scales": t[QUERY + "_scales"].half()}), "stored as F16, its config says F32"),
        (lambda t: t.pop(QUERY + "_scales"), "query.weight_scales is missing from the checkpoint"),
        (lambda t: t.pop(QUERY), "query.weight is missing from the checkpoint"),
        (lambda t: t.pop("bert.embeddings.word_embeddings.weight"), "word_embeddings.weight is missing"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(damaged, change, message):
    folder = damaged()
    spoil_tensors(folder, change)
    for load in (transformers.BertForSequenceClassification, AutoModel):
        with pytest.raises(CheckpointError, match=message):
            load.from_pretrained(folder)


def test_a_base_checkpoint_whose_packed_pooler_is_missing_is_refused(tmp_path):
    model = make("bert", "base")
    pack_model(model, parts_of(model, more=("pooler.dense",)))
    model.save_pretrained(tmp_path / "m")
    spoil_tensors(tmp_path / "m", lambda t: t.pop("pooler.dense.weight"))
    with pytest.raises(CheckpointError, match="pooler.dense.weight is missing from the checkpoint"):
        transformers.BertForSequenceClassification.from_pretrained(tmp_path / "m")


def test_attention_without_heads_is_refused(damaged):
    folder = damaged()
    spoil(folder, lambda c: c.update(structure={"head_size": 4, "blocks": [{"heads": 0, "ffn": 24}] * 3}))
    spoil(folder, lambda c: c["encoding"].update(attention={"queries": {"bits": 8}}))
    with pytest.raises(CheckpointError, match="no block has heads|names a module"):
        transformers.BertForSequenceClassification.from_pretrained(folder)
