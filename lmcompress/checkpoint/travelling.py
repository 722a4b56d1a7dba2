"""Rebuilds the shapes of a pruned checkpoint where lmcompress is not installed; Apache-2.0.

The source text of this module is in the file that :mod:`lmcompress.checkpoint.self_loader` writes beside a checkpoint,
after that of what it imports of lmcompress, and is run by ``AutoModel*.from_pretrained(path, trust_remote_code=True)``.
With lmcompress imported first, that file only passes on the stock class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from lmcompress.checkpoint.config import FORMAT_VERSION
from lmcompress.checkpoint.structure import HEAD_ATTRIBUTES, PATHS
from lmcompress.families.narrow import ZeroWidthLinear
from lmcompress.families.shaping import shape_model


class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    """The contents of ``config.json``, unchanged; compression that this loader cannot rebuild is refused."""

    def __init__(self, **values: Any) -> None:
        if values.get("format_version") not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"this loader reads format versions up to {FORMAT_VERSION}: pip install lmcompress and import it"
            )
        for what, there in (
            ("packed weights", values.get("encoding") is not None),
            ("compact layers", values.get("layers")),
            ("entropy-coded streams", (values.get("storage") or {}).get("streams")),
        ):
            if there:
                raise ValueError(f"this loader reads no {what}: pip install lmcompress and import it")
        self.quant_method = "lmcompress"
        self.values = values

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)


class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Gives the skeleton its shapes before Transformers fills it."""

    requires_calibration = False
    is_trainable = True
    is_qat_trainable = True
    supported_format = FORMAT_VERSION

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        structure, family = self.quantization_config.values.get("structure"), model.config.model_type
        if structure is not None:
            if len(model.base_model.get_submodule(PATHS[family]["blocks"])) != len(structure["blocks"]):
                raise ValueError("config.json and its structure name different numbers of blocks: it is damaged")
            shape_model(model, structure, PATHS[family], HEAD_ATTRIBUTES[family])
        prefix = model.base_model_prefix + "."
        empty = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, ZeroWidthLinear)}
        empty = {name.removeprefix(prefix) for name in empty}
        for file in [file for file in checkpoint_files or () if str(file).endswith(".safetensors")]:
            with safe_open(file, "pt") as tensors:
                found = {name.removeprefix(prefix) for name in tensors.keys()}
            # Transformers only warns of surplus tensors in a file
            _refuse(sorted(empty & found))
        self.expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # some versions of transformers accept any shape in the file
        found = model.state_dict().items()
        _refuse([name for name, tensor in found if self.expected.get(name, tensor.shape) != tensor.shape])
        return model


def _refuse(names: Sequence[str]) -> None:
    if names:
        raise ValueError(f"size mismatch for {names[0]}: config.json and the weights do not belong together")


def register() -> None:
    """Register the method "lmcompress" with Transformers, unless lmcompress or a later loader has done so."""
    present = AUTO_QUANTIZER_MAPPING.get("lmcompress")
    # lmcompress itself has no supported_format and stays; an older loader gives way
    if present is None or getattr(present, "supported_format", FORMAT_VERSION) < FORMAT_VERSION:
        AUTO_QUANTIZER_MAPPING.pop("lmcompress", None)
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop("lmcompress", None)
        register_quantization_config("lmcompress")(_Config)
        register_quantizer("lmcompress")(_Quantizer)
