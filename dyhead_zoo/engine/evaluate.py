"""COCO metrics: run a detector over a COCO-format data set, and score any list of COCO results records.

The numbers are those of COCOeval (https://github.com/cocodataset/cocoapi): IoU .50:.05:.95, at most 100 detections per
image, areas split at 32 x 32 and 96 x 96. pycocotools is the reference; hotcoco, where it is installed, computes the
same bits in a fraction of the time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import distributed

from dyhead_zoo.data.label_space import LabelSpace
from dyhead_zoo.ops.masks import Rle, compress_segmentation, encode_box, mask_area

if TYPE_CHECKING:
    from dyhead_zoo.data.coco import CocoDataset
    from dyhead_zoo.detector import Detector
    from dyhead_zoo.structures import Sample

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCOeval's twelve numbers, in its order."""
MASK_METRIC_NAMES = tuple(f"mask_{name}" for name in METRIC_NAMES)
"""The same for masks."""

Backend = Literal["auto", "pycocotools", "hotcoco"]
Overlap = Literal["bbox", "segm"]
"""What IoU is computed of: boxes, or masks."""
Record = dict[str, Any]


@dataclass
class EvalResult:
    """What ``evaluate`` found; ``engine.record.evaluation_record`` makes of it what is kept and published.

    Attributes:
        metrics: ``METRIC_NAMES`` to figures in 0..1; NaN where the data set holds nothing to measure it on. If the
            detector makes masks and the file has segmentations, ``MASK_METRIC_NAMES`` too.
        per_class: one dict per category of the file: ``name``, ``category_id``, ``AP``, ``AP50`` (NaN without ground
            truth), ``num_gts`` (crowd regions not counted), and with masks ``mask_AP``, ``mask_AP50``.
        predictions: COCO results records, with the category ids of the file.
        num_images: images that were evaluated.
        seconds: wall time of the predictions, images read and resized included; scoring is not.
        detector: the detector's name.
        backend: what computed the metrics.
        unknown_classes: categories of the file that the detector has no class for; their objects count as misses.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, Any]]
    predictions: list[Record] = field(repr=False)
    num_images: int
    seconds: float
    detector: str = ""
    backend: str = ""
    unknown_classes: tuple[str, ...] = ()

    def summary(self) -> str:
        """A table for the terminal: the numbers in percent, then what they were measured on."""
        rows = []
        names = [*METRIC_NAMES, *(name for name in MASK_METRIC_NAMES if name in self.metrics)]
        for start in range(0, len(names), 6):
            width = 8 if start < len(METRIC_NAMES) else 13
            rows.append("".join(f"{name:>{width}}" for name in names[start : start + 6]))
            rows.append("".join(f"{_percent(self.metrics[name]):>{width}}" for name in names[start : start + 6]))
        speed = self.num_images / self.seconds if self.seconds > 0 else math.inf
        rows.append(
            f"{self.num_images} images, {sum(c['num_gts'] for c in self.per_class)} objects, "
            f"{len(self.predictions)} detections, {speed:.1f} images/s, scored by {self.backend}"
        )
        return "\n".join(rows)


def evaluate(
    detector: Detector,
    *,
    images: str | Path,
    annotations: str | Path,
    batch_size: int = 1,
    num_workers: int = 0,
    max_images: int | None = None,
    score_threshold: float = 0.0,
    progress: bool = True,
    backend: Backend = "auto",
) -> EvalResult:
    """Average precision of a detector on a COCO-format data set: of its boxes, and of its masks where there are any.

    Classes are matched by name. Objects of a category that the detector does not know count as misses (and are named
    in a warning); detections of a class that the file does not list are dropped. In a distributed job every process
    calls this function, predicts its share, and gets the result for the whole data set.

    Args:
        detector: its train/eval mode is restored afterwards.
        images: folder that ``file_name`` of the annotation file is relative to.
        annotations: COCO-format JSON file.
        batch_size: images of equal canvas per step; changes the speed only.
        num_workers: processes that read images; 0 reads in this one.
        max_images: only the first so many images of the file.
        score_threshold: detections below are dropped, on top of the detector's own threshold.
        progress: show a progress bar.
        backend: ``auto`` takes hotcoco where it is installed, else pycocotools.

    Raises:
        FileNotFoundError: if the file or the folder does not exist.
        ValueError: if the file is not in COCO format or shares no class with the detector.
    """
    from dyhead_zoo.data.coco import CocoDataset

    dataset = CocoDataset(images, annotations)
    if max_images is not None:
        dataset = _First(dataset, max_images)  # type: ignore[assignment]
    content = read_annotations(annotations)
    unknown = _unknown_classes(detector.label_space, content["categories"])
    start = time.perf_counter()
    predictions = predict_dataset(
        detector,
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        score_threshold=score_threshold,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    metrics, per_class = coco_metrics(content, predictions, image_ids=dataset.image_ids, backend=backend)
    if detector.wants_masks and any(annotation.get("segmentation") for annotation in content["annotations"]):
        of_masks, rows = coco_metrics(
            content, predictions, image_ids=dataset.image_ids, backend=backend, overlap="segm"
        )
        metrics |= {f"mask_{name}": value for name, value in of_masks.items()}
        per_class = [
            {**row, "mask_AP": mask["AP"], "mask_AP50": mask["AP50"]} for row, mask in zip(per_class, rows, strict=True)
        ]
    return EvalResult(
        metrics=metrics,
        per_class=per_class,
        predictions=predictions,
        num_images=len(dataset.image_ids),
        seconds=seconds,
        detector=detector.name,
        backend=resolve_backend(backend),
        unknown_classes=unknown,
    )


def predict_dataset(
    detector: Detector,
    dataset: CocoDataset,
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    score_threshold: float = 0.0,
    progress: bool = True,
) -> list[Record]:
    """Detections on every image of a data set, as COCO results records with the category ids of its file.

    In a distributed job each process predicts its share and all get the whole; an image that a sampler gave to two
    processes counts once.

    Returns:
        records ``image_id, category_id, bbox (xywh, pixels of the original image), score`` and, of detectors that make
        masks, ``segmentation`` (compressed RLE); by image id, best first.
    """
    from tqdm.auto import tqdm

    from dyhead_zoo.data.loader import make_eval_loader
    from dyhead_zoo.detector import eval_mode

    rank, world_size = _rank_and_world_size()
    loader = make_eval_loader(dataset, detector.pretrained_cfg, batch_size, num_workers, rank, world_size)
    to_category = _category_ids_by_name(detector.label_space, dataset.label_space)
    by_image: dict[int, list[Record]] = {}
    with eval_mode(detector), torch.inference_mode():
        for batch in tqdm(loader, desc="evaluate", unit="batch", disable=not progress or rank != 0):
            found = detector.decode(detector(batch.images.to(detector.device), batch.image_sizes.to(detector.device)))
            sizes = zip(batch.image_sizes.tolist(), batch.original_sizes.tolist(), strict=True)
            for image_id, detections, (from_size, to_size) in zip(batch.image_ids, found, sizes, strict=True):
                size = tuple(to_size)
                detections = detections.above(score_threshold).rescale(tuple(from_size), size)
                by_image[image_id] = _to_records(detections.to_coco(image_id, detector.label_space, size), to_category)
    by_image = _merge_ranks(by_image, world_size)
    return [record for image_id in sorted(by_image) for record in by_image[image_id]]


def coco_metrics(
    annotations: str | Path | Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    *,
    image_ids: Collection[int] | None = None,
    backend: Backend = "auto",
    overlap: Overlap = "bbox",
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """COCOeval's metrics of any results records, whatever made them.

    Fields that hand-made files leave out are filled in: ``iscrowd`` is 0, ``area`` is that of the box or, for masks,
    that of the mask, which in turn is the box where there is none. Annotations are renumbered from 1, since COCOeval
    takes the id 0 for "no match".

    Args:
        annotations: COCO-format file or its content.
        predictions: ``image_id, category_id, bbox (xywh), score`` each, or for masks ``segmentation`` (RLE) instead of
            ``bbox``, which is then not looked at; may be empty.
        image_ids: evaluate these images only; None for all of the file.
        backend: see ``evaluate``.
        overlap: compare boxes (``"bbox"``) or masks (``"segm"``).

    Returns:
        Figures by ``METRIC_NAMES``, and ``per_class`` as in ``EvalResult``.

    Raises:
        ValueError: for a file that is not in COCO format, predictions on images that it does not list, or masks that
            are missing from predictions or malformed.
    """
    ground_truth, evaluator = _make_cocoeval(annotations, predictions, image_ids, backend, overlap)
    with contextlib.redirect_stdout(io.StringIO()):  # COCOeval prints its progress
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    metrics = {name: _missing_to_nan(v) for name, v in zip(METRIC_NAMES, evaluator.stats, strict=True)}
    counts = Counter(a["category_id"] for a in ground_truth["annotations"] if not a["iscrowd"])
    return metrics, _per_class(evaluator, ground_truth["categories"], counts)


def match_images(
    annotations: str | Path | Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    *,
    image_ids: Collection[int] | None = None,
    backend: Backend = "auto",
    overlap: Overlap = "bbox",
) -> tuple[list[dict[str, Any]], list[int]]:
    """Which detections COCOeval matches to which objects, image by image, for objects of all sizes.

    Arguments and errors are those of ``coco_metrics``.

    Returns:
        COCOeval's ``evalImgs`` (one dict per image and class that has objects or detections there: ``image_id``,
        ``category_id``, ``dtScores`` (D,), ``dtMatches`` and ``dtIgnore`` (T, D), ``gtIgnore`` (G,)), and the ids of
        all images, ascending.
    """
    ground_truth, evaluator = _make_cocoeval(annotations, predictions, image_ids, backend, overlap)
    evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
    return [entry for entry in evaluator.evalImgs if entry], sorted(image["id"] for image in ground_truth["images"])


def read_annotations(path: str | Path) -> dict[str, Any]:
    """Content of a COCO-format annotation file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not JSON, a list is missing, or a category has no id or name.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no annotation file at {path}")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    missing = [k for k in ("images", "annotations", "categories") if not isinstance(content, dict) or k not in content]
    if missing:
        raise ValueError(f"{path} is not a COCO-format annotation file: it lacks {', '.join(missing)}")
    for category in content["categories"]:
        if not isinstance(category, dict) or not {"id", "name"} <= category.keys():
            raise ValueError(f"{path}: category {category!r:.80} lacks an id or a name")
    return content


