"""``lmcompress frontier``."""

from __future__ import annotations

import pytest

from lmcompress import cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frontier", "m", "--task", "t", "--sparsity", "0.5", "--sparsity", "0.5"], "none twice"),
        (["frontier", "m", "--task", "t", "--sparsity", "0.5", "--latency-share", "0.5"], "not both"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_code_2(arguments, message, capsys):
    assert cli.run_app(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def test_a_frontier_is_a_run_with_a_recipe_of_its_own(trained, tmp_path, capsys):
    model, task = trained
    options = ["--sparsity", "0.3", "--sparsity", "0.6", "--steps", "2", "-o", str(tmp_path / "f")]
    assert cli.run_app(["frontier", model, *task, *options]) == 0
    shown = capsys.readouterr().out
    assert "sparsity-0.3" in shown and "sparsity-0.6" in shown and "of dense" in shown
    assert (tmp_path / "f" / "plots" / "quality_and_size.svg").is_file()
    assert cli.run_app(["run", str(tmp_path / "f" / "recipe.yaml"), "--dry-run"]) == 0
