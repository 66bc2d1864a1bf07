"""Reading COCO-format detection data: every fault is an error that says where, or a repair that is counted.

Boxes become xyxy in absolute pixels and category ids become labels here, and nowhere else.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dyhead_zoo.data.images import ImageCache, image_size, read_image
from dyhead_zoo.data.label_space import LabelSpace
from dyhead_zoo.ops.masks import compress_segmentation, decode_counts, encode_box
from dyhead_zoo.structures import Sample

CLIP_TOLERANCE = 0.05
"""Boxes that pass the border by no more than this many pixels are clipped without being counted: files round."""

Check = Literal["none", "exists", "size"]


class ImageRecord(NamedTuple):
    """What the annotation file says of one picture.

    Attributes:
        image_id: the file's id.
        path: of the picture, within the image folder.
        height, width: in pixels, upright.
        boxes: (N, 4) float32 xyxy within the picture, none empty.
        labels: (N,) int64 in the data set's label space.
        crowd_boxes: (M, 4) float32 regions marked ``iscrowd``; ``crowd_labels`` (M,) int64.
    """

    image_id: int
    path: Path
    height: int
    width: int
    boxes: Tensor
    labels: Tensor
    crowd_boxes: Tensor
    crowd_labels: Tensor


@dataclass
class DataReport:
    """What was found in a file: totals, repairs and remarks, each with a few examples of where.

    Attributes:
        source: the annotation file.
        totals: images, boxes, crowd regions, ... that are in use.
        repairs: number of repairs of each kind; ``strict=True`` makes each an error instead.
        remarks: number of things that are no fault but should be known.
        examples: up to ``max_examples`` places for each kind of either.
    """

    source: str
    totals: dict[str, int] = field(default_factory=dict)
    repairs: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    max_examples: int = 3

    def repaired(self, kind: str, where: str) -> None:
        """Count a repair."""
        self.repairs[kind] += 1
        self._example(kind, where)

    def remark(self, kind: str, where: str) -> None:
        """Count a remark."""
        self.remarks[kind] += 1
        self._example(kind, where)

    def _example(self, kind: str, where: str) -> None:
        places = self.examples.setdefault(kind, [])
        if len(places) < self.max_examples:
            places.append(where)

    def summary(self) -> str:
        """Several lines for a log: totals first, then what was repaired and remarked, with examples."""
        lines = [f"{self.source}: " + ", ".join(f"{count} {what}" for what, count in self.totals.items())]
        for title, counts in (("repaired", self.repairs), ("note", self.remarks)):
            for kind, count in sorted(counts.items()):
                more = ", ..." if count > len(self.examples[kind]) else ""
                lines.append(f"  {title}: {count} x {kind} ({', '.join(self.examples[kind])}{more})")
        return "\n".join(lines)


class CocoDataset:
    """Pictures with boxes, from a folder and a COCO-format file.

    ``dataset[i]`` is a ``Sample``: picture, boxes, labels and, if asked for, masks, without crowd regions;
    ``dataset.record(i)`` is what the file says, without reading the picture.

    Errors, because they cannot be repaired: malformed JSON; missing or mistyped fields; ids that repeat or refer to
    nothing; file names that leave the folder; missing files; pictures whose upright size is not the one in the file
    (their boxes belong to another frame). Repairs, counted in ``report``: boxes that reach outside the picture are
    clipped; boxes that are not finite, empty or wholly outside are dropped; an object without a segmentation, in a file
    that has them, gets its box as its mask.

    Args:
        images_dir: folder of the pictures.
        annotations: the JSON file.
        label_space: labels by *name*, e.g. a model's. One of the two sets of names must contain the other: objects of
            classes that it lacks are dropped (and counted as a remark); classes that the file lacks stay empty. If
            each has a name that the other has not, that is an error listing both. Default: the file's categories,
            by ascending id.
        class_names: short for ``label_space=LabelSpace.from_names(class_names)``.
        strict: make every repair an error.
        check: what to verify of every picture now rather than when it is read: ``"none"``, that it ``"exists"``, or
            also its ``"size"`` (opens every file's header).
        cache: keep decoded pictures in memory, three bytes a pixel; see ``ImageCache``.
        max_images: take only the first so many images of the file.
        masks: read the objects' segmentations too: polygons and both forms of RLE. Segmentations are neither read nor
            checked otherwise.

    Attributes:
        label_space: names in label order, with *this file's* category ids (classes that the file lacks get unused
            ids), so that results written with it match the file.
        report: ``DataReport``.

    Raises:
        FileNotFoundError: for a missing folder, file or picture.
        ValueError: for anything else; the message starts with the file and says where in it.
    """

    def __init__(
        self,
        images_dir: str | PathLike[str],
        annotations: str | PathLike[str],
        *,
        label_space: LabelSpace | None = None,
        class_names: Sequence[str] | None = None,
        strict: bool = False,
        check: Check = "exists",
        cache: bool = False,
        max_images: int | None = None,
        masks: bool = False,
    ) -> None:
        self.images_dir = Path(images_dir)
        self.annotations = Path(annotations)
        if not self.images_dir.is_dir():
            raise FileNotFoundError(f"image folder {str(images_dir)!r} does not exist or is no folder")
        if label_space is not None and class_names is not None:
            raise ValueError("give label_space or class_names, not both")
        if class_names is not None:
            label_space = LabelSpace.from_names(class_names)
        self._root = os.path.realpath(self.images_dir)
        if max_images is not None and max_images < 1:
            raise ValueError(f"max_images={max_images} must be at least 1, or None for all")
        reader = _Reader(self.annotations, strict, masks)
        self.report = reader.report
        self.label_space = reader.read(label_space, max_images)
        self.image_ids = [image.image_id for image in reader.images]
        self._names = [image.file_name for image in reader.images]
        self._sizes = [(image.height, image.width) for image in reader.images]
        self._boxes, self._labels, self._crowd, self._offsets = reader.arrays()
        self._counts = reader.counts() if masks else None
        self._check(check)
        self._cache = ImageCache(self._sizes) if cache else None

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sample:
        record = self.record(index)
        return Sample(self.image(index), record.boxes, record.labels, self.masks(index))

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of picture ``index`` in pixels, without reading it."""
        return self._sizes[index]

    def path(self, index: int) -> Path:
        """Where picture ``index`` is.

        Raises:
            ValueError: if symbolic links lead out of the image folder.
        """
        path = self.images_dir / self._names[index]
        if os.path.commonpath([self._root, os.path.realpath(path)]) != self._root:
            raise ValueError(
                f"{self.annotations}: image id {self.image_ids[index]}: {str(path)!r} links to a place outside the "
                f"image folder: copy the files into the folder, or give the folder that really holds them"
            )
        return path

    def record(self, index: int) -> ImageRecord:
        """What the file says of picture ``index``; negative indices count from the end."""
        index = range(len(self))[index]
        rows = slice(self._offsets[index], self._offsets[index + 1])
        boxes, labels, crowd = self._boxes[rows], self._labels[rows], self._crowd[rows]
        single = ~crowd
        return ImageRecord(
            self.image_ids[index], self.path(index), *self._sizes[index],
            boxes[single], labels[single], boxes[crowd], labels[crowd],
        )  # fmt: skip

    def masks(self, index: int) -> Tensor | None:
        """Masks (N, H, W) bool of the objects of picture ``index``, those of its record; None unless asked for."""
        if self._counts is None:
            return None
        index = range(len(self))[index]
        rows = range(self._offsets[index], self._offsets[index + 1])
        return decode_counts([self._counts[row] for row in rows if not self._crowd[row]], *self._sizes[index])

    def image(self, index: int) -> Tensor:
        """Picture ``index``, (3, H, W) uint8, not to be written to.

        Raises:
            FileNotFoundError, ValueError: if it cannot be read or has not the size that the annotations say.
        """
        index = range(len(self))[index]
        image = self._cache.get(index) if self._cache is not None else None
        if image is None:
            image = read_image(self.path(index))
            self._check_size(index, (image.shape[1], image.shape[2]))
            if self._cache is not None:
                self._cache.put(index, image)
        return image

    def _check(self, check: Check) -> None:
        if check not in ("none", "exists", "size"):
            raise ValueError(f"check={check!r}: one of 'none', 'exists', 'size'")
        if check == "none":
            return
        missing = [name for i, name in enumerate(self._names) if not os.path.isfile(self.path(i))]
        if missing:
            raise FileNotFoundError(
                f"{self.annotations}: {len(missing)} of {len(self)} images are not in {str(self.images_dir)!r}, "
                f"e.g. {missing[:3]}: is it the right folder?"
            )
        if check == "size":
            for i in range(len(self)):
                self._check_size(i, image_size(self.path(i)))

    def _check_size(self, index: int, found: tuple[int, int]) -> None:
        if found != self._sizes[index]:
            height, width = self._sizes[index]
            raise ValueError(
                f"{self.annotations}: image id {self.image_ids[index]} is said to be {width} x {height}, but "
                f"{str(self.path(index))!r} is {found[1]} x {found[0]} (width x height, upright by its EXIF tag), so "
                f"its boxes belong to another picture: correct the annotations, or rewrite the picture without the tag"
            )


