"""LoopbackHub: the real huggingface_hub client against it, and each fault has the effect that it claims."""

from __future__ import annotations

import base64
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save

from dyhead_zoo.testing import Fault, FaultKind, LoopbackHub, Request

TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}
REPO = "alice/detector"
WEIGHTS = save({"weight": torch.arange(50_000, dtype=torch.float32)})
CARD = b"---\nlibrary_name: dyhead_zoo\nlicense: apache-2.0\ntags:\n- dyhead\n- 'tiny'\n---\n# A detector\n"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(TOKENS) as hub:
        yield hub


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token="hf_alice")


@pytest.fixture
def anonymous(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "upload"
    (folder / ".eval_results").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_bytes(CARD)
    (folder / ".eval_results" / "coco.yaml").write_text("[]")
    return folder


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's pauses before it tries again, left out."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def ask(hub: LoopbackHub, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One plain request; the names of the answer's headers are in lower case."""
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=10)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def commit(hub: LoopbackHub, *operations: dict[str, Any]) -> int:
    """Status of a commit to main of ``REPO``, past the client."""
    lines = [{"key": "header", "value": {"summary": "by hand"}}, *operations]
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=10)
    try:
        body = "\n".join(json.dumps(line) for line in lines)
        connection.request("POST", f"/api/models/{REPO}/commit/main", body, {"Authorization": "Bearer hf_alice"})
        return connection.getresponse().status
    finally:
        connection.close()


def addition(path: str, content: bytes) -> dict[str, Any]:
    """Operation of a commit that adds or replaces a file."""
    encoded = base64.b64encode(content).decode()
    return {"key": "file", "value": {"path": path, "content": encoded, "encoding": "base64"}}


# --- round trips ------------------------------------------------------------------------------------------------------


def test_a_folder_goes_up_in_one_commit_and_comes_back(
    hub: LoopbackHub, api: HfApi, folder: Path, tmp_path: Path
) -> None:
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="all of it")
    uploaded = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    stored = hub.files(REPO)
    assert {path: stored[path] for path in uploaded} == uploaded
    assert set(stored) - set(uploaded) == {".gitattributes"}
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["all of it", "initial commit"]

    snapshot = Path(api.snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    assert {path: (snapshot / path).read_bytes() for path in uploaded} == uploaded
    assert api.list_repo_files(REPO) == list(stored)
    entries = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    lfs = {path for path, entry in entries.items() if getattr(entry, "lfs", None)}
    assert lfs == {"model.safetensors"}
    assert {entry.path for entry in api.list_repo_tree(REPO, ".eval_results")} == {".eval_results/coco.yaml"}
    assert ".eval_results" in {entry.path for entry in api.list_repo_tree(REPO)}
    (info,) = api.get_paths_info(REPO, ["model.safetensors", "none"])
    assert info.path == "model.safetensors"


def test_what_has_not_changed_is_not_pushed_again(hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.requests.clear()
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    assert not [request for request in hub.requests if request.method == "PUT" or "/commit/" in request.path]


def test_creating_a_repository_twice(api: HfApi) -> None:
    api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO


def test_a_revision_outlives_later_pushes(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    sha = hub.put(REPO, {"config.json": b"old"})
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="stable")
    hub.put(REPO, {"config.json": b"new"})
    for revision, content in {"v1": b"old", "stable": b"old", sha: b"old", "main": b"new"}.items():
        path = api.hf_hub_download(REPO, "config.json", revision=revision, cache_dir=tmp_path)
        assert Path(path).read_bytes() == hub.files(REPO, revision)["config.json"] == content
    refs = api.list_repo_refs(REPO)
    assert {ref.name for ref in refs.branches} == {"main", "stable"}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", sha)]
    api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v1")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(REPO, branch="stable")


def test_commit_of_additions_and_deletions(hub: LoopbackHub, api: HfApi) -> None:
    hub.put(REPO, {"a.txt": b"a", "folder/b.txt": b"b", "folder/c.txt": b"c", "folder2": b"d"})
    api.create_commit(
        REPO,
        operations=[
            CommitOperationDelete("a.txt"),
            CommitOperationDelete("folder/", is_folder=True),
            CommitOperationAdd("e.txt", b"e"),
        ],
        commit_message="tidy",
    )
    assert set(hub.files(REPO)) == {".gitattributes", "folder2", "e.txt"}


def test_a_commit_on_an_outdated_parent_is_refused(hub: LoopbackHub, api: HfApi) -> None:
    parent = hub.put(REPO, {"a": b"1"})
    hub.put(REPO, {"a": b"2"})
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"3", path_in_repo="a", repo_id=REPO, parent_commit=parent)
    assert hub.files(REPO)["a"] == b"2"


@pytest.mark.parametrize(
    "operation",
    [
        {"key": "lfsFile", "value": {"path": "model.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 3}},
        {"key": "file", "value": {"path": "b", "content": "no base64!", "encoding": "base64"}},
        {"key": "deletedFile", "value": {"path": "no-such-file"}},
        {"key": "rename", "value": {"path": "a"}},
        {"key": "file"},
    ],
)
def test_a_commit_is_made_whole_or_not_at_all(hub: LoopbackHub, operation: dict[str, Any]) -> None:
    hub.put(REPO, {"a": b"1"})
    before = hub.files(REPO)
    assert commit(hub, addition("a", b"2"), operation) in (400, 404)
    assert hub.files(REPO) == before


def test_an_upload_that_arrives_damaged_is_refused(hub: LoopbackHub) -> None:
    hub.put(REPO, {})
    assert ask(hub, f"/{REPO}.git/lfs/{'0' * 64}", "PUT")[0] == 400


def test_models_are_listed_by_search_author_and_tag(hub: LoopbackHub, api: HfApi, anonymous: HfApi) -> None:
    hub.put(REPO, {"README.md": CARD})
    hub.put("alice/secret", {"README.md": CARD}, private=True)
    hub.put("bob/other", {})

    def listed(client: HfApi, **arguments: Any) -> list[str]:
        return [model.id for model in client.list_models(**arguments)]

    assert listed(api) == ["alice/detector", "alice/secret", "bob/other"]
    assert listed(anonymous) == ["alice/detector", "bob/other"]
    assert listed(api, author="alice", search="DET") == ["alice/detector"]
    assert listed(api, filter="dyhead_zoo") == listed(api, filter="tiny") == ["alice/detector", "alice/secret"]
    assert listed(api, filter="segmentation") == []
    info = api.model_info(REPO, files_metadata=True)
    assert info.tags == ["dyhead_zoo", "dyhead", "tiny", "license:apache-2.0"]
    assert info.library_name == "dyhead_zoo"
    assert {file.rfilename: file.size for file in info.siblings or ()}["README.md"] == len(CARD)


def test_a_card_whose_front_matter_is_no_plain_yaml_has_no_tags(hub: LoopbackHub, api: HfApi) -> None:
    hub.put(REPO, {"README.md": b"---\n- \xff\n: :\nmodel-index:\n- name: x\n  results: [{}]\n---\n"})
    assert api.model_info(REPO).tags == []


def test_safetensors_metadata_by_ranges(hub: LoopbackHub, api: HfApi) -> None:
    hub.put(REPO, {"model.safetensors": WEIGHTS})
    metadata = api.get_safetensors_metadata(REPO)
    assert metadata.parameter_count == {"F32": 50_000}
    assert 206 in {request.status for request in hub.requests}


def test_ranges(hub: LoopbackHub) -> None:
    hub.put(REPO, {"digits": b"0123456789"})
    path = f"/{REPO}/resolve/main/digits"
    etag = ask(hub, path)[1]["etag"]
    expected = {"bytes=2-4": b"234", "bytes=7-": b"789", "bytes=-3": b"789", "bytes=8-99": b"89"}
    for asked, body in expected.items():
        status, headers, received = ask(hub, path, Range=asked)
        assert (status, received) == (206, body)
        assert headers["content-range"].endswith("/10")
    assert ask(hub, path, Range="bytes=10-")[0] == 416
    assert ask(hub, path, Range="bytes=2-4", If_Range=etag)[0] == 206
    assert ask(hub, path, Range="bytes=2-4", If_Range='"another"')[2] == b"0123456789"
    status, headers, received = ask(hub, path, "HEAD")
    assert (status, headers["content-length"], received) == (200, "10", b"")


def test_delete_repository(hub: LoopbackHub, api: HfApi) -> None:
    hub.put(REPO, {})
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)
    with pytest.raises(ValueError, match=f"no repository '{REPO}'"):
        hub.files(REPO)


# --- who may do what --------------------------------------------------------------------------------------------------


def test_a_private_repository_is_for_its_owner(hub: LoopbackHub, api: HfApi, anonymous: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO, private=True)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO)
    stranger = HfApi(endpoint=hub.endpoint, token="hf_bob")
    for client in (anonymous, stranger):
        with pytest.raises(RepositoryNotFoundError):
            client.hf_hub_download(REPO, "config.json", cache_dir=tmp_path / "none")
    assert Path(api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path)).read_bytes() == b"{}"
    assert api.model_info(REPO).private


def test_only_the_owner_writes(hub: LoopbackHub, anonymous: HfApi) -> None:
    hub.put(REPO, {})
    stranger = HfApi(endpoint=hub.endpoint, token="hf_bob")
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO)
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.create_repo("alice/new")
    with pytest.raises(RepositoryNotFoundError, match="401"):
        anonymous.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO)
    with pytest.raises(HfHubHTTPError, match="401"):
        anonymous.create_repo("carol/new")
    assert stranger.create_repo("organisation/new").repo_id == "organisation/new"


def test_an_unknown_token_is_refused(hub: LoopbackHub) -> None:
    hub.put(REPO, {})
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.endpoint, token="hf_expired").model_info(REPO)
    assert HfApi(endpoint=hub.endpoint, token="hf_bob").whoami()["name"] == "bob"


def test_a_gated_repository_is_seen_but_not_downloaded(
    hub: LoopbackHub, api: HfApi, anonymous: HfApi, tmp_path: Path
) -> None:
    hub.put(REPO, {"config.json": b"{}"}, gated=True)
    stranger = HfApi(endpoint=hub.endpoint, token="hf_bob")
    for client in (anonymous, stranger):
        assert client.model_info(REPO).gated == "manual"
        with pytest.raises(GatedRepoError):
            client.hf_hub_download(REPO, "config.json", cache_dir=tmp_path / "none")
    api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path)


def test_what_does_not_exist_is_told_apart(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.put(REPO, {"config.json": b"{}"})
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("alice/none", "config.json", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "config.json", revision="v9", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "none.json", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "none"))
    with pytest.raises(ValueError, match="no revision 'v9'"):
        hub.files(REPO, "v9")
    assert ask(hub, "/api/datasets/alice/data")[0] == 404


# --- faults -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_download_goes_on_where_it_stopped(
    hub: LoopbackHub, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 10)  # it keeps whole chunks only
    hub.put(REPO, {"model.safetensors": WEIGHTS})
    hub.fail(Fault("truncate", "*/model.safetensors", after=100_000))
    path = api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS
    assert [request.status for request in hub.requests if request.method == "GET"] == [200, 206]


def test_a_reset_ends_a_download_and_the_next_succeeds(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.put(REPO, {"model.safetensors": WEIGHTS})
    hub.fail(Fault("drop", "*/model.safetensors", after=1000))
    with pytest.raises(Exception, match="reset"):
        api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)
    path = api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS


def test_a_drop_before_the_answer_has_no_effect_and_one_after_it_has(hub: LoopbackHub) -> None:
    hub.put(REPO, {"a": b"1"})
    for after, content in ((None, b"1"), (0, b"2")):
        hub.fail(Fault("drop", "*/commit/main", "POST", after=after))
        with pytest.raises(OSError):
            commit(hub, addition("a", b"2"))
        assert hub.files(REPO)["a"] == content
    assert [request.status for request in hub.requests] == [0, 200]


def test_a_shortened_file_is_complete_to_http_and_found_out_by_the_client(
    hub: LoopbackHub, api: HfApi, tmp_path: Path
) -> None:
    hub.put(REPO, {"model.safetensors": WEIGHTS})
    hub.fail(Fault("shorten", "*/model.safetensors", times=2, after=1000))
    status, headers, body = ask(hub, f"/{REPO}/resolve/main/model.safetensors")
    assert (status, headers["content-length"], body) == (200, "1000", WEIGHTS[:1000])
    with pytest.raises(OSError, match="Consistency check failed"):
        api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_an_error_of_the_server_passes(
    hub: LoopbackHub, api: HfApi, tmp_path: Path, impatient: None, status: int
) -> None:
    hub.put(REPO, {})
    hub.fail(Fault("status", "*/preupload/*", "POST", times=2, status=status))
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO)
    assert [request.status for request in hub.requests if "preupload" in request.path] == [status, status, 200]
    assert hub.files(REPO)["config.json"] == b"{}"


def test_a_slow_answer_runs_into_a_time_limit(hub: LoopbackHub) -> None:
    hub.put(REPO, {"a": b"0123456789"})
    hub.fail(Fault("delay", "*/a", seconds=60, times=2))
    hub.fail(Fault("delay", "*/a", seconds=60, after=4))
    for received in (0, 0, 4):
        connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=0.2)
        connection.request("GET", f"/{REPO}/resolve/main/a")
        with pytest.raises(TimeoutError):
            response = connection.getresponse()
            assert response.read(received) == b"0123456789"[:received]
            response.read()
        connection.close()
    assert ask(hub, f"/{REPO}/resolve/main/a")[2] == b"0123456789"


def test_a_delay_ends_with_the_answer() -> None:
    with LoopbackHub() as hub:
        hub.put(REPO, {"a": b"0123456789"})
        hub.fail(Fault("delay", "*/a", seconds=0.05, after=4))
        assert ask(hub, f"/{REPO}/resolve/main/a")[2] == b"0123456789"


def test_a_corrupt_file_has_its_length_but_not_its_bytes(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.put(REPO, {"model.safetensors": WEIGHTS})
    hub.fail(Fault("corrupt", "*/model.safetensors", after=len(WEIGHTS) - 1))
    damaged = Path(api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)).read_bytes()
    assert damaged[:-1] == WEIGHTS[:-1]
    assert damaged[-1] != WEIGHTS[-1]

    hub.fail(Fault("corrupt", "*/model.safetensors", method="*", times=None, etag="f" * 64))
    for method in ("HEAD", "GET"):
        _, headers, body = ask(hub, f"/{REPO}/resolve/main/model.safetensors", method)
        assert headers["etag"] == headers["x-linked-etag"] == f'"{"f" * 64}"'
        assert body != WEIGHTS


def test_a_missing_file_is_still_listed(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.put(REPO, {"config.json": b"{}"})
    hub.fail(Fault("missing", "*/config.json", method="*", times=None))
    assert "config.json" in api.list_repo_files(REPO)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path)
    hub.heal()
    api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path)


def test_a_fault_hits_the_requests_that_match_as_often_as_it_says(hub: LoopbackHub) -> None:
    hub.put(REPO, {"a": b"", "b": b""})
    hub.fail(Fault("status", "*/a", times=2, status=500))
    hub.fail(Fault("status", "*/a", status=503))
    path = f"/{REPO}/resolve/main/"
    assert [ask(hub, f"{path}b")[0], ask(hub, f"{path}a", "HEAD")[0]] == [200, 200]
    assert [ask(hub, f"{path}a")[0] for _ in range(4)] == [500, 500, 503, 200]
    assert hub.requests[0] == Request("GET", f"{path}b", 200)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"kind": "explode"}, "unknown kind of fault 'explode'"),
        ({"kind": "truncate"}, "needs after="),
        ({"kind": "shorten"}, "needs after="),
        ({"kind": "delay"}, "needs seconds="),
        ({"kind": "drop", "after": -1}, "after must be"),
        ({"kind": "drop", "times": 0}, "times >= 1"),
    ],
)
def test_faults_that_make_no_sense(arguments: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Fault(**arguments)  # type: ignore[arg-type]


# --- hostile content, several clients, other processes ----------------------------------------------------------------


def test_any_path_and_any_bytes_can_be_put(hub: LoopbackHub, api: HfApi) -> None:
    hostile = {"../../escape.json": b"{}", "model.safetensors": (1 << 30).to_bytes(8, "little") + b"{", "a\nb %2F": b""}
    hub.put(REPO, hostile)
    assert hostile.items() <= hub.files(REPO).items()
    assert set(hostile) <= set(api.list_repo_files(REPO))


def test_what_a_client_sends_does_not_break_the_answer(hub: LoopbackHub) -> None:
    hub.put(REPO, {})
    for revision in ("a%0D%0AX-Injected:%201", "%E6%97%A5%E6%9C%AC"):
        status, headers, _ = ask(hub, f"/{REPO}/resolve/{revision}/config.json")
        assert (status, headers["x-error-code"]) == (404, "RevisionNotFound")
        assert "x-injected" not in headers


def test_a_new_branch_starts_at_main(hub: LoopbackHub) -> None:
    hub.put(REPO, {"a": b"1"})
    hub.put(REPO, {"b": b"2"}, revision="refs/pr/1")
    assert {"a", "b"} <= set(hub.files(REPO, "refs/pr/1"))
    assert "b" not in hub.files(REPO)
    assert ask(hub, f"/{REPO}/resolve/refs%2Fpr%2F1/b")[2] == b"2"


def test_two_pull_at_once(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.put(REPO, {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    start = threading.Barrier(2)

    def pull(cache: Path) -> bytes:
        start.wait(timeout=10)
        return (Path(api.snapshot_download(REPO, cache_dir=cache)) / "model.safetensors").read_bytes()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(pull, [tmp_path / "one", tmp_path / "two"])) == [WEIGHTS, WEIGHTS]


def test_two_push_at_once(hub: LoopbackHub, api: HfApi) -> None:
    api.create_repo(REPO)
    names = [f"{index}.txt" for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: api.upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id=REPO), names))
    assert set(names) <= set(hub.files(REPO))


def test_a_subprocess_with_a_cache_of_its_own(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.put(REPO, {"config.json": b"{}"}, private=True)
    code = f"from huggingface_hub import hf_hub_download; print(hf_hub_download({REPO!r}, 'config.json'))"

    def pull(cache: str, token: str | None) -> subprocess.CompletedProcess[str]:
        inherited = {**os.environ, "HF_TOKEN": "hf_alice", "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "no")}
        variables = {**inherited, **hub.environment(tmp_path / cache, token)}
        return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)

    done = pull("with", "hf_alice")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "with")
    refused = pull("without", None)
    assert refused.returncode != 0
    assert "RepositoryNotFoundError" in refused.stderr


def test_after_its_end_a_hub_answers_no_more(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        hub.put("tester/detector", {"a": b"1"})
        connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=10)
        connection.request("GET", "/tester/detector/resolve/main/a")
        assert connection.getresponse().read() == b"1"  # and the connection stays open
    with pytest.raises((OSError, http.client.HTTPException)):
        connection.request("GET", "/tester/detector/resolve/main/a")
        connection.getresponse()
    connection.close()


def test_every_kind_of_fault_leaves_the_hub_whole(hub: LoopbackHub) -> None:
    hub.put(REPO, {"a": b"0123456789"})
    kinds: list[FaultKind] = ["drop", "truncate", "shorten", "status", "delay", "corrupt", "missing"]
    for kind in kinds:
        hub.fail(replace(Fault("delay", "*/a", after=3, seconds=0.01), kind=kind))
        try:
            disturbed: object = ask(hub, f"/{REPO}/resolve/main/a")
        except (OSError, http.client.HTTPException) as error:
            disturbed = error
        assert ask(hub, f"/{REPO}/resolve/main/a")[2] == b"0123456789", (kind, disturbed)
