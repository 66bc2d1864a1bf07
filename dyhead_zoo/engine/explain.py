"""Before any training: which level, anchors or points learn each object of a data set, and which objects none does.

Assignments depend on the sizes of the maps, not on weights, so the detector runs on the meta device: shapes only.
What RepPoints' second and BorderDet's border stage learn depends on predictions; of these the first stage is shown.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torchvision.ops import box_iou
from tqdm import tqdm

from dyhead_zoo.data import CocoDataset
from dyhead_zoo.data.transforms import protocol_size, round_up, scale_boxes
from dyhead_zoo.detector import Detector
from dyhead_zoo.layers.backbone import Backbone
from dyhead_zoo.layers.fpn import DyHeadNeck
from dyhead_zoo.layers.targets import Assignment
from dyhead_zoo.structures import Target

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
_MAX_CLASSES = 16
"""Rows of the text table's classes; ``to_dict`` has all."""


class AssigningHead(Protocol):
    """What is asked of a head here: that its assignment can be had without its outputs and its loss."""

    def assign(self, raw: Any, targets: list[Target]) -> Assignment: ...


class Maps(NamedTuple):
    """As much of a raw output as assignments look at: of the class logits the height and width only."""

    cls_logits: tuple[Tensor, ...]
    image_sizes: Tensor
    canvas: tuple[int, int]


