"""surgery: what is cut computes what was masked, in memory and from disk; folded gates compute what gates did."""

import copy
import json
import pickle

import pytest
import torch
from families import FAMILIES, FFN, HEAD_SIZE, HEADS, HIDDEN, LAYERS, auto_class, inputs, make, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, Trainer, TrainingArguments

from lmcompress import CompressedModel
from lmcompress.checkpoint.cutting import hidden_axes, keep_heads
from lmcompress.checkpoint.structure import stock_structure, structure_of
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.pruning import PARTS, Gates, Units, census, coverage, cut, fold, full, masked_structure

HEAD_CLASSES = ["base", "classification", "tokens", "language"]


@pytest.fixture(params=FAMILIES, ids=str)
def family(request):
    return request.param


def some(shape, share, seed):
    """A random mask of which about ``share`` stays: at least one, and not all."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    mask[seed % shape], mask[(seed + 1) % shape] = True, False
    return mask


def a_mask(model, parts, share=0.6, seed=0):
    """A random mask of the given parts, never all of a block's heads or neurons."""
    numbers = iter(range(seed, seed + 100))
    return full(model, parts).map(lambda ones: some(len(ones), share, next(numbers)))


def masked_outputs(model, mask):
    with Gates(model, mask.parts()) as gates:
        gates.set(mask)
        answer = outputs(model)
    # without a head, dimensions of the stream that are gone are gone from the answer
    return answer[..., mask.hidden != 0] if mask.hidden is not None and model.base_model is model else answer


def close(actual, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(scale, 1.0))


def check(model, mask, folder):
    """Masked, cut, and reloaded from disk give the same answers and the shapes that were foretold."""
    expected, foretold = masked_outputs(model, mask), masked_structure(structure_of(model), mask)
    hidden = int(mask.hidden.sum()) if mask.hidden is not None else anatomy_of(model).hidden_size
    cut(model, mask)
    close(outputs(model), expected)
    assert [(b.heads, b.ffn) for b in structure_of(model).blocks] == [(b.heads, b.ffn) for b in foretold.blocks]
    assert anatomy_of(model).hidden_size == hidden
    compressed = CompressedModel(model)
    compressed.save_pretrained(folder)
    reloaded = type(model).from_pretrained(folder)
    # not to the bit: tensors of odd sizes lie otherwise in memory, and kernels add in another order
    close(outputs(reloaded), outputs(model))
    assert structure_of(reloaded) == structure_of(model)
    assert CompressedModel(reloaded).structure == compressed.structure


@pytest.mark.parametrize("head", ["classification", "language"])
@pytest.mark.parametrize("part", PARTS)
def test_masked_is_cut_is_reloaded(family, part, head, tmp_path):
    model = make(family, head)
    check(model, a_mask(model, [part], seed=3), tmp_path / "m")


a_mixture = st.lists(st.sampled_from(PARTS), unique=True, min_size=1)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FAMILIES), st.sampled_from(HEAD_CLASSES), a_mixture, st.floats(0.1, 0.9), st.integers(0, 10_000))
def test_mixtures_too_and_again_after_a_first_cut(tmp_path_factory, family, head, parts, share, seed):
    model = make(family, head)
    for turn in range(2):
        # blocks and dimensions must not all go; heads, neurons and sub-layers may
        mask = full(model, parts)
        for part, index, ones in mask.items():
            generator = torch.Generator().manual_seed(seed + 7 * index + turn)
            ones.copy_(torch.rand(ones.shape, generator=generator) < share)
            if part in ("layers", "hidden"):
                ones[seed % len(ones)] = True
        try:
            cut(copy.deepcopy(model), mask)
        except LmcompressError as error:
            assert "nothing would be cut" in str(error)
            continue
        check(model, mask, tmp_path_factory.mktemp("mixture") / "m")


