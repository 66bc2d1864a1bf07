"""Losses that several families share. All are computed in float32, also under autocast."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a detached scalar over all processes; the value itself without a process group.

    Losses are divided by the mean count per process: after DDP has averaged the gradients they are what one process
    with the whole batch would give.
    """
    if dist.is_available() and dist.is_initialized():
        value = value.detach().clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al., arXiv:1708.02002, Eq. 5), element by element: shapes (...) and (...) -> (...)."""
    logits, targets = logits.float(), targets.float()
    p = logits.sigmoid()
    miss = p + targets - 2 * p * targets  # 1 - p_t
    weight = (alpha * targets + (1 - alpha) * (1 - targets)) * miss**gamma
    return weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def iou_loss(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """-log(IoU) (UnitBox, Yu et al., arXiv:1608.01471) of pairs of boxes (N, 4) xyxy: (N,).

    IoUs below ``eps`` count as ``eps`` and give no gradient.
    """
    overlap = (torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(boxes[:, :2], targets[:, :2])).clamp(min=0)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (targets[:, 2:] - targets[:, :2]).prod(1)
    union = (areas - overlap.prod(1)).clamp(min=eps)
    return -(overlap.prod(1) / union).clamp(min=eps).log()


def giou_loss(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """1 - GIoU (Rezatofighi et al., arXiv:1902.09630) of pairs of boxes (N, 4) xyxy: (N,)."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    target_area = (targets[:, 2:] - targets[:, :2]).prod(1)
    low, high = torch.maximum(boxes[:, :2], targets[:, :2]), torch.minimum(boxes[:, 2:], targets[:, 2:])
    overlap = (high - low).clamp(min=0).prod(1)
    union = (area + target_area - overlap).clamp(min=eps)
    hull_low, hull_high = torch.minimum(boxes[:, :2], targets[:, :2]), torch.maximum(boxes[:, 2:], targets[:, 2:])
    hull = (hull_high - hull_low).clamp(min=0).prod(1).clamp(min=eps)
    return 1 - overlap / union + (hull - union) / hull
