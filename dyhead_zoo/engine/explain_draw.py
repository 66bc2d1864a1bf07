"""Pictures of assignments: the objects of a photo, and who would learn them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dyhead_zoo.data import CocoDataset
from dyhead_zoo.data.transforms import resize, scale_boxes
from dyhead_zoo.engine.checkpoint import write_text
from dyhead_zoo.engine.explain import Explanation
from dyhead_zoo.engine.explain_assign import Assigner, Found, Terms

EXPLANATION_FILE = "explanation.json"
_LINE = 22  # pixels, height of a line of the legend below the photo
_OUTLINED = 3  # objects whose anchors are drawn, not only their centres
_SQUARE = 5  # pixels, half a side of the square that tells the level of a region
_LOST, _SMALL = (255, 0, 0), (255, 140, 0)
_LEVELS = ((255, 210, 0), (0, 200, 90), (0, 180, 255), (70, 80, 255), (200, 60, 255), (120, 120, 120))
"""Colours, unlike those of the objects."""


class _Entry(NamedTuple):
    """Of the legend: a mark of some shape and colour, and what it stands for."""

    text: str
    color: tuple[int, int, int]
    shape: str = "dot"  # or ring, square, cell


def write_explanation(
    explanation: Explanation, folder: Path, assigner: Assigner, dataset: CocoDataset | None, max_pictures: int
) -> None:
    """Write ``explanation.json`` and, where there are photos, one picture each of the most telling.

    Those with the most objects that no place learns come first, then those with the most that only weak places learn,
    then those with the most objects.

    Args:
        explanation: of ``dataset``.
        folder: created if need be.
        assigner: what made the explanation.
        dataset: None where there are no photos.
        max_pictures: at most so many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / EXPLANATION_FILE, json.dumps(explanation.to_dict(), indent=1) + "\n")
    if dataset is None:
        return
    objects = explanation.objects
    everything = torch.ones_like(objects.orphans)
    ranks = [
        torch.bincount(objects.picture[chosen], minlength=len(dataset)).tolist()
        for chosen in (objects.orphans, objects.only_weak, everything)
    ]
    order = sorted(range(len(dataset)), key=lambda i: [rank[i] for rank in ranks], reverse=True)
    for index in order[:max_pictures]:
        record = dataset.record(index)
        size = assigner.size(record.height, record.width)
        boxes = scale_boxes(record.boxes, (record.height, record.width), size)
        photo = resize(dataset.image(index), *size)
        picture = draw_assignment(photo, boxes, assigner(size, boxes), assigner.strides, assigner.terms)
        picture.save(folder / f"{dataset.image_ids[index]}_{record.path.stem}.jpg", quality=90)


def draw_assignment(photo: Tensor, boxes: Tensor, found: Found, strides: tuple[int, ...], terms: Terms) -> Image.Image:
    """A photo with its objects in white, and who would learn them, coloured by level.

    * A dot at each anchor's centre or point that learns an object, a ring where it is weak. Of the objects with the
      fewest anchors, the anchors themselves are drawn too. Objects that no place learns are red and crossed out.
    * With a second stage, a square at the corner of each object: the level that its region is read from.
    * Where predictions decide, nobody knows who learns what: drawn is one cell of the finest level in each object, and
      objects smaller than that are orange.

    Args:
        photo: (3, H, W) uint8, resized.
        boxes: (N, 4) xyxy in its pixels.
        found: who learns the objects of this photo.
        strides: of the levels.
        terms: of the assigner.

    Returns:
        RGB, of the photo's width, with a legend below.
    """
    picture = to_pil_image(photo).convert("RGB")
    canvas = ImageDraw.Draw(picture)
    if terms.place:
        legend = _draw_places(canvas, boxes, found, strides, terms)
    else:
        legend = _draw_cells(canvas, boxes, strides[0], terms)
    if terms.region_strides:
        for (x, y, _, _), level in zip(boxes.tolist(), found.regions.level.tolist(), strict=True):
            _draw_mark(canvas, x, y, _SQUARE, _color(level), "square")
        legend.append(_Entry("level of the object's region", (255, 255, 255), "square"))
    return _with_legend(picture, legend)


