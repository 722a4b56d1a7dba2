"""The documentation site builds strictly, without a network, from the pages as GitHub shows them."""

import importlib.util
import re

import pytest
from doc_pages import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")


def _tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return _tool("mkdocs_hooks")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built: any warning, such as a link that leads nowhere, ends the build."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.chdir(ROOT)
        config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_every_page_is_there_and_found_by_search(site):
    index = (site / "search" / "search_index.json").read_text("utf-8")
    for page in ("start", "which_method", "glossary", "contributing", "changes", "benchmarks/pruning", "api/pruning"):
        assert (site / page / "index.html").is_file()
        assert f'"location":"{page}/"' in index
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert (site / "notebooks" / notebook.stem / "index.html").is_file()


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_fetched_from_elsewhere(site):
    fetched = (
        r"""<(?:script|img|iframe)[^>]*\ssrc=["']?https?:|<link[^>]*rel=["']?(?:stylesheet|preconnect)[^>]*https?:"""
    )
    assert [page for page in site.rglob("*.html") if re.search(fetched, page.read_text("utf-8"))] == []


@pytest.mark.filterwarnings("ignore")
def test_the_reference_has_the_public_names(site):
    import lmcompress.pruning

    page = (site / "api" / "pruning" / "index.html").read_text("utf-8")
    documented = [name for name in lmcompress.pruning.__all__ if f'id="lmcompress.pruning.{name}"' in page]
    assert len(documented) >= 0.9 * len(lmcompress.pruning.__all__)
    assert ":class:`" not in page


@pytest.mark.filterwarnings("ignore")
def test_the_reference_has_the_fields_of_configurations(site):
    page = (site / "api" / "distillation" / "index.html").read_text("utf-8")
    assert 'id="lmcompress.distillation.DistillationConfig.temperature"' in page


def test_fields_have_their_type_and_description():
    field_of = _tool("docstrings").field_of
    assert field_of("Annotated[int | None, Field(ge=1, description='Of rows.')]") == ("int | None", "Of rows.")
    assert field_of("Annotated[float, Field(gt=0)] | None") is None
    assert field_of("dict[str, int]") is None


@pytest.mark.parametrize(
    ("source", "uri", "link", "expected"),
    [
        ("README.md", "index.md", "docs/guides/data.md", "guides/data.md"),
        ("README.md", "index.md", "CHANGELOG.md", "changes.md"),
        ("docs/guides/data.md", "guides/data.md", "../start.md", "../start.md"),
        ("docs/guides/data.md", "guides/data.md", "../../notebooks/which_heads.ipynb", "../notebooks/which_heads.md"),
        ("docs/papers.md", "papers.md", "../benchmarks/seeds", "https://example.org/blob/main/benchmarks/seeds"),
        ("docs/papers.md", "papers.md", "nowhere.md", "nowhere.md"),
    ],
)
def test_links_of_github_become_links_of_the_site(hooks, source, uri, link, expected):
    from mkdocs.config.defaults import MkDocsConfig

    config = MkDocsConfig()
    config.repo_url = "https://example.org/"
    found = hooks._LINK.search(f"[a]({link}#b)")
    assert hooks.link(found, source, uri, config) == f"{expected}#b"


def test_pages_lie_where_the_hooks_say(hooks):
    for uri in ("index.md", "contributing.md", "guides/data.md", "notebooks/which_heads.md"):
        assert (ROOT / hooks.source_of(uri)).is_file()


def test_roles_formulas_tables_and_examples_become_markdown():
    markdown = _tool("docstrings").markdown
    text = "See :class:`~lmcompress.pruning.Units` and :math:`x^2`.\n\n.. math:: a + b\n\nExample:\n    >>> 1\n"
    assert markdown(text) == "See `Units` and `x^2`.\n\n~~~tex\na + b\n~~~\n\nExamples:\n    >>> 1\n"
    table = "a\n\n==== ====\nb    c\n==== ====\n1    2\n==== ====\n\nd"
    assert markdown(table).startswith("a\n\n~~~text\n==== ====\nb    c\n") and markdown(table).endswith("~~~\n\n\n\nd")
