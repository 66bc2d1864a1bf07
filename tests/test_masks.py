"""Masks from annotation files to batches, and from detections to pictures, files and figures."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import FUZZ, coco_dict, shapes_coco, write_coco
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from dyhead_zoo import create_detector
from dyhead_zoo.data import CocoDataset, SmallDataTrain, StandardTrain, make_eval_loader, make_train_loader
from dyhead_zoo.data.label_space import LabelSpace
from dyhead_zoo.data.transforms import resize_masks
from dyhead_zoo.engine.draw import class_color, draw_detections
from dyhead_zoo.engine.evaluate import MASK_METRIC_NAMES, METRIC_NAMES, Backend, EvalResult, coco_metrics, evaluate
from dyhead_zoo.engine.predict import predict_files
from dyhead_zoo.ops.masks import compress_segmentation, decode_counts, encode_box, encode_window
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.structures import Detections, DetectionTensors

LABELS = LabelSpace.from_names(["cat", "dog"])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def detections(masks: Tensor, boxes: Any) -> Detections:
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    scores = torch.linspace(0.9, 0.1, len(boxes))
    return Detections(boxes, scores, torch.arange(len(boxes)) % 2, masks)


def pasted_by_loop(mask: Tensor, box: list[float], height: int, width: int) -> Tensor:
    """Bilinear at pixel centres, written as the definition."""
    x1, y1, x2, y2 = box
    rows, columns = mask.shape
    result = torch.zeros(height, width)
    for i in range(height):
        for j in range(width):
            u, v = (j + 0.5 - x1) / (x2 - x1) * columns - 0.5, (i + 0.5 - y1) / (y2 - y1) * rows - 0.5
            for a in (math.floor(v), math.floor(v) + 1):
                for b in (math.floor(u), math.floor(u) + 1):
                    if 0 <= a < rows and 0 <= b < columns:
                        result[i, j] += (1 - abs(v - a)) * (1 - abs(u - b)) * mask[a, b]
    return result


# ---- pasting


@pytest.mark.parametrize(
    "box",
    [
        [3.0, 2.0, 15.0, 11.0],
        [-4.5, -3.25, 9.5, 20.5],  # passes three sides of the picture
        [5.2, 4.3, 5.9, 9.1],  # less than a pixel wide
        [30.0, 1.0, 40.0, 9.0],  # outside
    ],
)
@pytest.mark.parametrize("threshold", [0.5, 0.1])
def test_pasting_is_bilinear_at_pixel_centres(box: list[float], threshold: float) -> None:
    mask = torch.rand(6, 6, generator=seeded(0))
    expected = pasted_by_loop(mask, box, 12, 18)
    pasted = detections(mask[None], box).paste(12, 18, threshold)
    assert pasted.shape == (1, 12, 18) and pasted.dtype == torch.bool
    clear = (expected - threshold).abs() > 1e-5
    assert torch.equal(pasted[0][clear], expected[clear] >= threshold)


def test_pasting_agrees_with_torchvision_up_to_its_whole_pixels() -> None:
    generator = seeded(1)
    smooth = nn.functional.avg_pool2d(torch.rand(5, 1, 34, 34, generator=generator), 7, stride=1)
    masks = (smooth - smooth.mean()) * 8 + 0.5
    boxes = torch.tensor([[20, 30, 90, 110], [0, 0, 160, 120], [100, 10, 150, 40], [5, 60, 60, 119], [70, 70, 98, 98]])
    ours = detections(masks[:, 0], boxes).paste(120, 160)
    theirs = paste_masks_in_image(masks, boxes.float(), (120, 160))[:, 0] >= 0.5
    assert theirs.any()
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.9  # it counts a box's last pixel in


def test_a_full_mask_fills_its_box() -> None:
    pasted = detections(torch.ones(1, 4, 4), [2, 3, 9, 8]).paste(10, 12)[0]
    assert pasted[3:8, 2:9].all() and pasted.sum() == 5 * 7


def test_degenerate_boxes_mark_nothing() -> None:
    found = detections(torch.ones(3, 4, 4), [[3, 3, 3, 8], [0, 0, 0, 0], [10, 12, 10, 12]])
    assert not found.paste(10, 12).any()
    assert all(coco_mask.area(rle) == 0 for rle in found.rle(10, 12))


def test_no_detections_give_no_masks() -> None:
    none = detections(torch.zeros(0, 28, 28), [])
    assert none.paste(10, 12).shape == (0, 10, 12) and none.rle(10, 12) == []
    assert none.to_coco(1, LABELS, (10, 12)) == []


def test_masks_stay_with_their_detections() -> None:
    masks = torch.rand(3, 5, 5, generator=seeded(2))
    found = detections(masks, [[1, 1, 9, 9], [2, 2, 8, 8], [3, 3, 7, 7]])
    above = found.above(0.4)
    assert above.masks is not None and torch.equal(above.masks, masks[:2])
    moved = found.rescale((10, 10), (20, 30)).cpu()
    assert moved.masks is not None and torch.equal(moved.masks, masks)
    assert moved.boxes[0].tolist() == [3, 2, 27, 18]


def test_records_have_segmentations_where_the_size_is_known() -> None:
    found = detections(torch.ones(2, 4, 4), [[2, 3, 9, 8], [0, 0, 4, 4]])
    records = json.loads(json.dumps(found.to_coco(7, LABELS, (10, 12))))
    for record, pasted in zip(records, found.paste(10, 12), strict=True):
        assert record["segmentation"]["size"] == [10, 12]
        assert torch.equal(torch.from_numpy(coco_mask.decode(record["segmentation"])).bool(), pasted)
    assert all("segmentation" not in record for record in found.to_coco(7, LABELS))
    plain = Detections(found.boxes, found.scores, found.labels)
    assert plain.to_coco(7, LABELS, (10, 12)) == found.to_coco(7, LABELS)
    with pytest.raises(ValueError, match="no masks"):
        plain.paste(10, 12)


# ---- run-length encoding


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.floats(0, 1), st.data())
@settings(max_examples=60 * FUZZ, deadline=None)
def test_windows_are_encoded_as_pycocotools_encodes_the_picture(
    height: int, width: int, seed: int, share: float, data: st.DataObject
) -> None:
    top, left = data.draw(st.integers(0, height)), data.draw(st.integers(0, width))
    rows, columns = data.draw(st.integers(0, height - top)), data.draw(st.integers(0, width - left))
    window = np.random.default_rng(seed).random((rows, columns)) < share
    picture = np.zeros((height, width), np.uint8, order="F")
    picture[top : top + rows, left : left + columns] = window
    rle = encode_window(window, top, left, height, width)
    assert rle == {"size": [height, width], "counts": coco_mask.encode(picture)["counts"].decode()}
    assert np.array_equal(decode_counts([rle["counts"]], height, width)[0].numpy(), picture)


def test_boxes_become_rectangles_of_all_pixels_they_touch() -> None:
    mask = decode_counts([encode_box((1.5, 2.0, 4.2, 5.0), 8, 9)["counts"]], 8, 9)[0]
    assert mask[2:5, 1:5].all() and mask.sum() == 12


SQUARE = [2, 1, 6, 1, 6, 5, 2, 5]


def test_all_forms_of_a_segmentation_give_the_same_mask() -> None:
    rle = coco_mask.frPyObjects([SQUARE], 8, 9)[0]
    plain = {"size": [8, 9], "counts": [17, 4, 4, 4, 4, 4, 4, 4, 27]}
    forms = ([SQUARE], [SQUARE, [1, 1]], {"size": [8, 9], "counts": rle["counts"].decode()}, plain)
    assert {compress_segmentation(form, 8, 9) for form in forms} == {rle["counts"].decode()}
    two = compress_segmentation([SQUARE, [7, 6, 9, 6, 9, 8, 7, 8]], 8, 9)
    assert two is not None and decode_counts([two], 8, 9).sum() == 16 + 4


@pytest.mark.parametrize("empty", [None, [], [[]], [[1, 2, 3, 4]], {"size": [8, 9], "counts": [72]}])
def test_segmentations_that_mark_nothing_are_none(empty: Any) -> None:
    assert compress_segmentation(empty, 8, 9) is None


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("polygon", "must be a list of polygons or an RLE"),
        ([1, 2, 3, 4, 5, 6], "must be a list of numbers"),
        ([["x"] * 6], "must be a list of numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "not an x and a y"),
        ([[1, 2, 3, 4, 5, math.nan]], "not finite"),
        ([[1, 2, 3, 4, 5, 10**400]], "not finite"),
        ({"size": [9, 8], "counts": [72]}, "for a picture of"),
        ({"size": [8, 9], "counts": [70]}, "add up to 72"),
        ({"size": [8, 9], "counts": [80, -8]}, "add up to 72"),
        ({"size": [8, 9], "counts": "ooo"}, "compressed text"),  # says that more follows
        ({"size": [8, 9], "counts": "é"}, "compressed text"),
        ({"size": [8, 9], "counts": "oO0" * 40}, "do not describe 72 pixels"),
        ({"size": [8, 9]}, "must be a list of integers"),
    ],
)
def test_malformed_segmentations_are_errors(segmentation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress_segmentation(segmentation, 8, 9)


@given(st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=12))
@settings(max_examples=200 * FUZZ, deadline=None)
def test_any_compressed_text_is_a_mask_or_an_error(text: str) -> None:
    try:
        counts = compress_segmentation({"size": [8, 9], "counts": text}, 8, 9)
    except ValueError:
        return
    assert counts is None or decode_counts([counts], 8, 9).any()


# ---- reading


def test_masks_of_every_form_are_the_painted_pixels(tmp_path: Path) -> None:
    data = CocoDataset(*shapes_coco(tmp_path, count=4), masks=True)
    assert not data.report.repairs
    for sample in (data[i] for i in range(len(data))):
        assert sample.masks is not None and sample.masks.dtype == torch.bool
        assert sample.masks.shape == (len(sample.boxes), *sample.image.shape[1:])
        assert torch.equal(sample.masks.any(0), (sample.image >= 60).all(0))
        for mask, box in zip(sample.masks, sample.boxes, strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def with_segmentations(*segmentations: Any) -> dict[str, Any]:
    """One picture of 20 x 30 with an object for each, boxes from (2, 3) to (12.5, 9), and a crowd region."""
    rows: list[tuple[int, int, list[float], int]] = [(10, 3, [2.0, 3.0, 10.5, 6.0], 0) for _ in segmentations]
    content = coco_dict([(20, 30)], [*rows, (10, 3, [0.0, 0.0, 9.0, 9.0], 1)])
    for annotation, segmentation in zip(content["annotations"], segmentations, strict=False):
        annotation["segmentation"] = segmentation
    return content


def test_an_object_without_a_segmentation_gets_its_box_and_is_counted(tmp_path: Path) -> None:
    paths = write_coco(tmp_path, with_segmentations([SQUARE], [], None))
    data = CocoDataset(*paths, masks=True)
    assert data.report.repairs == {"object without a segmentation: its box is its mask": 2}
    masks = data[0].masks
    assert masks is not None and masks.shape == (3, 20, 30) and masks[0].sum() == 16
    assert masks[1][3:9, 2:13].all() and masks[1].sum() == 6 * 11 and torch.equal(masks[1], masks[2])
    with pytest.raises(ValueError, match="annotation id 2: object without a segmentation"):
        CocoDataset(*paths, masks=True, strict=True)


def test_masks_are_neither_read_nor_checked_unless_asked_for(tmp_path: Path) -> None:
    paths = write_coco(tmp_path, with_segmentations("nonsense"))
    assert CocoDataset(*paths)[0].masks is None
    with pytest.raises(ValueError, match="annotation id 1: segmentation='nonsense'"):
        CocoDataset(*paths, masks=True)


def test_a_file_without_segmentations_cannot_give_masks(tmp_path: Path) -> None:
    paths = write_coco(tmp_path, with_segmentations([], None))
    with pytest.raises(ValueError, match="no object has a segmentation.*faster_rcnn"):
        CocoDataset(*paths, masks=True)


# ---- batches


def test_resized_masks_cover_pixels_that_are_half_covered() -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :, :2] = True
    assert resize_masks(mask, 2, 2).tolist() == [[[True, False], [True, False]]]
    assert torch.equal(resize_masks(resize_masks(mask, 16, 12), 4, 4), mask)
    assert resize_masks(mask[:0], 2, 3).shape == (0, 2, 3)


@pytest.mark.parametrize(
    "transform", [SmallDataTrain(64, color=0.0, mosaic=0.0), SmallDataTrain(64, color=0.0, mosaic=1.0), StandardTrain()]
)
def test_batches_carry_masks_of_the_picture_and_its_pixels(tmp_path: Path, transform: Any) -> None:
    if isinstance(transform, StandardTrain):
        transform = StandardTrain((48, 72), 96)
    data = CocoDataset(*shapes_coco(tmp_path, count=6), masks=True)
    seen = 0
    for batch in make_train_loader(data, transform, 3, seed=1, epoch=0, pad_divisor=32):
        for image, (height, width), target in zip(batch.images, batch.image_sizes.tolist(), batch.targets, strict=True):
            masks = target["masks"]
            assert masks.shape == (len(target["boxes"]), height, width) and masks.dtype == torch.bool
            for mask in masks:
                inner = -nn.functional.max_pool2d(-mask[None].float(), 3, 1, 1)[0] > 0  # edges are blurred
                assert (image[:, :height, :width][:, inner] > 90).all()
                seen += bool(inner.any())
    assert seen >= 6


def test_evaluation_batches_carry_masks_if_the_data_set_has_them(tmp_path: Path) -> None:
    paths = shapes_coco(tmp_path, count=2)
    cfg = PretrainedCfg(short_side=48, long_side=64)
    for asked in (True, False):
        (batch,) = make_eval_loader(CocoDataset(*paths, masks=asked), cfg, 2)
        for target in batch.targets:
            assert ("masks" in target) == asked
            assert not asked or target["masks"].shape == (len(target["boxes"]), 48, 48)


# ---- the detector's side


@pytest.mark.parametrize(
    "masks",
    [torch.zeros(1, 64, 64).bool(), torch.zeros(2, 32, 32).bool(), torch.zeros(2, 64, 64)],
    ids=["number", "size", "dtype"],
)
def test_masks_that_do_not_fit_the_picture_are_refused(masks: Tensor) -> None:
    detector = create_detector("test_retinanet", num_classes=2)
    raw = detector(torch.zeros(1, 3, 64, 64))
    boxes, labels = torch.tensor([[1.0, 1, 30, 30], [2, 2, 40, 40]]), torch.tensor([0, 1])
    assert detector.loss(raw, [{"boxes": boxes, "labels": labels, "masks": torch.zeros(2, 64, 64).bool()}])
    with pytest.raises(ValueError, match="target 0: masks"):
        detector.loss(raw, [{"boxes": boxes, "labels": labels, "masks": masks}])


def test_decode_gives_each_picture_its_masks() -> None:
    detector = create_detector("test_retinanet", num_classes=2)
    masks = torch.rand(2, 3, 4, 4, generator=seeded(3))
    out = DetectionTensors(
        torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 3).long(), torch.tensor([2, 0]), masks
    )
    detector.decode_tensors = lambda raw: out  # type: ignore[method-assign]
    first, second = detector.decode(None)  # type: ignore[arg-type]
    assert first.masks is not None and torch.equal(first.masks, masks[0, :2])
    assert second.masks is not None and second.masks.shape == (0, 4, 4)


# ---- figures


@pytest.fixture(params=["pycocotools", "hotcoco"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "hotcoco":
        pytest.importorskip("hotcoco")
    return request.param


class ShapeFinder(nn.Module):
    """Finds what is bright, by its pixels; stands in for ``Detector``, so that the answer is known.

    ``fill``: masks are the whole box instead of the shape.
    """

    wants_masks = True

    def __init__(self, data: CocoDataset, fill: bool = False) -> None:
        super().__init__()
        self.name, self.label_space, self.device, self.fill = "finder", data.label_space, torch.device("cpu"), fill
        self.pretrained_cfg = PretrainedCfg(short_side=96, long_side=96)
        self.known = {tuple(data[i].image.flatten()[:64].tolist()): data[i] for i in range(len(data))}

    def forward(self, images: Tensor, image_sizes: Tensor) -> SimpleNamespace:
        return SimpleNamespace(images=images)

    def decode(self, raw: SimpleNamespace) -> list[Detections]:
        return [self._find(self.known[tuple(image[:, :96, :96].flatten()[:64].tolist())]) for image in raw.images]

    def _find(self, sample: Any) -> Detections:
        masks = []
        for mask, (x1, y1, x2, y2) in zip(sample.masks, sample.boxes.int().tolist(), strict=True):
            part = mask[y1:y2, x1:x2].float()
            cells = nn.functional.interpolate(part[None, None], (28, 28), mode="bilinear", align_corners=False)[0, 0]
            masks.append(torch.ones(28, 28) if self.fill else cells)
        scores = torch.full((len(masks),), 0.9)
        return Detections(sample.boxes, scores, sample.labels, torch.stack(masks))


def score(tmp_path: Path, backend: Backend, fill: bool = False) -> EvalResult:
    images, annotations = shapes_coco(tmp_path, count=4)
    finder = ShapeFinder(CocoDataset(images, annotations, masks=True), fill)
    return evaluate(finder, images=images, annotations=annotations, progress=False, backend=backend)  # type: ignore[arg-type]


def test_masks_are_evaluated_besides_boxes(tmp_path: Path, backend: Backend) -> None:
    good, filled = score(tmp_path, backend), score(tmp_path, backend, fill=True)
    assert tuple(good.metrics) == METRIC_NAMES + MASK_METRIC_NAMES
    assert good.metrics["AP"] == filled.metrics["AP"] == pytest.approx(1)
    assert good.metrics["mask_AP"] > 0.85 and good.metrics["mask_AP50"] == pytest.approx(1)
    assert filled.metrics["mask_AP"] < good.metrics["mask_AP"] - 0.2
    rows = {row["name"]: row for row in filled.per_class}
    assert rows["rectangle"]["mask_AP"] > 0.9 > rows["circle"]["mask_AP"] and rows["triangle"]["mask_AP"] < 0.3
    assert "mask_APs" in good.summary() and good.summary().count("\n") == 8


def test_figures_are_those_of_cocoeval_itself(tmp_path: Path, backend: Backend) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    result = score(tmp_path, backend, fill=True)
    truth = COCO(tmp_path / "instances.json")
    records = [{k: v for k, v in p.items() if k != "bbox"} for p in copy.deepcopy(result.predictions)]
    evaluator = COCOeval(truth, truth.loadRes(records), "segm")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    ours = [-1 if math.isnan(v) else v for name, v in result.metrics.items() if name.startswith("mask_")]
    assert ours == pytest.approx(evaluator.stats.tolist())


def test_boxes_alone_are_evaluated_where_the_file_has_no_segmentations(tmp_path: Path) -> None:
    images, annotations = shapes_coco(tmp_path, count=2)
    finder = ShapeFinder(CocoDataset(images, annotations, masks=True))
    content = json.loads(annotations.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    annotations.write_text(json.dumps(content))
    result = evaluate(finder, images=images, annotations=annotations, progress=False)  # type: ignore[arg-type]
    assert tuple(result.metrics) == METRIC_NAMES and "mask" not in result.summary()


def test_missing_fields_of_masks_are_filled_in_or_named(backend: Backend) -> None:
    content = with_segmentations([SQUARE], None)
    for annotation in content["annotations"]:
        del annotation["area"]
    square, box = (compress_segmentation([SQUARE], 20, 30), encode_box((2, 3, 12.5, 9), 20, 30)["counts"])
    predictions = [
        {"image_id": 10, "category_id": 3, "score": 0.5, "segmentation": {"size": [20, 30], "counts": counts}}
        for counts in (square, box)
    ]
    metrics, _ = coco_metrics(content, predictions, backend=backend, overlap="segm")
    assert metrics["AP"] == pytest.approx(1) and metrics["APs"] == pytest.approx(1)
    assert coco_metrics(content, [], backend=backend, overlap="segm")[0]["AP"] == 0
    with pytest.raises(ValueError, match="has no 'segmentation'"):
        coco_metrics(content, [{"image_id": 10, "category_id": 3, "score": 0.5}], overlap="segm")
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match="annotation id 1, image id 10: polygon"):
        coco_metrics(content, [], overlap="segm")


# ---- pictures and files


def test_masks_are_painted_translucently_and_the_rest_is_left() -> None:
    grey = Image.new("RGB", (60, 50), (100, 100, 100))
    mask = torch.zeros(1, 28, 28)
    mask[0, 14:] = 1  # the lower half
    found = detections(mask, [10, 10, 50, 40])
    picture = np.asarray(draw_detections(grey, found, ["cat", "dog"]))
    expected = 0.55 * 100 + 0.45 * np.array(class_color(0))
    assert np.abs(picture[32, 30] - expected).max() < 2
    assert picture[45, 5].tolist() == [100, 100, 100] and picture[24, 30].tolist() == [100, 100, 100]
    assert np.asarray(grey).max() == 100


def test_predicted_files_have_masks(tmp_path: Path) -> None:
    picture = tmp_path / "photo.png"
    Image.new("RGB", (40, 30)).save(picture)
    found = detections(torch.ones(1, 28, 28), [4, 5, 24, 25])
    detector = SimpleNamespace(label_space=LABELS, predict=lambda images, **options: [found] * len(images))
    predict_files(detector, picture, tmp_path / "out", progress=False)  # type: ignore[arg-type]
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    (record,) = content["annotations"]
    assert record["area"] == 400 and record["iscrowd"] == 0
    assert coco_mask.decode(record["segmentation"])[5:25, 4:24].all()
    again = CocoDataset(tmp_path, write_predictions(tmp_path, content), masks=True)  # what was written can be read
    masks = again[0].masks
    assert masks is not None and torch.equal(masks, found.paste(30, 40))


def write_predictions(folder: Path, content: dict[str, Any]) -> Path:
    content["images"][0]["file_name"] = "photo.png"
    path = folder / "again.json"
    path.write_text(json.dumps(content))
    return path
