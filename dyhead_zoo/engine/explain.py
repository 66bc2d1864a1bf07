"""Before any training: who learns each object of a data set, and which objects nobody does.

``explain_assign.py`` says what is known of one picture; here the figures of all pictures are gathered.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou
from tqdm import tqdm

from dyhead_zoo.data import CocoDataset
from dyhead_zoo.data.transforms import scale_boxes
from dyhead_zoo.detector import Detector
from dyhead_zoo.engine.explain_assign import Assigner, Terms, assigner_of
from dyhead_zoo.engine.explain_text import summary

TINY = 4.0
"""Pixels after resizing: objects with a shorter side are suspicious."""
EXTREME_RATIO = 10.0
"""Longer over shorter side, above which objects are suspicious."""
SAME_IOU = 0.95
"""From this IoU on, two boxes of a picture are the same."""
WHOLE = 0.95
"""Share of the picture from which on a box covers all of it."""
SIZE_EDGES = (8, 16, 32, 64, 128, 256, 512)
"""Square roots of areas, in pixels after resizing, that divide the objects of the table."""


class Objects(NamedTuple):
    """All N objects of a data set.

    Attributes:
        picture: (N,) position of the picture in the data set.
        labels: (N,).
        boxes: (N, 4) xyxy in pixels of the picture as it is stored.
        resized: (N, 4) in pixels after resizing.
        positives: (N, L) places of each level that learn the object; (N, 0) where predictions decide.
        weak: (N, L) how many of them for want of better ones.
        outdone: (N,) whether an object without positives would have some if it were alone in the picture.
        pooled: (N,) level that a region with its box is read from; -1 without a second stage.
        best: (N,) highest IoU of an anchor, clipped to the picture, with the object.
        reaching: (N, S) anchors that each of the S stages would take for the object; (N, 0) without a second stage.
    """

    picture: Tensor
    labels: Tensor
    boxes: Tensor
    resized: Tensor
    positives: Tensor
    weak: Tensor
    outdone: Tensor
    pooled: Tensor
    best: Tensor
    reaching: Tensor

    @property
    def orphans(self) -> Tensor:
        """(N,) objects that no place learns; none where predictions decide."""
        if not self.positives.shape[1]:
            return torch.zeros_like(self.outdone)
        return self.positives.sum(1) == 0

    @property
    def only_weak(self) -> Tensor:
        """(N,) objects all of whose positives are weak."""
        return (self.weak.sum(1) > 0) & (self.weak.sum(1) == self.positives.sum(1))

    @property
    def sides(self) -> Tensor:
        """(N,) square roots of the areas after resizing."""
        return _sides(self.resized).prod(1).sqrt()


@dataclass
class Explanation:
    """What a detector would make of a data set.

    Attributes:
        detector: its name.
        protocol: how pictures are resized, in words.
        source: the annotation file.
        terms: what objects are assigned to.
        strides: of the levels.
        places: of each level, on all pictures together.
        class_names: of the labels.
        pictures: (image id, file name) of each.
        objects: of all pictures.
        suspicious: kind of fault to positions of objects.
        repairs: boxes that are not among the objects as they stand in the file, by what was done to them.
    """

    detector: str
    protocol: str
    source: str
    terms: Terms
    strides: tuple[int, ...]
    places: tuple[int, ...]
    class_names: tuple[str, ...]
    pictures: list[tuple[int, str]]
    objects: Objects
    suspicious: dict[str, list[int]]
    repairs: dict[str, int]

    def summary(self) -> str:
        """Tables for the terminal."""
        return summary(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """All figures, and where each object is that no place learns or that is suspicious, JSON-able.

        What a family does not have is left out: ``positives_per_object`` and ``without_positives`` (set prediction),
        ``weak_positives`` (one-stage detectors), ``regions`` (all but two-stage detectors).
        """
        return {
            "detector": self.detector,
            "input": self.protocol,
            "annotations": self.source,
            "images": len(self.pictures),
            "objects": len(self.objects.labels),
            "objects_per_image": self._crowds(),
            "assigned_to": self.terms.place,
            **(self._positives() if self.terms.place else {}),
            "levels": [self._level(i) for i in range(len(self.strides))],
            **({"regions": self._regions()} if self.terms.stage_ious else {}),
            "sizes": self._sizes(),
            "classes": self._classes(),
            "suspicious": {kind: [self._place(i) for i in rows] for kind, rows in self.suspicious.items()},
            "repairs": self.repairs,
        }

    def _crowds(self) -> dict[str, Any]:
        """Objects per picture, and pictures with more of them than there can be of something."""
        counts = torch.bincount(self.objects.picture, minlength=len(self.pictures))
        limits = [
            {
                "what": what,
                "limit": limit,
                "images": int((counts > limit).sum()),
                "objects": int((counts - limit).clamp(min=0).sum()),
            }
            for what, limit in self.terms.limits.items()
        ]
        return {**quantiles(counts.float()), "most": int(counts.max()) if len(counts) else 0, "limits": limits}

    def _positives(self) -> dict[str, Any]:
        orphans, weak = self.objects.orphans, self.objects.only_weak
        none = {
            "objects": int(orphans.sum()),
            "share": _share(orphans),
            "outdone_by_others": int(self.objects.outdone.sum()),
            "places": [self._place(i) for i in orphans.nonzero()[:, 0].tolist()],
        }
        data = {"positives_per_object": quantiles(self.objects.positives.sum(1).float()), "without_positives": none}
        if not self.terms.weak:
            return data
        figures = {
            "what": self.terms.weak,
            "positives": int(self.objects.weak.sum()),
            "objects_with_no_other": int(weak.sum()),
            "share": _share(weak),
        }
        return {**data, "weak_positives": figures}

    def _place(self, index: int) -> dict[str, Any]:
        image_id, file_name = self.pictures[int(self.objects.picture[index])]
        return {
            "image_id": image_id,
            "file_name": file_name,
            "class": self.class_names[int(self.objects.labels[index])],
            "box": [round(x, 2) for x in self.objects.boxes[index].tolist()],
        }

    def _level(self, level: int) -> dict[str, Any]:
        sides = self.objects.sides / self.strides[level]
        row = {"stride": self.strides[level], "places_per_image": self.places[level] / max(len(self.pictures), 1)}
        if not self.terms.place:
            return {
                **row,
                "sides_in_strides": quantiles(sides),
                "objects_under_a_stride": int((sides < 1).sum()),
                "share_under_a_stride": _share(sides < 1),
            }
        positives = self.objects.positives[:, level]
        learned = positives > 0
        weak = {"weak_positives": int(self.objects.weak[:, level].sum())} if self.terms.weak else {}
        return {
            **row,
            "positives": int(positives.sum()),
            "share_of_positives": int(positives.sum()) / max(int(self.objects.positives.sum()), 1),
            **weak,
            "objects": int(learned.sum()),
            "positives_per_object": float(positives[learned].float().mean()) if learned.any() else None,
            "sides_in_strides": quantiles(sides[learned]),
        }

    def _regions(self) -> dict[str, Any]:
        """Levels that regions with the objects' own boxes are read from, and anchors in the place of proposals."""
        return {
            "levels": [
                {
                    "stride": stride,
                    "objects": int((self.objects.pooled == level).sum()),
                    "share": _share(self.objects.pooled == level),
                    "sides_in_strides": quantiles(self.objects.sides[self.objects.pooled == level] / stride),
                }
                for level, stride in enumerate(self.terms.region_strides)
            ],
            "best_anchor_iou": quantiles(self.objects.best),
            "stages": [
                {
                    "iou": iou,
                    "objects": int((self.objects.reaching[:, stage] > 0).sum()),
                    "share": _share(self.objects.reaching[:, stage] > 0),
                    "anchors_per_object": quantiles(self.objects.reaching[:, stage].float()),
                }
                for stage, iou in enumerate(self.terms.stage_ious)
            ],
        }

    def _sizes(self) -> list[dict[str, Any]]:
        place = torch.bucketize(self.objects.sides, torch.tensor(SIZE_EDGES, dtype=torch.float32), right=True)
        edges = (0, *SIZE_EDGES, None)
        return [
            {"from": edges[i], "to": edges[i + 1], **self._part(place == i)}
            for i in range(len(SIZE_EDGES) + 1)
            if (place == i).any()
        ]

    def _classes(self) -> list[dict[str, Any]]:
        """The most frequent first."""
        counts = torch.bincount(self.objects.labels, minlength=len(self.class_names))
        return [
            {
                "class": self.class_names[label],
                "images": len(self.objects.picture[self.objects.labels == label].unique()),
                **self._part(self.objects.labels == label),
            }
            for label in counts.argsort(descending=True, stable=True).tolist()
        ]

    def _part(self, chosen: Tensor) -> dict[str, Any]:
        """Figures of some objects (N,) bool."""
        row: dict[str, Any] = {
            "objects": int(chosen.sum()),
            "share": _share(chosen),
            "side": quantiles(self.objects.sides[chosen])["median"],
        }
        if self.terms.place:
            row["without_positives"] = int((chosen & self.objects.orphans).sum())
            row["positives_per_object"] = float(self.objects.positives[chosen].sum() / max(row["objects"], 1))
        if self.terms.weak:
            row["only_weak_positives"] = int((chosen & self.objects.only_weak).sum())
        return row


