"""CompressionConfig: what has been done to a model, as validated data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from transformers.utils.quantization_config import QuantizationConfigMixin

from lmcompress.errors import CheckpointError

# 1: blocks of their own shapes. 2: blocks without heads or neurons, a hidden size of its own
FORMAT_VERSION = 2
QUANT_METHOD = "lmcompress"
MAX_BLOCKS, MAX_HEADS, MAX_WIDTH = 1024, 1024, 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BlockShape(_Strict):
    """The shape of one Transformer block.

    Attributes:
        heads: attention heads kept; with 0, the attention's answer is the bias of its output projection.
        ffn: neurons of the feed-forward network kept; with 0, its answer is the bias of its second matrix.
        source: number of the block in the model this one was cut from, counted from 0; only for people to read.
    """

    heads: Annotated[int, Field(ge=0, le=MAX_HEADS)]
    ffn: Annotated[int, Field(ge=0, le=MAX_WIDTH)]
    source: Annotated[int, Field(ge=0, lt=MAX_BLOCKS)] | None = None


class Structure(_Strict):
    """The shapes of all blocks, in order.

    Blocks are numbered, not named by path: the same map holds for a model with a head and without one.

    Attributes:
        head_size: width of one attention head, the same everywhere.
        blocks: one shape per block; as many as the config says the model has layers.
        hidden: width of the residual stream, where it is not the one that the stock config says.
    """

    head_size: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    blocks: Annotated[tuple[BlockShape, ...], Field(min_length=1, max_length=MAX_BLOCKS)]
    hidden: Annotated[int, Field(ge=1, le=MAX_WIDTH)] | None = None

    @field_validator("blocks", mode="before")
    @classmethod
    def _list_from_json(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Provenance(_Strict):
    """Where a model comes from. Nothing here changes how it is loaded.

    Attributes:
        library_version: lmcompress that wrote the checkpoint.
        base_model: name or path of the model that was compressed.
        recipe: name of the recipe, if there was one.
        methods: what was applied, in order.
    """

    library_version: Annotated[str, Field(max_length=64)] = ""
    base_model: Annotated[str, Field(max_length=1024)] = ""
    recipe: Annotated[str, Field(max_length=1024)] = ""
    methods: Annotated[tuple[str, ...], Field(max_length=64)] = ()

    @field_validator("methods", mode="before")
    @classmethod
    def _list_from_json(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class CompressionConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What has been done to a model; lives in ``config.json`` under ``quantization_config``.

    Args:
        structure: shapes of the blocks, or None where the stock config says all.
        provenance: where the model comes from.
        format_version: version of this format; a later one than this library knows is refused.
        **unknown: refused, with the names that are known.

    Raises:
        CheckpointError: a value of a wrong type or out of range, an unknown key, a version of the future, or shapes
            that the version did not have.
    """

    def __init__(
        self,
        structure: Structure | Mapping[str, Any] | None = None,
        provenance: Provenance | Mapping[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
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
                f"quantization_config has unknown keys: {', '.join(sorted(unknown))}. Known are: format_version, "
                "provenance, structure. The config is damaged or was written by something else than lmcompress."
            )
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.structure = _validated(Structure, structure)
        if format_version == 1 and self.structure is not None:
            _refuse_second_version(self.structure)
        self.provenance = _validated(Provenance, provenance) or Provenance()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from what ``config.json`` says; Transformers calls this.

        Args:
            config_dict: the dictionary under ``quantization_config``.
            return_unused_kwargs: also return ``kwargs``, of which none is used.
            **kwargs: ignored.

        Returns:
            The config, or ``(config, kwargs)``.
        """
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON types, without what is unset."""
        values: dict[str, Any] = {"quant_method": self.quant_method, "format_version": self.format_version}
        if self.structure is not None:
            values["structure"] = self.structure.model_dump(mode="json", exclude_none=True)
        provenance = self.provenance.model_dump(mode="json", exclude_defaults=True)
        return values | ({"provenance": provenance} if provenance else {})

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_dict`."""
        return self.to_dict()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompressionConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(repr(self.to_dict()))


def recorded_compression(config: Any) -> CompressionConfig | None:
    """What a model's config says lmcompress has done to it, or None.

    Args:
        config: of a model, loaded or about to be.

    Raises:
        CheckpointError: it says something that cannot be.
    """
    value = getattr(config, "quantization_config", None)
    if value is None or isinstance(value, CompressionConfig):
        return value
    # a dictionary before loading; a class of its own where a self-loading checkpoint came first
    values = value if isinstance(value, dict) else value.to_dict()
    return CompressionConfig.from_dict(values) if values.get("quant_method") == QUANT_METHOD else None


def _refuse_second_version(structure: Structure) -> None:
    newer = "a hidden size of its own" if structure.hidden is not None else ""
    if any(block.heads == 0 or block.ffn == 0 for block in structure.blocks):
        newer = "a block with 0 heads or neurons"
    if newer:
        raise CheckpointError(
            f"quantization_config says format version 1 and {newer}, which came with version 2: the config is damaged; "
            "load the checkpoint as it was written"
        )


def _validated(schema: type[_Strict], value: Any) -> Any:
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
