"""Links lead somewhere, and papers name what exists."""

import pydoc
import re

import pytest
from doc_pages import FENCE, PAGES, ROOT, name_of

from lmcompress.recipes import builtin_recipes


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_to_files_lead_somewhere(page):
    text = FENCE.sub("", page.read_text("utf-8"))
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


def test_papers_name_modules_and_functions_that_exist():
    text = (ROOT / "docs" / "papers.md").read_text("utf-8")
    named = set(re.findall(r"`(lmcompress(?:\.\w+)+)`", text))
    assert len(named) > 20
    assert [name for name in sorted(named) if pydoc.locate(name) is None] == []


def test_papers_name_every_built_in_recipe():
    text = (ROOT / "docs" / "papers.md").read_text("utf-8")
    assert [name for name in builtin_recipes() if f"`{name}`" not in text] == []
