"""Fetching weight files: mirrors, hashes, the cache, the Hub, no network, and many processes at once."""

from __future__ import annotations

import http.server
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dyhead_zoo import download
from dyhead_zoo.download import DownloadError, HashMismatch, cached_path, fetch, sha256_of
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.testing import LoopbackHub

BODY = bytes(range(256)) * 20


class Server(http.server.ThreadingHTTPServer):
    """Answers by path; counts the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[str] = []
        self.body = BODY

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.requests.append(self.path)
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        body = b"<html>moved</html>" if self.path.startswith("/page") else server.body
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if self.path.startswith("/page") else "application/octet-stream")
        if not self.path.startswith("/unsized"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:-10] if self.path.startswith("/dropped") else body)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("DYHEAD_ZOO_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DYHEAD_ZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def digest(tmp_path: Path) -> str:
    path = tmp_path / "body"
    path.write_bytes(BODY)
    return sha256_of(path)


def leftovers(cache: Path) -> list[str]:
    return [name for name in os.listdir(cache) if name.endswith((".part", ".tmp"))]


@pytest.mark.parametrize("path", ["good.safetensors", "unsized.safetensors?download=true"])
def test_download_once_then_from_the_cache(server: Server, cache: Path, digest: str, path: str) -> None:
    cfg = PretrainedCfg(url=server.url(path), sha256=digest)
    first = fetch(cfg)
    assert first.parent == cache and first.suffix == ".safetensors"
    assert first.read_bytes() == BODY
    assert fetch(cfg) == first
    assert len(server.requests) == 1
    assert not leftovers(cache)


@pytest.mark.parametrize("bad", ["missing", "dropped", "page"])
@pytest.mark.parametrize("with_hash", [True, False])
def test_the_mirror_serves_when_the_original_fails(server: Server, bad: str, with_hash: bool, digest: str) -> None:
    cfg = PretrainedCfg(
        url=server.url(f"{bad}.pth"), mirrors=(server.url("good.pth"),), sha256=digest if with_hash else None
    )
    assert fetch(cfg).read_bytes() == BODY
    assert server.requests == [f"/{bad}.pth", "/good.pth"]


def test_every_failure_is_listed(server: Server, cache: Path) -> None:
    mirrors = (server.url("dropped.pth"), server.url("page.pth"), server.url("good.pth"), "file:///etc/passwd")
    cfg = PretrainedCfg(url=server.url("missing.pth"), mirrors=mirrors, hash_prefix="00000000")
    with pytest.raises(DownloadError) as caught:
        fetch(cfg)
    message = str(caught.value)
    for url, reason in zip(
        (cfg.url, *mirrors),
        ("404", f"after {len(BODY) - 10} of {len(BODY)} bytes", "web page", "expected 00000000", "only http"),
        strict=True,
    ):
        line = next(line for line in message.splitlines() if str(url) in line)
        assert reason in line
    assert str(cached_path(str(cfg.url), cache)) in message
    assert not leftovers(cache) and not cached_path(str(cfg.url), cache).exists()


def test_unreachable_server(server: Server) -> None:
    server.server_close()
    with pytest.raises(DownloadError, match="URLError|Connection"):
        fetch(PretrainedCfg(url=server.url("good.pth")))


def test_hash_prefix_of_the_file_name(server: Server, digest: str) -> None:
    assert fetch(PretrainedCfg(url=server.url("good.pth"), hash_prefix=digest[:8])).read_bytes() == BODY


@pytest.mark.parametrize("stated", ["sha256", "hash_prefix", "first download"])
def test_a_damaged_cache_entry_is_downloaded_again(
    server: Server, digest: str, stated: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = PretrainedCfg(url=server.url("good.pth"))
    if stated != "first download":
        cfg = cfg.replace(**{stated: digest if stated == "sha256" else digest[:8]})
    path = fetch(cfg)
    path.write_bytes(BODY[:-1] + b"x")
    assert fetch(cfg).read_bytes() == BODY
    assert len(server.requests) == 2
    assert "damaged or was changed" in caplog.text and str(path) in caplog.text


def test_another_file_than_the_first_download_is_refused(server: Server) -> None:
    cfg = PretrainedCfg(url=server.url("good.pth"))
    path = fetch(cfg)
    path.unlink()
    server.body = BODY + b" "
    with pytest.raises(DownloadError, match=r"another file than the published one.*delete .*\.sha256"):
        fetch(cfg)
    Path(f"{path}.sha256").unlink()
    assert fetch(cfg).read_bytes() == BODY + b" "


@pytest.mark.parametrize("variable", ["DYHEAD_ZOO_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_uses_the_cache_and_says_what_to_do_without_it(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    cfg = PretrainedCfg(url=server.url("good.pth"))
    monkeypatch.setenv(variable, "1")
    expected = cached_path(str(cfg.url), cache)
    with pytest.raises(DownloadError) as caught:
        fetch(cfg)
    assert all(text in str(caught.value) for text in (f"{variable}=1", str(cfg.url), str(expected)))
    cache.mkdir(exist_ok=True)
    expected.write_bytes(BODY)  # by hand
    assert fetch(cfg) == expected
    expected.write_bytes(BODY + b"x")
    with pytest.raises(DownloadError, match="forbids the network"):
        fetch(cfg)
    assert not server.requests
    monkeypatch.setenv(variable, "0")
    assert fetch(cfg).read_bytes() == BODY


def test_a_read_only_cache_serves_files_put_there_by_hand(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = PretrainedCfg(url="http://127.0.0.1:9/w.pth")
    cache.mkdir()
    cached_path(str(cfg.url), cache).write_bytes(BODY)

    def refuse(*args: Any) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    assert fetch(cfg).read_bytes() == BODY


def test_many_at_once_download_once(server: Server) -> None:
    cfg = PretrainedCfg(url=server.url("good.pth"))
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(fetch(cfg).read_bytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [BODY] * 8
    assert len(server.requests) == 1


def test_urls_of_the_same_file_name_do_not_meet(server: Server) -> None:
    first = fetch(PretrainedCfg(url=server.url("a/model.bin")))
    server.body = b"other"
    assert fetch(PretrainedCfg(url=server.url("b/model.bin"))).read_bytes() == b"other"
    assert first.read_bytes() == BODY


@pytest.mark.parametrize("path", ["", "..", "%2e%2e", "a/%2e%2e%2fevil.pth", "evil%00.pth"])
def test_no_url_leaves_the_cache_directory(tmp_path: Path, path: str) -> None:
    target = cached_path(f"http://host/{path}", tmp_path)
    assert target.parent == tmp_path and target.name not in ("", ".", "..")


def test_cache_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="DYHEAD_ZOO_CACHE"):
        fetch(PretrainedCfg(url=server.url("good.pth")), tmp_path / "file" / "cache")


def test_cache_directory_follows_argument_then_variables(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = PretrainedCfg(url=server.url("good.pth"))
    assert fetch(cfg, tmp_path / "argument").parent == tmp_path / "argument"
    monkeypatch.delenv("DYHEAD_ZOO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch(cfg).parent == tmp_path / "xdg" / "dyhead_zoo"


def test_local_and_bundled_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(BODY)
    monkeypatch.setattr(download, "BUNDLED", tmp_path)
    assert fetch(PretrainedCfg(file=str(path))) == path
    assert fetch(PretrainedCfg(file="w.safetensors", sha256=digest)) == path
    path.write_bytes(BODY + b"x")
    with pytest.raises(HashMismatch, match=rf"w\.safetensors.*expected {digest}"):
        fetch(PretrainedCfg(file="w.safetensors", sha256=digest))
    with pytest.raises(FileNotFoundError, match="none"):
        fetch(PretrainedCfg(file="none.safetensors"))
    with pytest.raises(ValueError, match="expected the name of a bundled file"):
        fetch(PretrainedCfg(file="../w.safetensors"))
    with pytest.raises(ValueError, match="pretrained=False"):
        fetch(PretrainedCfg())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub with the file, as a repository of dyhead_zoo has it."""
    with LoopbackHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.put("org/name", {"config.json": b"{}", "model.safetensors": BODY}, revision="v1")
        yield hub


