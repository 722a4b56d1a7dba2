"""The examples with parts of one's own run offline, and both ways come to the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [("custom_criterion", {"roots", "l1", "random"}), ("custom_loss", {"correlation", "kl", "labels alone"})],
)
def test_an_example_runs_offline_and_its_two_ways_agree(name, rows, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--steps", "20", "--output", str(tmp_path / "run")]
    # from a folder without the script: a recipe must find its module all the same
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    table = dict(re.findall(r"│ (.+?) +│ ([0-9.]+) +│", done.stdout))
    assert rows <= {title.partition(", ")[0].rpartition(":")[2] for title in table}, done.stdout
    in_recipe, as_object = (
        next(v for k, v in table.items() if k.endswith(way)) for way in ("in a recipe", "an object")
    )
    assert abs(float(in_recipe) - float(as_object)) <= 0.02


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("custom_*.py")), ids=lambda file: file.stem)
def test_an_example_is_a_page(file):
    assert len(file.read_text("utf-8").splitlines()) <= 120
