"""Unknown families: their parts found by forward passes and gradients on a tiny random copy, for the proof to confirm.

Parts are found by what they compute: attention is what calls the attention function, a projection of queries is what
they have gradients in, a norm belongs to the matrices that are given its output. What is found is only a claim, and
:func:`adopt` takes of it what :func:`~lmcompress.proof.prove.prove` confirms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lmcompress.checkpoint.structure import forget, register
from lmcompress.errors import LmcompressError
from lmcompress.families import FAMILIES, Anatomy, Family, is_conv1d, weight_view
from lmcompress.families.coupled import ROLES, rows_of
from lmcompress.families.norms import is_norm
from lmcompress.nn.listening import Heard, listen
from lmcompress.proof.prove import Proof, prove
from lmcompress.proof.tiny import LAYERS, POSITIONS, tiny_inputs, tiny_model

_FIELDS = {
    "num_layers": ("num_hidden_layers", "n_layers", "n_layer", "num_layers"),
    "num_heads": ("num_attention_heads", "n_heads", "n_head", "num_heads"),
    "hidden_size": ("hidden_size", "dim", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim", "d_ff"),
    "key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_size": ("head_dim",),
    "embedding_size": ("embedding_size",),
}
"""What a config may call its sizes."""

_OPTIONAL = ("key_value_heads", "head_size", "embedding_size")


def discover(config: PretrainedConfig) -> Family:
    """A description of a family, found on a tiny random copy of a config in some tenths of a second.

    Args:
        config: a config of any architecture of Transformers with one stack of blocks.

    Returns:
        The description, unproven. What packs documents, scales the stream by its width or reads its number of heads in
        the config is not seen; the proof fails where that matters.

    Raises:
        LmcompressError: If the parts are not those of a Transformer block, with the reason.
    """
    sizes = _sizes(config)
    model = tiny_model(config, family=sizes)
    try:
        with torch.random.fork_rng(devices=[]):
            return _described(model, sizes)
    except LmcompressError as error:
        raise LmcompressError(f"the parts of {config.model_type!r} were not found: {error}") from error


def adopt(config: PretrainedConfig) -> Proof:
    """Describe an unknown family by :func:`discover`, as far as its proof holds, until the process ends.

    A process that loads a checkpoint of such a model adopts its family first, from its config.

    Args:
        config: a config of the family.

    Returns:
        The proof. Claims that failed are refused from now on, with the reason.

    Raises:
        LmcompressError: If the family is described already, its parts were not found, or a model of it, as it is, does
            not survive being saved and loaded.
    """
    name = config.model_type
    if name in FAMILIES:
        raise LmcompressError(f"the family {name!r} is described already; there is nothing to find out")
    register(discover(config))
    try:
        proof = prove(config)
        if not proof["dense"].holds:
            raise LmcompressError(f"the family {name!r} cannot be adopted: {proof['dense'].reason}")
    except BaseException:
        forget(name)
        raise
    register(replace(FAMILIES[name], refused={one.claim: one.reason for one in proof.failed}))
    return proof


def _sizes(config: PretrainedConfig) -> Family:
    """A description of nothing but the config's fields, from which a tiny copy can be made."""
    said = type(config)().to_dict() | config.to_dict()
    found: dict[str, Any] = {}
    for part, names in _FIELDS.items():
        name = next((name for name in names if name in said), "")
        if not name and part not in _OPTIONAL:
            raise LmcompressError(f"the config of {config.model_type!r} has none of the fields {', '.join(names)}")
        found[part] = name
    count = getattr(config, found["num_layers"])
    lists = tuple(name for name, value in said.items() if isinstance(value, (list, tuple)) and len(value) == count)
    return Family(
        model_type=config.model_type, blocks="", attention="", attention_out="", ffn_in="", ffn_out="",
        word_embeddings="", position_embeddings="", head_attributes=lambda heads, size: {}, per_layer=lists, **found,
    )  # fmt: skip


@dataclass
class _Seen:
    """What happened in one forward pass.

    Attributes:
        order: modules of the last block by path as they were called, and ``(path, Heard)`` of attention functions.
        reads, writes: the input and the output of each module of the block.
        outside: norms and projections outside of the blocks, and ``""`` for the blocks, in order.
    """

    order: list[str | tuple[str, Heard]] = field(default_factory=list)
    reads: dict[str, Tensor] = field(default_factory=dict)
    writes: dict[str, Tensor] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)


