"""Which matrices of a model are quantized to what, decided and checked before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.layers import refuse_compact
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import Anatomy, Hollow, anatomy_of, is_conv1d
from lmcompress.quantization.config import ActivationScheme, QuantizationConfig, Rule, WeightScheme

BLOCK_PARTS = ("query", "key", "value", "qkv", "attention_out", "ffn_in", "ffn_out")
EMBEDDINGS, HEAD = "embeddings", "head"
_ONE_SIDED = ("ffn_out",)
_READS_ALIKE = ("query", "key", "value")


@dataclass(frozen=True)
class Planned:
    """What one matrix gets.

    Attributes:
        path: its module, relative to the base model; of a task head by its own name.
        part: what the family calls it, such as ``ffn_in``, ``embeddings`` or ``head``; empty for others.
        block: number of its block, counted from 0, or ``None`` outside of the blocks.
        weights: how it is quantized.
        inputs: what happens to its input (``symmetric`` is decided); of embeddings, to the input of a head that is tied
            to them.
        tied: paths of other modules that have the same matrix.
    """

    path: str
    part: str
    block: int | None
    weights: WeightScheme
    inputs: ActivationScheme | None
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is quantized, and what is not and why.

    Attributes:
        matrices: what is, in the order of the model.
        attention: what happens to queries, keys and values, or ``None``; probabilities get the same with ``auto``
            decided for them.
        dense: what stays dense and could have been quantized, or is asked for at times: path to reason.
    """

    matrices: tuple[Planned, ...]
    attention: ActivationScheme | None
    dense: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds: dict[str, list[str]] = {}
        for planned in self.matrices:
            scheme, inputs = planned.weights, planned.inputs
            what = f"{scheme.name} {scheme.bits} by {scheme.granularity}"
            if inputs is not None:
                what += f", inputs {inputs.bits} bits {inputs.range} {'' if inputs.symmetric else 'a'}symmetric"
            kinds.setdefault(what, []).append(planned.path)
        lines = [f"{len(paths)} matrices: {what} ({_some(paths)})" for what, paths in kinds.items()]
        if self.attention is not None:
            lines.append(f"attention: {self.attention.bits} bits {self.attention.range}")
        reasons: dict[str, list[str]] = {}
        for path, reason in self.dense.items():
            reasons.setdefault(reason, []).append(path)
        return "\n".join([*lines, *(f"dense: {_some(paths)}: {reason}" for reason, paths in reasons.items())])


@dataclass
class _Candidate:
    """A module that could be quantized, and what it is."""

    path: str
    module: nn.Module
    part: str = ""
    block: int | None = None
    tied: list[str] = field(default_factory=list)
    tied_to: str = ""

    def names(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.path, self.part)))


def plan(model: PreTrainedModel, config: QuantizationConfig) -> Plan:
    """Decide which module gets what; nothing is changed.

    Quantized by default are the projections of the blocks, the word embeddings, and with these a head that is tied to
    them. Position and token type embeddings always stay dense, as do norms and biases; what else has a matrix (pooler,
    task head, projection of embeddings) does unless a rule names it.

    Args:
        model: of a known family, stock or cut.
        config: what is wanted.

    Returns:
        The plan.

    Raises:
        LmcompressError: a rule that names nothing or nothing that can be quantized, a group size that does not divide,
            a matrix that something else has parametrized, or nothing to quantize.
    """
    refuse_compact(model, "quantize")
    candidates, dense = _candidates(model)
    chosen = _rules_by_path(config.rules, candidates, dense)
    matrices: dict[str, Planned] = {}
    head_inputs: dict[str, ActivationScheme | None] = {}
    for candidate in candidates:
        rule = chosen.get(candidate.path)
        if candidate.tied_to:
            head_inputs[candidate.tied_to] = _activations(rule, config)
            continue
        weights = _weights(candidate, rule, config)
        if isinstance(weights, str):
            dense[candidate.path] = weights
            continue
        inputs = None if candidate.part == EMBEDDINGS else _activations(rule, config)
        if inputs is not None:
            inputs = inputs.resolved(one_sided=candidate.part in _ONE_SIDED)
        _check(candidate, weights)
        matrices[candidate.path] = Planned(
            candidate.path, candidate.part, candidate.block, weights, inputs, tuple(candidate.tied)
        )
    for path, inputs in head_inputs.items():
        if path in matrices:
            resolved = None if inputs is None else inputs.resolved(one_sided=False)
            matrices[path] = Planned(path, EMBEDDINGS, None, matrices[path].weights, resolved, matrices[path].tied)
        else:
            dense |= {c.path: f"it is tied to {path}, which stays dense" for c in candidates if c.tied_to == path}
    if not matrices:
        raise LmcompressError(
            f"nothing of this {type(model).__name__} would be quantized: "
            + "; ".join(f"{path}: {reason}" for path, reason in list(dense.items())[:4])
            + ". Give the config weights or embeddings, or take the rules away that leave all dense"
        )
    attention = config.attention_scheme()
    if attention is not None and not any(block.num_heads for block in anatomy_of(model).blocks):
        attention = None
    return Plan(tuple(matrices.values()), attention, dense)


def stored_weight(module: nn.Module) -> Tensor | None:
    """The parameter that a module itself holds as its weight, whatever reading ``.weight`` gives.

    Args:
        module: any.

    Returns:
        The parameter, or ``None``.
    """
    return module._parameters.get("weight")


