"""``lmcompress recipes``."""

from __future__ import annotations

import json

import pytest

from lmcompress import cli
from lmcompress.recipes import builtin_recipes


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_recipes_are_listed_and_shown_as_they_are(name, capsys):
    assert cli.run_app(["recipes", "show", name]) == 0
    assert capsys.readouterr().out == builtin_recipes()[name]


def test_the_schema_is_json(capsys):
    assert cli.run_app(["recipes", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"


def test_an_unknown_recipe_is_answered_with_the_nearest(capsys):
    assert cli.run_app(["recipes", "show", "minilm"]) == 2
    assert "did you mean 'minilmv2'" in capsys.readouterr().err
