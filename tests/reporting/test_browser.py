"""Pages in headless Chromium, at the width of a desktop and of a phone."""

from __future__ import annotations

import shutil

import pytest
from reports import full_report, language_model, plain_report, with_predictions
from screenshots import CHROMIUM, look_at

from lmcompress.reporting import compare_runs, write_report

pytestmark = pytest.mark.browser

STATES = {
    "full": full_report,
    "earlier": plain_report,
    "perplexity": language_model,
    "chance": lambda: with_predictions(plain_report(), {"teacher": (198, 0), "student": (216, 7)}),
}


@pytest.fixture(scope="module", autouse=True)
def _chromium():
    assert shutil.which(CHROMIUM), "these tests need chromium"


def _crowded():
    """Long names, many heads, many blocks."""
    report = full_report()
    pruning = report["rows"][3]["pruning"]
    pruning["before"] = {"blocks": [{"heads": 16, "ffn": 4096}] * 12}
    pruning["after"] = {"blocks": [{"heads": 8, "ffn": 2048}] * 12}
    pruning["kept_heads"] = [list(range(8))] * 12
    report["rows"][1]["name"] = "a-student-with-a-name-that-is-far-too-long-for-any-phone"
    return report


STATES["crowded"] = _crowded


@pytest.mark.parametrize("width", [1200, 768, 390])
@pytest.mark.parametrize("state", STATES)
def test_a_page_fits_and_shows_its_figures(state, width, tmp_path):
    write_report(STATES[state](), tmp_path)
    _is_fine(tmp_path / "report.html", width)


@pytest.mark.parametrize("width", [1200, 390])
def test_a_comparison_fits(width, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        report = full_report()
        report["rows"][1]["parameters"] += len(name)
        write_report(report, tmp_path / name)
    page = compare_runs([tmp_path / "one", tmp_path / "other"], tmp_path / "compare.html")
    _is_fine(page, width)


def test_a_page_that_is_broken_is_found(tmp_path):
    page = tmp_path / "broken.html"
    script = "<script>console.error('first'); missing()</script>"
    page.write_text(f'<html ><head></head><body><p style="width:900px">x</p><img src="no.png">{script}</body></html>')
    look = look_at(page, 390)
    assert look.scroll_width > 390 and look.beyond == ["P."] and look.empty == 1
    assert any("first" in error for error in look.errors) and any("missing" in error for error in look.errors)


def _is_fine(page, width):
    look = look_at(page, width, unfold=True)
    assert (look.errors, look.beyond, look.requests, look.empty) == ([], [], [], 0)
    assert look.width == width and look.scroll_width <= width
    assert look.plots == page.read_text().count('<svg class="plot"')
