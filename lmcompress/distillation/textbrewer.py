"""Reading TextBrewer's own ``DistillationConfig`` files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from lmcompress.distillation.config import DistillationConfig
from lmcompress.errors import LmcompressError, nearest

_KEYS = (
    "temperature",
    "temperature_scheduler",
    "hard_label_weight",
    "hard_label_weight_scheduler",
    "kd_loss_type",
    "kd_loss_weight",
    "kd_loss_weight_scheduler",
    "probability_shift",
    "intermediate_matches",
    "is_caching_logits",
)
_MATCH_KEYS = ("layer_T", "layer_S", "feature", "loss", "weight", "proj")
_MATCHES = {
    "hidden_mse": "hidden_mse",
    "cos": "hidden_cosine",
    "pkd": "pkd",
    "gram": "gram",
    "fsp": "fsp",
    "mmd": "mmd",
    "nst": "nst",
    "attention_mse": "attention_mse",
    "attention_mse_sum": "attention_mse_mean",
    "attention_ce": "attention_ce",
    "attention_ce_mean": "attention_ce_mean",
}
_SCHEDULES = {"none": "constant", "linear_decay": "linear_decay", "linear_growth": "linear_growth"}


_PROJECTION_OPTIONS = ("weight_decay", "betas", "eps", "amsgrad", "momentum", "dampening", "nesterov")

CountedFrom = Literal["auto", "block", "embeddings"]
"""What number 0 of an attention layer is; see :func:`read_textbrewer`."""


def read_textbrewer(
    source: str | Path | Mapping[str, Any], *, attention_from: CountedFrom = "auto", teacher_layers: int | None = None
) -> DistillationConfig:
    """A TextBrewer configuration as one of ours, with TextBrewer's defaults.

    Two things are as in TextBrewer: there is no factor ``temperature ** 2``, and labels are not used
    unless ``hard_label_weight`` is set. Three are corrected: schedules scale the configured weight where TextBrewer's
    replace it, per-example temperatures are clamped, and attention matches compare the scores before the softmax,
    whatever the attention kernel. ``attention_mse_sum`` becomes ``attention_mse_mean``, which is smaller by the square
    of the number of heads. ``is_caching_logits`` is no part of the objective:
    :meth:`~lmcompress.distillation.Distillation.from_textbrewer` makes a store of it.

    TextBrewer's layers are indices into lists that the user's adaptor returns. For hidden states that list begins with
    the embeddings; for attention with the first block, or, as in all of TextBrewer's own recipes (layers 4, 8 and 12 of
    a teacher of 12), with the embeddings.

    Args:
        source: a JSON file, or its content.
        attention_from: what attention layer 0 is: the first ``block``, or the ``embeddings``, so that the last of 12
            blocks is 12. ``auto``: embeddings if one of ``layer_T`` is ``teacher_layers``, or, if that is not known, if
            there are several pairs with one ratio ``layer_T`` / ``layer_S``, which no other count gives; else block.
        teacher_layers: number of the teacher's blocks.

    Returns:
        The configuration.

    Raises:
        LmcompressError: If it is not a TextBrewer configuration, or requests something that has no equivalent here.
    """
    values = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    for key in values:
        if key not in _KEYS:
            raise LmcompressError(f"a TextBrewer configuration has no {key!r}{nearest(key, _KEYS)}")
    kind = values.get("kd_loss_type", "ce")
    if kind not in ("ce", "mse"):
        raise LmcompressError(f"TextBrewer's kd_loss_type must be ce or mse, got {kind!r}")
    matches = values.get("intermediate_matches") or ()
    first = _first_block(matches, attention_from, teacher_layers)
    try:
        return DistillationConfig(
            loss=kind,
            temperature=values.get("temperature", 4.0),
            temperature_schedule=_temperature(values.get("temperature_scheduler", "none")),
            scale_by_temperature=False,
            weight=values.get("kd_loss_weight", 1.0),
            weight_schedule=_schedule(values.get("kd_loss_weight_scheduler", "none")),
            label_weight=values.get("hard_label_weight", 0.0),
            label_weight_schedule=_schedule(values.get("hard_label_weight_scheduler", "none")),
            probability_shift=values.get("probability_shift", False),
            matches=tuple(_match(match, first) for match in matches),
        )
    except ValidationError as error:
        raise LmcompressError(f"the TextBrewer configuration is not valid: {error}") from error


def caches_logits(source: str | Path | Mapping[str, Any]) -> bool:
    """Whether a TextBrewer configuration asks for the teacher to run once only (``is_caching_logits``).

    Args:
        source: a JSON file, or its content.

    Returns:
        False where it has intermediate matches too, for which TextBrewer does not cache.

    Raises:
        LmcompressError: If it cannot be read.
    """
    values = source if isinstance(source, Mapping) else _read(Path(source))
    return bool(values.get("is_caching_logits")) and not values.get("intermediate_matches")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LmcompressError(f"cannot read {path} as a TextBrewer configuration: {error}") from error
    if not isinstance(values, dict):
        raise LmcompressError(f"{path} is no TextBrewer configuration: expected an object, got {type(values).__name__}")
    return values


def _schedule(name: Any) -> str:
    if not isinstance(name, str) or name not in _SCHEDULES:
        raise LmcompressError(f"TextBrewer has no weight scheduler {name!r}{nearest(str(name), _SCHEDULES)}")
    return _SCHEDULES[name]


def _temperature(value: Any) -> dict[str, Any]:
    name, options = _named_options(value)
    wanted = {"none": [], "constant": [], "flsw": ["beta", "gamma"], "cwsm": ["beta"]}.get(str(name))
    # TextBrewer's builders ignore further arguments by position
    if wanted is not None and isinstance(options, list) and len(options) >= len(wanted) and (wanted or not options):
        options = dict(zip(wanted, options, strict=False))
    if wanted is None or not isinstance(options, dict) or set(options) != set(wanted):
        raise LmcompressError(
            'TextBrewer\'s temperature_scheduler is "none", ["flsw", beta, gamma] or ["cwsm", beta], the arguments by '
            f'position or as {{"beta": ..., "gamma": ...}}, got {value!r}'
        )
    return {"kind": "constant" if name == "none" else name} | options


def _named_options(value: Any) -> tuple[Any, Any]:
    """Name and arguments of a scheduler, these by position or by name."""
    if isinstance(value, Mapping):
        options = dict(value)
        if len(options) == 1 and not {"name", "kind"} & options.keys():
            (pair,) = options.items()
            return pair[0], dict(pair[1]) if isinstance(pair[1], Mapping) else pair[1]
        return options.pop("name", options.pop("kind", None)), options
    name, *rest = value if isinstance(value, list | tuple) and value else [value]
    return name, dict(rest[0]) if len(rest) == 1 and isinstance(rest[0], Mapping) else rest


def _first_block(matches: Any, asked: str, teacher_layers: int | None) -> int:
    """The number that the configuration gives to the first block's attention: 0 or 1."""
    if asked not in get_args(CountedFrom):
        raise LmcompressError(f"attention_from must be {', '.join(get_args(CountedFrom))}, got {asked!r}")
    pairs = [
        (match.get("layer_T"), match.get("layer_S"))
        for match in matches
        if isinstance(match, Mapping) and match.get("feature") == "attention"
    ]
    numbers: Any = [pair for pair in pairs if all(isinstance(n, int) and n >= 0 for n in pair)]
    if asked != "auto" or not numbers:
        return 1 if asked == "embeddings" else 0
    if any(0 in pair for pair in numbers):
        return 0
    if teacher_layers is not None:
        return int(teacher_layers in [theirs for theirs, _ in numbers])
    return int(len(set(numbers)) > 1 and len({Fraction(theirs, mine) for theirs, mine in numbers}) == 1)


