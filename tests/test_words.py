"""Phrases that the package and its documentation leave to the field's terms."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    file
    for pattern in (
        "lmcompress/**/*.py",
        "lmcompress/**/*.j2",
        "docs/**/*.md",
        "README.md",
        "recipes/**/*.yaml",
        "recipes/**/*.md",
    )
    for file in ROOT.glob(pattern)
    # generated from committed results, which name their numbers as they were measured
    if ROOT / "docs" / "benchmarks" not in file.parents
)

TERMS = {
    r"\bto the bit\b": "bit-exact",
    r"\b(is|are|was|were|been|be) gone\b": "pruned, removed",
    r"\b(come|comes|came) back\b": "reactivated, returned",
    r"\b(make|makes|making|made) (\w+ )?good\b": "compensates",
    r"\b(every|by|at|of|keep) so many\b|\bso many (rows|steps|blocks|tokens|weights|values)\b": "n, the number of",
    r"\bfrom nothing\b": "from scratch",
    r"\bbare (sentences|texts)\b": "unlabelled",
    r"\bmade ready\b": "prepared, prepacked",
    r"\bequivalence gate\b|\bthrough the gate\b": "round-trip check",
    r"\b(config|byte|symbol) can say\b": "expressible in",
    r"\bgreatest difference\b": "max abs difference of outputs",
    r"\b(rows|texts|inputs) are cut( at)?\b": "truncated, split",
    r"\bwithout losing what (they|it) know": "with little loss of accuracy",
    r"\b(learnt|Hollow)\b": "learned, ZeroWidthLinear",
    r"\b(what|who) (enters|goes into) a product\b|\bproducts of (the )?(blocks|matrices)\b": "activations, matmuls",
    r"\bzeros among\b|\bfew values for many\b": "unstructured pruning, weight clustering",
    r"\b(nobody|somebody) (else|knows|asks|sets|looks)\b": "passive or the actor's name",
    r"\bOf (weights|activations|the|its|their|learned|dynamic|static)\b[^.|\"]{0,40}: \d": "a complete phrase",
    r"description=\"Of ": "a complete phrase: 'Learning rate of …'",
    r"^\s+(LmcompressError|CheckpointError|ValueError|TypeError): (?!If |Always\b|As )": "an If clause",
}
"""Pattern, case kept, to the term that takes its place."""


@pytest.mark.parametrize(("pattern", "term"), TERMS.items(), ids=TERMS.values())
def test_the_terms_are_those_of_the_field(pattern, term):
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in FILES
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(pattern, line)
    ]
    assert not found, f"write {term!r} instead:\n" + "\n".join(found)


def test_the_files_are_found():
    assert len(FILES) > 300
