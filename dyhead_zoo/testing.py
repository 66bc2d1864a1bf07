"""A Hugging Face Hub on 127.0.0.1, for tests: the real ``huggingface_hub`` client pushes to it and pulls from it.

Nothing is mocked in the client, and nothing leaves the machine. Faults are made on purpose, and any bytes can be put
into a repository, so that a test sees what becomes of a dropped connection or of a hostile file::

    from huggingface_hub import HfApi
    from dyhead_zoo.testing import Fault, LoopbackHub

    with LoopbackHub(tokens={"hf_alice": "alice"}) as hub:
        api = HfApi(endpoint=hub.endpoint, token="hf_alice")
        api.create_repo("alice/detector", private=True)
        api.upload_folder(repo_id="alice/detector", folder_path="runs/mine")
        hub.fail(Fault("truncate", path="*/model.safetensors", after=1000))  # the next download of it breaks off
        path = api.hf_hub_download("alice/detector", "model.safetensors", cache_dir="cache")

        variables = {**os.environ, **hub.environment("fresh", token="hf_alice")}  # a process and cache of its own
        subprocess.run([sys.executable, "-c", "..."], env=variables, check=True)

``HF_HUB_DISABLE_XET=1`` must be set before huggingface_hub is imported: uploads then take the LFS route, which is the
one spoken here. The client reads ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_HUB_OFFLINE`` when it is imported, too; code
that takes no ``endpoint=`` is therefore tested in a subprocess with ``environment``.

Differences from the Hub: model repositories only; no pull requests, Xet or multipart uploads; a listing is one page;
files come from ``resolve`` itself and not from a CDN; a card's front matter is read for its plain values only; whoever
creates a repository owns it, and only the owner may write to it, see it if private, or download from it if gated.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from fnmatch import fnmatchcase
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, get_args
from urllib.parse import parse_qs, unquote, urlsplit

FaultKind = Literal["drop", "truncate", "shorten", "status", "delay", "corrupt", "missing"]

_LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".pt", ".pth", ".npz", ".zip", ".jpg", ".png")
_LFS_SIZE = 10 << 20  # larger files go to LFS whatever their name
_GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES)


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the requests that match; pass it to ``LoopbackHub.fail``.

    The kinds:

    * ``drop``: the connection is reset. With ``after=None`` the request has no effect and gets no answer; with
      ``after=n`` it has its effect, and the reset follows n bytes of the answer's body (``after=0`` on the POST of a
      commit: the commit is made, its author does not learn of it).
    * ``truncate``: the headers announce the whole body, ``after`` bytes of it come, and the connection is closed in
      good order. The client takes this for a broken transfer, and resumes it.
    * ``shorten``: a complete answer, of the first ``after`` bytes only: what a faulty proxy makes of a file.
    * ``status``: the request has no effect and is answered by ``status``, such as 500, 503 or 429.
    * ``delay``: a pause of ``seconds``, before the answer or, with ``after=n``, within its body; the hub's end cuts it.
    * ``corrupt``: one byte of the body is another, at position ``after`` or in the middle; the length is right. With
      ``etag`` the answer also states that entity tag (and linked tag, where it has one) instead of the true one;
      the client asks for tags by HEAD, so give ``method="*"`` and ``times=None`` then.
    * ``missing``: 404 for a file that the listing of its revision names.

    Attributes:
        kind: one of the above.
        path: pattern, as of ``fnmatch``, for the path of the URL without its query; ``*`` matches slashes, too. Files
            are at ``/<repo>/resolve/<revision>/<file>``, commits go to ``/api/models/<repo>/commit/<branch>``, LFS
            objects to ``/<repo>.git/lfs/<sha256>``; ``LoopbackHub.requests`` shows what a call asks for.
        method: GET, HEAD, POST, PUT, DELETE, or ``*`` for any.
        times: how many requests it hits; None for all.
        after: number of bytes of the body, as above.
        status: HTTP status of ``status``.
        seconds: length of ``delay``.
        etag: entity tag of ``corrupt``, without quotes.

    Raises:
        ValueError: for an unknown kind, or if the kind lacks what it needs.
    """

    kind: FaultKind
    path: str = "*"
    method: str = "GET"
    times: int | None = 1
    after: int | None = None
    status: int = 503
    seconds: float = 0.0
    etag: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            raise ValueError(f"unknown kind of fault {self.kind!r}; expected one of {list(get_args(FaultKind))}")
        if self.kind in ("truncate", "shorten") and self.after is None:
            raise ValueError(f"Fault({self.kind!r}) needs after=, the number of bytes that still come")
        if self.kind == "delay" and self.seconds <= 0:
            raise ValueError(f"Fault('delay') needs seconds= above 0, got {self.seconds}")
        if (self.after or 0) < 0 or (self.times is not None and self.times < 1):
            raise ValueError(f"after must be >= 0 and times >= 1 or None, got {self.after} and {self.times}")

    def matches(self, method: str, path: str) -> bool:
        """Whether a request of this method and unquoted path is hit."""
        return self.method in ("*", method) and fnmatchcase(path, self.path)


