"""Features read by hooks equal what Transformers itself hands out in eager mode."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, HEAD_SIZE, HEADS, LLAMA, inputs, make
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lmcompress import LmcompressError, anatomy_of
from lmcompress.activations.capture import FEATURES, Capture, extract, resolve, shape_of
from lmcompress.checkpoint.cutting import drop_heads
from lmcompress.students import separate

ALL = [("hidden", 0), ("hidden", 2), ("scores", 1), ("probabilities", 3), ("queries", 1), ("keys", 2), ("values", 3)]


any_family = pytest.mark.parametrize("family", [*FAMILIES, LLAMA], ids=str)


@any_family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_features_equal_those_of_transformers(family, attention):
    model = make(family, "classification")
    model.set_attn_implementation("eager")
    batch = inputs(model)
    with torch.no_grad():
        whole = model(**batch, output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation(attention)
    logits, features = extract(model, batch, ALL)
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(logits, whole.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features["hidden", 0], whole.hidden_states[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features["hidden", 2][valid], whole.hidden_states[2][valid], rtol=1e-5, atol=1e-5)
    ours, theirs = (t.transpose(1, 2)[valid] for t in (features["probabilities", 3], whole.attentions[2]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@any_family
def test_scores_become_the_probabilities_and_values_the_output(family):
    model = make(family, "base")
    batch = inputs(model)
    block = anatomy_of(model).blocks[0]
    seen = {}
    handle = block.get("attention_out").register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    with Capture(model, [("scores", 1), ("probabilities", 1), ("values", 1)]) as capture, torch.no_grad():
        model(**batch)
        features = capture.take()
    handle.remove()
    visible = batch["attention_mask"].bool()[:, None, None, :].expand(-1, -1, batch["input_ids"].shape[1], -1)
    if anatomy_of(model).family.causal:
        visible = visible.tril()
    expected = features["scores", 1].masked_fill(~visible, float("-inf")).softmax(dim=-1)
    torch.testing.assert_close(expected, features["probabilities", 1])
    values = features["values", 1].repeat_interleave(block.queries, dim=1)
    context = (features["probabilities", 1] @ values).transpose(1, 2).flatten(2)
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(context[valid], seen["x"][valid], rtol=1e-4, atol=1e-5)


def test_layers_count_from_either_end(family):
    model = make(family, "base")
    assert resolve(model, "hidden", -1) == ("hidden", 3)
    assert resolve(model, "hidden", -4) == ("hidden", 0)
    assert resolve(model, "scores", -3) == ("scores", 1)


@pytest.mark.parametrize(("kind", "layer"), [("hidden", 4), ("hidden", -5), ("scores", 0), ("values", -4)])
def test_a_layer_that_is_not_there_is_refused(kind, layer):
    with pytest.raises(LmcompressError, match=rf"no layer {layer} for the feature '{kind}': it has 3 blocks"):
        resolve(make("bert", "base"), kind, layer)


def test_an_unknown_feature_is_refused():
    with pytest.raises(LmcompressError, match="did you mean 'queries'"):
        resolve(make("bert", "base"), "querys", 1)


def test_nothing_is_kept_when_inactive_or_removed():
    model = make("gpt2", "base")
    capture = Capture(model, [("hidden", 1)])
    capture.active = False
    model(**inputs(model))
    with pytest.raises(LmcompressError, match="left no hidden of layer 1"):
        capture.take()
    capture.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_features_carry_gradient():
    model = make("bert", "base")
    with Capture(model, [("scores", 2)]) as capture:
        model(**inputs(model))
        capture.take()["scores", 2].sum().backward()
    assert anatomy_of(model).blocks[1].get("query").weight.grad is not None
    assert anatomy_of(model).blocks[2].get("query").weight.grad is None


def test_rotated_queries_and_keys_are_captured_with_a_key_for_several_queries():
    model = make("llama", "base")
    batch, seen = inputs(model), {}
    attention = model.layers[1].self_attn
    handles = [
        getattr(attention, f"{name}_proj").register_forward_hook(
            lambda m, a, output, name=name: seen.update({name: output})
        )
        for name in "qkv"
    ]
    kinds = dict(zip("qkv", ("queries", "keys", "values"), strict=True))
    with Capture(model, [(kind, 2) for kind in kinds.values()]) as capture, torch.no_grad():
        model(**batch)
        features = capture.take()
    for handle in handles:
        handle.remove()
    q, k, v = (seen[name].unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2) for name in "qkv")
    q, k = apply_rotary_pos_emb(q, k, *model.rotary_emb(q, torch.arange(9)[None]))
    for kind, expected in zip(kinds.values(), (q, k, v), strict=True):
        torch.testing.assert_close(features[kind, 2], expected)
        assert shape_of(model, (kind, 2)) == (2 * HEADS if kind == "queries" else HEADS, 0, HEAD_SIZE)
    assert shape_of(model, ("scores", 2)) == (2 * HEADS, 0, 0)


@any_family
def test_a_block_without_heads_has_features_of_no_heads(family):
    model = make(family)
    drop_heads(anatomy_of(model).blocks[1])
    features = extract(model, inputs(model), [(kind, 2) for kind in FEATURES[1:6]])[1]
    for (kind, layer), tensor in features.items():
        expected = tuple(size or 9 for size in shape_of(model, (kind, layer))[1:])
        assert tensor.shape == (3, 0, *expected) and expected == ((9, 9) if kind in FEATURES[1:3] else (9, HEAD_SIZE))


def test_a_block_that_mixes_neighbours_has_hidden_states_and_no_attention(family):
    model = make(family)
    separate(model, [1], 3, [inputs(model)], ridge=0.1)
    for kind in FEATURES[1:6]:
        with pytest.raises(LmcompressError, match="mixes neighbours in place of attention.*has no scores"):
            Capture(model, [("hidden", 1), (kind, 1), (kind, 2)])
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert extract(model, inputs(model), [("hidden", 2), ("probabilities", 3)])[1].keys() == {
        ("hidden", 2),
        ("probabilities", 3),
    }


def test_attention_that_does_not_reach_its_function_is_named():
    model = make("gpt2", reorder_and_upcast_attn=True)
    model.set_attn_implementation("eager")
    with pytest.raises(LmcompressError, match='left no scores of layer 1.*reorder_and_upcast_attn.*"sdpa"'):
        extract(model, inputs(model), [("scores", 1)])
    model.set_attn_implementation("sdpa")
    assert extract(model, inputs(model), [("scores", 1)])[1]["scores", 1].isfinite().all()
