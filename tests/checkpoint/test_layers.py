"""replacement: compact models reload to the bit by plain AutoModel, and nothing else loads as if it were one."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from compacting import (
    compact_causal,
    compact_uneven,
    embeddings,
    everything,
    grouped,
    low_rank,
    separable,
    shared,
    shared_uneven,
)
from families import LAYERS, auto_class, cut_to_nothing, cut_unevenly, inputs, make, outputs
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from lmcompress import CheckpointError, CompressedModel, CompressionConfig, LmcompressError
from lmcompress.checkpoint.config import FORMAT_VERSION, recorded_compression
from lmcompress.checkpoint.cutting import keep_heads, keep_hidden, keep_layers, keep_neurons
from lmcompress.checkpoint.layers import layers_of
from lmcompress.checkpoint.structure import structure_of
from lmcompress.evaluation import size_on_disk
from lmcompress.families import anatomy_of
from lmcompress.nn.embedding import FactorizedHead
from lmcompress.pruning.structured.surgery import refuse_quantized
from lmcompress.quantization import QuantizationConfig
from lmcompress.quantization.planning import plan
from lmcompress.students import by_layers, share_layers

KINDS = [low_rank, grouped, embeddings, separable, shared, everything]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(family, kind, head)``: a compact model and the folder it was saved to."""
    made = {}

    def save(family, kind, head="language"):
        key = (str(family), kind.__name__, head)
        if key not in made:
            model = kind(make(family, head))
            folder = tmp_path_factory.mktemp("compact") / "-".join(key)
            CompressedModel(model).save_pretrained(folder)
            made[key] = model, folder
        return made[key]

    return save


@pytest.fixture
def damaged(saved, tmp_path):
    """``damaged(kind)``: a copy of a compact checkpoint that a test may spoil."""

    def copied(kind, family="bert"):
        return shutil.copytree(saved(family, kind)[1], tmp_path / "damaged")

    return copied


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_plain_automodel_reloads_to_the_bit(family, kind, saved):
    model, folder = saved(family, kind)
    reloaded = auto_class(family, "language").from_pretrained(folder)
    assert torch.equal(outputs(reloaded), outputs(model))
    assert layers_of(reloaded) == layers_of(model) != ()
    assert recorded_compression(reloaded.config) == CompressedModel(model).compression
    assert sum(p.numel() for p in reloaded.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("coder", ["zstd", "huffman"])
def test_they_are_stored_as_streams_like_any_other(family, coder, saved, tmp_path):
    model, _ = saved(family, everything)
    CompressedModel(model).save_pretrained(tmp_path / "m", storage=coder)
    reloaded = auto_class(family, "language").from_pretrained(tmp_path / "m")
    assert torch.equal(outputs(reloaded), outputs(model)) and layers_of(reloaded) == layers_of(model)


def test_a_base_model_loads_from_a_head_and_a_head_from_a_base_model(family, saved, tmp_path):
    model, folder = saved(family, everything)
    base = AutoModel.from_pretrained(folder)
    expected = model.base_model(**inputs(model))[0]
    assert torch.equal(base(**inputs(model))[0], expected)
    CompressedModel(base).save_pretrained(tmp_path / "base")
    headed = auto_class(family, "classification").from_pretrained(tmp_path / "base")
    assert torch.equal(headed.base_model(**inputs(model))[0], expected) and layers_of(headed) == layers_of(model)


@pytest.mark.parametrize("kind", [low_rank, embeddings, everything], ids=lambda kind: kind.__name__)
def test_models_that_pruning_has_cut_become_compact_too(family, kind, tmp_path):
    model = make(family, "classification")
    for block, heads in zip(anatomy_of(model).blocks, ([0, 1], [0, 3], [1, 2]), strict=True):
        keep_heads(block, heads)
        keep_neurons(block, range(10))
    kind(model)
    folder = tmp_path / "m"
    assert CompressedModel(model).save_pretrained(folder).max_error == 0
    reloaded = CompressedModel.from_pretrained(folder)
    assert torch.equal(outputs(reloaded.model), outputs(model)) and reloaded.structure == structure_of(model)


def test_stock_transformers_saves_a_reloaded_model_again_sharded(family, saved, tmp_path):
    model, folder = saved(family, everything)
    auto_class(family, "language").from_pretrained(folder).save_pretrained(tmp_path / "again", max_shard_size="2KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert torch.equal(outputs(auto_class(family, "language").from_pretrained(tmp_path / "again")), outputs(model))


def test_a_file_holds_shared_parameters_once(saved):
    names = load_file(saved("bert", everything)[1] / "model.safetensors")
    held = [name for name in names if ".layer.1." in name and ".order" not in name]
    # its number of the block that has them, sizes and orders
    assert all(names[name].dtype == torch.int64 for name in held)
    model, folder = saved("bert", shared)
    assert size_on_disk(folder).weights_bytes < 4 * sum(p.numel() for p in model.parameters()) + 20_000


_LOAD_PLAIN = """
# past the word that refuses the config (tests/checkpoint/test_entry_point.py), to the shapes in the files
how = {"experts_implementation": "eager"}
for auto, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        getattr(transformers, auto).from_pretrained(folder, **how)
        print("loaded", folder)
    except RuntimeError as error:
        print("refused", auto)
"""


def test_without_lmcompress_every_kind_is_refused(saved, without_lmcompress):
    asked = []
    for name in ("bert", "gpt2", "distilbert"):
        for kind in KINDS:
            asked += ["AutoModel", saved(name, kind)[1]]
    answer = without_lmcompress(_LOAD_PLAIN, *asked)
    assert "loaded" not in answer.stdout, answer.stdout
    assert answer.stdout.count("refused") == 3 * len(KINDS), answer.stdout + answer.stderr


def test_copies_are_whole_and_independent(family, saved):
    model, _ = saved(family, everything)
    again, expected = copy.deepcopy(model), outputs(model)
    assert torch.equal(outputs(again), expected) and layers_of(again) == layers_of(model)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(0.5)
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again), expected)


