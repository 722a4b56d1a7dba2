"""The self-loading format: a small loader stored with the checkpoint, for users who trust it."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from lmcompress.checkpoint import guard, plain, travelling
from lmcompress.checkpoint.config import FORMAT_VERSION
from lmcompress.checkpoint.encoding import encoding_of
from lmcompress.checkpoint.guard import FIELD, SELF_LOADING
from lmcompress.checkpoint.layers import layers_of
from lmcompress.checkpoint.structure import HEAD_ATTRIBUTES, PATHS
from lmcompress.families import anatomy_of, coupled, is_described, narrow, shaping
from lmcompress.nn import padding
from lmcompress.numerics import graphs
from lmcompress.numerics import padding as numerics_padding

LOADER_FILE = "modeling_lmcompress.py"

_AUTO_CLASSES = {
    "SequenceClassification": "AutoModelForSequenceClassification",
    "TokenClassification": "AutoModelForTokenClassification",
    "QuestionAnswering": "AutoModelForQuestionAnswering",
    "MultipleChoice": "AutoModelForMultipleChoice",
    "MaskedLM": "AutoModelForMaskedLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForCausalLM": "AutoModelForCausalLM",
}


def not_carried(model: PreTrainedModel) -> str | None:
    """What a model has that the travelling loader cannot rebuild, or None.

    Args:
        model: any model.
    """
    if not is_described(model):
        return f"family {model.config.model_type}"
    if anatomy_of(model).reads_encoder:
        return "decoders that read an encoder"
    if get_model_conversion_mapping(model, add_legacy=False):
        # it does so for its own classes, and not for those that travel with a checkpoint
        return f"names of tensors that Transformers changes while it loads {model.config.model_type}"
    encoding = encoding_of(model)
    if encoding is not None and encoding.attention is not None:
        return "quantized attention"
    return "compact layers" if layers_of(model) else None


def write_self_loader(model: PreTrainedModel, folder: Path) -> None:
    """Add the loader to a native checkpoint and name it in ``config.json``.

    The loader is the source text of the code by which lmcompress itself rebuilds shapes, and of one that unpacks codes.
    Every loader has all families: the first one that a process runs serves all later checkpoints. The config is named
    too, so that the loader runs before anything else where a program reads the config first.

    Args:
        model: the checkpoint's model.
        folder: holds ``config.json`` already.
    """
    class_name = type(model).__name__
    auto_class = next((auto for ending, auto in _AUTO_CLASSES.items() if class_name.endswith(ending)), "AutoModel")
    # a checkpoint with a head also loads without it
    classes = {"AutoModel": type(model.base_model).__name__, auto_class: class_name}
    config_class = type(model.config).__name__
    own = dict.fromkeys((*classes.values(), config_class))
    source = [
        "# Rebuilds this checkpoint's shapes without lmcompress; written by lmcompress, Apache-2.0.\n",
        inspect.getsource(coupled),
        _without_imports(inspect.getsource(narrow)),
        _without_imports(inspect.getsource(shaping)),
        _without_imports(inspect.getsource(guard)),
        *(_without_imports(inspect.getsource(module)) for module in (graphs, numerics_padding, padding)),
        _without_imports(inspect.getsource(plain)),
        f"\nPATHS = {_table(PATHS)}\nHEAD_ATTRIBUTES = {_table(HEAD_ATTRIBUTES)}\nFORMAT_VERSION = {FORMAT_VERSION}\n",
        _without_imports(inspect.getsource(travelling)),
        "\n\nregister()\n\nimport transformers\n",
        *(f"\n\nclass {name}(transformers.{name}):\n    pass\n" for name in own),
    ]
    (folder / LOADER_FILE).write_text("".join(source), encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    module = LOADER_FILE.removesuffix(".py")
    if FIELD in config:
        config[FIELD] = SELF_LOADING
    config["auto_map"] = {auto: f"{module}.{name}" for auto, name in (classes | {"AutoConfig": config_class}).items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _without_imports(source: str) -> str:
    """The source of a module below its imports from lmcompress, which may take several lines."""
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("lmcompress", "__future__"):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "\n\n" + "".join(lines)


def _table(rows: Mapping[str, object]) -> str:
    return "{\n" + "".join(f"    {name!r}: {row!r},\n" for name, row in rows.items()) + "}"
