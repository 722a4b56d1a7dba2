"""Measures the contract's matrix and writes its page: ``python tools/contract.py`` (``--check``: is the page made?)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE, PAGE = ROOT / "tests" / "contract" / "matrix.json", ROOT / "docs" / "contract.md"
INTRODUCTION = """\
# What is trained is what is saved

Every method by every way out of a trainer, measured by `tests/contract/test_matrix.py` on tiny models of BERT and
GPT-2; each cell is the max abs difference of the logits (`evaluate`: of the loss), relative to the max abs logit.
This page is written by `python tools/contract.py`.

- **save_model**: `trainer.train(); trainer.save_model(path)`, reloaded by plain `AutoModelFor….from_pretrained(path)`,
  beside the model in memory.
- **push_to_hub**: `trainer.push_to_hub()` over HTTP, loaded by the repository's name.
- **best model**: `load_best_model_at_end`, beside a second run that stops at that checkpoint and finishes what it has.
  Only checkpoints that are as small as asked compete: an earlier one is better, and not what is wanted.
- **resume**: `train(resume_from_checkpoint=…)` in the middle, beside the undisturbed run.
- **evaluate**: `trainer.evaluate()` after `train()`, beside the loss of the reloaded model, computed by hand.

"""


def page(table: dict[str, dict[str, str]]) -> str:
    """The page, as Markdown.

    Args:
        table: value by row and column.
    """
    columns = list(next(iter(table.values())))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(cells[column] for column in columns)} |" for row, cells in table.items()]
    return INTRODUCTION + "\n".join(lines) + "\n"


def measure() -> dict[str, dict[str, str]]:
    """Run the tests, and collect what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "tests/contract/test_matrix.py"]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"LMCOMPRESS_CONTRACT": folder}, check=True)
        cells = sorted(Path(folder).glob("*.json"), key=lambda file: [int(n) for n in file.stem.split("-")])
        table: dict[str, dict[str, str]] = {}
        for file in cells:
            cell = json.loads(file.read_text("utf-8"))
            table.setdefault(cell["row"], {})[cell["column"]] = cell["value"]
    return table


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(int(PAGE.read_text("utf-8") != page(json.loads(TABLE.read_text("utf-8")))))
    found = measure()
    TABLE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")