class Assigner:
    """The assignment of a detector's head, for pictures resized as the detector asks for.

    Args:
        detector: with a one-stage head; its weights are not used, and it may be on the meta device.

    Raises:
        ValueError: for a head whose assignment depends on predictions.
    """

    def __init__(self, detector: Detector) -> None:
        if not hasattr(detector.head, "assign"):
            raise ValueError(
                f"{detector.name} assigns objects to what it predicts, so nothing can be said before training: use a "
                "detector of the families atss, retinanet, fcos, reppoints or borderdet"
            )
        self.cfg, self.strides = detector.pretrained_cfg, cast(DyHeadNeck, detector.neck).strides
        self._shadow = copy.deepcopy(detector).to("meta").eval()
        for module in self._shadow.modules():
            if isinstance(module, Backbone):
                module.full_precision = False  # it would ask for autocast, which the meta device lacks
        cast(DyHeadNeck, self._shadow.neck).dyhead = None  # its maps have the sizes of those that it is given
        self._known: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a picture after resizing."""
        return protocol_size(height, width, self.cfg.short_side, self.cfg.long_side, self.cfg.rounding)

    def __call__(self, size: tuple[int, int], boxes: Tensor) -> Assignment:
        """Which objects the places of one picture learn.

        Args:
            size: (height, width) after resizing.
            boxes: (N, 4) xyxy, in pixels after resizing.
        """
        canvas = round_up(size, self.cfg.pad_divisor)
        if canvas not in self._known:
            self._known[canvas] = self._maps(canvas)
        raw = Maps(self._known[canvas], torch.tensor([size]), canvas)
        target: Target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}
        return cast(AssigningHead, self._shadow.head).assign(raw, [target])

    @torch.no_grad()
    def _maps(self, canvas: tuple[int, int]) -> tuple[Tensor, ...]:
        """Maps (1, 1, H_l, W_l) of the levels for one picture that fills a canvas; they take no memory."""
        images = torch.empty(1, self._shadow.in_chans, *canvas, device="meta")
        levels = self._shadow.neck(self._shadow.backbone(images))
        return tuple(torch.zeros(()).expand(1, 1, *level.shape[2:]) for level in levels)


class Objects(NamedTuple):
    """All N objects of a data set.

    Attributes:
        picture: (N,) position of the picture in the data set.
        labels: (N,).
        boxes: (N, 4) xyxy in pixels of the picture as it is stored.
        resized: (N, 4) in pixels after resizing.
        positives: (N, L) places of each level that learn the object.
        outdone: (N,) whether an object without positives would have some if it were alone in the picture.
    """

    picture: Tensor
    labels: Tensor
    boxes: Tensor
    resized: Tensor
    positives: Tensor
    outdone: Tensor

    @property
    def orphans(self) -> Tensor:
        """(N,) objects that no place learns."""
        return self.positives.sum(1) == 0

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
        strides: of the levels.
        places: of each level, anchors or points on all pictures together.
        class_names: of the labels.
        pictures: (image id, file name) of each.
        objects: of all pictures.
        suspicious: kind of fault to positions of objects.
        repairs: boxes that are not among the objects as they stand in the file, by what was done to them.
    """

    detector: str
    protocol: str
    source: str
    strides: tuple[int, ...]
    places: tuple[int, ...]
    class_names: tuple[str, ...]
    pictures: list[tuple[int, str]]
    objects: Objects
    suspicious: dict[str, list[int]]
    repairs: dict[str, int]

    def summary(self) -> str:
        """Tables for the terminal: objects without positives, levels, sizes, classes, suspicious boxes."""
        return _summary(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """All figures, and where each object is that no place learns or that is suspicious, JSON-able."""
        orphans = self.objects.orphans
        return {
            "detector": self.detector,
            "input": self.protocol,
            "annotations": self.source,
            "images": len(self.pictures),
            "objects": len(orphans),
            "positives_per_object": _quantiles(self.objects.positives.sum(1).float()),
            "without_positives": {
                "objects": int(orphans.sum()),
                "share": float(orphans.float().mean()) if len(orphans) else 0.0,
                "outdone_by_others": int(self.objects.outdone.sum()),
                "places": [self._place(i) for i in orphans.nonzero()[:, 0].tolist()],
            },
            "levels": [self._level(i) for i in range(len(self.strides))],
            "sizes": self._sizes(),
            "classes": self._classes(),
            "suspicious": {kind: [self._place(i) for i in rows] for kind, rows in self.suspicious.items()},
            "repairs": self.repairs,
        }

    def _place(self, index: int) -> dict[str, Any]:
        image_id, file_name = self.pictures[int(self.objects.picture[index])]
        return {
            "image_id": image_id,
            "file_name": file_name,
            "class": self.class_names[int(self.objects.labels[index])],
            "box": [round(x, 2) for x in self.objects.boxes[index].tolist()],
        }

    def _level(self, level: int) -> dict[str, Any]:
        positives = self.objects.positives[:, level]
        learned = positives > 0
        total = int(self.objects.positives.sum())
        return {
            "stride": self.strides[level],
            "places_per_image": self.places[level] / max(len(self.pictures), 1),
            "positives": int(positives.sum()),
            "share_of_positives": int(positives.sum()) / max(total, 1),
            "objects": int(learned.sum()),
            "positives_per_object": float(positives[learned].float().mean()) if learned.any() else 0.0,
            "sides_in_strides": _quantiles(self.objects.sides[learned] / self.strides[level]),
        }

    def _sizes(self) -> list[dict[str, Any]]:
        place = torch.bucketize(self.objects.sides, torch.tensor(SIZE_EDGES, dtype=torch.float32), right=True)
        edges = (0, *SIZE_EDGES, None)
        return [
            {"from": edges[i], "to": edges[i + 1], **self._share(place == i)}
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
                **self._share(self.objects.labels == label),
            }
            for label in counts.argsort(descending=True, stable=True).tolist()
        ]

    def _share(self, chosen: Tensor) -> dict[str, Any]:
        """Figures of some objects (N,) bool."""
        count = int(chosen.sum())
        return {
            "objects": count,
            "share": count / max(len(chosen), 1),
            "without_positives": int((chosen & self.objects.orphans).sum()),
            "side": _quantiles(self.objects.sides[chosen])["median"],
            "positives_per_object": float(self.objects.positives[chosen].sum() / max(count, 1)),
        }


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
    """Show which level, anchors or points each object of a data set is assigned to.

    Args:
        detector: of a one-stage family; its weights are not used, and its classes need not be the file's.
        annotations: COCO-format file.
        images: folder of its images; needed for pictures only.
        output: folder for ``explanation.json`` (``Explanation.to_dict()``) and, where ``images`` is given, pictures.
        max_images: only the first so many images of the file.
        max_pictures: how many to draw, those with the most objects that no place learns first.
        progress: show a progress bar.

    Raises:
        ValueError: for a detector whose assignment depends on predictions, or a faulty file.
        FileNotFoundError: for missing files.
    """
    assigner = Assigner(detector)
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
    places, owner = assigner(size, resized)
    per_level = [len(level) for level in places]
    positives = torch.stack(
        [torch.bincount(part[part >= 0], minlength=len(resized)) for part in owner[0].split(per_level)], dim=1
    )
    outdone = torch.zeros(len(resized), dtype=torch.bool)
    for orphan in (positives.sum(1) == 0).nonzero()[:, 0].tolist():
        outdone[orphan] = bool((assigner(size, resized[orphan, None]).owner >= 0).any())
    picture = torch.full((len(resized),), index)
    return Objects(picture, record.labels, record.boxes, resized, positives, outdone), per_level


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


