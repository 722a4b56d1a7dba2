"""Proving a family: every claim is checked on tiny random models, and what fails is kept with its reason."""

from __future__ import annotations

import copy
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import family_of
from lmcompress.proof.claims import CLAIMS, Bench, Failed
from lmcompress.proof.tiny import tiny_model


@dataclass(frozen=True)
class Outcome:
    """What became of one claim.

    Attributes:
        claim: name of the claim, a key of :data:`~lmcompress.proof.claims.CLAIMS`.
        holds: whether it holds; None where it is about nothing that the model has, such as generation of an encoder.
        reason: why not, in a clause; where it holds, empty or what was measured.
        seconds: time that the check took.
    """

    claim: str
    holds: bool | None
    reason: str
    seconds: float


@dataclass(frozen=True)
class Proof:
    """The outcomes of all claims for one architecture.

    Attributes:
        model_type: of the config.
        architecture: class of the tiny model.
        outcomes: one for each claim that was checked, in the order of :data:`~lmcompress.proof.claims.CLAIMS`.
    """

    model_type: str
    architecture: str
    outcomes: tuple[Outcome, ...]

    def __getitem__(self, claim: str) -> Outcome:
        for outcome in self.outcomes:
            if outcome.claim == claim:
                return outcome
        raise KeyError(claim)

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The claims that do not hold."""
        return tuple(outcome for outcome in self.outcomes if outcome.holds is False)

    def as_dict(self) -> dict[str, Any]:
        """The proof as JSON types; without times, which differ from run to run."""
        claims = {one.claim: {"holds": one.holds, "reason": one.reason} for one in self.outcomes}
        return {"model_type": self.model_type, "architecture": self.architecture, "claims": claims}


def prove(
    config: PretrainedConfig | Callable[[], PreTrainedModel],
    claims: Collection[str] | None = None,
    *,
    progress: Callable[[Outcome], None] | None = None,
) -> Proof:
    """Check what lmcompress promises for a family, on tiny random models of it.

    Gated = cut = reloaded for every part of a model; captured features are the model's own; packed = fake-quantized =
    reloaded; a checkpoint that carries its loader computes the same; generation with a cache gives the tokens of the
    one without.

    Args:
        config: a config of the family, whose architecture is made tiny; or what makes the tiny model, the same one at
            every call.
        claims: names of the claims to check; default: all.
        progress: called with every outcome as it comes.

    Returns:
        The outcomes. A claim that does not hold is no error.

    Raises:
        LmcompressError: If a claim does not exist, or the tiny model cannot be built.
        UnknownFamilyError: If the family is not described.
    """
    for name in claims or ():
        if name not in CLAIMS:
            raise LmcompressError(f"there is no claim {name!r}{nearest(name, CLAIMS)}")
    model = _maker(config)()
    refused = family_of(model.config).refused
    # copying is faster than making
    made = partial(copy.deepcopy, model)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="lmcompress-proof-") as scratch, _quiet():
        for name in CLAIMS if claims is None else [name for name in CLAIMS if name in claims]:
            folder = Path(scratch) / name
            folder.mkdir()
            outcomes.append(_checked(name, Bench(made, folder), refused.get(name, "")))
            if progress is not None:
                progress(outcomes[-1])
    return Proof(model.config.model_type, type(model).__name__, tuple(outcomes))


def _maker(config: PretrainedConfig | Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    if isinstance(config, PretrainedConfig):
        family_of(config)
        return lambda: tiny_model(config)
    return config


def _checked(name: str, bench: Bench, refused: str) -> Outcome:
    """The outcome of a claim, whose reason is the family's own where it is that which refused it."""
    claim, started = CLAIMS[name], time.perf_counter()
    try:
        if (without := claim.without(bench)) is not None:
            return Outcome(name, None, without, time.perf_counter() - started)
        measured = claim.check(bench) or ""
    except Failed as error:
        return Outcome(name, False, str(error), time.perf_counter() - started)
    except LmcompressError as error:
        reason = refused if refused and refused in str(error) else _clause(str(error))
        return Outcome(name, False, reason, time.perf_counter() - started)
    except Exception as error:
        # a wrong description fails anywhere in torch or Transformers; where, is what its author needs
        place = next(
            (f for f in reversed(traceback.extract_tb(error.__traceback__)) if "lmcompress" in f.filename), None
        )
        where = "" if place is None else f" (at {Path(place.filename).name}:{place.lineno})"
        return Outcome(
            name, False, f"{type(error).__name__}: {_clause(str(error))}{where}", time.perf_counter() - started
        )
    return Outcome(name, True, measured, time.perf_counter() - started)


def _clause(text: str) -> str:
    first = (text.strip().splitlines() or ["no message"])[0]
    return first if len(first) <= 300 else f"{first[:299]}…"


@contextmanager
def _quiet() -> Iterator[None]:
    """Deterministic and silent: one seed, no warnings of models that are nobody's."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def failures(proofs: Sequence[Proof]) -> list[str]:
    """One line for each claim that does not hold.

    Args:
        proofs: proofs of several families.
    """
    return [f"{p.model_type}: {one.claim}: {one.reason}" for p in proofs for one in p.failed]
