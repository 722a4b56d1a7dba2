"""Matplotlib figures as SVG with the colours of the page, so that one drawing serves light, dark and print."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# colour in a figure -> the CSS variable that replaces it, and its value outside of a page
_SLOTS = {
    "#010101": ("ink", "#17191c"),
    "#020202": ("muted", "#5a5f67"),
    "#030303": ("line", "#dedbd3"),
    "#040404": ("card", "#ffffff"),
    "#060606": ("teacher", "#3d434b"),
    "#070707": ("student", "#0067b1"),
    "#080808": ("control", "#c24e00"),
    "#090909": ("pruned", "#00795a"),
    "#0a0a0a": ("quantized", "#a83e86"),
    "#0b0b0b": ("t-label", "#17191c"),
    "#0c0c0c": ("t-kd", "#0067b1"),
    "#0d0d0d": ("t-hidden", "#00795a"),
    "#0e0e0e": ("t-other", "#a83e86"),
}
COLOURS = {name: slot for slot, (name, _) in _SLOTS.items()}
"""Name of a CSS variable of the page to the colour it replaces in a figure."""

# one point of matplotlib is one px of the page
_DPI = 72
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.5,
    "text.parse_math": False,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "axes.linewidth": 1,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.8,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
}


class Drawing:
    """A figure with a size in px of the page, whose coordinates for text and lines are px from the lower left.

    Args:
        size: width and height.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.width, self.height = size
        self.figure = Figure(figsize=(self.width / _DPI, self.height / _DPI), dpi=_DPI)

    def text(self, x: float, y: float, words: str, *, colour: str = "muted", size: float = 11, **style: Any) -> None:
        """Write on the figure.

        Args:
            x: px from the left.
            y: px from the bottom.
            words: text, not interpreted as mathematics.
            colour: a key of :data:`COLOURS`.
            size: font size in px.
            **style: arguments of matplotlib's text: ``ha``, ``va``, ``fontweight``.
        """
        where = (x / self.width, y / self.height)
        self.figure.text(*where, words, color=COLOURS[colour], fontsize=size, **{"va": "center"} | style)

    def line(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draw a thin line.

        Args:
            start: px.
            end: px.
        """
        xs, ys = ([a / whole, b / whole] for a, b, whole in zip(start, end, (self.width, self.height), strict=True))
        self.figure.add_artist(Line2D(xs, ys, color=COLOURS["muted"], linewidth=0.8, zorder=1))

    def svg(self, title: str) -> str:
        """The figure as an element of the page; its text stays text.

        Args:
            title: text for screen readers, and identifier of the figure.

        Returns:
            One ``<svg>``.
        """
        out = io.StringIO()
        FigureCanvasSVG(self.figure).print_svg(out, metadata={"Date": None, "Creator": None})
        text = out.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
        # no box behind the figure: the page is the background
        text = re.sub(r'<g id="patch_1">.*?</g>', "", text, count=1, flags=re.S)
        # the font of the page; matplotlib writes the shorthand or its parts, depending on its version
        text = re.sub(r'font: (?:(bold|\d+) )?([\d.]+)px [^;"]*', _font, text)
        text = re.sub(r'font-family: [^;"]*;? ?', "", text)
        # a style sheet in a figure applies to the whole page
        text = text.replace(">*{stroke", ">.plot *{stroke")
        for slot, (name, _) in _SLOTS.items():
            text = text.replace(slot, f"var(--{name})")
        # unused names are the same in every figure of the page
        used = set(re.findall(r'(?:"#|url\(#)([^")]+)', text))
        text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
        head = (
            f'<svg class="plot" viewBox="0 0 {self.width} {self.height}" style="max-width:{self.width}px" role="img" '
            'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
            f"<title>{escape(title)}</title>"
        )
        text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
        return re.sub(r"\n\s*", "\n", re.sub(r"(\d+\.\d{2})\d+", r"\1", text))


@contextmanager
def style(salt: str) -> Iterator[None]:
    """Within the block, the style of figures.

    Args:
        salt: salt of the identifiers in the SVG, which must differ between the figures of a page.
    """
    with rc_context({**_STYLE, "svg.hashsalt": salt}):
        yield


def standalone(svg: str) -> str:
    """A figure of the page as a separate file, in the colours of the light page on white.

    Args:
        svg: from :meth:`Drawing.svg`.

    Returns:
        The text of an SVG file.
    """
    for name, value in _SLOTS.values():
        svg = svg.replace(f"var(--{name})", value)
    style_of_text = "font-family:sans-serif;background:#fff;"
    return svg.replace('style="', f'style="{style_of_text}', 1)


def _font(found: re.Match[str]) -> str:
    bold = ";font-weight:650" if found[1] in ("bold", "700") else ""
    return f"font-size:{found[2]}px{bold}"
