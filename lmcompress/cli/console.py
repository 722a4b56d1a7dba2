"""Output that the verbs share: tables as wide as the terminal, notes, and how to load a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console


def output_console() -> Console:
    """The console for results: as wide as the terminal, or 120 columns in a log or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def error_console() -> Console:
    """The console for errors."""
    return Console(stderr=True)


def print_notes(console: Console, notes: Iterable[str]) -> None:
    """The notes that a reader of the numbers needs, one per line."""
    for note in notes:
        console.print(f"note: {note}", highlight=False)


def print_how_to_load(console: Console, report: Mapping[str, Any]) -> None:
    """The two lines of Python that load the last model of a report."""
    from lmcompress.data.tasks import auto_class_name

    made = [row for row in report["rows"] if row["role"] not in ("teacher", "control", "model")]
    last = (made or report["rows"])[-1]
    head = auto_class_name(report["kind"])
    needed = "" if last["format"] in ("vanilla", "self_loading") else "import lmcompress; "
    trust = ", trust_remote_code=True" if last["format"] == "self_loading" else ""
    console.print(
        f"load it:\n  {needed}from transformers import {head}\n"
        f"  model = {head}.from_pretrained({str(last['folder'])!r}{trust})",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