def _draw_places(
    canvas: ImageDraw.ImageDraw, boxes: Tensor, found: Found, strides: tuple[int, ...], terms: Terms
) -> list[_Entry]:
    counts = torch.bincount(found.owner[found.owner >= 0], minlength=len(boxes))
    for box, count in zip(boxes.tolist(), counts.tolist(), strict=True):
        canvas.rectangle(box, outline="white" if count else _LOST, width=2)
        if not count:
            canvas.line(box, fill=_LOST, width=2)
    outlined = [i for i in counts.argsort().tolist() if counts[i]][:_OUTLINED]
    per_level = [len(level) for level in found.places]
    parts = zip(found.places, found.owner.split(per_level), found.weak.split(per_level), strict=True)
    for level, (places, owner, weak) in enumerate(parts):
        _draw_level(canvas, places, owner, weak, outlined, level)
    legend = [_Entry(f"stride {stride}", _color(level)) for level, stride in enumerate(strides)]
    if terms.weak:
        legend.append(_Entry(terms.weak.partition(",")[0], (0, 0, 0), "ring"))
    return [*legend, _Entry(f"without a positive: {int((counts == 0).sum())}", _LOST)]


def _draw_level(
    canvas: ImageDraw.ImageDraw, places: Tensor, owner: Tensor, weak: Tensor, outlined: list[int], level: int
) -> None:
    chosen = owner >= 0
    rows = zip(places[chosen].tolist(), owner[chosen].tolist(), weak[chosen].tolist(), strict=True)
    for place, index, is_weak in rows:
        if len(place) == 4 and index in outlined:
            canvas.rectangle(place, outline=_color(level))
        x, y = place if len(place) == 2 else ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
        _draw_mark(canvas, x, y, 2 + level, _color(level), "ring" if is_weak else "dot")


def _draw_cells(canvas: ImageDraw.ImageDraw, boxes: Tensor, stride: int, terms: Terms) -> list[_Entry]:
    small = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() < stride
    for box, is_small in zip(boxes.tolist(), small.tolist(), strict=True):
        canvas.rectangle(box, outline=_SMALL if is_small else "white", width=2)
        x, y = ((side // stride + 0.5) * stride for side in ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
        _draw_mark(canvas, x, y, stride / 2, _color(0), "cell")
    legend = [_Entry(f"a cell of stride {stride}", _color(0), "cell")]
    legend.append(_Entry(f"smaller than a cell: {int(small.sum())}", _SMALL, "cell"))
    queries = terms.limits["queries"]
    beyond = max(len(boxes) - queries, 0)
    return [*legend, *([_Entry(f"more objects than the {queries} queries: {beyond}", _LOST)] if beyond else [])]


def _draw_mark(
    canvas: ImageDraw.ImageDraw, x: float, y: float, radius: float, color: tuple[int, int, int], shape: str
) -> None:
    corners = (x - radius, y - radius, x + radius, y + radius)
    if shape == "dot":
        canvas.ellipse(corners, fill=color, outline="black")
    elif shape == "ring":
        canvas.ellipse(corners, outline=color, width=2)
    elif shape == "square":
        canvas.rectangle(corners, fill=color, outline="black")
    else:
        canvas.rectangle(corners, outline=color)


def _with_legend(picture: Image.Image, legend: list[_Entry]) -> Image.Image:
    """The picture with as many lines below it as the legend needs."""
    font = ImageFont.load_default(size=13)
    places, x, line = [], 6.0, 0
    for entry in legend:
        step = 26 + font.getlength(entry.text)
        if x > 6 and x + step > picture.width:
            x, line = 6.0, line + 1
        places.append((x, picture.height + line * _LINE))
        x += step
    result = Image.new("RGB", (picture.width, picture.height + (line + 1) * _LINE), "white")
    result.paste(picture)
    canvas = ImageDraw.Draw(result)
    for entry, (left, top) in zip(legend, places, strict=True):
        _draw_mark(canvas, left + 5, top + 11, 5, entry.color, entry.shape)
        canvas.text((left + 14, top + 3), entry.text, fill="black", font=font)
    return result


def _color(level: int) -> tuple[int, int, int]:
    return _LEVELS[level % len(_LEVELS)]
