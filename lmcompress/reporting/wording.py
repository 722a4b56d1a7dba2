"""Numbers in words: names of metrics, formats of scores and differences."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmcompress.reporting.evidence import Interval
from lmcompress.reporting.tables import metric_title

Report = Mapping[str, Any]

_PER_CENT = ("accuracy", "f1", "f1_macro", "f1_micro")


@dataclass(frozen=True)
class Metric:
    """The main metric of a report, and the format of its numbers.

    Attributes:
        name: name in the report.
        title: name for display.
        lower_is_better: true for perplexity and squared errors.
    """

    name: str
    title: str
    lower_is_better: bool

    @classmethod
    def of(cls, report: Report) -> Metric:
        """The metric of a report.

        Args:
            report: report of a run.
        """
        name = str(report["metric"])
        title = metric_title(report) if name.endswith("perplexity") else name.replace("_", " ")
        return cls(name, title, bool(report["lower_is_better"]))

    @property
    def scale(self) -> float:
        """The factor of scores for display: 100, except for perplexity and squared errors."""
        return 1.0 if self.lower_is_better else 100.0

    @property
    def axis(self) -> str:
        """The label of an axis of scores."""
        if self.lower_is_better:
            return f"{self.title} (lower is better)"
        return f"{self.title}, %" if self.name in _PER_CENT else f"{self.title} × 100"

    @property
    def unit(self) -> str:
        """The unit of a difference: points, or per cent of the reference if lower is better."""
        return "%" if self.lower_is_better else "points"

    @property
    def less(self) -> str:
        """The title of a column of differences, without the name of the reference."""
        return "rise over" if self.lower_is_better else "minus"

    def text(self, value: float) -> str:
        """A score.

        Args:
            value: score in the report.

        Example:
            >>> Metric("accuracy", "accuracy", False).text(0.87466), Metric("token_perplexity", "p", True).text(34.218)
            ('87.5 %', '34.22')
        """
        if self.lower_is_better:
            return f"{value:,.2f}" if value < 100 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
        return f"{100 * value:.1f}".replace("-", "−") + (" %" if self.name in _PER_CENT else "")

    def interval(self, found: Interval | None) -> str:
        """The ends of a score's interval, or nothing.

        Args:
            found: interval of a score.
        """
        return "" if found is None else f"{self.text(found.low).removesuffix(' %')} – {self.text(found.high)}"

    def gain(self, change: float) -> float:
        """A difference with its sign set so that positive is better.

        Args:
            change: score minus reference, or increase over it.
        """
        return -change if self.lower_is_better else change


def signed(fraction: float, digits: int = 1) -> str:
    """A difference, times 100, with its sign; 0 has none.

    Args:
        fraction: 0.01 is a point, or a per cent.
        digits: digits after the point.

    Example:
        >>> signed(0.0123), signed(-0.004), signed(0.0)
        ('+1.2', '−0.4', '0.0')
    """
    text = f"{100 * fraction:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", "−")


def change_text(change: Interval) -> str:
    """A difference and the ends of its interval.

    Args:
        change: differences as fractions.

    Example:
        >>> change_text(Interval(-0.001, -0.009, 0.007))
        '−0.1 (−0.9 to +0.7)'
    """
    ends = "" if change.low == change.high else f" ({signed(change.low)} to {signed(change.high)})"
    return signed(change.value) + ends


def megabytes(size: float) -> str:
    """A size.

    Args:
        size: bytes.

    Example:
        >>> megabytes(17_322_387), megabytes(267_000_000)
        ('17.32 MB', '267.0 MB')
    """
    return f"{size / 1e6:.2f} MB" if size < 1e8 else f"{size / 1e6:,.1f} MB"


def count(number: float) -> str:
    """A number of parameters.

    Args:
        number: any number.

    Example:
        >>> count(4_304_790), count(12_300)
        ('4.30 M', '12.3 k')
    """
    return (
        f"{number / 1e9:.2f} B"
        if number >= 1e9
        else f"{number / 1e6:.2f} M"
        if number >= 1e5
        else f"{number / 1e3:.1f} k"
    )


def times(ratio: float) -> str:
    """A ratio as a multiple.

    Args:
        ratio: positive.

    Example:
        >>> times(2.94), times(14.07)
        ('2.9×', '14×')
    """
    return f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:.0f}×"


def milliseconds(value: float) -> str:
    """A latency.

    Args:
        value: ms.

    Example:
        >>> milliseconds(1.0249), milliseconds(379.3)
        ('1.02 ms', '379 ms')
    """
    return f"{value:.2f} ms" if value < 100 else f"{value:,.0f} ms"


def rows_text(batch: int) -> str:
    """A batch size.

    Args:
        batch: rows.
    """
    return f"{batch} row" if batch == 1 else f"{batch} rows"


def tied(page: str) -> str:
    """The page with non-breaking spaces between numbers and units.

    Args:
        page: HTML; style sheets, scripts, drawings and preformatted text are unchanged.

    Example:
        >>> tied("<p>3 MB</p><pre>3 MB</pre>")
        '<p>3\\xa0MB</p><pre>3 MB</pre>'
    """
    parts = re.split(r"(<(?:style|script|pre|svg)\b.*?</(?:style|script|pre|svg)>|<[^>]+>)", page, flags=re.S)
    unit = r"(?<=[\d×]) (?=%|MB|GiB|ms\b|M\b|k\b|B\b|points?\b|bits?\b)"
    return "".join(part if index % 2 else re.sub(unit, "\u00a0", part) for index, part in enumerate(parts))
