"""The self-loading format: a small loader that travels with the checkpoint, for those who trust it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template

from transformers import PreTrainedModel

from lmcompress.checkpoint.config import FORMAT_VERSION
from lmcompress.families import FAMILIES, Family, narrow

LOADER_FILE = "modeling_lmcompress.py"

# Paths and head attributes are filled in from the anatomy, and its module of odd shapes is copied whole, so that no
# second description of a family exists. All families are in every loader: the first one that a process runs serves all
# checkpoints that follow.
_LOADER = Template("""\
$narrow

# Rebuilds this checkpoint's shapes without lmcompress; written by lmcompress, Apache-2.0. Loaded by
# AutoModel*.from_pretrained(path, trust_remote_code=True). With lmcompress imported first, this file only passes on the
# stock class.

import transformers
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

# per family: paths of the parts; and attributes of the attention as (a, b), for a * heads + b * heads * head size
PATHS = $paths
HEAD_ATTRIBUTES = $head_attributes
SUPPORTED_FORMAT = $format_version


class _Config(QuantizationConfigMixin):
    def __init__(self, **values):
        if values.get("format_version") not in range(1, SUPPORTED_FORMAT + 1):
            raise ValueError(
                f"this loader reads format versions up to {SUPPORTED_FORMAT}: pip install lmcompress and import it"
            )
        if values.get("encoding") is not None:
            raise ValueError("this loader reads no packed weights: pip install lmcompress and import it")
        if values.get("layers"):
            raise ValueError("this loader reads no compact layers: pip install lmcompress and import it")
        if (values.get("storage") or {}).get("streams"):
            raise ValueError("this loader reads no entropy-coded streams: pip install lmcompress and import it")
        self.quant_method = "lmcompress"
        self.values = values

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self):
        return dict(self.values)


def _replace(block, path, in_width=None, out_width=None):
    parent, _, name = path.rpartition(".")
    owner = block.get_submodule(parent)
    old = getattr(owner, name)
    old_out, old_in = old.weight.shape[::-1] if isinstance(old, Conv1D) else old.weight.shape
    in_width = old_in if in_width is None else in_width
    out_width = old_out if out_width is None else out_width
    device, dtype = old.weight.device, old.weight.dtype
    if in_width == 0 or out_width == 0:
        new = ZeroWidthLinear(in_width, out_width, old.bias is not None, device, dtype)
    elif isinstance(old, Conv1D):
        with torch.device(device):
            new = Conv1D(out_width, in_width).to(dtype)
    else:
        new = nn.Linear(in_width, out_width, old.bias is not None, device, dtype)
    setattr(owner, name, new)


class _Quantizer(HfQuantizer):
    requires_calibration = False
    is_trainable = True
    is_qat_trainable = True
    supported_format = SUPPORTED_FORMAT

    def is_serializable(self, safe_serialization=None):
        return True

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        structure = self.quantization_config.values.get("structure")
        if structure is not None:
            self._shape(model, structure)
        prefix = model.base_model_prefix + "."
        empty = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, ZeroWidthLinear)}
        empty = {name.removeprefix(prefix) for name in empty}
        for file in [file for file in checkpoint_files or () if str(file).endswith(".safetensors")]:
            with safe_open(file, "pt") as tensors:
                found = {name.removeprefix(prefix) for name in tensors.keys()}
            # what is too many in a file, transformers only warns of
            for name in sorted(empty & found):
                raise ValueError(f"size mismatch for {name}: config.json and the weights do not belong together")
        self.expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        # some versions of transformers take whatever shape the file has
        for name, tensor in model.state_dict().items():
            if self.expected.get(name, tensor.shape) != tensor.shape:
                raise ValueError(f"size mismatch for {name}: config.json and the weights do not belong together")
        return model

    def _shape(self, model, structure):
        paths, attributes = PATHS[model.config.model_type], HEAD_ATTRIBUTES[model.config.model_type]
        blocks = model.base_model.get_submodule(paths["blocks"])
        if len(blocks) != len(structure["blocks"]):
            raise ValueError("config.json and its structure name different numbers of blocks: the config is damaged")
        for block, shape in zip(blocks, structure["blocks"]):
            heads, width = shape["heads"], shape["heads"] * structure["head_size"]
            if paths["qkv"]:
                _replace(block, paths["qkv"], out_width=3 * width)
            for part in ("query", "key", "value"):
                if paths[part]:
                    _replace(block, paths[part], out_width=width)
            _replace(block, paths["attention_out"], in_width=width)
            _replace(block, paths["ffn_in"], out_width=shape["ffn"])
            _replace(block, paths["ffn_out"], in_width=shape["ffn"])
            attention = block.get_submodule(paths["attention"])
            for name, (a, b) in attributes.items():
                setattr(attention, name, a * heads + b * width)
            if heads == 0:
                remove_heads(attention, paths["attention_tail"])
        if structure.get("hidden") is not None:
            narrow_stream(model, stream_axes(model, paths), torch.arange(structure["hidden"]))


