"""The quantization of each matrix of a model, decided and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.layers import refuse_compact
from lmcompress.errors import LmcompressError
from lmcompress.families import Anatomy, ZeroWidthLinear, anatomy_of, is_conv1d, outline_of, refuse_foreign
from lmcompress.families.coupled import stage_of
from lmcompress.families.foreign import refuse_packed
from lmcompress.families.outline import is_repeated
from lmcompress.families.refusal import refuse_unproven
from lmcompress.families.weights import EMBEDDINGS, Weighted, modules_by_path, rules_by_path, weighted_modules
from lmcompress.quantization.config import ActivationScheme, QuantizationConfig, Rule, WeightScheme


@dataclass(frozen=True)
class Planned:
    """The quantization of one matrix.

    Attributes:
        path: its module, relative to the base model; in a task head its own name.
        part: the family's name of it, such as ``ffn_in``, ``embeddings`` or ``head``; empty for others.
        block: number of its block, counted from 0, or ``None`` outside of the blocks.
        weights: quantization of the weights.
        inputs: quantization of its input (``symmetric`` is resolved); for embeddings, of the input of a head tied
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
    """The quantized matrices, and the dense ones with reasons.

    Attributes:
        matrices: quantized matrices, in the order of the model.
        attention: quantization of queries, keys and values, or ``None``; that of probabilities is the same with
            ``auto`` resolved for them.
        dense: modules that stay dense and could have been quantized, or are often asked about: path to reason.
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


def plan(model: PreTrainedModel, config: QuantizationConfig) -> Plan:
    """Decide the quantization of each module; nothing is changed.

    Quantized by default are the projections of the blocks, the token embeddings, and with these a head that is tied to
    them. Position and token type embeddings always stay dense, as do norms and biases; other matrices (pooler,
    task head, projection of embeddings) stay dense unless a rule matches them.

    Args:
        model: any model with a list of blocks, stock or cut; quantization of attention needs a known family.
        config: the configuration.

    Returns:
        The plan.

    Raises:
        LmcompressError: If a rule matches nothing or nothing that can be quantized, a group size does not divide the
            rows, something else has parametrized a matrix, the model is packed, or nothing would be quantized.
    """
    refuse_packed(model, "quantize")
    refuse_foreign(model, "quantize")
    refuse_compact(model, "quantize")
    anatomy = outline_of(model)
    candidates, dense = _candidates(model, anatomy)
    own = [replace(each, aliases=[]) for candidate in candidates for each in (candidate, *candidate.aliases)]
    rules = rules_by_path(own, config.rules, dense)
    _refuse_codes_of_their_own(config.rules, candidates, own)
    matrices: list[Planned] = []
    for candidate in candidates:
        weights = _weights(candidate, rules.get(candidate.path), config)
        if isinstance(weights, str):
            dense[candidate.path] = weights
            dense |= {path: f"it is tied to {candidate.path}, which stays dense" for path in candidate.tied}
            continue
        # for the embeddings it is the head that reads an activation
        heads = tuple(alias.path for alias in candidate.aliases if alias.kind != "embedding")
        readers = heads[-1:] if candidate.part == EMBEDDINGS else (candidate.path,)
        inputs = next((_activations(rules.get(path), config) for path in readers), None)
        if inputs is not None:
            inputs = inputs.resolved(one_sided=candidate.part == "ffn_out" and not anatomy.family.gated)
        _check(candidate, weights)
        matrices.append(Planned(candidate.path, candidate.part, candidate.block, weights, inputs, candidate.tied))
    if not matrices:
        raise LmcompressError(
            f"nothing of this {type(model).__name__} would be quantized: "
            + "; ".join(f"{path}: {reason}" for path, reason in list(dense.items())[:4])
            + ". Give the config weights or embeddings, or remove the rules that leave all dense"
        )
    if config.attention_scheme() is not None and not anatomy.family.attention:
        # the message names what is known
        anatomy_of(model)
    one_table = bool(anatomy.family.decoder) or not model.config.is_encoder_decoder
    if not one_table and any(planned.part == EMBEDDINGS for planned in matrices):
        raise LmcompressError(
            f"{model.config.model_type} has two stacks of blocks, which share one table of embeddings: its codes would "
            "have several owners, which is not supported for a family without description. Leave it dense: "
            "embeddings=None"
        )
    attends = bool(anatomy.family.attention) and any(block.attentions() for block in anatomy.blocks)
    attention = config.attention_scheme() if attends else None
    if attention is not None:
        refuse_unproven(model, "quantized_attention", instead="set attention to false")
    return Plan(tuple(matrices), attention, dense)


def stored_weight(module: nn.Module) -> Tensor | None:
    """The parameter that a module itself holds as its weight, whatever its attribute ``.weight`` returns.

    Args:
        module: any module.

    Returns:
        The parameter, or ``None``.
    """
    return module._parameters.get("weight")


def reads_alike(planned: Planned, matrices: Sequence[Planned]) -> bool:
    """Whether other matrices of the same block read the same tensor, as query, key and value do.

    Args:
        planned: one matrix.
        matrices: all that are planned.
    """
    if planned.block is None or stage_of(planned.part) is None:
        return False
    place = planned.block, stage_of(planned.part)
    return sum((other.block, stage_of(other.part)) == place for other in matrices) > 1


def _candidates(model: PreTrainedModel, anatomy: Anatomy) -> tuple[list[Weighted], dict[str, str]]:
    """The modules that can be quantized, and path to reason for those that cannot."""
    kept = {
        id(module): part.replace("_", " ")
        for part in ("position_embeddings", "token_type_embeddings")
        for module in anatomy.embeddings(part)
    }
    dense = {}
    for path, module in modules_by_path(model).items():
        if isinstance(module, ZeroWidthLinear):
            dense[path] = "pruned to nothing, it has no weights"
        elif id(module) in kept:
            dense[path] = f"{kept[id(module)]} always stay dense"
    candidates = [
        one for one in weighted_modules(model) if one.path not in dense and not isinstance(one.module, nn.Conv2d)
    ]
    for candidate in candidates:
        if stored_weight(candidate.module) is None:
            raise LmcompressError(
                f"{candidate.path} must hold its weight as a plain parameter to be quantized, got a "
                f"{type(candidate.module).__name__} without one: something else has parametrized it; remove that "
                "first"
            )
    return candidates, dense


def _refuse_codes_of_their_own(rules: Sequence[Rule], candidates: Sequence[Weighted], own: Sequence[Weighted]) -> None:
    owners = {alias: candidate.path for candidate in candidates for alias in candidate.tied}
    for rule in rules:
        matched = [one.path for one in own if one.matches(rule.modules)]
        if rule.weights != "default" and all(path in owners for path in matched):
            raise LmcompressError(
                f"the rule for {rule.modules!r} must leave weights at 'default': {matched[0]} is tied to "
                f"{owners[matched[0]]} and has one set of codes with it; name {EMBEDDINGS!r} instead"
            )


def _weights(candidate: Weighted, rule: Rule | None, config: QuantizationConfig) -> WeightScheme | str:
    """The scheme, or the reason why there is none."""
    default = config.embeddings if candidate.part == EMBEDDINGS else config.weights
    if rule is not None:
        scheme = default if rule.weights == "default" else rule.weights
        if scheme is None:
            return f"the rule for {rule.modules!r} leaves it dense" if rule.weights is None else "the default is dense"
        return scheme
    if not candidate.default:
        where = (
            "in a block whose family does not describe it" if is_repeated(candidate.path) else "outside of the blocks"
        )
        return f"{where}; a rule that names it would quantize it"
    if default is None:
        return f"the config has no {'embeddings' if candidate.part == EMBEDDINGS else 'weights'}"
    return default


def _activations(rule: Rule | None, config: QuantizationConfig) -> ActivationScheme | None:
    if rule is None or rule.activations == "default":
        return config.activations
    return rule.activations


def _check(candidate: Weighted, scheme: WeightScheme) -> None:
    weight = stored_weight(candidate.module)
    assert weight is not None
    rows, columns = weight.shape if not is_conv1d(candidate.module) else (weight.shape[1], weight.shape[0])
    try:
        scheme.grouping().scale_shape((rows, columns))
    except LmcompressError as error:
        raise LmcompressError(f"{candidate.path}: {error}") from error


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
