"""``hub/``: what is published can be pulled by its cfg alone, and the COCO subset can be rebuilt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dyhead_zoo import get_pretrained_cfg, list_pretrained
from dyhead_zoo.pretrained import BUNDLED, HUB_ORGANISATION, PretrainedCfg
from dyhead_zoo.testing import LoopbackHub

ROOT = Path(__file__).parents[1]
NAMES = [name for name in list_pretrained() if get_pretrained_cfg(name).status == "bundled"]

PULL = """
import json, sys
from dyhead_zoo import create_detector
from dyhead_zoo.golden import read_golden, verify
for name in sys.argv[2:]:
    detector = create_detector(name, pretrained=True)
    verification = verify(detector, read_golden(f"{sys.argv[1]}/{name}/golden.safetensors")[0])
    assert verification.passed, verification.report()
print("pulled", len(sys.argv) - 2)
"""


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub({"hf_owner": HUB_ORGANISATION}) as hub:
        yield hub


@pytest.fixture(scope="module")
def published(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that may be published is, to the hub; the folders that were pushed."""
    folder, cache = tmp_path_factory.mktemp("folders"), tmp_path_factory.mktemp("publisher")
    done = run("hub/publish.py", "--push", "--output", folder, **hub.environment(cache, token="hf_owner"))
    assert done.returncode == 0, done.stderr
    assert all(f'hf_hub_id="{HUB_ORGANISATION}/{name}"' in done.stdout for name in NAMES)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_published_repository_is_complete_and_of_one_tag(published: Path, hub: LoopbackHub, name: str) -> None:
    cfg = get_pretrained_cfg(name)
    assert cfg.hf_hub_id == f"{HUB_ORGANISATION}/{name}" and cfg.hf_hub_revision
    files = hub.files(cfg.hf_hub_id, cfg.hf_hub_revision)
    wanted = {"config.json", "model.safetensors", "README.md", "eval.json", "recipe.json", "golden.safetensors"}
    assert wanted <= files.keys() and not any(path.endswith((".bin", ".pth", ".pkl", ".pt")) for path in files)
    assert any(path.startswith(".eval_results/") for path in files)
    assert files["model.safetensors"] == (BUNDLED / f"{name}.safetensors").read_bytes()
    assert files["README.md"] == (ROOT / "hub" / name / "README.md").read_bytes()
    assert json.loads(files["eval.json"])["weights_sha256"] == cfg.sha256


def test_fresh_process_pulls_by_hub_id_revision_and_hash(published: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    before = len(hub.requests)
    variables = hub.environment(tmp_path / "cache")
    done = run("-c", PULL, published, *NAMES, DYHEAD_ZOO_BUNDLED="0", **variables)
    assert done.returncode == 0, done.stderr
    assert f"pulled {len(NAMES)}" in done.stdout
    asked = [request.path for request in hub.requests[before:]]
    for name in NAMES:
        cfg = get_pretrained_cfg(name)
        assert any(path.startswith(f"/{cfg.hf_hub_id}/resolve/") and "model.safetensors" in path for path in asked)


def test_dry_run_needs_no_hub(tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    done = run("hub/publish.py", NAMES[0], "atss_resnet50.mmdet_1x_coco", "--output", tmp_path, **nowhere)
    assert done.returncode == 0, done.stderr
    assert f"{NAMES[0]}: would be pushed" in done.stdout and "model.safetensors" in done.stdout
    refused = next(line for line in done.stdout.splitlines() if line.startswith("atss_resnet50.mmdet"))
    assert "not published: apache-2.0 is the licence of https://github.com/open-mmlab/mmdetection" in refused
    assert not (tmp_path / "atss_resnet50.mmdet_1x_coco").exists()


# -- functions of the scripts ------------------------------------------------------------------------------------------


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "hub")
    monkeypatch.syspath_prepend(ROOT / "hub" / "data")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"file": "a.safetensors", "license": "apache-2.0"}, None),
        ({"url": "https://a.b/c.pth", "license": "mit", "license_url": "https://a.b/licence"}, None),
        ({"url": "https://a.b/c.pth", "license": "mit"}, "for the weights themselves none is known"),
        ({"file": "a.safetensors", "license": "cc-by-nc-4.0"}, "'cc-by-nc-4.0' is none of"),
        ({"url": "https://a.b/c.pth"}, "licence None"),
    ],
)
def test_what_may_be_published(scripts: None, fields: dict[str, Any], reason: str | None) -> None:
    from publish import refusal

    answer = refusal(PretrainedCfg(**fields))
    assert answer is None if reason is None else reason in str(answer)