def test_half_precision_keeps_orders_and_sizes(saved):
    model, folder = saved("bert", everything)
    half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.allclose(outputs(half).float(), model.base_model(**inputs(model))[0], atol=0.3)
    CompressedModel(half)


def test_generation_with_a_cache_gives_what_it_gives_without(saved):
    for kind in (separable, everything):
        model = AutoModelForCausalLM.from_pretrained(saved("gpt2", kind)[1])
        ids = torch.tensor([[5, 9, 2, 33], [1, 1, 7, 8]])
        mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
        options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=1)
        cached, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached, plain)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_changes_nothing_for_mixing_blocks(family, attention, saved):
    model = (
        auto_class(family, "language")
        .from_pretrained(saved(family, everything)[1], attn_implementation=attention)
        .eval()
    )
    ids = torch.tensor([[5, 9, 22, 33, 7]])
    alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    padded = torch.cat([ids, torch.tensor([[3, 4]])], 1)
    beside = torch.randint(2, 60, (1, 7))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
    together = model(input_ids=torch.cat([padded, beside]), attention_mask=mask).logits
    torch.testing.assert_close(together[:1, :5], alone, rtol=1e-4, atol=1e-5)


def test_the_head_reads_the_factors_of_the_embeddings(family, saved):
    model = auto_class(family, "language").from_pretrained(saved(family, embeddings)[1])
    head = model.get_output_embeddings()
    # ELECTRA's decoder is as wide as its embeddings and not tied where those have a projection
    if isinstance(head, FactorizedHead):
        x = torch.randn(2, head.in_features)
        expected = x @ model.get_input_embeddings().matrix().t() + (0 if head.bias is None else head.bias)
        torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)


def test_there_is_no_other_form_to_save_in(saved, tmp_path):
    model = CompressedModel(saved("bert", grouped)[0])
    assert "full matrices" in model.why_not_vanilla()
    with pytest.raises(LmcompressError, match="no vanilla form: a stock checkpoint has full matrices"):
        model.save_pretrained(tmp_path / "m", format="vanilla")
    with pytest.raises(LmcompressError, match="no self_loading form: .*knows no compact layers"):
        model.save_pretrained(tmp_path / "m", format="self_loading")
    assert not (tmp_path / "m").exists() and model.report()["layers"][0]["kind"] == "grouped"


