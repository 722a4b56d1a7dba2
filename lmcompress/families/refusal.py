"""What a family cannot do is refused before any work, with the reason that its proof found."""

from __future__ import annotations

from typing import Any

from lmcompress.errors import LmcompressError
from lmcompress.families import FAMILIES, family_of


def refuse_unproven(model: Any, *claims: str, instead: str = "") -> None:
    """Refuse what the family of a model cannot do.

    Args:
        model: a model of any family; nothing is refused for those that are not described.
        *claims: names of the claims of :mod:`lmcompress.proof` that the caller relies on.
        instead: what to do, a clause that ends the message.

    Raises:
        LmcompressError: If one of them is in the family's ``refused``.
    """
    config = getattr(model, "config", None)
    if (model_type := getattr(config, "model_type", "")) not in FAMILIES:
        return
    family = family_of(config)
    for claim in claims:
        if (reason := family.refused.get(claim)) is not None:
            hint = instead or f"`lmcompress families {model_type}` shows what works"
            raise LmcompressError(f"{model_type} cannot do this ({claim}): {reason}; {hint}")
