"""Where tokens lie: padding masks and sine embeddings of set-prediction detectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_TEMPERATURE = 10000.0


def padding_masks(image_sizes: Tensor, canvas: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Which cells of each level lie outside their picture, by nearest neighbour from the pixels of the canvas.

    Args:
        image_sizes: (B, 2), (height, width) of each picture in the canvas.
        canvas: (height, width) of the padded batch.
        shapes: (h, w) of each level.

    Returns:
        Per level (B, h, w) bool, True for padding. The first cell is never padding.
    """
    sides = []
    for axis in (0, 1):
        inside = torch.arange(canvas[axis], device=image_sizes.device) < image_sizes[:, axis : axis + 1]
        sides.append([F.interpolate(inside[:, None].float(), size=shape[axis])[:, 0] > 0 for shape in shapes])
    return [~(rows[:, :, None] & columns[:, None]) for rows, columns in zip(*sides, strict=True)]


def sine_embedding(x: Tensor, features: int) -> Tensor:
    """Sines and cosines in turn of angles (...) at geometric frequencies (arXiv:1706.03762, 3.5): (..., features)."""
    exponent = torch.arange(features // 2, device=x.device, dtype=x.dtype) * 2 / features
    angle = x[..., None] / _TEMPERATURE**exponent
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def sine_positions(padding: Tensor, channels: int, offset: float = 0.0) -> Tensor:
    """Sine embedding of the place of every cell within its picture, as in DETR (arXiv:2005.12872, appendix A.4).

    Args:
        padding: (B, h, w) bool, True outside the picture; cells are counted within it.
        channels: C, a multiple of 4: the first half for y, the second for x.
        offset: added to the counts, which begin at 1: -0.5 is the middle of a cell (Deformable DETR).

    Returns:
        (B, h * w, C) float32.
    """
    inside = (~padding).float()
    halves = []
    for axis in (1, 2):
        count = inside.cumsum(axis)
        share = (count + offset) / (count.narrow(axis, count.shape[axis] - 1, 1) + 1e-6)
        halves.append(sine_embedding(share * 2 * math.pi, channels // 2))
    return torch.cat(halves, dim=-1).flatten(1, 2)


def box_positions(boxes: Tensor, channels: int) -> Tensor:
    """Sine embedding of boxes (..., 4) in 0..1: (..., 4 * channels), the coordinates one after the other."""
    return sine_embedding(boxes * 2 * math.pi, channels).flatten(-2)
