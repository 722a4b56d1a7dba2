"""anatomy: every family is found where it says its parts are."""

import pytest
import torch
from decoders import MODERN
from families import CAUSAL, FFN, HEAD_SIZE, HEADS, HIDDEN, LAYERS, VOCAB, make
from families import FAMILIES as EVERY
from relatives import RELATIVES
from torch import nn
from transformers import DebertaV2Config
from transformers.pytorch_utils import Conv1D

from lmcompress.errors import LmcompressError, UnknownFamilyError
from lmcompress.families import (
    BLOCK_PARTS,
    FAMILIES,
    anatomy_of,
    family_of,
    in_features,
    is_conv1d,
    new_projection,
    out_features,
    weight_view,
)


@pytest.fixture(params=EVERY, ids=str)
def family(request):
    return request.param


@pytest.mark.parametrize("head", ["base", "classification", "language"])
def test_the_shapes_found_are_those_of_the_config(family, head):
    anatomy = anatomy_of(make(family, head))
    assert anatomy.hidden_size == HIDDEN
    assert [(b.num_heads, b.head_size, b.ffn_width) for b in anatomy.blocks] == [(HEADS, HEAD_SIZE, FFN)] * LAYERS
    assert all(block.get("attention").scaling == HEAD_SIZE**-0.5 for block in anatomy.blocks)


def test_every_named_part_is_a_matrix_of_the_right_widths(family):
    block = anatomy_of(make(family)).blocks[0]
    # of grouped queries, two of each head
    asked = HIDDEN * block.queries
    widths = {"attention_out": (asked, HIDDEN), "ffn_in": (HIDDEN, FFN), "ffn_out": (FFN, HIDDEN)}
    widths |= {"ffn_gate": (HIDDEN, FFN)} if block.family.gated else {}
    if block.family.qkv:
        widths |= {"qkv": (HIDDEN, 3 * HIDDEN)}
    else:
        widths |= {"query": (HIDDEN, asked), "key": (HIDDEN, HIDDEN), "value": (HIDDEN, HIDDEN)}
    assert block.parts() == [part for part in BLOCK_PARTS if part in widths]
    for part, (into, out) in widths.items():
        module = block.get(part)
        assert (in_features(module), out_features(module)) == (into, out), part
        assert weight_view(module).shape == (out, into), part


def test_a_family_is_found_by_its_model_type_and_those_made_here_are_described(family):
    assert family_of(make(family).config) is FAMILIES[make(family).config.model_type]
    # all others are proven: tests/proof
    assert set(MODERN) | set(RELATIVES) <= set(FAMILIES)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_a_linear_and_a_conv1d_of_the_same_function_look_alike(bias):
    linear, conv = nn.Linear(5, 7), Conv1D(7, 5)
    with torch.no_grad():
        weight_view(conv).copy_(weight_view(linear))
        conv.bias.copy_(linear.bias)
    x = torch.randn(2, 5)
    torch.testing.assert_close(conv(x), linear(x))
    assert (in_features(conv), out_features(conv)) == (in_features(linear), out_features(linear)) == (5, 7)
    assert is_conv1d(conv) and not is_conv1d(linear)
    without_bias = new_projection(nn.Linear(5, 7, bias=bias), in_width=3, out_width=2)
    assert (without_bias.bias is not None) == bias and without_bias.weight.shape == (2, 3)


@pytest.mark.parametrize("kind", [nn.Linear, lambda i, o: Conv1D(o, i)], ids=["linear", "conv1d"])
def test_changes_to_the_weight_view_reach_the_module(kind):
    module = kind(5, 7)
    with torch.no_grad():
        weight_view(module)[6, 4] = 42.0
    assert (module.weight == 42.0).sum() == 1
    x = torch.zeros(1, 5).index_fill_(1, torch.tensor([4]), 1.0)
    torch.testing.assert_close(module(x)[0, 6], 42.0 + module.bias[6])


def test_a_new_projection_keeps_kind_and_dtype_and_costs_nothing_on_meta():
    for old in (nn.Linear(5, 7), Conv1D(7, 5)):
        new = new_projection(old.to(torch.bfloat16), in_width=10**6, out_width=10**6, device="meta")
        assert type(new) is type(old) and new.weight.dtype == torch.bfloat16 and new.weight.is_meta


def test_an_unknown_family_is_named_with_those_that_are_there_and_how_to_add_one():
    "arcee, bart, bert, camembert, cohere, data2vec-text, deberta-v2, distilbert, electra, ernie, ernie4_5,"
    "eurobert, gemma, glm, gpt2, gpt_neox, gptj, granite, helium, llama, mbart, mistral, modernbert, mpnet, opt, "
    "phi, phi3, qwen2, qwen3, roberta, roberta-prelayernorm, seed_oss, smollm3, starcoder2, t5, xlm-roberta"


def test_a_part_that_the_family_lacks_is_named():
    with pytest.raises(LmcompressError, match="gpt2 has no query"):
        anatomy_of(make("gpt2")).blocks[0].get("query")


def test_weight_view_refuses_what_is_no_matrix():
    with pytest.raises(LmcompressError, match="Linear or Conv1D.*LayerNorm"):
        weight_view(nn.LayerNorm(3))


def test_embeddings_are_found_and_absent_ones_are_none(family):
    anatomy = anatomy_of(make(family))
    assert anatomy.embedding("word_embeddings").num_embeddings == VOCAB
    assert (anatomy.embedding("position_embeddings") is None) == (family.name == "llama")
    assert (anatomy.embedding("embedding_projection") is not None) == (family.name == "electra-projected")
    has_types = family.name not in ("distilbert", *CAUSAL)
    assert (anatomy.embedding("token_type_embeddings") is not None) == has_types


def test_only_a_causal_language_model_has_a_vocabulary_head(family):
    head = anatomy_of(make(family, "language")).head
    assert (head is not None) == (family.name in CAUSAL)
    assert anatomy_of(make(family, "base")).head is None
    if head is not None:
        assert head.weight.shape == (VOCAB, HIDDEN)


def test_what_a_config_does_not_name_is_off():
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    relative = dict(relative_attention=True, pos_att_type=["p2c", "c2p"])
    assert family_of(DebertaV2Config(**shape)).model_type == "deberta-v2"
    assert family_of(DebertaV2Config(**shape, **relative, share_att_key=True)).model_type == "deberta-v2"
    # its relative positions have projections of their own, which no one would cut
    with pytest.raises(UnknownFamilyError, match="with share_att_key=True, and this config has share_att_key=False"):
        family_of(DebertaV2Config(**shape, **relative))
