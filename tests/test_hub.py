"""Save, push, pull, and load from a Hub: the real client, real HTTP, faults, and what enemies might write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_card import RECORD

from dyhead_zoo import cli, create_detector, pull, push_to_hub, save_for_hub
from dyhead_zoo.detector import Detector
from dyhead_zoo.download import DownloadError, MissingFile, sha256_of
from dyhead_zoo.hub import PushError, saved_files
from dyhead_zoo.saved import check_config, saved_config
from dyhead_zoo.testing import Fault, LoopbackHub
from dyhead_zoo.weight_files import read_header, read_state_dict, state_sha256, write_safetensors

REPO = "alice/detector"
LABELS = ["kiwi", "person", "plum"]


@pytest.fixture(scope="module")
def detector() -> Detector:
    """A detector of three classes that finds something everywhere."""
    torch.manual_seed(0)
    detector = create_detector("test_atss_dyhead1", class_names=LABELS, anchor_offset=0.5)
    torch.nn.init.constant_(detector.head.cls_logits.bias, 1.0)  # type: ignore[union-attr, arg-type]
    return detector


@pytest.fixture(scope="module")
def folder(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_for_hub(detector, tmp_path_factory.mktemp("saved") / "mine", golden=False, license="apache-2.0")


def record_of(detector: Detector) -> dict[str, Any]:
    """A record as if of this detector's evaluation."""
    model = {**RECORD["model"], "parameters": sum(p.numel() for p in detector.parameters())}
    return {**RECORD, "detector": detector.name, "model": model, "state_sha256": state_sha256(detector)}


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The saved folder, to be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that this process talks to as Alice; the client's pauses before it tries again are left out."""
    for name in ("DYHEAD_ZOO_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with LoopbackHub({"hf_alice": "alice", "hf_bob": "bob"}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        yield hub


@pytest.fixture
def published(hub: LoopbackHub, folder: Path) -> LoopbackHub:
    hub.put(REPO, {name: (folder / name).read_bytes() for name in saved_files(folder)})
    return hub


def assert_same(actual: Detector, expected: Detector) -> None:
    theirs, ours = actual.state_dict(), expected.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert actual.label_space == expected.label_space
    images = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        (found,), (wanted,) = (d.decode(d(images)) for d in (actual, expected))
    assert len(wanted) and all(
        torch.equal(getattr(found, k), getattr(wanted, k)) for k in ("boxes", "scores", "labels")
    )


def set_config(folder: Path, **changes: Any) -> None:
    """Change the record of a saved folder; ``arch__channels=3`` changes an entry of ``arch``."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        (config[outer] if inner else config)[inner or outer] = value
    (folder / "config.json").write_text(json.dumps(config))


# --- saving -----------------------------------------------------------------------------------------------------------


def test_a_saved_folder_holds_everything_and_no_pickle(detector: Detector, folder: Path) -> None:
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert_same(create_detector(f"local-dir:{folder}"), detector)
    _, header = read_header(folder / "model.safetensors")
    assert header["format"] == "pt" and header["format_version"] == "1" and header["license"] == "apache-2.0"
    assert json.loads(header["label_space"])["names"] == LABELS
    assert json.loads(header["config"]) == json.loads((folder / "config.json").read_text())
    assert_same(create_detector(f"local-dir:{folder / 'model.safetensors'}"), detector)  # the weights alone


def test_a_saved_record_names_no_place_of_other_weights(folder: Path, tmp_path: Path) -> None:
    again = save_for_hub(create_detector(f"local-dir:{folder}"), tmp_path / "again", golden=False, license="mit")
    cfg = json.loads((again / "config.json").read_text())["pretrained_cfg"]
    assert not any(cfg[key] for key in ("file", "url", "mirrors", "hf_hub_id", "sha256"))
    assert str(folder) not in (again / "config.json").read_text() and cfg["license"] == "mit"


def test_a_licence_is_an_identifier(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="license='Apache License': give the Hub's identifier, such as apache-2.0"):
        save_for_hub(detector, tmp_path / "mine", golden=False, license="Apache License")
    assert not (tmp_path / "mine").exists()


def test_saving_again_replaces_what_spoke_of_the_old_weights(detector: Detector, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "mine"
    save_for_hub(detector, target, card="# mine", record=record_of(detector), max_shard_size=40_000)
    shards = [name for name in saved_files(target) if name.startswith("model-")]
    assert len(shards) > 1 and {"model.safetensors.index.json", "golden.safetensors", "eval.json"} <= set(
        saved_files(target)
    )
    assert_same(create_detector(f"local-dir:{target}"), detector)
    assert_same(
        create_detector("test_atss_dyhead1", checkpoint=target / "model.safetensors.index.json", anchor_offset=0.5),
        detector,
    )
    (target / "notes.txt").write_text("mine")
    save_for_hub(detector, target, golden=False)
    assert sorted(os.listdir(target)) == ["README.md", "config.json", "model.safetensors", "notes.txt"]
    assert (target / "README.md").read_text() == "# mine"
    with pytest.raises(ValueError, match="no record of an evaluation .* give one that"):
        save_for_hub(detector, tmp_path / "other", record={"AP": 1}, golden=False)
    with pytest.raises(ValueError, match="not of these weights"):
        save_for_hub(detector, tmp_path / "other", record={**record_of(detector), "state_sha256": "0"}, golden=False)
    assert os.listdir(target.parent) == ["mine"]


def test_what_is_not_ours_is_not_overwritten(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"theirs": 1}')
    (tmp_path / "eval.json").write_text("theirs")
    with pytest.raises(FileExistsError, match="not a saved detector's"):
        save_for_hub(detector, tmp_path, golden=False)
    assert (tmp_path / "eval.json").read_text() == "theirs"
    with pytest.raises(FileExistsError, match="is a file"):
        save_for_hub(detector, tmp_path / "eval.json", golden=False)


def test_a_card_of_ours_follows_the_record_and_claims_no_licence(detector: Detector, tmp_path: Path) -> None:
    save_for_hub(detector, tmp_path / "mine", golden=False)
    before = (tmp_path / "mine" / "README.md").read_text()
    assert "No record of an evaluation" in before and "Weights: not stated" in before and "license:" not in before
    save_for_hub(detector, tmp_path / "mine", golden=False, record=record_of(detector))
    assert "COCOeval" in (tmp_path / "mine" / "README.md").read_text()


def test_a_failed_save_leaves_the_old_folder(detector: Detector, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: sha256_of(copy / name) for name in os.listdir(copy)}

    def disk_full(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("dyhead_zoo.golden.write_golden", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save_for_hub(detector, copy)
    assert {name: sha256_of(copy / name) for name in os.listdir(copy)} == before
    assert os.listdir(copy.parent) == ["copy"]


def test_tied_tensors_are_saved(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    write_safetensors(tmp_path / "w.safetensors", {"a": shared, "b": shared, "c": shared[1:]})
    tensors = read_state_dict(tmp_path / "w.safetensors")[0]
    assert (
        torch.equal(tensors["a"], shared)
        and torch.equal(tensors["b"], shared)
        and torch.equal(tensors["c"], shared[1:])
    )


# --- push and pull ----------------------------------------------------------------------------------------------------

_FRESH = """
import json, os, sys
import torch
from dyhead_zoo import create_detector, pull
from dyhead_zoo.download import DownloadError
def trial(name, **kwargs):
    try:
        detector = create_detector(name, **kwargs)
        with torch.no_grad():
            (found,) = detector.decode(detector(torch.full((1, 3, 64, 64), 99, dtype=torch.uint8)))
        total = sum(float(v.double().abs().sum()) for v in detector.state_dict().values())
        return [total, found.boxes.tolist(), found.scores.tolist(), list(detector.label_space.names)]
    except (DownloadError, ValueError) as error:
        return str(error)
out = {}
repo = sys.argv[1]
out["main"] = trial(f"hf-hub:{repo}")
out["v1"] = trial(f"hf-hub:{repo}@v1")
out["nowhere"] = trial(f"hf-hub:{repo}@nowhere")
out["rehead"] = trial(f"hf-hub:{repo}", class_names=["person", "fig"])
if len(sys.argv) > 2:
    out["pulled"] = trial(f"local-dir:{pull(repo, sys.argv[2])}")
os.environ["HF_HUB_OFFLINE"] = "1"
out["offline"] = trial(f"hf-hub:{repo}")
out["offline nowhere"] = trial("hf-hub:alice/other")
del os.environ["HF_HUB_OFFLINE"]
os.environ["HF_TOKEN"] = ""
out["anonymous"] = trial(f"hf-hub:{repo}", cache_dir=sys.argv[0] + "-empty" if sys.argv[0] != "-c" else "empty")
print(json.dumps(out))
"""


def test_round_trip_by_two_fresh_processes_at_once(hub: LoopbackHub, detector: Detector, tmp_path: Path) -> None:
    first = push_to_hub(detector, REPO, private=True, tag="v1", eval_results=record_of(detector))
    other = create_detector("test_atss_dyhead1", class_names=LABELS, channels=48)
    torch.nn.init.constant_(other.head.cls_logits.bias, 1.0)  # type: ignore[union-attr, arg-type]
    second = push_to_hub(other, REPO)
    assert first != second
    environment = {**os.environ, **hub.environment(tmp_path / "fresh", token="hf_alice"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _FRESH, REPO]
    processes = [
        subprocess.Popen([*command, *more], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for more in ([str(tmp_path / "pulled")], [])
    ]
    answers = [json.loads(process.communicate()[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for out in answers:
        assert out["main"] == out["offline"] == out.get("pulled", out["main"])
        for name, expected in (("main", other), ("v1", detector)):
            with torch.no_grad():
                (found,) = expected.decode(expected(torch.full((1, 3, 64, 64), 99, dtype=torch.uint8)))
            total = sum(float(v.double().abs().sum()) for v in expected.state_dict().values())
            assert out[name] == [total, found.boxes.tolist(), found.scores.tolist(), LABELS]
        assert out["rehead"][3] == ["person", "fig"]
        assert out["nowhere"] == f"{REPO} has no branch, tag or commit 'nowhere'"
        assert "does not exist, or is private" in out["anonymous"] and "HF_TOKEN" in out["anonymous"]
        assert "not in the cache, and HF_HUB_OFFLINE=1 forbids the network" in out["offline nowhere"]
    assert f'create_detector("hf-hub:{REPO}")' in (tmp_path / "pulled" / "README.md").read_text()
    assert "eval.json" in hub.files(REPO, "v1") and "eval.json" not in hub.files(REPO)  # not of the new weights
    assert (tmp_path / "pulled" / "golden.safetensors").is_file()


def commits(hub: LoopbackHub) -> int:
    return sum(r.method == "POST" and "/commit/" in r.path and r.status == 200 for r in hub.requests)


def test_a_push_is_one_commit_that_replaces_the_old_weights(hub: LoopbackHub, detector: Detector, copy: Path) -> None:
    sharded = save_for_hub(detector, copy.with_name("sharded"), record=record_of(detector), max_shard_size=40_000)
    push_to_hub(sharded, REPO, card="# first")
    hub.put(REPO, {"picture.jpg": b"theirs"})
    (copy / "README.md").write_text("# of the folder")
    (copy / "pytorch_model.bin").write_bytes(b"a pickle")
    commit = push_to_hub(copy, REPO)
    assert commits(hub) == 2
    files = hub.files(REPO, commit)
    assert sorted(files) == [".gitattributes", "README.md", "config.json", "model.safetensors", "picture.jpg"]
    assert files["README.md"] == b"# first"
    push_to_hub(copy, REPO, card="# new", revision="trial")
    assert hub.files(REPO)["README.md"] == b"# first" and hub.files(REPO, "trial")["README.md"] == b"# new"
    assert push_to_hub(copy, REPO) == commit  # nothing changed


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("status", "*/lfs/*", "PUT", None, status=500), "could not be had"),
        (Fault("drop", "*/lfs/*", "PUT", None), "could not be had"),
        (Fault("status", "*/commit/*", "POST", None, status=503), "could not be had"),
        (Fault("status", "*/commit/*", "POST", None, status=412), "somebody else pushed"),
        (Fault("status", "*/preupload/*", "POST", None, status=403), "may not write"),
    ],
)
def test_a_push_that_fails_changes_nothing(published: LoopbackHub, copy: Path, fault: Fault, message: str) -> None:
    before = published.files(REPO)
    write_safetensors(copy / "model.safetensors", read_state_dict(copy / "model.safetensors")[0], {"note": "new"})
    published.fail(fault)
    with pytest.raises(PushError, match=f"the push to {REPO} failed: .*{message}"):
        push_to_hub(copy, REPO, tag="v1")
    published.heal()
    assert published.files(REPO) == before
    push_to_hub(copy, REPO, tag="v1")
    assert published.files(REPO, "v1")["model.safetensors"] == (copy / "model.safetensors").read_bytes()


def test_a_tag_that_fails_is_not_told_as_a_failed_commit(published: LoopbackHub, copy: Path) -> None:
    published.fail(Fault("status", "*/tag/*", "POST", None, status=403))
    with pytest.raises(PushError, match=f"{REPO} has the commit .* but the tag 'v1' could not be made"):
        push_to_hub(copy, REPO, tag="v1", card="# new")
    assert published.files(REPO)["README.md"] == b"# new"


def test_a_push_does_not_mix_with_another(published: LoopbackHub, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    write_safetensors(copy / "model.safetensors", read_state_dict(copy / "model.safetensors")[0], {"note": "new"})
    upload = HfApi.preupload_lfs_files

    def slow(self: HfApi, *args: Any, **kwargs: Any) -> Any:
        published.put(REPO, {"config.json": b"{}"})  # somebody else
        return upload(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", slow)
    with pytest.raises(PushError, match="somebody else pushed to it meanwhile"):
        push_to_hub(copy, REPO)
    assert published.files(REPO)["config.json"] == b"{}"


def test_pushes_that_cannot_be(hub: LoopbackHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_to_hub(folder, REPO, tag="v1")
    with pytest.raises(PushError, match="has a tag 'v1' already"):
        push_to_hub(folder, REPO, tag="v1")
    with pytest.raises(ValueError, match="leave eval_results out"):
        push_to_hub(folder, REPO, eval_results={})
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        push_to_hub(tmp_path, REPO)
    with pytest.raises(PushError, match="the push to a/b/c failed: .*Repo id"):
        push_to_hub(folder, "a/b/c")
    for token in ("hf_bob", "hf_nobody"):
        with pytest.raises(PushError, match="HF_TOKEN|may not write|does not exist, or is private"):
            push_to_hub(folder, REPO, token=token)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PushError, match="HF_HUB_OFFLINE=1 forbids"):
        push_to_hub(folder, REPO)
    assert commits(hub) == 1


def test_the_command_line_pushes_and_pulls(
    hub: LoopbackHub, folder: Path, detector: Detector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push", str(folder), REPO, "--private", "--dry-run"]) == 0
    assert "nothing was sent" in capsys.readouterr().out and not hub.requests
    assert cli.main(["push", str(folder / "model.safetensors"), REPO, "--private", "--tag", "v1"]) == 0
    assert f"create_detector('hf-hub:{REPO}@v1')" in capsys.readouterr().out
    assert cli.main(["pull", f"{REPO}@v1", str(tmp_path / "pulled")]) == 0
    assert_same(create_detector(f"local-dir:{tmp_path / 'pulled'}"), detector)
    assert cli.main(["pull", "alice/nothing", str(tmp_path / "nothing")]) == 2
    assert "does not exist, or is private" in capsys.readouterr().err and not (tmp_path / "nothing").exists()


def test_the_command_line_states_a_licence_and_keeps_what_lies_beside(
    hub: LoopbackHub, detector: Detector, tmp_path: Path
) -> None:
    saved = save_for_hub(detector, tmp_path / "saved", record=record_of(detector), golden=False)
    (saved / "recipe.json").write_text("{}")
    (saved / "NOTICE").write_text("by Alice")
    assert "license" not in (saved / "README.md").read_text().split("---\n")[1]
    assert cli.main(["push", str(saved), REPO, "--license", "mit"]) == 0
    files = hub.files(REPO)
    assert {"eval.json", "recipe.json", "NOTICE"} < set(files)
    assert json.loads(files["config.json"])["pretrained_cfg"]["license"] == "mit"
    assert "license: mit" in files["README.md"].decode()
    assert json.loads((saved / "config.json").read_text())["pretrained_cfg"]["license"] is None  # the folder stays
    (saved / "README.md").write_text("# Mine")
    assert cli.main(["push", str(saved), "alice/own", "--license", "mit"]) == 0
    assert hub.files("alice/own")["README.md"] == b"# Mine"


# --- loading ----------------------------------------------------------------------------------------------------------


def test_private_repositories_take_a_token(
    hub: LoopbackHub, folder: Path, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_to_hub(folder, REPO, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with pytest.raises(DownloadError, match="does not exist, or is private"):
        load(tmp_path / "bob")
    loaded = load(tmp_path / "alice", token="hf_alice")
    assert_same(loaded, detector)
    assert "hf_alice" not in json.dumps(loaded.config())
    cfg = loaded.pretrained_cfg.replace(sha256=sha256_of(folder / "model.safetensors"))
    named = {"pretrained_cfg": cfg, "class_names": LABELS, "anchor_offset": 0.5, "cache_dir": tmp_path / "named"}
    assert_same(create_detector("test_atss_dyhead1", pretrained=True, token="hf_alice", **named), detector)
    with pytest.raises(DownloadError, match="does not exist, or is private"):
        create_detector("test_atss_dyhead1", pretrained=True, **{**named, "cache_dir": tmp_path / "other"})


def load(cache: Path, revision: str = "", **kwargs: Any) -> Detector:
    return create_detector(f"hf-hub:{REPO}{revision}", cache_dir=cache, **kwargs)


def assert_sound(cache: Path) -> None:
    """No file of the cache differs from its name (older clients keep the beginning of a file as ``*.incomplete``)."""
    assert all(sha256_of(path) == path.name for path in cache.rglob("blobs/*") if len(path.name) == 64)


def test_config_is_asked_for_at_every_load_and_weights_once(published: LoopbackHub, tmp_path: Path) -> None:
    for _ in range(3):
        loaded = load(tmp_path)
    asked = [(r.method, r.path.rpartition("/")[2]) for r in published.requests]
    assert asked.count(("HEAD", "config.json")) == 3 and asked.count(("GET", "model.safetensors")) == 1
    cfg = loaded.pretrained_cfg
    assert (cfg.file, cfg.hf_hub_id, cfg.status) == (None, REPO, "hub") and len(str(cfg.hf_hub_revision)) == 40


def test_weights_are_of_the_commit_of_their_config(
    published: LoopbackHub, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = saved_config

    def slow(path: Path) -> Any:
        published.put(REPO, {"model.safetensors": b"of another detector"})
        return check(path)

    monkeypatch.setattr("dyhead_zoo.hub.saved_config", slow)
    assert_same(load(tmp_path), detector)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("times", [1, None])
@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "drop"},
        {"kind": "drop", "after": 100},
        {"kind": "truncate", "after": 100},
        {"kind": "shorten", "after": 100},
        {"kind": "status", "status": 500},
        {"kind": "status", "status": 503, "method": "HEAD"},
        {"kind": "status", "status": 429},
        {"kind": "corrupt"},
        {"kind": "missing", "method": "*"},
    ],
    ids=lambda fault: "-".join(str(value) for value in fault.values()),
)
def test_a_fault_ends_in_the_detector_or_a_clear_error(
    published: LoopbackHub, detector: Detector, tmp_path: Path, file: str, times: int | None, fault: dict[str, Any]
) -> None:
    published.fail(Fault(path=f"*/{file}", times=times, **fault))
    try:
        loaded = load(tmp_path)
    except DownloadError as error:
        assert REPO in str(error) and "\n" not in str(error)
    else:
        assert_same(loaded, detector)
    assert_sound(tmp_path)
    published.heal()
    assert_same(load(tmp_path), detector)
    assert_sound(tmp_path)


def test_a_broken_transfer_is_resumed(
    published: LoopbackHub, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # what is kept of a broken transfer
    published.fail(Fault("truncate", "*/model.safetensors", after=1000))
    assert_same(load(tmp_path), detector)
    asked = [r.status for r in published.requests if r.method == "GET" and r.path.endswith("model.safetensors")]
    assert asked == [200, 206]


def test_a_damaged_cache_entry_is_fetched_again(
    published: LoopbackHub,
    detector: Detector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    load(tmp_path)
    for file in ("config.json", "model.safetensors"):
        (blob,) = {path.resolve() for path in tmp_path.rglob(f"snapshots/*/{file}")}
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 1
        blob.write_bytes(data)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(DownloadError, match=rf"{file} is damaged .* HF_HUB_OFFLINE=1 forbids"):
            load(tmp_path)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        assert_same(load(tmp_path), detector)
        assert f"{file} is damaged" in caplog.text
    assert_sound(tmp_path)


def test_a_hub_with_wrong_hashes_is_not_believed(published: LoopbackHub, tmp_path: Path) -> None:
    published.fail(Fault("corrupt", "*/model.safetensors", "*", None, etag="ab" * 32))
    with pytest.raises(DownloadError, match=r"gave twice another model\.safetensors .* expected abab"):
        load(tmp_path)
    assert_sound(tmp_path)


def test_sharded_repositories_load_and_unfinished_uploads_are_named(
    hub: LoopbackHub, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = save_for_hub(detector, tmp_path / "sharded", golden=False, max_shard_size=40_000)
    files = {name: (sharded / name).read_bytes() for name in saved_files(sharded)}
    hub.put(REPO, {"config.json": files["config.json"]})
    with pytest.raises(
        MissingFile, match=r"has no model\.safetensors, nor an index of shards: was its upload finished"
    ):
        load(tmp_path / "cache")
    hub.put(REPO, {name: data for name, data in files.items() if "00002-of" not in name})
    with pytest.raises(MissingFile, match="has no model-00002-of"):
        load(tmp_path / "cache")
    hub.put(REPO, files)
    assert_same(load(tmp_path / "cache"), detector)
    monkeypatch.setenv("DYHEAD_ZOO_OFFLINE", "1")
    assert_same(load(tmp_path / "cache"), detector)
    (sharded / next(name for name in files if "00002-of" in name)).unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of"):
        create_detector(f"local-dir:{sharded}")


def test_repositories_that_cannot_be_loaded_are_named(
    published: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.put("bob/gated", published.files(REPO), gated=True)
    published.put("alice/bert", {"config.json": b'{"architectures": ["Bert"], "model_type": "bert"}'})
    published.put("alice/empty", {"README.md": b"soon"})
    newer = json.loads(published.files(REPO)["config.json"]) | {"format_version": 99, "new_key": 1}
    published.put("alice/newer", {"config.json": json.dumps(newer).encode()})
    for name, message in {
        "bob/gated": "is gated: ask its owners for access .* HF_TOKEN",
        "bob/private": "does not exist, or is private",
        "alice/bert": "looks like one of transformers's",
        "alice/empty": r"has no config\.json: every repository",
        "alice/newer": "has format 99, this dyhead_zoo reads up to 1: upgrade",
        f"{REPO}@v9": "has no branch, tag or commit 'v9'",
        "../../etc": "Repo id|not be had",
    }.items():
        with pytest.raises((DownloadError, ValueError), match=message):
            create_detector(f"hf-hub:{name}", cache_dir=tmp_path)
    assert not any("model.safetensors" in r.path for r in published.requests)  # refused before anything large


# --- hostile records and files ----------------------------------------------------------------------------------------


@pytest.fixture
def peak() -> Iterator[None]:
    """Fails if a test needs more than 300 MB beyond what the process had at its start."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def kilobytes(key: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(key)).split()[1])

    try:
        reset.write_text("5")
    except OSError:
        pytest.skip("the peak of the memory cannot be measured here")
    before = kilobytes("VmRSS")
    yield
    assert kilobytes("VmHWM") - before < 300_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, r"keys .* see \['surprise'\]"),
        ({"pretrained_cfg__surprise": 1}, r"unknown pretrained-cfg keys \['surprise'\]"),
        ({"arch__surprise": 1}, "no part of the detector knows the argument 'surprise'"),
        ({"arch__channels": 10**9}, "arch.channels is 1e.09, beyond 65536"),
        ({"arch__channels": 65536}, "do not agree"),
        ({"arch__channels": -16}, "cannot be built"),
        ({"arch__channels": "many"}, "cannot be built"),
        ({"arch__channels": float("nan")}, "arch.channels is nan"),
        ({"arch__dyhead": 10**6}, "beyond 65536"),
        ({"arch__dyhead": 60000}, "dyhead=60000"),
        ({"arch__towers": 60000}, "more than 8000 parameters"),
        ({"arch__num_extra": 60000, "arch__extra_from": "pool"}, "num_extra=60000"),
        ({"arch__in_chans": 65536}, "do not agree"),
        ({"arch__num_classes": 10**9}, "beyond 65536"),
        ({"arch__max_detections": 10**9}, "beyond 65536"),
        ({"arch__strides": [8] * 1001}, "1001 items"),
        ({"arch__strides": [0]}, "cannot be built"),
        ({"arch__image_size": [10**9, 10**9]}, "beyond 65536"),
        ({"arch__backbone": "hf-hub:evil/body"}, "name no file and no address"),
        ({"arch__backbone": "resnet50.hf-hub:evil/body"}, "name no file and no address"),
        ({"arch__backbone": "../../body"}, "name no file and no address"),
        ({"arch__backbone": "evil"}, "timm has no backbone named 'evil'"),
        ({"arch__backbone": "vit_giant_patch14_clip_224"}, "do not agree"),
        ({"arch__pretrained_backbone": True}, "knows the argument 'pretrained_backbone'"),
        ({"arch__checkpoint": "x.safetensors"}, "knows the argument 'checkpoint'"),
        ({"arch": [1]}, "arch is not a dictionary"),
        ({"name": "os.system"}, "expected the name of a detector"),
        ({"name": "hf-hub:evil/x"}, "expected the name of a detector"),
        ({"name": "antigravity"}, "unknown detector 'antigravity'"),
        ({"name": ["test_atss"]}, "expected the name of a detector"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"format_version": 0}, "format_version is 0"),
        ({"pretrained_cfg": 7}, "pretrained_cfg is not a dictionary"),
        ({"pretrained_cfg__class_names": 7}, "class_names is '7'"),
        ({"pretrained_cfg__class_names": ["kiwi"] * 3}, "'kiwi' appears twice"),
        (
            {
                "pretrained_cfg__class_names": [str(i) for i in range(50_000)],
                "pretrained_cfg__category_ids": [*range(50_000)],
            },
            "do not agree",
        ),
        ({"pretrained_cfg__short_side": 10**9}, "short_side is 1e.09"),
        ({"pretrained_cfg__pad_divisor": 0}, "pad_divisor is 0"),
        ({"pretrained_cfg__mean": []}, "mean and .std"),
        ({"pretrained_cfg__std": [0, 0, 0]}, "mean and .std"),
        ({"pretrained_cfg__mirrors": "http://evil"}, "mirrors is 'http://evil'"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, dict) else "",
)
def test_hostile_records_are_refused_in_bounded_memory(
    copy: Path, peak: None, changes: dict[str, Any], message: str
) -> None:
    set_config(copy, **changes)
    with pytest.raises(ValueError, match=message):
        create_detector(f"local-dir:{copy}")


