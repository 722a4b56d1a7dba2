"""Writes the table of clients into docs/clients.md, from what the tests in tests/clients declare and check.

python tools/clients.py            # writes it
python tools/clients.py --check    # fails if the page has another
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- table -->\n", "<!-- /table -->\n"


def table() -> str:
    """The table in Markdown: a row for each client, a column for each form, and the reasons of refusals below."""
    for folder in ("tests", "tests/clients"):
        if str(ROOT / folder) not in sys.path:
            sys.path.insert(0, str(ROOT / folder))
    for module in sorted((ROOT / "tests" / "clients").glob("test_*.py")):
        importlib.import_module(module.stem)
    forms = importlib.import_module("client_forms").FORMS
    rows = importlib.import_module("client_table").TABLE
    reasons: list[str] = []
    lines = [f"| client | {' | '.join(forms.values())} |", f"|---|{'---|' * len(forms)}"]
    for client, cells in rows.items():
        told = []
        for form in forms:
            refusal = cells[form]
            if refusal is not None and refusal.reason not in reasons:
                reasons.append(refusal.reason)
            told.append("works" if refusal is None else f"refused ({reasons.index(refusal.reason) + 1})")
        lines.append(f"| {client} | {' | '.join(told)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""])


def page() -> str:
    """The page with the table that the tests declare."""
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write the page, or check it."""
    wanted = page()
    if "--check" not in arguments:
        PAGE.write_text(wanted, "utf-8")
    elif wanted != PAGE.read_text("utf-8"):
        print("docs/clients.md has another table than tests/clients; run python tools/clients.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