@pytest.mark.parametrize("part", ["heads", "neurons"])
def test_a_block_without_any_answers_with_its_bias(family, part, tmp_path):
    model = make(family, "language")
    bias = anatomy_of(model).blocks[0].get("attention_out" if part == "heads" else "ffn_out").bias.clone()
    mask = full(model, [part])
    getattr(mask, part)[0][:] = False
    check(model, mask, tmp_path / "m")
    left = anatomy_of(model).blocks[0].get("attention_out" if part == "heads" else "ffn_out").bias
    assert bias.any() and torch.equal(left, bias)


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_a_sub_layer_that_is_gone_answers_nothing(family, part, tmp_path):
    model = make(family)
    mask = full(model, [part])
    getattr(mask, part)[1] = False
    check(model, mask, tmp_path / "m")
    block = anatomy_of(model).blocks[1]
    assert not block.get("attention_out" if part == "attention" else "ffn_out").bias.any()
    assert structure_of(model).blocks[1] == structure_of(model).blocks[1].model_copy(
        update={"heads" if part == "attention" else "ffn": 0}
    )
    # its bias can go even where nothing else is left
    if part == "attention":
        other = make(family)
        cut(other, Units(heads=(torch.zeros(HEADS, dtype=torch.bool), *full(other, ["heads"]).heads[1:])))
        cut(other, Units(attention=torch.tensor([False, True, True])))
        with pytest.raises(LmcompressError, match="nothing would be cut"):
            cut(other, Units(attention=torch.tensor([False, True, True])))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attentions_and_hidden_states_come_out_of_a_model_without_heads(family, attention):
    model = make(family, "base", attn_implementation=attention)
    mask = full(model, ["heads"])
    mask.heads[0][:] = False
    mask.heads[1][0] = False
    cut(model, mask)
    with torch.no_grad():
        answer = model(**inputs(model), output_attentions=True, output_hidden_states=True)
    assert len(answer.hidden_states) == LAYERS + 1
    if attention == "eager":
        assert [a.shape[1] for a in answer.attentions] == [0, HEADS - 1, HEADS]
        assert {tuple(a.shape[2:]) for a in answer.attentions} == {(9, 9)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("gone", [[0], [1], [0, 1, 2], []], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_gpt2_generates_the_same_with_and_without_cache(attention, gone, padded):
    model = make("gpt2", "language", attn_implementation=attention)
    mask = full(model, ["heads", "neurons", "hidden"])
    for index in gone:
        mask.heads[index][:] = False
        mask.neurons[index][:] = False
    mask.heads[2][0] = mask.hidden[3] = mask.hidden[5] = False
    cut(model, mask)
    ids = inputs(model, rows=2)["input_ids"]
    attention_mask = torch.ones_like(ids)
    if padded:
        attention_mask[1, :3] = 0
    how = dict(attention_mask=attention_mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
    with_cache = model.generate(ids, use_cache=True, **how)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **how))
    beams = [model.generate(ids, use_cache=use, num_beams=3, **how) for use in (True, False)]
    assert torch.equal(*beams)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **how)
    assert torch.equal(static, with_cache)


def test_a_cut_model_copies_pickles_and_trains(family):
    model = make(family)
    mask = full(model, ["heads", "neurons", "hidden"])
    mask.heads[1][:] = mask.neurons[0][:] = False
    mask.hidden[2] = False
    cut(model, mask)
    expected = outputs(model)
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model))), expected)
    model.train()
    model(**inputs(model), labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
        assert parameter.numel() > 0, name
    # the copy shares nothing
    assert all(parameter.grad is None for parameter in twin.parameters())


def test_bfloat16_and_frozen_parameters_stay_what_they_are(family):
    model = make(family).to(torch.bfloat16).requires_grad_(False).train()
    mask = full(model, ["heads", "neurons", "hidden"])
    mask.heads[0][:] = mask.neurons[1][:] = False
    mask.hidden[0] = False
    cut(model, mask)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
    assert outputs(model).dtype == torch.bfloat16


def test_tied_heads_stay_tied(family):
    model = make(family, "language")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    mask = full(model, ["hidden"])
    mask.hidden[4:7] = False
    cut(model, mask)
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    model.tie_weights()
    assert outputs(model).isfinite().all()


def test_every_parameter_has_the_shape_of_a_stock_model_that_is_as_wide(family):
    # 16 dimensions and 4 heads become 8 and 2: a stock config can say that
    for head in HEAD_CLASSES:
        model = make(family, head)
        mask = full(model, ["hidden", "heads"])
        mask.hidden[::2] = False
        for heads in mask.heads:
            heads[1:3] = False
        cut(model, mask)
        if family.name == "electra-projected":
            # as wide as its embeddings: the stock model of that width has no projection
            assert "no projection" in CompressedModel(model).why_not_vanilla()
            continue
        assert CompressedModel(model).why_not_vanilla() is None
        assert structure_of(model).hidden is None and structure_of(model) == stock_structure(model.config)
        stock = type(model)(copy.deepcopy(model.config))
        assert {n: p.shape for n, p in stock.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_stock_width_is_saved_for_stock_transformers(family, tmp_path, without_lmcompress):
    model = make(family)
    mask = full(model, ["hidden", "heads", "layers"])
    mask.hidden[:4] = False
    for heads in mask.heads:
        heads[0] = False
    mask.layers[0] = False
    cut(model, mask)
    CompressedModel(model).save_pretrained(tmp_path / "m", format="vanilla")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in config
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "m")), outputs(model))


