"""The folder of a run: its contents, the recipe it was made by, and whether that is the current one."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lmcompress.errors import LmcompressError
from lmcompress.recipes.contents import Dependencies, in_words, read_marker
from lmcompress.recipes.files import write_json, write_text
from lmcompress.recipes.loading import dump_recipe
from lmcompress.recipes.measuring import STAGE_FILE
from lmcompress.recipes.planning import Plan
from lmcompress.recipes.schema import Recipe
from lmcompress.trainers.state import STATE_FILE

try:
    import fcntl as _fcntl
except ImportError:
    # Windows
    _fcntl = None  # type: ignore[assignment]

fcntl: Any = _fcntl

CHECKPOINTS = "checkpoints"

logger = logging.getLogger(__name__)


def check_folder(folder: Path, planned: Plan, needs: Mapping[str, Dependencies], overwrite: bool) -> None:
    """Refuse a folder that holds something else, or stages that were made from something else.

    Args:
        folder: folder of the run.
        planned: the plan.
        needs: what its stages depend on, from :func:`~lmcompress.recipes.contents.dependencies`.
        overwrite: whether stages that were made from something else may be replaced.

    Raises:
        LmcompressError: If a stage's folder holds something else, or was made by another recipe or from other contents.
    """
    for entry in planned.stages:
        name = entry.stage.name
        target = folder / name
        if not is_finished(target) and (target.is_file() or target.is_dir() and any(target.iterdir())):
            raise LmcompressError(f"{target} holds something other than a stage of a run; name another --output")
        changed = changes_since(folder, name, needs[name])
        if changed and not overwrite:
            raise LmcompressError(
                f"{target} was made from something else ({in_words(changed)}). Name another --output to keep it, or "
                "pass --overwrite to train that stage and later ones again"
            )


def changes_since(folder: Path, name: str, needs: Dependencies) -> list[str]:
    """What has changed since a stage was trained, or begun, in words.

    Args:
        folder: folder of the run.
        name: name of the stage.
        needs: what it depends on now.

    Returns:
        Empty if nothing has changed, or the stage was never begun.
    """
    places = (folder / name, folder / CHECKPOINTS / name)
    found = [marker for place in places if (marker := read_marker(place, STAGE_FILE)) is not None]
    if not found or any(marker["hash"] == needs.hash for marker in found):
        return []
    return needs.changes(found[0])


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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block, no other process carries out a run in this folder; where the system has no such locks, one may.

    Args:
        folder: of the run; made if it does not exist.

    Raises:
        LmcompressError: If another process has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # of the folder itself: no file that could stay behind, and a process that is killed lets go
        handle = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    except OSError as error:
        raise LmcompressError(f"cannot write to {folder}: {error.strerror or error}") from error
    try:
        if handle is not None:
            _lock(handle, folder)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LmcompressError(
            f"another process is running in {folder}: wait until it is done, or name another --output"
        ) from error
    except OSError:
        # some network file systems have no locks
        logger.warning("%s cannot be locked: do not start two runs in it at once", folder)


def checkpoint_to_resume(
    folder: Path, needs: Dependencies, *, resume: bool, say: Callable[[str], object] = lambda _: None
) -> Path | None:
    """The checkpoint from which an interrupted stage resumes, if any; marks the folder of checkpoints as this stage's.

    Args:
        folder: folder of the stage's checkpoints.
        needs: what the stage depends on.
        resume: whether to resume; otherwise the stage restarts.
        say: is told of checkpoints that are damaged, which are removed.

    Returns:
        The last complete checkpoint, or None.
    """
    marker = read_marker(folder, STAGE_FILE)
    if folder.exists() and (marker is None or marker["hash"] != needs.hash or not resume):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STAGE_FILE, needs.to_dict())
    numbered = {
        int(p.name.rpartition("-")[2]): p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()
    }
    with_state = any((checkpoint / STATE_FILE).exists() for checkpoint in numbered.values())
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        # the state is written last: without it the process died while writing
        if not (checkpoint / "trainer_state.json").is_file():
            shutil.rmtree(checkpoint)
        elif (damaged := _damaged_file(checkpoint, with_state)) is not None:
            say(f"{checkpoint.name} is damaged ({damaged}) and left out")
            shutil.rmtree(checkpoint)
        else:
            return checkpoint
    return None


def _damaged_file(checkpoint: Path, with_state: bool) -> str | None:
    """The first file of a training checkpoint that is missing or cut off; None if all are whole.

    Args:
        checkpoint: folder of the checkpoint.
        with_state: whether methods of the stage have a state, as other checkpoints of it say.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except ValueError:
        return "trainer_state.json"
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not any(file.name.startswith("model") for file in weights):
        return "model.safetensors"
    if with_state and not (checkpoint / STATE_FILE).exists():
        return STATE_FILE
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return file.name
    # without one of them Trainer would go on from a fresh optimizer, schedule or order of rows
    states = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    cut_off = [file.name for file in states if not zipfile.is_zipfile(file)]
    return next(iter(cut_off), None) or (None if len(states) > 2 else "rng_state.pth")


def is_finished(target: Path, needs: Dependencies | None = None) -> bool:
    """Whether the folder of a stage's model holds one.

    Args:
        target: folder of the stage's model.
        needs: what it must have been made from; None: anything.
    """
    marker = read_marker(target, STAGE_FILE) if (target / "config.json").is_file() else None
    return marker is not None and (needs is None or marker["hash"] == needs.hash)
