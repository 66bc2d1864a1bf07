"""dyhead-zoo explain: the assignment that training would use, its figures, its pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import coco_dict, small_coco, write_coco
from PIL import Image
from torchvision.ops import box_convert

from dyhead_zoo import create_detector
from dyhead_zoo.cli import main
from dyhead_zoo.data import CocoDataset
from dyhead_zoo.data.transforms import round_up
from dyhead_zoo.detector import Detector
from dyhead_zoo.engine.explain import Explanation, explain
from dyhead_zoo.engine.explain_assign import Found, Regions, Terms, assigner_of
from dyhead_zoo.engine.explain_draw import draw_assignment
from dyhead_zoo.layers.assigners import BACKGROUND, IGNORED, max_iou_assign
from dyhead_zoo.layers.matching import match_objects
from dyhead_zoo.ops.boxes import clip_to_image
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
    found = assigner_of(detector)(size, boxes)
    assert torch.equal(found.owner[None], expected.owner) and (found.owner >= 0).any()
    assert not found.weak.any() and (found.regions.level == -1).all()
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
    boxes = [[0.0, 0, 128, 128], [5.0, 5, 100, 6], *[[40.0, 40, 30, 30]] * 3, [90.0, 90, 3, 20]]
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


def test_levels_that_no_object_is_on_show_a_dash(tmp_path: Path) -> None:
    rows = [line.split() for line in of_one_picture(tmp_path, [[10, 10, 20, 20]]).summary().splitlines()]
    levels = [row[2:] for row in rows if row and row[0] in ("8", "16", "128")]
    assert levels == [["9", "100.0%", "1", "9.0", "2.5", "2.5", "2.5"], *[["0", "0.0%", "0", "-", "-"]] * 2]


@pytest.mark.parametrize("name", ["test_fcos", "test_cascade_rcnn", "test_deformable_detr"])
def test_without_objects_there_are_no_sides(tmp_path: Path, name: str) -> None:
    found = of_one_picture(tmp_path, [], name)
    assert "0.0 0.0 0.0" not in found.summary() and " -" in found.summary()
    assert json.loads(json.dumps(found.to_dict()))["levels"][0]["sides_in_strides"]["median"] is None


# --- two-stage detectors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_faster_rcnn", "test_cascade_mask_rcnn", "test_cascade_rcnn_dyhead1"])
def test_proposals_and_regions_are_those_of_the_loss(name: str) -> None:
    detector: Any = create_detector(name)
    head, size = detector.head, (90, 64)
    boxes = torch.tensor([[3.0, 4, 40, 60], [20, 30, 60, 88], [50, 5, 55, 9]])
    target: Target = {"boxes": boxes, "labels": torch.tensor([0, 1, 2])}
    images = torch.randint(0, 255, (1, 3, *round_up(size, detector.pretrained_cfg.pad_divisor)), dtype=torch.uint8)
    with torch.no_grad():
        raw = detector(images, torch.tensor([size]))
    anchors, owners = head.rpn.targets(raw.objectness, raw.image_sizes, raw.canvas, [target])
    found = assigner_of(detector)(size, boxes)
    assert torch.equal(found.owner, owners[0]) and torch.equal(torch.cat(found.places), anchors)
    regular = max_iou_assign(anchors, boxes, positive=0.7, negative=0.3, low_quality="none")
    learning = found.owner >= 0
    assert found.weak.any() and torch.equal(found.weak, learning & (regular != found.owner))
    clipped = clip_to_image(anchors, torch.tensor(size))
    for stage, iou in enumerate(head.stage_ious):
        owner = max_iou_assign(clipped, boxes, positive=iou, negative=iou, low_quality="none")
        assert found.regions.reaching[:, stage].tolist() == torch.bincount(owner[owner >= 0], minlength=3).tolist()
    assert found.regions.reaching.shape == (3, len(head.stage_ious))


def test_objects_with_nothing_but_weak_positives(tmp_path: Path) -> None:
    """Anchors of stride 4 are squares of 32 px around multiples of 4, and boxes of twice the height or width."""
    anchor, half, speck = [16.0, 16, 32, 32], [72.0, 72, 22, 22], [60.0, 10, 3, 3]
    found = of_one_picture(tmp_path, [anchor, half, speck], "test_faster_rcnn")
    assert found.objects.only_weak.tolist() == [False, True, True]
    strict = explain(with_input("test_faster_rcnn", 128, rpn_least=0.3), annotations=tmp_path / "instances.json")
    assert strict.objects.orphans.tolist() == [False, False, True]
    data = strict.to_dict()
    assert data["assigned_to"] == "anchor" and data["weak_positives"]["objects_with_no_other"] == 1
    assert data["weak_positives"]["positives"] == sum(row["weak_positives"] for row in data["levels"]) > 0
    assert [row["only_weak_positives"] for row in data["sizes"]] == [0, 1, 0]
    assert "1 objects (33.3%) with nothing but weak positives: low-quality matches" in strict.summary()


def test_regions_are_read_from_the_level_of_the_objects_size(tmp_path: Path) -> None:
    """Sides of 14 to 28 strides: below 112 px the finest, then in octaves."""
    sides = [20.0, 111, 112, 230, 460]
    rows = [(10, 1, [0, 0, side, side], 0) for side in sides]
    _, annotations = write_coco(tmp_path, coco_dict([(512, 512)], rows), pictures=False)
    found = explain(with_input("test_cascade_rcnn", 512), annotations=annotations)
    assert found.objects.pooled.tolist() == [0, 0, 1, 2, 3]
    regions = found.to_dict()["regions"]
    assert [(row["stride"], row["objects"]) for row in regions["levels"]] == [(4, 2), (8, 1), (16, 1), (32, 1)]
    assert [stage["iou"] for stage in regions["stages"]] == [0.5, 0.6, 0.7]
    reached = [stage["objects"] for stage in regions["stages"]]
    assert reached == sorted(reached, reverse=True)
    assert "0.6" in found.summary() and "regions with the objects' own boxes" in found.summary()


def test_an_anchor_at_the_edge_counts_as_it_is_clipped(tmp_path: Path) -> None:
    found = of_one_picture(
        tmp_path, [[0.0, 0, 16, 16]], "test_faster_rcnn"
    )  # a quarter of the anchor around the corner
    assert found.objects.best.item() == 1 and found.objects.reaching.item() >= 1


# --- set prediction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_detr", "test_deformable_detr"])
def test_predictions_decide_in_set_prediction(tmp_path: Path, name: str) -> None:
    found = of_one_picture(tmp_path, [[10.0, 10, 40, 40], [70.0, 70, 6, 6]], name)
    data = found.to_dict()
    assert data["assigned_to"] == "" and not {"positives_per_object", "without_positives", "regions"} & set(data)
    assert not found.objects.orphans.any()
    (finest, *_), side = data["levels"], 6
    assert finest["objects_under_a_stride"] == 1 and finest["sides_in_strides"]["low"] == side / finest["stride"]
    assert "predictions decide" in found.summary() and "without positives" not in found.summary()


def test_objects_beyond_the_queries_can_never_be_matched(tmp_path: Path) -> None:
    rows = [(10 * (1 + (i < 7)), 1, [float(i), i, 20, 20], 0) for i in range(9)]  # 2 objects, then 7
    _, annotations = write_coco(tmp_path, coco_dict([(64, 64)] * 2, rows), pictures=False)
    found = explain(create_detector("test_detr", num_queries=4, max_detections=50), annotations=annotations)
    crowds = found.to_dict()["objects_per_image"]
    assert crowds["most"] == 7
    assert crowds["limits"] == [
        {"what": "queries", "limit": 4, "images": 1, "objects": 3},
        {"what": "detections", "limit": 50, "images": 0, "objects": 0},
    ]
    assert "4 queries per image: 1 images have more objects, 3 can never be matched" in found.summary()


def test_first_guesses_are_those_that_a_fresh_two_stage_detector_makes() -> None:
    """With the classes all alike, the match of fresh proposals is that of the loss."""
    detector: Any = create_detector("test_deformable_detr_dyhead1")
    size = (90, 64)
    boxes = torch.tensor([[3.0, 4, 40, 60], [20, 30, 60, 88], [50, 5, 55, 9]])
    images = torch.randint(0, 255, (1, 3, *round_up(size, detector.pretrained_cfg.pad_divisor)), dtype=torch.uint8)
    with torch.no_grad():
        raw = detector(images, torch.tensor([size]))
    target: Target = {"boxes": boxes, "labels": torch.zeros(3, dtype=torch.int64)}
    (proposals,) = raw.proposal_boxes
    matches = match_objects(torch.zeros(1, *proposals.shape[:2], 1), proposals[None], [target], raw.image_sizes)
    found = assigner_of(detector)(size, boxes)
    learning = (found.owner >= 0).nonzero()[:, 0]
    assert learning.tolist() == matches.query[0].tolist() and sorted(found.owner[learning].tolist()) == [0, 1, 2]
    expected = box_convert(proposals[0] * torch.tensor([64, 90, 64, 90]), "cxcywh", "xyxy")
    torch.testing.assert_close(torch.cat(found.places), expected)


def test_an_object_as_large_as_the_picture_falls_to_a_blank_token(tmp_path: Path) -> None:
    """Nearer to it than the largest guess, in cost: a blank one, which a padded canvas has, is the picture's size."""
    rows: list[Any] = [(10, 1, [0, 0, 128, 100], 0), (10, 1, [40, 40, 12, 12], 0)]
    _, annotations = write_coco(tmp_path, coco_dict([(100, 128)], rows), pictures=False)
    found = explain(with_input("test_deformable_detr_dyhead1", 128), annotations=annotations)
    assert found.objects.only_weak.tolist() == [True, False]
    assert found.objects.positives.sum(1).tolist() == [1, 1]
    assert "1 objects (50.0%) with nothing but weak positives: blank tokens" in found.summary()