def test_a_record_makes_nobody_read_or_fetch_other_files(
    copy: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_config(
        copy,
        pretrained_cfg__file="/etc/passwd",
        pretrained_cfg__url="http://127.0.0.1:9/evil",
        pretrained_cfg__hf_hub_id="evil/evil",
        pretrained_cfg__source="detectron2",
        pretrained_cfg__sha256="0" * 64,
    )
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    assert_same(create_detector(f"local-dir:{copy}"), detector)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "can't decode"),
        (b"[]", "format_version"),
        (b"", "Expecting value"),
    ],
)
def test_records_that_are_no_json(copy: Path, content: bytes, message: str) -> None:
    (copy / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        create_detector(f"local-dir:{copy}")


def test_huge_files_are_not_read(copy: Path, peak: None) -> None:
    with (copy / "config.json").open("r+b") as file:
        file.truncate(1_000_000_000)
    with pytest.raises(ValueError, match=r"config\.json has 1000000000 bytes"):
        create_detector(f"local-dir:{copy}")
    with (copy / "model.safetensors").open("wb") as file:
        file.write((1_000_000_000).to_bytes(8, "little"))
        file.truncate(1_000_000_100)
    for name in (f"local-dir:{copy / 'model.safetensors'}",):
        with pytest.raises(ValueError, match="its header has 1000000000 bytes"):
            create_detector(name)
    with pytest.raises(ValueError, match="its header has 1000000000 bytes"):
        read_state_dict(copy / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "model.bin", "a/model-00001-of-00002.safetensors", 7, ""]
)
def test_shards_lie_in_the_folder(hub: LoopbackHub, copy: Path, tmp_path: Path, name: Any) -> None:
    (copy / "model.safetensors").rename(copy.parent / "secret.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match="as a shard: refused"):
        create_detector(f"local-dir:{copy}")
    hub.put(REPO, {file: (copy / file).read_bytes() for file in saved_files(copy)})
    with pytest.raises(ValueError, match="as a shard: refused"):
        load(tmp_path / "cache")


def test_pull_takes_only_files_of_a_detector(published: LoopbackHub, tmp_path: Path) -> None:
    published.put(
        REPO, {"evil.py": b"import os", "pytorch_model.bin": b"", ".eval_results/a.yaml": b"[]", "a/config.json": b""}
    )
    target = pull(REPO, tmp_path / "pulled", cache_dir=tmp_path / "cache")
    assert saved_files(target) == [".eval_results/a.yaml", "README.md", "config.json", "model.safetensors"]
    assert sorted(os.listdir(target)) == [".eval_results", "README.md", "config.json", "model.safetensors"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60)
@given(data=st.data())
def test_any_value_in_a_record_is_taken_or_refused_by_a_value_error(data: st.DataObject, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    place = data.draw(st.sampled_from([config, config["arch"], config["pretrained_cfg"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(_JSON)
    try:
        checked = check_config(config)
    except ValueError as error:
        assert str(error)
    else:
        assert checked == config


def test_wrong_sizes_are_named() -> None:
    for arguments, message in (
        ({"in_chans": 0}, "in_chans=0"),
        ({"num_extra": -1}, "num_extra=-1"),
        ({"channels": 0}, "channels=0"),
    ):
        with pytest.raises(ValueError, match=message):
            create_detector("test_atss", **arguments)  # type: ignore[arg-type]
