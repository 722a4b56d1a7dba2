import copy
from dataclasses import dataclass

import pytest
import torch
from families import inputs, make, outputs
from torch import nn

from lmcompress.checkpoint.schema import ActivationEncoding, AttentionEncoding
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.nn.quantized_attention import (
    ATTENTION,
    attach,
    attention_quantizers,
    quantize_attention,
    quantized_attention,
    release_attention,
)
from lmcompress.numerics.activations import dynamic

SIGNED, UNSIGNED = ActivationEncoding(bits=8), ActivationEncoding(bits=8, symmetric=False)
ALL = AttentionEncoding(queries=SIGNED, keys=SIGNED, values=SIGNED, probabilities=UNSIGNED)


@dataclass
class Nothing:
    """Goes the way of quantized attention and quantizes nothing."""

    def active(self):
        return True

    def __call__(self, role, x):
        return x


def attentions(model):
    return [block.get("attention") for block in anatomy_of(model).blocks if block.num_heads]


def left_padded(model):
    batch = inputs(model)
    return {key: tensor.flip(1) for key, tensor in batch.items()}


@pytest.mark.parametrize("batch", [inputs, left_padded, lambda m: {"input_ids": inputs(m)["input_ids"]}])
def test_where_nothing_is_quantized_it_is_sdpa(family, batch):
    model = make(family, "language")
    given = batch(model)
    with torch.no_grad():
        expected = model(**given).logits
        attach(model, {module: Nothing() for module in attentions(model)})
        assert model.config._attn_implementation == ATTENTION
        got = model(**given).logits
    seen = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    torch.testing.assert_close(got[seen], expected[seen], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_without_quantizers_it_is_sdpa_to_the_bit(family):
    model = make(family, "language")
    expected = outputs(model)
    model.config._attn_implementation = ATTENTION
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_gradients_are_those_of_sdpa(family):
    gradients = []
    for quantized in (False, True):
        model = make(family, "language")
        if quantized:
            attach(model, {module: Nothing() for module in attentions(model)})
        model(**left_padded(model)).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_query_that_sees_nothing_gets_zeros_and_a_finite_gradient():
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 1, :] = False
    module = nn.Module()
    module.attention_quantizers = Nothing()
    answer, probabilities = quantized_attention(module, x, x, x, mask)
    assert torch.equal(answer[:, 1], torch.zeros(1, 2, 4)) and not probabilities[..., 1, :].any()
    answer.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_an_added_mask_is_the_same_as_one_of_bools():
    x = torch.randn(2, 2, 5, 4)
    hidden = torch.rand(2, 1, 5, 5) < 0.3
    hidden[..., 0] = False
    module = nn.Module()
    module.attention_quantizers = Nothing()
    added = torch.zeros(2, 1, 5, 5).masked_fill(hidden, torch.finfo(torch.float32).min)
    by_bools, _ = quantized_attention(module, x, x, x, ~hidden)
    by_sum, _ = quantized_attention(module, x, x, x, added)
    torch.testing.assert_close(by_bools, by_sum)


def test_the_four_are_quantized_and_what_is_hidden_stays_exactly_zero():
    query, key, value = torch.randn(3, 2, 3, 5, 4).unbind()
    module = nn.Module()
    module.add_module("attention_quantizers", nn.Identity())
    model = make("gpt2", "language")
    quantize_attention(model, attentions(model), ALL)
    module = attentions(model)[0]
    answer, probabilities = quantized_attention(module, query, key, value, None, scaling=0.3)
    q, k, v = (dynamic(x).values for x in (query, key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3
    expected = dynamic(
        scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1), symmetric=False
    ).values
    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(answer, torch.einsum("bhqk,bhkd->bqhd", expected, v))
    assert not probabilities.triu(1).any()


def test_dropout_comes_after_quantization():
    x = torch.randn(1, 2, 64, 4)
    model = make("bert", "base")
    quantize_attention(model, attentions(model), ALL)
    module = attentions(model)[0]
    _, whole = quantized_attention(module, x, x, x, None)
    _, dropped = quantized_attention(module, x, x, x, None, dropout=0.5)
    kept = dropped != 0
    assert 0.3 < float(kept.float().mean() / (whole != 0).float().mean()) < 0.7
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])


def test_a_cache_of_keys_and_values_gives_what_the_whole_sequence_gives():
    model = make("gpt2", "language")
    by_token = ActivationEncoding(bits=8, granularity="token")
    quantize_attention(model, attentions(model), AttentionEncoding(queries=by_token, keys=by_token, values=by_token))
    ids = inputs(model)["input_ids"][:2]
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :6], use_cache=True)
        rest = model(ids[:, 6:], past_key_values=first.past_key_values).logits
        made = model.generate(ids, max_new_tokens=4, do_sample=False)
        slow = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(made, slow)


def test_static_ranges_are_buffers_that_stay_float32():
    model = make("bert", "classification")
    still = ActivationEncoding(bits=8, symmetric=False, range="static")
    quantize_attention(model, attentions(model), AttentionEncoding(probabilities=still, queries=SIGNED))
    names = {name for name in model.state_dict() if "attention_quantizers" in name}
    assert {name.rpartition(".")[2] for name in names} == {"probabilities_scale", "probabilities_zero_point"}
    assert len(names) == 2 * len(attentions(model))
    buffers = dict(attention_quantizers(attentions(model)[0]).named_buffers())
    buffers["probabilities_scale"].fill_(1 / 300)
    model.bfloat16()
    scale = dict(attention_quantizers(attentions(model)[0]).named_buffers())["probabilities_scale"]
    assert scale.dtype == torch.float32 and float(scale) == pytest.approx(1 / 300, rel=1e-7)
    copied = copy.deepcopy(model)
    assert torch.equal(outputs(copied), outputs(model))


def test_release_gives_back_what_there_was():
    model = make("gpt2", "language")
    expected, keys = outputs(model), list(model.state_dict())
    for _ in range(2):
        quantize_attention(model, attentions(model), ALL)
        assert not torch.equal(outputs(model), expected)
        release_attention(model)
        release_attention(model)
        assert torch.equal(outputs(model), expected) and list(model.state_dict()) == keys
    assert model.config._attn_implementation == "sdpa"


def test_errors_say_what_to_do():
    model = make("bert", "base")
    with pytest.raises(LmcompressError, match="no attention to quantize"):
        quantize_attention(model, [], ALL)
    quantize_attention(model, attentions(model), ALL)
    with pytest.raises(LmcompressError, match="quantized already; release_attention"):
        quantize_attention(model, attentions(model), ALL)
    model.set_attn_implementation("eager")
    with pytest.raises(LmcompressError, match="must be 'lmcompress_quantized', got 'eager'"):
        outputs(model)


def test_the_implementation_is_not_written_into_the_config():
    model = make("bert", "base")
    quantize_attention(model, attentions(model), ALL)
    assert ATTENTION not in model.config.to_json_string()
