"""CompressionConfig: the compression of a model, stored in ``config.json`` under ``quantization_config``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from transformers.utils.quantization_config import QuantizationConfigMixin

from lmcompress.checkpoint.schema import (
    CompactLayer,
    Encoding,
    Layers,
    Provenance,
    Storage,
    Strict,
    Structure,
)
from lmcompress.errors import CheckpointError

FORMAT_VERSION = 5
"""1: blocks of their own shapes. 2: blocks without heads or neurons, a hidden size of its own. 3: packed weights. 4:
compact layers, streams in place of tensors. 5: several query heads to a key."""

QUANT_METHOD = "lmcompress"
"""The name of the format in Transformers' tables."""


class CompressionConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The compression of a model; stored in ``config.json`` under ``quantization_config``.

    Args:
        structure: shapes of the blocks, or None if the stock config describes them.
        provenance: origin of the model.
        format_version: version of this format; versions later than this library's are refused.
        encoding: layout of packed weights in the files, or None if all weights are dense.
        layers: replacements of matrices, attention and blocks, in the order in which they are built.
        storage: which tensors of the files are entropy-coded streams, or None.
        **unknown: refused, naming the known keys.

    Raises:
        CheckpointError: If a value has the wrong type or is out of range, a key is unknown, the version is too new,
            or too old for the shapes, encodings, layers or streams given.
    """

    def __init__(
        self,
        structure: Structure | Mapping[str, Any] | None = None,
        provenance: Provenance | Mapping[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        encoding: Encoding | Mapping[str, Any] | None = None,
        layers: Sequence[CompactLayer | Mapping[str, Any]] | None = None,
        storage: Storage | Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if not isinstance(format_version, int) or isinstance(format_version, bool) or format_version < 1:
            raise CheckpointError(
                f"quantization_config.format_version must be a whole number from 1, got {format_version!r}"
            )
        if format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"this checkpoint has format version {format_version}, this lmcompress reads up to {FORMAT_VERSION}: "
                "pip install --upgrade lmcompress"
            )
        if unknown:
            raise CheckpointError(
                f"quantization_config has unknown keys: {', '.join(sorted(unknown))}. Known are: encoding, "
                "format_version, layers, provenance, storage, structure. The config is damaged or was not written by "
                "lmcompress."
            )
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.structure = _validated(Structure, structure)
        self.encoding = _validated(Encoding, encoding)
        built = None if layers is None else _validated(Layers, {"entries": layers})
        self.layers: tuple[CompactLayer, ...] = () if built is None else built.entries
        self.storage = _validated(Storage, storage)
        self.provenance = _validated(Provenance, provenance) or Provenance()
        blocks, hidden = (self.structure.blocks, self.structure.hidden) if self.structure else ((), None)
        for what, since, there in (
            ("a block with 0 heads or neurons", 2, any(block.heads == 0 or block.ffn == 0 for block in blocks)),
            ("a hidden size of its own", 2, hidden is not None),
            ("an encoding", 3, self.encoding is not None),
            ("compact layers", 4, self.layers),
            ("streams", 4, self.storage is not None),
            ("several query heads to a key", 5, self.structure is not None and self.structure.queries > 1),
        ):
            if there and format_version < since:
                raise CheckpointError(
                    f"quantization_config has format version {format_version} and {what}, which needs version "
                    f"{since}: the config is damaged; load the checkpoint as it was written"
                )

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from ``config.json``; called by Transformers.

        Args:
            config_dict: the dictionary under ``quantization_config``.
            return_unused_kwargs: also return ``kwargs``, none of which is used.
            **kwargs: ignored.

        Returns:
            The config, or ``(config, kwargs)``.
        """
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON types, without unset values."""
        values: dict[str, Any] = {"quant_method": self.quant_method, "format_version": self.format_version}
        if self.structure is not None:
            values["structure"] = self.structure.model_dump(mode="json", exclude_none=True)
        if self.layers:
            values["layers"] = [entry.model_dump(mode="json", exclude_defaults=True) for entry in self.layers]
        for name in ("encoding", "storage", "provenance"):
            said = getattr(self, name)
            if said is not None and said != Provenance():
                values[name] = said.model_dump(mode="json", exclude_defaults=True)
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_dict`."""
        return self.to_dict()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompressionConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(repr(self.to_dict()))


def recorded_compression(config: Any) -> CompressionConfig | None:
    """The compression that a model's config records, or None.

    Args:
        config: config of a model, loaded or not.

    Raises:
        CheckpointError: If the entry is not valid.
    """
    value = getattr(config, "quantization_config", None)
    if value is None or isinstance(value, CompressionConfig):
        return value
    # a dictionary before loading; a different class if a self-loading checkpoint was registered first
    values = value if isinstance(value, dict) else value.to_dict()
    return CompressionConfig.from_dict(values) if values.get("quant_method") == QUANT_METHOD else None


def _validated(schema: type[Strict], value: Any) -> Any:
    if value is None or isinstance(value, schema):
        return value
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, (schema.__name__.lower(), *e['loc'])))}: {e['msg']}, got {str(e['input'])[:80]}"
            for e in error.errors()[:5]
        )
        raise CheckpointError(f"quantization_config is not valid: {problems}") from error
