"""Features read by hooks equal what Transformers itself hands out in eager mode."""

from __future__ import annotations

import pytest
import torch
from families import inputs, make

from lmcompress import LmcompressError, anatomy_of
from lmcompress.activations.capture import Capture, extract, masked_softmax, resolve

ALL = [("hidden", 0), ("hidden", 2), ("scores", 1), ("probabilities", 3), ("queries", 1), ("keys", 2), ("values", 3)]


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


def test_scores_become_the_probabilities_and_values_the_output(family):
    model = make(family, "base")
    batch = inputs(model)
    block = anatomy_of(model).blocks[0]
    seen = {}
    handle = block.get("attention_out").register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    with Capture(model, [("scores", 1), ("probabilities", 1), ("values", 1)]) as capture, torch.no_grad():
        model(**batch)
        features = capture.take(batch["attention_mask"])
    handle.remove()
    causal = anatomy_of(model).family.causal
    expected = masked_softmax(features["scores", 1], batch["attention_mask"], causal=causal)
    torch.testing.assert_close(expected, features["probabilities", 1])
    context = (features["probabilities", 1] @ features["values", 1]).transpose(1, 2).flatten(2)
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
