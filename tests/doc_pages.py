"""The pages that the tests of the docs read, their code, and results as benchmarks write them."""

import json
import re
from pathlib import Path

import lmcompress

ROOT = Path(lmcompress.__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """Code of a page in one language; ``no-run`` after the language marks what needs the Hub, a GPU or hours."""
    found = [(info.split(), code) for info, code in FENCE.findall(page.read_text("utf-8"))]
    return [code for words, code in found if words[:1] == [language] and "no-run" not in words]


def with_language(language):
    """The pages that have code of the language."""
    return [page for page in PAGES if blocks(page, language)]


def name_of(page):
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def write_results(folder, name, rows, asked=(), **more):
    """Results as benchmarks write them."""
    machine = dict(processor="P", cores=2, gpu=None, torch="2", transformers="5")
    about = dict(benchmark=name, command="python x", date="d", commit="c", machine=machine)
    (folder / f"{name}.json").write_text(json.dumps(about | dict(rows=rows, asked=list(asked)) | more))