CFG = PretrainedCfg(hf_hub_id="org/name", hf_hub_revision="v1")


def test_the_hub_comes_first_where_the_hash_is_known(
    server: Server, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str
) -> None:
    cfg = CFG.replace(url=server.url("good.pth"))
    fetch(cfg, tmp_path / "urls")
    assert len(server.requests) == 1 and not hub.requests  # unverifiable, and there is a URL
    for known in (cfg.replace(sha256=digest), CFG):
        assert fetch(known, tmp_path / "hub").read_bytes() == BODY
    assert sum(r.path.endswith("config.json") and r.method == "HEAD" for r in hub.requests) == 2  # counted as downloads
    assert sum(r.path.endswith("model.safetensors") and r.method == "GET" for r in hub.requests) == 1
    monkeypatch.setenv("DYHEAD_ZOO_OFFLINE", "1")
    number = len(hub.requests)
    assert fetch(cfg.replace(sha256=digest), tmp_path / "hub").read_bytes() == BODY
    assert len(hub.requests) == number and len(server.requests) == 1


def test_the_url_follows_when_the_hub_fails(server: Server, hub: LoopbackHub, tmp_path: Path, digest: str) -> None:
    cfg = CFG.replace(sha256=digest, url=server.url("good.pth"))
    hub.put("org/name", {"model.safetensors": b"another"}, revision="v1")
    assert fetch(cfg, tmp_path).read_bytes() == BODY and len(server.requests) == 1
    with pytest.raises(DownloadError, match=rf"org/name on the Hub: .*another model.safetensors .* expected {digest}"):
        fetch(cfg.replace(url=None), tmp_path)
    with pytest.raises(DownloadError, match="org/nothing on the Hub: org/nothing does not exist, or is private"):
        fetch(cfg.replace(url=None, hf_hub_id="org/nothing"), tmp_path)


def test_bundled_files_can_be_passed_over(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str
) -> None:
    (tmp_path / "w.safetensors").write_bytes(BODY)
    monkeypatch.setattr(download, "BUNDLED", tmp_path)
    cfg = CFG.replace(file="w.safetensors", sha256=digest)
    assert fetch(cfg) == tmp_path / "w.safetensors" and not hub.requests
    monkeypatch.setenv("DYHEAD_ZOO_BUNDLED", "0")
    assert "snapshots" in str(fetch(cfg, tmp_path / "cache"))
    assert fetch(cfg.replace(file=str(tmp_path / "w.safetensors"))) == tmp_path / "w.safetensors"  # one's own
    with pytest.raises(DownloadError, match="DYHEAD_ZOO_BUNDLED=0 says to pass it over"):
        fetch(PretrainedCfg(file="w.safetensors"))


def test_an_unreachable_hub_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"config\.json of org/name at v1 could not be fetched.*Connect"):
        fetch(CFG, tmp_path)
