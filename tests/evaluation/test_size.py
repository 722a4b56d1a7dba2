import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from lmcompress.errors import CheckpointError
from lmcompress.evaluation import parameter_count, size_on_disk, tensor_table


@pytest.fixture
def checkpoint(make_classifier, byte_tokenizer, tmp_path):
    folder = tmp_path / "model"
    make_classifier().save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def test_size_is_that_of_the_files_and_adds_up(checkpoint):
    size = size_on_disk(checkpoint)
    assert set(size.by_file) == {path.name for path in checkpoint.iterdir()}
    assert size.total_bytes == sum(path.stat().st_size for path in checkpoint.iterdir())
    assert size.weights_bytes == (checkpoint / "model.safetensors").stat().st_size
    assert size.total_bytes == size.weights_bytes + size.other_bytes == sum(size.by_file.values())
    assert list(size.by_file.values()) == sorted(size.by_file.values(), reverse=True)


def test_what_loading_does_not_need_does_not_count(checkpoint):
    before = size_on_disk(checkpoint)
    for name in ["optimizer.pt", "trainer_state.json", "README.md", "projections.safetensors", "training_args.bin"]:
        (checkpoint / name).write_bytes(b"x" * 1000)
    assert size_on_disk(checkpoint) == before


def test_shards_are_added_up_and_listed_with_the_same_tensors(make_classifier, tmp_path):
    model = make_classifier()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    one, many = size_on_disk(tmp_path / "one"), size_on_disk(tmp_path / "many")
    shards = list((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 1
    assert many.weights_bytes == sum(shard.stat().st_size for shard in shards) >= one.weights_bytes - 10_000
    assert "model.safetensors.index.json" in many.by_file

    def tensors(folder):
        return {(t.name, t.dtype, t.shape, t.num_bytes) for t in tensor_table(folder)}

    assert tensors(tmp_path / "one") == tensors(tmp_path / "many")


def test_the_table_is_what_safetensors_reads(checkpoint):
    read = load_file(checkpoint / "model.safetensors")
    table = tensor_table(checkpoint)
    assert {t.name: t.shape for t in table} == {name: tuple(tensor.shape) for name, tensor in read.items()}
    assert {t.name: t.num_bytes for t in table} == {name: t.numel() * 4 for name, t in read.items()}
    assert {t.dtype for t in table} == {"F32"} and {t.file for t in table} == {"model.safetensors"}


def test_the_table_knows_small_types_scalars_and_empty_tensors(tmp_path):
    tensors = {"a": torch.zeros(3, 5, dtype=torch.uint8), "b": torch.tensor(1.0), "c": torch.zeros(0, 4)}
    save_file({**tensors, "d": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors", {"format": "pt"})
    found = {t.name: (t.dtype, t.shape, t.num_bytes) for t in tensor_table(tmp_path)}
    assert found == {
        "a": ("U8", (3, 5), 15),
        "b": ("F32", (), 4),
        "c": ("F32", (0, 4), 0),
        "d": ("BF16", (2,), 4),
    }


def test_tied_parameters_count_once(make_gpt2):
    model = make_gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    block = 16 * 48 + 48 + 16 * 16 + 16 + 16 * 64 + 64 + 64 * 16 + 16 + 4 * 16
    assert parameter_count(model) == 256 * 16 + 16 * 16 + block + 2 * 16


def test_a_model_on_meta_has_its_parameters_too(make_classifier):
    model = make_classifier()
    with torch.device("meta"):
        skeleton = BertForSequenceClassification(model.config)
    assert parameter_count(skeleton) == parameter_count(model)


def header(content, data=b""):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "not a safetensors file: a header of -1 bytes in 3"),
        (struct.pack("<Q", 2**63) + b"{}", "a header of 9223372036854775808 bytes in 10"),
        (header(b"nonsense"), "header that is not one of safetensors"),
        (header([1]), "header that is not one of safetensors"),
        (header({"w": {"dtype": "F32"}}), "header that is not one of safetensors: KeyError"),
        (header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 0]}}), "'w' of shape .* has -4 bytes"),
        (header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"), "8 bytes of data, it has 4"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        tensor_table(tmp_path)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"must have model.safetensors or model.safetensors.index.json"):
        size_on_disk(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors", "b": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"does not have: \.\./elsewhere.safetensors, gone.safetensors"):
        size_on_disk(tmp_path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="must map tensors to files"):
        size_on_disk(tmp_path)
