from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from dyhead_zoo import create_detector
from dyhead_zoo.data.label_space import LabelSpace
from dyhead_zoo.engine.draw import class_color, draw_detections
from dyhead_zoo.engine.predict import find_images, predict_files, sample_photo
from dyhead_zoo.structures import Detections

LABELS = LabelSpace.from_names(["left", "right"], [10, 20])


class HalfDetector:
    """Finds "left" in the left half of every picture, and "right" in its right half with less confidence."""

    label_space = LABELS

    def __init__(self) -> None:
        self.batches: list[int] = []

    def predict(self, images: list[torch.Tensor], *, score_threshold: float, batch_size: int) -> list[Detections]:
        assert len(images) <= batch_size
        self.batches.append(len(images))
        return [self._halves(*image.shape[-2:]).above(score_threshold) for image in images]

    def _halves(self, height: int, width: int) -> Detections:
        boxes = torch.tensor([[0, 0, width / 2, height], [width / 2, 0, width, height]])
        return Detections(boxes, torch.tensor([0.9, 0.4]), torch.tensor([0, 1]))


def photo(path: Path, width: int = 60, height: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "gray").save(path)
    return path


def run(inputs: Any, output: Path, **kwargs: Any) -> Any:
    detector = HalfDetector()
    return predict_files(detector, inputs, output, progress=False, **kwargs)  # type: ignore[arg-type]