class Request(NamedTuple):
    """One line of ``LoopbackHub.requests``.

    Attributes:
        method: such as GET.
        path: of the URL, unquoted, without the query.
        status: of the answer (206 where a range was asked for); 0 if the connection was dropped before any answer.
    """

    method: str
    path: str
    status: int


# --- repositories -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blob:
    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds in place of an LFS object (git-lfs specification v1)."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def git_oid(self) -> str:
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def entry(self, path: str) -> dict[str, Any]:
        """The file in a listing of a tree."""
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.git_oid, "size": len(self.data)}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return entry


def _blob(path: str, data: bytes) -> _Blob:
    return _Blob(data, _goes_to_lfs(path, len(data)))


def _goes_to_lfs(path: str, size: int) -> bool:
    return path.endswith(_LFS_SUFFIXES) or size > _LFS_SIZE


@dataclass(frozen=True)
class _Commit:
    sha: str
    parent: _Commit | None
    title: str
    date: str
    files: Mapping[str, _Blob]

    def history(self) -> Iterator[_Commit]:
        """The commit and its ancestors, newest first."""
        commit: _Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent


@dataclass
class _Repo:
    """Immutable commits and references to them, so that what a revision holds outlives every later push."""

    id: str
    owner: str
    private: bool = False
    gated: bool = False
    branches: dict[str, _Commit] = field(default_factory=dict)
    tags: dict[str, _Commit] = field(default_factory=dict)
    commits: dict[str, _Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS uploads by SHA-256, referred to or not

    def commit(self, branch: str, files: Mapping[str, _Blob], title: str) -> _Commit:
        parent = self.branches.get(branch)
        oids = {path: blob.git_oid for path, blob in files.items()}
        identity = json.dumps([self.id, len(self.commits), parent and parent.sha, title, oids])
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        commit = _Commit(hashlib.sha1(identity.encode()).hexdigest(), parent, title, date, dict(files))
        self.commits[commit.sha] = self.branches[branch] = commit
        self.objects.update({blob.sha256: blob.data for blob in files.values() if blob.lfs})
        return commit

    def find(self, revision: str) -> _Commit | None:
        return self.branches.get(revision) or self.tags.get(revision) or self.commits.get(revision)


def _tags_of_card(card: bytes) -> tuple[list[str], dict[str, str]]:
    """The tags that the Hub derives from a card's front matter, and its ``library_name`` and ``pipeline_tag``."""
    values: dict[str, list[str]] = {}
    head = re.match(r"---\s*\n(.*?)\n---", card.decode(errors="replace"), re.DOTALL)
    key = ""
    for line in head[1].splitlines() if head else ():
        if pair := re.fullmatch(r"([\w-]+):\s*(.*)", line):
            key = pair[1]
            values[key] = [pair[2].strip("'\" ")] if pair[2] else []
        elif (item := re.fullmatch(r"\s*- ([^\s{}\[\]]+)", line)) and key:
            values[key].append(item[1].strip("'\""))
    named = {name: values[name][0] for name in ("library_name", "pipeline_tag") if values.get(name)}
    prefixes = {"license": "license:", "datasets": "dataset:", "base_model": "base_model:"}
    prefixed = [f"{prefix}{value}" for name, prefix in prefixes.items() for value in values.get(name, ())]
    return [*named.values(), *values.get("tags", ()), *prefixed], named


# --- the protocol -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    method: str
    path: str  # quoted, so that a slash within a revision is told from one between parts
    query: Mapping[str, list[str]]
    headers: Message  # whose keys know no case
    body: bytes

    def json(self) -> dict[str, Any]:
        try:
            content = json.loads(self.body or b"{}")
        except ValueError as error:
            raise _Refusal(400, f"the body is no JSON: {error}") from error
        if not isinstance(content, dict):
            raise _Refusal(400, f"the body is no JSON object but a {type(content).__name__}")
        return content


@dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Any, status: int = 200, **headers: str) -> _Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, json.dumps(content).encode(), {"Content-Type": "application/json", **named})


