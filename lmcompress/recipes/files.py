"""Files of a run, written atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a text file; concurrent readers see the old one.

    Args:
        path: path of the file.
        text: its contents.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """The same for JSON.

    Args:
        path: path of the file.
        value: JSON types; others are written as text.
    """
    write_text(path, json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n")
