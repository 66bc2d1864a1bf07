from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from dyhead_zoo.data.label_space import LabelSpace
from dyhead_zoo.engine import evaluate as module
from dyhead_zoo.engine.evaluate import METRIC_NAMES, Backend, coco_metrics, evaluate, read_annotations, resolve_backend
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.structures import Detections

BACKENDS: list[Backend] = ["pycocotools", "hotcoco"]

NAMELESS = '{"images": [], "annotations": [], "categories": [{"id": 1}]}'


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "hotcoco":
        pytest.importorskip("hotcoco")
    return request.param


def coco(boxes: list[list[float]], categories: tuple[str, ...] = ("cat",), **fields: Any) -> dict[str, Any]:
    """Annotations of one 200 x 200 image: ``boxes`` xywh, all of the first category."""
    return {
        "images": [{"id": 7, "file_name": "7.png", "height": 200, "width": 200}],
        "annotations": [
            {"id": i + 1, "image_id": 7, "category_id": 3, "bbox": b, **fields} for i, b in enumerate(boxes)
        ],
        "categories": [{"id": 3 + i, "name": name} for i, name in enumerate(categories)],
    }


def found(box: list[float], score: float = 0.9, image_id: int = 7, category_id: int = 3) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


# -- coco_metrics: cases small enough to compute by hand ---------------------------------------------------------------


def test_a_perfect_detection_scores_one(backend: Backend) -> None:
    metrics, per_class = coco_metrics(coco([[10, 10, 50, 50]]), [found([10, 10, 50, 50])], backend=backend)
    assert tuple(metrics) == METRIC_NAMES
    assert metrics["AP"] == pytest.approx(1) and metrics["AR1"] == pytest.approx(1)
    assert metrics["APm"] == pytest.approx(1) and math.isnan(metrics["APs"]) and math.isnan(metrics["APl"])
    assert per_class == [
        {"name": "cat", "category_id": 3, "AP": pytest.approx(1), "AP50": pytest.approx(1), "num_gts": 1}
    ]


def test_iou_decides_at_which_thresholds_a_detection_counts(backend: Backend) -> None:
    # 100 x 100 moved by 23: IoU = 77 / 123 = 0.626, a hit at .50, .55 and .60 out of ten thresholds
    metrics, _ = coco_metrics(coco([[0, 0, 100, 100]]), [found([23, 0, 100, 100])], backend=backend)
    assert metrics["AP"] == pytest.approx(0.3)
    assert metrics["AP50"] == pytest.approx(1)
    assert metrics["AP75"] == 0


def test_a_missed_object_halves_recall(backend: Backend) -> None:
    boxes: list[list[float]] = [[0, 0, 50, 50], [100, 100, 50, 50]]
    metrics, _ = coco_metrics(coco(boxes), [found(boxes[0])], backend=backend)
    assert metrics["AR100"] == pytest.approx(0.5)
    assert metrics["AP"] == pytest.approx(51 / 101)  # precision 1 at recalls 0, .01, .. .50, and 0 beyond


def test_a_false_alarm_counts_by_its_score(backend: Backend) -> None:
    truth, hit = coco([[0, 0, 50, 50]]), found([0, 0, 50, 50], score=0.5)
    worse, _ = coco_metrics(truth, [hit, found([100, 100, 50, 50], score=0.9)], backend=backend)
    harmless, _ = coco_metrics(truth, [hit, found([100, 100, 50, 50], score=0.1)], backend=backend)
    assert worse["AP"] == pytest.approx(0.5) and harmless["AP"] == pytest.approx(1)


def test_no_detection_scores_zero(backend: Backend) -> None:
    metrics, per_class = coco_metrics(coco([[0, 0, 50, 50]]), [], backend=backend)
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == 0
    assert per_class[0]["AP"] == 0 and per_class[0]["num_gts"] == 1


def test_without_objects_there_is_nothing_to_measure(backend: Backend) -> None:
    metrics, per_class = coco_metrics(coco([]), [found([0, 0, 9, 9])], backend=backend)
    assert all(math.isnan(value) for value in metrics.values())
    assert math.isnan(per_class[0]["AP"]) and per_class[0]["num_gts"] == 0


