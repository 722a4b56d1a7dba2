"""selfloading: the loader that travels with a checkpoint works where lmcompress is not installed."""

import ast
import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from compacting import low_rank
from families import FAMILIES, VOCAB, auto_class, cut_to_nothing, cut_unevenly, inputs, make, outputs
from packing import INPUTS, packed_with_attention, parts_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from lmcompress import CompressedModel, EquivalenceError, LmcompressError
from lmcompress.checkpoint import plain, travelling
from lmcompress.checkpoint.config import FORMAT_VERSION
from lmcompress.checkpoint.encoding import pack_model, unpacked
from lmcompress.families import narrow, shaping
from lmcompress.kernels.dispatch import using
from lmcompress.numerics.grids import PerGroup, PerRow
from lmcompress.numerics.inputs import quantize_input, static_range
from lmcompress.numerics.padding import stated

_LOAD = """
import json
from pathlib import Path
rows = json.loads(sys.argv[1])
for row in rows:
    trust = {"trust_remote_code": True} if row["trust"] else {}
    try:
        model = getattr(transformers, row["auto"]).from_pretrained(row["folder"], **trust).eval()
        with torch.no_grad():
            answer = model(**{name: torch.tensor(value) for name, value in row["inputs"].items()})
        row["logits"] = (answer["logits"] if "logits" in answer else answer[0]).tolist()
        if row["again"]:
            model.save_pretrained(row["again"])
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(rows))
"""


@pytest.fixture(params=FAMILIES, ids=str)
def family(request):
    return request.param


def tiny_tokenizer(folder):
    """The path of a tokenizer of the words that tiny models know."""
    vocabulary = {"[UNK]": 0, "[PAD]": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)
    return str(folder)


def _row(model, folder, auto, trust=True, again=None):
    given = {name: value.tolist() for name, value in inputs(model).items()}
    return dict(folder=str(folder), auto=auto, inputs=given, trust=trust, again=again and str(again))


def test_every_family_loads_without_lmcompress_when_trusted_and_fails_loudly_otherwise(tmp_path, without_lmcompress):
    rows, expected = [], []
    for family in FAMILIES:
        for head, shape in (("classification", cut_unevenly), ("language", cut_unevenly), ("language", cut_to_nothing)):
            folder = tmp_path / f"{family.name}_{head}_{shape.__name__}".replace("-", "_")
            model = shape(make(family, head))
            CompressedModel(model).save_pretrained(folder, format="self_loading")
            auto = auto_class(family, head).__name__
            rows.append(_row(model, folder, auto, trust=False))
            expected.append(None)
            rows.append(_row(model, folder, auto, again=folder.with_name(folder.name + "_again")))
            expected.append(outputs(model))
        with torch.no_grad():
            base = model.base_model(**inputs(model))[0]
        rows += [_row(model, folder, "AutoModel"), _row(model, rows[-1]["again"], auto)]
        expected += [base, outputs(model)]
    # without trust first: one trusted load registers the loader for the rest of the process
    order = sorted(range(len(rows)), key=lambda i: rows[i]["trust"])
    done = without_lmcompress(_LOAD, json.dumps([rows[i] for i in order]))
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for i, answer in zip(order, answers, strict=True):
        if expected[i] is None:
            assert "logits" not in answer and "this checkpoint is compressed" in answer["error"]
        else:
            assert "error" not in answer, answer["error"]
            # odd sizes lie otherwise in memory when they come from a file, and kernels add in another order
            torch.testing.assert_close(torch.tensor(answer["logits"]), expected[i], rtol=1e-5, atol=1e-5)


def test_with_lmcompress_imported_no_trust_is_needed(family, tmp_path):
    model = cut_unevenly(make(family))
    CompressedModel(model).save_pretrained(tmp_path / "m", format="self_loading")
    reloaded = auto_class(family, "classification").from_pretrained(tmp_path / "m")
    assert torch.equal(outputs(reloaded), outputs(model))


def test_the_loader_is_python_and_names_both_classes(family, tmp_path):
    model = cut_unevenly(make(family))
    CompressedModel(model).save_pretrained(tmp_path / "m", format="self_loading")
    source = (tmp_path / "m" / "modeling_lmcompress.py").read_text()
    compile(source, "modeling_lmcompress.py", "exec")
    auto_map = json.loads((tmp_path / "m" / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": f"modeling_lmcompress.{type(model.config).__name__}",
        "AutoModel": f"modeling_lmcompress.{type(model.base_model).__name__}",
        "AutoModelForSequenceClassification": f"modeling_lmcompress.{type(model).__name__}",
    }
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith("lmcompress") for name in imported)


