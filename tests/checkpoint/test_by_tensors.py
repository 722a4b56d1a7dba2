"""by_tensors: a round trip that holds one model, and finds what the whole one would."""

from __future__ import annotations

import json

import pytest
import torch
from decoders import MODERN
from families import FAMILIES, cut_unevenly, make
from safetensors.torch import load_file, save_file

from lmcompress import CompressedModel, EquivalenceError, LmcompressError
from lmcompress.checkpoint import by_tensors
from lmcompress.checkpoint.by_tensors import check_by_tensors
from lmcompress.checkpoint.saving import random_batches, tolerance_of
from lmcompress.quantization.ptq import quantize


def check(model, folder):
    how = dict(tolerance=1e-5, inputs="random", format="native")
    return check_by_tensors(model, folder, random_batches(model), **how)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_cut_model_passes_tensor_by_tensor(family, tmp_path):
    model = cut_unevenly(make(family))
    found = CompressedModel(model).save_pretrained(tmp_path / "out", check="tensors")
    assert found.tensors == len(load_file(tmp_path / "out/model.safetensors")) and found.max_error <= 1e-6
    assert json.loads((tmp_path / "out/lmcompress.json").read_text())["equivalence"]["tensors"] == found.tensors


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_packed_and_tied_models_and_shards_pass(name, tmp_path):
    model = MODERN[name]().eval()
    model.tie_weights()
    quantize(model, progress=False)
    CompressedModel(model).save_pretrained(tmp_path / "out", check="tensors", max_shard_size="4KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def saved(tmp_path):
    model = MODERN["llama"]().eval()
    CompressedModel(model).save_pretrained(tmp_path / "out")
    return model, tmp_path / "out", load_file(tmp_path / "out/model.safetensors")


def test_a_single_bit_is_found(tmp_path):
    model, folder, tensors = saved(tmp_path)
    tensors["model.norm.weight"].view(torch.uint8)[0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EquivalenceError, match="the tensor model.norm.weight on disk is not the one in memory"):
        check(model, folder)


def test_a_missing_tensor_is_found(tmp_path):
    model, folder, tensors = saved(tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EquivalenceError, match="model.layers.1.mlp.up_proj.weight is not on disk"):
        check(model, folder)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("intermediate_size", 32, "config.json describes the tensor"), ("hidden_act", "relu", "differs from the one in")],
)
def test_a_config_of_another_model_is_found(field, value, words, tmp_path):
    model, folder, _ = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(EquivalenceError, match=words):
        check(model, folder)


def test_large_models_are_checked_so_by_default_and_are_not_loaded(tmp_path, monkeypatch):
    model = MODERN["llama"]().eval()
    assert CompressedModel(model).save_pretrained(tmp_path / "small").tensors == 0
    monkeypatch.setattr("lmcompress.model.LARGE", 1)
    monkeypatch.setattr(type(model), "from_pretrained", classmethod(lambda *_, **__: pytest.fail("held twice")))
    assert CompressedModel(model).save_pretrained(tmp_path / "large").tensors > 0


def test_no_more_than_two_blocks_are_in_memory_beside_the_model(tmp_path, monkeypatch):
    model, folder, tensors = saved(tmp_path)
    seen = []
    filled = by_tensors._filled
    monkeypatch.setattr(by_tensors, "_filled", lambda *given: seen.append(filled(*given)) or seen[-1])
    check(model, folder)
    held = sum(p.numel() for block in seen for p in block.parameters() if not p.is_meta)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert held == 2 * block < sum(tensor.numel() for tensor in tensors.values())


def test_streams_and_loaders_are_refused(tmp_path):
    model = CompressedModel(make("bert"))
    with pytest.raises(LmcompressError, match="check='tensors' compares plain tensors"):
        model.save_pretrained(tmp_path / "out", check="tensors", format="self_loading")
    with pytest.raises(LmcompressError, match="check must be auto, outputs or tensors, got 'none'"):
        model.save_pretrained(tmp_path / "out", check="none")


def test_the_tolerance_follows_the_dtype():
    assert tolerance_of(torch.float32) == 1e-5 < tolerance_of(torch.float16) < tolerance_of(torch.bfloat16)
