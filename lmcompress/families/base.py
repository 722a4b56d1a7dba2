"""The declarative description of a family's parts, and a view of a model through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lmcompress.errors import LmcompressError
from lmcompress.families.coupled import (
    ATTENTION_READERS,
    BLOCK_PARTS,
    FFN_READERS,
    READ_STREAM,
    Coupled,
    coupled_heads,
    coupled_neurons,
    rows_of,
)
from lmcompress.families.matrices import in_features, is_matrix, out_features, refuse_unfoldable, scale_queries
from lmcompress.families.narrow import Derived, count_own_heads, remove_heads
from lmcompress.nn.embedding import FactorizedHead

HeadAttributes = Callable[[int, int], dict[str, int]]
"""``(heads, head_size) -> attributes`` that the attention module must have after heads were removed."""


def refused_for_attention(attention: str) -> dict[str, str]:
    """What a family cannot do whose attention is not computed by an attention function of Transformers.

    Args:
        attention: class of the attention module.

    Returns:
        Entries of :attr:`Family.refused`.
    """
    claims = ("attention_features", "attention_distillation", "quantized_attention")
    return dict.fromkeys(claims, f"{attention} computes attention by itself")


@dataclass(frozen=True)
class Family:
    """One model family, described by the paths of its parts.

    Paths are attribute names joined by dots; those of a block are relative to the block, the others to the *base* model
    (``model.base_model``), so that they hold with and without a task head.

    Attributes:
        model_type: ``config.model_type`` of the family.
        blocks: the ``ModuleList`` of Transformer blocks.
        attention: in a block, the module that splits heads.
        query, key, value: in a block, the projections; empty if there is ``qkv``.
        qkv: in a block, one fused projection with query, key and value side by side on its output axis.
        attention_out: in a block, the output projection of attention.
        qkv_interleaved: whether its rows are query, key and value of the first head, then those of the second
            (GPT-NeoX), and not all queries, all keys, all values.
        ffn_in, ffn_out: in a block, the two matrices of the feed-forward network.
        ffn_gate: in a block, the matrix whose activation multiplies the output of ``ffn_in``; empty if there is none.
        ffn_in_copies: 2 if ``ffn_in`` has two matrices side by side on its output axis: the one that the activation
            function is applied to, then the one that it multiplies.
        activation: in a block, the activation function of the feed-forward network, if it is a module that reads all
            that ``ffn_in`` computes; empty with ``ffn_in_copies`` of 2.
        cross_attention: in a block of a decoder that reads an encoder, the module that does.
        cross_query, cross_key, cross_value, cross_out: in such a block, its projections; keys and values are those of
            the encoder's output.
        word_embeddings, position_embeddings: the embedding tables.
        token_type_embeddings, embedding_projection: the same, empty if the family has none.
        causal: whether position i attends only to positions up to i in every model of the family.
        causal_flag: name of the config's field that makes a model causal in families that have both kinds.
        packs: whether documents packed by position ids that start again attend to themselves only.
        num_layers, num_heads, hidden_size, intermediate_size: names of the config's fields.
        embedding_size: name of the config's field for the width of the embeddings; empty if they are as wide as the
            hidden states.
        key_value_heads: name of the config's field; empty if every query head has a key and value of its own.
        head_size: name of the config's field; empty if the size of a head follows from the hidden size.
        per_layer: names of the config's fields that are lists with one entry for each block.
        queries_per_head: name, in the attention module, of the number of query heads that read one key; empty: 1.
        head_attributes: attributes of the attention module to update when it loses heads.
        heads_in_config: name of the config's field for the number of query heads, if the attention module reads it
            there whenever it is called.
        layer_index: paths, in a block, of integers that number the block (caches are indexed by them); a path that a
            block lacks is skipped.
        scores: paths, in a block, of each attention module and of its query projection; one that it lacks is skipped.
        scaling_at: ``(attention module, number of the block) -> factor of q·k`` in families where that depends on the
            number; None: it does not.
        attention_tail: names, in the attention module, of the modules applied to the output of the heads, in order;
            empty if the output projection lies outside.
        final_norm: the norm after the last block, in families whose blocks normalise their input (pre-LN); empty
            if they normalise their output, and the embeddings have a norm of their own.
        embeddings_normed: whether a pre-LN family has a norm after its embeddings as well.
        norm_offset: what norms add to the scale that they store: 1 for Gemma, whose scale is ``1 + weight``.
        stream_scaled: whether the model multiplies its embeddings by a function of the config's hidden size, which then
            cannot change.
        pooler: name of the base model's pooler, a part that models may be built without; empty if the family has none.
        attention_norm, ffn_norm: in a block of such families, the norms that attention and feed-forward network alone
            read; empty if a norm's output is the residual stream as well.
        expects: fields of the config and the values that this description holds for.
        fixed_blocks: numbers of blocks that must stay where they are, because the first ones are unlike the others.
        shared_bias: in the first block of a stack, the table of a bias of the scores that the other blocks are given
            (T5), so that it must stay, and each block is called in a way of its own; empty if there is none.
        casts: in a block, the module of the feed-forward network that casts the input of ``ffn_out`` to the dtype of
            its weight (T5), which codes must not be taken for; empty if there is none.
        refused: what models of this family cannot do, with the reason: keys are claims of :mod:`lmcompress.proof`.
        decoder: the description of the second stack of blocks, in families of an encoder and a decoder that reads it;
            this one is then of the encoder. Both have one residual width and one table of word embeddings.
        variants: descriptions for other values of the fields in ``expects``.
    """

    model_type: str
    blocks: str
    attention: str
    attention_out: str
    ffn_in: str
    ffn_out: str
    word_embeddings: str
    position_embeddings: str
    num_layers: str
    num_heads: str
    hidden_size: str
    intermediate_size: str
    head_attributes: HeadAttributes
    query: str = ""
    key: str = ""
    value: str = ""
    qkv: str = ""
    activation: str = ""
    cross_attention: str = ""
    cross_query: str = ""
    cross_key: str = ""
    cross_value: str = ""
    cross_out: str = ""
    token_type_embeddings: str = ""
    embedding_projection: str = ""
    causal: bool = False
    causal_flag: str = ""
    packs: bool = False
    layer_index: tuple[str, ...] = field(default_factory=tuple)
    scores: tuple[tuple[str, str], ...] = ()
    scaling_at: Callable[[Any, int], float] | None = None
    attention_tail: tuple[str, ...] = ()
    final_norm: str = ""
    pooler: str = ""
    attention_norm: str = ""
    ffn_norm: str = ""
    heads_in_config: str = ""
    qkv_interleaved: bool = False
    ffn_gate: str = ""
    ffn_in_copies: int = 1
    embedding_size: str = ""
    key_value_heads: str = ""
    head_size: str = ""
    per_layer: tuple[str, ...] = ()
    queries_per_head: str = ""
    embeddings_normed: bool = False
    norm_offset: float = 0.0
    stream_scaled: bool = False
    expects: tuple[tuple[str, Any], ...] = ()
    fixed_blocks: tuple[int, ...] = ()
    shared_bias: str = ""
    casts: str = ""
    refused: Mapping[str, str] = field(default_factory=dict, hash=False)
    decoder: Family | None = None
    variants: tuple[Family, ...] = ()

    @property
    def gated(self) -> bool:
        """Whether the activation of the feed-forward network is multiplied by a gate, so that it has both signs."""
        return bool(self.ffn_gate) or self.ffn_in_copies > 1

    @property
    def stacks(self) -> tuple[Family, ...]:
        """The descriptions of its lists of blocks, in the order in which they run."""
        return (self,) if self.decoder is None else (self, self.decoder)


class Block:
    """One Transformer block of a model, seen through its family's paths.

    Args:
        module: the block.
        family: the description of its family.
        model: the model it belongs to, whose config describes it; None if it belongs to none.
    """

    def __init__(self, module: nn.Module, family: Family, model: PreTrainedModel | None = None) -> None:
        self.module = module
        self.family = family
        self.model = model

    def get(self, part: str) -> nn.Module:
        """The submodule that the family calls ``part``.

        Args:
            part: name such as ``"ffn_in"``.

        Raises:
            LmcompressError: If the family has no such part.
        """
        path = getattr(self.family, part)
        if not path:
            raise LmcompressError(f"{self.family.model_type} has no {part}")
        try:
            return self.module.get_submodule(path)
        except AttributeError as error:
            raise LmcompressError(
                f"this block has no {part}: it mixes neighbours in place of attention (lmcompress.students.separate)"
            ) from error

    def has(self, part: str) -> bool:
        """Whether the family has this part and the block still does: one that mixes neighbours has no queries.

        Args:
            part: name such as ``"query"``.
        """
        path = getattr(self.family, part)
        return bool(path) and any(name == path for name, _ in self.module.named_modules())

    def replace(self, part: str, new: nn.Module) -> None:
        """Replace the family's ``part`` by ``new``."""
        parent, _, name = getattr(self.family, part).rpartition(".")
        setattr(self.module.get_submodule(parent), name, new)

    def parts(self) -> list[str]:
        """The matrices that this block has, in the order in which they are computed."""
        return [part for part in BLOCK_PARTS if self.has(part)]

    def readers(self, of: Literal["attention", "ffn"]) -> tuple[str, ...]:
        """The matrices that read the input of a sub-layer, and so the same tensor.

        Args:
            of: the sub-layer.
        """
        return tuple(part for part in (ATTENTION_READERS if of == "attention" else FFN_READERS) if self.has(part))

    def stream_readers(self) -> list[str]:
        """The matrices that read the residual stream."""
        return [part for part in self.parts() if part in READ_STREAM]

    def attentions(self) -> list[nn.Module]:
        """The modules that compute attention with at least one head: to its own stack, then to the encoder."""
        found = [self.get("attention")] if self.num_heads else []
        return [*found, self.get("cross_attention")] if self.has("cross_attention") else found

    @property
    def looks_back(self) -> bool:
        """Whether it belongs to a decoder that reads an encoder, and so attends to earlier tokens of its own only."""
        return bool(self.family.cross_attention)

    def coupled(self, kind: Literal["heads", "neurons"]) -> list[Coupled]:
        """The matrices that are cut together with heads or neurons.

        Args:
            kind: of unit.
        """
        if kind == "heads":
            return coupled_heads(vars(self.family), self.head_size, self.queries)
        return coupled_neurons(vars(self.family))

    def units(self, kind: Literal["heads", "neurons"]) -> int:
        """Current number of heads or neurons.

        Args:
            kind: of unit.
        """
        return self.num_heads if kind == "heads" else self.ffn_width

    def rows(self, role: str) -> tuple[str, Tensor]:
        """The matrix that computes the queries, keys or values of this block, and which of its rows do.

        Args:
            role: ``query``, ``key`` or ``value``.

        Returns:
            The part, and rows, int64, head after head; of queries, those of a key/value head together.
        """
        return rows_of(vars(self.family), role, self.num_heads, self.head_size, self.queries)

    @property
    def value_part(self) -> str:
        """The matrix that computes values, alone or with others."""
        return "qkv" if self.family.qkv else "value"

    @property
    def head_size(self) -> int:
        """Width of one query, key or value."""
        attention = self.get("attention")
        for name in ("attention_head_size", "head_dim", "head_size", "key_value_proj_dim"):
            if isinstance(size := getattr(attention, name, None), int):
                return size
        raise LmcompressError(f"{type(attention).__name__} does not say how wide its heads are")

    @property
    def queries(self) -> int:
        """Number of query heads that read one key/value head."""
        name = self.family.queries_per_head
        return int(getattr(self.get("attention"), name)) if name else 1

    @property
    def head_width(self) -> int:
        """Width of the output of one head: that of all its queries."""
        return self.head_size * self.queries

    @property
    def num_heads(self) -> int:
        """Current number of attention heads of this block; of grouped queries, key/value heads with their queries."""
        return in_features(self.get("attention_out")) // self.head_width

    @property
    def ffn_width(self) -> int:
        """Current number of neurons of this block's feed-forward network."""
        return in_features(self.get("ffn_out"))

    def set_heads(self, heads: int) -> None:
        """Set the number of heads in the attention module, if any; matrices are unchanged."""
        attention = self.get("attention")
        for name, value in self.family.head_attributes(heads, self.head_size).items():
            setattr(attention, name, value)
        if heads == 0:
            remove_heads(attention, self.family.attention_tail)
        elif self.family.heads_in_config:
            count_own_heads(attention, self.family.heads_in_config, heads * self.queries)

    def set_index(self, index: int) -> None:
        """Renumber the block, so that key/value caches stay dense when earlier blocks were removed.

        What its attention owes to the number it had is multiplied into its queries, so that it computes the same.

        Args:
            index: new number, from 0.

        Raises:
            LmcompressError: If there is something to multiply, and the queries have no plain matrix.
        """
        for path, query, factor in self.number_factors(index):
            scale_queries(self.module.get_submodule(query), factor, fused=query == self.family.qkv)
            attention: Any = self.module.get_submodule(path)
            attention.scaling = cast(Any, self.family.scaling_at)(attention, index)
        for path in self.family.layer_index:
            parent, _, name = path.rpartition(".")
            if any(known == parent for known, _ in self.module.named_modules()):
                setattr(self.module.get_submodule(parent), name, index)

    def number_factors(self, index: int) -> list[tuple[str, str, float]]:
        """What would change in the block's attention if it got another number.

        Args:
            index: that number.

        Returns:
            Paths of an attention module and of its query projection, and the factor of these queries by which it
            computes the same.

        Raises:
            LmcompressError: If these queries have no plain matrix to multiply.
        """
        if (scaling_at := self.family.scaling_at) is None:
            return []
        modules, found = dict(self.module.named_modules()), []
        for path, query in self.family.scores:
            attention: Any = modules.get(path)
            # attention without heads, or that mixes neighbours, has no scores
            if attention is None or isinstance(attention, Derived) or attention.scaling == scaling_at(attention, index):
                continue
            refuse_unfoldable(modules[query], f"{path} is scaled by the number of its block, which changes")
            found.append((path, query, attention.scaling / scaling_at(attention, index)))
        return found

    def undescribed(self) -> list[str]:
        """Paths, in the block, of matrices that its family does not describe, such as GPT-2's of cross-attention."""
        family = self.family
        known = [*(getattr(family, part) for part in BLOCK_PARTS), family.shared_bias]
        return [
            name
            for name, module in self.module.named_modules()
            if is_matrix(module) and not any(path and f"{name}.".startswith(f"{path}.") for path in known)
        ]


