"""Gemma: Llama's blocks, norms whose scale is ``1 + weight``, embeddings multiplied by the root of the hidden size."""

from __future__ import annotations

from dataclasses import replace

from lmcompress.families.llama import LLAMA

GEMMA = replace(LLAMA, model_type="gemma", norm_offset=1.0, stream_scaled=True)
