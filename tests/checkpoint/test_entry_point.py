"""entry: where lmcompress is installed, programs that import torch load its checkpoints; elsewhere none is built."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import torch
import transformers
from compacting import everything
from families import auto_class, cut_to_nothing, cut_unevenly, inputs, make, outputs
from packing import parts_of
from transformers.quantizers import HfQuantizer

from lmcompress import CompressedModel, LmcompressError, model_from_config
from lmcompress.checkpoint.encoding import pack_model
from lmcompress.checkpoint.guard import NATIVE
from lmcompress.checkpoint.structure import structure_of

accelerate = pytest.importorskip("accelerate")
ROOT = Path(__file__).parents[2]


def packed(model):
    pack_model(model, parts_of(model, inputs="dynamic"))
    return model


def stored(model):
    """Marks a model whose tensors are to be streams."""
    model.streams = "zstd"
    return cut_unevenly(model)


SHAPES = {"cut": cut_unevenly, "nothing": cut_to_nothing, "packed": packed, "compact": everything, "streams": stored}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(shape, name)``: a language model, and the folder it was saved to."""
    made = {}

    def save(shape, name="bert"):
        if (shape, name) not in made:
            model = SHAPES[shape](make(name, "language"))
            folder = tmp_path_factory.mktemp(f"{name}_{shape}") / "m"
            CompressedModel(model).save_pretrained(folder, storage=getattr(model, "streams", "plain"))
            made[shape, name] = model, folder
        return made[shape, name]

    return save


@pytest.fixture
def installed(tmp_path):
    """``installed(code, *arguments)``: runs code where this package is installed with the entry points it declares."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    # a name of its own, so that an installed lmcompress does not count
    folder = tmp_path / "site" / "as_declared-1.0.dist-info"
    folder.mkdir(parents=True)
    lines = [
        line
        for group, points in declared.items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in points.items()))
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: as-declared\nVersion: 1.0\n")

    def run(code, *arguments, **environment):
        paths = os.pathsep.join((str(tmp_path / "site"), str(ROOT)))
        given = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=given, cwd=tmp_path, timeout=200)

    return run


_CLIENT = """
import json, sys
import torch, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
answers = []
for auto, folder, inputs in json.loads(sys.argv[1]):
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    with torch.no_grad():
        answers.append(model(**{name: torch.tensor(value) for name, value in inputs.items()}).logits.tolist())
print(json.dumps(answers))
"""


def test_a_program_without_a_line_of_lmcompress_loads_every_format(saved, installed):
    wanted, expected = [], []
    for shape in SHAPES:
        for name, auto in (("bert", "AutoModelForMaskedLM"), ("gpt2", "AutoModelForCausalLM")):
            model, folder = saved(shape, name)
            given = {key: value.tolist() for key, value in inputs(model).items()}
            wanted.append((auto, str(folder), given))
            expected.append(outputs(model))
    done = installed(_CLIENT, json.dumps(wanted))
    assert done.returncode == 0, done.stderr[-3000:]
    for found, logits in zip(json.loads(done.stdout.splitlines()[-1]), expected, strict=True):
        torch.testing.assert_close(torch.tensor(found), logits, rtol=1e-5, atol=1e-5)


def test_importing_torch_imports_little_of_lmcompress_and_can_be_told_not_to(installed):
    code = "import sys, torch; print(sorted(name for name in sys.modules if name.split('.')[0] == 'lmcompress'))"
    assert installed(code).stdout.strip() == "['lmcompress', 'lmcompress.errors']"
    assert "transformers" not in installed(code.replace("lmcompress", "transformers")).stdout
    assert installed(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout.strip() == "[]"


_PLAIN = """
import json
answers = []
ignored = {"ignore_mismatched_sizes": True}
for auto, folder in json.loads(sys.argv[1]):
    for how in ({}, ignored, ignored | {"attn_implementation": "eager"}):
        try:
            model = getattr(transformers, auto).from_pretrained(folder, **how)
            answers.append(f"{type(model).__name__} of {model.num_parameters()} parameters")
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
    config = transformers.AutoConfig.from_pretrained(folder)
    try:
        answers.append(str(type(getattr(transformers, auto).from_config(config))))
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


def test_without_lmcompress_no_format_is_built_whatever_is_ignored(saved, without_lmcompress):
    folders = {name: [str(saved(shape, name)[1]) for shape in SHAPES] for name in ("bert", "gpt2")}
    wanted = [("AutoModel", folder) for folder in (*folders["bert"], *folders["gpt2"])]
    wanted += [("AutoModelForMaskedLM", folder) for folder in folders["bert"]]
    done = without_lmcompress(_PLAIN, json.dumps(wanted))
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len(answers) == 4 * len(wanted)
    assert all(answer.startswith("ValueError") and NATIVE in answer for answer in answers), answers


