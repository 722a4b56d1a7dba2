"""Proves every family, and writes the outcomes into the package and the table of docs/families.md.

    python tools/prove_families.py             # prove all (some minutes), write
    python tools/prove_families.py llama bert  # prove these, keep the outcomes of the others
    python tools/prove_families.py --table     # only write the page again

tests/proof compares both with new proofs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from lmcompress.families import FAMILIES
from lmcompress.proof import Outcome, prove, typical_config
from lmcompress.proof.table import FILE, markdown, proven, recorded

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def main() -> None:
    """Prove, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; default: all")
    parser.add_argument("--table", action="store_true", help="only write the page")
    given = parser.parse_args()
    known = proven() if FILE.exists() else {}
    if not given.table:
        for name in given.families or FAMILIES:
            known |= _proven(name)
            ordered = {name: known[name] for name in FAMILIES if name in known}
            FILE.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        proven.cache_clear()
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{markdown()}{END}{after}", encoding="utf-8")


def _proven(name: str) -> dict[str, dict[str, object]]:
    def show(outcome: Outcome) -> None:
        if outcome.holds is False:
            print(f"{name}: {outcome.claim}: {outcome.reason}", flush=True)

    started = time.perf_counter()
    proof = prove(typical_config(name), progress=show)
    held = sum(one.holds is True for one in proof.outcomes)
    print(f"{name}: {held} of {len(proof.outcomes)} hold, {time.perf_counter() - started:.1f} s", flush=True)
    return recorded([proof])


if __name__ == "__main__":
    main()
