"""A checkpoint's config as validated data: shapes, encodings, compact layers, streams, provenance."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from lmcompress.numerics.grids import PER_TENSOR, Granularity, Grid, PerGroup, PerRow
from lmcompress.numerics.packing import container_for

MAX_BLOCKS, MAX_HEADS, MAX_WIDTH = 1024, 1024, 1 << 20
MAX_MODULES = 1 << 16

# JSON has lists
_FROM_LIST = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
# a string for a value that equals a number and is not one: True == 1, 8.0 == 8
_NO_LOOKALIKE = BeforeValidator(lambda value: repr(value) if isinstance(value, (bool, float)) else value)

ModulePaths = Annotated[
    tuple[Annotated[str, Field(max_length=256, pattern=r"^\w+(\.\w+)*$")], ...],
    _FROM_LIST,
    Field(min_length=1, max_length=MAX_MODULES),
]
"""Paths relative to the base model."""

BlockNumbers = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=MAX_BLOCKS)], ...],
    _FROM_LIST,
    Field(min_length=1, max_length=MAX_BLOCKS),
]
"""Numbers of blocks, counted from 0."""


class Strict(BaseModel):
    """Immutable data whose keys and types are all checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BlockShape(Strict):
    """The shape of one Transformer block.

    Attributes:
        heads: attention heads kept; with 0, the attention returns the bias of its output projection.
        ffn: neurons of the feed-forward network kept; with 0, it returns the bias of its second matrix.
        source: number of the block in the model this one was cut from, from 0; informative only.
    """

    heads: Annotated[int, Field(ge=0, le=MAX_HEADS)]
    ffn: Annotated[int, Field(ge=0, le=MAX_WIDTH)]
    source: Annotated[int, Field(ge=0, lt=MAX_BLOCKS)] | None = None


class Structure(Strict):
    """The shapes of all blocks, in order.

    Blocks are numbered, not named by path: the same map holds with and without a head.

    Attributes:
        head_size: width of one query, key or value, the same everywhere.
        blocks: one shape per block; as many as the config has layers.
        hidden: width of the residual stream, if it differs from the stock config's.
        queries: query heads that read one key/value head; heads are then counted by their keys. Left out of
            ``config.json`` if it is 1.
        encoder: number of blocks, from the first, that belong to the encoder of a model with a decoder that reads it.
            Left out of ``config.json`` of models with one stack.
    """

    head_size: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    blocks: Annotated[tuple[BlockShape, ...], _FROM_LIST, Field(min_length=1, max_length=MAX_BLOCKS)]
    hidden: Annotated[int, Field(ge=1, le=MAX_WIDTH)] | None = None
    queries: Annotated[int, Field(ge=1, le=MAX_HEADS)] = 1
    encoder: Annotated[int, Field(ge=1, lt=MAX_BLOCKS)] | None = None

    @model_serializer(mode="wrap")
    def _without_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        if self.queries == 1:
            del values["queries"]
        if self.encoder is None:
            values.pop("encoder", None)
        return values

    @property
    def head_width(self) -> int:
        """Width of the output of one head: that of all its queries."""
        return self.head_size * self.queries

    @property
    def stacks(self) -> tuple[tuple[BlockShape, ...], ...]:
        """The shapes of the blocks of each stack."""
        if self.encoder is None:
            return (self.blocks,)
        return self.blocks[: self.encoder], self.blocks[self.encoder :]


class ActivationEncoding(Strict):
    """The quantization of an activation before a matmul.

    Attributes:
        bits: 8 or 4.
        symmetric: whether levels are symmetric around 0; else codes are 0 to 2^bits - 1 with an integer zero point.
        granularity: scope of dynamic ranges: the whole ``tensor``, or each ``token`` (the last axis).
        range: ``dynamic``, computed from each input; ``static``: scale and zero point are tensors of the checkpoint,
            calibrated or learned.
        clip: for dynamic ranges: inputs are clipped to ±clip first (TernaryBERT's 2.5); ``None`` does not clip.
        full: for symmetric static ranges: codes are -2^(bits-1) to 2^(bits-1) - 1, as for learned ones; else the
            lowest of these is unused.
    """

    bits: Annotated[Literal[8, 4], _NO_LOOKALIKE]
    symmetric: bool = True
    granularity: Literal["tensor", "token"] = "tensor"
    range: Literal["dynamic", "static"] = "dynamic"
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    full: bool = False

    @model_validator(mode="after")
    def _belongs_together(self) -> ActivationEncoding:
        if self.range == "static" and (self.granularity != "tensor" or self.clip is not None):
            raise ValueError("a static range must have granularity 'tensor' and no clip; its scale is a tensor")
        if self.full and not (self.range == "static" and self.symmetric):
            raise ValueError("full is for symmetric static ranges only, the codes of the others are fixed")
        return self


