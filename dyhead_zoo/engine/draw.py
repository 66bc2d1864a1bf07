"""Pictures of detections: boxes and masks in the colour of their class, labels that can be read at any image size."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dyhead_zoo.ops.masks import mask_windows
from dyhead_zoo.structures import Detections

_GOLDEN_ANGLE = 0.381966  # of a turn; successive multiples never come close to one another
_MIN_FONT_SIZE = 11
_MASK_OPACITY = 0.45


def class_color(label: int) -> tuple[int, int, int]:
    """The RGB colour of a class: the same in every picture, and far from that of its neighbours."""
    red, green, blue = colorsys.hsv_to_rgb((label * _GOLDEN_ANGLE) % 1.0, 0.85 if label % 2 else 0.65, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(image: Image.Image, detections: Detections, names: Sequence[str]) -> Image.Image:
    """A copy of a picture with its detections drawn on it, the best on top.

    Args:
        image: of any mode; the result is RGB of the same size.
        detections: boxes in pixels of ``image``; masks, if there are any, are painted translucently.
        names: class name of each label.
    """
    picture = image.convert("RGB")  # always a copy, so that the caller's image stays clean
    _paint_masks(picture, detections)
    canvas = ImageDraw.Draw(picture)
    short_side = min(picture.size)
    line = max(2, round(short_side / 200))
    font = ImageFont.load_default(size=max(_MIN_FONT_SIZE, round(short_side / 35)))
    rows = list(
        zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True),
    )
    for box, _, label in reversed(rows):
        canvas.rectangle(_ordered(box), outline=class_color(label), width=line)
    for box, score, label in reversed(rows):  # after all boxes: no line may cross a text
        _draw_label(canvas, picture.size, box, f"{names[label]} {score:.2f}", class_color(label), font)
    return picture


def _paint_masks(picture: Image.Image, detections: Detections) -> None:
    if detections.masks is None:
        return
    masks, boxes = detections.masks.flip(0).cpu(), detections.boxes.flip(0).cpu()
    windows = mask_windows(masks, boxes, picture.height, picture.width)
    for (top, left, values), label in zip(windows, reversed(detections.labels.tolist()), strict=True):
        if values.numel():
            opacity = (values >= 0.5).numpy() * np.uint8(255 * _MASK_OPACITY)
            picture.paste(class_color(label), (left, top), Image.fromarray(opacity))


def _ordered(box: Sequence[float]) -> tuple[float, float, float, float]:
    """PIL refuses boxes whose right or bottom edge comes first."""
    x1, y1, x2, y2 = box
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _draw_label(
    canvas: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: Sequence[float],
    text: str,
    color: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Text on a plate in the class colour: above the box, or in it where there is no room, never off the picture."""
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0, min(box[0], size[0] - width))
    y = box[1] - height if box[1] >= height else max(0, min(box[1], size[1] - height))
    canvas.rectangle((x, y, x + width, y + height), fill=color)
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    canvas.text((x + 2 - left, y + 2 - top), text, fill="black" if luminance > 140 else "white", font=font)
