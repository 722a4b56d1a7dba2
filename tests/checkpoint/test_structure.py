"""structure: cutting equals masking, and what is cut still works as the model it was."""

import pytest
import torch
from families import FAMILIES, FFN, HEAD_SIZE, HEADS, HIDDEN, LAYERS, inputs, make, outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcompress.checkpoint.cutting import drop_heads, drop_neurons, keep_heads, keep_hidden, keep_layers, keep_neurons
from lmcompress.checkpoint.schema import MAX_BLOCKS, BlockShape, Structure
from lmcompress.checkpoint.structure import (
    set_stock_shapes,
    shape_skeleton,
    stock_structure,
    structure_of,
    why_not_vanilla,
)
from lmcompress.errors import CheckpointError, LmcompressError
from lmcompress.families import anatomy_of, in_features, out_features

a_family = st.sampled_from(FAMILIES)
some_heads = st.lists(st.sampled_from(range(HEADS)), unique=True, min_size=1)
some_neurons = st.lists(st.sampled_from(range(FFN)), unique=True, min_size=1)


@pytest.fixture(params=FAMILIES, ids=str)
def family(request):
    return request.param


def _zero_all_but(module, kept, size):
    """The reference: a pre-hook on a projection zeroes those of its inputs that will be cut."""
    mask = torch.zeros(in_features(module))
    for index in kept:
        mask[index * size : (index + 1) * size] = 1.0
    module.register_forward_pre_hook(lambda module, args: (args[0] * mask, *args[1:]))


@settings(max_examples=40, deadline=None)
@given(a_family, st.lists(some_heads, min_size=LAYERS, max_size=LAYERS), st.integers(0, 3))
def test_cutting_heads_equals_masking_them(family, heads, seed):
    masked, cut = make(family, seed=seed).double(), make(family, seed=seed).double()
    for block, kept in zip(anatomy_of(masked).blocks, heads, strict=True):
        _zero_all_but(block.get("attention_out"), kept, HEAD_SIZE)
    for block, kept in zip(anatomy_of(cut).blocks, heads, strict=True):
        keep_heads(block, kept)
    assert [b.num_heads for b in anatomy_of(cut).blocks] == [len(kept) for kept in heads]
    torch.testing.assert_close(outputs(cut), outputs(masked), rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(a_family, st.lists(some_neurons, min_size=LAYERS, max_size=LAYERS), st.integers(0, 3))
def test_cutting_neurons_equals_masking_them(family, neurons, seed):
    masked, cut = make(family, seed=seed).double(), make(family, seed=seed).double()
    for block, kept in zip(anatomy_of(masked).blocks, neurons, strict=True):
        _zero_all_but(block.get("ffn_out"), kept, 1)
    for block, kept in zip(anatomy_of(cut).blocks, neurons, strict=True):
        keep_neurons(block, kept)
    assert [b.ffn_width for b in anatomy_of(cut).blocks] == [len(kept) for kept in neurons]
    torch.testing.assert_close(outputs(cut), outputs(masked), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kept", [[0], [2], [0, 2], [2, 0], [0, 1, 2]], ids=str)
def test_dropping_layers_equals_skipping_them(family, kept):
    skipped, cut = make(family, "language"), make(family, "language")
    modules = list(anatomy_of(skipped).block_list)
    keep_layers(cut, kept)
    # the reference runs the whole model and lets each block answer with another's computation, or with its input
    stand_in = [modules[i].forward for i in kept]
    returns_tuple = isinstance(
        modules[0](torch.zeros(1, 2, in_features(anatomy_of(cut).blocks[0].get("ffn_in")))), tuple
    )
    for position, module in enumerate(modules):
        if position < len(stand_in):
            module.forward = stand_in[position]
        else:
            module.forward = lambda x, *args, **kwargs: (x,) if returns_tuple else x
    with torch.no_grad():
        expected = skipped(**inputs(skipped), **({"use_cache": False} if family.name == "gpt2" else {})).logits
    torch.testing.assert_close(outputs(cut), expected, rtol=1e-5, atol=1e-6)
    assert len(structure_of(cut).blocks) == len(kept) == len(stock_structure(cut.config).blocks)


def test_keeping_everything_changes_nothing(family):
    model = make(family)
    before = outputs(model)
    for block in anatomy_of(model).blocks:
        keep_heads(block, range(HEADS))
        keep_neurons(block, range(FFN))
    keep_layers(model, range(LAYERS))
    assert torch.equal(outputs(model), before)


def test_the_order_of_heads_and_neurons_is_free(family):
    model = make(family)
    before = outputs(model)
    for block in anatomy_of(model).blocks:
        keep_heads(block, [3, 1, 0, 2])
        keep_neurons(block, list(reversed(range(FFN))))
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_uneven_heads_work_with_every_attention(family, attention):
    model = make(family, attn_implementation=attention)
    reference = make(family, attn_implementation="eager")
    for m in (model, reference):
        for block, kept in zip(anatomy_of(m).blocks, ([0], [1, 3], [0, 1, 2]), strict=True):
            keep_heads(block, kept)
    torch.testing.assert_close(outputs(model), outputs(reference), rtol=1e-5, atol=1e-5)


def test_cutting_keeps_dtype_mode_and_what_is_frozen(family):
    model = make(family).to(torch.bfloat16).requires_grad_(False).train()
    block = anatomy_of(model).blocks[0]
    keep_heads(block, [0, 2])
    keep_neurons(block, [1, 5])
    for module in (block.get("attention_out"), block.get("ffn_in"), block.get("ffn_out")):
        assert module.weight.dtype == torch.bfloat16 and module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert out_features(block.get("ffn_in")) == in_features(block.get("ffn_out")) == 2


def test_a_cut_model_trains(family):
    model = make(family)
    for block in anatomy_of(model).blocks:
        keep_heads(block, [1, 2])
        keep_neurons(block, [0, 7])
    model(**inputs(model), labels=torch.tensor([0, 1, 2])).loss.backward()
    for part in ("attention_out", "ffn_in", "ffn_out"):
        assert anatomy_of(model).blocks[0].get(part).weight.grad.abs().sum() > 0


def test_gpt2_generates_the_same_with_and_without_cache_after_layers_and_heads_are_gone():
    model = make("gpt2", "language", n_layer=4)
    keep_layers(model, [1, 3])
    keep_heads(anatomy_of(model).blocks[0], [0, 2, 3])
    keep_heads(anatomy_of(model).blocks[1], [1])
    keep_neurons(anatomy_of(model).blocks[1], [0, 1, 2])
    ids = inputs(model, rows=2)["input_ids"]
    how = dict(
        attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1
    )
    with_cache = model.generate(ids, use_cache=True, **how)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **how))
    assert with_cache.shape == (2, ids.shape[1] + 12)


