"""Pictures of a page in headless Chromium, wide and narrow, light and dark, and what is wrong with it there.

    python tools/screenshots.py runs/quickstart/report.html docs/images --widths 1200 390 --themes light dark

Chromium's own window is at least 500 px wide, so the page is looked at in a frame of the width that is asked for. What
the frame finds (errors, pictures that do not load, what lies beyond the edge) it tells the page around it.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.image import imread, imsave

CHROMIUM = "chromium"
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=4000"
).split()
_LEAST_WINDOW = 500
_MOST_HEIGHT = 16_000

# first in the page, so that it hears every error; asked for by the page around it once all has loaded
_PROBE = """<script>
(function () {
  var errors = [], seen = console.error;
  console.error = function () { errors.push([].join.call(arguments, " ")); seen.apply(console, arguments); };
  addEventListener("error", function (e) {
    errors.push(e.message || "cannot load " + (e.target.src || e.target.href));
  }, true);
  addEventListener("unhandledrejection", function (e) { errors.push(String(e.reason)); });
  addEventListener("load", function () {
    UNFOLD
    var root = document.documentElement, width = root.clientWidth, beyond = [];
    document.querySelectorAll("body *").forEach(function (e) {
      var box = e.getBoundingClientRect();
      if (box.width && box.right > width + 1 && !e.closest("pre, svg")) beyond.push(e.tagName + "." + e.className);
    });
    parent.postMessage(JSON.stringify({
      errors: errors, beyond: beyond, width: width, scroll_width: root.scrollWidth, height: root.scrollHeight,
      plots: document.querySelectorAll("svg.plot").length,
      empty: [].filter.call(document.querySelectorAll("svg.plot"), function (e) {
        return e.checkVisibility() && e.getBoundingClientRect().height < 50;
      }).length + [].filter.call(document.images, function (e) { return !e.naturalWidth; }).length,
      requests: performance.getEntriesByType("resource").map(function (e) { return e.name; })
    }), "*");
  });
})();
</script>"""
_FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<pre id="found" style="display:none"></pre>
<script>addEventListener("message", function (e) { document.getElementById("found").textContent = e.data; });</script>
<iframe src="page.html" style="border:0;display:block;width:WIDTHpx;height:HEIGHTpx"></iframe>"""


@dataclass(frozen=True)
class Look:
    """What Chromium shows of a page.

    Attributes:
        width: of the page, px.
        scroll_width: of what is in it; greater where something lies beyond its edge.
        height: of the whole page.
        beyond: elements that lie beyond the right edge.
        errors: of the console, and of what cannot be loaded.
        plots: number of figures.
        empty: figures and pictures that show nothing.
        requests: addresses that the page has asked for.
    """

    width: int
    scroll_width: int
    height: int
    beyond: list[str]
    errors: list[str]
    plots: int
    empty: int
    requests: list[str]


def look_at(
    page: Path, width: int, *, theme: str = "light", picture: Path | None = None, unfold: bool = False, scale: int = 1
) -> Look:
    """Open a page in headless Chromium.

    Args:
        page: file of HTML.
        width: of the frame, px.
        theme: light or dark.
        picture: PNG of the whole page that is written, if any.
        unfold: whether folds are opened.
        scale: px of the picture per px of the page.

    Returns:
        What was found.

    Raises:
        RuntimeError: If Chromium does not show the page.
    """
    opened = 'document.querySelectorAll("details").forEach(function (d) { d.open = true; });' if unfold else ""
    text = page.read_text("utf-8").replace("<head>", "<head>" + _PROBE.replace("UNFOLD", opened), 1)
    text = text.replace("<html ", f'<html data-theme="{theme}" ', 1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.html").write_text(text, "utf-8")
        frame = Path(folder) / "frame.html"
        frame.write_text(_frame(width, 900), "utf-8")
        dumped = _chromium(folder, width, 900, ["--dump-dom", frame.as_uri()])
        found = re.search(r'<pre id="found"[^>]*>(.*?)</pre>', dumped, flags=re.S)
        if found is None or not found[1]:
            raise RuntimeError(f"chromium did not show {page}")
        look = Look(**json.loads(html.unescape(found[1])))
        if picture is not None:
            height = min(look.height, _MOST_HEIGHT)
            frame.write_text(_frame(width, height), "utf-8")
            taken = Path(folder) / "taken.png"
            options = [f"--screenshot={taken}", f"--force-device-scale-factor={scale}", frame.as_uri()]
            _chromium(folder, width, height, options)
            picture.parent.mkdir(parents=True, exist_ok=True)
            imsave(picture, imread(taken)[: height * scale, : width * scale])
    return look


def main(arguments: Sequence[str] | None = None) -> None:
    """Write pictures of a page, and say what is wrong with it.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="report.html, or the folder of a run")
    parser.add_argument("output", type=Path, help="folder of the pictures")
    parser.add_argument("--widths", type=int, nargs="+", default=[1200, 390])
    parser.add_argument("--themes", nargs="+", choices=["light", "dark"], default=["light", "dark"])
    parser.add_argument("--scale", type=int, default=1, help="px of a picture per px of the page")
    parser.add_argument("--unfold", action="store_true", help="open what is folded")
    chosen = parser.parse_args(arguments)
    page = chosen.page / "report.html" if chosen.page.is_dir() else chosen.page
    for width in chosen.widths:
        for theme in chosen.themes:
            file = chosen.output / f"{page.stem}_{theme}_{width}.png"
            look = look_at(page, width, theme=theme, picture=file, unfold=chosen.unfold, scale=chosen.scale)
            wrong = [*look.errors, *look.requests, *(["too wide"] if look.scroll_width > look.width else [])]
            print(
                f"{file}: {look.width} x {look.height}"
                + (f"; {'; '.join([*wrong, *look.beyond[:5]])}" if wrong else "")
            )


def _frame(width: int, height: int) -> str:
    return _FRAME.replace("WIDTH", str(width)).replace("HEIGHT", str(height))


def _chromium(folder: str, width: int, height: int, options: Sequence[str]) -> str:
    window = f"--window-size={max(width, _LEAST_WINDOW)},{height}"
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder}/profile", window, *options]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


if __name__ == "__main__":
    main()