# -- which files -------------------------------------------------------------------------------------------------------


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    a, b, deep = photo(tmp_path / "a.jpg"), photo(tmp_path / "b.PNG"), photo(tmp_path / "sub" / "c.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    assert find_images(a) == [a]
    assert find_images([tmp_path]) == [a, b]
    assert find_images([str(tmp_path / "*")]) == [a, b]
    assert find_images([str(tmp_path / "**" / "*.jpg")]) == [a, deep]
    assert find_images([deep, tmp_path, str(a)]) == [deep, a, b]  # in order, each once


def test_a_name_that_looks_like_a_pattern_is_a_file_first(tmp_path: Path) -> None:
    path = photo(tmp_path / "a[1].jpg")
    assert find_images([str(path)]) == [path]


def test_inputs_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg does not exist"):
        find_images([tmp_path / "a.jpg", tmp_path / "missing.jpg"])
    with pytest.raises(FileNotFoundError, match=r"\*\.webp does not exist"):
        find_images([str(tmp_path / "*.webp")])
    with pytest.raises(FileNotFoundError, match="empty holds no picture"):
        find_images([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="no input"):
        find_images([])


def test_the_sample_photo_is_a_picture() -> None:
    with Image.open(sample_photo()) as image:
        assert image.size == (512, 600) and image.mode == "RGB"


# -- what is written ---------------------------------------------------------------------------------------------------


def test_predictions_are_a_coco_data_set(tmp_path: Path) -> None:
    files = [photo(tmp_path / "a.jpg", 60, 40), photo(tmp_path / "b.png", 30, 50)]
    result = run(files, tmp_path / "out")
    assert not result.failed
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert content["images"] == [
        {"id": 1, "file_name": str(files[0]), "width": 60, "height": 40, "picture": "a.jpg"},
        {"id": 2, "file_name": str(files[1]), "width": 30, "height": 50, "picture": "b.jpg"},
    ]
    assert content["categories"] == [{"id": 10, "name": "left"}, {"id": 20, "name": "right"}]
    last = content["annotations"][-1]
    assert last == {
        "id": 4, "image_id": 2, "category_id": 20, "bbox": [15, 0, 15, 50], "area": 750, "iscrowd": 0,
        "score": pytest.approx(0.4),
    }  # fmt: skip
    api = COCO(tmp_path / "out" / "predictions.json")
    assert len(api.getAnnIds(imgIds=[1])) == 2


def test_pictures_show_the_boxes_at_their_own_size(tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png", 300, 200)
    run(path, tmp_path / "out")
    picture = np.asarray(Image.open(tmp_path / "out" / "a.jpg")).astype(int)
    assert picture.shape == (200, 300, 3)
    assert np.abs(picture[150, 0] - class_color(0)).max() < 25  # outline of the left half; JPEG blurs it
    assert np.abs(picture[150, 299] - class_color(1)).max() < 25
    assert np.abs(picture[150, 75] - 128).max() < 5


def test_score_threshold_and_no_pictures(tmp_path: Path) -> None:
    result = run(photo(tmp_path / "a.jpg"), tmp_path / "out", score_threshold=0.5, draw=False)
    assert [a["category_id"] for a in result.annotations] == [10]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predictions.json"]


def test_equal_names_from_several_folders_are_kept_apart(tmp_path: Path) -> None:
    files = [photo(tmp_path / "1" / "a.jpg"), photo(tmp_path / "2" / "A.png"), photo(tmp_path / "3" / "a_2.jpg")]
    result = run(files, tmp_path / "out")
    names = [image["picture"] for image in result.images]
    assert len({name.lower() for name in names}) == 3
    assert sorted(p.name for p in (tmp_path / "out").glob("*.jpg")) == sorted(names)


def test_an_unreadable_file_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    good = [photo(tmp_path / "a.jpg"), photo(tmp_path / "c.jpg")]
    bad = tmp_path / "b.jpg"
    bad.write_bytes(good[0].read_bytes()[:100])
    for batch_size in (1, 2, 8):
        result = run(tmp_path, tmp_path / f"out{batch_size}", batch_size=batch_size)
        assert [image["file_name"] for image in result.images] == [str(path) for path in good]
        assert list(result.failed) == [str(bad)] and result.failed[str(bad)]
        assert {a["image_id"] for a in result.annotations} == {1, 2}


def test_batches_are_no_larger_than_asked_for(tmp_path: Path) -> None:
    for name in "abcde":
        photo(tmp_path / f"{name}.jpg")
    detector = HalfDetector()
    predict_files(detector, tmp_path, tmp_path / "out", batch_size=2, progress=False)  # type: ignore[arg-type]
    assert detector.batches == [2, 2, 1]


def test_an_input_is_never_overwritten(tmp_path: Path) -> None:
    path = photo(tmp_path / "a.jpg")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another output folder"):
        run(path, tmp_path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="is a file"):
        run(path, path)


def test_results_of_an_earlier_run_are_replaced(tmp_path: Path) -> None:
    run(photo(tmp_path / "a.jpg", 60, 40), tmp_path / "out")
    run(photo(tmp_path / "a.jpg", 80, 40), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [image["width"] for image in content["images"]] == [80]
    assert Image.open(tmp_path / "out" / "a.jpg").size == (80, 40)


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (9, 7), (64, 64), (3000, 40)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_any_picture_and_any_box_can_be_drawn(size: tuple[int, int], mode: str) -> None:
    image = Image.new(mode, size)
    width, height = size
    boxes = torch.tensor([[0, 0, width, height], [width - 0.5, height - 0.5, width, height], [0, 0, 0, 0]]).float()
    detections = Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]))
    picture = draw_detections(image, detections, LABELS.names)
    assert picture.size == size and picture.mode == "RGB"
    assert np.asarray(image.convert("RGB")).max() == 0  # the original stays as it was


@pytest.mark.parametrize("corner", [(0, 0), (180, 0), (0, 180), (180, 180)])
def test_labels_stay_on_the_picture(corner: tuple[int, int]) -> None:
    x, y = corner
    detections = Detections(torch.tensor([[x, y, x + 20, y + 20]]).float(), torch.tensor([0.5]), torch.tensor([0]))
    plain = np.asarray(draw_detections(Image.new("RGB", (200, 200)), detections, ["a"]))
    long = np.asarray(draw_detections(Image.new("RGB", (200, 200)), detections, ["abcdefghij"]))
    painted = [int((picture == class_color(0)).all(axis=2).sum()) for picture in (plain, long)]
    assert painted[1] > painted[0] + 200  # the whole longer plate is visible


def test_classes_have_colours_of_their_own() -> None:
    colors = [class_color(label) for label in range(80)]
    assert len(set(colors)) == 80
    distance = [max(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in itertools.pairwise(colors)]
    assert min(distance) > 60


def test_every_part_keeps_its_mode() -> None:
    detector = create_detector("test_atss").train()
    detector.neck.eval()
    detector.predict(torch.zeros(3, 64, 64, dtype=torch.uint8))
    assert detector.training and detector.head.training and not detector.neck.training
