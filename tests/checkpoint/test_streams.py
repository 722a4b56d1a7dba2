"""storage: a checkpoint of streams loads as the one without, to the bit, and is smaller; nothing else loads as one."""

import json

import pytest
import torch
import transformers
from families import BY_NAME, FAMILIES, auto_class, cut_to_nothing, cut_unevenly, inputs, make, outputs, sparse
from packing import packed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from lmcompress import CheckpointError, CompressedModel, LmcompressError
from lmcompress.checkpoint.config import recorded_compression
from lmcompress.checkpoint.streams import decode_streams, open_streams
from lmcompress.entropy_coding import CODERS


def whole(model):
    return model


@pytest.fixture
def checkpoint(tmp_path):
    """A sparse BERT as streams, and the model."""
    model = sparse(make("bert"))
    CompressedModel(model).save_pretrained(tmp_path / "streams", storage="auto")
    return tmp_path / "streams", model


def change_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [whole, cut_unevenly, cut_to_nothing])
@pytest.mark.parametrize("head", ["classification", "language", "base"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_streams_load_as_what_they_were_made_of(family, head, shape, tmp_path):
    model = sparse(shape(make(family, head)))
    compressed = CompressedModel(model)
    measured = compressed.save_pretrained(tmp_path / "streams", storage="auto")
    compressed.save_pretrained(tmp_path / "plain")
    assert measured.max_error == 0.0
    loaded = auto_class(family, head).from_pretrained(tmp_path / "streams")
    assert same_state(loaded, model)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32} and all(
        p.requires_grad for p in loaded.parameters()
    )
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("streams", "plain")]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("bits", [8, 2])
def test_packed_models_become_streams(family, bits, tmp_path):
    # codes of tiny matrices are smaller than any head of a stream: here they are all alike
    model = packed(make(family, "language", vocab_size=400), "minmax" if bits == 8 else "elastic", bits)
    model.get_input_embeddings().weight.fill_(1)
    measured = CompressedModel(model).save_pretrained(tmp_path / "streams", storage="zstd")
    assert measured.max_error == 0.0
    loaded = auto_class(BY_NAME[family], "language").from_pretrained(tmp_path / "streams")
    assert same_state(loaded, model)
    names = recorded_compression(type(loaded.config).from_pretrained(tmp_path / "streams")).storage.streams
    assert any("wte" in name or "word_embeddings" in name for name in names)


@pytest.mark.parametrize("coder", CODERS)
def test_every_coder_loads(coder, tmp_path):
    model = sparse(make("gpt2", "language"))
    CompressedModel(model).save_pretrained(tmp_path / "streams", storage=coder)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streams")
    assert same_state(loaded, model)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.generate(**inputs(model), max_new_tokens=3, do_sample=False).shape == (3, 12)


def test_base_and_head_load_one_another(checkpoint, tmp_path):
    folder, model = checkpoint
    base = AutoModel.from_pretrained(folder)
    assert same_state(base, model.base_model)
    CompressedModel(base).save_pretrained(tmp_path / "base")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=7)
    assert same_state(again.base_model, model.base_model) and again.classifier.weight.shape[0] == 7


def test_a_loaded_model_keeps_its_storage_and_can_give_it_up(checkpoint, tmp_path):
    folder, model = checkpoint
    loaded = CompressedModel.from_pretrained(folder)
    assert loaded.storage == "auto"
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    loaded.save_pretrained(tmp_path / "plain", storage="plain")
    with safe_open(tmp_path / "plain/model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).is_floating_point() for name in file.keys())
    assert CompressedModel.from_pretrained(tmp_path / "plain").storage is None
    loaded.save_pretrained(tmp_path / "vanilla", format="vanilla")
    assert "quantization_config" not in json.loads((tmp_path / "vanilla/config.json").read_text())


def test_what_transformers_writes_of_a_loaded_model_has_no_streams_and_loads(checkpoint, tmp_path):
    folder, model = checkpoint
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "stock")
    assert same_state(AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock"), model)


def test_a_loaded_model_trains(checkpoint, tmp_path):
    folder, _ = checkpoint
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    rows = [{k: v[i % 3] for k, v in inputs(loaded).items()} | {"labels": i % 3} for i in range(6)]
    before = outputs(loaded)
    args = TrainingArguments(str(tmp_path / "out"), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    Trainer(loaded, args, train_dataset=rows).train()
    assert not torch.equal(outputs(loaded.eval()), before)


def test_a_head_of_another_width_is_the_users_to_replace(tmp_path):
    model = sparse(make("bert", num_labels=64))
    CompressedModel(model).save_pretrained(tmp_path / "streams", storage="auto")
    assert (
        "classifier.weight"
        in json.loads((tmp_path / "streams/config.json").read_text())["quantization_config"]["storage"]["streams"]
    )
    loader = AutoModelForSequenceClassification.from_pretrained
    if transformers.__version__ < "5.18":
        with pytest.raises(CheckpointError, match="cannot replace the head"):
            loader(tmp_path / "streams", num_labels=7, ignore_mismatched_sizes=True)
        return
    loaded = loader(tmp_path / "streams", num_labels=7, ignore_mismatched_sizes=True)
    assert same_state(loaded.bert, model.bert)
    assert loaded.classifier.weight.shape == (7, 16) and loaded.classifier.weight.dtype == torch.float32
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loader(tmp_path / "streams", num_labels=7)


def test_what_would_stay_on_disk_is_refused(checkpoint, tmp_path):
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    with pytest.raises(LmcompressError, match="must leave nothing on disk"):
        AutoModelForSequenceClassification.from_pretrained(checkpoint[0], device_map=places, offload_folder=tmp_path)


def test_half_precision_stays(tmp_path):
    model = sparse(make("gpt2", "language")).bfloat16()
    CompressedModel(model).save_pretrained(tmp_path / "streams", storage="auto")
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "streams"), model)


