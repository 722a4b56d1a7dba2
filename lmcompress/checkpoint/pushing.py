"""Uploading a saved checkpoint to the Hugging Face Hub: only its files, no paths of this machine, one message each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

from lmcompress.errors import LmcompressError

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "lmcompress.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    # modeling code of the self-loading format
    "modeling_*.py",
    "configuration_*.py",
    # tokenizers
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
)
"""Patterns of the file names that are uploaded."""

_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# files in which a path of this machine may be written
_WITH_PATHS = ("config.json", "lmcompress.json", "README.md")
# not part of an address (https://…), of a word (and/or) or of a closing tag (</b>); a single /name is none
_PATH = re.compile(r"(?<![\w/\\:.<~])(?:~?(?:/[\w.@+~-]+){2,}/?|[A-Za-z]:(?:\\[\w.@+~ -]+)+)")
_LOGIN = "log in with `hf auth login`, set HF_TOKEN, or pass token="


def check_destination(repo_id: str, *, token: str | bool | None = None) -> None:
    """Refuse what can be known to fail before anything is trained, saved or sent; the Hub is not asked.

    Args:
        repo_id: ``"user/name"``, or ``"name"`` for one of the token's owner.
        token: access token of the Hub; default: that of the login.

    Raises:
        LmcompressError: If the Hub allows no such name, there is no token, or the process is offline.
    """
    check_name(repo_id)
    # imported here: loading and serving a model do not need it
    from huggingface_hub import get_token, is_offline_mode

    if is_offline_mode():
        raise LmcompressError("the Hub cannot be reached: HF_HUB_OFFLINE=1 is set; unset it to push")
    if token is False or not (isinstance(token, str) and token or get_token()):
        raise LmcompressError(f"pushing to the Hub needs a token, and there is none: {_LOGIN}")


def check_name(repo_id: str) -> None:
    """Refuse a name that no repository can have.

    Args:
        repo_id: ``"user/name"``, or ``"name"`` for one of the token's owner.

    Raises:
        LmcompressError: If the Hub allows no such name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if not isinstance(repo_id, str) or not repo_id:
            raise HFValidationError("expected a string")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise LmcompressError(
            f"{repo_id!r} is no name on the Hub; expected user/name of letters, digits, '-', '_' and '.' ({error})"
        ) from error


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with lmcompress",
    commit_description: str | None = None,
    create_pr: bool = False,
    tags: str | Sequence[str] | None = None,
) -> str:
    """Upload a saved checkpoint in one commit, model card and report included.

    Only files named by :data:`MODEL_FILES` are uploaded: no training state and nothing in folders. Weights that the
    repository had under other names (as shards, or as one file) are deleted by the same commit, as they would be loaded
    in place of the new ones. In the card, the report and the config, absolute paths of this machine become their last
    part.

    Args:
        folder: as :meth:`CompressedModel.save_pretrained` wrote it.
        repo_id: ``"user/name"``, or ``"name"`` for one of the token's owner; created if it does not exist.
        private: whether a newly created repository is private; default: as its owner has set.
        token: access token of the Hub; default: that of the login.
        revision: branch to commit to, created if it does not exist; default: the main branch.
        commit_message: first line of the commit's message.
        commit_description: the rest of it.
        create_pr: whether to open a pull request in place of a commit to the branch.
        tags: added to the metadata of the model card.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        LmcompressError: If ``folder`` holds no checkpoint, the name is not valid, there is no token, the Hub does not
            accept it or gives it no permission, the Hub cannot be reached, or fails.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise LmcompressError(
            f"{folder} holds no checkpoint (no config.json); push the folder that a run wrote its model to"
        )
    check_destination(repo_id, token=token)
    contents = _contents(folder, [tags] if isinstance(tags, str) else list(tags or ()))
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    with _one_message(api.endpoint, repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        _make_branch(api, repo_id, revision, create_pr)
        there = api.list_repo_files(repo_id, revision=revision)
        stale = [name for name in there if _matches(name, _WEIGHTS) and name not in contents]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in contents.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.pr_url or commit.commit_url)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)


def _contents(folder: Path, tags: Sequence[str]) -> dict[str, str | bytes]:
    """What is uploaded, by name: the path of a file, or what to send in its place."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and _matches(file.name, MODEL_FILES))
    contents: dict[str, str | bytes] = {name: str(folder / name) for name in names}
    for name in (name for name in _WITH_PATHS if name in contents):
        text = (folder / name).read_text("utf-8")
        public = _public_text(text) if name.endswith(".md") else _public_json(folder / name, text)
        if public != text:
            contents[name] = public.encode()
    if tags:
        contents["README.md"] = _tagged(contents.get("README.md"), tags).encode()
    return contents


