"""Models named by a recipe or a command: one message if there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lmcompress.errors import LmcompressError
from lmcompress.export import is_exported

_UNREACHABLE = ("couldn't connect", "offline", "cached files", "local_files_only", "can't load tokenizer")


@contextmanager
def found(name: str | Path, what: str) -> Iterator[None]:
    """Turns the various errors of Transformers for a missing model into one.

    Args:
        name: folder, or name on the Hub.
        what: kind of the loaded object: ``"model"`` or ``"tokenizer"``.

    Raises:
        LmcompressError: If there is no such folder, no model in it, none of that name in the local cache or on the Hub,
            or its files are damaged.
    """
    check_model_folder(name)
    try:
        yield
    except LmcompressError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        if not Path(name).exists() and any(words in str(error).lower() for words in _UNREACHABLE):
            raise LmcompressError(
                f"no such folder: {name}; and no model of that name in the local cache (the Hub is out of reach)"
            ) from error
        raise LmcompressError(f"could not load the {what} of {str(name)!r}: {first_line(error)}") from error


def check_model_folder(name: str | Path) -> None:
    """Refuse a path that holds no model; possible names on the Hub pass.

    Args:
        name: folder, or name on the Hub.

    Raises:
        LmcompressError: If it is empty, looks like a path and is none of a folder, or is a folder without
            ``config.json``.
    """
    text, folder = str(name), Path(name)
    if not text.strip():
        raise LmcompressError(f"a model must be named: a folder, or a name on the Hub, got {text!r}")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            models = sorted(str(path.parent) for path in folder.glob("*/config.json"))
            hint = f"; its models are: {', '.join(models)}" if models else ""
            raise LmcompressError(f"{name} holds no model (no config.json){hint}")
    elif folder.exists():
        raise LmcompressError(f"{name} is a file; a model is a folder, or a name on the Hub")
    elif text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise LmcompressError(f"no such folder: {name}")


def check_weights(name: str | Path) -> None:
    """Refuse a folder whose weights are not there or are damaged; of safetensors only the headers are read.

    Args:
        name: folder, or name on the Hub, which passes, as does an exported model: it is loaded by its runtime.

    Raises:
        LmcompressError: If there are no weights, or a file of them is cut off or of another format.
    """
    folder = Path(name)
    if not folder.is_dir() or is_exported(folder):
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        raise LmcompressError(f"{name} holds a config.json, but no weights (no model.safetensors)")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise LmcompressError(
                f"{file} is damaged ({first_line(error)}): copy it again, or save the model anew"
            ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 300 characters; its type if it has none.

    Args:
        error: any exception.
    """
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:300]


def has_tokenizer(name: str | Path) -> bool:
    """Whether a model comes with a tokenizer.

    Args:
        name: folder, or name on the Hub, which is taken to have one.
    """
    folder, files = Path(name), ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
    return not folder.is_dir() or any((folder / file).is_file() for file in files)