class Anatomy:
    """A model seen through its family: blocks, embeddings, and the sizes that its config names.

    Args:
        model: a ``PreTrainedModel`` with or without a head, on any device, ``meta`` included.
        family: the family's description.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model = model
        self.family = family

    @property
    def base(self) -> nn.Module:
        """The model without its task head."""
        return self.model.base_model

    @property
    def body(self) -> nn.Module:
        """The module whose output the head reads: the base model, or the part of it that heads call (OPT, decoders)."""
        if self.reads_encoder:
            decoder: nn.Module = self.model.get_decoder()
            return decoder
        return self.base.get_submodule(self.family.final_norm.rpartition(".")[0])

    @property
    def block_lists(self) -> list[nn.ModuleList]:
        """The lists that hold the blocks' modules: one for each stack.

        Raises:
            LmcompressError: If something else has replaced one.
        """
        found = []
        for stack in self.family.stacks:
            blocks = self.base.get_submodule(stack.blocks)
            if not isinstance(blocks, nn.ModuleList):
                raise LmcompressError(
                    f"the blocks of a {self.family.model_type} must be a ModuleList at {stack.blocks}, got a "
                    f"{type(blocks).__name__}; something else has wrapped them: undo that first"
                )
            found.append(blocks)
        return found

    @property
    def block_list(self) -> nn.ModuleList:
        """The blocks' modules in the order in which they run; of two stacks a new list, to be read only.

        Raises:
            LmcompressError: If something else has replaced the list of a stack.
        """
        lists = self.block_lists
        return lists[0] if len(lists) == 1 else nn.ModuleList([block for blocks in lists for block in blocks])

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order: those of an encoder, then those of its decoder."""
        stacks = zip(self.family.stacks, self.block_lists, strict=True)
        return [Block(module, stack, self.model) for stack, blocks in stacks for module in blocks]

    def path(self, index: int) -> str:
        """The path of a block.

        Args:
            index: its number.
        """
        start = max(start for start in self.starts if start <= index)
        return f"{self.family.stacks[self.starts.index(start)].blocks}.{index - start}"

    @property
    def starts(self) -> tuple[int, ...]:
        """The number of the first block of each stack."""
        sizes = [len(blocks) for blocks in self.block_lists]
        return tuple(sum(sizes[:stack]) for stack in range(len(sizes)))

    @property
    def fixed_blocks(self) -> tuple[int, ...]:
        """Numbers of the blocks that must stay where they are."""
        stacks = zip(self.starts, self.family.stacks, strict=True)
        return tuple(start + number for start, stack in stacks for number in stack.fixed_blocks)

    @property
    def hidden_size(self) -> int:
        """Current width of the residual stream; after a cut, the config may have that of the stock skeleton."""
        return out_features(self.blocks[0].get("ffn_out"))

    @property
    def embeddings_normed(self) -> bool:
        """Whether a norm follows the embeddings before the first block."""
        return self.family.embeddings_normed or not self.family.final_norm

    @property
    def causal(self) -> bool:
        """Whether position i attends only to positions up to i in this model."""
        flag = self.family.causal_flag
        return self.family.causal or bool(flag and getattr(self.model.config, flag, False))

    @property
    def packs(self) -> bool:
        """Whether documents packed by position ids that start again attend to themselves only."""
        return self.family.packs

    @property
    def head(self) -> nn.Linear | FactorizedHead | None:
        """The vocabulary head of a causal family, whose input is the base model's output, or None if there is none."""
        head = self.model.get_output_embeddings() if self.family.causal else None
        return head if isinstance(head, (nn.Linear, FactorizedHead)) else None

    @property
    def predicts_next(self) -> bool:
        """Whether each position's logits are for the next token, as in any causal language model."""
        names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        return self.head is not None or any(known.__name__ in names for known in type(self.model).__mro__)

    def embeddings(self, part: str) -> list[nn.Module]:
        """The embedding tables that the families of the stacks call ``part``, each once."""
        found = [Anatomy(self.model, stack).embedding(part) for stack in self.family.stacks]
        return list({id(table): table for table in found if table is not None}.values())

    @property
    def reads_encoder(self) -> bool:
        """Whether the model has a decoder that reads an encoder, whose inputs and labels are sequences of their own."""
        return self.family.decoder is not None

    def embedding(self, part: str) -> nn.Module | None:
        """The embedding table that the family calls ``part``, or None if the family or this model has none."""
        path = getattr(self.family, part)
        # ELECTRA has its projection only if embeddings and hidden states differ in width
        present = path and any(name == path for name, _ in self.base.named_modules())
        return self.base.get_submodule(path) if present else None


def config_value(config: PretrainedConfig, family: Family, part: str) -> Any:
    """The value of the config field that the family uses for ``part``, such as ``"intermediate_size"``."""
    # the classes of some configs have no field for what others of their family name
    optional = part in ("head_size", "key_value_heads")
    return getattr(config, getattr(family, part), *((None,) if optional else ()))


def choose_layers_in_config(config: PretrainedConfig, family: Family, layers: Sequence[int]) -> None:
    """Let a config describe some of the blocks of one stack: their number, and their entries of its lists.

    Args:
        config: modified in place.
        family: the description of the stack.
        layers: numbers of the blocks in the stack, in their new order.
    """
    setattr(config, family.num_layers, len(layers))
    for name in family.per_layer:
        said = getattr(config, name, None)
        if isinstance(said, (list, tuple)) and len(said) > max(layers):
            setattr(config, name, [said[i] for i in layers])