@pytest.mark.parametrize("name", NAMES)
def test_package_states_the_figures_of_the_record(scripts: None, name: str) -> None:
    from bundle import bundled_record

    record = json.loads((ROOT / "hub" / name / "eval.json").read_text())
    assert bundled_record(name, record) == json.loads((BUNDLED / f"{name}.json").read_text())


# -- the COCO subset ---------------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A COCO of two photos, one larger and one smaller than the subset's, in two splits."""
    root = tmp_path / "coco"
    for split, image_id, size in (("train2017", 9, (640, 427)), ("val2017", 7, (100, 50))):
        (root / split).mkdir(parents=True)
        Image.new("RGB", size, "red").save(root / split / f"{image_id:012}.jpg")
        box = {"bbox": [10.0, 20.0, 50.0, 10.0], "area": 123.0, "iscrowd": 0, "segmentation": []}
        annotations = [{"id": 900 + i, "image_id": image_id, "category_id": 3, **box} for i in range(2)]
        annotations.append({"id": 999, "image_id": 1, "category_id": 3, **box})  # of a photo that is not in the list
        content = {
            "images": [{"id": image_id, "file_name": f"{image_id:012}.jpg"}, {"id": 1, "file_name": "1.jpg"}],
            "annotations": annotations,
            "categories": [{"id": 3, "name": "car", "supercategory": "vehicle"}],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def test_subset_is_resized_with_its_boxes(scripts: None, coco: Path, tmp_path: Path) -> None:
    from build_subset import build

    wanted = {"name": "few", "longest_side": 384, "jpeg_quality": 85}
    content = build(wanted, "train", {"train2017": [9], "val2017": [7]}, coco, tmp_path / "images")
    assert [(i["id"], i["width"], i["height"], i["coco_split"]) for i in content["images"]] == [
        (7, 100, 50, "val2017"),  # never enlarged
        (9, 384, 256, "train2017"),
    ]
    assert [Image.open(tmp_path / "images" / i["file_name"]).size for i in content["images"]] == [(100, 50), (384, 256)]
    assert [a["image_id"] for a in content["annotations"]] == [7, 7, 9, 9]
    assert [a["id"] for a in content["annotations"]] == [1, 2, 3, 4]
    small, large = content["annotations"][0], content["annotations"][2]
    assert small["bbox"] == [10, 20, 50, 10] and small["area"] == 500  # the box's, not the mask's
    assert large["bbox"] == pytest.approx([6, 20 * 256 / 427, 30, 10 * 256 / 427], abs=0.005)


def test_missing_photos_and_ids_are_named(scripts: None, coco: Path, tmp_path: Path) -> None:
    from build_subset import build

    wanted = {"name": "few", "longest_side": 384, "jpeg_quality": 85}
    with pytest.raises(SystemExit, match=r"lacks 1 images, such as \[5\]"):
        build(wanted, "val", {"val2017": [5]}, coco, tmp_path / "images")
    (coco / "val2017" / "000000000007.jpg").unlink()
    with pytest.raises(SystemExit, match="is the download complete"):
        build(wanted, "val", {"val2017": [7]}, coco, tmp_path / "images")


def test_lists_hold_each_photo_once() -> None:
    content = json.loads((ROOT / "hub" / "data" / "coco_2148_500.json").read_text())
    ids = {part: [i for ids in splits.values() for i in ids] for part, splits in content["parts"].items()}
    assert {part: len(set(of_part)) for part, of_part in ids.items()} == {"train": 2148, "val": 500}
    assert not set(ids["train"]) & set(ids["val"])


def test_lists_are_those_of_the_data(data_dir: Path) -> None:
    content = json.loads((ROOT / "hub" / "data" / "coco_2148_500.json").read_text())
    for part, splits in content["parts"].items():
        path = data_dir / "coco_small" / "annotations" / f"instances_{part}.json"
        images = json.loads(path.read_text())["images"]
        assert {(i["coco_split"], i["id"]) for i in images} == {(split, i) for split in splits for i in splits[split]}
