"""Matches of intermediate features: distances between features of student and teacher, for each example.

Every match is a pure function ``f(student, teacher, mask, **options) -> (batch,)``: for each example the float32 *sum*
over its unit, so that the caller divides once by the count over the whole optimizer step. Gradients flow
to the student only; values at padding are ignored. Losses are 0 where student and teacher agree, except the
cross-entropies, which include the teacher's entropy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor

from lmcompress.distillation.matches.features import (
    attention_ce,
    attention_ce_mean,
    attention_mse,
    attention_mse_mean,
    hidden_cosine,
    hidden_mse,
    pkd,
)
from lmcompress.distillation.matches.relations import (
    attention_kl,
    attention_transfer,
    gram,
    nst,
    relation_kl,
    value_relation_kl,
)
from lmcompress.distillation.matches.sentences import embedding_cosine, embedding_mse
from lmcompress.errors import LmcompressError, nearest
from lmcompress.registry import Registry

Unit = Literal["examples", "tokens", "pairs"]
Feature = Literal["hidden", "scores", "probabilities", "queries", "keys", "values"]
Features = Tensor | tuple[Tensor, Tensor]
"""One captured feature, or those of two layers for the matches that relate layers."""


@dataclass(frozen=True)
class MatchLoss:
    """A comparison of captured features, with the features it accepts and its unit.

    Attributes:
        name: name under which its terms are logged.
        function: ``f(student, teacher, mask, **options) -> (batch,)``, the float32 sum for each example, with gradient
            to the student. Keywords ``causal`` (whether the models are) and ``on`` (the feature) are filled in.
        unit: unit of the sums: ``"examples"``, ``"tokens"`` or ``"pairs"``.
        features: features it can compare; of several, one is chosen with :meth:`on`.
        layers: number of layers of each model; with 2, ``student`` and ``teacher`` are pairs of features.
        projectable: whether unequal widths need (and allow) a projection of the student.
        may_project: whether one is allowed that is asked for, though unequal widths need none.
    """

    name: str
    function: Callable[..., Tensor]
    unit: Unit
    features: tuple[Feature, ...]
    layers: int = 1
    projectable: bool = False
    may_project: bool = False

    @property
    def feature(self) -> Feature | None:
        """The compared feature; None if a choice has not been made."""
        return self.features[0] if len(self.features) == 1 else None

    @property
    def options(self) -> frozenset[str]:
        """Names of the options that a user may set (not ``causal`` and ``on``, which follow from the model)."""
        return self._keywords - {"causal", "on"}

    def on(self, feature: str | None) -> MatchLoss:
        """The same match with its feature set.

        Args:
            feature: one of :attr:`features`; None only if there is no choice.

        Returns:
            A match whose ``feature`` is set and whose function knows it.

        Raises:
            LmcompressError: If the match cannot compare that feature, or a necessary choice is missing.

        Example:
            >>> MATCHES["attention_ce"].on("scores").feature
            'scores'
        """
        if feature is None and self.feature is not None:
            return self
        if feature is None:
            raise LmcompressError(
                f"the match {self.name!r} needs the feature to compare: on={' or on='.join(map(repr, self.features))}"
                " (scores are before the softmax, probabilities after it)"
            )
        for known in self.features:
            if known == feature:
                function = partial(self.function, on=known) if "on" in self._keywords else self.function
                return replace(self, features=(known,), function=function)
        raise LmcompressError(f"the match {self.name!r} cannot compare {feature!r}{nearest(feature, self.features)}")

    def bound(self, *, causal: bool = False, **options: float | str) -> Callable[[Features, Features, Tensor], Tensor]:
        """The function of ``(student, teacher, mask)`` only.

        Args:
            causal: whether the models are causal; used by matches of pairs only.
            **options: options of the function, see :attr:`options`.

        Raises:
            LmcompressError: If no feature is set, or an option is unknown.
        """
        if self.feature is None:
            self.on(None)
        for option in options:
            if option not in self.options:
                raise LmcompressError(
                    f"the match {self.name!r} has no option {option!r}{nearest(option, self.options)}"
                    if self.options
                    else f"the match {self.name!r} has no options, got {option!r}"
                )
        return partial(self.function, **options, **({"causal": causal} if "causal" in self._keywords else {}))

    def __call__(
        self, student: Features, teacher: Features, mask: Tensor, *, causal: bool = False, **options: float | str
    ) -> Tensor:
        """The sum for each example, in :attr:`unit`.

        Args:
            student: the captured feature, or a pair of them if :attr:`layers` is 2.
            teacher: the same for the teacher.
            mask: ``(batch, length)``, 1 = real token.
            causal: as in :meth:`bound`.
            **options: options of the function, see :attr:`options`.

        Returns:
            ``(batch,)`` float32.

        Raises:
            LmcompressError: If no feature is set, an option is unknown, or the number of layers is wrong.
        """
        compare = self.bound(causal=causal, **options)
        for side, given in (("student", student), ("teacher", teacher)):
            count = len(given) if isinstance(given, (tuple, list)) else 1
            if count != self.layers:
                raise LmcompressError(
                    f"the match {self.name!r} takes {self.layers} layer(s) of the {side}, got {count}"
                )
        return compare(student, teacher, mask)

    @property
    def _keywords(self) -> frozenset[str]:
        parameters = inspect.signature(self.function).parameters.values()
        return frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


_ATTENTION: tuple[Feature, ...] = ("scores", "probabilities")
_ALL = (
    MatchLoss("hidden_mse", hidden_mse, "tokens", ("hidden",), projectable=True),
    MatchLoss("hidden_cosine", hidden_cosine, "tokens", ("hidden",), projectable=True),
    MatchLoss("pkd", pkd, "examples", ("hidden",), projectable=True),
    MatchLoss("embedding_mse", embedding_mse, "examples", ("hidden",), projectable=True),
    MatchLoss("embedding_cosine", embedding_cosine, "examples", ("hidden",), projectable=True),
    MatchLoss("gram", gram, "examples", ("hidden",), layers=2, projectable=True),
    MatchLoss("nst", nst, "pairs", ("hidden",), layers=2, may_project=True),
    MatchLoss("attention_transfer", attention_transfer, "examples", ("hidden",)),
    MatchLoss("attention_mse", attention_mse, "pairs", _ATTENTION),
    MatchLoss("attention_mse_mean", attention_mse_mean, "pairs", _ATTENTION),
    MatchLoss("attention_ce", attention_ce, "tokens", _ATTENTION),
    MatchLoss("attention_ce_mean", attention_ce_mean, "tokens", _ATTENTION),
    MatchLoss("minilm_attention", attention_kl, "tokens", ("scores",)),
    MatchLoss("minilm_value", value_relation_kl, "tokens", ("values",)),
    MatchLoss("minilmv2_query", relation_kl, "tokens", ("queries",)),
    MatchLoss("minilmv2_key", relation_kl, "tokens", ("keys",)),
    MatchLoss("minilmv2_value", relation_kl, "tokens", ("values",)),
)
_NAMED = {match.name: match for match in _ALL}

MATCHES: Registry[MatchLoss] = Registry(
    "match",
    _NAMED | {"fsp": _NAMED["gram"], "mmd": _NAMED["nst"]},
    lambda part: isinstance(part, MatchLoss),
    "a lmcompress.distillation.MatchLoss",
)
"""The matches by name, for recipes; ``fsp`` and ``mmd`` are TextBrewer's other names of ``gram`` and ``nst``."""


def match_for(match: str | MatchLoss, on: str | None = None) -> MatchLoss:
    """A match with its feature set.

    Args:
        match: a key of :data:`MATCHES`, ``module:attribute`` of a custom match, or a match.
        on: the feature to compare; needed by the attention matches (``"scores"`` or ``"probabilities"``).

    Returns:
        The match, ready to be called.

    Raises:
        LmcompressError: If the match is unknown, or its feature is missing or not one of the match's.

    Example:
        >>> match_for("attention_mse", on="scores").unit
        'pairs'
    """
    return MATCHES.resolve(match).on(on)