def _public_text(text: str) -> str:
    """A text in which every absolute path is its last part."""
    return _PATH.sub(lambda found: _last_part(found[0]), text)


def _last_part(path: str) -> str:
    return PurePath(path.replace("\\", "/")).name


def _public_json(file: Path, text: str) -> str:
    """A JSON text with the same done to every string in it; unchanged if there is no path."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise LmcompressError(f"{file} is not JSON ({error}); it is damaged, save the model again") from error
    public = _public_value(value)
    return text if public == value else json.dumps(public, indent=2) + "\n"


def _public_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {_public_text(name): _public_value(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_public_value(one) for one in value]
    if not isinstance(value, str):
        return value
    # a whole string may be a path with blanks or letters that no pattern knows
    whole = PurePath(value).is_absolute() and "\n" not in value and len(PurePath(value).parts) > 2
    return _last_part(value) if whole else _public_text(value)


def _tagged(card: str | bytes | None, tags: Sequence[str]) -> str:
    """The text of a model card with more tags in its metadata."""
    from huggingface_hub import ModelCard

    text = Path(card).read_text("utf-8") if isinstance(card, str) else (card or b"").decode()
    found = ModelCard(text, ignore_metadata_errors=True)
    found.data.tags = list(dict.fromkeys([*(found.data.tags or ()), *tags]))
    found.data.library_name = found.data.library_name or "transformers"
    return str(found)


def _make_branch(api: Any, repo_id: str, revision: str | None, create_pr: bool) -> None:
    """Create the branch to commit to, as Transformers does."""
    from huggingface_hub.errors import HfHubHTTPError

    if revision is None or revision.startswith("refs/pr"):
        return
    try:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    except HfHubHTTPError as error:
        # who may only propose changes needs a branch that exists; the commit finds out
        if not (create_pr and error.response.status_code == 403):
            raise


@contextmanager
def _one_message(endpoint: str, repo_id: str) -> Iterator[None]:
    """Turn each fault of the Hub, the network or the login into an error with one message."""
    # the HTTP library's own base class, whichever it is in this version
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    # an upload wraps what went wrong in a RuntimeError
    except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        if isinstance(cause, HfHubHTTPError):
            raise LmcompressError(_refusal(cause, endpoint, repo_id)) from error
        if isinstance(cause, (HTTPError, ConnectionError, TimeoutError)):
            said = _first_line(cause) or type(cause).__name__
            raise LmcompressError(
                f"the connection to the Hub at {endpoint} failed ({said}); {repo_id} is unchanged unless the commit "
                "got through. Check the network, and HF_ENDPOINT if it is set, and push again"
            ) from error
        raise LmcompressError(f"the upload to {repo_id} failed ({_first_line(cause)}); push again") from error


def _refusal(error: Any, endpoint: str, repo_id: str) -> str:
    """The message for an answer of the Hub that is an error."""
    status = error.response.status_code
    said = f"{status}: {error.server_message or error.response.reason_phrase}"
    if status == 401:
        return f"the Hub at {endpoint} did not accept the token ({said}): {_LOGIN}"
    if status == 403:
        return f"the token has no permission to write to {repo_id} ({said}): use one that may, or push to another name"
    if status >= 500 or status == 429:
        return f"the Hub at {endpoint} failed, after retries where they help ({said}); push again later"
    return f"the Hub at {endpoint} refused the push to {repo_id} ({said})"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