@pytest.mark.parametrize(
    "own",
    [narrow.narrow_stream, shaping.shape_model, plain.unpack_codes, travelling.register],
    ids=lambda f: f.__name__,
)
def test_the_loader_is_the_source_text_of_what_lmcompress_itself_runs(own, tmp_path):
    CompressedModel(make("bert")).save_pretrained(tmp_path / "m", format="self_loading")
    assert inspect.getsource(own) in (tmp_path / "m" / "modeling_lmcompress.py").read_text()


def test_the_loader_stays_with_the_checkpoint_through_a_copy(tmp_path):
    model = cut_unevenly(make("bert"))
    CompressedModel(model).save_pretrained(tmp_path / "m", format="self_loading")
    shutil.copytree(tmp_path / "m", tmp_path / "elsewhere")
    assert torch.equal(outputs(CompressedModel.from_pretrained(tmp_path / "elsewhere")), outputs(model))


@pytest.fixture
def only_the_loader(tmp_path, monkeypatch):
    """``only_the_loader(model)``: saves it, and registers the loader that travels with it in place of lmcompress."""

    def run(model):
        CompressedModel(model).save_pretrained(tmp_path / "m", format="self_loading")
        for mapping in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING):
            monkeypatch.delitem(mapping, "lmcompress", raising=False)
        source = (tmp_path / "m" / "modeling_lmcompress.py").read_text()
        loader = {"__name__": "modeling_lmcompress"}
        exec(compile(source, "modeling_lmcompress.py", "exec"), loader)
        assert AUTO_QUANTIZER_MAPPING["lmcompress"] is loader["_Quantizer"]
        return tmp_path / "m", loader

    return run


@pytest.mark.parametrize("shape", [cut_unevenly, cut_to_nothing])
def test_lmcompress_reads_what_the_loader_loaded(family, shape, only_the_loader):
    model = shape(make(family))
    folder, _ = only_the_loader(model)
    loaded = type(model).from_pretrained(folder)
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-5, atol=1e-6)
    assert CompressedModel(loaded).compression == CompressedModel.from_pretrained(folder).compression


@pytest.mark.parametrize("change", [{"heads": 3}, {"ffn": 7}, {"heads": 0}, {"ffn": 0}], ids=str)
def test_the_loader_refuses_a_config_that_does_not_fit_the_files(only_the_loader, change):
    model = cut_unevenly(make("bert"))
    folder, _ = only_the_loader(model)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["structure"]["blocks"][0] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match="mismatch"):
        type(model).from_pretrained(folder)


def test_the_loader_refuses_another_format_version(only_the_loader):
    _, loader = only_the_loader(make("bert"))
    with pytest.raises(ValueError, match="pip install lmcompress"):
        loader["_Config"](format_version=FORMAT_VERSION + 1)


@pytest.mark.parametrize(
    ("contents", "what"),
    [
        ({"encoding": {"attention": {"keys": {"bits": 8}}}}, "quantized attention"),
        ({"layers": [{"kind": "low_rank"}]}, "compact layers"),
        ({"storage": {"streams": {"x": 1}}}, "entropy-coded streams"),
    ],
    ids=str,
)
def test_the_loader_refuses_what_it_cannot_rebuild(only_the_loader, contents, what):
    _, loader = only_the_loader(make("bert"))
    with pytest.raises(ValueError, match=f"reads no {what}: pip install lmcompress and import it"):
        loader["_Config"](format_version=FORMAT_VERSION, **contents)


PACKINGS = {
    "8 bits": dict(),
    "4 bits by row": dict(bits=4, granularity=PerRow()),
    "3 bits by group": dict(bits=3, granularity=PerGroup(4)),
    "ternary": dict(quantizer="minmax", bits=2),
    "1 bit": dict(quantizer="binary", bits=1, granularity=PerRow()),
    "zero points": dict(quantizer="asymmetric_minmax", bits=4, granularity=PerRow()),
    "no embeddings": dict(embeddings=False),
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("head", ["base", "language"])
def test_the_loader_unpacks_codes_to_the_same_weights(family, head, packing, only_the_loader):
    model = make(family, head)
    if packing != "3 bits by group":
        cut_unevenly(model)
    pack_model(model, parts_of(model, **PACKINGS[packing]))
    folder, _ = only_the_loader(model)
    loaded = type(model).from_pretrained(folder)
    expected = unpacked(model)
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-5, atol=1e-5)
    if head == "language" and family.name != "electra-projected":
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert not loaded.hf_quantizer.is_trainable and loaded.half().dtype == torch.float16


