"""Losses between the logits of a student and those of a teacher: pure, one value per row, unreduced, float32."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lmcompress.distillation.losses.distributions import js_divergence, kl_divergence, reverse_kl, soft_cross_entropy
from lmcompress.distillation.losses.outputs import (
    binary_kl,
    logit_mse,
    regression_mse,
)
from lmcompress.distillation.losses.vocabularies import universal_logit_distance
from lmcompress.errors import LmcompressError, nearest
from lmcompress.registry import Registry

ProblemType = Literal[
    "single_label_classification",
    "token_classification",
    "causal_lm",
    "question_answering",
    "multi_label_classification",
    "regression",
]
OF_CLASSES: tuple[ProblemType, ...] = ("single_label_classification", "token_classification", "causal_lm")
"""Heads whose logits are those of one softmax; masked language models are token classifiers over the vocabulary."""


# the classes of a head of question answering are the tokens of a window
_OF_DISTRIBUTIONS: tuple[ProblemType, ...] = (*OF_CLASSES, "question_answering")


@dataclass(frozen=True)
class LogitLoss:
    """A loss between the logits of a student and those of a teacher, with its scope.

    Attributes:
        name: name in messages.
        function: ``(student_logits (..., C), teacher_logits (..., C), *, temperature, scale_by_temperature) -> (...)``,
            one float32 value per row, with gradient to the student; ``temperature`` is a number or one per row. A
            keyword ``beta`` is filled in from the configuration.
        problems: problem types that it fits.
        truncated: whether it accepts only the largest logits of a stored teacher, the rest of the probability spread
            evenly; losses that use more than the softmax do not.
        across: whether the last axes of the two may differ: distributions over two vocabularies.
    """

    name: str
    function: Callable[..., Tensor]
    problems: tuple[ProblemType, ...] = OF_CLASSES
    truncated: bool = False
    across: bool = False

    @property
    def takes_beta(self) -> bool:
        """Whether the function has an argument ``beta``."""
        return "beta" in inspect.signature(self.function).parameters

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, **options: float | Tensor | bool) -> Tensor:
        """One value per row.

        Args:
            student_logits: ``(..., C)``.
            teacher_logits: same shape.
            **options: arguments of the function.

        Returns:
            ``(...)`` float32.
        """
        return self.function(student_logits, teacher_logits, **options)


_ALL = (
    LogitLoss("kl", kl_divergence, _OF_DISTRIBUTIONS, truncated=True),
    LogitLoss("ce", soft_cross_entropy, _OF_DISTRIBUTIONS, truncated=True),
    LogitLoss("reverse_kl", reverse_kl, _OF_DISTRIBUTIONS, truncated=True),
    LogitLoss("jsd", js_divergence, _OF_DISTRIBUTIONS, truncated=True),
    LogitLoss("mse", logit_mse, (*OF_CLASSES, "multi_label_classification")),
    LogitLoss("binary_kl", binary_kl, ("multi_label_classification",)),
    LogitLoss("regression_mse", regression_mse, ("regression",)),
    LogitLoss("uld", universal_logit_distance, ("causal_lm",), across=True),
)

LOGIT_LOSSES: Registry[LogitLoss] = Registry(
    "logit loss",
    {loss.name: loss for loss in _ALL},
    lambda part: isinstance(part, LogitLoss),
    "a lmcompress.distillation.LogitLoss",
)
"""The losses by name, for configurations and recipes."""

_DEFAULTS: dict[ProblemType, str] = {"multi_label_classification": "binary_kl", "regression": "regression_mse"}
_REASONS: dict[ProblemType, str] = {
    "regression": "the softmax of one output is 1 whatever the output, so the gradient would be exactly zero",
    "multi_label_classification": "its labels are independent, not alternatives of one softmax",
    "question_answering": "its logits are those of the tokens of a window, whose number differs",
}


def loss_for(problem_type: str, loss: str | LogitLoss = "auto") -> LogitLoss:
    """The loss that fits a problem type.

    Args:
        problem_type: one of :data:`ProblemType`.
        loss: a key of :data:`LOGIT_LOSSES`, ``module:attribute`` of a custom loss, or a loss; ``"auto"`` is the usual
            one: ``kl`` for classes, tokens and spans, ``binary_kl`` for multi-label and ``regression_mse`` for
            regression, which ``mse`` stands for too.

    Raises:
        LmcompressError: If the problem type or the loss is unknown, or the loss does not fit.

    Example:
        >>> loss_for("multi_label_classification").name
        'binary_kl'
    """
    for known in get_args(ProblemType):
        if known == problem_type:
            break
    else:
        raise LmcompressError(f"unknown problem type {problem_type!r}{nearest(problem_type, get_args(ProblemType))}")
    usual = _DEFAULTS.get(known, "kl")
    if loss == "auto" or (known == "regression" and loss == "mse"):
        return LOGIT_LOSSES[usual]
    found = LOGIT_LOSSES.resolve(loss)
    if known not in found.problems:
        fitting = [usual, *(n for n, other in LOGIT_LOSSES.items() if known in other.problems and n != usual)]
        raise LmcompressError(
            f"the logit loss {found.name!r} does not fit the problem type {problem_type!r}: "
            f"{_REASONS.get(known, 'its classes are alternatives of one softmax')}. "
            f"Use {' or '.join(fitting)}, or leave the loss out to get {usual}"
        )
    return found
