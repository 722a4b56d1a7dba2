"""The model card that goes with every checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def model_card(report: Mapping[str, Any]) -> str:
    """A model card in Markdown, with the metadata block that the Hub reads.

    Args:
        report: as written to ``lmcompress.json``: ``model`` and ``equivalence`` always; ``table`` (rows of
            measurements), ``task``, ``recipe``, ``machine``, ``notes`` where there was a run.

    Returns:
        The card's text.
    """
    # imported here: a model is loaded and served without them
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lmcompress.checkpoint", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    base = report["model"]["provenance"]["base_model"]
    # a folder on somebody's machine is no model of the Hub
    on_hub = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", base) and not Path(base).exists()
    data = ModelCardData(
        library_name="transformers", tags=["lmcompress", "model-compression"], base_model=base if on_hub else None
    )
    known: dict[str, Any] = {"table": [], "task": None, "recipe": None, "machine": None, "notes": []}
    return environment.get_template("card.md.j2").render(
        known | dict(report), metadata=data.to_yaml(), base_model=base if on_hub else None
    )