@pytest.mark.parametrize("wanted", [[], [0, 0], [-1], [HEADS], [0, 10**9]], ids=str)
def test_impossible_heads_are_refused_and_the_block_stays_whole(family, wanted):
    model = make(family)
    before = outputs(model)
    with pytest.raises(LmcompressError, match=r"heads to keep must be at least one number in \[0, 3\], not repeated"):
        keep_heads(anatomy_of(model).blocks[0], wanted)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("wanted", [[], [1, 1], [-1], [FFN]], ids=str)
def test_impossible_neurons_are_refused(family, wanted):
    with pytest.raises(
        LmcompressError, match=r"neurons to keep must be at least one number in \[0, 23\], not repeated"
    ):
        keep_neurons(anatomy_of(make(family)).blocks[0], wanted)


@pytest.mark.parametrize("wanted", [[], [1, 1], [-1], [LAYERS]], ids=str)
def test_impossible_layers_are_refused(family, wanted):
    with pytest.raises(LmcompressError, match=r"layers to keep must be at least one number in \[0, 2\], not repeated"):
        keep_layers(make(family), wanted)


def test_a_skeleton_on_meta_takes_the_shapes_and_allocates_nothing(family):
    with torch.device("meta"):
        model = make(family)
    shapes = Structure(
        head_size=HEAD_SIZE,
        blocks=(BlockShape(heads=1, ffn=5), BlockShape(heads=HEADS, ffn=FFN), BlockShape(heads=0, ffn=1000)),
        hidden=HIDDEN - 3,
    )
    shape_skeleton(model, shapes)
    assert structure_of(model) == shapes
    assert all(tensor.is_meta for tensor in (*model.parameters(), *anatomy_of(model).block_list.buffers()))


@pytest.mark.parametrize("layers", [1, LAYERS + 1])
def test_a_skeleton_refuses_another_number_of_blocks(family, layers):
    shapes = Structure(head_size=HEAD_SIZE, blocks=(BlockShape(heads=1, ffn=1),) * layers)
    with pytest.raises(CheckpointError, match=rf"says {LAYERS} layers.*describes {layers} blocks"):
        shape_skeleton(make(family), shapes)


def test_a_skeleton_refuses_another_head_size(family):
    shapes = Structure(head_size=8, blocks=(BlockShape(heads=1, ffn=1),) * LAYERS)
    with pytest.raises(CheckpointError, match="heads of 4.*of 8"):
        shape_skeleton(make(family), shapes)


def test_the_stock_structure_of_a_config_is_that_of_its_model(family):
    model = make(family)
    assert stock_structure(model.config) == structure_of(model)
    assert why_not_vanilla(structure_of(model), model.config) is None