def test_shards_load_and_their_index_says_their_size(tmp_path, monkeypatch):
    model = sparse(make("bert"))
    save = type(model).save_pretrained
    monkeypatch.setattr(
        type(model),
        "save_pretrained",
        lambda self, path, **given: save(self, path, **(given | {"max_shard_size": "6KB"})),
    )
    CompressedModel(model).save_pretrained(tmp_path / "streams", storage="auto")
    files = list((tmp_path / "streams").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "streams/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(file.stat().st_size for file in files)
    assert same_state(AutoModelForSequenceClassification.from_pretrained(tmp_path / "streams"), model)


def test_another_dtype_is_cast_after_decoding(checkpoint):
    folder, model = checkpoint
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    assert same_state(loaded, model.bfloat16())


def test_memory_holds_the_decoded_model_and_one_tensor_at_most(checkpoint):
    folder, model = checkpoint
    storage = recorded_compression(type(model.config).from_pretrained(folder)).storage
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    places = open_streams(skeleton, storage)
    tensors = load_file(folder / "model.safetensors")
    skeleton.load_state_dict(tensors, assign=True)
    decoded = sum(tensor.nbytes for tensor in model.state_dict().values())
    most = max(tensor.nbytes for tensor in model.state_dict().values())
    del tensors
    held = []
    for place in places:
        decode_streams(skeleton, [place])
        held.append(sum(tensor.nbytes for tensor in skeleton.state_dict().values()))
    assert held == sorted(held) and max(held) <= decoded + most
    assert same_state(skeleton, model)


_LOAD = """
try:
    model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
except (RuntimeError, ValueError, ImportError) as error:
    print("REFUSED", str(error)[:2000])
else:
    print("LOADED")
"""


@pytest.mark.parametrize("loader", ["AutoModel", "AutoModelForSequenceClassification"])
@pytest.mark.parametrize("state", ["dense", "packed"])
def test_a_load_without_lmcompress_raises(state, loader, tmp_path, without_lmcompress):
    model = sparse(make("bert")) if state == "dense" else packed(make("bert", vocab_size=400), "minmax", 8)
    if state == "packed":
        model.get_input_embeddings().weight.fill_(1)
    CompressedModel(model).save_pretrained(tmp_path / "streams", storage="auto")
    done = without_lmcompress(_LOAD, tmp_path / "streams", loader)
    assert "REFUSED" in done.stdout, done.stdout + done.stderr


def test_without_lmcompress_nothing_loads_as_if_it_were_a_model(checkpoint):
    folder, model = checkpoint
    tensors = load_file(folder / "model.safetensors")
    stock = model.state_dict()
    storage = recorded_compression(type(model.config).from_pretrained(folder)).storage
    assert storage.streams
    assert all(tensors[name].shape != stock[name].shape for name in storage.streams)


def flip(tensors, at=-1):
    name = next(name for name in sorted(tensors) if name.endswith("intermediate.dense.weight"))
    tensors[name][at] ^= 1


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: change_tensors(f, flip), r"tensor \S*intermediate.dense.weight cannot be decoded: the checksum"),
        (
            lambda f: change_config(
                f, lambda c: c["storage"]["streams"].update({n: 7 for n in c["storage"]["streams"]})
            ),
            "its config says",
        ),
        (lambda f: change_config(f, lambda c: c.pop("storage")), "its config says"),
        (
            lambda f: change_config(f, lambda c: c.update(format_version=3)),
            "format version 3 and streams, which needs version 4",
        ),
        (lambda f: change_config(f, lambda c: c["storage"].update(coder="rar")), "storage.coder"),
        (lambda f: change_config(f, lambda c: c["storage"].update(streams={"a": -1})), "storage.streams"),
        (lambda f: change_config(f, lambda c: c["storage"].update(more=1)), "storage.more"),
    ],
)
def test_damage_is_named(checkpoint, damage, message):
    folder, _ = checkpoint
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_stream_of_another_tensor_is_refused(checkpoint):
    folder, _ = checkpoint

    def swap(tensors):
        names = [n for n in sorted(tensors) if n.endswith(("intermediate.dense.weight", "0.output.dense.weight"))]
        one, other = names[0], next(n for n in names if n.startswith(names[0].split("intermediate")[0] + "output"))
        tensors[one], tensors[other] = tensors[other], tensors[one]
        change_config(
            folder, lambda c: c["storage"]["streams"].update({one: len(tensors[one]), other: len(tensors[other])})
        )

    change_tensors(folder, swap)
    with pytest.raises(CheckpointError, match="must have shape"):
        AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("format", ["vanilla", "self_loading"])
def test_only_native_has_streams(format, tmp_path):
    with pytest.raises(LmcompressError, match="format must be native"):
        CompressedModel(make("bert")).save_pretrained(tmp_path / "a", format=format, storage="zstd")
    with pytest.raises(LmcompressError, match="storage must be auto, zstd, huffman, plain"):
        CompressedModel(make("bert")).save_pretrained(tmp_path / "a", storage="rar")
    assert not (tmp_path / "a").exists()
