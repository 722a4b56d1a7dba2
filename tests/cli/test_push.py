"""``lmcompress push``: what is refused before the Hub is asked; ``tests/contract/test_hub.py`` pushes."""

from __future__ import annotations

import shutil

import pytest

from lmcompress import cli


@pytest.fixture
def model(finished, tmp_path):
    """A model of a run, to be damaged."""
    return shutil.copytree(finished / "out" / "student", tmp_path / "student")


def _refused(arguments, capsys):
    assert cli.run_app(["push", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "fault of lmcompress" not in said
    return said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "me/it"], "holds no checkpoint"),
        # names come before everything else
        (["/nowhere", "it"], "must be user/name"),
        (["/nowhere", "a/b/c"], "must be user/name"),
        (["/nowhere", "me/"], "'me/' is no name on the Hub"),
        (["/nowhere", "bad name/x y"], "'bad name/x y' is no name on the Hub"),
        (["/nowhere", "me/.."], "'me/..' is no name on the Hub"),
        (["/nowhere", "me/-x"], "'me/-x' is no name on the Hub"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_code_2(arguments, message, capsys):
    assert message in _refused(arguments, capsys)


def test_the_folder_of_a_run_is_refused_and_its_models_are_named(finished, capsys):
    said = _refused([finished / "out", "me/it"], capsys)
    assert "holds no model" in said and str(finished / "out" / "student") in said


def test_damaged_weights_are_refused(model, capsys):
    (model / "model.safetensors").write_bytes(b"cut off")
    assert "is damaged" in _refused([model, "me/it"], capsys)


def test_weights_as_a_pickle_are_refused(model, capsys):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "no weights in safetensors" in _refused([model, "me/it"], capsys)


def test_offline_is_one_message(model, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the Hub cannot be reached: HF_HUB_OFFLINE=1 is set" in _refused([model, "me/it"], capsys)
