"""loading: stock Transformers rebuilds what was written, and nothing else is ever loaded as if it were whole."""

import importlib
import json
import shutil
import struct

import pytest
import torch
import transformers
from families import AUTO_CLASSES, FAMILIES, HIDDEN, auto_class, cut_to_nothing, cut_unevenly, inputs, make, outputs
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import lmcompress.checkpoint.loader
from lmcompress import CheckpointError, CompressedModel, CompressionConfig
from lmcompress.checkpoint.config import FORMAT_VERSION
from lmcompress.checkpoint.files import safetensors_header
from lmcompress.checkpoint.structure import structure_of
from lmcompress.families import anatomy_of

HEADS = [*AUTO_CLASSES, "language"]


@pytest.fixture(params=FAMILIES, ids=str)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(family, head, shape)``: a model in odd shapes, and the folder it was saved to."""
    made = {}

    def save(family, head="classification", shape=cut_unevenly):
        key = (str(family), head, shape.__name__)
        if key not in made:
            model = shape(make(family, head))
            folder = tmp_path_factory.mktemp("saved") / "-".join(key)
            CompressedModel(model).save_pretrained(folder)
            made[key] = model, folder
        return made[key]

    return save


@pytest.fixture
def damaged(saved, tmp_path):
    """``damaged(family)``: a copy of a saved checkpoint that a test may spoil."""

    def copy(family="bert", head="classification"):
        return shutil.copytree(saved(family, head)[1], tmp_path / "damaged")

    return copy


@pytest.mark.parametrize("head", HEADS)
def test_the_reloaded_model_gives_exactly_the_same_logits(family, head, saved):
    model, folder = saved(family, head)
    reloaded = auto_class(family, head).from_pretrained(folder)
    assert type(reloaded) is type(model) and structure_of(reloaded) == structure_of(model)
    assert torch.equal(outputs(reloaded), outputs(model))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("head", HEADS)
def test_a_model_with_blocks_of_nothing_and_a_narrow_stream_reloads(family, head, attention, saved):
    model, folder = saved(family, head, cut_to_nothing)
    reloaded = auto_class(family, head).from_pretrained(folder, attn_implementation=attention)
    assert type(reloaded) is type(model) and structure_of(reloaded) == structure_of(model)
    # tensors of odd sizes lie otherwise in memory, and kernels add in another order
    torch.testing.assert_close(outputs(reloaded), outputs(model), rtol=1e-5, atol=1e-5)
    half = auto_class(family, head).from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    assert {t.dtype for t in half.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    assert not any(tensor.is_meta for tensor in (*reloaded.buffers(), *half.buffers()))
    assert outputs(half).dtype == torch.bfloat16 and outputs(half).isfinite().all()
    assert all(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("head", HEADS[1:])
def test_a_checkpoint_with_a_head_loads_without_it(family, head, saved):
    model, folder = saved(family, head)
    reloaded = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        expected = model.base_model(**inputs(model))[0]
    assert torch.equal(outputs(reloaded), expected)


def test_a_checkpoint_without_a_head_loads_for_a_task(family, saved):
    model, folder = saved(family, "base")
    reloaded = auto_class(family, "classification").from_pretrained(folder, num_labels=5)
    assert torch.equal(outputs(reloaded.base_model), outputs(model))
    assert reloaded.config.num_labels == 5


def test_a_head_of_another_width_can_be_replaced_by_the_user(family, saved, tmp_path):
    model, folder = saved(family)
    load = auto_class(family, "classification").from_pretrained
    if Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(CheckpointError, match="cannot replace the head of a compressed checkpoint"):
            load(folder, num_labels=7, ignore_mismatched_sizes=True)
        AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "base")
        reloaded = load(tmp_path / "base", num_labels=7)
    else:
        reloaded = load(folder, num_labels=7, ignore_mismatched_sizes=True)
    assert outputs(reloaded).shape[-1] == 7
    with torch.no_grad():
        expected = model.base_model(**inputs(model))[0]
    assert torch.equal(outputs(reloaded.base_model), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attentions_load_and_agree(family, attention, saved):
    model, folder = saved(family, "language")
    reloaded = auto_class(family, "language").from_pretrained(folder, attn_implementation=attention)
    assert reloaded.config._attn_implementation == attention
    torch.testing.assert_close(outputs(reloaded), outputs(model), rtol=1e-5, atol=1e-5)


def test_bfloat16_loads_as_the_model_cast(family, saved):
    model, folder = saved(family)
    reloaded = auto_class(family, "classification").from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in reloaded.parameters()} == {torch.bfloat16}
    cast = cut_unevenly(make(family))
    assert torch.equal(outputs(reloaded), outputs(cast.to(torch.bfloat16)))


def test_a_device_map_loads_the_same(family, saved):
    model, folder = saved(family)
    reloaded = auto_class(family, "classification").from_pretrained(folder, device_map="cpu")
    assert torch.equal(outputs(reloaded), outputs(model))


def test_tied_weights_stay_tied(family, saved):
    model, folder = saved(family, "language")
    reloaded = auto_class(family, "language").from_pretrained(folder)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight)
    assert tied or family.name == "electra-projected"


def test_a_reloaded_model_saves_with_stock_transformers_and_loads_again(family, saved, tmp_path):
    model, folder = saved(family, "language")
    auto_class(family, "language").from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = auto_class(family, "language").from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(again), outputs(model))
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert new["quantization_config"] == old["quantization_config"]


def test_sharded_checkpoints_load(family, saved, tmp_path):
    model, folder = saved(family)
    auto_class(family, "classification").from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(outputs(auto_class(family, "classification").from_pretrained(tmp_path)), outputs(model))


def test_the_stock_trainer_trains_a_reloaded_model_and_its_checkpoint_reloads(family, saved, tmp_path):
    model, folder = saved(family)
    reloaded = auto_class(family, "classification").from_pretrained(folder)
    rows = [dict(input_ids=row, labels=i % 3) for i, row in enumerate(inputs(model, rows=4)["input_ids"])]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=4, learning_rate=0.01, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(reloaded, arguments, train_dataset=rows).train()
    assert not torch.equal(outputs(reloaded.eval()), outputs(model))
    again = auto_class(family, "classification").from_pretrained(tmp_path / "checkpoint-1")
    assert torch.equal(outputs(again), outputs(reloaded))
    assert structure_of(again) == structure_of(model)


def test_generation_and_pipelines_just_work(saved):
    model, folder = saved("gpt2", "language")
    reloaded = auto_class(FAMILIES[-1], "language").from_pretrained(folder)
    ids = inputs(model)["input_ids"]
    how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert torch.equal(reloaded.generate(ids, **how), model.generate(ids, **how))


def test_registering_again_is_harmless(saved):
    lmcompress.checkpoint.loader.register()
    assert AUTO_QUANTIZER_MAPPING["lmcompress"] is lmcompress.checkpoint.loader.LmcompressQuantizer
    again = importlib.reload(lmcompress.checkpoint.loader)
    again.register()
    again.register()
    model, folder = saved("bert")
    assert torch.equal(outputs(AutoModel.from_pretrained(folder)), outputs(model.base_model))
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["lmcompress"] is CompressionConfig


def test_a_registration_by_a_self_loading_checkpoint_gives_way(monkeypatch):
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "lmcompress", object)
    lmcompress.checkpoint.loader.register()
    assert issubclass(AUTO_QUANTIZER_MAPPING["lmcompress"], lmcompress.checkpoint.loader.LmcompressQuantizer)


_LOAD_ALL = """
import json
answers = {}
for name, (auto, path) in json.loads(sys.argv[1]).items():
    try:
        answers[name] = type(getattr(transformers, auto).from_pretrained(path)).__name__
    except Exception as error:
        answers[name] = f"{type(error).__name__} raised"