def test_what_the_loader_unpacked_is_not_saved_again_without_its_codes(only_the_loader, tmp_path):
    model = make("bert")
    pack_model(model, parts_of(model))
    folder, _ = only_the_loader(model)
    with pytest.raises(ValueError, match="not serializable"):
        type(model).from_pretrained(folder).save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("head", ["base", "classification"])
def test_the_loader_unpacks_what_a_model_without_the_head_has(head, only_the_loader):
    model = make("bert", "language")
    pack_model(model, parts_of(model, more=("cls.predictions.transform.dense",)))
    folder, _ = only_the_loader(model)
    auto = transformers.AutoModel if head == "base" else transformers.AutoModelForSequenceClassification
    with torch.no_grad():
        found = auto.from_pretrained(folder).base_model(**inputs(model))[0]
        expected = model.base_model(**inputs(model))[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoding", [entry for entry in INPUTS.values() if entry is not None], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_loader_quantizes_an_input_as_the_package_does(encoding, bits):
    encoding = encoding.model_copy(update={"bits": bits})
    static = encoding.range == "static"
    scale, zero = static_range(-1.5, 2.0, encoding) if static else (None, None)
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) * 2
    x[0, 0], x[1, 2, 3] = 0.0, 40.0
    entry = encoding.model_dump(mode="json", exclude_defaults=True)
    for given in (x, x.abs(), torch.zeros(2, 8)):
        found = plain.quantized_input(given, entry, scale, zero)
        assert torch.equal(found, quantize_input(given, encoding, scale, zero).values)
    # the greatest number is padding
    with stated(torch.arange(5)[None] < torch.tensor([5, 3, 4])[:, None]):
        found = plain.quantized_input(x, entry, scale, zero)
        assert torch.equal(found, quantize_input(x, encoding, scale, zero).values)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2"])
@pytest.mark.parametrize("quantized", [name for name in INPUTS if name != "none"])
@pytest.mark.parametrize("head", ["classification", "language"])
def test_with_quantized_inputs_the_loader_computes_what_the_reference_kernel_does(name, head, quantized, tmp_path):
    model = cut_unevenly(make(name, head))
    pack_model(model, parts_of(model, inputs=quantized))
    measured = CompressedModel(model).save_pretrained(tmp_path / "m", format="self_loading")
    assert measured.relative_error <= 1e-6
    with travelling.registered_alone():
        loaded = type(model).from_pretrained(tmp_path / "m")
    with using(kernel="reference"):
        torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-6, atol=1e-6)
    # and not what dense weights do
    assert float((outputs(unpacked(model)) - outputs(loaded)).norm() / outputs(loaded).norm()) > 1e-3


def test_in_half_precision_the_loader_computes_what_the_reference_kernel_does(tmp_path):
    model = make("bert").bfloat16()
    pack_model(model, parts_of(model, inputs="dynamic"))
    CompressedModel(model).save_pretrained(tmp_path / "m", format="self_loading")
    with travelling.registered_alone():
        loaded = type(model).from_pretrained(tmp_path / "m")
    with using(kernel="reference"):
        assert loaded.dtype == torch.bfloat16 and torch.equal(outputs(loaded), outputs(model))


def test_a_loader_that_computes_otherwise_is_not_written(tmp_path, monkeypatch):
    model = make("bert", "language")
    pack_model(model, parts_of(model, inputs="static"))
    monkeypatch.setattr(plain, "quantized_input", lambda x, *_: x.float())
    with pytest.raises(EquivalenceError, match=r"reloaded from disk \(self_loading\) differs"):
        CompressedModel(model).save_pretrained(tmp_path / "m", format="self_loading")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("make_it", ["attention", "compact"])
def test_what_the_loader_cannot_rebuild_has_no_self_loading_form(make_it, tmp_path):
    model = make("bert")
    if make_it == "compact":
        low_rank(model)
    else:
        packed_with_attention(model, INPUTS["dynamic"])
    lacks = "compact layers" if make_it == "compact" else "quantized attention"
    with pytest.raises(LmcompressError, match=f"no self_loading form: .* knows no {lacks}. Save it as native"):
        CompressedModel(model).save_pretrained(tmp_path / "m", format="self_loading")
    assert not (tmp_path / "m").exists()


def test_the_loader_refuses_continuous_batching_of_uneven_heads(only_the_loader):
    folder, _ = only_the_loader(cut_unevenly(make("gpt2", "language")))
    loaded = transformers.GPT2LMHeadModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="continuous batching .* is not possible with this model"):
        loaded.generate_batch([[5, 6, 7]], generation_config=transformers.GenerationConfig(max_new_tokens=2))