def resolve_backend(backend: Backend) -> Literal["pycocotools", "hotcoco"]:
    """``auto`` becomes hotcoco where it is installed, else pycocotools.

    Raises:
        ValueError: for an unknown name, or hotcoco without its package.
    """
    if backend not in ("auto", "pycocotools", "hotcoco"):
        raise ValueError(f"unknown evaluation backend {backend!r}: choose auto, pycocotools or hotcoco")
    installed = importlib.util.find_spec("hotcoco") is not None
    if backend == "hotcoco" and not installed:
        raise ValueError("evaluation backend hotcoco is not installed: pip install 'dyhead-zoo[eval]'")
    return "hotcoco" if installed and backend != "pycocotools" else "pycocotools"


class _First:
    """The first images of a data set, as far as the evaluation needs them."""

    def __init__(self, dataset: CocoDataset, count: int) -> None:
        if count < 1:
            raise ValueError(f"max_images={count}: evaluate at least one image")
        self._dataset, self.label_space, self.image_ids = dataset, dataset.label_space, dataset.image_ids[:count]

    def __len__(self) -> int:
        return len(self.image_ids)

    def size(self, index: int) -> tuple[int, int]:
        return self._dataset.size(index)

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[index]


def _make_cocoeval(
    annotations: str | Path | Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    image_ids: Collection[int] | None,
    backend: Backend,
    overlap: Overlap = "bbox",
) -> tuple[dict[str, Any], Any]:
    """The completed ground truth, and a COCOeval of either package that is ready to run."""
    content = annotations if isinstance(annotations, Mapping) else read_annotations(annotations)
    ids = [image["id"] for image in content["images"]]
    if stray := sorted({p["image_id"] for p in predictions} - set(ids))[:5]:
        raise ValueError(
            f"predictions for image ids {stray} that the annotation file does not list: is it the right file?"
        )
    kept = set(ids) if image_ids is None else set(ids) & set(image_ids)
    ground_truth = _complete(content, kept, overlap)
    fields = ("image_id", "category_id", "score", {"bbox": "bbox", "segm": "segmentation"}[overlap])
    if lacking := [p for p in predictions if fields[-1] not in p][:1]:
        raise ValueError(f"{overlap}: prediction {lacking[0]!r:.200} has no {fields[-1]!r}")
    # copies, since loadRes writes into its records; of masks without the box, of which it would take the area
    records = [{key: p[key] for key in fields} for p in predictions if p["image_id"] in kept]
    with contextlib.redirect_stdout(io.StringIO()):
        if resolve_backend(backend) == "hotcoco":
            import hotcoco

            truth = hotcoco.COCO(ground_truth)
            evaluator = hotcoco.COCOeval(truth, truth.loadRes(records), overlap)
        else:
            from pycocotools import coco, cocoeval

            truth = coco.COCO()
            truth.dataset = ground_truth
            truth.createIndex()
            found = truth.loadRes(records) if records else coco.COCO()  # loadRes raises IndexError on an empty list
            evaluator = cocoeval.COCOeval(truth, found, overlap)
    evaluator.params.imgIds = sorted(kept)
    return ground_truth, evaluator