class _Refusal(Exception):
    """A request that is answered by an error; ``code`` is what the client chooses its exception by."""

    def __init__(self, status: int, message: str, code: str = "", **extra: str) -> None:
        super().__init__(message)
        headers = {"X_Error_Code": code} if code else {}
        self.answer = _Answer.of({"error": message, **extra}, status, X_Error_Message=message, **headers)


_Endpoint = Callable[..., _Answer]
_ROUTES: list[tuple[str, re.Pattern[str], _Endpoint]] = []
_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_MODEL = rf"/api/models/{_REPO}"


def _route(method: str, pattern: str) -> Callable[[_Endpoint], _Endpoint]:
    """Decorator: the method of ``_Api`` answers such requests; named groups become its arguments, unquoted."""

    def decorate(endpoint: _Endpoint) -> _Endpoint:
        _ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return decorate


class _Api:
    """The part of the Hub's HTTP interface that a library of models needs, as requests to answers."""

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self.tokens = dict(tokens)
        self.repos: dict[str, _Repo] = {}
        self.endpoint = ""

    def answer(self, call: _Call) -> _Answer:
        method = "GET" if call.method == "HEAD" else call.method
        try:
            for accepted, pattern, endpoint in _ROUTES:
                if accepted == method and (match := pattern.fullmatch(call.path)):
                    groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                    return endpoint(self, call, **groups)
            raise _Refusal(404, f"LoopbackHub does not answer {call.method} {call.path}")
        except _Refusal as refusal:
            return refusal.answer

    # who may do what

    def user(self, call: _Call) -> str | None:
        """Name of the user whose token the request carries, None without a token."""
        header = call.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ").strip()
        if token not in self.tokens:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def required_user(self, call: _Call) -> str:
        user = self.user(call)
        if user is None:
            raise _Refusal(401, "Invalid username or password.")
        return user

    def visible(self, call: _Call, repo_id: str) -> _Repo:
        """A repository that the caller may know of. As on the Hub, who is no one gets 401, others 404."""
        user = self.user(call)
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and repo.owner != user):
            raise _Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, call: _Call, repo_id: str) -> _Repo:
        repo = self.visible(call, repo_id)
        user = self.required_user(call)
        if user != repo.owner:
            raise _Refusal(403, f"{user} may not write to {repo_id}, which belongs to {repo.owner}")
        return repo

    @staticmethod
    def commit_of(repo: _Repo, revision: str) -> _Commit:
        commit = repo.find(revision)
        if commit is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # users and repositories

    @_route("GET", "/api/whoami-v2")
    def whoami(self, call: _Call) -> _Answer:
        user = self.required_user(call)
        access = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
        return _Answer.of({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": access})

    @_route("POST", "/api/repos/create")
    def create(self, call: _Call) -> _Answer:
        repo_id, options = self._named_repo(call)
        user = self.required_user(call)
        namespace = repo_id.partition("/")[0]
        if namespace != user and namespace in self.tokens.values():
            raise _Refusal(403, f"{user} may not create a repository in the namespace of {namespace}")
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self.repos:
            raise _Refusal(409, "You already created this model repo", url=url)
        private = bool(options.get("private")) or options.get("visibility") == "private"
        self.new_repo(repo_id, user, private=private)
        return _Answer.of({"url": url, "name": repo_id, "id": repo_id})

    @_route("DELETE", "/api/repos/delete")
    def delete(self, call: _Call) -> _Answer:
        repo_id, _ = self._named_repo(call)
        del self.repos[self.writable(call, repo_id).id]
        return _Answer.of({})

    def _named_repo(self, call: _Call) -> tuple[str, dict[str, Any]]:
        options = call.json()
        if options.get("type") not in (None, "model"):
            raise _Refusal(400, f"LoopbackHub holds models only, got repo_type={options['type']!r}")
        return f"{options.get('organization') or self.required_user(call)}/{options.get('name')}", options

    def new_repo(self, repo_id: str, owner: str, private: bool = False) -> _Repo:
        repo = self.repos[repo_id] = _Repo(repo_id, owner, private=private)
        repo.commit("main", {".gitattributes": _blob(".gitattributes", _GIT_ATTRIBUTES.encode())}, "initial commit")
        return repo

    @_route("GET", "/api/models")
    def list_models(self, call: _Call) -> _Answer:
        user = self.user(call)
        search, author = (call.query.get(name, [""])[0].lower() for name in ("search", "author"))
        wanted = {tag for value in call.query.get("filter", ()) for tag in value.split(",")}
        found = [
            self._description(repo, repo.branches["main"])
            for repo_id, repo in sorted(self.repos.items())
            if (not repo.private or repo.owner == user)
            and search in repo_id.lower()
            and author in ("", repo_id.partition("/")[0].lower())
        ]
        return _Answer.of([model for model in found if wanted <= set(model["tags"])])

    @_route("GET", rf"{_MODEL}(/revision/(?P<revision>[^/]+))?")
    def info(self, call: _Call, repo_id: str, revision: str = "main") -> _Answer:
        repo = self.visible(call, repo_id)
        commit = self.commit_of(repo, revision)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
        if "blobs" in call.query:
            for sibling, blob in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": len(blob.data), "blobId": blob.git_oid}
                if blob.lfs:
                    size = len(blob.data)
                    sibling["lfs"] = {"sha256": blob.sha256, "size": size, "pointerSize": len(blob.pointer)}
        return _Answer.of({**self._description(repo, commit), "siblings": siblings})

    @staticmethod
    def _description(repo: _Repo, commit: _Commit) -> dict[str, Any]:
        tags, named = _tags_of_card(commit.files["README.md"].data) if "README.md" in commit.files else ([], {})
        first = list(commit.history())[-1]
        return {
            "_id": repo.id,
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.partition("/")[0],
            "sha": commit.sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "tags": tags,
            **named,
            "downloads": 0,
            "likes": 0,
            "createdAt": first.date,
            "lastModified": commit.date,
        }

    # references and history

    @_route("GET", f"{_MODEL}/refs")
    def refs(self, call: _Call, repo_id: str) -> _Answer:
        repo = self.visible(call, repo_id)
        kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
        listed = {
            kind: [{"name": k, "ref": f"refs/{folder}/{k}", "targetCommit": c.sha} for k, c in references.items()]
            for kind, (folder, references) in kinds.items()
        }
        return _Answer.of({**listed, "converts": []})

    @_route("GET", rf"{_MODEL}/commits/(?P<revision>[^/]+)")
    def history(self, call: _Call, repo_id: str, revision: str) -> _Answer:
        repo = self.visible(call, repo_id)
        authors = [{"user": repo.owner}]
        return _Answer.of(
            [
                {"id": commit.sha, "title": commit.title, "message": "", "authors": authors, "date": commit.date}
                for commit in self.commit_of(repo, revision).history()
            ]
        )

    @_route("POST", rf"{_MODEL}/branch/(?P<name>[^/]+)")
    def create_branch(self, call: _Call, repo_id: str, name: str) -> _Answer:
        repo = self.writable(call, repo_id)
        return self._refer(repo, repo.branches, name, call.json().get("startingPoint") or "main")

    @_route("POST", rf"{_MODEL}/tag/(?P<revision>[^/]+)")
    def create_tag(self, call: _Call, repo_id: str, revision: str) -> _Answer:
        repo = self.writable(call, repo_id)
        return self._refer(repo, repo.tags, str(call.json().get("tag")), revision)

    def _refer(self, repo: _Repo, references: dict[str, _Commit], name: str, revision: str) -> _Answer:
        if name in references:
            raise _Refusal(409, f"Reference {name} already exists")
        references[name] = self.commit_of(repo, revision)
        return _Answer.of({})

    @_route("DELETE", rf"{_MODEL}/(?P<kind>branch|tag)/(?P<name>[^/]+)")
    def delete_reference(self, call: _Call, repo_id: str, kind: str, name: str) -> _Answer:
        repo = self.writable(call, repo_id)
        references = repo.branches if kind == "branch" else repo.tags
        if name not in references:
            raise _Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        if (kind, name) == ("branch", "main"):
            raise _Refusal(403, "main cannot be deleted")
        del references[name]
        return _Answer.of({})

    # uploads

    @_route("POST", "/api/validate-yaml")
    def validate_yaml(self, call: _Call) -> _Answer:
        return _Answer.of({"errors": [], "warnings": []})

    @_route("POST", rf"{_MODEL}/preupload/(?P<revision>[^/]+)")
    def preupload(self, call: _Call, repo_id: str, revision: str) -> _Answer:
        commit = self.commit_of(self.writable(call, repo_id), revision)
        files = []
        for file in call.json().get("files", ()):
            present = commit.files.get(file["path"])
            mode = "lfs" if _goes_to_lfs(file["path"], file["size"]) else "regular"
            oid = present.etag if present else None  # by which the client leaves out what has not changed
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _Answer.of({"files": files, "commitOid": commit.sha})

    @_route("POST", rf"/{_REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, call: _Call, repo_id: str) -> _Answer:
        repo = self.writable(call, repo_id)
        objects = []
        for wanted in call.json().get("objects", ()):
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.objects:
                upload = f"{self.endpoint}/{repo_id}.git/lfs/{wanted['oid']}"
                verify = f"{self.endpoint}/{repo_id}.git/info/lfs/verify"
                entry["actions"] = {"upload": {"href": upload, "header": {}}, "verify": {"href": verify, "header": {}}}
            objects.append(entry)
        return _Answer.of({"transfer": "basic", "objects": objects})

    @_route("PUT", rf"/{_REPO}\.git/lfs/(?P<oid>[0-9a-f]{{64}})")
    def lfs_upload(self, call: _Call, repo_id: str, oid: str) -> _Answer:
        # no token here: on the Hub this address is a signed one, of another host
        if repo_id not in self.repos:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise _Refusal(400, f"the bytes that arrived do not have the SHA-256 {oid}")
        self.repos[repo_id].objects[oid] = call.body
        return _Answer(200)

    @_route("POST", rf"/{_REPO}\.git/info/lfs/verify")
    def lfs_verify(self, call: _Call, repo_id: str) -> _Answer:
        repo, claim = self.writable(call, repo_id), call.json()
        data = repo.objects.get(str(claim.get("oid")))
        if data is None or len(data) != claim.get("size"):
            raise _Refusal(404, f"LFS object {claim.get('oid')} of size {claim.get('size')} was not uploaded")
        return _Answer.of({})

    @_route("POST", rf"{_MODEL}/commit/(?P<branch>[^/]+)")
    def commit(self, call: _Call, repo_id: str, branch: str) -> _Answer:
        repo = self.writable(call, repo_id)
        parent = repo.branches.get(branch)
        if parent is None:
            raise _Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if "create_pr" in call.query:
            raise _Refusal(400, "LoopbackHub has no pull requests: commit to a branch")
        try:
            header, *operations = (json.loads(line) for line in call.body.splitlines() if line.strip())
            if header["value"].get("parentCommit", parent.sha) != parent.sha:
                raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for operation in operations:
                self._apply(repo, files, operation["key"], operation["value"])
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            raise _Refusal(400, f"malformed commit: {error!r}") from error
        done = repo.commit(branch, files, str(header["value"].get("summary", "")))
        url = f"{self.endpoint}/{repo_id}/commit/{done.sha}"
        return _Answer.of({"success": True, "commitOid": done.sha, "commitUrl": url, "hookOutput": ""})

    @staticmethod
    def _apply(repo: _Repo, files: dict[str, _Blob], key: str, value: dict[str, Any]) -> None:
        """Do one operation of a commit to ``files``; nothing else changes, so a refusal leaves no trace."""
        path = value["path"]
        if key == "file":
            files[path] = _Blob(base64.b64decode(value["content"], validate=True), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise _Refusal(400, f"{path} refers to the LFS object {value['oid']}, which was not uploaded")
            files[path] = _Blob(repo.objects[value["oid"]], lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise _Refusal(404, f"{path} cannot be deleted: it does not exist", "EntryNotFound")
        elif key == "deletedFolder":
            for inner in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[inner]
        else:
            raise _Refusal(400, f"unknown operation {key!r} in a commit")

    # downloads

    @_route("GET", rf"{_MODEL}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
    def tree(self, call: _Call, repo_id: str, revision: str, folder: str = "") -> _Answer:
        files = self.commit_of(self.visible(call, repo_id), revision).files
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        recursive = call.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        below = {path.removeprefix(prefix): blob for path, blob in files.items() if path.startswith(prefix)}
        if folder and not below:
            raise _Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        entries = [blob.entry(prefix + path) for path, blob in below.items() if recursive or "/" not in path]
        folders = [] if recursive else sorted({path.partition("/")[0] for path in below if "/" in path})
        for name in folders:
            oid = hashlib.sha1(f"{revision}/{prefix}{name}".encode()).hexdigest()
            entries.append({"type": "directory", "path": prefix + name, "oid": oid, "size": 0})
        return _Answer.of(entries)

    @_route("POST", rf"{_MODEL}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, call: _Call, repo_id: str, revision: str) -> _Answer:
        files = self.commit_of(self.visible(call, repo_id), revision).files
        if call.headers.get("Content-Type", "").startswith("application/json"):
            paths = call.json().get("paths", [])
        else:
            paths = parse_qs(call.body.decode()).get("paths", [])
        return _Answer.of([files[path].entry(path) for path in paths if path in files])

    @_route("GET", rf"/{_REPO}/(resolve|raw)/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, call: _Call, repo_id: str, revision: str, path: str) -> _Answer:
        repo = self.visible(call, repo_id)
        user = self.user(call)
        if repo.gated and user != repo.owner:
            message = f"Access to model {repo_id} is restricted. You must be authenticated and on its list."
            raise _Refusal(401 if user is None else 403, message, "GatedRepo")
        commit = self.commit_of(repo, revision)
        blob = commit.files.get(path)
        if blob is None:
            answer = _Refusal(404, "Entry not found", "EntryNotFound").answer
            return _Answer(answer.status, answer.body, {**answer.headers, "X-Repo-Commit": commit.sha})
        return self._file(call, blob, commit.sha)

    @staticmethod
    def _file(call: _Call, blob: _Blob, sha: str) -> _Answer:
        """A file or the range of it that is asked for (RFC 9110, section 14; one range only)."""
        etag, size = f'"{blob.etag}"', len(blob.data)
        headers = {"X-Repo-Commit": sha, "ETag": etag, "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if blob.lfs:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(size)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
        if not asked or asked[0] == "bytes=-" or call.headers.get("If-Range", etag) != etag:
            return _Answer(200, blob.data, headers)
        if asked[1]:
            first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
        else:  # the last so many bytes
            first, last = max(0, size - int(asked[2])), size - 1
        if first > last:
            return _Answer(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
        return _Answer(206, blob.data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{size}"})


# --- the server -------------------------------------------------------------------------------------------------------


class LoopbackHub:
    """A Hub on a free port of 127.0.0.1, which lives as long as its ``with`` block; see the module's example.

    All state is in memory, and safe to use from several threads.

    Args:
        tokens: user name by token. Users need not exist otherwise; a namespace that is no user's is an organisation, in
            which every user may create repositories. By default ``{"hf_tester": "tester"}``.

    Attributes:
        endpoint: URL of the server, for ``HfApi(endpoint=...)``.
        requests: every request that was answered or dropped, in order, as ``(method, path, status)``.
    """

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        self.requests: list[Request] = []
        self._api = _Api({"hf_tester": "tester"} if tokens is None else tokens)
        self._faults: list[list[Any]] = []  # [fault, how many requests it still hits]
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Connection)
        self._server.hub = self
        self.endpoint = self._api.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="LoopbackHub", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: str | Path, token: str | None = None) -> dict[str, str]:
        """Variables for a subprocess that is to talk to this hub; add them to ``os.environ``.

        Args:
            cache: folder for the client's home and cache; a new one makes a machine that has downloaded nothing.
            token: to be used by the subprocess; None for an anonymous one, whatever token the user of the machine has.
        """
        home = Path(cache).absolute()
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def put(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        revision: str = "main",
        owner: str | None = None,
        private: bool | None = None,
        gated: bool | None = None,
    ) -> str:
        """Put files into a repository in one commit, past the client and its checks: any path, any bytes.

        Args:
            repo_id: ``namespace/name``; created if need be.
            files: content by path; files of the branch that are not named stay.
            revision: branch; a new one starts at main.
            owner: user name, for a repository that this call creates; by default the namespace.
            private: whether only the owner sees it; None leaves that as it is (public at first).
            gated: whether only the owner may download from it; None leaves that as it is (open at first).

        Returns:
            SHA of the commit.
        """
        with self._lock:
            repo = self._api.repos.get(repo_id) or self._api.new_repo(repo_id, owner or repo_id.partition("/")[0])
            repo.private = repo.private if private is None else private
            repo.gated = repo.gated if gated is None else gated
            branch = repo.branches.setdefault(revision, repo.branches["main"])
            added = {path: _blob(path, data) for path, data in files.items()}
            return repo.commit(revision, {**branch.files, **added}, "put").sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content by path of a branch, tag or commit.

        Raises:
            ValueError: if there is no such repository or revision.
        """
        with self._lock:
            repo = self._api.repos.get(repo_id)
            if repo is None:
                raise ValueError(f"this hub has no repository {repo_id!r}; it has {sorted(self._api.repos)}")
            commit = repo.find(revision)
            if commit is None:
                names = [*repo.branches, *repo.tags]
                raise ValueError(f"{repo_id} has no revision {revision!r}; it has {names} and the commits' own ids")
            return {path: blob.data for path, blob in commit.files.items()}

    def fail(self, fault: Fault) -> None:
        """Let a fault happen to the next requests that match it; of several, the first that was given is used up."""
        with self._lock:
            self._faults.append([fault, fault.times])

    def heal(self) -> None:
        """Forget the faults that have not happened yet."""
        with self._lock:
            self._faults.clear()

    def _next_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for entry in self._faults:
                fault, left = entry
                if fault.matches(method, path) and left != 0:
                    entry[1] = None if left is None else left - 1
                    return fault
        return None

    def _answer(self, call: _Call) -> _Answer:
        with self._lock:
            return self._api.answer(call)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # the client keeps connections open; they end at their next request
    hub: LoopbackHub


class _Connection(BaseHTTPRequestHandler):
    """Reads requests, writes answers, and makes the faults."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are written apart
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the console; ``LoopbackHub.requests`` is the log."""

    def do_GET(self) -> None:
        hub = self.server.hub
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self._read_body()
        if hub._closing.is_set():
            self.close_connection = True
            return
        call = _Call(self.command, url.path, parse_qs(url.query), self.headers, body)
        fault = hub._next_fault(self.command, path)
        if fault and fault.kind == "drop" and fault.after is None:
            hub.requests.append(Request(self.command, path, 0))
            self._reset()
            return
        if fault and fault.kind == "delay" and fault.after is None:
            hub._closing.wait(fault.seconds)
        answer = _disturbed(hub, call, fault)
        hub.requests.append(Request(self.command, path, answer.status))
        with contextlib.suppress(ConnectionError):  # the client went away: its business
            self._write(answer, fault)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _write(self, answer: _Answer, fault: Fault | None) -> None:
        self.send_response(answer.status, HTTPStatus(answer.status).phrase)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None or fault.after is None or fault.kind not in ("drop", "truncate", "delay"):
            self.wfile.write(answer.body)
            return
        self.wfile.write(answer.body[: fault.after])
        if fault.kind == "delay":
            self.server.hub._closing.wait(fault.seconds)
            self.wfile.write(answer.body[fault.after :])
        elif fault.kind == "drop":
            self._reset()
        else:
            self.close_connection = True

    def _reset(self) -> None:
        """End the connection by a reset, which the other side sees as an error and not as the end of the data."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def _disturbed(hub: LoopbackHub, call: _Call, fault: Fault | None) -> _Answer:
    """The answer to a request, with those faults in it that do not concern the connection."""
    if fault and fault.kind == "status":
        return _Answer.of({"error": "injected fault"}, fault.status)
    if fault and fault.kind == "missing":
        return _Refusal(404, "Entry not found", "EntryNotFound").answer
    answer = hub._answer(call)
    if fault and fault.kind == "shorten":
        return _Answer(answer.status, answer.body[: fault.after], answer.headers)
    if fault and fault.kind == "corrupt":
        body, headers = bytearray(answer.body), dict(answer.headers)
        if body:
            body[min(len(body) // 2 if fault.after is None else fault.after, len(body) - 1)] ^= 0xFF
        if fault.etag is not None:
            headers |= {name: f'"{fault.etag}"' for name in ("ETag", "X-Linked-Etag") if name in headers}
        return _Answer(answer.status, bytes(body), headers)
    return answer
