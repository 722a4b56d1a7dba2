"""The matrices of a model: their paths, their ties, and the rule that applies to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError, UnknownFamilyError, nearest
from lmcompress.families import is_described, outline_of
from lmcompress.families.coupled import BLOCK_PARTS
from lmcompress.families.matrices import is_matrix
from lmcompress.families.outline import is_repeated

Kind = Literal["linear", "convolution", "embedding"]


class _Names(Protocol):
    @property
    def modules(self) -> str: ...


Rule = TypeVar("Rule", bound=_Names)

EMBEDDINGS, HEAD, PROJECTION = "embeddings", "head", "embedding_projection"
"""Parts of a block, and parts outside of the blocks, as rules name them."""

Matrices = Annotated[
    str,
    Field(
        min_length=1,
        description=f"Names of parts ({', '.join(BLOCK_PARTS)}, embeddings, head) or "
        "paths such as h.0.mlp.c_fc or pooler.dense; * and ? stand for any.",
    ),
]
"""Field of a rule that says which matrices it is for."""


@dataclass(frozen=True, eq=False)
class Weighted:
    """A module with a weight of its own, however it is stored.

    Attributes:
        path: relative to the base model; in a task head, and in models outside transformers, its own name.
        module: a ``Linear``, ``Conv1D``, ``Conv2d`` or ``Embedding``.
        part: the family's name of it, such as ``ffn_in``, ``embeddings`` or ``head``; empty for others.
        block: number of its block, or None outside of the blocks.
        default: whether methods include it if no rule names it: in known families the projections of the blocks and
            the token embeddings, in other models of Transformers every matrix of a block and the token embeddings, in
            models outside of it every ``Linear``, ``Conv1D`` and ``Conv2d``.
        aliases: other modules with the same weight, such as a head that is tied to the token embeddings.
    """

    path: str
    module: nn.Module
    part: str = ""
    block: int | None = None
    default: bool = False
    aliases: list[Weighted] = field(default_factory=list)

    @property
    def tied(self) -> tuple[str, ...]:
        """Paths of the other modules with the same weight."""
        return tuple(alias.path for alias in self.aliases)

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which a rule can match this module: its path, and its part if it has one."""
        return tuple(filter(None, (self.path, self.part)))

    @property
    def kind(self) -> Kind:
        """The kind of module; ``linear`` is ``Linear`` and ``Conv1D``."""
        if isinstance(self.module, nn.Embedding):
            return "embedding"
        return "convolution" if isinstance(self.module, nn.Conv2d) else "linear"

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, as it is stored.

        Raises:
            LmcompressError: If something else has parametrized it, or computes it.
        """
        stored = self.module._parameters.get("weight")
        # a class of torch.nn only annotates its weight; one that has it as an attribute computes it
        if stored is None or hasattr(type(self.module), "weight"):
            raise LmcompressError(
                f"{self.path} must hold its weight as a plain parameter, got a {type(self.module).__name__}, which "
                "computes it: something else has parametrized it; finish that first, in an earlier stage"
            )
        return stored

    def matches(self, pattern: str) -> bool:
        """Whether a glob matches this module: its path, its part, or the path of one that is tied to it.

        Args:
            pattern: glob; ``*`` and ``?`` are wildcards.
        """
        return any(fnmatchcase(name, pattern) for name in (*self.names, *self.tied))


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model by path, the same with and without a task head: relative to the base model.

    Args:
        model: a ``PreTrainedModel``, or any other module, whose paths are those of ``named_modules``.
    """
    prefix = f"{model.base_model_prefix}." if isinstance(model, PreTrainedModel) else ""
    return {name.removeprefix(prefix): module for name, module in model.named_modules()}


def weighted_modules(model: nn.Module) -> list[Weighted]:
    """All modules with a matrix of weights, each weight once, in the order of the model.

    Args:
        model: a ``PreTrainedModel`` of any family, or any other module.

    Returns:
        The modules; those tied to an earlier one are listed as its aliases.
    """
    parts = _parts(model)
    found: dict[int, Weighted] = {}
    for path, module in modules_by_path(model).items():
        if not (is_matrix(module) or isinstance(module, nn.Conv2d)):
            continue
        part, block = (parts or {}).get(id(module), ("", None))
        if parts is None:
            meant = not isinstance(module, nn.Embedding)
        elif isinstance(model, PreTrainedModel) and is_described(model):
            meant = part in (*BLOCK_PARTS, EMBEDDINGS)
        else:
            meant = part == EMBEDDINGS or (is_repeated(path) and not isinstance(module, nn.Embedding))
        weighted = Weighted(path, module, part, block, meant)
        weight = module._parameters.get("weight")
        known = found.setdefault(id(module) if weight is None else id(weight), weighted)
        if known is not weighted:
            known.aliases.append(weighted)
    return list(found.values())


def rules_by_path(
    candidates: Sequence[Weighted], rules: Sequence[Rule], refused: Mapping[str, str] | None = None
) -> dict[str, Rule]:
    """The rule that applies to each matrix: of two that match it the later one.

    Args:
        candidates: from :func:`weighted_modules`.
        rules: in the order of the configuration.
        refused: path to reason, for modules that no rule can change.

    Returns:
        Rules by path, for the matrices matched by any of them.

    Raises:
        LmcompressError: If a rule matches no matrix, or only refused ones.
    """
    found: dict[str, Rule] = {}
    for rule in rules:
        matched = [candidate.path for candidate in candidates if candidate.matches(rule.modules)]
        if not matched:
            for path, reason in (refused or {}).items():
                if fnmatchcase(path, rule.modules):
                    raise LmcompressError(f"the rule for {rule.modules!r} can do nothing: {path}: {reason}")
            names = {name for c in candidates for name in (*c.names, *c.tied)}
            # every block has the same paths: those of the first are enough
            shown = {c.part for c in candidates if c.part} | {c.path for c in candidates if c.block in (None, 0)}
            raise LmcompressError(
                f"the rule for {rule.modules!r} matches no matrix of this model"
                f"{nearest(rule.modules, names).partition(' Valid are')[0]} Valid are: {', '.join(sorted(shown))}, and "
                "the same in other blocks"
            )
        found |= dict.fromkeys(matched, rule)
    return found


def _parts(model: nn.Module) -> dict[int, tuple[str, int | None]] | None:
    """Part and block by the module's identity; None outside of Transformers, and without a list of blocks."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        anatomy = outline_of(model)
    except UnknownFamilyError:
        return None
    parts: dict[int, tuple[str, int | None]] = {}
    for index, block in enumerate(anatomy.blocks):
        if not is_described(model):
            parts |= {id(module): ("", index) for module in block.module.modules()}
        for part in BLOCK_PARTS:
            if block.has(part):
                # a replacement of a projection may consist of several modules
                parts |= {id(module): (part, index) for module in block.get(part).modules()}
    for part, module in (
        (HEAD, model.get_output_embeddings()),
        (PROJECTION, anatomy.embedding(PROJECTION)),
        (EMBEDDINGS, anatomy.embedding("word_embeddings")),
    ):
        if module is not None:
            parts |= {id(inner): (part, None) for inner in module.modules()}
    return parts
