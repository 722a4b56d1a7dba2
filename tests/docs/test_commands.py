"""Every command line of lmcompress on any page is one that it takes, and CI's words are the README's."""

import re
import shlex

import pytest
import typer
from doc_pages import PAGES, ROOT, blocks, name_of

from lmcompress.cli import app
from lmcompress.recipes import builtin_recipes


def _commands():
    """Every command line of lmcompress on any page, and the page."""
    for page in PAGES:
        for code in blocks(page, "bash"):
            for line in code.replace("\\\n", " ").splitlines():
                for part in line.partition("  #")[0].split("&&"):
                    if part.split()[:1] == ["lmcompress"]:
                        yield pytest.param(part.partition(">")[0].strip(), id=f"{name_of(page)}: {part.strip()}")


@pytest.mark.parametrize("command", list(_commands()))
def test_a_command_line_is_one_that_lmcompress_takes(command):
    group, arguments, context = typer.main.get_command(app), shlex.split(command)[1:], None
    while hasattr(group, "resolve_command"):
        context = group.make_context(group.name, list(arguments), parent=context, resilient_parsing=False)
        _, group, arguments = group.resolve_command(context, [*context._protected_args, *context.args])
        assert group is not None
    # parses, and calls nothing
    group.make_context(group.name, list(arguments), parent=context)
    if group.name in ("run", "show") and "." not in arguments[0]:
        assert arguments[0] in builtin_recipes()


def test_ci_installs_and_tests_in_the_words_of_the_readme():
    (command,) = [code.strip() for code in blocks(ROOT / "README.md", "bash") if '".[test]"' in code]
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    install, test = command.split(" && ")
    assert f"\n{install}\n" in script and f"\n{test} | tee" in script


def test_constraints_pin_everything_that_pyproject_names():
    tomllib = pytest.importorskip("tomllib")  # in Python from 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = ("test", "emd", "ner", "docs", "clients", "onnx", "openvino", "compressed-tensors", "gguf")
    wanted = [
        *project["dependencies"],
        *(named for extra in extras for named in project["optional-dependencies"][extra]),
    ]
    names = {re.split(r"[<>=!~ \[]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    # extras name each other
    assert names - pinned == {"lmcompress"}
