"""Fixtures of the table of clients: the forms of a model, and a process without lmcompress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import client_drivers
import pytest
from client_forms import Form, make_form
from client_table import Elsewhere


@pytest.fixture(scope="session")
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Form:
    """The form that the test is for."""
    return make_form(request.param, tmp_path_factory.mktemp(request.param.replace(" ", "-")))


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """``elsewhere(driver, args, options)``: runs a driver in a process that cannot import lmcompress."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules")}
    environment.pop("PYTHONPATH", None)
    program = [sys.executable, client_drivers.__file__]
    errors = folder / "stderr.txt"
    with errors.open("w") as log:
        process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=folder
        )
    assert process.stdin is not None and process.stdout is not None

    def ask(driver: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        process.stdin.write(json.dumps({"driver": driver, "args": args, "options": options}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, errors.read_text()
        answer = json.loads(line)
        if "error" in answer:
            raise Elsewhere(answer["error"])
        return answer["value"]

    yield ask
    process.stdin.close()
    process.stdout.close()
    process.wait(30)


@pytest.fixture
def run(form: Form, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    """``run(driver, *args)``: what a client gives that loads the form, where such clients run."""

    def call(driver: str, *args: Any) -> Any:
        if form.elsewhere:
            return request.getfixturevalue("elsewhere")(driver, args, form.options)
        return in_memory(driver, *args)

    return call


def in_memory(driver: str, *args: Any) -> Any:
    """What a driver gives in this process."""
    return json.loads(json.dumps(getattr(client_drivers, driver)(*args)))
