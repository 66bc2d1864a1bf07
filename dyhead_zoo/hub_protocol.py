"""What the Hugging Face Hub answers to the requests of ``huggingface_hub``: repositories in memory, without a socket.

``testing.LoopbackHub`` serves it. A repository is a small git: commits are immutable, branches and tags refer to them.
The requests are those that the clients 0.36, 1.x and 2.x send for models; where the Hub's documentation is silent, the
answers are what these clients read (``hf_api.py``, ``file_download.py``, ``lfs.py``, ``utils/_http.py``).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from functools import cached_property
from typing import Any
from urllib.parse import parse_qs, unquote

_LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".pt", ".pth", ".npz", ".zip", ".jpg", ".png")
_LFS_SIZE = 10 << 20  # larger files go to LFS whatever their name
_GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES)


# --- repositories -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    """Content of a file, kept by git itself or, with ``lfs``, as a large object that git has a pointer to."""

    data: bytes
    lfs: bool

    @classmethod
    def at(cls, path: str, data: bytes) -> Blob:
        """A file that goes to LFS or not by its name and size."""
        return cls(data, _goes_to_lfs(path, len(data)))

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


def _goes_to_lfs(path: str, size: int) -> bool:
    return path.endswith(_LFS_SUFFIXES) or size > _LFS_SIZE


@dataclass(frozen=True)
class Commit:
    """All files of a repository at one time; ``sha`` names it."""

    sha: str
    parent: Commit | None
    title: str
    date: str
    files: Mapping[str, Blob]

    def history(self) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent


@dataclass
class Repo:
    """Immutable commits and references to them, so that what a revision holds outlives every later push."""

    id: str
    owner: str
    private: bool = False
    gated: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS uploads by SHA-256, referred to or not

    def commit(self, branch: str, files: Mapping[str, Blob], title: str) -> Commit:
        """Make ``files`` the content of a branch, which is created if need be."""
        parent = self.branches.get(branch)
        oids = {path: blob.git_oid for path, blob in files.items()}
        identity = json.dumps([self.id, len(self.commits), parent and parent.sha, title, oids])
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        commit = Commit(hashlib.sha1(identity.encode()).hexdigest(), parent, title, date, dict(files))
        self.commits[commit.sha] = self.branches[branch] = commit
        self.objects.update({blob.sha256: blob.data for blob in files.values() if blob.lfs})
        return commit

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a SHA stands for."""
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
class Call:
    """A request."""

    method: str
    path: str  # quoted, so that a slash within a revision is told from one between parts
    query: Mapping[str, list[str]]
    headers: Message  # whose keys know no case
    body: bytes

    def json(self) -> dict[str, Any]:
        """The body, which must be a JSON object."""
        content = json.loads(self.body or b"{}")
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, got a {type(content).__name__}")
        return content


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Any, status: int = 200, **headers: str) -> Answer:
        """An answer in JSON; underscores in the names of headers stand for hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, json.dumps(content).encode(), {"Content-Type": "application/json", **named})


class Refusal(Exception):
    """A request that is answered by an error; ``code`` is what the client chooses its exception by."""

    def __init__(self, status: int, message: str, code: str = "", **extra: str) -> None:
        super().__init__(message)
        headers = {"X_Error_Code": code} if code else {}
        printable = message.encode("unicode_escape").decode()  # it may name what a client sent, a header takes one line
        self.answer = Answer.of({"error": message, **extra}, status, X_Error_Message=printable, **headers)


_Endpoint = Callable[..., Answer]
_ROUTES: list[tuple[str, re.Pattern[str], _Endpoint]] = []
_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_MODEL = rf"/api/models/{_REPO}"


def _route(method: str, pattern: str) -> Callable[[_Endpoint], _Endpoint]:
    """Decorator: the method of ``HubProtocol`` answers such requests; named groups become its arguments, unquoted."""

    def decorate(endpoint: _Endpoint) -> _Endpoint:
        _ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return decorate


class HubProtocol:
    """The part of the Hub's HTTP interface that a library of models needs, as requests to answers."""

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self.tokens = dict(tokens)
        self.repos: dict[str, Repo] = {}
        self.endpoint = ""

    def answer(self, call: Call) -> Answer:
        """Answer a request and do what it asks for; a request that is refused changes nothing."""
        method = "GET" if call.method == "HEAD" else call.method
        try:
            for accepted, pattern, endpoint in _ROUTES:
                if accepted == method and (match := pattern.fullmatch(call.path)):
                    groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                    return endpoint(self, call, **groups)
            raise Refusal(404, f"LoopbackHub does not answer {call.method} {call.path}")
        except Refusal as refusal:
            return refusal.answer
        except (ValueError, KeyError, TypeError) as error:  # of what the request holds
            return Refusal(400, f"malformed request {call.method} {call.path}: {error!r}").answer

    # who may do what

    def user(self, call: Call) -> str | None:
        """Name of the user whose token the request carries, None without a token."""
        header = call.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ").strip()
        if token not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def required_user(self, call: Call) -> str:
        """The same, where there must be one."""
        user = self.user(call)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def visible(self, call: Call, repo_id: str) -> Repo:
        """A repository that the caller may know of; if there is none, 401 without a token and 404 with one."""
        user = self.user(call)
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and repo.owner != user):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, call: Call, repo_id: str) -> Repo:
        """A repository that the caller may change."""
        repo = self.visible(call, repo_id)
        user = self.user(call)
        if user is None:  # with the Hub's own address the client makes this error of any 401
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if user != repo.owner:
            raise Refusal(403, f"{user} may not write to {repo_id}, which belongs to {repo.owner}")
        return repo

    @staticmethod
    def commit_of(repo: Repo, revision: str) -> Commit:
        """What a revision stands for, which must exist."""
        commit = repo.find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # users and repositories

    @_route("GET", "/api/whoami-v2")
    def whoami(self, call: Call) -> Answer:
        user = self.required_user(call)
        access = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
        return Answer.of({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": access})

    @_route("POST", "/api/repos/create")
    def create(self, call: Call) -> Answer:
        repo_id, options = self._named_repo(call)
        user = self.required_user(call)
        namespace = repo_id.partition("/")[0]
        if namespace != user and namespace in self.tokens.values():
            raise Refusal(403, f"{user} may not create a repository in the namespace of {namespace}")
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self.repos:
            raise Refusal(409, "You already created this model repo", url=url)
        private = bool(options.get("private")) or options.get("visibility") == "private"
        self.new_repo(repo_id, user, private=private)
        return Answer.of({"url": url, "name": repo_id, "id": repo_id})

    @_route("DELETE", "/api/repos/delete")
    def delete(self, call: Call) -> Answer:
        repo_id, _ = self._named_repo(call)
        del self.repos[self.writable(call, repo_id).id]
        return Answer.of({})

    def _named_repo(self, call: Call) -> tuple[str, dict[str, Any]]:
        options = call.json()
        if options.get("type") not in (None, "model"):
            raise Refusal(400, f"LoopbackHub holds models only, got repo_type={options['type']!r}")
        return f"{options.get('organization') or self.required_user(call)}/{options.get('name')}", options

    def new_repo(self, repo_id: str, owner: str, private: bool = False) -> Repo:
        """A repository with its first commit, as the Hub makes it."""
        repo = self.repos[repo_id] = Repo(repo_id, owner, private=private)
        repo.commit("main", {".gitattributes": Blob.at(".gitattributes", _GIT_ATTRIBUTES.encode())}, "initial commit")
        return repo

    @_route("GET", "/api/models")
    def list_models(self, call: Call) -> Answer:
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
        return Answer.of([model for model in found if wanted <= set(model["tags"])])

    @_route("GET", rf"{_MODEL}(/revision/(?P<revision>[^/]+))?")
    def info(self, call: Call, repo_id: str, revision: str = "main") -> Answer:
        repo = self.visible(call, repo_id)
        commit = self.commit_of(repo, revision)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
        if "blobs" in call.query:
            for sibling, blob in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": len(blob.data), "blobId": blob.git_oid}
                if blob.lfs:
                    size = len(blob.data)
                    sibling["lfs"] = {"sha256": blob.sha256, "size": size, "pointerSize": len(blob.pointer)}
        return Answer.of({**self._description(repo, commit), "siblings": siblings})

    @staticmethod
    def _description(repo: Repo, commit: Commit) -> dict[str, Any]:
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
    def refs(self, call: Call, repo_id: str) -> Answer:
        repo = self.visible(call, repo_id)
        kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
        listed = {
            kind: [{"name": k, "ref": f"refs/{folder}/{k}", "targetCommit": c.sha} for k, c in references.items()]
            for kind, (folder, references) in kinds.items()
        }
        return Answer.of({**listed, "converts": []})

    @_route("GET", rf"{_MODEL}/commits/(?P<revision>[^/]+)")
    def history(self, call: Call, repo_id: str, revision: str) -> Answer:
        repo = self.visible(call, repo_id)
        authors = [{"user": repo.owner}]
        return Answer.of(
            [
                {"id": commit.sha, "title": commit.title, "message": "", "authors": authors, "date": commit.date}
                for commit in self.commit_of(repo, revision).history()
            ]
        )

    @_route("POST", rf"{_MODEL}/branch/(?P<name>[^/]+)")
    def create_branch(self, call: Call, repo_id: str, name: str) -> Answer:
        repo = self.writable(call, repo_id)
        return self._refer(repo, repo.branches, name, call.json().get("startingPoint") or "main")

    @_route("POST", rf"{_MODEL}/tag/(?P<revision>[^/]+)")
    def create_tag(self, call: Call, repo_id: str, revision: str) -> Answer:
        repo = self.writable(call, repo_id)
        return self._refer(repo, repo.tags, str(call.json().get("tag")), revision)

    def _refer(self, repo: Repo, references: dict[str, Commit], name: str, revision: str) -> Answer:
        if name in references:
            raise Refusal(409, f"Reference {name} already exists")
        references[name] = self.commit_of(repo, revision)
        return Answer.of({})

    @_route("DELETE", rf"{_MODEL}/(?P<kind>branch|tag)/(?P<name>[^/]+)")
    def delete_reference(self, call: Call, repo_id: str, kind: str, name: str) -> Answer:
        repo = self.writable(call, repo_id)
        references = repo.branches if kind == "branch" else repo.tags
        if name not in references:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        if (kind, name) == ("branch", "main"):
            raise Refusal(403, "main cannot be deleted")
        del references[name]
        return Answer.of({})

    # uploads

    @_route("POST", "/api/validate-yaml")
    def validate_yaml(self, call: Call) -> Answer:
        return Answer.of({"errors": [], "warnings": []})

    @_route("POST", rf"{_MODEL}/preupload/(?P<revision>[^/]+)")
    def preupload(self, call: Call, repo_id: str, revision: str) -> Answer:
        commit = self.commit_of(self.writable(call, repo_id), revision)
        files = []
        for file in call.json().get("files", ()):
            present = commit.files.get(file["path"])
            mode = "lfs" if _goes_to_lfs(file["path"], file["size"]) else "regular"
            oid = present.etag if present else None  # by which the client leaves out what has not changed
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer.of({"files": files, "commitOid": commit.sha})

    @_route("POST", rf"/{_REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, call: Call, repo_id: str) -> Answer:
        repo = self.writable(call, repo_id)
        objects = []
        for wanted in call.json().get("objects", ()):
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.objects:
                upload = f"{self.endpoint}/{repo_id}.git/lfs/{wanted['oid']}"
                verify = f"{self.endpoint}/{repo_id}.git/info/lfs/verify"
                entry["actions"] = {"upload": {"href": upload, "header": {}}, "verify": {"href": verify, "header": {}}}
            objects.append(entry)
        return Answer.of({"transfer": "basic", "objects": objects})

    @_route("PUT", rf"/{_REPO}\.git/lfs/(?P<oid>[0-9a-f]{{64}})")
    def lfs_upload(self, call: Call, repo_id: str, oid: str) -> Answer:
        # no token here: on the Hub this address is a signed one, of another host
        if repo_id not in self.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise Refusal(400, f"the bytes that arrived do not have the SHA-256 {oid}")
        self.repos[repo_id].objects[oid] = call.body
        return Answer(200)

    @_route("POST", rf"/{_REPO}\.git/info/lfs/verify")
    def lfs_verify(self, call: Call, repo_id: str) -> Answer:
        repo, claim = self.writable(call, repo_id), call.json()
        data = repo.objects.get(str(claim.get("oid")))
        if data is None or len(data) != claim.get("size"):
            raise Refusal(404, f"LFS object {claim.get('oid')} of size {claim.get('size')} was not uploaded")
        return Answer.of({})

    @_route("POST", rf"{_MODEL}/commit/(?P<branch>[^/]+)")
    def commit(self, call: Call, repo_id: str, branch: str) -> Answer:
        repo = self.writable(call, repo_id)
        parent = repo.branches.get(branch)
        if parent is None:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if "create_pr" in call.query:
            raise Refusal(400, "LoopbackHub has no pull requests: commit to a branch")
        header, *operations = (json.loads(line) for line in call.body.splitlines() if line.strip())
        if header["value"].get("parentCommit", parent.sha) != parent.sha:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            self._apply(repo, files, operation["key"], operation["value"])
        done = repo.commit(branch, files, str(header["value"].get("summary", "")))
        url = f"{self.endpoint}/{repo_id}/commit/{done.sha}"
        return Answer.of({"success": True, "commitOid": done.sha, "commitUrl": url, "hookOutput": ""})

    @staticmethod
    def _apply(repo: Repo, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        """Do one operation of a commit to ``files``; nothing else changes, so a refusal leaves no trace."""
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"], validate=True), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise Refusal(400, f"{path} refers to the LFS object {value['oid']}, which was not uploaded")
            files[path] = Blob(repo.objects[value["oid"]], lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(404, f"{path} cannot be deleted: it does not exist", "EntryNotFound")
        elif key == "deletedFolder":
            for inner in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[inner]
        else:
            raise Refusal(400, f"unknown operation {key!r} in a commit")

    # downloads

    @_route("GET", rf"{_MODEL}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
    def tree(self, call: Call, repo_id: str, revision: str, folder: str = "") -> Answer:
        files = self.commit_of(self.visible(call, repo_id), revision).files
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        recursive = call.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        below = {path.removeprefix(prefix): blob for path, blob in files.items() if path.startswith(prefix)}
        if folder and not below:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        entries = [blob.entry(prefix + path) for path, blob in below.items() if recursive or "/" not in path]
        folders = [] if recursive else sorted({path.partition("/")[0] for path in below if "/" in path})
        for name in folders:
            oid = hashlib.sha1(f"{revision}/{prefix}{name}".encode()).hexdigest()
            entries.append({"type": "directory", "path": prefix + name, "oid": oid, "size": 0})
        return Answer.of(entries)

    @_route("POST", rf"{_MODEL}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, call: Call, repo_id: str, revision: str) -> Answer:
        files = self.commit_of(self.visible(call, repo_id), revision).files
        if call.headers.get("Content-Type", "").startswith("application/json"):
            paths = call.json().get("paths", [])
        else:
            paths = parse_qs(call.body.decode()).get("paths", [])
        return Answer.of([files[path].entry(path) for path in paths if path in files])

    @_route("GET", rf"/{_REPO}/(resolve|raw)/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, call: Call, repo_id: str, revision: str, path: str) -> Answer:
        repo = self.visible(call, repo_id)
        user = self.user(call)
        if repo.gated and user != repo.owner:
            message = f"Access to model {repo_id} is restricted. You must be authenticated and on its list."
            raise Refusal(401 if user is None else 403, message, "GatedRepo")
        commit = self.commit_of(repo, revision)
        blob = commit.files.get(path)
        if blob is None:
            answer = Refusal(404, "Entry not found", "EntryNotFound").answer
            return Answer(answer.status, answer.body, {**answer.headers, "X-Repo-Commit": commit.sha})
        return self._file(call, blob, commit.sha)

    @staticmethod
    def _file(call: Call, blob: Blob, sha: str) -> Answer:
        """A file or the range of it that is asked for (RFC 9110, section 14; one range only)."""
        etag, size = f'"{blob.etag}"', len(blob.data)
        headers = {"X-Repo-Commit": sha, "ETag": etag, "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if blob.lfs:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(size)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
        if not asked or asked[0] == "bytes=-" or call.headers.get("If-Range", etag) != etag:
            return Answer(200, blob.data, headers)
        if asked[1]:
            first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
        else:  # the last so many bytes
            first, last = max(0, size - int(asked[2])), size - 1
        if first > last:
            return Answer(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
        return Answer(206, blob.data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{size}"})
