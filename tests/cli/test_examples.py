"""The examples of the help run as they stand; what trains is planned only."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil

import pytest
from test_application import COMMANDS

from lmcompress import cli


def _examples():
    for command in COMMANDS.values():
        for line in command.help.partition("Examples:")[2].splitlines():
            if line.strip().startswith("lmcompress "):
                yield line.strip()


EXAMPLES = list(_examples())
TRAINS = ("run", "quickstart", "frontier")


def _arguments(line):
    return shlex.split(line.partition(" > ")[0].partition(" | ")[0])[1:]


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_runs(line, workplace, tmp_path, monkeypatch, capsys):
    arguments = _arguments(line)
    if arguments[0] not in ("run", "quickstart"):
        shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "compare":
        if importlib.util.find_spec("lmcompress.reporting.compare") is None:
            pytest.skip("there is no comparison of runs yet")
        _write_runs(tmp_path, monkeypatch)
    if arguments[0] == "push":
        monkeypatch.setattr("lmcompress.checkpoint.pushing.push_folder", lambda *_, **__: "https://hub/commit")
    if arguments[0] in TRAINS and "--dry-run" not in arguments:
        arguments.append("--dry-run")
    assert cli.run_app(arguments) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


def _write_runs(folder, monkeypatch):
    for name in ("quickstart", "second"):
        (folder / "runs" / name).mkdir(parents=True, exist_ok=True)
        (folder / "runs" / name / "results.json").write_text(json.dumps({}))
    monkeypatch.setattr("lmcompress.reporting.compare.compare_runs", lambda folders, output, names: output)