def _complete(content: Mapping[str, Any], image_ids: set[int], overlap: Overlap) -> dict[str, Any]:
    """The ground truth of some images with every field that COCOeval reads, and nothing else."""
    images = {image["id"]: image for image in content["images"] if image["id"] in image_ids}
    annotations = []
    for number, annotation in enumerate((a for a in content["annotations"] if a["image_id"] in images), start=1):
        area = annotation.get("area")
        _, _, width, height = annotation["bbox"]
        complete = {
            "id": number,
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": annotation["bbox"],
            "area": width * height if area is None else area,
            "iscrowd": annotation.get("iscrowd", 0),
        }
        if overlap == "segm":
            complete["segmentation"] = _segmentation(annotation, images[annotation["image_id"]])
            if area is None:
                complete["area"] = mask_area(complete["segmentation"])
        annotations.append(complete)
    return {"images": list(images.values()), "annotations": annotations, "categories": list(content["categories"])}


def _segmentation(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> Rle:
    """The mask of an annotation, or its box where it has none; the reader of training data does the same."""
    try:
        size = int(image["height"]), int(image["width"])
        counts = compress_segmentation(annotation.get("segmentation"), *size)
    except KeyError as error:
        raise ValueError(f"image id {image['id']} has no {error}, which masks need") from error
    except ValueError as error:
        raise ValueError(f"annotation id {annotation.get('id')}, image id {image['id']}: {error}") from error
    if counts is not None:
        return Rle(size=list(size), counts=counts)
    x, y, width, height = annotation["bbox"]
    (x1, x2), (y1, y2) = (
        sorted(min(max(v, 0), limit) for v in edges)
        for edges, limit in (((x, x + width), size[1]), ((y, y + height), size[0]))
    )
    return encode_box((x1, y1, x2, y2), *size)


def _per_class(evaluator: Any, categories: list[dict[str, Any]], counts: Counter[int]) -> list[dict[str, Any]]:
    """AP and AP50 of each category. ``precision`` is (IoU thresholds, recalls, categories, areas, maxDets)."""
    precision = np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]
    row_of = {category_id: k for k, category_id in enumerate(evaluator.params.catIds)}
    rows = []
    for category in sorted(categories, key=lambda c: c["id"]):
        of_class = precision[:, :, row_of[category["id"]]]
        rows.append(
            {
                "name": category["name"],
                "category_id": category["id"],
                "AP": _missing_to_nan(of_class.mean()),
                "AP50": _missing_to_nan(of_class[0].mean()),
                "num_gts": counts[category["id"]],
            }
        )
    return rows


