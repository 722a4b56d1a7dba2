"""The precision in which weights are trained."""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)
_HALF = (torch.float16, torch.bfloat16)


def bfloat16_is_fast(*, use_cpu: bool = False) -> bool:
    """Whether the device that would train multiplies in bfloat16 by instructions of its own.

    Args:
        use_cpu: whether the CPU trains even where there is a GPU.

    Returns:
        True for a CUDA GPU with bfloat16, or for a CPU with AVX-512 BF16 or AMX if there is no GPU; elsewhere bfloat16
        is emulated, which is slower than float32, or not there.
    """
    if not use_cpu and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not use_cpu and torch.backends.mps.is_available():
        return False
    # torch has no public question; these exist from 2.4 and 2.6 on
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(test is not None and bool(test()) for test in tests)


def in_float32(model: Any) -> Any:
    """The model with its trained weights in float32, in place.

    Checkpoints are loaded in the precision they were saved in. With 8 bits of mantissa, an update smaller than a 256th
    of the weight is rounded away: at a learning rate of 2e-5, two thirds of a bfloat16 BERT's weights do not change in
    twenty steps. ``bf16=True`` of the arguments computes in bfloat16, with weights in float32.

    Args:
        model: any module; one quantized by a library, or whose half-precision weights are frozen, is left as it is.

    Returns:
        The same object.
    """
    halves = {p.dtype for p in model.parameters() if p.requires_grad and p.dtype in _HALF}
    if not halves or getattr(model, "is_quantized", False) or hasattr(model, "peft_config"):
        return model
    name = str(halves.pop()).removeprefix("torch.")
    logger.warning(
        "the model's weights are %s and are trained in float32; pass float32_weights=False to train them as they are",
        name,
    )
    return model.float()
