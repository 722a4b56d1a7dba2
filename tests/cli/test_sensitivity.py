"""``lmcompress sensitivity``."""

from __future__ import annotations

import json

from lmcompress import cli


def test_sensitivity_prints_a_table_and_writes_curves(trained, tmp_path, capsys):
    model, task = trained
    options = ["--share", "0.5", "--share", "1", "-o", str(tmp_path / "s")]
    assert cli.run_app(["sensitivity", model, *task, *options]) == 0
    assert "100% pruned" in capsys.readouterr().out
    found = json.loads((tmp_path / "s" / "sensitivity.json").read_text())
    assert len(found["rows"]) == 1 + 2 * 4 * 2 and len(found["scores"]["heads"]) == 4
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        "sensitivity.json",
        "sensitivity.png",
        "importance.png",
    }
    assert cli.run_app(["sensitivity", model, *task, "--split", "test"]) == 2
    assert "no split 'test'" in capsys.readouterr().err