def test_a_checkpoint_of_another_width_loads_without_its_head(family, tmp_path):
    model = make(family)
    cut(model, a_mask(model, ["hidden", "heads"]))
    CompressedModel(model).save_pretrained(tmp_path / "m")
    reloaded = AutoModel.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        expected = model.base_model(**inputs(model))[0]
    assert torch.equal(outputs(reloaded), expected)
    again = auto_class(family, "classification").from_pretrained(tmp_path / "m", num_labels=3)
    assert torch.equal(outputs(again), outputs(model))


def test_the_stock_save_of_a_cut_model_reloads(family, tmp_path):
    model = make(family)
    mask = full(model, ["heads", "neurons"])
    mask.heads[0][:] = mask.neurons[2][:] = False
    cut(model, mask)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(auto_class(family, "classification").from_pretrained(tmp_path)), outputs(model))


def test_a_checkpoint_of_the_stock_trainer_reloads(family, tmp_path):
    model = make(family)
    mask = full(model, ["heads", "neurons", "hidden", "layers"])
    mask.heads[0][:] = mask.neurons[1][:] = mask.hidden[5] = mask.layers[2] = False
    cut(model, mask)
    rows = [dict(input_ids=row, labels=i % 3) for i, row in enumerate(inputs(model, rows=4)["input_ids"])]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=4, learning_rate=0.01, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    again = auto_class(family, "classification").from_pretrained(tmp_path / "checkpoint-2")
    close(outputs(again), outputs(model.eval()))
    assert CompressedModel(again).structure == CompressedModel(model).structure


def test_finding_the_axes_leaves_random_numbers_and_the_model_alone(family):
    model = make(family)
    state, before = torch.get_rng_state(), outputs(model)
    axes = hidden_axes(model)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(outputs(model), before)
    assert list(axes) == [name for name, _ in model.named_parameters(remove_duplicate=False)]


def test_blocks_say_which_they_were(family, tmp_path):
    model = make(family)
    cut(model, Units(layers=torch.tensor([False, True, True])))
    mask = full(model, ["heads", "layers"])
    mask.heads[1][0] = mask.layers[0] = False
    cut(model, mask)
    assert [b.source for b in CompressedModel(model).structure.blocks] == [2]
    CompressedModel(model).save_pretrained(tmp_path / "m")
    assert [b.source for b in CompressedModel.from_pretrained(tmp_path / "m").structure.blocks] == [2]
    assert CompressedModel.from_pretrained(tmp_path / "m").structure.blocks[0].heads == HEADS - 1


def test_a_cut_in_memory_keeps_the_name_of_the_model_it_is_of():
    model = make("bert")
    model.config.name_or_path = "someone/bert"
    cut(model, a_mask(model, ["heads"]))
    assert CompressedModel(model).provenance.base_model == "someone/bert"


def test_a_width_that_is_another_number_by_chance_is_left_alone():
    # as many positions, words, labels, token types and neurons as there are dimensions
    sizes = dict(max_position_embeddings=HIDDEN, vocab_size=HIDDEN, num_labels=HIDDEN, type_vocab_size=HIDDEN)
    model = make("bert", intermediate_size=HIDDEN, **sizes)
    mask = full(model, ["hidden"])
    mask.hidden[1] = False
    cut(model, mask)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["bert.embeddings.position_embeddings.weight"] == (HIDDEN, HIDDEN - 1)
    assert shapes["bert.embeddings.token_type_embeddings.weight"] == (HIDDEN, HIDDEN - 1)
    assert shapes["bert.encoder.layer.0.intermediate.dense.weight"] == (HIDDEN, HIDDEN - 1)
    assert shapes["bert.encoder.layer.0.attention.self.query.weight"] == (HIDDEN, HIDDEN - 1)
    assert shapes["bert.pooler.dense.weight"] == (HIDDEN - 1, HIDDEN - 1)
    assert shapes["classifier.weight"] == (HIDDEN, HIDDEN - 1)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(FAMILIES), st.sampled_from(HEAD_CLASSES), st.integers(0, 1000))
def test_folded_is_gated(family, head, seed):
    parts = [part for part in PARTS if part != "layers"]
    model = make(family, head)
    generator = torch.Generator().manual_seed(seed)
    values = full(model, parts, 1.0, torch.float32).map(lambda x: torch.rand(x.shape, generator=generator) + 0.2)
    expected = masked_outputs(model, values)
    fold(model, values)
    close(outputs(model), expected)


