"""Which anchors or points learn which object. Pure functions on the boxes of one image.

All return, per anchor or point, the index of its object, or ``BACKGROUND``, or ``IGNORED``: neither one nor the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

BACKGROUND = -1
IGNORED = -2


@torch.no_grad()
def atss_assign(anchors: Tensor, per_level: Sequence[int], boxes: Tensor, top_k: int = 9) -> Tensor:
    """Adaptive Training Sample Selection (Zhang et al., arXiv:1912.02424, Algorithm 1).

    On each level the ``top_k`` anchors whose centres are nearest to the object's centre are candidates. Those whose IoU
    is at least mean + standard deviation (unbiased) of the candidates' IoUs, and whose centre lies inside the object by
    more than 0.01 px, are positive. An anchor claimed by several objects goes to the one of highest IoU.

    Args:
        anchors: (A, 4) of all levels, fine to coarse.
        per_level: number of anchors of each level; they add up to A.
        boxes: (N, 4) objects; N may be 0.

    Returns:
        (A,) int64: index of the object, or -1 for background.
    """
    if len(boxes) == 0 or len(anchors) == 0:
        return torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
    iou = box_iou(anchors, boxes)
    centres, targets = (anchors[:, :2] + anchors[:, 2:]) / 2, (boxes[:, :2] + boxes[:, 2:]) / 2
    distance = torch.cdist(centres, targets, compute_mode="donot_use_mm_for_euclid_dist")
    candidates, start = [], 0
    for count in per_level:
        level = distance[start : start + count]
        candidates.append(level.topk(min(top_k, count), dim=0, largest=False).indices + start)
        start += count
    candidate = torch.cat(candidates)  # (K, N) anchor indices
    candidate_iou = iou.gather(0, candidate)
    spread = candidate_iou.std(0) if len(candidate) > 1 else torch.zeros_like(candidate_iou[0])
    threshold = candidate_iou.mean(0) + spread
    centre = centres[candidate]  # (K, N, 2)
    margin = torch.cat((centre - boxes[:, :2], boxes[:, 2:] - centre), dim=-1).amin(-1)
    positive = (candidate_iou >= threshold) & (margin > 0.01)
    claimed = torch.full_like(iou, -1.0)
    columns = torch.arange(len(boxes), device=boxes.device).expand_as(candidate)
    claimed[candidate[positive], columns[positive]] = candidate_iou[positive]
    best, owner = claimed.max(1)
    return torch.where(best >= 0, owner, -1)


@torch.no_grad()
def max_iou_assign(
    anchors: Tensor,
    boxes: Tensor,
    *,
    positive: float,
    negative: float,
    low_quality: str = "owner",
    least: float = 0.0,
) -> Tensor:
    """The object of highest IoU, if that is at least ``positive``; background below ``negative``; ignored in between.

    So that no object goes without, the anchors that overlap an object best are positives too, however little they
    overlap it (Ren et al., arXiv:1506.01497, section 3.1.2).

    Args:
        anchors: (A, 4).
        boxes: (N, 4) objects; N may be 0.
        positive, negative: thresholds on the IoU.
        low_quality: which object such an anchor learns: ``'owner'``: the one that it overlaps best of all anchors
            (mmdet; the last one, if there are several); ``'best'``: its own best (detectron2, torchvision); ``'none'``:
            there are no such anchors.
        least: IoU that such an anchor must reach, or else the object does go without (mmdet's RPN: 0.3).

    Returns:
        (A,) int64.
    """
    if len(boxes) == 0 or len(anchors) == 0:
        return torch.full((len(anchors),), BACKGROUND, dtype=torch.int64, device=anchors.device)
    iou = box_iou(anchors, boxes)
    best, owner = iou.max(1)
    assigned = torch.where(best >= positive, owner, torch.where(best < negative, BACKGROUND, IGNORED))
    if low_quality == "none":
        return assigned
    highest = iou.max(0).values
    rescued = (iou == highest) & (highest > 0) & (highest >= least)  # (A, N)
    if low_quality == "best":
        return torch.where(rescued.any(1), owner, assigned)
    last = torch.where(rescued, torch.arange(len(boxes), device=boxes.device), -1).amax(1)
    return torch.where(last >= 0, last, assigned)


@torch.no_grad()
def fcos_assign(
    points: Tensor, per_level: Sequence[int], strides: Sequence[int], boxes: Tensor, radius: float | None = 1.5
) -> Tensor:
    """Every point strictly inside an object learns it, on the level made for its size (Tian et al., arXiv:1904.01355).

    A level of stride s takes the objects whose farthest side is 4 s to 8 s away, both included; the first level also
    nearer ones, the last also farther ones (with strides 8 to 128: 0, 64, 128, 256, 512, infinity). Of several objects
    a point learns the smallest.

    Args:
        points: (P, 2) of all levels, fine to coarse.
        per_level, strides: number of points and stride of each level.
        boxes: (N, 4) objects; N may be 0.
        radius: centre sampling (the paper's later version, arXiv:2006.09214): the point must also be within this many
            strides of the object's centre, in x and in y; None: anywhere inside.

    Returns:
        (P,) int64: index of the object, or -1 for background.
    """
    if len(boxes) == 0 or len(points) == 0:
        return torch.full((len(points),), BACKGROUND, dtype=torch.int64, device=points.device)
    counts = torch.tensor(per_level, device=points.device)
    reach = torch.tensor(strides, dtype=torch.float32, device=points.device)
    nearest, farthest = 4 * reach, 8 * reach
    nearest[0], farthest[-1] = 0, torch.inf
    stride, nearest, farthest = (x.repeat_interleave(counts)[:, None] for x in (reach, nearest, farthest))
    sides = torch.cat((points[:, None] - boxes[:, :2], boxes[:, 2:] - points[:, None]), dim=-1)  # (P, N, 4)
    longest = sides.amax(-1)
    fits = (sides.amin(-1) > 0) & (longest >= nearest) & (longest <= farthest)
    if radius is not None:
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        fits &= (points[:, None] - centres).abs().amax(-1) < radius * stride
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1).expand_as(fits)
    smallest, owner = area.masked_fill(~fits, torch.inf).min(1)
    return torch.where(smallest < torch.inf, owner, BACKGROUND)


@torch.no_grad()
def point_assign(
    points: Tensor, per_level: Sequence[int], strides: Sequence[int], boxes: Tensor, scale: float = 4.0
) -> Tensor:
    """Every object is learned by one point, the nearest to its centre, on the level made for its size.

    That is the coarsest level whose stride is at most ``sqrt(width * height) / scale``, or else the finest (RepPoints,
    Yang et al., arXiv:1904.11490, section 4: ``floor(log2(sqrt(width * height) / 4))``). Distances are in widths and
    heights of the object, as in mmdet's ``PointAssigner``; of several objects a point learns the one nearest by that
    measure, so an object can go without.

    Args:
        points: (P, 2) of all levels, fine to coarse.
        per_level, strides: number of points and stride of each level.
        boxes: (N, 4) objects; N may be 0.
        scale: sides of the objects for which a level is made, in its strides.

    Returns:
        (P,) int64: index of the object, or -1 for background.
    """
    if len(boxes) == 0 or len(points) == 0:
        return torch.full((len(points),), BACKGROUND, dtype=torch.int64, device=points.device)
    counts = torch.tensor(per_level, device=points.device)
    level = torch.arange(len(counts), device=points.device).repeat_interleave(counts)
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
    reach = scale * torch.tensor(strides, dtype=torch.float32, device=points.device)
    made_for = ((size.prod(1)[:, None] >= reach**2).sum(1) - 1).clamp(min=0)
    distance = ((points[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2) / size).norm(dim=-1)  # (P, N)
    distance = distance.masked_fill(level[:, None] != made_for, torch.inf)
    nearest = distance.argmin(0)
    claims = torch.arange(len(points), device=points.device)[:, None] == nearest
    least, owner = distance.masked_fill(~claims, torch.inf).min(1)
    return torch.where(least < torch.inf, owner, BACKGROUND)
