"""Causal models as functions of tensors: past keys and values, positions and masks, without any runtime."""

from __future__ import annotations

import pytest
import torch
from decoders import DECODERS, decoder
from families import cut_to_nothing, cut_unevenly, make
from packing import packed
from transformers import BertConfig, BertLMHeadModel

from lmcompress.errors import LmcompressError
from lmcompress.export import ExportConfig
from lmcompress.export.causal import TextGeneration, TextGenerationWithPast
from lmcompress.export.tasks import head_class

CUTS = {"whole": lambda model: model, "uneven": cut_unevenly, "to nothing": cut_to_nothing}


def _head(model, kind=TextGenerationWithPast):
    return kind(model, ExportConfig())


def _empty(head, rows):
    return [torch.zeros(rows, layer.heads, 0, layer.head_size) for layer in head.layers for _ in range(2)]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_text_in_two_calls_gives_the_logits_of_the_model(name, cut):
    model = CUTS[cut](decoder(name))
    head, ids = _head(model), torch.randint(2, 60, (3, 7))
    expected, mask = model(input_ids=ids).logits, torch.ones_like(ids)
    first, *past = head(ids[:, :4], mask[:, :4], *_empty(head, 3))
    second, *present = head(ids[:, 4:], mask, *past)
    torch.testing.assert_close(torch.cat([first, second], 1), expected, rtol=1e-4, atol=1e-5)
    assert [tuple(tensor.shape) for tensor in present[::2]] == [(3, x.heads, 7, x.head_size) for x in head.layers]
    (whole,) = _head(model, TextGeneration)(ids, mask)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(name):
    head = _head(decoder(name))
    ids = torch.randint(2, 60, (2, 6))
    alone, *_ = head(ids, torch.ones_like(ids), *_empty(head, 2))
    mask = torch.tensor([[0, 0] + [1] * 6] * 2)
    padded, *_ = head(torch.cat([torch.full((2, 2), 1), ids], 1), mask, *_empty(head, 2))
    torch.testing.assert_close(padded[:, 2:], alone, rtol=1e-4, atol=1e-5)
    assert padded.isfinite().all()


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_model_in_half_precision_has_its_past_in_float32(name):
    model, ids = decoder(name), torch.randint(2, 60, (2, 6))
    wanted = model(input_ids=ids).logits[:, 3:]
    head = _head(model.bfloat16())
    given = head.arguments({"input_ids": ids})
    assert {tensor.dtype for tensor in given[2:]} == {torch.float32}
    found, *_ = head(*given)
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.1


@torch.no_grad()
def test_padding_does_not_widen_ranges_of_the_whole_tensor():
    model = packed(make("gpt2", "language"), inputs="dynamic")
    head, ids = _head(model), torch.randint(2, 60, (1, 5))
    alone, *_ = head(ids, torch.ones_like(ids), *_empty(head, 1))
    mask = torch.tensor([[0, 0, 0] + [1] * 5])
    padded, *_ = head(torch.cat([torch.full((1, 3), 7), ids], 1), mask, *_empty(head, 1))
    torch.testing.assert_close(padded[:, 3:], alone, rtol=1e-4, atol=1e-5)


def test_names_are_those_of_optimum_and_a_block_without_heads_has_none():
    head = _head(cut_to_nothing(make("gpt2", "language")))
    kept = [f"{layer}.{kind}" for layer in (1, 2) for kind in ("key", "value")]
    assert head.inputs == ("input_ids", "attention_mask", *(f"past_key_values.{name}" for name in kept))
    assert head.outputs == ("logits", *(f"present.{name}" for name in kept))
    assert [layer.heads for layer in head.layers] == [4, 2]
    assert head_class(head.model, ExportConfig()) is TextGenerationWithPast
    assert head_class(head.model, ExportConfig(task="text_generation")) is TextGeneration


def test_what_generates_no_text_from_a_prompt_alone_is_refused():
    both_ways = BertLMHeadModel(decoder("bert").config.__class__(**_sizes(), is_decoder=False))
    with pytest.raises(LmcompressError, match=r"earlier tokens see later ones .* is_decoder"):
        _head(both_ways)
    crossed = BertLMHeadModel(BertConfig(**_sizes(), is_decoder=True, add_cross_attention=True))
    with pytest.raises(LmcompressError, match="cross-attention, which reads the outputs of an encoder"):
        _head(crossed)
    with pytest.raises(LmcompressError, match="cannot be exported for text_generation"):
        head_class(make("bert"), ExportConfig(task="text_generation"))


def _sizes():
    return dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20)