def test_folded_and_then_cut_is_gated_with_zeros(family):
    for head in HEAD_CLASSES:
        model = make(family, head)
        generator = torch.Generator().manual_seed(1)
        values = full(model, PARTS, 1.0, torch.float32).map(
            lambda x, g=generator: torch.rand(x.shape, generator=g) * (torch.rand(x.shape, generator=g) < 0.7)
        )
        values = values.updated(layers=torch.tensor([1.0, 0.0, 1.0]))
        expected = masked_outputs(model, values)
        fold(model, values)
        cut(model, values.map(torch.Tensor.bool))
        close(outputs(model), expected)


def test_folding_ones_changes_nothing_to_the_bit(family):
    model = make(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    fold(model, full(model, PARTS, 1.0, torch.float32))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_half_a_block_cannot_be_folded(family):
    with pytest.raises(LmcompressError, match=r"values of layers must be 0 or 1 to be folded, got \[1.0, 0.5, 1.0\]"):
        fold(make(family), Units(layers=torch.tensor([1.0, 0.5, 1.0])))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_diverged_are_not_folded(bad):
    with pytest.raises(LmcompressError, match=f"values of ffn must be finite, got {bad}"):
        fold(make("bert"), Units(ffn=torch.tensor([1.0, bad, 1.0])))


@pytest.mark.parametrize("part", PARTS)
def test_a_mask_that_keeps_everything_is_refused(family, part):
    model = make(family)
    with pytest.raises(LmcompressError, match="must prune something.*nothing would be cut"):
        cut(model, full(model, [part]))


def test_everything_cannot_be_cut(family):
    model = make(family)
    before = outputs(model)
    with pytest.raises(LmcompressError, match="at least one of the layers"):
        cut(model, full(model, ["layers"], False))
    with pytest.raises(LmcompressError, match="at least one hidden dimension"):
        cut(model, full(model, ["hidden"], False))
    assert torch.equal(outputs(model), before)


def test_a_mask_of_other_shapes_is_refused_and_nothing_happens(family):
    model = make(family)
    mask = a_mask(model, ["neurons"])
    keep_heads(anatomy_of(model).blocks[0], [0])
    before = outputs(model)
    with pytest.raises(
        LmcompressError, match=r"a mask of heads must have the model's shapes \[\(1,\), \(4,\), \(4,\)\]"
    ):
        cut(model, Units(heads=full(make(family), ["heads"]).heads))
    with pytest.raises(LmcompressError, match=r"a mask of hidden must have the model's shapes \(16,\), got \(15,\)"):
        cut(model, mask.updated(hidden=torch.ones(15, dtype=torch.bool)))
    with pytest.raises(LmcompressError, match="a mask must be bool, got torch.float32 for neurons"):
        cut(model, mask.map(torch.Tensor.float))
    assert torch.equal(outputs(model), before)


def test_hidden_dimensions_of_a_model_with_foreign_parameters_are_refused(family):
    model = make(family)
    model.adapter = torch.nn.Linear(HIDDEN, HIDDEN)
    with pytest.raises(LmcompressError, match="no parameter adapter.weight.*before adding modules"):
        cut(model, a_mask(model, ["hidden", "heads"]))
    assert anatomy_of(model).hidden_size == HIDDEN and structure_of(model) == stock_structure(model.config)
    cut(model, a_mask(model, ["heads"]))


def test_a_model_that_another_library_quantized_is_refused():
    model = make("bert")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(LmcompressError, match="quantized by another library"):
        cut(model, a_mask(model, ["heads"]))


def test_coverage_counts_what_is_gone_and_knows_a_no_op(family):
    model = make(family)
    before = census(model)
    same = coverage(before, census(model))
    assert same["unchanged"] and same["sparsity"] == 0
    mask = full(model, ["heads", "neurons", "layers"])
    mask.heads[0][0] = mask.neurons[0][5] = mask.layers[2] = False
    cut(model, mask)
    report = coverage(before, census(model))
    assert report["layers"] == {"before": 3, "after": 2, "cut": pytest.approx(1 / 3)}
    assert report["heads"]["after"] == 7 and report["neurons"]["after"] == 2 * FFN - 1
    assert report["parameters"]["after"] == sum(p.numel() for p in model.parameters())
    assert 0 < report["sparsity"] < 1 and not report["unchanged"]
    assert [block["source"] for block in report["blocks"]] == [0, 1]
    json.dumps(report, allow_nan=False)


def test_what_a_block_without_heads_costs_is_one_bias(family):
    model = make(family)
    before = sum(p.numel() for p in anatomy_of(model).blocks[0].get("attention").parameters())
    mask = full(model, ["heads"])
    mask.heads[0][:] = False
    cut(model, mask)
    left = sum(p.numel() for p in anatomy_of(model).blocks[0].get("attention").parameters())
    assert left <= HIDDEN < before and HIDDEN == HEADS * HEAD_SIZE