print(json.dumps(answers))
"""


def test_without_lmcompress_cut_shapes_fail_loudly_and_stock_shapes_load(saved, tmp_path, without_lmcompress):
    wanted, expected = {}, {}
    for family in FAMILIES:
        for head in ("base", "classification", "language"):
            auto = auto_class(family, head).__name__
            wanted[f"{family}-{head}-cut"] = (auto, str(saved(family, head)[1]))
            wanted[f"{family}-{head}-cut-base"] = ("AutoModel", str(saved(family, head)[1]))
        stock = CompressedModel(make(family))
        stock.save_pretrained(tmp_path / family.name, format="vanilla")
        wanted[f"{family}-stock"] = ("AutoModelForSequenceClassification", str(tmp_path / family.name))
        expected[f"{family}-stock"] = type(stock.model).__name__
    done = without_lmcompress(_LOAD_ALL, json.dumps(wanted))
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert {name: answer for name, answer in answers.items() if not answer.endswith("raised")} == expected


def _spoil_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _structure(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def _load(folder):
    return auto_class(FAMILIES[0], "classification").from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1], ids=str)
def test_a_truncated_file_is_refused(damaged, kept):
    file = damaged() / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(Exception, match="cut off|SafetensorError|header|deserializing|not a safetensors|incomplete"):
        _load(file.parent)
    with pytest.raises(CheckpointError, match="is not a complete safetensors file, it is damaged or cut off"):
        safetensors_header(file)


def _with_header(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize(
    "content",
    [
        b"garbage, not a checkpoint at all",
        struct.pack("<Q", 2**63) + b"{}",
        _with_header(b"\xff\xfe\x00"),
        _with_header(b"[1, 2]"),
        _with_header(b'{"a": 3}'),
        _with_header(b'{"a": {"shape": [1]}}'),
        _with_header(b'{"a": {"shape": 3, "data_offsets": [0, 4]}}', b"1234"),
        _with_header(b'{"a": {"shape": [1e999], "data_offsets": [0, 4]}}', b"1234"),
        _with_header(b'{"a": {"shape": [1], "data_offsets": []}}'),
        _with_header(b'{"a": {"shape": [1], "data_offsets": ["0", "4"]}}', b"1234"),
        _with_header(b"[" * 100_000),
    ],
    ids=["text", "length", "no-utf8", "list", "number", "no-offsets", "shape", "infinite", "empty", "strings", "deep"],
)
def test_a_damaged_header_is_refused(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file.*fetch or copy"):
        safetensors_header(file)


def test_a_header_says_names_and_shapes(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(())}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = safetensors_header(tmp_path / "x.safetensors")
    assert {name: stored.shape for name, stored in header.items()} == {"a": (2, 3), "b": ()}
    assert {stored.dtype for stored in header.values()} == {"F32"}


def _change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_every_missing_tensor_is_named(family, saved, tmp_path):
    names = list(load_file(saved(family)[1] / "model.safetensors"))
    for name in names[:: max(1, len(names) // 4)]:
        folder = shutil.copytree(saved(family)[1], tmp_path / name)
        _change_tensors(folder, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(CheckpointError, match=f"tensor {name} is missing from the checkpoint"):
            auto_class(family, "classification").from_pretrained(folder)


def test_a_missing_block_is_noticed_without_the_head_too(family, damaged):
    folder = damaged(family)
    base = make(family).base_model_prefix
    name = next(
        n
        for n, _ in make(family).named_parameters()
        if n.startswith(f"{base}.{anatomy_of(make(family)).family.blocks}")
    )
    _change_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match="is missing from the checkpoint"):
        AutoModel.from_pretrained(folder)


def test_a_tensor_of_another_shape_is_refused(family, damaged):
    folder = damaged(family)
    changed = []

    def shorten(tensors):
        name = next(n for n, t in tensors.items() if t.dim() == 2 and ".0." in n)
        tensors[name] = tensors[name][:-1].clone()
        changed.append(name)

    _change_tensors(folder, shorten)
    with pytest.raises(CheckpointError, match="its config says .* do not belong together"):
        auto_class(family, "classification").from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["structure"]["blocks"][0].update(heads=3), "has shape .* its config says"),
        (lambda c: c["structure"]["blocks"][1].update(ffn=6), "has shape .* its config says"),
        (lambda c: c["structure"]["blocks"][1].update(ffn=1 << 20), "has shape .* its config says"),
        (lambda c: c["structure"]["blocks"].pop(), "says 2 layers.*describes 1 blocks"),
        (lambda c: c["structure"]["blocks"].append({"heads": 1, "ffn": 1}), "says 2 layers.*describes 3 blocks"),
        (lambda c: c["structure"].update(head_size=8), "heads of 4.*of 8"),
        (lambda c: c.pop("structure"), "has shape .* its config says"),
        (lambda c: c["structure"]["blocks"].reverse(), "has shape .* its config says"),
        (lambda c: c["structure"]["blocks"][0].update(heads=10**9), "structure.blocks.0.heads.*less than or equal"),
        (lambda c: c["structure"]["blocks"][0].update(ffn=-1), "structure.blocks.0.ffn.*greater than or equal"),
        (
            lambda c: c["structure"]["blocks"][0].update(heads=0),
            "has a tensor encoder.layer.0.*which its config excludes",
        ),
        (lambda c: c["structure"].update(hidden=15), "has shape .* its config says"),
        (lambda c: c["structure"].update(hidden=HIDDEN + 1), "must not be greater"),
        (lambda c: c["structure"].update(hidden=10**12), "structure.hidden.*less than or equal"),
        (lambda c: c.update(format_version=FORMAT_VERSION + 1), f"format version {FORMAT_VERSION + 1}"),
        (lambda c: c.update(weights={}), "unknown keys: weights"),
    ],
    ids=[
        "heads",
        "ffn",
        "huge-ffn",
        "fewer",
        "more",
        "head-size",
        "none",
        "swapped",
        "absurd",
        "negative",
        "no-heads",
        "hidden",
        "wider",
        "absurd-hidden",
        "future",
        "key",
    ],
)
def test_a_config_that_does_not_fit_the_files_is_refused(damaged, change, message):
    folder = damaged()
    spoilt = _structure(folder)
    change(spoilt)
    _spoil_config(folder, quantization_config=spoilt)
    with pytest.raises(CheckpointError, match=message):
        _load(folder)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "max_position_embeddings"])
def test_a_stock_size_that_does_not_fit_the_files_is_refused_before_allocation(damaged, field):
    folder = damaged()
    # 2 ** 40 numbers would be terabytes
    _spoil_config(folder, **{field: 1 << 40 if field != "hidden_size" else HIDDEN * 4096})
    with pytest.raises(CheckpointError, match="config says|config.json (says|makes)"):
        _load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 0},
        {"hidden_size": 10**15},
        {"hidden_size": -16},
        {"num_attention_heads": 0},
        {"num_attention_heads": 10**9},
        {"num_attention_heads": 5},
        {"intermediate_size": 10**12},
    ],
    ids=str,
)
def test_absurd_stock_sizes_are_refused_before_a_skeleton_is_built(damaged, changes, monkeypatch):
    folder = damaged()
    _spoil_config(folder, **changes)
    monkeypatch.setattr(nn.Linear, "__init__", lambda *args, **kwargs: pytest.fail("a skeleton was built"))
    with pytest.raises(Exception, match="config.json says|divi|multiple") as caught:
        CompressedModel.from_pretrained(folder)
    assert isinstance(caught.value, CheckpointError) or "divi" in str(caught.value) or "multiple" in str(caught.value)


@pytest.mark.skipif(not hasattr(HfQuantizer, "update_attn_implementation"), reason="no hook before the skeleton")
@pytest.mark.parametrize("layers", [10**9, 1000])
def test_an_auto_class_builds_no_absurd_skeleton_either(damaged, layers, monkeypatch):
    folder = damaged()
    _spoil_config(folder, num_hidden_layers=layers)
    monkeypatch.setattr(nn.Linear, "__init__", lambda *args, **kwargs: pytest.fail("a skeleton was built"))
    with pytest.raises(CheckpointError, match=f"config.json says {layers} layers[;,] (a model has|.* describes 2)"):
        _load(folder)


@pytest.mark.parametrize("value", ["three", None, [3], 2.5, {"a": 1}], ids=str)
def test_a_stock_size_that_is_no_number_is_one_error(damaged, value):
    folder = damaged()
    _spoil_config(folder, num_hidden_layers=value)
    with pytest.raises(Exception, match="num_hidden_layers|layers"):
        CompressedModel.from_pretrained(folder)


def test_a_config_that_is_no_json_is_one_error(damaged):
    folder = damaged()
    (folder / "config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON"):
        CompressedModel.from_pretrained(folder)


def test_pickles_are_not_what_we_write(saved, family):
    assert {f.suffix for f in saved(family)[1].iterdir()} <= {".json", ".safetensors", ".md"}


def test_every_auto_class_named_here_exists():
    assert all(hasattr(transformers, name) for name in AUTO_CLASSES.values())