def _described(model: PreTrainedModel, sizes: Family) -> Family:
    base: nn.Module = model.base_model
    path = _block_list(base)
    blocks = cast(nn.ModuleList, base.get_submodule(path))
    # the first blocks of some families are unlike the others
    block = blocks[-1]
    seen = _watch(model, base, path, block)
    calls = [one for one in seen.order if isinstance(one, tuple)]
    if len(calls) != 1:
        raise LmcompressError(f"a block calls the attention function {len(calls)} times, not once")
    attention, heard = calls[0]
    parts = _projections(block, seen, attention, heard)
    parts |= _feed_forward(model, block, seen, parts)
    found = replace(sizes, blocks=path, attention=attention, **parts)
    found = replace(found, **_of_attention(blocks, found, heard, seen))
    found = replace(found, **_norms(base, blocks, seen, found))
    return replace(found, **_outside(model, base, seen, found))


def _block_list(base: nn.Module) -> str:
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == LAYERS and len({type(one) for one in module}) == 1
    }
    if not sizes:
        raise LmcompressError(f"there is no list of {LAYERS} blocks of one class, as many as the config says")
    return max(sizes, key=lambda name: sizes[name])


def _matrices(block: nn.Module) -> dict[str, nn.Module]:
    return {name: one for name, one in block.named_modules() if isinstance(one, nn.Linear) or is_conv1d(one)}


