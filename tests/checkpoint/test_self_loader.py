"""selfloading: the loader that travels with a checkpoint works where lmcompress is not installed."""

import ast
import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, auto_class, cut_to_nothing, cut_unevenly, inputs, make, outputs
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from lmcompress import CompressedModel
from lmcompress.checkpoint import travelling
from lmcompress.checkpoint.config import FORMAT_VERSION
from lmcompress.families import narrow, shaping

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
            assert "logits" not in answer and ("mismatch" in answer["error"] or "size" in answer["error"])
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
        "AutoModel": f"modeling_lmcompress.{type(model.base_model).__name__}",
        "AutoModelForSequenceClassification": f"modeling_lmcompress.{type(model).__name__}",
    }
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith("lmcompress") for name in imported)


@pytest.mark.parametrize(
    "own", [narrow.narrow_stream, shaping.shape_model, travelling.register], ids=lambda f: f.__name__
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


def test_the_loader_refuses_packed_weights(only_the_loader):
    _, loader = only_the_loader(make("bert"))
    with pytest.raises(ValueError, match="reads no packed weights: pip install lmcompress and import it"):
        loader["_Config"](format_version=FORMAT_VERSION, encoding={"weights": []})


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
