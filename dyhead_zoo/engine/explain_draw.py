"""Pictures of assignments: the objects of a photo, and the anchors or points that would learn them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dyhead_zoo.data import CocoDataset
from dyhead_zoo.data.transforms import resize, scale_boxes
from dyhead_zoo.engine.checkpoint import write_text
from dyhead_zoo.engine.explain import Assigner, Explanation
from dyhead_zoo.layers.targets import Assignment

EXPLANATION_FILE = "explanation.json"
_LEGEND = 22  # pixels, height of the strip below the photo
_OUTLINED = 3  # objects whose anchors are drawn, not only their centres
_LOST = (255, 0, 0)


def write_explanation(
    explanation: Explanation, folder: Path, assigner: Assigner, dataset: CocoDataset | None, max_pictures: int
) -> None:
    """Write ``explanation.json`` and, where there are photos, one picture each of the most telling.

    Those with the most objects that no place learns come first, then those with the most objects.

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
    lost = torch.bincount(objects.picture[objects.orphans], minlength=len(dataset))
    total = torch.bincount(objects.picture, minlength=len(dataset))
    order = sorted(range(len(dataset)), key=lambda i: (int(lost[i]), int(total[i])), reverse=True)
    for index in order[:max_pictures]:
        record = dataset.record(index)
        size = assigner.size(record.height, record.width)
        boxes = scale_boxes(record.boxes, (record.height, record.width), size)
        photo = resize(dataset.image(index), *size)
        picture = draw_assignment(photo, boxes, assigner(size, boxes), assigner.strides)
        picture.save(folder / f"{dataset.image_ids[index]}_{record.path.stem}.jpg", quality=90)


def draw_assignment(photo: Tensor, boxes: Tensor, assignment: Assignment, strides: Sequence[int]) -> Image.Image:
    """A photo with its objects, and a dot at each anchor's centre or point that learns one, coloured by level.

    Objects are white, those that no place learns are red and crossed out. Of the objects with the fewest anchors, the
    anchors themselves are drawn too.

    Args:
        photo: (3, H, W) uint8, resized.
        boxes: (N, 4) xyxy in its pixels.
        assignment: of this one photo.
        strides: of the levels.

    Returns:
        RGB, of the photo's size with a legend below.
    """
    _, height, width = photo.shape
    picture = Image.new("RGB", (width, height + _LEGEND), "white")
    picture.paste(to_pil_image(photo))
    canvas = ImageDraw.Draw(picture)
    owners = assignment.owner[0].split([len(level) for level in assignment.places])
    counts = torch.bincount(assignment.owner[assignment.owner >= 0], minlength=len(boxes))
    for box, count in zip(boxes.tolist(), counts.tolist(), strict=True):
        canvas.rectangle(box, outline="white" if count else _LOST, width=2)
        if not count:
            canvas.line(box, fill=_LOST, width=2)
    outlined = [i for i in counts.argsort().tolist() if counts[i]][:_OUTLINED]
    for level, (places, owner) in enumerate(zip(assignment.places, owners, strict=True)):
        _draw_level(canvas, places, owner, outlined, level)
    canvas.rectangle((0, height, width, height + _LEGEND), fill="white")  # places may lie beyond the photo
    _draw_legend(canvas, height, strides, int((counts == 0).sum()))
    return picture


def _draw_level(canvas: ImageDraw.ImageDraw, places: Tensor, owner: Tensor, outlined: list[int], level: int) -> None:
    color, radius = _level_color(level), 2 + level
    for place, index in zip(places[owner >= 0].tolist(), owner[owner >= 0].tolist(), strict=True):
        if len(place) == 4 and index in outlined:
            canvas.rectangle(place, outline=color)
        x, y = place if len(place) == 2 else ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline="black")


def _draw_legend(canvas: ImageDraw.ImageDraw, top: int, strides: Sequence[int], lost: int) -> None:
    font = ImageFont.load_default(size=13)
    x = 6.0
    texts = [(f"stride {stride}", _level_color(level)) for level, stride in enumerate(strides)]
    for text, color in [*texts, (f"without a positive: {lost}", _LOST)]:
        canvas.ellipse((x, top + 6, x + 10, top + 16), fill=color, outline="black")
        canvas.text((x + 14, top + 3), text, fill="black", font=font)
        x += 26 + canvas.textlength(text, font=font)


def _level_color(level: int) -> tuple[int, int, int]:
    """Unlike the colours of the objects."""
    return ((255, 210, 0), (0, 200, 90), (0, 180, 255), (70, 80, 255), (200, 60, 255), (120, 120, 120))[level % 6]
