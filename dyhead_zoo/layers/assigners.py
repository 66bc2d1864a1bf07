"""Which anchors or points learn which object. Pure functions on the boxes of one image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou


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