class GridEncoding(Strict):
    """The integers that codes may be: ``levels`` of them from ``low``, ``stride`` apart; they fit one byte.

    Attributes:
        low: the least code.
        levels: number of codes.
        stride: distance between codes.
    """

    low: Annotated[int, Field(ge=-128, le=255)]
    levels: Annotated[int, Field(ge=2, le=256)]
    stride: Annotated[int, Field(ge=1, le=255)] = 1

    @model_validator(mode="after")
    def _fits_a_byte(self) -> GridEncoding:
        self.grid()
        return self

    def grid(self) -> Grid:
        """The same grid as a type of lmcompress.numerics."""
        return Grid(self.low, self.levels, self.stride)


class WeightEncoding(Strict):
    """The encoding of the weights of some modules; weights are seen as ``(out, in)``, embeddings by token.

    Attributes:
        grid: possible codes.
        container: storage of codes in bytes, see :mod:`lmcompress.numerics.packing`.
        granularity: which weights share a scale: the ``tensor``, each ``row``, or each n neighbours of a row.
        zero_points: whether there are zero points besides the scales.
        inputs: quantization of the module's input; for token embeddings, of the input of a tied head.
        modules: paths of the modules relative to the base model; those of a task head by their own names.
    """

    grid: GridEncoding
    container: Annotated[Literal[1, 2, 3, 4, 8, "base3"], _NO_LOOKALIKE]
    granularity: Literal["tensor", "row"] | Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    zero_points: bool = False
    inputs: ActivationEncoding | None = None
    modules: ModulePaths

    @model_validator(mode="after")
    def _belongs_together(self) -> WeightEncoding:
        smallest = container_for(self.grid.grid())
        levels = 3 if self.container == "base3" else 2**self.container
        if self.grid.levels > levels:
            raise ValueError(
                f"container {self.container!r} holds {levels} levels, the grid has {self.grid.levels}: at least "
                f"{smallest!r} is needed"
            )
        if self.zero_points and self.grid.low < 0:
            raise ValueError("zero points need a grid whose codes are 0 or more")
        return self

    def grouping(self) -> Granularity:
        """The granularity as a type of lmcompress.numerics."""
        if isinstance(self.granularity, int):
            return PerGroup(self.granularity)
        return PER_TENSOR if self.granularity == "tensor" else PerRow()


class AttentionEncoding(Strict):
    """The quantization of the inputs of both matmuls of attention, in every block; ``None`` leaves one unquantized.

    Attributes:
        queries, keys: inputs of the matmul before the softmax.
        values, probabilities: inputs of the matmul after it.
    """

    queries: ActivationEncoding | None = None
    keys: ActivationEncoding | None = None
    values: ActivationEncoding | None = None
    probabilities: ActivationEncoding | None = None


class Encoding(Strict):
    """The encoding of a checkpoint's weights, and the quantization of activations.

    Attributes:
        weights: one entry for each encoding; no module is in two of them.
        attention: quantization within attention, the same in all blocks.
    """

    weights: Annotated[tuple[WeightEncoding, ...], _FROM_LIST, Field(max_length=MAX_MODULES)] = ()
    attention: AttentionEncoding | None = None

    @model_validator(mode="after")
    def _each_module_once(self) -> Encoding:
        seen: set[str] = set()
        for path in (path for entry in self.weights for path in entry.modules):
            if path in seen:
                raise ValueError(f"module {path} is encoded twice; a module has one encoding")
            seen.add(path)
        return self

    def by_module(self) -> dict[str, WeightEncoding]:
        """The entry of each module, by its path."""
        return {path: entry for entry in self.weights for path in entry.modules}


class LowRankLayers(Strict):
    """Matrices that are products of two: :class:`~lmcompress.nn.low_rank.LowRankLinear`.

    Attributes:
        kind: type of the entry.
        rank: inner dimension.
        modules: paths of the modules.
    """

    kind: Literal["low_rank"]
    rank: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    modules: ModulePaths


