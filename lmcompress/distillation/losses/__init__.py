"""Losses between the logits of a student and those of a teacher: pure, one value per row, unreduced, float32."""

from lmcompress.distillation.losses.distributions import js_divergence, kl_divergence, reverse_kl, soft_cross_entropy
from lmcompress.distillation.losses.outputs import (
    binary_kl,
    logit_mse,
    probability_shift,
    regression_mse,
    token_scaling,
)
from lmcompress.distillation.losses.registry import LOGIT_LOSSES, LogitLoss, loss_for

__all__ = [
    "LOGIT_LOSSES",
    "LogitLoss",
    "binary_kl",
    "js_divergence",
    "kl_divergence",
    "logit_mse",
    "loss_for",
    "probability_shift",
    "regression_mse",
    "reverse_kl",
    "soft_cross_entropy",
    "token_scaling",
]
