"""The model card of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def model_card(report: Mapping[str, Any]) -> str:
    """A model card in Markdown, with the Hub's metadata block.

    Args:
        report: contents of ``lmcompress.json``: ``model`` and ``equivalence`` always; ``table`` (rows of
            measurements), ``task``, ``recipe``, ``machine``, ``notes`` after a run.

    Returns:
        The card's text.
    """
    # imported here: loading and serving a model do not need them
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lmcompress.checkpoint", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    base = report["model"]["provenance"]["base_model"]
    # a local folder is not a model on the Hub
    on_hub = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", base) and not Path(base).exists()
    data = ModelCardData(
        library_name="transformers", tags=["lmcompress", "model-compression"], base_model=base if on_hub else None
    )
    known: dict[str, Any] = {"table": [], "task": None, "recipe": None, "machine": None, "notes": []}
    return environment.get_template("card.md.j2").render(
        known | dict(report), metadata=data.to_yaml(), base_model=base if on_hub else None
    )
