"""Blocks whose arithmetic depends on their number compute the same after they are moved, and after a stock reload."""

from __future__ import annotations

import copy

import pytest
import torch
from families import inputs, make, outputs
from transformers import GPT2LMHeadModel

from lmcompress import CompressedModel, LmcompressError
from lmcompress.checkpoint.cutting import drop_heads, keep_layers
from lmcompress.families import anatomy_of
from lmcompress.pruning import PruningConfig, prune
from lmcompress.pruning.structured.gates import Gates
from lmcompress.pruning.structured.method import StructuredPruning
from lmcompress.pruning.structured.surgery import cut
from lmcompress.pruning.structured.units import Units
from lmcompress.quantization import QuantizationConfig, quantize
from lmcompress.quantization.method import Quantization
from lmcompress.students import by_layers, by_shape, factorize, separate
from lmcompress.trainers import CompressionTrainer


def scaled(**config):
    """A GPT-2 of which block i divides its scores by i + 1; scores are large enough to matter."""
    return make("gpt2", "language", scale_attn_by_inverse_layer_idx=True, **config)


def reloaded(model, folder):
    model.save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder).eval()


def skipping(model, kept):
    """What a model computes by some of its blocks, in another order: its own blocks, run by hand."""
    batch = inputs(model)
    ids, length = batch["input_ids"], batch["input_ids"].shape[1]
    hidden = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(length))
    visible = torch.ones(length, length, dtype=torch.bool).tril() & batch["attention_mask"].bool()[:, None, None, :]
    with torch.no_grad():
        for number in kept:
            block = model.transformer.h[number]
            q, k, v = (
                part.view(*ids.shape, block.attn.num_heads, -1).transpose(1, 2)
                for part in block.attn.c_attn(block.ln_1(hidden)).chunk(3, -1)
            )
            scores = q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5 / (number + 1)
            mixed = scores.masked_fill(~visible, -1e9).softmax(-1) @ v
            hidden = hidden + block.attn.c_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + block.mlp(block.ln_2(hidden))
        return model.lm_head(model.transformer.ln_f(hidden))


def real(model, logits):
    return logits[inputs(model)["attention_mask"].bool()]


@pytest.mark.parametrize("kept", [[1, 2], [2], [0, 2], [2, 0, 1], [0, 1]], ids=str)
def test_a_student_of_some_layers_computes_what_they_did_before_and_after_a_stock_reload(tmp_path, kept):
    teacher = scaled()
    expected = skipping(teacher, kept)
    assert not torch.allclose(real(teacher, expected), real(teacher, outputs(teacher)), atol=1e-3)
    student = by_layers(teacher, kept).model.eval()
    torch.testing.assert_close(real(teacher, outputs(student)), real(teacher, expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs(reloaded(student, tmp_path)), outputs(student))
    assert [block.get("attention").scaling for block in anatomy_of(student).blocks] == [
        block.get("attention").scaling for block in anatomy_of(scaled(n_layer=len(kept))).blocks
    ]


def test_the_same_student_by_shape_and_of_a_student():
    teacher = scaled()
    one, other = by_layers(teacher, [1, 2]).model, by_shape(teacher, layers=[1, 2]).model
    torch.testing.assert_close(outputs(one.eval()), outputs(other.eval()))
    again = by_layers(one, [1]).model
    torch.testing.assert_close(
        real(teacher, outputs(again.eval())), real(teacher, skipping(teacher, [2])), rtol=1e-4, atol=1e-4
    )


def test_a_model_whose_layers_are_pruned_computes_what_its_gates_did(tmp_path):
    model = scaled()
    mask = torch.tensor([False, True, True])
    with Gates(model, ["layers"]) as gates:
        gates.set(Units(layers=mask.float()))
        expected = outputs(model)
    cut(model, Units(layers=mask))
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-4)
    assert CompressedModel(model).save_pretrained(tmp_path / "own").max_error == 0
    assert torch.equal(outputs(reloaded(model, tmp_path / "stock")), outputs(model))


def test_layers_are_pruned_without_training():
    model = scaled()
    prune(model, PruningConfig(target={"shape": {"layers": 2}}, parts=("layers",), criterion="random"))
    assert len(anatomy_of(model).blocks) == 2


def test_cross_attention_moves_too(tmp_path):
    model = scaled(add_cross_attention=True)
    states = torch.randn(3, 5, model.config.n_embd)
    student = by_layers(model, [1, 2]).model.eval()
    for new, old in zip(student.transformer.h, model.transformer.h[1:], strict=True):
        assert new.crossattention.layer_idx == new.attn.layer_idx == old.attn.layer_idx - 1
        assert new.crossattention.scaling == new.attn.scaling != old.attn.scaling
        for name in ("attn", "crossattention"):
            x, extra = (
                torch.randn(3, 4, model.config.n_embd),
                {} if name == "attn" else {"encoder_hidden_states": states},
            )
            with torch.no_grad():
                mine, theirs = (getattr(block, name)(x, **extra)[0] for block in (new, old))
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_bert_numbers_the_caches_of_its_cross_attention():
    model = make("bert", "base", is_decoder=True, add_cross_attention=True)
    keep_layers(model, [2, 0])
    assert [layer.crossattention.self.layer_idx for layer in model.encoder.layer] == [0, 1]


def test_blocks_without_scores_move_freely():
    model = scaled()
    drop_heads(anatomy_of(model).blocks[1])
    separate(model, [2], 3, [inputs(model)], ridge=0.1)
    before = copy.deepcopy(model.transformer.h)
    keep_layers(model, [1, 2])
    for new, old in zip(model.transformer.h, list(before)[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(new.parameters(), old.parameters(), strict=True))


def test_other_models_are_not_touched():
    model = make("gpt2", "language")
    kept = [parameter.detach().clone() for parameter in model.transformer.h[2].parameters()]
    student = by_layers(model, [2]).model
    assert all(torch.equal(a, b) for a, b in zip(kept, student.transformer.h[0].parameters(), strict=True))


@pytest.mark.parametrize("made", ["packed", "low-rank"])
def test_queries_without_a_plain_matrix_are_refused_and_nothing_changes(made):
    model = scaled()
    if made == "packed":
        quantize(model, progress=False)
    else:
        factorize(model, rank=4, parts=["qkv"])
    before = outputs(model)
    with pytest.raises(LmcompressError, match="attn is scaled by the number of its block.*multiplied into its queries"):
        keep_layers(model, [0, 2])
    assert torch.equal(outputs(model), before) and model.config.n_layer == 3
    keep_layers(model, [0, 1])  # nobody moves
    assert len(model.transformer.h) == 2


def test_layers_and_codes_of_such_a_model_are_not_decided_in_one_run(tmp_path):
    from training import tiny_arguments

    config = PruningConfig(target={"shape": {"layers": 2}}, parts=("layers",), criterion="random")

    def trainer(model):
        return CompressionTrainer(
            model,
            args=tiny_arguments(tmp_path, max_steps=2),
            methods=[StructuredPruning(config), Quantization(QuantizationConfig())],
            train_dataset=[{"input_ids": torch.arange(3, 9)}] * 8,
        )

    with pytest.raises(LmcompressError, match="scaled by their number.*prune in an earlier stage"):
        trainer(scaled())
    trainer(make("gpt2", "language"))
