"""What a checkpoint's config may say, as validated data: shapes, encodings, compact layers, streams, provenance."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lmcompress.numerics.grids import PER_TENSOR, Granularity, Grid, PerGroup, PerRow
from lmcompress.numerics.packing import container_for

MAX_BLOCKS, MAX_HEADS, MAX_WIDTH = 1024, 1024, 1 << 20
MAX_MODULES = 1 << 16

# JSON has lists
_FROM_LIST = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
# a text for what equals a number and is none: True == 1, 8.0 == 8
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
    """Data of which every key and type is checked, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BlockShape(Strict):
    """The shape of one Transformer block.

    Attributes:
        heads: attention heads kept; with 0, the attention's answer is the bias of its output projection.
        ffn: neurons of the feed-forward network kept; with 0, its answer is the bias of its second matrix.
        source: number of the block in the model this one was cut from, counted from 0; only for people to read.
    """

    heads: Annotated[int, Field(ge=0, le=MAX_HEADS)]
    ffn: Annotated[int, Field(ge=0, le=MAX_WIDTH)]
    source: Annotated[int, Field(ge=0, lt=MAX_BLOCKS)] | None = None


class Structure(Strict):
    """The shapes of all blocks, in order.

    Blocks are numbered, not named by path: the same map holds for a model with a head and without one.

    Attributes:
        head_size: width of one attention head, the same everywhere.
        blocks: one shape per block; as many as the config says the model has layers.
        hidden: width of the residual stream, where it is not the one that the stock config says.
    """

    head_size: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    blocks: Annotated[tuple[BlockShape, ...], _FROM_LIST, Field(min_length=1, max_length=MAX_BLOCKS)]
    hidden: Annotated[int, Field(ge=1, le=MAX_WIDTH)] | None = None


class ActivationEncoding(Strict):
    """How an activation is quantized before it enters a matmul.

    Attributes:
        bits: 8 or 4.
        symmetric: whether levels lie around 0; else the codes are 0 to 2^bits - 1 with a whole zero point.
        granularity: of dynamic ranges: one for the ``tensor``, or one for each ``token``, the last axis.
        range: ``dynamic``, taken anew from every input; ``static``: scale and zero point are tensors of the checkpoint,
            as ranges that were calibrated or learned end.
        clip: of dynamic ranges: what is beyond ±clip is cut beforehand (TernaryBERT's 2.5); ``None`` cuts nothing.
        full: of symmetric static ranges: the codes are -2^(bits-1) to 2^(bits-1) - 1, as learned ones are; else the
            lowest of these is left out.
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
            raise ValueError("full is for symmetric static ranges only, the others have their codes by themselves")
        return self


class GridEncoding(Strict):
    """The integers that a code may be: ``levels`` of them from ``low``, ``stride`` apart; they fit one byte.

    Attributes:
        low: the least code.
        levels: how many there are.
        stride: from one to the next.
    """

    low: Annotated[int, Field(ge=-128, le=255)]
    levels: Annotated[int, Field(ge=2, le=256)]
    stride: Annotated[int, Field(ge=1, le=255)] = 1

    @model_validator(mode="after")
    def _fits_a_byte(self) -> GridEncoding:
        self.grid()
        return self

    def grid(self) -> Grid:
        """The same as lmcompress.numerics has it."""
        return Grid(self.low, self.levels, self.stride)


class WeightEncoding(Strict):
    """How the weights of some modules lie in the checkpoint; weights are seen as ``(out, in)``, embeddings by token.

    Attributes:
        grid: what codes may be.
        container: how codes lie in bytes, see :mod:`lmcompress.numerics.packing`.
        granularity: which weights share a scale: the ``tensor``, each ``row``, or each n neighbours of a row.
        zero_points: whether there are zero points beside the scales.
        inputs: what happens to the module's input; of the word embeddings, to that of a head which is tied to them.
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
            raise ValueError("zero points belong to a grid whose codes are 0 or more")
        return self

    def grouping(self) -> Granularity:
        """The granularity as lmcompress.numerics has it."""
        if isinstance(self.granularity, int):
            return PerGroup(self.granularity)
        return PER_TENSOR if self.granularity == "tensor" else PerRow()


class AttentionEncoding(Strict):
    """How the attention of every block quantizes the inputs of its two matmuls; ``None`` leaves one as it is.

    Attributes:
        queries, keys: of the matmul before the softmax.
        values, probabilities: of the matmul after it.
    """

    queries: ActivationEncoding | None = None
    keys: ActivationEncoding | None = None
    values: ActivationEncoding | None = None
    probabilities: ActivationEncoding | None = None


class Encoding(Strict):
    """How the tensors of a checkpoint stand for weights, and what happens to activations.

    Attributes:
        weights: one entry for each way that there is; no module is in two of them.
        attention: what happens within attention, the same in all blocks.
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
        kind: what they are.
        rank: width between the two.
        modules: where they are.
    """

    kind: Literal["low_rank"]
    rank: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    modules: ModulePaths


class FactorizedEmbeddings(Strict):
    """Embedding tables that are a narrow table and a matrix: :class:`~lmcompress.nn.embedding.FactorizedEmbedding`.

    Attributes:
        kind: what they are.
        rank: width of the table.
        modules: where they are.
    """

    kind: Literal["factorized_embedding"]
    rank: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    modules: ModulePaths


class GroupedLayers(Strict):
    """Matrices of diagonal blocks: :class:`~lmcompress.nn.grouped.GroupedLinear`.

    Attributes:
        kind: what they are.
        groups: how many blocks.
        input_order: whether the checkpoint has an order in which the input is read.
        output_order: whether it has one in which the output is given.
        modules: where they are.
    """

    kind: Literal["grouped"]
    groups: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    input_order: bool = False
    output_order: bool = False
    modules: ModulePaths


class SeparableLayers(Strict):
    """Blocks that mix neighbours and do not attend: :class:`~lmcompress.nn.separable.SeparableMixing`.

    Attributes:
        kind: what they are.
        kernel: how many positions each looks at.
        blocks: their numbers.
    """

    kind: Literal["separable"]
    kernel: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    blocks: BlockNumbers


class SharedBlocks(Strict):
    """Blocks that have the parameters of an earlier one.

    Attributes:
        kind: what they are.
        sources: for each block of the model the one whose parameters it has; its own number where they are its own.
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
"""One kind of compact layer, and where it is."""


class Layers(Strict):
    """What takes the place of matrices, attention and blocks of a stock model.

    Attributes:
        entries: one for each kind and size that there is; no module is in two of them.
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
    """Which tensors of a checkpoint are entropy-coded streams; the rest is as it would be without.

    Attributes:
        coder: that made them, see :data:`lmcompress.entropy_coding.CODERS`; a stream says itself how it is read.
        streams: bytes of each stream, by the name of its tensor in the file. A model in memory has none, and keeps the
            coder for the next time it is saved.
    """

    coder: Literal["auto", "zstd", "huffman"] = "auto"
    streams: Annotated[
        dict[Annotated[str, Field(max_length=256)], Annotated[int, Field(ge=1, le=1 << 40)]],
        Field(max_length=MAX_MODULES),
    ] = {}


class Provenance(Strict):
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
    methods: Annotated[tuple[str, ...], _FROM_LIST, Field(max_length=64)] = ()