def explain(
    detector: Detector,
    *,
    annotations: str | Path,
    images: str | Path | None = None,
    output: str | Path | None = None,
    max_images: int | None = None,
    max_pictures: int = 12,
    progress: bool = False,
) -> Explanation:
    """Show what each object of a data set is assigned to.

    Args:
        detector: its weights are not used, and its classes need not be the file's.
        annotations: COCO-format file.
        images: folder of its images; needed for pictures only.
        output: folder for ``explanation.json`` (``Explanation.to_dict()``) and, where ``images`` is given, pictures.
        max_images: only the first so many images of the file.
        max_pictures: how many to draw, those with the most objects that no place learns first.
        progress: show a progress bar.

    Raises:
        ValueError: for a detector of no known family, or a faulty file.
        FileNotFoundError: for missing files.
    """
    assigner = assigner_of(detector)
    dataset = CocoDataset(
        Path(annotations).parent if images is None else images,  # no image is read
        annotations,
        check="none" if images is None else "exists",
        max_images=max_images,
    )
    cfg = detector.pretrained_cfg
    places = torch.zeros(len(assigner.strides), dtype=torch.int64)
    found = []
    for index in tqdm(range(len(dataset)), disable=not progress, unit="image"):
        objects, per_level = _objects(assigner, dataset, index)
        places += torch.tensor(per_level)
        found.append(objects)
    explanation = Explanation(
        detector.name,
        f"shorter side {cfg.short_side}, longer at most {cfg.long_side} pixels",
        str(annotations),
        assigner.terms,
        assigner.strides,
        tuple(places.tolist()),
        dataset.label_space.names,
        [(dataset.image_ids[i], str(dataset.path(i).relative_to(dataset.images_dir))) for i in range(len(dataset))],
        Objects(*(torch.cat(parts) for parts in zip(*found, strict=True))),
        _suspicious(found, [assigner.size(*dataset.size(i)) for i in range(len(dataset))]),
        dict(dataset.report.repairs),
    )
    if output is not None:
        from dyhead_zoo.engine.explain_draw import write_explanation

        write_explanation(explanation, Path(output), assigner, dataset if images is not None else None, max_pictures)
    return explanation


