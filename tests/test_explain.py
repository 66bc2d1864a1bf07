"""dyhead-zoo explain: the assignment that training would use, its figures, its pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import coco_dict, small_coco, write_coco
from PIL import Image

from dyhead_zoo import create_detector
from dyhead_zoo.cli import main
from dyhead_zoo.data import CocoDataset
from dyhead_zoo.data.transforms import round_up
from dyhead_zoo.detector import Detector
from dyhead_zoo.engine.explain import Assigner, Explanation, explain
from dyhead_zoo.engine.explain_draw import draw_assignment
from dyhead_zoo.layers.assigners import BACKGROUND
from dyhead_zoo.layers.targets import Assignment
from dyhead_zoo.structures import Target

FAMILIES = ("atss", "retinanet", "fcos", "reppoints", "borderdet")


def with_input(name: str, side: int, **kwargs: Any) -> Detector:
    """A detector that resizes pictures to ``side`` pixels."""
    detector = create_detector(name, **kwargs)
    detector.pretrained_cfg = detector.pretrained_cfg.replace(short_side=side, long_side=side)
    return detector


def of_one_picture(
    folder: Path, boxes: list[list[float]], name: str = "test_fcos", categories: tuple[int, ...] = ()
) -> Explanation:
    """Boxes (xywh) on a picture of 128 x 128 that is not resized."""
    rows = [(10, categories[i] if categories else 1, box, 0) for i, box in enumerate(boxes)]
    _, annotations = write_coco(folder, coco_dict([(128, 128)], rows), pictures=False)
    return explain(with_input(name, 128), annotations=annotations)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("suffix", ["", "_dyhead1"])
def test_assignment_is_that_of_the_loss(family: str, suffix: str) -> None:
    detector = create_detector(f"test_{family}{suffix}")
    size = (90, 64)
    boxes = torch.tensor([[3.0, 4, 40, 60], [20, 30, 60, 88], [50, 5, 55, 9]])
    target: Target = {"boxes": boxes, "labels": torch.tensor([0, 1, 2])}
    images = torch.randint(0, 255, (1, 3, *round_up(size, detector.pretrained_cfg.pad_divisor)), dtype=torch.uint8)
    with torch.no_grad():
        raw: Any = detector(images, torch.tensor([size]))
    expected = detector.head.assign(raw, [target])  # type: ignore[operator]
    found = Assigner(detector)(size, boxes)
    assert torch.equal(found.owner, expected.owner) and (found.owner >= 0).any()
    assert all(torch.equal(a, b) for a, b in zip(found.places, expected.places, strict=True))


def test_positives_are_counted_by_object_and_level(tmp_path: Path) -> None:
    """FCOS without centre sampling: a box of 40 px holds 25 points of stride 8, all sides under 64 px."""
    _, annotations = write_coco(tmp_path, coco_dict([(128, 128)], [(10, 1, [10, 10, 40, 40], 0)]), pictures=False)
    found = explain(with_input("test_fcos", 128, centre_radius=99.0), annotations=annotations)
    assert found.objects.positives.tolist() == [[25, 0, 0, 0, 0]]
    assert found.places == (256, 64, 16, 4, 1)
    data = found.to_dict()
    assert data["levels"][0]["positives_per_object"] == 25 and data["levels"][0]["share_of_positives"] == 1
    assert data["levels"][0]["sides_in_strides"]["median"] == 5
    assert data["sizes"] == [
        {
            "from": 32,
            "to": 64,
            "objects": 1,
            "share": 1.0,
            "without_positives": 0,
            "side": 40,
            "positives_per_object": 25,
        }
    ]


def test_objects_that_no_place_fits_are_told_from_those_that_others_outdo(tmp_path: Path) -> None:
    between_points, large, same = [13.0, 13, 3, 3], [30.0, 30, 60, 60], [30.0, 30, 60, 60]
    found = of_one_picture(tmp_path, [between_points, large, same])
    assert found.objects.orphans.tolist() == [True, False, True]
    assert found.objects.outdone.tolist() == [False, False, True]
    none = found.to_dict()["without_positives"]
    assert (none["objects"], none["outdone_by_others"]) == (2, 1)
    assert none["places"][0] == {"image_id": 10, "file_name": "0.png", "class": "ant", "box": [13, 13, 16, 16]}
    assert "2 objects (66.7%) without a positive: 1 that no anchor or point fits, 1 that lose" in found.summary()


def test_resolution_decides_what_is_without_positives(tmp_path: Path) -> None:
    _, annotations = write_coco(tmp_path, coco_dict([(128, 128)], [(10, 1, [13, 13, 3, 3], 0)]), pictures=False)
    small, large = (explain(with_input("test_fcos", side), annotations=annotations) for side in (128, 512))
    assert small.objects.orphans.all() and not large.objects.orphans.any()
    assert large.objects.resized.tolist() == [[52, 52, 64, 64]]


def test_suspicious_boxes_have_their_kind(tmp_path: Path) -> None:
    boxes = [[0, 0, 128, 128], [5, 5, 100, 6], [40, 40, 30, 30], [40, 40, 30, 30], [40, 40, 30, 30], [90, 90, 3, 20.0]]
    outside = [100.0, 100, 50, 50]
    found = of_one_picture(tmp_path, [*boxes, outside], categories=(1, 1, 1, 1, 3, 1, 1))
    assert found.suspicious == {
        "shorter side under 4 px after resizing": [5],
        "one side more than 10 times the other": [1],
        "covers the whole picture": [0],
        "same box as another of its class": [3],
        "same box as one of another class": [4],
    }
    assert found.repairs == {"box clipped to the image": 1}
    assert "repaired: 1 x box clipped to the image" in found.summary()


def test_class_balance(tmp_path: Path) -> None:
    found = of_one_picture(tmp_path, [[10, 10, 40, 40], [60, 60, 40, 40], [10, 70, 30, 30]], categories=(3, 3, 1))
    assert [(row["class"], row["objects"], row["images"]) for row in found.to_dict()["classes"]] == [
        ("cat", 2, 1),
        ("ant", 1, 1),
        ("bee", 0, 0),
    ]
    assert "2 times the objects of the rarest, 1 of 3 classes have none" in found.summary()


def test_data_without_objects(tmp_path: Path) -> None:
    found = of_one_picture(tmp_path, [])
    assert found.to_dict()["objects"] == 0 and "0 objects" in found.summary()


@pytest.mark.parametrize("name", ["test_retinanet", "test_reppoints_dyhead1"])
def test_command_writes_table_figures_and_pictures(tmp_path: Path, capsys: Any, name: str) -> None:
    images, annotations = small_coco(tmp_path)
    command = ["explain", "--detector", name, "--annotations", str(annotations), "--images", str(images)]
    assert main([*command, "--output", str(tmp_path / "out"), "--max-images", "3"]) == 0
    assert "3 images, 3 objects, 3 classes" in capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert data["detector"] == name and data["images"] == 3
    pictures = sorted((tmp_path / "out").glob("*.jpg"))
    assert [picture.name for picture in pictures] == ["10_0.jpg", "20_1.jpg", "30_2.jpg"]
    height, width = Assigner(create_detector(name)).size(*CocoDataset(images, annotations).size(0))
    with Image.open(pictures[0]) as picture:
        assert picture.size[0] == width and picture.size[1] > height


def test_pictures_show_what_is_learned_and_what_is_not() -> None:
    boxes = torch.tensor([[10.0, 10, 50, 50], [70, 70, 90, 80]])
    assignment = Assignment([torch.tensor([[30.0, 30], [60, 30]])], torch.tensor([[0, BACKGROUND]]))
    picture = draw_assignment(torch.zeros(3, 100, 100, dtype=torch.uint8), boxes, assignment, (8,))
    colours = [picture.getpixel(place) for place in ((10, 30), (70, 75), (30, 30), (60, 30))]
    assert colours == [(255, 255, 255), (255, 0, 0), (255, 210, 0), (0, 0, 0)]


def test_without_images_nothing_is_drawn(tmp_path: Path) -> None:
    _, annotations = write_coco(tmp_path, coco_dict([(40, 40)], [(10, 1, [1, 1, 20, 20], 0)]), pictures=False)
    explain(create_detector("test_atss"), annotations=annotations, output=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["explanation.json"]


def test_detectors_that_assign_by_predictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="test_detr assigns objects to what it predicts"):
        explain(create_detector("test_detr"), annotations=tmp_path / "none.json")
