"""Recipes that name parts of a user's own code: found, refused with their line, trained anew once edited."""

from __future__ import annotations

import sys

import pytest
from rich.console import Console
from tiny_recipe import RECIPE, head

from lmcompress.distillation import LogitLoss
from lmcompress.distillation.losses.distributions import kl_divergence
from lmcompress.errors import LmcompressError
from lmcompress.recipes import dump_recipe, parse_recipe, recipe_schema, run
from lmcompress.recipes.schema import Stage

CODE = """\
from lmcompress.distillation.losses.distributions import kl_divergence
from lmcompress.distillation import LogitLoss
from lmcompress.pruning import Criterion

spread = Criterion("spread", "weights", ("heads", "neurons"), lambda group: group.std(dim=1))
half = LogitLoss("half", lambda student, teacher, **options: kl_divergence(student, teacher, **options) / 2)
number = 3
"""

own_loss = LogitLoss("own", kl_divergence)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of a user, in the folder that the command is run from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_parts.py").write_text(CODE)
    yield tmp_path / "my_parts.py"
    sys.modules.pop("my_parts", None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("losses: [hidden_mse,", "losses: [nowhere:x,", r"line 21: .*losses\.0: match 'nowhere:x': cannot import"),
        ("loss: attention_mse", "loss: nowhere:x", r"line 21: .*distillation\.losses\.1\.loss: match 'nowhere:x'"),
        ("layer_map:", "loss: nowhere:x\n      layer_map:", r"line 20: .*distillation\.loss: logit loss 'nowhere:x'"),
        (
            "{layers: 2}",
            "{layers: 2}\n    pruning:\n      target: {sparsity: 0.5}\n      criterion: nowhere:x",
            r"line 20: stages\.student\.pruning\.criterion: criterion 'nowhere:x': cannot import 'nowhere' \(ModuleNot",
        ),
        ("{layers: 2}", "{layers: 2}\n    quantization: {weights: {quantizer: nowhere:x}}", "line 18: .*quantizer 'no"),
        ("losses: [hidden_mse,", "losses: [my_parts:sprad,", r"line 21: .*has no 'sprad'; did you mean 'spread'"),
        ("losses: [hidden_mse,", "losses: [my_parts:number,", r"line 21: .*must be a .*MatchLoss, got int"),
    ],
)  # fmt: skip
def test_a_part_that_is_not_there_is_one_message_with_its_line(own_module, old, new, message):
    assert old in RECIPE
    with pytest.raises(LmcompressError, match=message) as caught:
        parse_recipe(RECIPE.replace(old, new, 1))
    assert "problems" not in str(caught.value)


def _recipe(task_folder):
    training = "{max_steps: 2, per_device_train_batch_size: 8}"
    return parse_recipe(
        f"""{head(layers=1)}  - {{name: dense, training: {training}}}
  - name: pruned
    start: dense
    pruning: {{target: {{sparsity: 0.4}}, criterion: my_parts:spread}}
    distillation: {{teachers: [dense], loss: my_parts:half}}
    training: {training}
evaluation: {{repeats: 3, latency_batches: []}}
""".replace("DATA", str(task_folder))
    )


def test_a_stage_with_parts_of_ones_own_is_kept_until_their_code_changes(own_module, task_folder, console):
    folder = own_module.parent / "run"
    result = run(_recipe(task_folder), folder, console=Console(quiet=True))
    assert result.report["rows"][1]["pruning"]["removed"] >= 0.39
    run(_recipe(task_folder), folder, console=console)
    assert console.file.getvalue().count("already finished, kept") == 2
    own_module.write_text(CODE.replace("/ 2", "/ 3"))
    # as in a new process
    del sys.modules["my_parts"]
    with pytest.raises(LmcompressError, match=r"pruned was made from something else \(code\.my_parts: \w{16} then"):
        run(_recipe(task_folder), folder, console=Console(quiet=True))


def test_an_object_is_written_by_its_name():
    stage = Stage(name="a", distillation={"teachers": ["b"], "loss": own_loss})
    assert stage.model_dump(mode="json")["distillation"]["loss"] == f"{__name__}:own_loss"
    unnamed = Stage(name="a", distillation={"teachers": ["b"], "loss": LogitLoss("own", kl_divergence)})
    with pytest.raises(Exception, match="has no name to save"):
        unnamed.model_dump(mode="json")


def test_recipes_with_parts_of_ones_own_are_written_and_have_a_schema(own_module, task_folder):
    recipe = _recipe(task_folder)
    assert parse_recipe(dump_recipe(recipe)) == recipe
    named = recipe_schema()["$defs"]["StagePruning"]["properties"]["criterion"]["anyOf"]
    assert "fisher" in named[0]["enum"] and ":" in named[1]["pattern"]
