"""What the processor that runs the tests can do: without VNNI, kernels of 8-bit codes saturate, and are refused."""

from __future__ import annotations

import pytest

from lmcompress.kernels.dispatch import ladder

_FOUND = ladder()

needs_exact_bytes = pytest.mark.skipif(
    not all(_FOUND.get(name) == "works" for name in ("onednn", "fbgemm")),
    reason="needs a processor that adds products of bytes without saturating",
)
needs_int_mm = pytest.mark.skipif(
    _FOUND.get("int_mm") != "works", reason="needs a processor on which int_mm is no slower than the reference"
)
