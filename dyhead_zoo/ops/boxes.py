"""Box arithmetic beyond torchvision.ops. Boxes are xyxy in absolute pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_to_image(boxes: Tensor, image_size: Tensor) -> Tensor:
    """Clip boxes (N, 4) to an image of (height, width) ``image_size`` (2,)."""
    limit = image_size.flip(0).to(boxes.dtype).repeat(2)
    return torch.minimum(boxes.clamp(min=0), limit)


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """``sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))`` of points (N, 2) in boxes (N, 4): (N,) in [0, 1].

    FCOS (Tian et al., arXiv:1904.01355), Eq. 3. Points outside their box get 0.
    """
    low, high = (points - boxes[:, :2]).clamp(min=0), (boxes[:, 2:] - points).clamp(min=0)
    ratio = torch.minimum(low, high) / torch.maximum(low, high).clamp(min=1e-12)
    return ratio.prod(1).sqrt()


def boxes_from_distances(points: Tensor, distances: Tensor) -> Tensor:
    """Boxes (..., 4) xyxy whose left, top, right and bottom are ``distances`` (..., 4) from ``points`` (..., 2)."""
    return torch.cat((points - distances[..., :2], points + distances[..., 2:]), dim=-1)
