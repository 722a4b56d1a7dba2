"""The losses by name, and which of them fits which head."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lmcompress.distillation.losses.distributions import js_divergence, kl_divergence, reverse_kl, soft_cross_entropy
from lmcompress.distillation.losses.outputs import binary_kl, logit_mse, regression_mse
from lmcompress.errors import LmcompressError, nearest

LogitLoss = Callable[..., Tensor]
"""``(student_logits (..., C), teacher_logits (..., C), *, temperature, scale_by_temperature) -> (...)`` float32."""


LOGIT_LOSSES: dict[str, LogitLoss] = {
    "kl_divergence": kl_divergence,
    "soft_cross_entropy": soft_cross_entropy,
    "reverse_kl": reverse_kl,
    "js_divergence": js_divergence,
    "logit_mse": logit_mse,
    "binary_kl": binary_kl,
    "regression_mse": regression_mse,
}
"""The logit losses by name, for recipes."""


_OF_DISTRIBUTIONS = ("kl_divergence", "soft_cross_entropy", "reverse_kl", "js_divergence", "logit_mse")
# The first of each is the problem type's default.
_FITTING: dict[str, tuple[str, ...]] = {
    "single_label_classification": _OF_DISTRIBUTIONS,
    "token_classification": _OF_DISTRIBUTIONS,
    "causal_lm": _OF_DISTRIBUTIONS,
    "multi_label_classification": ("binary_kl", "logit_mse"),
    # logit_mse at its default is the same function, so asking for it is no mistake
    "regression": ("regression_mse", "logit_mse"),
}


def loss_for(problem_type: str, name: str | None = None) -> LogitLoss:
    """The logit loss for a kind of head: the one asked for where it makes sense there, else an error.

    Args:
        problem_type: ``single_label_classification``, ``token_classification``, ``causal_lm``,
            ``multi_label_classification`` or ``regression``.
        name: a key of :data:`LOGIT_LOSSES`; ``None`` takes the default of the problem type (``kl_divergence``,
            ``binary_kl`` for many labels, ``regression_mse`` for regression).

    Returns:
        The function; for ``regression`` always :func:`regression_mse`.

    Raises:
        LmcompressError: an unknown problem type or name, or a loss that would teach that head nothing or the wrong
            thing (a softmax over one regression output has zero gradient; labels of a multi-label head are not
            alternatives).

    Example:
        >>> loss_for("regression").__name__, loss_for("causal_lm", "reverse_kl").__name__
        ('regression_mse', 'reverse_kl')
    """
    if problem_type not in _FITTING:
        raise LmcompressError(f"unknown problem type {problem_type!r}{nearest(problem_type, _FITTING)}")
    if name is not None and name not in LOGIT_LOSSES:
        raise LmcompressError(f"unknown logit loss {name!r}{nearest(name, LOGIT_LOSSES)}")
    fitting = _FITTING[problem_type]
    if name is not None and name not in fitting:
        reasons = {
            "regression": "the softmax of one output is 1 whatever the output, so the gradient would be exactly zero",
            "multi_label_classification": "its labels are independent, not alternatives of one softmax",
        }
        why = reasons.get(problem_type, "its classes are alternatives of one softmax")
        raise LmcompressError(
            f"the logit loss {name!r} does not fit the problem type {problem_type!r}: {why}. "
            f"Use {' or '.join(fitting)}, or leave the loss out to get {fitting[0]}."
        )
    return regression_mse if problem_type == "regression" else LOGIT_LOSSES[name or fitting[0]]