def test_a_class_without_objects_does_not_enter_the_mean(backend: Backend) -> None:
    truth = coco([[0, 0, 50, 50]], categories=("cat", "dog"))
    metrics, per_class = coco_metrics(
        truth, [found([0, 0, 50, 50]), found([0, 0, 9, 9], category_id=4)], backend=backend
    )
    assert metrics["AP"] == pytest.approx(1)
    assert [row["num_gts"] for row in per_class] == [1, 0] and math.isnan(per_class[1]["AP"])


def test_detections_on_a_crowd_are_neither_right_nor_wrong(backend: Backend) -> None:
    truth = coco([[0, 0, 50, 50]])
    truth["annotations"].append({**truth["annotations"][0], "id": 2, "bbox": [100, 100, 80, 80], "iscrowd": 1})
    on_crowd = found([110, 110, 20, 20], score=0.99)
    metrics, per_class = coco_metrics(truth, [found([0, 0, 50, 50]), on_crowd], backend=backend)
    assert metrics["AP"] == pytest.approx(1) and per_class[0]["num_gts"] == 1


def test_annotation_id_zero_is_an_object_like_any_other(backend: Backend) -> None:
    truth = coco([[0, 0, 50, 50]], id=0)
    metrics, _ = coco_metrics(truth, [found([0, 0, 50, 50])], backend=backend)
    assert metrics["AP"] == pytest.approx(1)


def test_size_bins_use_the_area_of_the_file_and_the_box_without_it(backend: Backend) -> None:
    perfect = [found([0, 0, 50, 50])]
    assert coco_metrics(coco([[0, 0, 50, 50]]), perfect, backend=backend)[0]["APm"] == pytest.approx(1)
    assert coco_metrics(coco([[0, 0, 50, 50]], area=900), perfect, backend=backend)[0]["APs"] == pytest.approx(1)
    assert coco_metrics(coco([[0, 0, 50, 50]], area=None), perfect, backend=backend)[0]["APm"] == pytest.approx(1)


def test_only_the_images_asked_for_are_scored(backend: Backend) -> None:
    truth = coco([[0, 0, 50, 50]])
    truth["images"].append({"id": 8, "file_name": "8.png", "height": 200, "width": 200})
    truth["annotations"].append({**truth["annotations"][0], "id": 2, "image_id": 8})
    predictions = [found([0, 0, 50, 50]), found([0, 0, 50, 50], image_id=8, score=0.95)]
    assert coco_metrics(truth, predictions[:1], backend=backend)[0]["AR100"] == pytest.approx(0.5)
    metrics, per_class = coco_metrics(truth, predictions, image_ids=[7], backend=backend)
    assert metrics["AR100"] == pytest.approx(1) and per_class[0]["num_gts"] == 1


def test_inputs_are_left_alone_and_nothing_is_printed(backend: Backend, capfd: pytest.CaptureFixture[str]) -> None:
    truth, predictions = coco([[0, 0, 50, 50]]), [found([0, 0, 50, 50])]
    before = json.dumps([truth, predictions])
    coco_metrics(truth, predictions, backend=backend)
    assert json.dumps([truth, predictions]) == before
    assert capfd.readouterr().out == ""


def test_predictions_on_other_images_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\[99\].*right file"):
        coco_metrics(coco([]), [found([0, 0, 1, 1], image_id=99)])


def test_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="'fast'.*pycocotools"):
        resolve_backend("fast")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text, complaint",
    [("{", "not JSON"), ("[]", "lacks images"), ('{"images": []}', "lacks ann"), (NAMELESS, "id or a name")],
)
def test_files_of_another_format_are_an_error(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_annotations(path)
    with pytest.raises(FileNotFoundError, match="missing.json"):
        read_annotations(tmp_path / "missing.json")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans())
