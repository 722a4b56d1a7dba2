"""What the model of each stage depends on, as digests of contents, by which a finished stage is kept or made again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcompress.model import library_version
from lmcompress.recipes.fingerprints import digest, fingerprint_of_model, fingerprint_of_rows
from lmcompress.recipes.planning import Plan, StagePlan
from lmcompress.recipes.schema import Stage
from lmcompress.registry import SEPARATOR

MOST_CHANGES = 3
"""The greatest number of changes that a message lists."""


@dataclass(frozen=True)
class Dependencies:
    """Everything that a stage's model depends on.

    Attributes:
        stage: its description, with digests of custom parts' code.
        recipe: what all stages share: model, task, seed.
        contents: digests by what they are of, in words: rows, models, earlier stages; and the version of lmcompress.
    """

    stage: dict[str, Any]
    recipe: dict[str, Any]
    contents: dict[str, str | None]

    @property
    def hash(self) -> str:
        """A digest of all of it."""
        return digest([self.stage, self.recipe, self.contents])

    def to_dict(self) -> dict[str, Any]:
        """JSON types, for the file that describes a stage."""
        return {"hash": self.hash, "stage": self.stage, "recipe": self.recipe, "contents": self.contents}

    def changes(self, before: Mapping[str, Any]) -> list[str]:
        """The differences from an earlier run, in words.

        Args:
            before: what :meth:`to_dict` returned then.

        Returns:
            One text for each; empty if nothing has changed.
        """
        if before.get("hash") == self.hash:
            return []
        recorded: dict[str, Any] | None = before.get("contents")
        if recorded is None:
            then, now = _flat(before.get("stage") or {}), _flat(self.stage)
            found = ["an earlier version of lmcompress did not record what it was made from"]
        else:
            then, now = (_flat(of["stage"]) | _flat(of["recipe"]) for of in (before, self.to_dict()))
            found = []
        found += [f"{key}: {then.get(key, 'unset')} then, {now.get(key, 'unset')} now" for key in _changed(then, now)]
        if recorded is None:
            return found
        found += [_of_contents(what, recorded, self.contents) for what in _changed(recorded, self.contents)]
        return found or ["its stage.json was edited"]


def dependencies(planned: Plan) -> dict[str, Dependencies]:
    """What each stage depends on: its description, rows, models, and the stages before it.

    Args:
        planned: the plan.
    """
    kept: Any = {"model", "task", "seed", "dtype"}
    # what is measured is measured again in every run
    recipe = planned.recipe.model_dump(mode="json", include=kept, exclude={"task": {"metrics"}})
    rows: dict[str, str] = {}
    found: dict[str, Dependencies] = {}
    for entry in planned.stages:
        contents = {"lmcompress": library_version()} | _of_rows(planned, entry, rows) | _of_models(planned, entry)
        contents |= {
            f"the stage {name}": found[name].hash for name in (entry.stage.start, *entry.teachers) if name in found
        }
        for part, spec in entry.stage.parts():
            contents |= part.contents(spec, entry.plans.get(part.key))
        found[entry.stage.name] = Dependencies(described(entry.stage), recipe, contents)
    return found


def described(stage: Stage) -> dict[str, Any]:
    """A stage as written, with a digest of the code of each custom part that it names.

    Args:
        stage: a stage of the recipe.

    Returns:
        JSON types; ``code`` is present if a value names a part as ``module:attribute``: digests of modules by name.
    """
    # the control flag only adds another stage, exports are made of the finished model
    values = stage.model_dump(mode="json", exclude={"control", "export"}, exclude_none=True)
    modules = sorted({str(value).partition(SEPARATOR)[0] for value in _leaves(values) if SEPARATOR in str(value)})
    # validation has imported the modules of parts
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in modules}
    code = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for name, file in files.items() if file}
    return values | ({"code": code} if code else {})


def read_marker(folder: Path, file: str) -> dict[str, Any] | None:
    """The description of a stage in its folder.

    Args:
        folder: of its model or its checkpoints.
        file: name of the description.

    Returns:
        JSON types, with ``hash``; None if there is none that can be read.
    """
    try:
        found = json.loads((folder / file).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("hash"), str) else None


def in_words(changes: Sequence[str]) -> str:
    """Changes in one line, the first :data:`MOST_CHANGES` and the number of others.

    Args:
        changes: from :meth:`Dependencies.changes`.
    """
    more = f", and {len(changes) - MOST_CHANGES} more" if len(changes) > MOST_CHANGES else ""
    return ", ".join(changes[:MOST_CHANGES]) + more


def _of_rows(planned: Plan, entry: StagePlan, known: dict[str, str]) -> dict[str, str | None]:
    """Digests of the splits that training reads; without the limit, which is part of the task."""
    data = planned.materials.corpus
    training = entry.stage.training
    splits = {"train"} | {name for part, spec in entry.stage.parts() for name in part.reads(spec)}
    if entry.stage.trains and getattr(training, "eval_strategy", None) not in (None, "no"):
        splits.add("validation")
    for name in sorted(splits - known.keys()):
        known[name] = fingerprint_of_rows(data.splits()[name], data.task)
    return {"the training rows" if name == "train" else f"the {name} rows": known[name] for name in sorted(splits)}


def _of_models(planned: Plan, entry: StagePlan) -> dict[str, str | None]:
    """Digests of the recipe's model, whose tokenizer all stages use, and of the teachers from outside."""
    model = planned.recipe.model
    named = {f"the model {model}": model} if isinstance(model, str) else {}
    named |= {f"the teacher {name}": name for name in entry.teachers if name in planned.outside_teachers}
    return {what: fingerprint_of_model(name) for what, name in named.items()}


def _of_contents(what: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if what == "lmcompress":
        return f"lmcompress: {then.get(what)} then, {now.get(what)} now"
    return f"{what} changed" if what in then and what in now else f"{what} is {'new' if what in now else 'gone'}"


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    return (key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, below in value.items() for k, v in _flat(below, f"{prefix}.{key}" if prefix else key).items()}


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _leaves(below)
    else:
        yield value
