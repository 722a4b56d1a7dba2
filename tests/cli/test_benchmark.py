"""``lmcompress benchmark``."""

from __future__ import annotations

import json

from lmcompress import cli


def test_benchmark_does_not_call_a_model_faster_than_itself(finished, capsys):
    student, control = (str(finished / "out" / name) for name in ("student", "student-control"))
    assert cli.run_app(["benchmark", student, "--against", control, "--batch", "1", "--repeats", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == [control, student] and rows[0]["verdict"] == "baseline"
    assert cli.run_app(["benchmark", student, "--against", student]) == 2
    assert "cannot be compared with itself" in capsys.readouterr().err


def test_a_missing_folder_is_named(capsys):
    assert cli.run_app(["benchmark", "/nowhere"]) == 2
    assert "no such folder: /nowhere" in capsys.readouterr().err
