"""The table of families and capabilities as the proofs gave it: committed, and compared with new proofs in tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lmcompress.proof.claims import CLAIMS, capabilities
from lmcompress.proof.prove import Proof

FILE = Path(__file__).with_name("families.json")
"""The committed outcomes; ``tools/prove_families.py`` writes them."""


@dataclass(frozen=True)
class Cell:
    """One capability of one family.

    Attributes:
        holds: whether all claims of the capability hold; None where none of them is about anything the models have.
        reasons: the reasons of those that do not, each once.
    """

    holds: bool | None
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return {True: "yes", False: "no", None: "–"}[self.holds]


def cells(claims: Mapping[str, Mapping[str, Any]]) -> dict[str, Cell]:
    """The cells of one family's row.

    Args:
        claims: ``{"holds": …, "reason": …}`` by claim, as in :meth:`~lmcompress.proof.prove.Proof.as_dict`.

    Returns:
        A cell by capability, in the order of the columns.
    """
    row = {}
    for capability, names in capabilities().items():
        found = [claims[name] for name in names if name in claims and claims[name]["holds"] is not None]
        reasons = dict.fromkeys(one["reason"] for one in found if not one["holds"])
        row[capability] = Cell(not reasons if found else None, tuple(reasons))
    return row


@cache
def proven() -> dict[str, dict[str, Any]]:
    """The committed outcomes by model type: ``architecture``, and ``claims`` by name."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def recorded(proofs: Iterable[Proof]) -> dict[str, dict[str, Any]]:
    """Proofs in the form of the committed file: without measured numbers, which differ between machines.

    Args:
        proofs: the proofs of several families.
    """
    rows = {}
    for proof in proofs:
        said = proof.as_dict()
        claims = {
            name: {"holds": one["holds"], "reason": "" if one["holds"] else one["reason"]}
            for name, one in said["claims"].items()
        }
        rows[proof.model_type] = {"architecture": said["architecture"], "claims": claims}
    return rows


def markdown() -> str:
    """The committed outcomes as a Markdown table with a note for each capability that a family lacks."""
    columns = list(capabilities())
    lines = ["| family | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    notes: dict[str, int] = {}
    for model_type, row in proven().items():
        marks = []
        for cell in cells(row["claims"]).values():
            numbers = [notes.setdefault(f"{model_type}: {reason}", len(notes) + 1) for reason in cell.reasons]
            marks.append(str(cell) + "".join(f" ({number})" for number in numbers))
        lines.append(f"| `{model_type}` | " + " | ".join(marks) + " |")
    lines += ["", *(f"{number}. {note}" for note, number in notes.items())]
    says = [
        f"- **{name}**: " + "; ".join(CLAIMS[claim].says for claim in names) for name, names in capabilities().items()
    ]
    return "\n".join([*lines, "", "What each column claims:", "", *says]).strip() + "\n"
