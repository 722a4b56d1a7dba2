"""Distillation configurations from papers on quantization, to use or to modify."""

from __future__ import annotations

from lmcompress.distillation.config import Contrast, DistillationConfig, Match
from lmcompress.errors import LmcompressError


def quantgpt(contrast: Contrast | None = None) -> DistillationConfig:
    """Logits and token contrast, for causal language models; labels are not used.

    Args:
        contrast: default: weight 0.1, temperature 0.1, momentum 0.5.

    Returns:
        The configuration.

    Reference:
        Tao et al., *Compression of Generative Pre-trained Language Models via Quantization*, 2022,
        https://arxiv.org/abs/2203.10705, section 4.1: L = λ L_cont + L_dist.

    Example:
        >>> quantgpt().label_weight, quantgpt().contrast.weight
        (0.0, 0.1)
    """
    return DistillationConfig(temperature=1.0, label_weight=0.0, contrast=contrast or Contrast())


def ternarybert(layers: int) -> DistillationConfig:
    """Logits, and hidden states and attention scores of every layer, for encoders; all weights are 1.

    For a student with as many layers as its teacher, such as a quantized one. Labels are not used.

    Args:
        layers: number of blocks of both.

    Returns:
        The configuration.

    Raises:
        LmcompressError: If ``layers`` is less than 1.

    Reference:
        Zhang et al., *TernaryBERT: Distillation-aware Ultra-low Bit BERT*, 2020, https://arxiv.org/abs/2009.12812,
        section 3.2.

    Note:
        The authors' cross-entropy with the teacher has the gradient of the KL used here, and regression uses the
        squared error in both. Their means over a batch include padding, ours do not.

    Example:
        >>> [(match.loss, match.student) for match in ternarybert(1).matches]
        [('hidden_mse', 0), ('hidden_mse', 1), ('attention_mse', 1)]
    """
    if layers < 1:
        raise LmcompressError(f"layers must be at least 1, got {layers}")
    hidden = [Match(loss="hidden_mse", student=n, teacher=n) for n in range(layers + 1)]
    scores = [Match(loss="attention_mse", student=n, teacher=n, on="scores") for n in range(1, layers + 1)]
    return DistillationConfig(temperature=1.0, label_weight=0.0, matches=(*hidden, *scores))