def test_hotcoco_gives_the_bits_of_pycocotools(seed: int, ties: bool) -> None:
    pytest.importorskip("hotcoco")
    rng = np.random.default_rng(seed)
    truth = coco([], categories=("a", "b", "c"))
    truth["images"] = [{"id": i, "height": 300, "width": 300} for i in range(1, 6)]
    predictions = []
    for number in range(rng.integers(0, 40)):
        box = [*rng.uniform(0, 200, 2), *rng.uniform(1, 150, 2)]
        image, category = int(rng.integers(1, 6)), int(rng.integers(3, 6))
        truth["annotations"].append(
            {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": int(rng.random() < 0.1)}
        )
        for _ in range(rng.integers(0, 3)):
            score = float(rng.integers(1, 4)) / 4 if ties else float(rng.random())
            moved = [float(v) for v in box + rng.normal(0, 8, 4)]
            moved[2:] = [max(v, 1.0) for v in moved[2:]]
            predictions.append(found(moved, score, image, category))
    expected, actual = (coco_metrics(truth, predictions, backend=name) for name in BACKENDS)
    np.testing.assert_array_equal(list(expected[0].values()), list(actual[0].values()))
    for ours, theirs in zip(expected[1], actual[1], strict=True):
        np.testing.assert_array_equal([ours["AP"], ours["AP50"]], [theirs["AP"], theirs["AP50"]])


def test_published_figures_of_cocoapi(data_dir: Path, backend: Backend) -> None:
    folder = data_dir / "golden_cocoeval"
    predictions = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    metrics, _ = coco_metrics(folder / "instances_val2014_100.json", predictions, backend=backend)
    published = [0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564]
    assert [round(value, 3) for value in metrics.values()] == published


def test_detections_of_another_detector(data_dir: Path, backend: Backend) -> None:
    predictions = json.loads((data_dir / "detectors" / "yolox_nano_on_coco_small_val_results.json").read_text())
    truth = data_dir / "coco_small" / "annotations" / "instances_val.json"
    metrics, _ = coco_metrics(truth, predictions, backend=backend)
    expected = [0.241, 0.404, 0.235, 0.121, 0.280, 0.448, 0.230, 0.350, 0.369, 0.188, 0.443, 0.571]
    assert [round(value, 3) for value in metrics.values()] == expected


# -- evaluate: a detector that finds bright rectangles -----------------------------------------------------------------


class BrightnessDetector(nn.Module):
    """Calls every bright rectangle what ``label`` says; stands in for ``Detector``, so that the answer is known."""

    def __init__(self, label_space: LabelSpace, label: int = 0) -> None:
        super().__init__()
        self.name, self.label_space, self.label = "brightness", label_space, label
        self.pretrained_cfg = PretrainedCfg(short_side=64, long_side=128)
        self.device, self.wants_masks = torch.device("cpu"), False
        self.frozen = nn.BatchNorm2d(1).eval()
        self.modes: list[bool] = []

    def forward(self, images: Tensor, image_sizes: Tensor) -> SimpleNamespace:
        self.modes.append(self.training)
        return SimpleNamespace(images=images, image_sizes=image_sizes)

    def decode(self, raw: SimpleNamespace) -> list[Detections]:
        return [self._find(image) for image in raw.images]

    def _find(self, image: Tensor) -> Detections:
        rows, columns = (image[0] > 127).nonzero(as_tuple=True)
        if not len(rows):
            return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        return Detections(box[None], torch.tensor([0.8]), torch.tensor([self.label]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of different shape: a bright rectangle in two, nothing in the third; ids of no order."""
    shapes, boxes = {30: (100, 160), 10: (160, 100), 20: (100, 100)}, {30: [40, 20, 64, 48], 10: [16, 32, 48, 64]}
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 5, "name": "lamp"}]}
    for image_id, (height, width) in shapes.items():
        pixels = np.zeros((height, width, 3), np.uint8)
        if image_id in boxes:
            x, y, w, h = boxes[image_id]
            pixels[y : y + h, x : x + w] = 255
            annotation = {
                "id": image_id,
                "image_id": image_id,
                "category_id": 5,
                "bbox": boxes[image_id],
                "area": w * h,
            }
            content["annotations"].append(annotation)
        Image.fromarray(pixels).save(tmp_path / f"{image_id}.png")
        content["images"].append({"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width})
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    return tmp_path


def run(detector: nn.Module, folder: Path, **kwargs: Any) -> module.EvalResult:
    return evaluate(detector, images=folder, annotations=folder / "annotations.json", progress=False, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size, num_workers", [(1, 0), (2, 0), (2, 1)])
def test_boxes_come_back_in_pixels_of_the_files(folder: Path, batch_size: int, num_workers: int) -> None:
    detector = BrightnessDetector(LabelSpace.from_names(["lamp"]))
    result = run(detector, folder, batch_size=batch_size, num_workers=num_workers)
    assert [p["image_id"] for p in result.predictions] == [10, 30]
    assert {p["category_id"] for p in result.predictions} == {5}
    for prediction, box in zip(result.predictions, [[16, 32, 48, 64], [40, 20, 64, 48]], strict=True):
        assert prediction["bbox"] == pytest.approx(box, abs=2.5)  # one pixel of the resized picture
    assert result.metrics["AP50"] == pytest.approx(1) and result.metrics["AP75"] == pytest.approx(1)
    assert result.num_images == 3 and result.per_class[0]["num_gts"] == 2 and result.detector == "brightness"


def test_every_module_gets_its_mode_back(folder: Path) -> None:
    detector = BrightnessDetector(LabelSpace.from_names(["lamp"]))
    detector.train()
    detector.frozen.eval()
    run(detector, folder)
    assert detector.modes and not any(detector.modes)
    assert detector.training and not detector.frozen.training


def test_classes_are_matched_by_name_not_by_number(folder: Path) -> None:
    names = LabelSpace.from_names(["cup", "lamp"], [5, 6])  # "cup" has the id that the file gives to "lamp"
    assert run(BrightnessDetector(names, label=1), folder).metrics["AP50"] == pytest.approx(1)
    cups = run(BrightnessDetector(names, label=0), folder)
    assert cups.metrics["AP"] == 0 and cups.predictions == []


def test_objects_of_unknown_classes_count_as_misses(folder: Path) -> None:
    path = folder / "annotations.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 9, "name": "ghost"})
    content["annotations"].append({"id": 99, "image_id": 20, "category_id": 9, "bbox": [1, 1, 50, 50]})
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="does not know 'ghost'"):
        result = run(BrightnessDetector(LabelSpace.from_names(["lamp"])), folder)
    assert result.unknown_classes == ("ghost",)
    assert result.metrics["AP50"] == pytest.approx(0.5)


def test_no_shared_class_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="share no class.*'lamp'.*'cup'"):
        run(BrightnessDetector(LabelSpace.from_names(["cup"])), folder)


def test_a_part_of_the_images(folder: Path) -> None:
    result = run(BrightnessDetector(LabelSpace.from_names(["lamp"])), folder, max_images=1)
    assert result.num_images == 1 and [p["image_id"] for p in result.predictions] == [30]
    assert result.metrics["AR100"] == pytest.approx(1, abs=0.3) and result.per_class[0]["num_gts"] == 1
    with pytest.raises(ValueError, match="max_images=0"):
        run(BrightnessDetector(LabelSpace.from_names(["lamp"])), folder, max_images=0)


def test_score_threshold_drops_detections(folder: Path) -> None:
    result = run(BrightnessDetector(LabelSpace.from_names(["lamp"])), folder, score_threshold=0.9)
    assert result.predictions == [] and result.metrics["AP"] == 0


def test_an_image_that_two_processes_saw_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = found([0, 0, 9, 9], image_id=1), found([0, 0, 9, 9], image_id=2)

    def gather(shares: list[Any], own: Any) -> None:
        shares[:] = [own, {1: [first], 2: [second], 3: []}]

    monkeypatch.setattr(module.distributed, "all_gather_object", gather)
    assert module._merge_ranks({1: [first]}, world_size=2) == {1: [first], 2: [second], 3: []}


def test_summary_shows_missing_figures_as_missing(folder: Path) -> None:
    result = run(BrightnessDetector(LabelSpace.from_names(["lamp"])), folder)
    lines = result.summary().splitlines()
    assert lines[0].split()[:4] == ["AP", "AP50", "AP75", "APs"]
    assert lines[1].split()[1] == "100.0" and lines[1].split()[3] == "-"
    assert "3 images, 2 objects, 2 detections" in lines[-1]
