"""Rebuilds the shapes of a pruned checkpoint, and unpacks codes, where lmcompress is not installed; Apache-2.0.

The source text of this module is in the file that :mod:`lmcompress.checkpoint.self_loader` writes beside a checkpoint,
after that of what it imports of lmcompress, and is run by ``AutoModel*.from_pretrained(path, trust_remote_code=True)``.
With lmcompress imported first, that file only passes on the stock class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from lmcompress.checkpoint.config import FORMAT_VERSION
from lmcompress.checkpoint.guard import allow, open_config, open_model
from lmcompress.checkpoint.plain import unpack_codes, wait_for_codes
from lmcompress.checkpoint.structure import HEAD_ATTRIBUTES, PATHS
from lmcompress.families.narrow import ZeroWidthLinear
from lmcompress.families.shaping import leave_out_pooler, shape_model

logger = logging.get_logger(__name__)


class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    """The contents of ``config.json``, unchanged; compression that this loader cannot rebuild is refused."""

    def __init__(self, **values: Any) -> None:
        if values.get("format_version") not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"this loader reads format versions up to {FORMAT_VERSION}: pip install lmcompress and import it"
            )
        for what, there in (
            ("quantized attention", (values.get("encoding") or {}).get("attention") is not None),
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
    supported_format = FORMAT_VERSION

    @property
    def is_trainable(self) -> bool:
        return not self._encodings()

    @property
    def is_qat_trainable(self) -> bool:
        return not self._encodings()

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        if self._encodings():
            logger.warning("weights of this model were unpacked: copy its folder, or load it after `import lmcompress`")
            return False
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        return open_config(config)

    def _encodings(self) -> dict[str, dict[str, Any]]:
        entries = (self.quantization_config.values.get("encoding") or {}).get("weights", ())
        return {path: entry for entry in entries for path in entry["modules"]}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        open_model(model)
        structure, family = self.quantization_config.values.get("structure"), model.config.model_type
        if structure is not None:
            if len(model.base_model.get_submodule(PATHS[family]["blocks"])) != len(structure["blocks"]):
                raise ValueError("config.json and its structure name different numbers of blocks: it is damaged")
            shape_model(model, structure, PATHS[family], HEAD_ATTRIBUTES[family])
        self.packed = wait_for_codes(model, self._encodings(), PATHS[family]["word_embeddings"])
        prefix = model.base_model_prefix + "."
        empty = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, ZeroWidthLinear)}
        empty = {name.removeprefix(prefix) for name in empty}
        names: set[str] = set()
        for file in [file for file in checkpoint_files or () if str(file).endswith(".safetensors")]:
            with safe_open(file, "pt") as tensors:
                found = {name.removeprefix(prefix) for name in tensors.keys()}
            names |= found
            # Transformers only warns of surplus tensors in a file
            _refuse(sorted(empty & found))
        if names:
            leave_out_pooler(model, names, PATHS[family]["pooler"])
        self.expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # some versions of transformers accept any shape in the file
        found = model.state_dict().items()
        _refuse([name for name, tensor in found if self.expected.get(name, tensor.shape) != tensor.shape])
        unpack_codes(model, self.packed)
        # the flag would forbid casts
        cast(Any, model).is_quantized = False
        structure, config = self.quantization_config.values.get("structure"), cast(Any, model).config
        queries = (structure or {}).get("queries", 1)
        counts = {queries * block["heads"] for block in (structure or {}).get("blocks", ())}
        if counts - {config.num_attention_heads}:
            # its errors are only logged, and the answers are empty
            cast(Any, model).init_continuous_batching = _no_continuous_batching
        return model


def _no_continuous_batching(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "continuous batching (generate_batch) is not possible with this model: it lays out one cache for all blocks, "
        "and theirs have other numbers of heads. Use generate(), with any kind of cache, on a padded batch"
    )


def _refuse(names: Sequence[str]) -> None:
    if names:
        raise ValueError(f"size mismatch for {names[0]}: config.json and the weights do not belong together")


@contextmanager
def registered_alone() -> Iterator[None]:
    """A block in which this loader, and not lmcompress, loads checkpoints."""
    tables = AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
    kept = [table.pop("lmcompress", None) for table in tables]
    register()
    try:
        yield
    finally:
        for table, entry in zip(tables, kept, strict=True):
            table.pop("lmcompress", None)
            if entry is not None:
                table["lmcompress"] = entry


def register() -> None:
    """Register the method "lmcompress" with Transformers, unless lmcompress or a later loader has done so."""
    present = AUTO_QUANTIZER_MAPPING.get("lmcompress")
    # lmcompress itself has no supported_format and stays; an older loader gives way
    if present is None or getattr(present, "supported_format", FORMAT_VERSION) < FORMAT_VERSION:
        AUTO_QUANTIZER_MAPPING.pop("lmcompress", None)
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop("lmcompress", None)
        allow()
        register_quantization_config("lmcompress")(_Config)
        register_quantizer("lmcompress")(_Quantizer)