def test_what_comes_afterwards_is_refused_with_the_reason():
    for kind in KINDS:
        model = kind(make("bert"))
        with pytest.raises(LmcompressError, match="cannot cut a model that has compact layers, this one has: "):
            refuse_quantized(model)
        with pytest.raises(LmcompressError, match="cannot quantize a model that has compact layers"):
            plan(model, QuantizationConfig())
    model = low_rank(make("bert"))
    with pytest.raises(LmcompressError, match="a LowRankLinear has no matrix of its own that could be cut"):
        keep_neurons(anatomy_of(model).blocks[0], range(4))
    with pytest.raises(LmcompressError, match="cannot determine what follows the hidden size in a model with compact"):
        keep_hidden(model, range(8))
    with pytest.raises(LmcompressError, match="cannot cut a model whose blocks share parameters: cut the model first"):
        keep_layers(shared(make("bert")), [0, 1])
    with pytest.raises(LmcompressError, match="this block has no query: it mixes neighbours"):
        anatomy_of(separable(make("bert"))).blocks[0].get("query")


def test_a_block_is_not_cut_after_sharing():
    model = shared(make("bert"))
    before = outputs(model)
    with pytest.raises(LmcompressError, match="cannot cut a model whose blocks share parameters: cut the model first"):
        keep_neurons(anatomy_of(model).blocks[1], range(4))
    assert torch.equal(outputs(model), before)


def test_a_block_that_was_changed_after_sharing_is_refused_when_it_is_saved(tmp_path):
    model = shared(make("bert"))
    block = anatomy_of(model).blocks[1]
    block.replace("ffn_in", copy.deepcopy(block.get("ffn_in")))
    with pytest.raises(LmcompressError, match="share all of their parameters or none, block 1 has some of block 0"):
        CompressedModel(model).save_pretrained(tmp_path / "m")


def test_a_student_of_fewer_blocks_keeps_its_compact_layers(tmp_path):
    student = by_layers(low_rank(make("bert")), [0, 2]).model
    student.save_pretrained(tmp_path / "m")
    assert torch.equal(outputs(type(student).from_pretrained(tmp_path / "m")), outputs(student))


