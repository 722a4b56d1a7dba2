"""compressed-tensors: exports that Transformers loads where lmcompress is not installed."""

import json

import pytest
import torch
from packing import INPUTS, pack_model, packed_with_attention, parts_of

from lmcompress import LmcompressError
from lmcompress.checkpoint.cutting import keep_layers
from lmcompress.checkpoint.encoding import unpacked
from lmcompress.checkpoint.saving import outputs_of, random_batches
from lmcompress.checkpoint.schema import ActivationEncoding
from lmcompress.export import export_model
from lmcompress.export.compressed_tensors import export_compressed_tensors
from lmcompress.numerics.grids import PerGroup, PerRow, PerTensor

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("compressed_tensors")

_BY_TOKEN = ActivationEncoding(bits=8, granularity="token", symmetric=False)
_STATIC = ActivationEncoding(bits=8, symmetric=False, range="static")
_LEARNED = ActivationEncoding(bits=8, range="static", full=True)

_LOAD = """
import json
folder, name, answers = sys.argv[1:]
model = getattr(transformers, name).from_pretrained(folder).eval()
batches = torch.load(answers)
torch.save([model(**batch).logits.detach() for batch in batches], answers)
"""


@pytest.fixture(autouse=True)
def more_inputs(monkeypatch):
    """Activations that the format has."""
    for name, encoding in (("by token", _BY_TOKEN), ("static 8", _STATIC), ("learned", _LEARNED)):
        monkeypatch.setitem(INPUTS, name, encoding)


def loaded_elsewhere(without_lmcompress, model, folder, tmp_path):
    batches = random_batches(model)
    torch.save([dict(batch) for batch in batches], tmp_path / "answers.pt")
    result = without_lmcompress(_LOAD, folder, type(model).__name__, tmp_path / "answers.pt")
    assert result.returncode == 0, result.stderr
    return torch.load(tmp_path / "answers.pt"), outputs_of(model, batches)


CASES = [
    ("minmax", 8, PerRow(), "none"),
    ("minmax", 4, PerGroup(8), "none"),
    ("asymmetric_minmax", 8, PerRow(), "none"),
    ("minmax", 3, PerTensor(), "none"),
    ("twn", "ternary", PerRow(), "none"),
    ("minmax", 8, PerRow(), "by token"),
    ("asymmetric_minmax", 8, PerRow(), "static 8"),
    ("minmax", 8, PerRow(), "learned"),
    ("minmax", 4, PerRow(), "static asymmetric"),
]


@pytest.mark.parametrize(
    ("kind", "quantizer", "bits", "granularity", "inputs"),
    [("bert", *case) for case in CASES]
    + [(kind, *case) for kind in ("roberta", "distilbert", "electra-projected") for case in (CASES[1], CASES[6])],
    ids=str,
)
def test_transformers_loads_it_with_equal_outputs(kind, quantizer, bits, granularity, inputs, make_model, tmp_path):
    model = make_model(kind).eval()
    pack_model(model, parts_of(model, quantizer, bits, granularity=granularity, inputs=inputs))
    report = export_compressed_tensors(model, tmp_path / "out")
    # the very same float32 operations; scales by token are rounded otherwise, which may take a number to the next code
    assert report.equivalence.relative_error <= {"by token": 1e-2}.get(inputs, 0)
    assert report.matrices == 18


@pytest.mark.parametrize("inputs", ["none", "static 8"])
def test_it_loads_where_lmcompress_is_not_installed(inputs, make_model, without_lmcompress, tmp_path):
    model = make_model("bert").eval()
    keep_layers(model, [0, 2])
    pack_model(model, parts_of(model, "minmax", 8, granularity=PerRow(), inputs=inputs, more=("pooler.dense",)))
    report = export_compressed_tensors(model, tmp_path / "out")
    found, expected = loaded_elsewhere(without_lmcompress, model, tmp_path / "out", tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["classifier"]
    assert config["num_hidden_layers"] == 2 and "lmcompress" not in json.dumps(config)
    assert report.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_several_encodings_are_named_by_module(make_model, without_lmcompress, tmp_path):
    model = make_model("bert").eval()
    parts = parts_of(model, "minmax", 8, granularity=PerRow())
    narrow = parts_of(model, "minmax", 4, granularity=PerGroup(8))
    parts |= {path: part for path, part in narrow.items() if "intermediate" in path}
    pack_model(model, parts)
    export_compressed_tensors(model, tmp_path / "out")
    found, expected = loaded_elsewhere(without_lmcompress, model, tmp_path / "out", tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_weights_alone_of_a_model_whose_activations_it_cannot_express(make_model, tmp_path):
    model = packed_with_attention(make_model("bert").eval(), INPUTS["dynamic"])
    report = export_model(model, tmp_path / "out", to="compressed-tensors", activations="none")
    batches = random_batches(model)
    again = type(model).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(outputs_of(again, batches), outputs_of(unpacked(model), batches), rtol=0, atol=0)
    assert "Activations are not quantized." in report.notes
    assert any("stored as dense float32" in note for note in report.notes)


def test_ranges_by_token_of_a_pooler_are_refused(make_model, tmp_path):
    model = make_model("bert").eval()
    pack_model(model, parts_of(model, inputs="by token", granularity=PerRow(), more=("pooler.dense",)))
    with pytest.raises(LmcompressError, match=r"the input of pooler\.dense is quantized: its dynamic ranges by token"):
        export_compressed_tensors(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packed_zero_points_load_or_are_explained(make_model, tmp_path):
    import compressed_tensors

    model = make_model("bert").eval()
    pack_model(model, parts_of(model, "asymmetric_minmax", 4, granularity=PerGroup(8)))
    if tuple(map(int, compressed_tensors.__version__.split(".")[:2])) < (0, 18):
        assert export_compressed_tensors(model, tmp_path / "out").equivalence.max_error == 0
    else:
        with pytest.raises(LmcompressError, match="cannot load packed zero points"):
            export_compressed_tensors(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_tied_head_is_dense(make_model, tmp_path):
    model = make_model("bert", "language").eval()
    pack_model(model, parts_of(model, granularity=PerRow()))
    report = export_compressed_tensors(model, tmp_path / "out")
    assert report.equivalence.max_error == 0 and any("the head is tied to it" in note for note in report.notes)