# --- files and pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["test_retinanet", "test_reppoints_dyhead1", "test_mask_rcnn", "test_detr", "test_deformable_detr_dyhead1"]
)
def test_command_writes_table_figures_and_pictures(tmp_path: Path, capsys: Any, name: str) -> None:
    images, annotations = small_coco(tmp_path)
    command = ["explain", "--detector", name, "--annotations", str(annotations), "--images", str(images)]
    assert main([*command, "--output", str(tmp_path / "out"), "--max-images", "3"]) == 0
    assert "3 images, 3 objects, 3 classes" in capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert data["detector"] == name and data["images"] == 3
    pictures = sorted((tmp_path / "out").glob("*.jpg"))
    assert [picture.name for picture in pictures] == ["10_0.jpg", "20_1.jpg", "30_2.jpg"]
    height, width = assigner_of(create_detector(name)).size(*CocoDataset(images, annotations).size(0))
    with Image.open(pictures[0]) as picture:
        assert picture.size[0] == width and picture.size[1] > height


def found_of(places: Any, owner: Any, weak: Any = None, levels: Any = None) -> Found:
    """One level of places; the pyramid level of each object's region."""
    owner = torch.tensor(owner)
    regions = Regions.none(0) if levels is None else Regions.none(len(levels))._replace(level=torch.tensor(levels))
    return Found([torch.tensor(places)], owner, owner > len(owner) if weak is None else torch.tensor(weak), regions)