def _match(match: Any, first: int) -> dict[str, Any]:
    if not isinstance(match, Mapping):
        raise LmcompressError(f"a TextBrewer match is an object with {', '.join(_MATCH_KEYS)}, got {match!r}")
    for key in match:
        if key not in _MATCH_KEYS:
            raise LmcompressError(f"a TextBrewer match has no {key!r}{nearest(key, _MATCH_KEYS)}")
    if missing := [key for key in ("layer_T", "layer_S", "feature", "loss") if key not in match]:
        raise LmcompressError(f"a TextBrewer match needs {' and '.join(missing)}, got {dict(match)}")
    loss, feature = match["loss"], match["feature"]
    if loss not in _MATCHES:
        raise LmcompressError(f"TextBrewer has no match loss {loss!r}{nearest(str(loss), _MATCHES)}")
    attention = _MATCHES[loss].startswith("attention")
    if feature != ("attention" if attention else "hidden"):
        raise LmcompressError(
            f"the match loss {loss!r} compares the feature {'attention' if attention else 'hidden'!r}, got {feature!r}"
        )
    values: dict[str, Any] = {
        "loss": _MATCHES[loss],
        # here attention 1 is the first block, and hidden 0 the embeddings
        "student": _layer(match["layer_S"], 1 - first if attention else 0),
        "teacher": _layer(match["layer_T"], 1 - first if attention else 0),
        "weight": match.get("weight", 1.0),
        "projection": "none",
    }
    if attention:
        values["on"] = "scores"
    if match.get("proj"):
        values |= _projection(match["proj"])
    return values


def _projection(proj: Any) -> dict[str, Any]:
    shaped = isinstance(proj, list | tuple) and 3 <= len(proj) <= 4 and isinstance(proj[0], str)
    options = proj[3] if shaped and len(proj) == 4 else {}
    if not shaped or not isinstance(options, Mapping) or set(options) - {"lr", *_PROJECTION_OPTIONS}:
        raise LmcompressError(
            "TextBrewer's proj is [kind, student width, teacher width] and perhaps options of the optimizer, of which "
            f"there are lr, {', '.join(_PROJECTION_OPTIONS)}; got {proj!r}"
        )
    values: dict[str, Any] = {"projection": proj[0]}
    if "lr" in options:
        values["projection_learning_rate"] = options["lr"]
    if others := {name: value for name, value in options.items() if name != "lr"}:
        values["projection_optimizer"] = others
    return values


def _layer(value: Any, more: int) -> int | tuple[int, ...]:
    layers = value if isinstance(value, list | tuple) else [value]
    if not layers or not all(isinstance(layer, int) for layer in layers):
        raise LmcompressError(f"layer_T and layer_S are a number or a list of numbers, got {value!r}")
    # counted from the end, both agree
    moved = tuple(layer + more if layer >= 0 else layer for layer in layers)
    return moved if isinstance(value, list | tuple) else moved[0]
