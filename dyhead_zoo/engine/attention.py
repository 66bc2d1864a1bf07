"""A picture of what DyHead's attentions do on one photo."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dyhead_zoo.data import prepare_images
from dyhead_zoo.detector import Detector
from dyhead_zoo.engine.draw import class_color
from dyhead_zoo.layers.dyhead import BlockAttention
from dyhead_zoo.layers.fpn import DyHeadNeck

_PHOTO = 720  # pixels, width of the photo
_CHARTS = 500  # pixels, width of the charts beside it
_ROW = 110  # pixels, height of the charts of one block
_COLORS = ((220, 60, 50), (40, 110, 220), (40, 150, 80), (230, 150, 20), (130, 80, 190), (90, 90, 90))  # of blocks


class SamplingPoints(NamedTuple):
    """Where the nine taps of a deformable convolution look from one cell.

    Attributes:
        points: (9, 2), x and y in pixels of the padded image.
        masks: (9,), their factors, in 0..1.
    """

    points: Tensor
    masks: Tensor


def sampling_points(
    attention: BlockAttention, level: int, cell: tuple[int, int], stride: int, image: int = 0
) -> SamplingPoints:
    """Taps of the branch that stays on its level.

    Args:
        attention: of one block.
        level: index of ``attention.offsets``; 0 in the paper's formulation, which has one set for all levels.
        cell: (y, x) on the map of that level.
        stride: of that map, in pixels.
        image: index in the batch.

    Raises:
        ValueError: if the block's spatial attention is switched off.
    """
    if not attention.offsets:
        raise ValueError("this block has no spatial attention (spatial=False): it samples a plain 3x3 grid")
    y, x = cell
    offset = attention.offsets[level][image, :, y, x].view(9, 2)
    taps = torch.tensor([(x + k % 3 - 1, y + k // 3 - 1) for k in range(9)], device=offset.device)
    return SamplingPoints((taps + offset.flip(1) + 0.5) * stride, attention.masks[level][image, :, y, x])


def draw_attention(detector: Detector, image: Tensor, *, top: int = 3, score_threshold: float = 0.0) -> Image.Image:
    """The photo with the sampling points of its best detections, beside charts of scale and task attention.

    Points have the colour of their block, which the charts show, and an area that grows with their mask. They are those
    of the cell at the centre of a detection, on the level whose stride suits its size best. The charts show, for each
    block, the weight of each branch per level, and the mean over the channels of the task attention's slopes a1 and a2.

    Args:
        detector: with DyHead.
        image: (3, H, W) uint8, RGB.
        top: number of detections.
        score_threshold: leave out detections below it.

    Raises:
        ValueError: for a detector without DyHead.
    """
    ((_, batch),) = prepare_images([image], detector.pretrained_cfg, 1)
    trace = detector.attention(batch.images.to(detector.device), batch.image_sizes.to(detector.device))
    (found,) = detector.predict(image, score_threshold=score_threshold)
    height, width = (int(side) for side in batch.image_sizes[0])
    zoom = _PHOTO / width
    photo = to_pil_image(batch.images[0, :, :height, :width]).resize((_PHOTO, round(height * zoom)))
    canvas = ImageDraw.Draw(photo)
    strides = cast(DyHeadNeck, detector.neck).strides
    for box, label in zip(found.boxes[:top] * (width / image.shape[2]), found.labels[:top].tolist(), strict=True):
        canvas.rectangle((box * zoom).tolist(), outline=class_color(label), width=3)
        for number, block in enumerate(trace):
            if block.offsets:
                _draw_points(canvas, block, box, strides, zoom, _COLORS[number % len(_COLORS)])
    picture = Image.new("RGB", (_PHOTO + _CHARTS, max(photo.height, _ROW * len(trace) + 30)), "white")
    picture.paste(photo)
    for number, block in enumerate(trace):
        _draw_charts(ImageDraw.Draw(picture), block, number, strides)
    return picture


def _draw_points(
    canvas: ImageDraw.ImageDraw,
    block: BlockAttention,
    box: Tensor,
    strides: tuple[int, ...],
    zoom: float,
    color: tuple[int, int, int],
) -> None:
    single = len(block.offsets) == 1  # the paper's formulation samples at the median level
    side = float((box[2:] - box[:2]).clamp(min=1).prod().sqrt())
    level = min(range(len(strides)), key=lambda i: abs(side / (8 * strides[i]) - 1))  # ATSS's anchors: 8 strides a side
    stride = strides[len(strides) // 2] if single else strides[level]
    index = 0 if single else level
    limit = block.offsets[index].shape[-2:]
    cell = [min(int(c / stride), size - 1) for c, size in zip(((box[:2] + box[2:]) / 2).flip(0), limit, strict=True)]
    found = sampling_points(block, index, (cell[0], cell[1]), stride)
    for (x, y), mask in zip((found.points * zoom).tolist(), found.masks.tolist(), strict=True):
        radius = 2 + 8 * mask**0.5
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), outline="white", fill=color)


def _draw_charts(canvas: ImageDraw.ImageDraw, block: BlockAttention, number: int, strides: tuple[int, ...]) -> None:
    """One row: bars of the branch weights of each level, and the mean slopes of the task attention."""
    font = ImageFont.load_default(size=12)
    left, top = _PHOTO + 14, 10 + number * _ROW
    color = _COLORS[number % len(_COLORS)]
    canvas.text((left, top), f"block {number + 1}", fill=color, font=font)
    canvas.text((left + 60, top), "scale: weight of own (o), finer (f), coarser (c) level", fill="black", font=font)
    base, x = top + 66, left
    for level, weights in enumerate(block.scale):
        name = f"P{round(math.log2(strides[level]))}" if len(block.scale) > 1 else "per level"
        canvas.text((x, base + 2), name, fill="black", font=font)
        branches = "o" + "f" * (level > 0) + "c" * (level + 1 < len(block.scale))
        if len(block.scale) == 1:  # the paper's formulation: one weight per level
            branches = " " * weights.shape[1]
        for weight, branch in zip(weights[0].tolist(), branches, strict=True):
            canvas.rectangle((x, base - 46 * weight, x + 16, base), fill=color)
            canvas.text((x - 1, base - 46 * weight - 15), f"{weight:.2f}".removeprefix("0"), fill="black", font=font)
            canvas.text((x + 5, base - 16), branch, fill="white", font=font)
            x += 24
        x += 14
    slopes = "  ".join(f"{c[0, 0].mean():.2f} / {c[0, 2].mean():.2f}" for c in block.task)
    canvas.text((left, base + 18), f"task: mean a1 / a2  {slopes}", fill="black", font=font)
