"""Anchors and points on a pyramid, and the box coding relative to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_SCALE = abs(math.log(16 / 1000))
"""Limit of the predicted log size ratio, so that exp cannot overflow (detectron's and mmdet's constant)."""


def grid_points(size: tuple[int, int], stride: int | tuple[int, int], offset: float, like: Tensor) -> Tensor:
    """Points ``((x + offset) * stride, (y + offset) * stride)`` of a map of (height, width) ``size``: (H * W, 2).

    x comes first within a point; rows run over y, then x; dtype float32 on the device of ``like``. ``stride`` may be
    one number or two, of y and x.
    """
    stride_y, stride_x = (stride, stride) if isinstance(stride, int) else stride
    y = (torch.arange(size[0], device=like.device, dtype=torch.float32) + offset) * stride_y
    x = (torch.arange(size[1], device=like.device, dtype=torch.float32) + offset) * stride_x
    return torch.stack((x[None, :].expand(*size), y[:, None].expand(*size)), dim=-1).reshape(-1, 2)


@dataclass(frozen=True)
class AnchorGenerator:
    """Anchor boxes of each level.

    Attributes:
        strides: of the levels.
        sizes: side of the square anchor of each level before ratios, one list per level (several scales).
        ratios: height over width, at equal area.
        offset: centre of the anchors within a cell, in cells: 0 at its corner (mmdet), 0.5 in its middle.
        rounded: corners relative to the centre are whole pixels (torchvision).
        canvas_strides: a level's stride is the canvas divided by the size of its map, rounded down (torchvision);
            that is less than the nominal one where the coarse maps reach beyond the canvas.
    """

    strides: Sequence[int]
    sizes: Sequence[Sequence[float]]
    ratios: Sequence[float] = (1.0,)
    offset: float = 0.0
    rounded: bool = False
    canvas_strides: bool = False

    @property
    def per_cell(self) -> int:
        """Anchors of one cell."""
        return len(self.sizes[0]) * len(self.ratios)

    def __call__(self, features: Sequence[Tensor], canvas: tuple[int, int] | None = None) -> list[Tensor]:
        """Anchors of each level's map (B, C, H, W): (H * W * A, 4) xyxy in pixels; order y, x, ratio, size.

        ``canvas``, (height, width) in pixels, is needed for ``canvas_strides`` only.
        """
        anchors = []
        for x, stride, sizes in zip(features, self.strides, self.sizes, strict=True):
            size = (x.shape[-2], x.shape[-1])
            steps: int | tuple[int, int] = stride
            if self.canvas_strides and canvas is not None:
                steps = (canvas[0] // size[0], canvas[1] // size[1])
            points = grid_points(size, steps, self.offset, x)
            shapes = [(side / math.sqrt(ratio), side * math.sqrt(ratio)) for ratio in self.ratios for side in sizes]
            half = torch.tensor(shapes, device=x.device) / 2
            half = half.round() if self.rounded else half
            corners = (points[:, None] - half, points[:, None] + half)
            anchors.append(torch.cat(corners, dim=-1).reshape(-1, 4))
        return anchors


@dataclass(frozen=True)
class DeltaCoder:
    """Boxes as centre shifts and log size ratios relative to anchors (R-CNN, arXiv:1311.2524), divided by ``stds``."""

    stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Deltas (..., 4) and anchors (..., 4) xyxy -> boxes (..., 4) xyxy, float32."""
        deltas = deltas.float() * deltas.new_tensor(self.stds, dtype=torch.float32)
        size = anchors[..., 2:] - anchors[..., :2]
        centre = (anchors[..., :2] + anchors[..., 2:]) / 2 + deltas[..., :2] * size
        half = deltas[..., 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp() * size / 2
        return torch.cat((centre - half, centre + half), dim=-1)

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Inverse of ``decode``: boxes and anchors (..., 4) xyxy -> deltas (..., 4)."""
        size, box_size = anchors[..., 2:] - anchors[..., :2], boxes[..., 2:] - boxes[..., :2]
        shift = (boxes[..., :2] + boxes[..., 2:] - anchors[..., :2] - anchors[..., 2:]) / (2 * size)
        return torch.cat((shift, (box_size / size).log()), dim=-1) / boxes.new_tensor(self.stds)
