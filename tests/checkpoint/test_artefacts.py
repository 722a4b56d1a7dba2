"""Checkpoints written by earlier versions reload for ever, to the answers they had when they were written."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers

from lmcompress import CompressedModel
from lmcompress.checkpoint.config import FORMAT_VERSION
from lmcompress.checkpoint.saving import random_batches
from lmcompress.kernels.dispatch import using

HERE = Path(__file__).parents[1] / "artefacts"
ARTEFACTS = sorted(path.parent for path in HERE.glob("v*/*/expected.json"))


def _outputs(model, expected):
    # other kernels may round a number in the middle between two codes the other way
    with torch.no_grad(), using(kernel="reference"):
        answer = model.eval()(
            input_ids=torch.tensor(expected["input_ids"]), attention_mask=torch.tensor(expected["attention_mask"])
        )
    return answer.logits


def test_every_version_has_artefacts():
    assert {folder.parent.name for folder in ARTEFACTS} == {f"v{number + 1}" for number in range(FORMAT_VERSION)}


@pytest.mark.parametrize("folder", ARTEFACTS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_an_artefact_gives_the_answers_it_had(folder):
    expected = json.loads((folder / "expected.json").read_text())
    stock_class = getattr(transformers, expected["class"])
    for model in (stock_class.from_pretrained(folder), CompressedModel.from_pretrained(folder).model):
        logits = _outputs(model, expected)
        torch.testing.assert_close(logits.flatten(1), torch.tensor(expected["logits"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("folder", ARTEFACTS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_an_artefact_keeps_its_provenance_and_saves_in_the_format_of_today(folder, tmp_path):
    model = CompressedModel.from_pretrained(folder)
    assert model.provenance.base_model == "tiny-random" and model.provenance.methods == ("pruning",)
    assert len({block.heads for block in model.structure.blocks}) > 1
    measured = model.save_pretrained(tmp_path / "m", batches=random_batches(model.model, count=1))
    assert measured.relative_error < 1e-6
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["quantization_config"]["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize("folder", ARTEFACTS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_an_artefact_is_data_and_small(folder):
    files = list(folder.iterdir())
    assert {file.suffix for file in files} <= {".json", ".safetensors"}
    assert sum(file.stat().st_size for file in files) < 64_000


def test_the_script_never_overwrites_a_version(tmp_path):
    spec = importlib.util.spec_from_file_location("make_artefacts", HERE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "v1").mkdir()
    with pytest.raises(SystemExit, match="is there already; artefacts of a version are written once"):
        module.write(tmp_path / "v1")
    assert list((tmp_path / "v1").iterdir()) == []