def _objects(assigner: Assigner, dataset: CocoDataset, index: int) -> tuple[Objects, list[int]]:
    """The objects of one picture, and the number of places of each level."""
    record = dataset.record(index)
    size = assigner.size(record.height, record.width)
    resized = scale_boxes(record.boxes, (record.height, record.width), size)
    places, owner, weak, regions = assigner(size, resized)
    per_level = [len(level) for level in places]
    count = len(resized)
    positives = strained = torch.zeros(count, 0, dtype=torch.int64)
    outdone = torch.zeros(count, dtype=torch.bool)
    if assigner.terms.place:
        positives = _by_level(owner, owner >= 0, per_level, count)
        strained = _by_level(owner, weak, per_level, count)
        for orphan in (positives.sum(1) == 0).nonzero()[:, 0].tolist():
            outdone[orphan] = bool((assigner(size, resized[orphan, None]).owner >= 0).any())
    picture = torch.full((count,), index)
    return Objects(picture, record.labels, record.boxes, resized, positives, strained, outdone, *regions), per_level


def _by_level(owner: Tensor, chosen: Tensor, per_level: list[int], count: int) -> Tensor:
    """How many of the ``chosen`` places (P,) of each level learn each of ``count`` objects: (N, L)."""
    parts = zip(owner.split(per_level), chosen.split(per_level), strict=True)
    return torch.stack([torch.bincount(part[mask], minlength=count) for part, mask in parts], dim=1)


def _sides(boxes: Tensor) -> Tensor:
    """Widths and heights (N, 2)."""
    return boxes[:, 2:] - boxes[:, :2]


def _suspicious(found: list[Objects], sizes: list[tuple[int, int]]) -> dict[str, list[int]]:
    """Positions of suspicious objects, by kind; ``sizes`` are those of the pictures after resizing."""
    kinds: dict[str, list[int]] = defaultdict(list)
    first = 0
    for objects, (height, width) in zip(found, sizes, strict=True):
        sides = _sides(objects.resized)
        # earlier objects in columns; a picture with the same box three times has two repetitions
        same = (box_iou(objects.resized, objects.resized) >= SAME_IOU).tril(-1)
        of_class = objects.labels[:, None] == objects.labels
        faults = {
            f"shorter side under {TINY:g} px after resizing": sides.amin(1) < TINY,
            f"one side more than {EXTREME_RATIO:g} times the other": sides.amax(1) > EXTREME_RATIO * sides.amin(1),
            "covers the whole picture": sides.prod(1) >= WHOLE * height * width,
            "same box as another of its class": (same & of_class).any(1),
            "same box as one of another class": (same & ~of_class).any(1),
        }
        for kind, rows in faults.items():
            kinds[kind] += (first + rows.nonzero()[:, 0]).tolist()
        first += len(sides)
    return {kind: rows for kind, rows in kinds.items() if rows}


def _share(chosen: Tensor) -> float:
    return float(chosen.float().mean()) if len(chosen) else 0.0


def quantiles(values: Tensor) -> dict[str, float | None]:
    """10 %, 50 % and 90 % of some numbers; None if there are none."""
    names = ("low", "median", "high")
    if not len(values):
        return dict.fromkeys(names)
    ordered = values.sort().values
    return {n: float(ordered[round(q * (len(values) - 1))]) for n, q in zip(names, (0.1, 0.5, 0.9), strict=True)}
