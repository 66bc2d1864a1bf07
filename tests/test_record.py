from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import SHAPES, shapes_coco
from PIL import Image

from dyhead_zoo import create_detector, evaluate
from dyhead_zoo.card import render_card
from dyhead_zoo.engine.bootstrap import average_precision, bootstrap_intervals, class_matches
from dyhead_zoo.engine.evaluate import MASK_METRIC_NAMES, coco_metrics, match_images
from dyhead_zoo.engine.record import evaluation_record, predictions_sha256, record_to_json
from dyhead_zoo.ops.masks import encode_box

Content = dict[str, Any]
Found = list[dict[str, Any]]


def photos(seed: int, count: int, classes: int = 3) -> tuple[Content, Found]:
    """Objects at random, found with errors, some twice, some crowds, some images empty.

    Scores may be equal in different images, but not within one: there the copies of a drawn image would interleave.
    """
    rng = np.random.default_rng(seed)
    content: Content = {
        "images": [{"id": 10 * i + 3, "height": 300, "width": 300} for i in range(count)],
        "annotations": [],
        "categories": [{"id": c + 1, "name": f"class {c}"} for c in range(classes)],
    }
    found: Found = []
    for image in content["images"]:
        scores = iter(rng.permutation(40) / 40)
        for _ in range(rng.integers(0, 5)):
            box = [*rng.uniform(0, 200, 2), *rng.uniform(20, 90, 2)]
            category, crowd = int(rng.integers(1, classes + 1)), int(rng.random() < 0.1)
            content["annotations"].append(
                {"id": len(content["annotations"]) + 1, "image_id": image["id"], "category_id": category}
                | {"bbox": [float(v) for v in box], "iscrowd": crowd}
            )
            for _ in range(rng.integers(0, 3)):
                moved = [float(v) for v in box + rng.normal(0, 6, 4)]
                label = category if rng.random() < 0.8 else int(rng.integers(1, classes + 1))
                found.append(
                    {"image_id": image["id"], "category_id": label, "bbox": moved, "score": float(next(scores))}
                )
    return content, found


def drawn(content: Content, found: Found, weights: list[int]) -> tuple[Content, Found]:
    """The data set in which each image stands as often as it was drawn, copies beside each other."""
    images, annotations, records = [], [], []
    for image, times in zip(content["images"], weights, strict=True):
        for _ in range(times):
            number = len(images) + 1
            images.append({**image, "id": number})
            annotations += [{**a, "image_id": number} for a in content["annotations"] if a["image_id"] == image["id"]]
            records += [{**p, "image_id": number} for p in found if p["image_id"] == image["id"]]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    return {**content, "images": images, "annotations": annotations}, records


# -- bootstrap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
@pytest.mark.parametrize("seed", range(3))
def test_weighted_ap_is_that_of_the_repeated_images(seed: int, backend: Any) -> None:
    if backend == "hotcoco":
        pytest.importorskip("hotcoco")
    content, found = photos(seed, 12)
    classes, count = class_matches(match_images(content, found, backend=backend))
    weights = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=8)
    weights[0] = 1  # the data set itself
    fast = average_precision(classes, weights)
    for row, times in zip(fast, weights, strict=True):
        slow, _ = coco_metrics(*drawn(content, found, times.tolist()), backend=backend)
        assert row.mean() == pytest.approx(slow["AP"], abs=1e-12)
        assert row[0] == pytest.approx(slow["AP50"], abs=1e-12)


