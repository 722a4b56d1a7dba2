"""A task of 24 rows and a recipe of seconds."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from tiny_recipe import RECIPE, write_task


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="session")
def tiny(task_folder) -> str:
    """The text of a recipe of seconds."""
    return RECIPE.replace("DATA", str(task_folder))


@pytest.fixture
def console() -> Console:
    """One whose text can be read: ``console.file.getvalue()``."""
    return Console(file=io.StringIO(), width=200)
