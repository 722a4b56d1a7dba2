"""Imports point down the list of docs/architecture.md, and none of our own hides in a function."""

import ast
from pathlib import Path

import pytest

import lmcompress

PACKAGE = Path(lmcompress.__file__).parent

# from the top to the bottom; those in one row do not import one another
LAYERS = [
    ["__main__"],
    ["cli"],
    ["recipes"],
    ["reporting"],
    ["trainers"],
    ["distillation", "pruning", "quantization", "clustering"],
    ["students"],
    ["method"],
    ["evaluation"],
    ["activations"],
    ["model"],
    ["checkpoint"],
    ["families"],
    ["nn"],
    ["kernels"],
    ["numerics"],
    ["entropy_coding"],
    ["data"],
    ["schedules"],
    ["registry"],
    ["errors"],
]
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}
FILES = sorted(PACKAGE.rglob("*.py"))


def _layer(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _own_imports(tree: ast.AST, file: Path) -> list[tuple[ast.AST, str]]:
    """Every import of this package below ``tree``, as the node and the dotted name within the package."""
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["lmcompress", *file.relative_to(PACKAGE).parts[: -node.level or None]]
                base = ".".join([*package, *filter(None, [base])])
            # "from lmcompress import model" imports a module, "from lmcompress import CompressedModel" a name
            names = [alias.name for alias in node.names if alias.name in LEVEL]
            found += [(node, f"{base}.{name}") for name in names] if base == "lmcompress" and names else [(node, base)]
    return [(node, name) for node, name in found if name.split(".")[0] == "lmcompress"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file):
    here = _layer(file)
    if here == "__init__":
        return
    assert here in LEVEL, f"{here} has no place in LAYERS: give it one here and in docs/architecture.md"
    for node, name in _own_imports(ast.parse(file.read_text(encoding="utf-8")), file):
        there = (name.split(".") + ["__init__"])[1]
        if there == "__init__":
            pytest.fail(f"{file.name}:{node.lineno} imports a name from the top package; import it from where it is")
        assert there == here or LEVEL[there] > LEVEL[here], (
            f"{file.name}:{node.lineno}: {here} imports {there}, which is not below it"
        )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_of_our_own_is_imported_inside_a_function(file):
    if _layer(file) == "cli":
        pytest.skip("a verb imports what it needs when it runs, so that --help is instant")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    ]
    hidden = {f"{file.name}:{node.lineno} {name}" for f in functions for node, name in _own_imports(f, file)}
    assert hidden == set()


def test_the_list_here_is_the_list_in_the_documentation():
    documented = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = documented.split("## Layers")[1].split("```")[1]
    order = [line.split()[0].rstrip("/").removesuffix(".py") for line in block.splitlines() if line[:1].isalpha()]
    levels = [LEVEL[name] for name in order]
    assert levels == sorted(levels)