def _quantiles(values: Tensor) -> dict[str, float]:
    """10 %, 50 % and 90 % of some numbers; zeros if there are none."""
    names = ("low", "median", "high")
    if not len(values):
        return dict.fromkeys(names, 0.0)
    ordered = values.sort().values
    return {n: float(ordered[round(q * (len(values) - 1))]) for n, q in zip(names, (0.1, 0.5, 0.9), strict=True)}


# --- text -------------------------------------------------------------------------------------------------------------


def _summary(data: dict[str, Any]) -> str:
    none, per_object = data["without_positives"], data["positives_per_object"]
    outdone = none["outdone_by_others"]
    classes, counts = data["classes"], [row["objects"] for row in data["classes"] if row["objects"]]
    parts = [
        f"{data['detector']}, {data['input']}: {data['annotations']}, {data['images']} images, "
        f"{data['objects']} objects, {len(classes)} classes",
        f"{none['objects']} objects ({none['share']:.1%}) without a positive: {none['objects'] - outdone} that no "
        f"anchor or point fits, {outdone} that lose theirs to other objects",
        f"positives per object: median {per_object['median']:g}, a tenth has at most {per_object['low']:g}, a tenth at "
        f"least {per_object['high']:g}",
        _table(
            [
                "stride",
                "places/image",
                "positives",
                "share",
                "objects",
                "positives/object",
                "side in strides (10% 50% 90%)",
            ],
            [_level_row(row) for row in data["levels"]],
        ),
        _table(
            ["side after resizing", *_SHARE_TITLES],
            [[f"{row['from']}..{row['to'] or ''} px", *_share_row(row)] for row in data["sizes"]],
        ),
    ]
    if counts:
        parts.append(
            f"class balance: the most frequent class has {counts[0] / counts[-1]:.3g} times the objects of the rarest, "
            f"{len(classes) - len(counts)} of {len(classes)} classes have none"
        )
        parts.append(_table(["class", *_SHARE_TITLES], [[r["class"], *_share_row(r)] for r in _ends(classes)]))
    parts += [f"suspicious: {len(rows)} x {kind} ({_where(rows)})" for kind, rows in data["suspicious"].items()]
    parts += [f"repaired: {count} x {kind}" for kind, count in data["repairs"].items()]
    return "\n\n".join(parts)


_SHARE_TITLES = ["objects", "share", "without positives", "median side", "positives/object"]


def _share_row(row: dict[str, Any]) -> list[str]:
    count = max(row["objects"], 1)
    return [
        f"{row['objects']}",
        f"{row['share']:.1%}",
        f"{row['without_positives']} ({row['without_positives'] / count:.1%})",
        f"{row['side']:.0f} px",
        f"{row['positives_per_object']:.1f}",
    ]


def _level_row(row: dict[str, Any]) -> list[str]:
    ratio = row["sides_in_strides"]
    return [
        f"{row['stride']}",
        f"{row['places_per_image']:.0f}",
        f"{row['positives']}",
        f"{row['share_of_positives']:.1%}",
        f"{row['objects']}",
        f"{row['positives_per_object']:.1f}",
        f"{ratio['low']:.1f} {ratio['median']:.1f} {ratio['high']:.1f}",
    ]


def _ends(classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The most frequent and the rarest classes, of those that have objects."""
    half, classes = _MAX_CLASSES // 2, [row for row in classes if row["objects"]]
    return classes if len(classes) <= _MAX_CLASSES else classes[:half] + classes[-half:]


def _where(rows: list[dict[str, Any]]) -> str:
    shown = [f"image id {row['image_id']}: {row['class']} {row['box']}" for row in rows[:3]]
    return "; ".join(shown) + ("; ..." if len(rows) > 3 else "")


def _table(titles: list[str], rows: list[list[str]]) -> str:
    """Columns of equal width, aligned at the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in [titles, *rows]]
    return "\n".join(lines)