class _Image(NamedTuple):
    image_id: int
    file_name: str
    height: int
    width: int


class _Row(NamedTuple):
    """One annotation; ``counts``: of its mask as a compressed RLE, "" where it is not read."""

    box: tuple[float, ...]
    label: int
    crowd: bool
    counts: str


class _Reader:
    """One pass over an annotation file."""

    def __init__(self, path: Path, strict: bool, masks: bool) -> None:
        self.path = path
        self.strict = strict
        self.masks = masks
        self.report = DataReport(str(path))
        self.images: list[_Image] = []
        self._rows: list[list[_Row]] = []

    def read(self, wanted: LabelSpace | None, max_images: int | None) -> LabelSpace:
        """Check the whole file; fill ``images`` and the boxes. Returns the label space in use."""
        content = self._json()
        space, label_of = self._labels(self._list(content, "categories"), wanted)
        position_of = self._images(self._list(content, "images"))
        self._annotations(self._list(content, "annotations"), position_of, label_of)
        left_out: dict[str, int] = {}
        if max_images is not None and max_images < len(self.images):
            left_out = {"images left out by max_images": len(self.images) - max_images}
            self.images, self._rows = self.images[:max_images], self._rows[:max_images]
        crowd = sum(row.crowd for rows in self._rows for row in rows)
        self.report.totals = {
            "images": len(self.images),
            "boxes": sum(map(len, self._rows)) - crowd,
            "crowd regions": crowd,
            "classes": len(space),
            "images without objects": sum(all(row.crowd for row in rows) for rows in self._rows),
            **left_out,
        }
        return space

    def arrays(self) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Boxes (M, 4), labels (M,), crowd flags (M,) of all images in order, and where each image's rows start."""
        rows = [row for rows in self._rows for row in rows]
        offsets = [0]
        for image_rows in self._rows:
            offsets.append(offsets[-1] + len(image_rows))
        boxes = torch.tensor([row.box for row in rows], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([row.label for row in rows], dtype=torch.int64)
        return boxes, labels, torch.tensor([row.crowd for row in rows], dtype=torch.bool), offsets

    def counts(self) -> list[str]:
        """Of the rows of ``arrays``."""
        return [row.counts for rows in self._rows for row in rows]

    def _error(self, where: str, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {where}: {problem}")

    def _repair(self, kind: str, where: str) -> None:
        if self.strict:
            raise self._error(where, f"{kind} (strict=False would repair and count it)")
        self.report.repaired(kind, where)

    def _json(self) -> dict[str, Any]:
        if not self.path.is_file():
            raise FileNotFoundError(f"no such annotation file: {str(self.path)!r}")
        try:
            content = json.loads(self.path.read_bytes().decode("utf-8-sig"))
        except OSError as error:
            raise ValueError(f"cannot read {self.path} ({error.strerror}): check its permissions") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path} is not valid JSON ({error}): truncated, or another format?") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"{self.path} holds a {type(content).__name__}, not an object with 'images', 'annotations' and "
                f"'categories': a results file rather than annotations?"
            )
        return content

    def _list(self, content: Mapping[str, Any], key: str) -> list[Any]:
        rows = content.get(key)
        if not isinstance(rows, list):
            found = f"it is {type(rows).__name__}" if key in content else f"the file has {sorted(content)}"
            raise ValueError(f"{self.path}: {key!r} must be a list, but {found}: is this COCO instances format?")
        for position, row in enumerate(rows):
            if not isinstance(row, dict):
                raise self._error(f"{key}[{position}]", f"expected an object, got {row!r:.80}")
        return rows

    def _field(self, row: Mapping[str, Any], key: str, where: str) -> Any:
        if key not in row:
            raise self._error(where, f"{key!r} is missing; it has {sorted(row)}")
        return row[key]

    def _integer(self, row: Mapping[str, Any], key: str, where: str) -> int:
        value = self._field(row, key, where)
        if type(value) is not int or abs(value) >= 2**63:
            raise self._error(where, f"{key}={value!r:.80} must be an integer")
        return value

    def _string(self, row: Mapping[str, Any], key: str, where: str) -> str:
        value = self._field(row, key, where)
        if not isinstance(value, str) or not value:
            raise self._error(where, f"{key}={value!r:.80} must be a string that is not empty")
        return value

    def _unique(self, seen: dict[int, int], key: str, position: int, value: int) -> None:
        if value in seen:
            raise self._error(f"{key}[{position}]", f"id {value} was already used by {key}[{seen[value]}]")
        seen[value] = position

    def _labels(self, rows: list[Any], wanted: LabelSpace | None) -> tuple[LabelSpace, dict[int, int | None]]:
        """The label space in use, and the label (or None: not wanted) of each category id."""
        seen: dict[int, int] = {}
        name_of: dict[int, str] = {}
        for position, row in enumerate(rows):
            where = f"categories[{position}]"
            category_id = self._integer(row, "id", where)
            self._unique(seen, "categories", position, category_id)
            name = self._string(row, "name", where)
            if name in name_of.values():
                raise self._error(where, f"the name {name!r} is used by two categories: merge them, or rename one")
            name_of[category_id] = name
        if not name_of:
            raise ValueError(f"{self.path}: 'categories' is empty, so labels have no meaning")
        if wanted is None:
            space = LabelSpace.from_categories(rows)
            return space, {category_id: label for label, category_id in enumerate(space.category_ids)}
        return self._match(name_of, wanted)

    def _match(self, name_of: dict[int, str], wanted: LabelSpace) -> tuple[LabelSpace, dict[int, int | None]]:
        """Labels by name, with this file's ids; either set of names must contain the other."""
        id_of = {name: category_id for category_id, name in name_of.items()}
        only_wanted = [name for name in wanted.names if name not in id_of]
        only_file = [name for name in id_of if name not in wanted.names]
        if only_wanted and only_file:
            raise ValueError(
                f"{self.path}: class names do not match. Only in the label space: {only_wanted}. Only in the file: "
                f"{only_file}. Rename the file's categories, or give class_names= with names from the file"
            )
        for name in only_wanted:
            self.report.remark("class without a category in the file", repr(name))
        next_id = max(name_of) + 1
        spare = {name: next_id + k for k, name in enumerate(only_wanted)}
        label_of = {label_name: label for label, label_name in enumerate(wanted.names)}
        space = LabelSpace(wanted.names, tuple(id_of.get(name, spare.get(name, 0)) for name in wanted.names))
        return space, {category_id: label_of.get(name) for category_id, name in name_of.items()}

    def _images(self, rows: list[Any]) -> dict[int, int]:
        """Fill ``images``; returns the position of each image id."""
        position_of: dict[int, int] = {}
        names: dict[str, int] = {}
        for position, row in enumerate(rows):
            where = f"images[{position}]"
            image_id = self._integer(row, "id", where)
            self._unique(position_of, "images", position, image_id)
            where = f"image id {image_id}"
            height, width = self._integer(row, "height", where), self._integer(row, "width", where)
            if not (0 < height < 2**24 and 0 < width < 2**24):
                raise self._error(where, f"height={height}, width={width}: not the size of a picture")
            name = self._string(row, "file_name", where)
            self._check_name(name, where)
            if name in names:
                self.report.remark("file listed again under another image id", f"{where}: {name!r}")
            names[name] = image_id
            self.images.append(_Image(image_id, name, height, width))
        if not self.images:
            raise ValueError(f"{self.path}: 'images' is empty")
        self._rows = [[] for _ in self.images]
        return position_of

    def _check_name(self, name: str, where: str) -> None:
        """Lexically inside the folder on every system, so that a file cannot make us read elsewhere."""
        posix, windows = PurePosixPath(name), PureWindowsPath(name)
        if posix.is_absolute() or windows.drive or windows.root or ".." in posix.parts + windows.parts:
            problem = "leaves the image folder: names must be relative, without '..'"
        elif "\0" in name or not _encodable(name):
            problem = "cannot be the name of a file"
        else:
            return
        raise self._error(where, f"file_name={name!r:.200} {problem}")

    def _annotations(self, rows: list[Any], position_of: dict[int, int], label_of: Mapping[int, int | None]) -> None:
        seen: dict[int, int] = {}
        if self.masks and rows and not any(row.get("segmentation") for row in rows):
            raise ValueError(
                f"{self.path}: no object has a segmentation, but masks are asked for: take a detector without masks, "
                f"e.g. faster_rcnn_resnet50 instead of mask_rcnn_resnet50, or a file that has them"
            )
        for position, row in enumerate(rows):
            annotation_id = self._integer(row, "id", f"annotations[{position}]")
            self._unique(seen, "annotations", position, annotation_id)
            where = f"annotation id {annotation_id}"
            image_id, category_id = self._integer(row, "image_id", where), self._integer(row, "category_id", where)
            if image_id not in position_of:
                raise self._error(where, f"image_id={image_id} is not among the images")
            if category_id not in label_of:
                raise self._error(where, f"category_id={category_id} is not among the categories")
            crowd = row.get("iscrowd", 0)
            if crowd not in (0, 1):
                raise self._error(where, f"iscrowd={crowd!r:.80} must be 0 or 1")
            image = position_of[image_id]
            box = self._box(self._field(row, "bbox", where), self.images[image], where)
            label = label_of[category_id]
            if label is None:
                self.report.remark("object of a class outside the label space", where)
            elif box is not None:
                counts = self._mask(row, box, self.images[image], where) if self.masks and not crowd else ""
                self._rows[image].append(_Row(box, label, bool(crowd), counts))

    def _mask(self, row: Mapping[str, Any], box: tuple[float, ...], image: _Image, where: str) -> str:
        """The object's segmentation, or its box where it has none, as compressed counts."""
        try:
            counts = compress_segmentation(row.get("segmentation"), image.height, image.width)
        except ValueError as error:
            raise self._error(where, str(error)) from error
        if counts is not None:
            return counts
        self._repair("object without a segmentation: its box is its mask", where)
        return encode_box(box, image.height, image.width)["counts"]

    def _box(self, bbox: Any, image: _Image, where: str) -> tuple[float, ...] | None:
        """xywh to xyxy within the image, or None if nothing is left of it."""
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(type(v) in (int, float) for v in bbox):
            raise self._error(where, f"bbox={bbox!r:.80} must be a list of four numbers: x, y, width, height")
        x, y, width, height = map(_to_float, bbox)
        box = (x, y, x + width, y + height)
        right, bottom = image.width, image.height
        clipped = _to_float32((_clip(x, right), _clip(y, bottom), _clip(box[2], right), _clip(box[3], bottom)))
        fault = None
        if not all(map(math.isfinite, (x, y, width, height))):
            fault = "box dropped: not finite"
        elif width <= 0 or height <= 0:
            fault = "box dropped: width or height is not positive"
        elif clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
            fault = "box dropped: outside the image, or too small for float32"
        elif max(-x, -y, box[2] - right, box[3] - bottom) > CLIP_TOLERANCE:
            self._repair("box clipped to the image", f"{where}, image id {image.image_id}, bbox={bbox!r:.120}")
        if fault is None:
            return clipped
        self._repair(fault, f"{where}, image id {image.image_id}, bbox={bbox!r:.120}")
        return None


def _clip(value: float, limit: float) -> float:
    return min(max(value, 0.0), limit)


def _encodable(name: str) -> bool:
    """Whether the file system can express the name: JSON admits lone surrogates, which it cannot."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _to_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON integers have no limit
        return math.inf


def _to_float32(box: Sequence[float]) -> tuple[float, ...]:
    """Rounded as it will be stored, so that what is checked is what is kept."""
    return struct.unpack("4f", struct.pack("4f", *box))