def with_masks(content: Content, found: Found) -> tuple[Content, Found]:
    """The boxes as masks: those of objects as polygons, those that were found only half as wide."""
    height, width = 300, 300
    objects, halves = [], []
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        objects.append({**a, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
    for p in found:
        x, y, w, h = p["bbox"]
        box = [max(v, 0.0) for v in (x, y, x + w / 2, y + h)]
        halves.append({**p, "segmentation": encode_box((box[0], box[1], box[2], box[3]), height, width)})
    return {**content, "annotations": objects}, halves


def test_weighted_mask_ap_is_that_of_the_repeated_images() -> None:
    content, found = with_masks(*photos(4, 12))
    classes, count = class_matches(match_images(content, found, overlap="segm"))
    weights = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=4)
    for row, times in zip(average_precision(classes, weights), weights, strict=True):
        slow, _ = coco_metrics(*drawn(content, found, times.tolist()), overlap="segm")
        assert row.mean() == pytest.approx(slow["AP"], abs=1e-12)


def test_masks_have_intervals_of_their_own() -> None:
    content, found = with_masks(*photos(4, 40))
    boxes, masks = (bootstrap_intervals(content, found, resamples=30, overlap=o) for o in ("bbox", "segm"))
    assert 0 < masks["AP50"][1] < boxes["AP50"][0]


def test_equal_images_leave_no_doubt() -> None:
    content, found = drawn(*photos(1, 1), weights=[8])
    exact, _ = coco_metrics(content, found)
    for name, (low, high) in bootstrap_intervals(content, found, resamples=20).items():
        assert low == high == pytest.approx(exact[name])
        assert exact[name] > 0


def test_interval_holds_the_figure_and_shrinks_with_more_images() -> None:
    widths = []
    for count in (20, 320):
        content, found = photos(5, count)
        exact, _ = coco_metrics(content, found)
        low, high = bootstrap_intervals(content, found, resamples=200)["AP"]
        assert low < exact["AP"] < high
        widths.append(high - low)
    assert widths[1] < 0.5 * widths[0]  # a quarter, by the square root of the number of images


def test_the_seed_decides_the_draws() -> None:
    content, found = photos(2, 15)
    first, again, other = (bootstrap_intervals(content, found, resamples=30, seed=seed) for seed in (4, 4, 5))
    assert first == again != other


def test_only_the_images_asked_for_are_drawn() -> None:
    content, found = photos(3, 20)
    ids = [image["id"] for image in content["images"]][:6]
    part = {**content, "images": content["images"][:6]}
    part["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    kept = [p for p in found if p["image_id"] in ids]
    assert bootstrap_intervals(content, found, image_ids=ids, resamples=9) == bootstrap_intervals(
        part, kept, resamples=9
    )


@pytest.mark.parametrize("found", [[], [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.5}]])
def test_without_objects_there_is_no_interval(found: Found) -> None:
    content = {
        "images": [{"id": 1, "height": 9, "width": 9}],
        "annotations": [],
        "categories": [{"id": 1, "name": "a"}],
    }
    assert all(math.isnan(v) for pair in bootstrap_intervals(content, found, resamples=3).values() for v in pair)


def test_no_draws_are_an_error() -> None:
    with pytest.raises(ValueError, match="resamples=0"):
        bootstrap_intervals(*photos(0, 2), resamples=0)


# -- record ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (64, 48), "white").save(folder / "a.png")
    annotation = {"id": 1, "image_id": 5, "category_id": 1, "bbox": [4, 4, 40, 30]}
    image = {"id": 5, "file_name": "a.png", "height": 48, "width": 64}
    names = [{"id": 1, "name": "person"}]
    path = folder / "a.json"
    path.write_text(json.dumps({"images": [image], "annotations": [annotation], "categories": names}))
    detector = create_detector("test_atss")
    result = evaluate(detector, images=folder, annotations=path, progress=False)
    return evaluation_record(detector, result, annotations=path, dataset="one photo", resamples=5)


def test_record_says_what_was_measured_on_what(record: dict[str, Any]) -> None:
    assert record["detector"] == "test_atss" and record["model"]["parameters"] > 0 and record["model"]["macs"] > 0
    assert {k: record["dataset"][k] for k in ("name", "split", "images", "objects")} == {
        "name": "one photo",
        "split": "val",
        "images": 1,
        "objects": 1,
    }
    assert len(record["dataset"]["annotations_sha256"]) == len(record["predictions"]["sha256"]) == 64
    assert len(record["metrics"]) == 12 and record["per_class"][0]["num_gts"] == 1
    assert record["intervals"]["resamples"] == 5 and len(record["intervals"]["AP"]) == 2
    assert {"torch", "timm", "hardware", "commit"} <= set(record["environment"])
    assert record["evaluator"].split()[0] in ("hotcoco", "pycocotools")


def test_masks_are_in_the_record_of_a_detector_that_makes_them(tmp_path: Path) -> None:
    images, annotations = shapes_coco(tmp_path, count=2)
    detector = create_detector("test_mask_rcnn", class_names=SHAPES, score_threshold=0.0, max_detections=5)
    result = evaluate(detector, images=images, annotations=annotations, progress=False)
    record = evaluation_record(detector, result, annotations=annotations, dataset="shapes", resamples=3)
    assert set(MASK_METRIC_NAMES) < set(record["metrics"]) and record["predictions"]["count"] == 10
    assert {"AP", "AP50", "mask_AP", "mask_AP50"} < set(record["intervals"])
    assert all("mask_AP50" in row for row in record["per_class"])
    card = render_card(detector.config(), record)
    assert "masks, %" in card and "| class | AP | AP50 | mask AP | mask AP50 | objects |" in card


def test_record_is_strict_json(record: dict[str, Any]) -> None:
    text = record_to_json(record)
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == record
    assert record["metrics"]["APs"] is None  # the photo has no small object


def test_hash_of_predictions_ignores_the_order_of_keys_alone() -> None:
    record = {"image_id": 1, "category_id": 2, "bbox": [0.0, 1.0, 2.0, 3.0], "score": 0.5}
    same, other = dict(reversed(record.items())), {**record, "score": 0.51}
    assert predictions_sha256([record]) == predictions_sha256([same]) != predictions_sha256([other])


def test_annotations_of_another_data_set_are_an_error(tmp_path: Path) -> None:
    content, found = photos(0, 3)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**content, "images": content["images"][:1], "annotations": []}))
    with pytest.raises(ValueError, match="right file"):
        bootstrap_intervals(other, found, resamples=2)