_CONFIG_FIRST = """
import json
rows = json.loads(sys.argv[1])
for row in rows:
    config = transformers.AutoConfig.from_pretrained(row["folder"], trust_remote_code=True)
    # what lm-eval does with it
    given = transformers.quantizers.auto.AutoQuantizationConfig.from_dict(config.quantization_config)
    how = {"trust_remote_code": True}
    warnings.simplefilter("ignore")
    models = [
        getattr(transformers, row["auto"]).from_pretrained(row["folder"], config=config, **how),
        getattr(transformers, row["auto"]).from_pretrained(row["folder"], quantization_config=given, **how),
        transformers.pipeline(row["task"], row["folder"], tokenizer=row["tokenizer"], **how).model,
    ]
    base = transformers.AutoModel.from_pretrained(row["folder"], config=config, **how)
    with torch.no_grad():
        fed = {name: torch.tensor(value) for name, value in row["inputs"].items()}
        row["logits"] = [model.eval()(**fed).logits.tolist() for model in models]
        row["base"] = base.eval()(**fed)[0].tolist()
print(json.dumps(rows))
"""


def test_programs_that_read_the_config_first_load_it(tmp_path, without_lmcompress):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    rows, expected = [], []
    for name, auto, task in (
        ("bert", "AutoModelForSequenceClassification", "text-classification"),
        ("gpt2", "AutoModelForCausalLM", "text-generation"),
    ):
        for number, packing in enumerate((None, {"bits": 4, "granularity": PerRow()}, {"inputs": "dynamic"})):
            model = cut_unevenly(make(name, "classification" if name == "bert" else "language"))
            if packing is not None:
                pack_model(model, parts_of(model, **packing))
            folder = tmp_path / f"{name}_{number}"
            CompressedModel(model).save_pretrained(folder, format="self_loading")
            with torch.no_grad(), using(kernel="reference"):
                expected.append((outputs(model), model.base_model(**inputs(model))[0]))
            rows.append(_row(model, folder, auto) | {"task": task, "tokenizer": tokenizer})
    done = without_lmcompress(_CONFIG_FIRST, json.dumps(rows))
    assert done.returncode == 0, done.stderr[-3000:]
    for answer, (logits, base) in zip(json.loads(done.stdout.splitlines()[-1]), expected, strict=True):
        for found in answer["logits"]:
            torch.testing.assert_close(torch.tensor(found), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.tensor(answer["base"]), base, rtol=1e-5, atol=1e-5)


def test_the_loader_reads_the_first_format_version_too(only_the_loader):
    _, loader = only_the_loader(make("bert"))
    artefacts = Path(__file__).parents[1] / "artefacts" / "v1"
    for folder in artefacts.iterdir():
        expected = json.loads((folder / "expected.json").read_text())
        model = getattr(transformers, expected["class"]).from_pretrained(folder)
        assert type(model.hf_quantizer) is loader["_Quantizer"]
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor(expected["input_ids"]), attention_mask=torch.tensor(expected["attention_mask"])
            ).logits
        torch.testing.assert_close(logits.flatten(1), torch.tensor(expected["logits"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["native", "vanilla"])
def test_other_formats_carry_no_code(tmp_path, format):
    CompressedModel(make("bert")).save_pretrained(tmp_path / "m", format=format)
    assert not list((tmp_path / "m").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "m" / "config.json").read_text())


def test_gradients_pass_through_quantized_inputs_of_unpacked_weights():
    torch.manual_seed(0)
    dense, x = torch.nn.Linear(8, 3), torch.randn(2, 5, 8, requires_grad=True)
    module = plain.InputQuantized(dense, {"bits": 8, "symmetric": True, "range": "dynamic"}, {})
    answer = module(x)
    with torch.no_grad():
        assert torch.equal(answer, module(x))
    (gradient,) = torch.autograd.grad(answer.sum(), x)
    torch.testing.assert_close(gradient, dense.weight.sum(0).expand_as(x))


def test_continuous_batching_is_refused_where_blocks_have_unequal_heads(without_lmcompress, tmp_path):
    CompressedModel(cut_unevenly(make("gpt2", "language"))).save_pretrained(tmp_path / "m", format="self_loading")
    code = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.generate_batch(inputs=[[2, 3, 4]])
"""
    done = without_lmcompress(code, tmp_path / "m")
    assert "continuous batching (generate_batch) is not possible with this model" in done.stderr
    assert done.returncode != 0
