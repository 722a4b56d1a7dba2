"""A Hugging Face Hub on loopback: the part of its HTTP interface that pushes and loads models, and faults on demand.

Repositories, branches, pull requests, uploads of large files (LFS) and access tokens behave as on huggingface.co.
Nothing is kept when the process ends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "me"
TOKEN = "hf_write"
READ_TOKEN = "hf_read"


@dataclass
class Repository:
    """A model repository.

    Attributes:
        private: whether it needs a token to be read.
        branches: the commit that each branch, or ``refs/pr/1``, points to.
        commits: all files of each commit.
        log: what each push asked for, in order: branch, summary, description, whether a pull request.
    """

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Point a branch to new contents; returns the commit's id."""
        oid = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch or commit."""
        return self.commits[self.branches.get(revision, revision)]


class Hub:
    """The state of the server, and its address.

    Attributes:
        url: address, as in ``HF_ENDPOINT``.
        repositories: by name.
        fault: what fails, as ``(method, part of the path, what)``, where what is a status or ``"drop"``.
        fault_times: how often it fails; None: always.
        requests: method and path of every request.
    """

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.fault: tuple[str, str, int | str] | None = None
        self.fault_times: int | None = None
        self.requests: list[tuple[str, str]] = []

    def __getitem__(self, name: str) -> Repository:
        return self.repositories[name]

    def fail(self, method: str, part: str, what: int | str, times: int | None = None) -> None:
        """Let requests fail with a status, or by a dropped connection (``"drop"``)."""
        self.fault, self.fault_times = (method, part, what), times

    def environment(self, home: object, token: str | None = TOKEN) -> dict[str, str]:
        """Environment variables with which another process uses this Hub; ``home`` is its cache."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return variables | ({} if token is None else {"HF_TOKEN": token})

    def due_fault(self, method: str, path: str) -> int | str | None:
        """The fault for a request, counted."""
        if self.fault is None or self.fault_times == 0 or method != self.fault[0] or self.fault[1] not in path:
            return None
        if self.fault_times is not None:
            self.fault_times -= 1
        return self.fault[2]


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    """An answer that is an error: status, the Hub's code for it, message, and perhaps more of its body."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, query = url.path, parse_qs(url.query)
        self.hub.requests.append((self.command, path))
        fault = self.hub.due_fault(self.command, path)
        if fault == "drop":
            # in the midst of what the client sends
            self.rfile.read(min(10, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        try:
            if fault is not None:
                raise _Refused(fault, None, "You don't have the rights to do this" if fault == 403 else "out of order")
            for method, pattern, action in _ROUTES:
                if (found := re.fullmatch(pattern, path)) and self.command in method:
                    self._send(200, action(self, body, query, *(unquote(part) for part in found.groups())))
                    return
            raise _Refused(404, "EntryNotFound", f"no route {path}")
        except _Refused as refused:
            status, code, message, *more = refused.args
            headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
            self._send(status, {"error": message} | dict(*more), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        if isinstance(value, tuple):
            value, headers = value
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _token(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        token = given.removeprefix("Bearer ")
        if token not in (TOKEN, READ_TOKEN):
            raise _Refused(401, None, "Invalid user token.")
        return token

    def _writer(self, name: str) -> None:
        if (token := self._token()) is None:
            raise _Refused(401, None, "Invalid username or password.")
        if token != TOKEN or name.split("/")[0] != USER:
            raise _Refused(403, None, f"You don't have the rights to write under {name.split('/')[0]}")

    def _repository(self, name: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._token() is None):
            raise _Refused(401 if self._token() is None else 404, "RepoNotFound", "Repository not found")
        if write:
            self._writer(name)
        return repository

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(name)
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repository.commits[oid]

    def whoami(self, body: bytes, query: Any) -> Any:
        if self._token() is None:
            raise _Refused(401, None, "Invalid username or password.")
        return {"name": USER, "type": "user", "orgs": [], "auth": {"type": "access_token"}}

    def create(self, body: bytes, query: Any) -> Any:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        self._writer(name)
        url = {"url": f"{self.hub.url}/{name}", "id": name}
        if name in self.hub.repositories:
            raise _Refused(409, None, "You already created this model repo", url)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[name] = repository = Repository(private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return url

    def validate(self, body: bytes, query: Any) -> Any:
        return {"errors": [], "warnings": []}

    def branch(self, body: bytes, query: Any, name: str, branch: str) -> Any:
        repository = self._repository(name, write=True)
        if branch in repository.branches:
            raise _Refused(409, None, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def preupload(self, body: bytes, query: Any, name: str, revision: str) -> Any:
        self._repository(name, write="create_pr" not in query)
        _, files = self._files(name, revision)
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if _large(path) else "regular",
                    "shouldIgnore": False,
                    "oid": _entry(path, files[path])["oid"] if path in files else None,
                }
                for path in (entry["path"] for entry in json.loads(body)["files"])
            ]
        }

    def lfs_batch(self, body: bytes, query: Any, name: str) -> Any:
        self._repository(name)
        objects = []
        for entry in json.loads(body)["objects"]:
            known = {"oid": entry["oid"], "size": entry["size"]}
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            verify = {"verify": {"href": f"{self.hub.url}/lfs-verify/{entry['oid']}"}}
            objects.append(known if entry["oid"] in self.hub.large_files else known | {"actions": upload | verify})
        return {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def lfs_put(self, body: bytes, query: Any, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, None, "the content is not what its hash says")
        self.hub.large_files[oid] = body
        return {}

    def lfs_verify(self, body: bytes, query: Any, oid: str) -> Any:
        if json.loads(body)["size"] != len(self.hub.large_files.get(oid, b"")):
            raise _Refused(400, None, "not uploaded")
        return {}

    def commit(self, body: bytes, query: Any, name: str, revision: str) -> Any:
        proposal = "create_pr" in query
        repository = self._repository(name, write=not proposal)
        _, before = self._files(name, revision)
        files, header = dict(before), {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "header":
                    header = value
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.large_files[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
        branch = f"refs/pr/{number}" if proposal else revision
        oid = repository.commit(branch, files)
        said = {"summary": header.get("summary"), "description": header.get("description") or ""}
        repository.log.append({"branch": branch, **said})
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}
        return answer | ({"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"} if proposal else {})

    def tree(self, body: bytes, query: Any, name: str, revision: str) -> Any:
        _, files = self._files(name, revision)
        return [_entry(path, content) for path, content in files.items()]

    def info(self, body: bytes, query: Any, name: str, revision: str = "main") -> Any:
        oid, files = self._files(name, revision)
        private = self.hub.repositories[name].private
        return {
            "id": name,
            "sha": oid,
            "siblings": [{"rfilename": path} for path in files],
            "private": private,
            "tags": [],
            "downloads": 0,
        }

    def refs(self, body: bytes, query: Any, name: str) -> Any:
        branches = self._repository(name).branches.items()
        named = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": oid} for b, oid in branches if "/" not in b]
        return {"branches": named, "tags": [], "converts": []}

    def resolve(self, body: bytes, query: Any, name: str, revision: str, path: str) -> Any:
        oid, files = self._files(name, revision)
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        etag = _entry(path, files[path])
        tag = etag.get("lfs", etag)["oid"]
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": oid, "Content-Type": "application/octet-stream"}
        return files[path], headers | {"X-Linked-Size": str(len(files[path])), "X-Linked-ETag": f'"{tag}"'}


def _large(path: str) -> bool:
    return path.endswith(".safetensors")


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file in a tree, with the ids that git and LFS give it."""
    if not _large(path):
        return {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
    sha = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(content)}\n".encode()
    lfs = {"oid": sha, "size": len(content), "pointerSize": len(pointer)}
    # the Hub gives the hash of the content as the id of a large file before an upload
    return {"type": "file", "path": path, "size": len(content), "oid": sha, "lfs": lfs}


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("POST", r"/lfs-verify/([0-9a-f]{64})", _Handler.lfs_verify),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("GET", rf"/api/models/{_NAME}/refs", _Handler.refs),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
