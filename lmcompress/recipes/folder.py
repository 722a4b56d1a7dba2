"""The folder of a run: its contents, the recipe it was made by, and whether that is the current one."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmcompress.errors import LmcompressError
from lmcompress.recipes.files import write_json, write_text
from lmcompress.recipes.loading import dump_recipe
from lmcompress.recipes.measuring import STAGE_FILE
from lmcompress.recipes.planning import Plan
from lmcompress.recipes.schema import Recipe, Stage
from lmcompress.registry import SEPARATOR

CHECKPOINTS = "checkpoints"


def stage_hashes(planned: Plan) -> dict[str, str]:
    """A hash for each stage of everything its model depends on: its own description, the task, the model, and the
    stages before it.

    Args:
        planned: the plan.
    """
    recipe = planned.recipe
    common = recipe.model_dump(mode="json", include={"model", "task", "seed"})
    hashes: dict[str, str] = {}
    for entry in planned.stages:
        stage = entry.stage
        needs = [name for name in (stage.start, *entry.teachers) if name in hashes]
        text = json.dumps([common, described(stage), [hashes[name] for name in needs]], sort_keys=True)
        hashes[stage.name] = hashlib.sha256(text.encode()).hexdigest()
    return hashes


def check_folder(folder: Path, planned: Plan, hashes: Mapping[str, str], overwrite: bool) -> None:
    """Refuse a folder that holds something else, or stages that come from a different recipe.

    Args:
        folder: folder of the run.
        planned: the plan.
        hashes: hashes of its stages, from :func:`stage_hashes`.
        overwrite: whether stages of a different recipe may be replaced.

    Raises:
        LmcompressError: If a stage's folder holds something else, or is of another recipe.
    """
    for entry in planned.stages:
        name = entry.stage.name
        target = folder / name
        checkpoints = folder / CHECKPOINTS / name
        finished, interrupted = finished_hash(target), _hash_in(checkpoints)
        if finished is None and (target.is_file() or target.is_dir() and any(target.iterdir())):
            raise LmcompressError(f"{target} holds something other than a stage of a run; name another --output")
        if overwrite or hashes[name] in (finished, interrupted):
            continue
        if finished is not None or interrupted is not None:
            changed = _what_changed((target, checkpoints), entry.stage)
            raise LmcompressError(
                f"{target} was made by a different recipe ({changed}). Name another --output to keep it, or pass "
                "--overwrite to train that stage and later ones again"
            )


def begin(folder: Path, recipe: Recipe) -> None:
    """Make the folder of a run, and write its recipe into it.

    Args:
        folder: of the run.
        recipe: validated.

    Raises:
        LmcompressError: If it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
    except OSError as error:
        raise LmcompressError(f"cannot write to {folder}: {error.strerror or error}") from error


def checkpoint_to_resume(folder: Path, stage: Stage, digest: str, *, resume: bool) -> Path | None:
    """The checkpoint from which an interrupted stage resumes, if any; marks the folder of checkpoints as this stage's.

    Args:
        folder: folder of the stage's checkpoints.
        stage: its current description.
        digest: hash of everything the stage depends on.
        resume: whether to resume; otherwise the stage restarts.

    Returns:
        The last complete checkpoint, or None.
    """
    if folder.exists() and (_hash_in(folder) != digest or not resume):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STAGE_FILE, {"hash": digest, "stage": described(stage)})
    numbered = {
        int(p.name.rpartition("-")[2]): p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()
    }
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        # the state is written last: without it the process died while writing
        if (checkpoint / "trainer_state.json").is_file():
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def finished_hash(target: Path) -> str | None:
    """Hash of all that a finished stage depended on; None where its model is not there.

    Args:
        target: folder of the stage's model.
    """
    return _hash_in(target) if (target / "config.json").is_file() else None


def described(stage: Stage) -> dict[str, Any]:
    """A stage as written, with a digest of the code of each custom part that it names.

    Args:
        stage: a stage of the recipe.

    Returns:
        JSON types; ``code`` is present if a value names a part as ``module:attribute``: digests of modules by name.
    """
    # the control flag only adds another stage
    values = stage.model_dump(mode="json", exclude={"control"}, exclude_none=True)
    modules = sorted({str(value).partition(SEPARATOR)[0] for value in _leaves(values) if SEPARATOR in str(value)})
    # validation has imported the modules of parts
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in modules}
    code = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for name, file in files.items() if file}
    return values | ({"code": code} if code else {})


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _leaves(below)
    else:
        yield value


def _what_changed(folders: Sequence[Path], stage: Stage) -> str:
    for folder in folders:
        try:
            before = _flat(json.loads((folder / STAGE_FILE).read_text("utf-8"))["stage"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        now = _flat(described(stage))
        keys = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
        if keys:
            shown = ", ".join(
                f"{key}: {before.get(key, 'unset')} then, {now.get(key, 'unset')} now" for key in keys[:3]
            )
            return shown + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")
        return "the model, the task, the seed or an earlier stage differs"
    return "its stage.json cannot be read"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, below in value.items() for k, v in _flat(below, f"{prefix}.{key}" if prefix else key).items()}


def _hash_in(folder: Path) -> str | None:
    try:
        found = json.loads((folder / STAGE_FILE).read_text("utf-8"))["hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(found)