def test_gpt2_without_a_stated_width_has_four_times_its_own():
    model = make("gpt2", n_inner=None)
    assert stock_structure(model.config) == structure_of(model)
    assert structure_of(model).blocks[0].ffn == 64


@pytest.mark.parametrize("layers", [0, -3, MAX_BLOCKS + 1, 10**9])
def test_a_config_with_an_absurd_number_of_layers_is_refused(family, layers):
    config = make(family).config
    config.num_hidden_layers = layers
    with pytest.raises(CheckpointError, match=f"config.json says {layers} layers; a model has 1 to {MAX_BLOCKS}"):
        stock_structure(config)


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [0, -4, 10**12])
def test_a_config_with_absurd_sizes_is_refused(family, field, value):
    config = make(family).config
    setattr(config, field, value)
    with pytest.raises(CheckpointError, match=r"config.json"):
        stock_structure(config)


def test_why_not_vanilla_names_the_obstacle_and_the_nearest_shape_without_it(family):
    model = make(family)
    keep_heads(anatomy_of(model).blocks[1], [0, 1])
    assert "needs all 4 heads; here they have [4, 2, 4]" in why_not_vanilla(structure_of(model), model.config)
    model = make(family)
    keep_neurons(anatomy_of(model).blocks[2], range(9))
    obstacle = why_not_vanilla(structure_of(model), model.config)
    assert "one FFN width" in obstacle and "[24, 24, 9]" in obstacle and "24 everywhere" in obstacle


def test_why_not_vanilla_knows_widths_and_nothing(family):
    model = make(family)
    keep_hidden(model, range(HIDDEN - 2))
    assert (
        "divide a hidden size of 14. Nearest that is expressible: a hidden size of 12 with 3 heads everywhere or 16"
        in (why_not_vanilla(structure_of(model), model.config))
    )
    keep_hidden(model, range(HIDDEN - 4))
    assert "needs all 3 heads; here they have [4, 4, 4]" in why_not_vanilla(structure_of(model), model.config)
    model = make(family)
    for block in anatomy_of(model).blocks:
        drop_neurons(block)
    assert "no FFN of width 0" in why_not_vanilla(structure_of(model), model.config)
    set_stock_shapes(model.config, structure_of(model))
    assert stock_structure(model.config).blocks[0].ffn == FFN
    drop_heads(anatomy_of(model).blocks[1])
    assert "needs all 4 heads; here they have [4, 0, 4]" in why_not_vanilla(structure_of(model), model.config)


def test_a_width_that_the_stock_config_cannot_say_leaves_it_buildable(family):
    model = make(family)
    keep_hidden(model, [1, 2, 3])
    shapes = structure_of(model)
    assert shapes.hidden == 3 == anatomy_of(model).hidden_size
    set_stock_shapes(model.config, shapes)
    assert stock_structure(model.config).head_size == HEAD_SIZE
    skeleton = type(model)(model.config)
    shape_skeleton(skeleton, shapes)
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_gpt2_without_a_stated_width_keeps_it_when_the_stream_narrows():
    model = make("gpt2", n_inner=None)
    keep_neurons(anatomy_of(model).blocks[0], [0])
    keep_hidden(model, range(8))
    for block in anatomy_of(model).blocks:
        keep_heads(block, [0, 1])
    shapes = structure_of(model)
    set_stock_shapes(model.config, shapes)
    assert (model.config.n_embd, model.config.n_head, structure_of(model).hidden) == (8, 2, None)
    assert [b.ffn for b in structure_of(model).blocks] == [1, 64, 64]


@pytest.mark.parametrize("wanted", [[], [1, 1], [-1], [HIDDEN]], ids=str)
def test_impossible_hidden_dimensions_are_refused(family, wanted):
    with pytest.raises(LmcompressError, match=r"hidden dimensions to keep must be at least one number in \[0, 15\]"):
        keep_hidden(make(family), wanted)


def test_a_skeleton_refuses_a_wider_stream(family):
    shapes = Structure(head_size=HEAD_SIZE, blocks=(BlockShape(heads=1, ffn=1),) * LAYERS, hidden=HIDDEN + 1)
    with pytest.raises(CheckpointError, match="hidden size of 16.*of 17, which must not be greater"):
        shape_skeleton(make(family), shapes)


def test_a_uniformly_narrower_ffn_and_fewer_layers_have_a_stock_config(family):
    model = make(family)
    for block in anatomy_of(model).blocks:
        keep_neurons(block, range(7))
    keep_layers(model, [0, 2])
    shapes = structure_of(model)
    assert why_not_vanilla(shapes, model.config) is None
    set_stock_shapes(model.config, shapes)
    assert stock_structure(model.config) == shapes
