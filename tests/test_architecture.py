"""Imports point down the list of docs/architecture.md, and none of our own hides in a function."""

import ast

import pytest
from measure_architecture import LEVEL, PACKAGE, arrows, files, own_imports, room

FILES = files()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file):
    here = room(file)
    if here == "__init__":
        return
    assert here in LEVEL, f"{here} has no place in LAYERS: give it one here and in docs/architecture.md"
    for node, name in own_imports(ast.parse(file.read_text(encoding="utf-8")), file):
        there = (name.split(".") + ["__init__"])[1]
        if there == "__init__":
            pytest.fail(f"{file.name}:{node.lineno} imports a name from the top package; import it from where it is")
        assert there == here or LEVEL[there] > LEVEL[here], (
            f"{file.name}:{node.lineno}: {here} imports {there}, which is not below it"
        )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_of_our_own_is_imported_inside_a_function(file):
    if room(file) == "cli":
        pytest.skip("a verb imports what it needs when it runs, so that --help is instant")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    ]
    hidden = {f"{file.name}:{node.lineno} {name}" for f in functions for node, name in own_imports(f, file)}
    assert hidden == set()


def test_the_list_here_is_the_list_in_the_documentation():
    documented = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = documented.split("## Layers")[1].split("```")[1]
    order = [line.split()[0].rstrip("/").removesuffix(".py") for line in block.splitlines() if line[:1].isalpha()]
    levels = [LEVEL[name] for name in order]
    assert levels == sorted(levels)


def test_no_two_rooms_import_one_another():
    # which follows from the direction, and says so where the list itself is changed
    pairs = arrows()
    assert {(here, there) for here, there in pairs if (there, here) in pairs} == set()
