"""Hooks of the documentation site: pages from outside ``docs/``, notebooks, and links that hold on GitHub and here.

The README, CONTRIBUTING, CHANGELOG and the notebooks are pages of the site where they lie in the repository. A link
from any page to a file is written as GitHub wants it, relative to the page; here it becomes a link to that file's page
of the site, or to the file on GitHub. A link to what does not exist is left as it is, and fails the strict build.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
MOUNTED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "recipes/README.md": "recipes.md",
    "benchmarks/results/obd.svg": "images/obd.svg",
}

_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
# the language of a block is its first word; mkdocs would take `no-run` for an option
_MARKED = re.compile(r"^```(\w+) no-run$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside ``docs/``."""
    for source, target in MOUNTED.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = page_of(notebook)
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=text))
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of GitHub into those of the site, outside code."""
    source = source_of(page.file.src_uri)
    parts = _FENCED.split(_MARKED.sub(r"```\1", markdown))
    return "".join(
        part if index % 2 else _LINK.sub(lambda found: link(found, source, page.file.src_uri, config), part)
        for index, part in enumerate(parts)
    )


def source_of(uri: str) -> str:
    """Where a page of the site lies in the repository."""
    for source, target in MOUNTED.items():
        if target == uri:
            return source
    if uri.startswith("notebooks/"):
        return uri.removesuffix(".md") + ".ipynb"
    return f"docs/{uri}"


def link(found: re.Match[str], source: str, uri: str, config: MkDocsConfig) -> str:
    """A link on the site.

    Args:
        found: a match of a relative link and its anchor.
        source: the file that has it, in the repository.
        uri: the page that has it, on the site.
        config: names the repository's address.
    """
    target, anchor = found[1], found[2] or ""
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if file in MOUNTED:
        on_site = MOUNTED[file]
    elif file.startswith("notebooks/") and file.endswith(".ipynb"):
        on_site = file.removesuffix(".ipynb") + ".md"
    elif file.startswith("docs/") and (ROOT / file).is_file():
        on_site = file.removeprefix("docs/")
    elif not file.startswith("..") and (ROOT / file).exists() and config.repo_url:
        return f"{config.repo_url.rstrip('/')}/blob/main/{file}{anchor}"
    else:
        return found[0]
    return os.path.relpath(on_site, posixpath.dirname(uri) or ".").replace(os.sep, "/") + anchor


def page_of(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by the names that the Markdown has for them."""
    exporter = MarkdownExporter(config=Config({"NbConvertBase": {"display_data_priority": _KINDS}}))
    names = {"output_files_dir": f"{notebook.stem}_files", "unique_key": notebook.stem}
    text, resources = exporter.from_notebook_node(nbformat.read(notebook, as_version=4), resources=names)
    return text, dict(resources.get("outputs", {}))


_KINDS = ["image/svg+xml", "image/png", "text/html", "text/markdown", "text/plain"]
