import json
import struct

import pytest
import torch
from families import make
from packing import packed, parts_of, projections
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lmcompress import CompressedModel
from lmcompress.checkpoint.encoding import encode_skeleton, pack_model
from lmcompress.checkpoint.schema import Encoding, GridEncoding, WeightEncoding
from lmcompress.errors import CheckpointError
from lmcompress.evaluation import parameter_count, size_on_disk, tensor_table, weight_bytes


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
        (b"abc", "header too small"),
        (struct.pack("<Q", 2**63) + b"{}", "header too large"),
        (header(b"nonsense"), "invalid JSON in header"),
        (header([1]), "invalid JSON in header"),
        (header({"w": {"dtype": "F32"}}), "missing field `shape`"),
        (header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 0]}}), "invalid offset"),
        (header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"), "file not fully covered"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=f"is not a complete safetensors file.*{message}.*; fetch or copy it again"
    ):
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


MIB = 1 << 20
GRIDS = {8: GridEncoding(low=-127, levels=255), 4: GridEncoding(low=-7, levels=15), 2: GridEncoding(low=-1, levels=3)}


def gpt2_small(container):
    """GPT-2 small with all matrices and embeddings packed, on meta: nothing is allocated."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    grid = GRIDS[2 if container == "base3" else container]
    encode_skeleton(
        model,
        Encoding(
            weights=(
                WeightEncoding(grid=grid, container=container, granularity="row", modules=("wte",)),
                WeightEncoding(grid=grid, container=container, granularity="tensor", modules=tuple(projections(model))),
            )
        ),
    )
    return model


@pytest.mark.parametrize(("container", "expected"), [(8, 121.4), (4, 62.4), (2, 33.0)])
def test_gpt2_small_has_the_sizes_that_are_asked_of_it(container, expected):
    sizes = weight_bytes(gpt2_small(container))
    assert abs(sizes.total / MIB - expected) < 0.5
    assert sizes.packed_weights == 124_439_808 - 1024 * 768 - 12 * (4 * 768 + 3 * 768 + 3072 + 3 * 768 - 768) - 2 * 768
    # one scale for each of 50,257 words is what is above
    assert container <= sizes.bits_per_weight < container + 0.02


def test_base_3_is_smaller_still():
    two, three = (weight_bytes(gpt2_small(container)) for container in (2, "base3"))
    assert three.total < two.total - 5 * MIB and 1.6 <= three.bits_per_weight < 1.63


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_bytes_by_what_they_are_are_those_of_the_file(name, tmp_path):
    model = packed(make(name, "language"), "minmax", 4, inputs="static")
    CompressedModel(model).save_pretrained(tmp_path / "m")
    sizes, stored = weight_bytes(model), tensor_table(tmp_path / "m")
    by_name = {tensor.name: tensor.num_bytes for tensor in stored}
    assert sizes.total == sum(by_name.values())
    assert sizes.embedding_codes == 64 * 8 and sizes.codes + 64 * 8 == sum(
        tensor.num_bytes for tensor in stored if tensor.dtype == "U8"
    )
    assert sizes.scales == sum(size for name, size in by_name.items() if name.endswith("_scales") or "input_" in name)


def test_a_dense_model_has_no_codes():
    model = make("bert")
    sizes = weight_bytes(model)
    assert sizes.codes == sizes.embedding_codes == sizes.scales == 0 and sizes.bits_per_weight is None
    assert sizes.total == 4 * parameter_count(model)
    tied = weight_bytes(make("gpt2", "language"))
    assert tied.total == 4 * parameter_count(make("gpt2", "language"))


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "expected"), [(8, 121.4), (4, 62.4), (2, 33.0)])
def test_the_files_of_gpt2_small_have_these_sizes(bits, expected, tmp_path):
    model = GPT2LMHeadModel(GPT2Config())
    container = {8: 8, 4: 4, 2: 2}[bits]
    pack_model(
        model, {path: part._replace(container=container) for path, part in parts_of(model, "minmax", bits).items()}
    )
    model.save_pretrained(tmp_path / "m")
    size = size_on_disk(tmp_path / "m")
    assert abs(size.weights_bytes / MIB - expected) < 0.5
    assert size.weights_bytes - weight_bytes(model).total < 64_000
