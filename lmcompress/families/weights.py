"""The matrices of any model that methods on single weights may change, and which of them are meant by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, Protocol, TypeVar

from torch import nn
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError, UnknownFamilyError, nearest
from lmcompress.families import anatomy_of, is_conv1d

Kind = Literal["linear", "convolution", "embedding"]


class _Names(Protocol):
    @property
    def modules(self) -> str: ...


Rule = TypeVar("Rule", bound=_Names)

PARTS = ("query", "key", "value", "qkv", "attention_out", "ffn_in", "ffn_out")


@dataclass(frozen=True, eq=False)
class Weighted:
    """A module that has a weight of its own, however it is stored.

    Attributes:
        path: relative to the base model; of a task head, and in models that are not of transformers, by its own name.
        module: a ``Linear``, ``Conv1D``, ``Conv2d`` or ``Embedding``.
        part: what the family calls it, such as ``ffn_in``, ``embeddings`` or ``head``; empty for others.
        block: number of its block, or None outside of the blocks.
        default: whether a method takes it where nobody says which: in known families the projections of the blocks and
            the word embeddings, in other models every ``Linear``, ``Conv1D`` and ``Conv2d``.
        tied: paths of other modules that have the same weight.
    """

    path: str
    module: nn.Module
    part: str = ""
    block: int | None = None
    default: bool = False
    tied: list[str] = field(default_factory=list)

    @property
    def kind(self) -> Kind:
        """What sort of module it is; ``linear`` is ``Linear`` and ``Conv1D``."""
        if isinstance(self.module, nn.Embedding):
            return "embedding"
        return "convolution" if isinstance(self.module, nn.Conv2d) else "linear"

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, as it is stored.

        Raises:
            LmcompressError: something else has parametrized it, or computes it.
        """
        stored = self.module._parameters.get("weight")
        # a class of torch.nn only annotates its weight; one that has it as an attribute computes it
        if stored is None or hasattr(type(self.module), "weight"):
            raise LmcompressError(
                f"{self.path} must hold its weight as a plain parameter, got a {type(self.module).__name__}, which "
                "computes it: something else has parametrized it; finish that first, in a stage before"
            )
        return stored

    def matches(self, pattern: str) -> bool:
        """Whether a glob names this module, by its path, its part, or the path of one that is tied to it.

        Args:
            pattern: ``*`` and ``?`` stand for any.

        Returns:
            Whether it does.
        """
        return any(fnmatchcase(name, pattern) for name in (self.path, self.part, *self.tied) if name)


def weighted_modules(model: nn.Module) -> list[Weighted]:
    """All modules with a matrix of weights, each weight once, in the order of the model.

    Args:
        model: a ``PreTrainedModel`` of any family, or any other module.

    Returns:
        The modules; what is tied to an earlier one is named there.
    """
    parts = _parts(model)
    prefix = f"{model.base_model_prefix}." if isinstance(model, PreTrainedModel) else ""
    found: dict[int, Weighted] = {}
    for name, module in model.named_modules():
        if not (isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)) or is_conv1d(module)):
            continue
        path = name.removeprefix(prefix) if prefix else name
        part, block = (parts or {}).get(id(module), ("", None))
        meant = not isinstance(module, nn.Embedding) if parts is None else part in (*PARTS, "embeddings")
        weight = module._parameters.get("weight")
        known = found.get(id(weight)) if weight is not None else None
        if known is None:
            found[id(module) if weight is None else id(weight)] = Weighted(path, module, part, block, meant)
        else:
            known.tied.append(path)
    return list(found.values())


def rules_by_path(candidates: Sequence[Weighted], rules: Sequence[Rule]) -> dict[str, Rule]:
    """Which rule counts for which matrix: of two that name it the later one.

    Args:
        candidates: of :func:`weighted_modules`.
        rules: in the order of the configuration.

    Returns:
        Rules by path, of the matrices that any of them names.

    Raises:
        LmcompressError: a rule that names no matrix.
    """
    found: dict[str, Rule] = {}
    for rule in rules:
        matched = [candidate.path for candidate in candidates if candidate.matches(rule.modules)]
        if not matched:
            names = {name for c in candidates for name in (c.path, c.part, *c.tied) if name}
            raise LmcompressError(
                f"the rule for {rule.modules!r} matches no matrix of this model{nearest(rule.modules, names)}"
            )
        found |= dict.fromkeys(matched, rule)
    return found


def _parts(model: nn.Module) -> dict[int, tuple[str, int | None]] | None:
    """Part and block by the module's identity; None where nobody knows the family."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        anatomy = anatomy_of(model)
    except UnknownFamilyError:
        return None
    parts: dict[int, tuple[str, int | None]] = {}
    for index, block in enumerate(anatomy.blocks):
        for part in PARTS:
            if block.has(part):
                # what stands in for a projection may be made of several
                parts |= {id(module): (part, index) for module in block.get(part).modules()}
    for part, module in (
        ("head", model.get_output_embeddings()),
        ("embedding_projection", anatomy.embedding("embedding_projection")),
        ("embeddings", anatomy.embedding("word_embeddings")),
    ):
        if module is not None:
            parts |= {id(inner): (part, None) for inner in module.modules()}
    return parts