class FactorizedEmbeddings(Strict):
    """Embedding tables that are a narrow table and a matrix: :class:`~lmcompress.nn.embedding.FactorizedEmbedding`.

    Attributes:
        kind: type of the entry.
        rank: width of the table.
        modules: paths of the modules.
    """

    kind: Literal["factorized_embedding"]
    rank: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    modules: ModulePaths


class GroupedLayers(Strict):
    """Matrices of diagonal blocks: :class:`~lmcompress.nn.grouped.GroupedLinear`.

    Attributes:
        kind: type of the entry.
        groups: number of diagonal blocks.
        input_order: whether the checkpoint has a permutation of the input.
        output_order: whether it has a permutation of the output.
        modules: paths of the modules.
    """

    kind: Literal["grouped"]
    groups: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    input_order: bool = False
    output_order: bool = False
    modules: ModulePaths


class SeparableLayers(Strict):
    """Blocks that mix neighbours and do not attend: :class:`~lmcompress.nn.separable.SeparableMixing`.

    Attributes:
        kind: type of the entry.
        kernel: number of positions covered.
        blocks: numbers of the blocks.
    """

    kind: Literal["separable"]
    kernel: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    blocks: BlockNumbers


class SharedBlocks(Strict):
    """Blocks that share the parameters of an earlier one.

    Attributes:
        kind: type of the entry.
        sources: for each block of the model the number of the block that owns its parameters, possibly its own.
    """

    kind: Literal["shared"]
    sources: BlockNumbers

    @model_validator(mode="after")
    def _sources_own_theirs(self) -> SharedBlocks:
        for block, source in enumerate(self.sources):
            if source > block or self.sources[source] != source:
                raise ValueError(f"block {block} must have its own parameters or an earlier owner's, got {source}")
        return self


CompactLayer = Annotated[
    LowRankLayers | FactorizedEmbeddings | GroupedLayers | SeparableLayers | SharedBlocks, Field(discriminator="kind")
]
"""One kind of compact layer and its places."""


class Layers(Strict):
    """The replacements of matrices, attention and blocks of a stock model.

    Attributes:
        entries: one for each kind and size; no module is in two of them.
    """

    entries: Annotated[tuple[CompactLayer, ...], _FROM_LIST, Field(max_length=MAX_MODULES)]

    @model_validator(mode="after")
    def _each_once(self) -> Layers:
        seen: set[str | int] = set()
        shared = 0
        for entry in self.entries:
            shared += isinstance(entry, SharedBlocks)
            places: tuple[str | int, ...] = ()
            if isinstance(entry, SeparableLayers):
                places = entry.blocks
            elif not isinstance(entry, SharedBlocks):
                places = entry.modules
            for place in places:
                if place in seen:
                    raise ValueError(f"{place} is replaced twice; a module or block is replaced once")
                seen.add(place)
        if shared > 1:
            raise ValueError("blocks are shared in one way or not at all, got several entries")
        return self


class Storage(Strict):
    """The tensors of a checkpoint that are entropy-coded streams; the others are stored as usual.

    Attributes:
        coder: coder of the streams, see :data:`lmcompress.entropy_coding.CODERS`; a stream records how it is decoded.
        streams: bytes of each stream, by the name of its tensor in the file. A model in memory has none, and keeps the
            coder for the next time it is saved.
    """

    coder: Literal["auto", "zstd", "huffman"] = "auto"
    streams: Annotated[
        dict[Annotated[str, Field(max_length=256)], Annotated[int, Field(ge=1, le=1 << 40)]],
        Field(max_length=MAX_MODULES),
    ] = {}


class Provenance(Strict):
    """The origin of a model; without effect on loading.

    Attributes:
        library_version: version of lmcompress that wrote the checkpoint.
        base_model: name or path of the model that was compressed.
        recipe: name of the recipe, if any.
        methods: methods applied, in order.
    """

    library_version: Annotated[str, Field(max_length=64)] = ""
    base_model: Annotated[str, Field(max_length=1024)] = ""
    recipe: Annotated[str, Field(max_length=1024)] = ""
    methods: Annotated[tuple[str, ...], _FROM_LIST, Field(max_length=64)] = ()
