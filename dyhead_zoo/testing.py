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

import contextlib
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, get_args
from urllib.parse import parse_qs, unquote, urlsplit

from dyhead_zoo.hub_protocol import Answer, Blob, Call, HubProtocol, Refusal

FaultKind = Literal["drop", "truncate", "shorten", "status", "delay", "corrupt", "missing"]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the requests that match; pass it to ``LoopbackHub.fail``.

    The kinds:

    * ``drop``: the connection is reset. With ``after=None`` the request has no effect and gets no answer; with
      ``after=0`` it has its effect and gets no answer (a commit is made, its author does not learn of it); with
      ``after=n`` the reset follows n bytes of the answer's body, of which the client may lose the last.
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
        status: of the answer (206 where a range was asked for); 0 if the connection was dropped and nothing done.
    """

    method: str
    path: str
    status: int


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
        self._api = HubProtocol({"hf_tester": "tester"} if tokens is None else tokens)
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
            added = {path: Blob.at(path, data) for path, data in files.items()}
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

    def _answer(self, call: Call) -> Answer:
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

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that goes away is none of the server's errors
            super().handle()

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
        call = Call(self.command, url.path, parse_qs(url.query), self.headers, body)
        fault = hub._next_fault(self.command, path)
        hit = (fault.kind, fault.after) if fault else None
        if fault and hit == ("delay", None):
            hub._closing.wait(fault.seconds)
        if hit == ("drop", None):
            hub.requests.append(Request(self.command, path, 0))
            self._reset()
            return
        answer = _disturbed(hub, call, fault)
        hub.requests.append(Request(self.command, path, answer.status))
        if hit == ("drop", 0):
            self._reset()
        else:
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

    def _write(self, answer: Answer, fault: Fault | None) -> None:
        self.send_response(answer.status)
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


def _disturbed(hub: LoopbackHub, call: Call, fault: Fault | None) -> Answer:
    """The answer to a request, with those faults in it that do not concern the connection."""
    if fault and fault.kind == "status":
        return Answer.of({"error": "injected fault"}, fault.status)
    if fault and fault.kind == "missing":
        return Refusal(404, "Entry not found", "EntryNotFound").answer
    answer = hub._answer(call)
    if fault and fault.kind == "shorten":
        return Answer(answer.status, answer.body[: fault.after], answer.headers)
    if fault and fault.kind == "corrupt":
        body, headers = bytearray(answer.body), dict(answer.headers)
        if body:
            body[min(len(body) // 2 if fault.after is None else fault.after, len(body) - 1)] ^= 0xFF
        if fault.etag is not None:
            headers |= {name: f'"{fault.etag}"' for name in ("ETag", "X-Linked-Etag") if name in headers}
        return Answer(answer.status, bytes(body), headers)
    return answer
