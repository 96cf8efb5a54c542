"""A stand-in for the Hugging Face Hub on loopback: what its client calls to make, fill and read a repository.

Paths, status codes and headers are those that huggingface_hub asks for and understands (``hf_api.py``, ``lfs.py``,
``file_download.py``). Contents lie in memory. Large files go by Git LFS; the Hub's newer way, Xet, has a protocol of
its own, in a compiled client, and is switched off here as ``HF_HUB_DISABLE_XET`` does.
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
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN, READER = "hf_alice", "hf_reader"
OWNERS = {TOKEN: "alice", READER: None}
"""Tokens, and whose namespace they may write to."""


@dataclass
class Repository:
    """Its branches and tags name commits; a commit is all its files."""

    private: bool = True
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        digest = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode())
        for content in files.values():
            digest.update(content)
        oid = digest.hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> str | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        """Of the main branch."""
        return self.commits[self.branches["main"]]


class StandIn:
    """The server, its repositories by name, and what was called."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[str] = []
        hub = self

        class Handler(_Handler):
            standing_in = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}"  # another host: the client asks it no questions

    def add(self, name: str, files: dict[str, bytes], **settings: Any) -> Repository:
        """A repository with one commit."""
        made = self.repositories[name] = Repository(**settings)
        made.commit("main", files)
        return made


@contextmanager
def serving() -> Iterator[StandIn]:
    hub = StandIn()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def connect(hub: StandIn, patch: pytest.MonkeyPatch, cache: Path, token: str | None = TOKEN) -> None:
    """Let the client, which reads its variables when it is imported, talk to the stand-in and cache in a folder."""
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(status, code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    standing_in: StandIn
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = 2**16, True  # an answer is one packet; two would wait for each other

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self) -> None:
        hub = self.standing_in
        path = unquote(urlsplit(self.path).path)
        hub.calls.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user, self.known = OWNERS.get(token), token in OWNERS
        for method, pattern, act in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == self.command.replace("HEAD", "GET"):
                try:
                    status, headers, content = act(self, **found.groupdict())
                except _RefusedError as refusal:
                    status, headers, content = refusal.status, {"X-Error-Code": refusal.code}, b"{}"
                break
        else:
            status, headers, content = 404, {}, b"{}"
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    # -------- who may do what

    def readable(self, repo: str) -> Repository:
        found = self.standing_in.repositories.get(repo)
        if found is None or (found.private and self.user != repo.split("/")[0]):
            raise _RefusedError(404 if self.known else 401, "RepoNotFound")
        return found

    def writable(self, repo: str) -> Repository:
        found = self.readable(repo)
        if self.user != repo.split("/")[0]:
            raise _RefusedError(403)
        return found

    # -------- the calls

    def create(self) -> Any:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.user
        name = f"{owner}/{wanted['name']}"
        if not self.known:
            raise _RefusedError(401)
        if self.user != owner:
            raise _RefusedError(403)
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        if name in self.standing_in.repositories:
            return _json({"url": f"{self.standing_in.url}/{name}"}, 409)
        self.standing_in.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return _json({"url": f"{self.standing_in.url}/{name}"})

    def validate(self) -> Any:
        return _json({"errors": [], "warnings": []})

    def info(self, repo: str, revision: str | None = None) -> Any:
        found = self.readable(repo)
        oid = self._commit(found, revision or "main")
        files = [{"rfilename": path} for path in found.commits[oid]]
        return _json({"id": repo, "modelId": repo, "private": found.private, "sha": oid, "siblings": files, "tags": []})

    def tree(self, repo: str, revision: str) -> Any:
        found = self.readable(repo)
        files = found.commits[self._commit(found, revision)]
        return _json(
            [{"type": "file", "path": path, "oid": _blob(each), "size": len(each)} for path, each in files.items()]
        )

    def refs(self, repo: str) -> Any:
        found = self.readable(repo)
        kinds = {"branches": ("heads", found.branches), "tags": ("tags", found.tags)}
        listed = {
            kind: [{"name": name, "ref": f"refs/{place}/{name}", "targetCommit": oid} for name, oid in refs.items()]
            for kind, (place, refs) in kinds.items()
        }
        return _json(listed | {"converts": []})

    def branch(self, repo: str, name: str) -> Any:
        found = self.writable(repo)
        if name in found.branches:
            return _json({}, 409)
        found.branches[name] = found.branches["main"]
        return _json({})

    def tag(self, repo: str, revision: str) -> Any:
        found, name = self.writable(repo), json.loads(self.body)["tag"]
        if name in found.tags:
            return _json({}, 409)
        found.tags[name] = self._commit(found, revision)
        return _json({})

    def preupload(self, repo: str, revision: str) -> Any:
        found = self.writable(repo)
        there = found.commits[self._commit(found, revision)]
        answers = []
        for each in json.loads(self.body)["files"]:
            path = each["path"]
            large = path.endswith((".safetensors", ".npz"))
            old = {"oid": _blob(there[path])} if path in there and not large else {}
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **old})
        return _json({"files": answers})

    def batch(self, repo: str) -> Any:
        self.writable(repo)
        objects = []
        for each in json.loads(self.body)["objects"]:
            href = {"upload": {"href": f"{self.standing_in.url}/objects/{each['oid']}"}}
            objects.append(each | ({} if each["oid"] in self.standing_in.objects else {"actions": href}))
        return _json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> Any:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.standing_in.objects[oid] = self.body
        return _json({})

    def object(self, oid: str) -> Any:
        return 200, {}, self.standing_in.objects[oid]

    def commit(self, repo: str, revision: str) -> Any:
        found, message = self.writable(repo), ""
        files = dict(found.commits[self._commit(found, revision)])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.standing_in.objects[value["oid"]]
            else:
                assert entry["key"] == "deletedFile"
                del files[value["path"]]
        oid = found.commit(revision, files, message)
        url = f"{self.standing_in.url}/{repo}/commit/{oid}"
        return _json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo: str, revision: str, path: str) -> Any:
        found = self.readable(repo)
        if found.gated:
            raise _RefusedError(403, "GatedRepo")
        oid = self._commit(found, revision)
        commit = {"X-Repo-Commit": oid}
        if path not in found.commits[oid]:
            return 404, {"X-Error-Code": "EntryNotFound"} | commit, b""
        content = found.commits[oid][path]
        if not path.endswith((".safetensors", ".npz")):
            return 200, {"ETag": f'"{_blob(content)}"'} | commit, content
        digest = hashlib.sha256(content).hexdigest()
        self.standing_in.objects[digest] = content
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return 302, {"Location": f"{self.standing_in.storage}/objects/{digest}"} | linked | commit, b""

    def _commit(self, repo: Repository, revision: str) -> str:
        oid = repo.at(revision)
        if oid is None:
            raise _RefusedError(404, "RevisionNotFound")
        return oid


def _json(value: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _blob(content: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", f"/api/models/{_REPO}/refs", _Handler.refs),
    ("POST", f"/api/models/{_REPO}/branch/(?P<name>.+)", _Handler.branch),
    ("POST", f"/api/models/{_REPO}/tag/(?P<revision>.+)", _Handler.tag),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/objects/(?P<oid>[0-9a-f]+)", _Handler.put),
    ("GET", "/objects/(?P<oid>[0-9a-f]+)", _Handler.object),
    ("GET", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