_present = AUTO_QUANTIZER_MAPPING.get("lmcompress")
# lmcompress itself has no supported_format and stays; an older loader gives way
if _present is None or getattr(_present, "supported_format", SUPPORTED_FORMAT) < SUPPORTED_FORMAT:
    AUTO_QUANTIZER_MAPPING.pop("lmcompress", None)
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop("lmcompress", None)
    register_quantization_config("lmcompress")(_Config)
    register_quantizer("lmcompress")(_Quantizer)

$classes""")

_CLASS = Template("""
class $class_name(transformers.$class_name):
    pass
""")

_PARTS = (
    "blocks",
    "attention",
    "query",
    "key",
    "value",
    "qkv",
    "attention_out",
    "ffn_in",
    "ffn_out",
    "attention_tail",
    "hidden_size",
    "num_layers",
)

_AUTO_CLASSES = {
    "SequenceClassification": "AutoModelForSequenceClassification",
    "TokenClassification": "AutoModelForTokenClassification",
    "QuestionAnswering": "AutoModelForQuestionAnswering",
    "MultipleChoice": "AutoModelForMultipleChoice",
    "MaskedLM": "AutoModelForMaskedLM",
    "LMHeadModel": "AutoModelForCausalLM",
}


def write_self_loader(model: PreTrainedModel, folder: Path) -> None:
    """Add the loader to a native checkpoint, and name it in ``config.json``.

    Args:
        model: whose checkpoint it is.
        folder: holds ``config.json`` already.
    """
    class_name = type(model).__name__
    auto_class = next((auto for ending, auto in _AUTO_CLASSES.items() if class_name.endswith(ending)), "AutoModel")
    # a checkpoint with a head also loads without it
    classes = {"AutoModel": type(model.base_model).__name__, auto_class: class_name}
    source = _LOADER.substitute(
        classes="\n".join(_CLASS.substitute(class_name=name) for name in dict.fromkeys(classes.values())),
        narrow=inspect.getsource(narrow).rstrip(),
        format_version=FORMAT_VERSION,
        paths=_table({name: {part: getattr(family, part) for part in _PARTS} for name, family in FAMILIES.items()}),
        head_attributes=_table({name: _linear(family) for name, family in FAMILIES.items()}),
    )
    (folder / LOADER_FILE).write_text(source, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    module = LOADER_FILE.removesuffix(".py")
    config["auto_map"] = {auto: f"{module}.{name}" for auto, name in classes.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _table(rows: Mapping[str, object]) -> str:
    return "{\n" + "".join(f"    {name!r}: {row!r},\n" for name, row in rows.items()) + "}"


def _linear(family: Family) -> dict[str, tuple[int, int]]:
    """The attributes of the attention module as (a, b), for a × heads + b × heads × head size."""
    one, two = family.head_attributes(1, 1), family.head_attributes(1, 2)
    return {name: (2 * one[name] - two[name], two[name] - one[name]) for name in one}
