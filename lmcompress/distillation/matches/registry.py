"""The matches by name: what each compares, what it is counted in, and how it is called."""

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
from lmcompress.errors import LmcompressError, nearest

Unit = Literal["examples", "tokens", "pairs"]
Feature = Literal["hidden", "scores", "probabilities", "queries", "keys", "values"]
Features = Tensor | tuple[Tensor, Tensor]
"""One captured feature, or those of two layers for the matches that relate layers."""


@dataclass(frozen=True)
class MatchLoss:
    """A match function and what must be known to feed it and to count it.

    Calling it calls the function, with the options checked and ``causal`` passed on only where it matters.

    Attributes:
        name: its key in :data:`MATCHES`.
        function: ``f(student, teacher, mask, **options) -> (batch,)`` float32 sums.
        unit: what the sums are counted in: ``"examples"``, ``"tokens"`` or ``"pairs"``.
        feature: what it compares; ``None`` until stated with :meth:`on` where there is a choice.
        layers: how many layers of each model it takes; with 2, ``student`` and ``teacher`` are pairs of features.
        features: what it can compare.
        projectable: whether unequal widths need (and allow) a projection of the student.
    """

    name: str
    function: Callable[..., Tensor]
    unit: Unit
    feature: Feature | None
    layers: int = 1
    features: tuple[Feature, ...] = ()
    projectable: bool = False

    @property
    def options(self) -> frozenset[str]:
        """Names of the options that a user may set (not ``causal`` and ``on``, which follow from the model)."""
        return self._keywords - {"causal", "on"}

    def on(self, feature: str | None) -> MatchLoss:
        """The same match with its feature stated.

        Args:
            feature: one of :attr:`features`; ``None`` only where there is no choice.

        Returns:
            A match whose ``feature`` is set and whose function knows it.

        Raises:
            LmcompressError: the match cannot compare that feature, or there is a choice and none was made.

        Example:
            >>> MATCHES["attention_ce"].on("scores").feature
            'scores'
        """
        if feature is None and self.feature is not None:
            return self
        if feature is None:
            raise LmcompressError(
                f"the match {self.name!r} must be told what to compare: on={' or on='.join(map(repr, self.features))}"
                " (scores are before the softmax, probabilities after it)"
            )
        for known in self.features:
            if known == feature:
                function = partial(self.function, on=known) if "on" in self._keywords else self.function
                return replace(self, feature=known, function=function)
        raise LmcompressError(f"the match {self.name!r} cannot compare {feature!r}{nearest(feature, self.features)}")

    def __call__(
        self, student: Features, teacher: Features, mask: Tensor, *, causal: bool = False, **options: float
    ) -> Tensor:
        """Compares.

        Args:
            student: the captured feature, or a pair of them if :attr:`layers` is 2.
            teacher: likewise.
            mask: ``(batch, length)``, 1 = real token.
            causal: whether the models are causal; only matches of pairs look at it.
            **options: of the function, see :attr:`options`.

        Returns:
            ``(batch,)`` float32, the sum for each example in :attr:`unit`.

        Raises:
            LmcompressError: no feature was stated, an option is unknown, or the number of layers is wrong.
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
        for side, given in (("student", student), ("teacher", teacher)):
            count = len(given) if isinstance(given, (tuple, list)) else 1
            if count != self.layers:
                raise LmcompressError(
                    f"the match {self.name!r} takes {self.layers} layer(s) of the {side}, got {count}"
                )
        if "causal" in self._keywords:
            return self.function(student, teacher, mask, causal=causal, **options)
        return self.function(student, teacher, mask, **options)

    @property
    def _keywords(self) -> frozenset[str]:
        parameters = inspect.signature(self.function).parameters.values()
        return frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


_ATTENTION: tuple[Feature, ...] = ("scores", "probabilities")
_ALL = (
    MatchLoss("hidden_mse", hidden_mse, "tokens", "hidden", features=("hidden",), projectable=True),
    MatchLoss("hidden_cosine", hidden_cosine, "tokens", "hidden", features=("hidden",), projectable=True),
    MatchLoss("pkd", pkd, "examples", "hidden", features=("hidden",), projectable=True),
    MatchLoss("gram", gram, "examples", "hidden", 2, ("hidden",), projectable=True),
    MatchLoss("nst", nst, "pairs", "hidden", 2, ("hidden",)),
    MatchLoss("attention_transfer", attention_transfer, "examples", "hidden", features=("hidden",)),
    MatchLoss("attention_mse", attention_mse, "pairs", None, features=_ATTENTION),
    MatchLoss("attention_mse_mean", attention_mse_mean, "pairs", None, features=_ATTENTION),
    MatchLoss("attention_ce", attention_ce, "tokens", None, features=_ATTENTION),
    MatchLoss("attention_ce_mean", attention_ce_mean, "tokens", None, features=_ATTENTION),
    MatchLoss("minilm_attention", attention_kl, "tokens", "scores", features=("scores",)),
    MatchLoss("minilm_value", value_relation_kl, "tokens", "values", features=("values",)),
    MatchLoss("minilmv2_query", relation_kl, "tokens", "queries", features=("queries",)),
    MatchLoss("minilmv2_key", relation_kl, "tokens", "keys", features=("keys",)),
    MatchLoss("minilmv2_value", relation_kl, "tokens", "values", features=("values",)),
)


MATCHES: dict[str, MatchLoss] = {match.name: match for match in _ALL}
"""The matches by name, for recipes; ``fsp`` and ``mmd`` are TextBrewer's other names of ``gram`` and ``nst``."""

MATCHES["fsp"] = MATCHES["gram"]
MATCHES["mmd"] = MATCHES["nst"]


def match_for(name: str, on: str | None = None) -> MatchLoss:
    """The match of that name, with its feature stated.

    Args:
        name: a key of :data:`MATCHES`.
        on: the feature to compare; needed by the attention matches (``"scores"`` or ``"probabilities"``).

    Returns:
        The match, ready to be called.

    Raises:
        LmcompressError: an unknown name, or a feature that is missing or not the match's.

    Example:
        >>> match_for("attention_mse", on="scores").unit
        'pairs'
    """
    if name not in MATCHES:
        raise LmcompressError(f"unknown match {name!r}{nearest(name, MATCHES)}")
    return MATCHES[name].on(on)
