"""``lmcompress compare``."""

from __future__ import annotations

import json
import shutil

import pytest

from lmcompress import cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "there is nothing to compare one with: name at least two runs"),
        (["one", "nowhere"], "no such folder: nowhere"),
        (["empty", "one"], "empty is no run: it has no results.json"),
        (["one", "two", "--name", "a"], "--name must be given once for each of the 2 runs, got 1"),
    ],
)
def test_what_is_wrong_is_one_message(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({}))
    assert cli.run_app(["compare", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_runs_are_put_side_by_side(finished, tmp_path, capsys):
    run, page = finished / "out", tmp_path / "compare.html"
    again = shutil.copytree(run, tmp_path / "again")
    assert cli.run_app(["compare", str(run), str(again), "--name", "first", "--name", "second", "-o", str(page)]) == 0
    assert f"written: {page}" in capsys.readouterr().out.replace("\n", "")
    text = page.read_text("utf-8")
    assert "first" in text and "second" in text and "student-control" in text