def _unknown_classes(known: LabelSpace, categories: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of categories the detector lacks; a warning lists them.

    Raises:
        ValueError: if it lacks all of them.
    """
    names = [str(c["name"]) for c in categories]
    unknown = tuple(name for name in names if name not in known.names)
    if len(unknown) == len(names):
        raise ValueError(
            f"the detector and the annotation file share no class: the file has {_listed(names)}, "
            f"the detector {_listed(known.names)}. Classes are matched by name"
        )
    if unknown:
        warnings.warn(f"the detector does not know {_listed(unknown)}: their objects count as misses", stacklevel=3)
    return unknown


def _listed(names: Sequence[str], limit: int = 10) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _category_ids_by_name(known: LabelSpace, of_file: LabelSpace) -> dict[int, int]:
    """The detector's category ids to those of the file, where both name the class."""
    file_ids = dict(zip(of_file.names, of_file.category_ids, strict=True))
    return {i: file_ids[name] for name, i in zip(known.names, known.category_ids, strict=True) if name in file_ids}


def _to_records(records: list[Record], to_category: Mapping[int, int]) -> list[Record]:
    return [
        {**record, "category_id": to_category[record["category_id"]]}
        for record in records
        if record["category_id"] in to_category
    ]


def _rank_and_world_size() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _merge_ranks(by_image: dict[int, list[Record]], world_size: int) -> dict[int, list[Record]]:
    """The shares of all processes together; an image that several saw counts once."""
    if world_size == 1:
        return by_image
    shares: list[dict[int, list[Record]] | None] = [None] * world_size
    distributed.all_gather_object(shares, by_image)
    return {image_id: records for share in shares if share for image_id, records in share.items()}


def _missing_to_nan(value: float) -> float:
    """COCOeval writes -1 where there is no ground truth to measure on."""
    return float(value) if value > -1 else math.nan


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"
