"""BorderAlign: each border of a box is the maximum of the features along it, in plain PyTorch.

Qiu et al., "BorderDet: Border Feature for Dense Object Detection", ECCV 2020, arXiv:2007.11056, section 3.2. The order
of the borders and the number of samples are those of the released code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NUM_BORDERS = 4
"""Top, left, bottom, right."""


def border_align(x: Tensor, boxes: Tensor, pool_size: int = 10) -> Tensor:
    """Channel-wise maximum along the four borders of boxes.

    The channels of ``x`` are four groups, read along the top, left, bottom and right border in turn, at
    ``pool_size + 1`` points at equal distances from corner to corner (bilinear, integer coordinates are cells). Memory
    is that of a few outputs: the points are visited one by one, and the backward pass knows which of them was highest
    (the first of equals). There are no gradients for the boxes, as in the paper.

    Args:
        x: (B, 4 * C, H, W); computed in float32 or float64.
        boxes: (B, P, 4) xyxy in cells, x in [0, W - 1] and y in [0, H - 1].
        pool_size: intervals of a border.

    Returns:
        (B, 4 * C, P).

    Raises:
        ValueError: for shapes that do not fit.
    """
    if x.ndim != 4 or x.shape[1] % NUM_BORDERS:
        raise ValueError(f"features of shape {tuple(x.shape)}: expected (B, 4 * C, H, W), one group for each border")
    if boxes.ndim != 3 or boxes.shape[::2] != (len(x), 4):
        raise ValueError(f"boxes of shape {tuple(boxes.shape)}: expected ({len(x)}, P, 4), xyxy in cells")
    x = x if x.dtype is torch.float64 else x.float()
    if x.is_meta:  # shapes only; sampling nothing dozens of times takes seconds there
        return x.new_empty(*x.shape[:2], boxes.shape[1])
    boxes = boxes.detach().to(x.dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _BorderAlign.apply(x, boxes, pool_size)
        return out
    return _highest(x, boxes, pool_size)[0]


def _samples(boxes: Tensor, border: int, pool_size: int) -> Iterator[Tensor]:
    """Points (B, P, 2), x first, along one border: from the top left corner on, or back from the bottom right one."""
    corner = boxes[..., :2] if border < 2 else boxes[..., 2:]
    step = (boxes[..., 2:] - boxes[..., :2]) / pool_size
    along = step * step.new_tensor([1.0, 0.0] if border % 2 == 0 else [0.0, 1.0])
    for k in range(pool_size + 1):
        yield corner + along * (k if border < 2 else -k)


def _highest(x: Tensor, boxes: Tensor, pool_size: int) -> tuple[Tensor, Tensor]:
    """Maxima (B, 4 * C, P), and the number of the sample that each is from (uint8)."""
    height, width = x.shape[-2:]
    scale = 2 / boxes.new_tensor([max(width - 1, 1), max(height - 1, 1)])
    highest, chosen = [], []
    for border, group in enumerate(x.chunk(NUM_BORDERS, dim=1)):
        best = group.new_full((*group.shape[:2], boxes.shape[1]), -torch.inf)
        which = torch.zeros_like(best, dtype=torch.uint8)
        for k, points in enumerate(_samples(boxes, border, pool_size)):
            grid = (points * scale - 1)[:, :, None]
            value = F.grid_sample(group, grid, padding_mode="border", align_corners=True)[..., 0]
            higher = value > best
            best = torch.where(higher, value, best)
            which = torch.where(higher, k, which)
        highest.append(best)
        chosen.append(which)
    return torch.cat(highest, dim=1), torch.cat(chosen, dim=1)


class _BorderAlign(torch.autograd.Function):
    """``border_align`` with a backward pass that visits only the highest sample of each border."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, boxes: Tensor, pool_size: int) -> Tensor:
        out, chosen = _highest(x, boxes, pool_size)
        ctx.save_for_backward(boxes, chosen)
        ctx.shape, ctx.pool_size = x.shape, pool_size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        boxes, chosen = ctx.saved_tensors
        height, width = ctx.shape[-2:]
        groups = []
        parts = zip(grads[0].chunk(NUM_BORDERS, dim=1), chosen.chunk(NUM_BORDERS, dim=1), strict=True)
        for border, (grad, which) in enumerate(parts):
            points = torch.stack(list(_samples(boxes, border, ctx.pool_size)), dim=1)  # (B, pool_size + 1, P, 2)
            group = grad.new_zeros(*grad.shape[:2], height * width)
            which = which.long()
            for cell, weight in _corners(points, height, width):
                group.scatter_add_(2, cell.gather(1, which), grad * weight.gather(1, which))
            groups.append(group)
        return torch.cat(groups, dim=1).view(ctx.shape), None, None


def _corners(points: Tensor, height: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The four cells around points (..., 2), as indices into a flattened map, with their bilinear weights (...)."""
    x, y = points.unbind(-1)
    left, top = x.floor(), y.floor()
    for row, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
        for column, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
            cell = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            yield cell.long(), weight_y * weight_x
