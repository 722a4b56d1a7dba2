"""The self-loading format: a small loader stored with the checkpoint, for users who trust it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from lmcompress.checkpoint import travelling
from lmcompress.checkpoint.config import FORMAT_VERSION
from lmcompress.checkpoint.structure import HEAD_ATTRIBUTES, PATHS
from lmcompress.families import narrow, shaping

LOADER_FILE = "modeling_lmcompress.py"

_AUTO_CLASSES = {
    "SequenceClassification": "AutoModelForSequenceClassification",
    "TokenClassification": "AutoModelForTokenClassification",
    "QuestionAnswering": "AutoModelForQuestionAnswering",
    "MultipleChoice": "AutoModelForMultipleChoice",
    "MaskedLM": "AutoModelForMaskedLM",
    "LMHeadModel": "AutoModelForCausalLM",
}


def write_self_loader(model: PreTrainedModel, folder: Path) -> None:
    """Add the loader to a native checkpoint and name it in ``config.json``.

    The loader is the source text of the code by which lmcompress itself rebuilds shapes. Every loader has all families:
    the first one that a process runs serves all later checkpoints.

    Args:
        model: the checkpoint's model.
        folder: holds ``config.json`` already.
    """
    class_name = type(model).__name__
    auto_class = next((auto for ending, auto in _AUTO_CLASSES.items() if class_name.endswith(ending)), "AutoModel")
    # a checkpoint with a head also loads without it
    classes = {"AutoModel": type(model.base_model).__name__, auto_class: class_name}
    source = [
        "# Rebuilds this checkpoint's shapes without lmcompress; written by lmcompress, Apache-2.0.\n",
        inspect.getsource(narrow),
        _without_imports(inspect.getsource(shaping)),
        f"\nPATHS = {_table(PATHS)}\nHEAD_ATTRIBUTES = {_table(HEAD_ATTRIBUTES)}\nFORMAT_VERSION = {FORMAT_VERSION}\n",
        _without_imports(inspect.getsource(travelling)),
        "\n\nregister()\n\nimport transformers\n",
        *(f"\n\nclass {name}(transformers.{name}):\n    pass\n" for name in dict.fromkeys(classes.values())),
    ]
    (folder / LOADER_FILE).write_text("".join(source), encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    module = LOADER_FILE.removesuffix(".py")
    config["auto_map"] = {auto: f"{module}.{name}" for auto, name in classes.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _without_imports(source: str) -> str:
    """The source of a module below its imports from lmcompress."""
    ours = ("from lmcompress.", "from __future__ ")
    return "\n\n" + "".join(line for line in source.splitlines(keepends=True) if not line.startswith(ours))


def _table(rows: Mapping[str, object]) -> str:
    return "{\n" + "".join(f"    {name!r}: {row!r},\n" for name, row in rows.items()) + "}"