def reads_alike(part: str) -> bool:
    """Whether the modules of this part in one block all read one tensor: query, key and value do.

    Args:
        part: as :attr:`Planned.part`.

    Returns:
        Whether they share their input.
    """
    return part in _READS_ALIKE


def relative_path(model: PreTrainedModel, name: str) -> str:
    """The path of a module, the same with a task head and without.

    Args:
        model: that has it.
        name: as ``named_modules`` gives it.

    Returns:
        The name without the base model's prefix.
    """
    return name.removeprefix(f"{model.base_model_prefix}.")


def _candidates(model: PreTrainedModel) -> tuple[list[_Candidate], dict[str, str]]:
    anatomy = anatomy_of(model)
    parts = _parts_by_module(anatomy)
    kept = {
        id(module): part.replace("_", " ")
        for part in ("position_embeddings", "token_type_embeddings")
        if (module := anatomy.embedding(part)) is not None
    }
    words = anatomy.embedding("word_embeddings")
    head = model.get_output_embeddings()
    found: list[_Candidate] = []
    by_weight: dict[int, _Candidate] = {}
    dense: dict[str, str] = {}
    for name, module in model.named_modules():
        path = relative_path(model, name)
        if isinstance(module, Hollow):
            dense[path] = "pruned to nothing, it has no weights"
            continue
        if not (isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module)):
            continue
        if id(module) in kept:
            dense[path] = f"{kept[id(module)]} always stay dense"
            continue
        weight = stored_weight(module)
        if weight is None:
            raise LmcompressError(
                f"{path} must hold its weight as a plain parameter to be quantized, got a {type(module).__name__} "
                "without one: something else has parametrized it; take that away first"
            )
        part, block = parts.get(id(module), ("", None))
        if module is words:
            part = EMBEDDINGS
        elif module is head:
            part = HEAD
        assert module is not None
        candidate = _Candidate(path, module, part, block)
        owner = by_weight.setdefault(id(weight), candidate)
        if owner is not candidate:
            owner.tied.append(path)
            candidate.tied_to = owner.path
        found.append(candidate)
    return found, dense


def _parts_by_module(anatomy: Anatomy) -> dict[int, tuple[str, int | None]]:
    parts: dict[int, tuple[str, int | None]] = {}
    for index, block in enumerate(anatomy.blocks):
        for part in BLOCK_PARTS:
            if getattr(anatomy.family, part):
                parts[id(block.get(part))] = (part, index)
    projection = anatomy.embedding("embedding_projection")
    if projection is not None:
        parts[id(projection)] = ("embedding_projection", None)
    return parts


def _rules_by_path(rules: tuple[Rule, ...], candidates: list[_Candidate], dense: Mapping[str, str]) -> dict[str, Rule]:
    chosen: dict[str, Rule] = {}
    for rule in rules:
        matched = [c for c in candidates if any(fnmatchcase(name, rule.modules) for name in c.names())]
        if not matched:
            kept = next((path for path in dense if fnmatchcase(path, rule.modules)), None)
            if kept is not None:
                raise LmcompressError(f"the rule for {rule.modules!r} can do nothing: {kept}: {dense[kept]}")
            names = {name for candidate in candidates for name in candidate.names()}
            # each block has the same paths: the first tells all
            shown = {c.part for c in candidates if c.part} | {c.path for c in candidates if c.block in (None, 0)}
            hint = nearest(rule.modules, names).partition(" Valid are")[0]
            raise LmcompressError(
                f"the rule for {rule.modules!r} matches no module of this model{hint} Valid are: "
                f"{', '.join(sorted(shown))}, and the same in other blocks"
            )
        tied = [c for c in matched if c.tied_to]
        if len(tied) == len(matched) and rule.weights != "default":
            raise LmcompressError(
                f"the rule for {rule.modules!r} must leave weights at 'default': {tied[0].path} is tied to "
                f"{tied[0].tied_to} and has one set of codes with it; name {EMBEDDINGS!r} instead"
            )
        chosen |= {candidate.path: rule for candidate in matched}
    return chosen


def _weights(candidate: _Candidate, rule: Rule | None, config: QuantizationConfig) -> WeightScheme | str:
    """The scheme, or why there is none."""
    default = config.embeddings if candidate.part == EMBEDDINGS else config.weights
    if rule is not None:
        scheme = default if rule.weights == "default" else rule.weights
        if scheme is None:
            return f"the rule for {rule.modules!r} leaves it dense" if rule.weights is None else "the default is dense"
        return scheme
    if candidate.part not in (*BLOCK_PARTS, EMBEDDINGS):
        return "outside of the blocks; a rule that names it would quantize it"
    if default is None:
        return f"the config has no {'embeddings' if candidate.part == EMBEDDINGS else 'weights'}"
    return default


def _activations(rule: Rule | None, config: QuantizationConfig) -> ActivationScheme | None:
    if rule is None or rule.activations == "default":
        return config.activations
    return rule.activations


def _check(candidate: _Candidate, scheme: WeightScheme) -> None:
    weight = stored_weight(candidate.module)
    assert weight is not None
    rows, columns = weight.shape if not is_conv1d(candidate.module) else (weight.shape[1], weight.shape[0])
    try:
        scheme.grouping().scale_shape((rows, columns))
    except LmcompressError as error:
        raise LmcompressError(f"{candidate.path}: {error}") from error


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