CONFIGS = {
    "an unknown kind": (lambda c: c["layers"][0].update(kind="magic"), "layers.*magic"),
    "an unknown key": (lambda c: c["layers"][0].update(depth=3), "depth.*Extra inputs"),
    "no rank": (lambda c: c["layers"][0].pop("rank"), "rank: Field required"),
    "a rank of 0": (lambda c: c["layers"][0].update(rank=0), "rank.*greater than or equal to 1"),
    "a rank that is text": (lambda c: c["layers"][0].update(rank="2"), "rank.*valid integer"),
    "a rank above the matrix": (lambda c: c["layers"][0].update(rank=17), "must be 1 to 16, got 17"),
    "a vast rank": (lambda c: c["layers"][0].update(rank=1 << 40), "less than or equal to"),
    "no modules": (lambda c: c["layers"][0].update(modules=[]), "modules.*at least 1"),
    "a module twice": (
        lambda c: c["layers"][0].update(modules=c["layers"][0]["modules"][:1] * 2),
        "is replaced twice; a module or block is replaced once",
    ),
    "a module that is not there": (
        lambda c: c["layers"][0].update(modules=["encoder.layer.9.output.dense"]),
        "there is no module encoder.layer.9.output.dense that could be compact",
    ),
    "a module that cannot be": (
        lambda c: c["layers"][0].update(modules=["encoder.layer.0.output.LayerNorm"]),
        "there is no module encoder.layer.0.output.LayerNorm that could be compact",
    ),
    "a path with dots alone": (lambda c: c["layers"][0].update(modules=["..weight"]), "modules.*pattern"),
    "a version before": (lambda c: c.update(format_version=3), "has format version 3 and compact layers"),
    "groups that do not divide": (
        lambda c: c.update(layers=[{"kind": "grouped", "groups": 3, "modules": ["encoder.layer.0.output.dense"]}]),
        "groups must divide the widths 24 and 16, got 3",
    ),
    "a kernel that is even": (
        lambda c: c.update(layers=[{"kind": "separable", "kernel": 2, "blocks": [0]}]), "must be an odd number",
    ),
    "a block that is not there": (
        lambda c: c.update(layers=[{"kind": "separable", "kernel": 3, "blocks": [7]}]), "there is no block 7",
    ),
    "too few sources": (
        lambda c: c.update(layers=[{"kind": "shared", "sources": [0, 0]}]), "must be 3 numbers, got 2",
    ),
    "a source that comes later": (
        lambda c: c.update(layers=[{"kind": "shared", "sources": [1, 1, 2]}]), "block 0 must have its own parameters",
    ),
    "a source that is no owner": (
        lambda c: c.update(layers=[{"kind": "shared", "sources": [0, 0, 1]}]), "block 2 must have its own parameters",
    ),
    "two ways of sharing": (
        lambda c: c.update(layers=[{"kind": "shared", "sources": [0, 0, 0]}] * 2), "shared in one way or not at all",
    ),
    "sharing of other shapes": (
        lambda c: c["layers"].append({"kind": "shared", "sources": [0, 0, 0]}) or c["layers"][0]["modules"].pop(0),
        "block 1 cannot share the parameters of block 0",
    ),
    "embeddings elsewhere": (
        lambda c: c.update(
            layers=[{"kind": "factorized_embedding", "rank": 2, "modules": ["embeddings.position_embeddings"]}]
        ),
        "no module embeddings.position_embeddings",
    ),
    "no list": (lambda c: c.update(layers=7), "layers.*got 7"),
    "layers left out": (lambda c: c.pop("layers"), "has a tensor|has shape|is missing"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_a_damaged_config_is_refused(what, damaged):
    folder = damaged(low_rank)
    change, message = CONFIGS[what]
    change_config(folder, change)
    with pytest.raises(CheckpointError, match=message):
        AutoModel.from_pretrained(folder)


def test_damaged_tensors_are_refused(damaged, tmp_path):
    cases = [
        (low_rank, "output.dense.weight", lambda t: t + 1, "must hold sizes"),
        (low_rank, "reduce.weight", lambda t: t[:, 1:].contiguous(), "has shape"),
        (grouped, "input_order", lambda t: t * 0, "must have each number from 0 to"),
        (grouped, "input_order", lambda t: t - 1, "must have each number from 0 to"),
        (grouped, "output_order", lambda t: t[1:].contiguous(), "has shape"),
        (embeddings, "word_embeddings.weight", lambda t: t * 2, "must hold sizes"),
        (shared, "layer.1.attention.self.query.weight", lambda t: t + 2, "has the parameters of block 0 by its config"),
    ]
    for kind, name, change, message in cases:
        folder = damaged(kind)

        def spoil(tensors, name=name, change=change):
            found = next(key for key in tensors if key.endswith(name))
            tensors[found] = change(tensors[found])

        change_tensors(folder, spoil)
        with pytest.raises(CheckpointError, match=message):
            AutoModel.from_pretrained(folder)
        change_tensors(folder, lambda tensors, name=name: tensors.pop(next(k for k in tensors if k.endswith(name))))
        with pytest.raises(CheckpointError, match="is missing from the checkpoint"):
            AutoModel.from_pretrained(folder)
        shutil.rmtree(folder)


def test_a_config_reads_back_as_it_was_written(saved):
    for kind in KINDS:
        written = CompressedModel(saved("gpt2", kind)[0]).compression
        values = json.loads(json.dumps(written.to_dict()))
        assert values["format_version"] == FORMAT_VERSION and CompressionConfig.from_dict(values) == written


def test_a_model_trains_after_it_was_reloaded(saved):
    model = AutoModel.from_pretrained(saved("bert", everything)[1]).train()
    model(**inputs(model))[0].square().sum().backward()
    # the pooler is not read
    missing = [name for name, p in model.named_parameters() if p.grad is None and "pooler" not in name]
    assert missing == []


def test_sharing_all_blocks_leaves_one(family):
    model = make(family)
    share_layers(model)
    assert len({id(p) for block in anatomy_of(model).block_list for p in block.parameters()}) == len(
        list(anatomy_of(model).block_list[0].parameters())
    )
    assert layers_of(model)[-1].sources == (0,) * LAYERS


@pytest.mark.parametrize("name", ["bert-compact", "gpt2-compact", "distilbert-shared"])
def test_the_models_of_the_artefacts_can_be_made(name, tmp_path):
    shape = {
        "bert-compact": lambda m: compact_uneven(cut_unevenly(m)),
        "gpt2-compact": lambda m: compact_causal(cut_to_nothing(m)),
        "distilbert-shared": shared_uneven,
    }
    family = name.partition("-")[0]
    model = shape[name](make(family, "classification" if name.endswith("shared") else "language", seed=1))
    assert CompressedModel(model).save_pretrained(tmp_path / "m").max_error == 0
    assert size_on_disk(tmp_path / "m").total_bytes < 64_000


def test_uneven_models_keep_their_source_numbers(tmp_path):
    model = low_rank(cut_unevenly(make("gpt2", "language", n_inner=24)))
    CompressedModel(model).save_pretrained(tmp_path / "m")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(outputs(reloaded), outputs(model))