def test_what_transformers_saves_of_a_cut_model_is_not_built_either(without_lmcompress, tmp_path):
    model = cut_unevenly(make("bert", "language"))
    model.save_pretrained(tmp_path / "memory")
    type(model).from_pretrained(tmp_path / "memory").save_pretrained(tmp_path / "loaded")
    wanted = [("AutoModelForMaskedLM", str(tmp_path / name)) for name in ("memory", "loaded")]
    done = without_lmcompress(_PLAIN, json.dumps(wanted))
    answers = json.loads(done.stdout.splitlines()[-1])
    assert all(NATIVE in answer for answer in answers) and len(answers) == 8


@pytest.mark.parametrize("shape", ["cut", "packed"])
def test_a_stock_checkpoint_again_has_no_word(shape, tmp_path):
    model = SHAPES[shape](make("bert"))
    CompressedModel(model).save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["experts_implementation"] == NATIVE
    if shape == "packed":
        loaded = type(model).from_pretrained(tmp_path / "m").dequantize()
        CompressedModel(loaded).save_pretrained(tmp_path / "vanilla", format="vanilla")
        loaded.save_pretrained(tmp_path / "plain")
        for name in ("vanilla", "plain"):
            assert "experts_implementation" not in json.loads((tmp_path / name / "config.json").read_text())


@pytest.mark.parametrize(
    "how", [{"output_attentions": True, "attn_implementation": "eager"}, {"dtype": "bfloat16"}], ids=str
)
def test_the_word_leaves_what_a_load_may_ask_for(saved, how):
    model, folder = saved("cut")
    loaded = type(model).from_pretrained(folder, **how)
    assert loaded.config._experts_implementation != NATIVE
    assert structure_of(loaded) == structure_of(model)


# A model from its config


@pytest.mark.parametrize("shape", ["cut", "nothing"])
def test_a_model_from_a_config_has_its_shapes_and_its_save_loads(family, shape, tmp_path):
    model = SHAPES[shape](make(family))
    CompressedModel(model).save_pretrained(tmp_path / "m")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    written = config.to_json_string()
    if hasattr(HfQuantizer, "update_attn_implementation"):
        # earlier versions have no hook to tell a load from this, and the word is let through once lmcompress has loaded
        with pytest.raises(ValueError, match="import lmcompress`, then use from_pretrained"):
            auto_class(family, "classification").from_config(config)
    fresh = model_from_config(config)
    assert type(fresh) is type(model) and config.to_json_string() == written
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    # as a new model of the family: norms at 1, biases at 0, matrices by the config's deviation
    ends = {name.rsplit(".", 1)[-1] for name, p in fresh.named_parameters() if not bool(p.any())}
    assert ends == {"bias"} and torch.isfinite(outputs(fresh)).all()
    matrices = torch.cat([p.flatten() for name, p in fresh.named_parameters() if p.dim() > 1])
    assert float(matrices.std().detach()) == pytest.approx(config.initializer_range, rel=0.2)
    fresh.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "again")), outputs(fresh))
    base = model_from_config(config, transformers.AutoModel)
    assert type(base) is type(model.base_model) and structure_of(base) == structure_of(model)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("shape", ["cut", "nothing", "packed"])
def test_accelerate_fills_an_empty_model(saved, shape, name):
    model, folder = saved(shape, name)
    config = transformers.AutoConfig.from_pretrained(folder)
    with accelerate.init_empty_weights():
        empty = model_from_config(config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.tie_weights()
    filled = accelerate.load_checkpoint_and_dispatch(empty, str(folder), device_map={"": "cpu"})
    assert torch.equal(outputs(filled), outputs(model)) and filled.num_parameters() == model.num_parameters()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("packed", "a packed model has no initial values: build it on meta"),
        ("compact", "blocks that share parameters need from_pretrained"),
        ("streams", "tensors that are streams need from_pretrained"),
    ],
)
def test_a_model_that_a_config_alone_cannot_give_is_refused(saved, shape, message):
    config = transformers.AutoConfig.from_pretrained(saved(shape)[1])
    with pytest.raises(LmcompressError, match=message):
        model_from_config(config)


def test_a_stock_config_gives_a_stock_model():
    model = model_from_config(make("bert").config)
    assert type(model).__name__ == "BertModel" and "quantization_config" not in vars(model.config)


@pytest.mark.parametrize(
    "first",
    ["transformers.quantizers", "transformers.quantizers.auto", "transformers.modeling_utils", "torch", "lmcompress"],
)
def test_whatever_is_imported_first_the_format_is_known(saved, installed, first):
    """Transformers' tables of quantizers import torch while they are made, and torch what is installed."""
    _, folder = saved("cut")
    code = (
        f"import importlib, sys; importlib.import_module({first!r})\n"
        "from transformers import AutoModelForMaskedLM as Auto\n"
        "Auto.from_pretrained(sys.argv[1])\n"
        "import lmcompress\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\n"
        "assert 'lmcompress' in table\n"
        "assert not any(type(finder).__name__ == '_RegisterWithTransformers' for finder in sys.meta_path)\n"
    )
    done = installed(code, folder)
    assert done.returncode == 0, done.stderr[-3000:]
