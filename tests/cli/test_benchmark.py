"""``lmcompress benchmark``."""

from __future__ import annotations

import json

import pytest
from packing import packed

from lmcompress import cli
from lmcompress.model import CompressedModel


def test_benchmark_does_not_call_a_model_faster_than_itself(finished, capsys):
    student, control = (str(finished / "out" / name) for name in ("student", "student-control"))
    assert cli.run_app(["benchmark", student, "--against", control, "--batch", "1", "--repeats", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == [control, f"{control}, again", student]
    assert rows[0]["verdict"] == "baseline" and rows[1]["verdict"].endswith("of itself")
    assert cli.run_app(["benchmark", student, "--against", student]) == 2
    assert "cannot be compared with itself" in capsys.readouterr().err


def test_a_missing_folder_is_named(capsys):
    assert cli.run_app(["benchmark", "/nowhere"]) == 2
    assert "no such folder: /nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_packed_weights_count_as_the_parameters_they_stand_for(family, make_model, tmp_path, capsys):
    model = make_model(family)
    # tied tensors count once
    dense = model.num_parameters()
    CompressedModel(packed(model)).save_pretrained(tmp_path / "m")
    assert cli.run_app(["benchmark", str(tmp_path / "m"), "--batch", "1", "--repeats", "3", "--length", "8"]) == 0
    assert f"m: {dense:,} parameters" in capsys.readouterr().out.replace("\n", "")
    assert cli.run_app(["inspect", str(tmp_path / "m"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == dense


def test_generation_needs_positions_for_its_tokens(make_model, tmp_path, capsys):
    CompressedModel(make_model("gpt2", "language", n_positions=32)).save_pretrained(tmp_path / "m")
    assert cli.run_app(["benchmark", str(tmp_path / "m"), "--generate"]) == 2
    said = capsys.readouterr().err
    assert "--generate needs more than 32 positions, the models have 32" in said