def _watch(model: PreTrainedModel, base: nn.Module, path: str, block: nn.Module) -> _Seen:
    seen = _Seen()
    handles: list[Any] = []

    def watch(name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor):
                seen.reads[name] = args[0]

        def after(_: nn.Module, args: Any, output: Any) -> None:
            seen.order.append(name)
            if isinstance(output, Tensor):
                seen.writes[name] = output

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    def hears(name: str) -> Callable[[Heard], None]:
        return lambda heard: seen.order.append((name, heard))

    def outside(name: str) -> Callable[..., None]:
        return lambda *_: seen.outside.append(name)

    for name, module in block.named_modules():
        if name and next(module.children(), None) is None:
            watch(name, module)
        if name and hasattr(module, "config"):
            try:
                handles.append(listen(module, hears(name)))
            except LmcompressError:
                # it does not call the attention function
                continue
    handles.append(block.register_forward_hook(outside("")))
    for name, module in base.named_modules():
        if not name.startswith(f"{path}.") and (is_norm(module) or isinstance(module, nn.Linear)):
            handles.append(module.register_forward_hook(outside(name)))
    try:
        with torch.enable_grad():
            model(**tiny_inputs(model, rows=1, padded=False))
    except Exception as error:
        raise LmcompressError(f"a forward pass of token ids alone fails: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _projections(block: nn.Module, seen: _Seen, attention: str, heard: Heard) -> dict[str, Any]:
    """The matrices of attention: those that queries, keys and values have gradients in, and the next one."""
    matrices = _matrices(block)
    at = next(i for i, one in enumerate(seen.order) if isinstance(one, tuple))
    before = [name for name in matrices if name in seen.order[:at]]
    rows: dict[str, dict[str, Tensor]] = {}
    for role, operand in zip(ROLES, (heard.query, heard.key, heard.value), strict=True):
        weights = [matrices[name].get_parameter("weight") for name in before]
        generator = torch.Generator().manual_seed(0)
        factors = torch.randn(operand.shape, generator=generator)
        gradients = torch.autograd.grad((operand * factors).sum(), weights, retain_graph=True, allow_unused=True)
        for name, gradient in zip(before, gradients, strict=True):
            if gradient is None or not bool(gradient.any()):
                continue
            by_row = gradient.t() if is_conv1d(matrices[name]) else gradient
            rows.setdefault(name, {})[role] = by_row.abs().sum(1).nonzero().flatten()
    after = [one for one in seen.order[at:] if isinstance(one, str) and one in matrices]
    parts: dict[str, Any] = {"attention_out": after[0]}
    if all(len(roles) == 1 for roles in rows.values()) and len(rows) == len(ROLES):
        return parts | {role: name for name, roles in rows.items() for role in roles}
    if len(rows) != 1:
        raise LmcompressError(f"queries, keys and values are computed by {', '.join(rows) or 'no matrix'} together")
    name, roles = next(iter(rows.items()))
    keys, size = heard.key.shape[1], heard.key.shape[-1]
    for interleaved in (False, True):
        paths: dict[str, Any] = {"qkv": name, "qkv_interleaved": interleaved}
        wanted = {role: rows_of(paths, role, keys, size, heard.query.shape[1] // keys)[1] for role in ROLES}
        if all(torch.equal(wanted[role].sort().values, roles[role]) for role in ROLES):
            return parts | paths
    raise LmcompressError(f"{name} holds queries, keys and values in an order that is not known")


def _feed_forward(
    model: PreTrainedModel, block: nn.Module, seen: _Seen, attention: Mapping[str, Any]
) -> dict[str, Any]:
    """The matrices that are left: the last one called reads what the others compute."""
    matrices = _matrices(block)
    called = [one for one in seen.order if isinstance(one, str) and one in matrices]
    left = [name for name in called if name not in attention.values()]
    if len(left) not in (2, 3) or len(left) != len(matrices) - len(set(attention.values()) & set(matrices)):
        raise LmcompressError(
            f"beside attention, a block has {', '.join(left) or 'no matrices'}, not two or three matrices"
        )
    *firsts, last = left
    width = weight_view(matrices[last]).shape[1]
    widths = [weight_view(matrices[name]).shape[0] for name in firsts]
    if widths == [2 * width]:
        return {"ffn_in": firsts[0], "ffn_in_copies": 2, "ffn_out": last}
    if any(one != width for one in widths):
        raise LmcompressError(f"{last} reads {width} numbers, and {', '.join(firsts)} compute {widths}")
    if len(firsts) == 1:
        return {"ffn_in": firsts[0], "ffn_out": last} | _activation(block, seen, firsts[0])

    def output(factor: float) -> Tensor:
        """What the last matrix reads if the output of the first one is multiplied."""
        read: list[Tensor] = []
        handles = [
            matrices[firsts[0]].register_forward_hook(lambda _, args, out: out * factor),
            matrices[last].register_forward_pre_hook(lambda _, args: read.append(args[0])),
        ]
        with torch.no_grad():
            model(**tiny_inputs(model, rows=1, padded=False))
        for handle in handles:
            handle.remove()
        return read[0]

    # the network is linear in what the gate multiplies
    linear = torch.allclose(output(2.0), 2 * output(1.0), rtol=1e-4, atol=1e-5)
    plain, gate = firsts if linear else reversed(firsts)
    return {"ffn_in": plain, "ffn_gate": gate, "ffn_out": last}


def _activation(block: nn.Module, seen: _Seen, ffn_in: str) -> dict[str, str]:
    written = seen.writes[ffn_in]
    names = [name for name, tensor in seen.reads.items() if tensor is written and not _has_weights(block, name)]
    return {"activation": names[0]} if names else {}


def _has_weights(block: nn.Module, name: str) -> bool:
    return next(block.get_submodule(name).parameters(), None) is not None


def _of_attention(blocks: nn.ModuleList, found: Family, heard: Heard, seen: _Seen) -> dict[str, Any]:
    """What the attention module says of heads and of the number of its block."""
    module = blocks[-1].get_submodule(found.attention)
    heads, keys, size = heard.query.shape[1], heard.key.shape[1], heard.query.shape[-1]
    numbers = {name: value for name, value in vars(module).items() if type(value) is int}
    told = {
        name: value
        for name, value in numbers.items()
        if (value == keys and "heads" in name)
        or (value == keys * size and any(part in name for part in ("all_head", "split", "inner")))
    }
    groups = next((name for name, value in numbers.items() if "group" in name and value == heads // keys), "")
    index = tuple(
        f"{name}.{attribute}".lstrip(".")
        for name, inner in blocks[-1].named_modules()
        for attribute, value in vars(inner).items()
        if type(value) is int and _counts(blocks, name, attribute)
    )
    prefix = f"{found.attention}."
    at = next(i for i, one in enumerate(seen.order) if isinstance(one, tuple))
    tail = [one for one in seen.order[at:] if isinstance(one, str) and one.startswith(prefix)]
    return {
        "head_attributes": lambda heads, size: {n: heads if v == keys else heads * size for n, v in told.items()},
        "queries_per_head": groups,
        "key_value_heads": found.key_value_heads if groups else "",
        "layer_index": index,
        "attention_tail": tuple(name.removeprefix(prefix) for name in tail),
    }


def _counts(blocks: nn.ModuleList, name: str, attribute: str) -> bool:
    modules: Iterable[nn.Module] = (block.get_submodule(name) for block in blocks)
    return [getattr(module, attribute, None) for module in modules] == list(range(len(blocks)))


def _norms(base: nn.Module, blocks: nn.ModuleList, seen: _Seen, found: Family) -> dict[str, Any]:
    """Norms by the identity of tensors: whose output do attention and the feed-forward network read?"""
    block = blocks[-1]
    norms = [name for name, module in block.named_modules() if is_norm(module) and name in seen.writes]

    def of(part: str) -> str:
        return next((name for name in norms if seen.writes[name] is seen.reads[part]), "")

    attention, ffn = of(found.qkv or found.query), of(found.ffn_in)
    at = seen.outside.index("")
    last = [name for name in seen.outside[at + 1 :] if is_norm(base.get_submodule(name))]
    first = [name for name in seen.outside[:at] if is_norm(base.get_submodule(name))]
    # a norm whose output is the stream as well comes after the sub-layer
    before = bool(last) and bool(attention)
    if not before:
        return {"final_norm": last[-1] if last else ""}
    alone = attention != ffn
    fixed = tuple(
        number
        for number, other in enumerate(blocks)
        if {n for n, m in other.named_modules() if is_norm(m)} != {n for n, m in block.named_modules() if is_norm(m)}
    )
    return {
        "final_norm": last[-1],
        "attention_norm": attention if alone else "",
        "ffn_norm": ffn if alone else "",
        "embeddings_normed": bool(first),
        "norm_offset": _offset(block.get_submodule(attention), seen.reads[attention]),
        "fixed_blocks": fixed,
    }


def _offset(norm: nn.Module, x: Tensor) -> float:
    """1 for a norm whose scale is ``1 + weight``: with weights of zero it does not return zero."""
    trial = copy.deepcopy(norm)
    with torch.no_grad():
        for parameter in trial.parameters():
            parameter.zero_()
        return 1.0 if bool(trial(x).any()) else 0.0


def _outside(model: PreTrainedModel, base: nn.Module, seen: _Seen, found: Family) -> dict[str, Any]:
    tables = {name: module for name, module in base.named_modules() if isinstance(module, nn.Embedding)}
    words = model.get_input_embeddings()
    types = getattr(model.config, "type_vocab_size", None)

    def table(fits: Callable[[nn.Embedding], bool]) -> str:
        return next((name for name, one in tables.items() if one is not words and fits(one)), "")

    at = seen.outside.index("")
    projection = [name for name in seen.outside[:at] if isinstance(base.get_submodule(name), nn.Linear)]
    return {
        "word_embeddings": next(name for name, one in tables.items() if one is words),
        "position_embeddings": table(lambda one: one.num_embeddings >= POSITIONS),
        "token_type_embeddings": table(lambda one: one.num_embeddings == types),
        "embedding_projection": projection[0] if projection and found.embedding_size else "",
        "pooler": "pooler" if isinstance(getattr(base, "pooler", None), nn.Module) else "",
        "causal": _is_causal(model, found),
    }


def _is_causal(model: PreTrainedModel, found: Family) -> bool:
    """Whether another last token changes nothing before it."""
    batch = tiny_inputs(model, rows=1, padded=False)
    other = batch | {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, -1] = 2 + (batch["input_ids"][:, -1] - 1) % (model.config.vocab_size - 2)
    states: list[Tensor] = []

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handle = Anatomy(model, found).block_list[-1].register_forward_hook(keep)
    try:
        with torch.no_grad():
            model(**batch)
            model(**other)
    finally:
        handle.remove()
    return torch.allclose(states[0][:, :-1], states[1][:, :-1], atol=1e-5)