def test_pictures_show_what_is_learned_and_what_is_not() -> None:
    boxes = torch.tensor([[10.0, 10, 50, 50], [70, 70, 90, 80]])
    found = found_of([[30.0, 30], [60, 30]], [0, BACKGROUND])
    picture = draw_assignment(torch.zeros(3, 100, 100, dtype=torch.uint8), boxes, found, (8,), Terms("point"))
    colours = [picture.getpixel(place) for place in ((10, 30), (70, 75), (30, 30), (60, 30))]
    assert colours == [(255, 255, 255), (255, 0, 0), (255, 210, 0), (0, 0, 0)]


def test_pictures_show_weak_positives_as_rings_and_the_levels_of_regions() -> None:
    boxes = torch.tensor([[20.0, 20, 60, 60], [70, 70, 90, 90]])
    anchors = [[10.0, 10, 50, 50], [70, 70, 100, 100]]
    found = found_of(anchors, [0, 1], [False, True], [1, 0])
    terms = Terms("anchor", "low-quality matches, and more", {}, (0.5,), (4, 8))
    picture = draw_assignment(torch.zeros(3, 100, 100, dtype=torch.uint8), boxes, found, (4,), terms)
    places = ((30, 30), (85, 85), (83, 85), (20, 20), (70, 70))
    dot, middle, ring, second, first = (picture.getpixel(place) for place in places)
    assert dot == ring == first == (255, 210, 0) and middle == (0, 0, 0) and second == (0, 200, 90)


def test_pictures_of_set_prediction_show_cells_and_objects_that_are_smaller() -> None:
    boxes = torch.tensor([[10.0, 10, 70, 70], [80, 84, 90, 94]])
    found = found_of([[16.0, 16]], [IGNORED])
    photo = torch.zeros(3, 100, 100, dtype=torch.uint8)
    heights = []
    for queries in (2, 1):
        picture = draw_assignment(photo, boxes, found, (32,), Terms("", limits={"queries": queries}))
        colours = [picture.getpixel(place) for place in ((10, 40), (80, 90), (32, 48), (16, 16))]
        assert colours == [(255, 255, 255), (255, 140, 0), (255, 210, 0), (0, 0, 0)]
        heights.append(picture.size[1])
    assert heights[1] > heights[0]  # the object beyond the queries is in the legend


def test_without_images_nothing_is_drawn(tmp_path: Path) -> None:
    _, annotations = write_coco(tmp_path, coco_dict([(40, 40)], [(10, 1, [1, 1, 20, 20], 0)]), pictures=False)
    explain(create_detector("test_atss"), annotations=annotations, output=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["explanation.json"]


def test_heads_that_do_not_say_who_learns_what_are_refused(tmp_path: Path) -> None:
    detector = create_detector("test_atss")
    detector.head = torch.nn.Identity()
    with pytest.raises(ValueError, match="test_atss has a Identity, which does not say"):
        explain(detector, annotations=tmp_path / "none.json")
