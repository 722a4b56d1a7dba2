"""Reading TextBrewer's own ``DistillationConfig`` files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def read_textbrewer(source: str | Path | Mapping[str, Any]) -> DistillationConfig:
    """A TextBrewer configuration as one of ours, with TextBrewer's defaults.

    Two things are as in TextBrewer: there is no factor ``temperature ** 2``, and labels are not used
    unless ``hard_label_weight`` is set. Three are corrected: schedules scale the configured weight where TextBrewer's
    replace it, per-example temperatures are clamped, and attention matches compare the scores before the softmax,
    whatever the attention kernel. ``attention_mse_sum`` becomes ``attention_mse_mean``, which is smaller by the square
    of the number of heads. ``is_caching_logits`` has no counterpart here: use a teacher store.

    Args:
        source: a JSON file, or its content.

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
            matches=tuple(_match(match) for match in values.get("intermediate_matches") or ()),
        )
    except ValidationError as error:
        raise LmcompressError(f"the TextBrewer configuration is not valid: {error}") from error


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


def _temperature(value: str | list[Any]) -> dict[str, Any]:
    name, *options = value if isinstance(value, list) else [value]
    if name in ("none", "constant") and not options:
        return {"kind": "constant"}
    if name == "flsw" and len(options) == 2:
        return {"kind": "flsw", "beta": options[0], "gamma": options[1]}
    if name == "cwsm" and len(options) == 1:
        return {"kind": "cwsm", "beta": options[0]}
    raise LmcompressError(
        f'TextBrewer\'s temperature_scheduler is "none", ["flsw", beta, gamma] or ["cwsm", beta], got {value!r}'
    )


def _match(match: Any) -> dict[str, Any]:
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
        # TextBrewer counts the layers of a list: attention 0 is the first block, hidden 0 the embeddings
        "student": _layer(match["layer_S"], attention),
        "teacher": _layer(match["layer_T"], attention),
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
    if not shaped or not isinstance(options, Mapping) or set(options) - {"lr"}:
        raise LmcompressError(
            'TextBrewer\'s proj is [kind, student width, teacher width] and perhaps {"lr": rate} (other options of the '
            f"optimizer have no counterpart here), got {proj!r}"
        )
    values = {"projection": proj[0]}
    return values | ({"projection_learning_rate": options["lr"]} if "lr" in options else {})


def _layer(value: Any, attention: bool) -> int | tuple[int, ...]:
    layers = value if isinstance(value, list | tuple) else [value]
    if not layers or not all(isinstance(layer, int) for layer in layers):
        raise LmcompressError(f"layer_T and layer_S are a number or a list of numbers, got {value!r}")
    # counted from the end, both agree
    moved = tuple(layer + 1 if attention and layer >= 0 else layer for layer in layers)
    return moved if isinstance(value, list | tuple) else moved[0]
