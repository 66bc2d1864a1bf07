"""What reads regions of interest (RoIs): RoIAlign on a pyramid, the box head and the mask head.

Papers: Fast R-CNN, arXiv:1504.08083; FPN, arXiv:1612.03144; Mask R-CNN (RoIAlign too), arXiv:1703.06870.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from dyhead_zoo.layers.dyhead import TaskAttention
from dyhead_zoo.layers.tower import ConvTower, Norm


def as_rois(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes (N_i, 4) of each picture -> RoIs (sum N_i, 5): index of the picture, then the box."""
    return torch.cat([torch.cat((b.new_full((len(b), 1), float(i)), b), dim=1) for i, b in enumerate(boxes)])


@dataclass(frozen=True)
class RoIPooler:
    """RoIAlign on the level made for a region's size: sides of 14 to 28 strides are read at that stride.

    Lin et al., arXiv:1612.03144, Eq. 1: level ``floor(k0 + log2(sqrt(w h) / 224))``.

    Attributes:
        strides: of the levels that RoIs are read from, fine to coarse, doubling.
        aligned: pixel centres at half coordinates (mmdet, detectron2); torchvision shifts by half a cell.
        sampling: points per bin and side; 0: as many as the bin has cells.
    """

    strides: Sequence[int]
    aligned: bool = True
    sampling: int = 0

    def levels(self, rois: Tensor) -> Tensor:
        """Index of the level of each RoI: (R,) int64."""
        side = (rois[:, 3:] - rois[:, 1:3]).prod(1).clamp(min=0).sqrt()
        level = torch.floor(torch.log2(side / (14 * self.strides[0]) + 1e-6))
        return level.clamp(0, len(self.strides) - 1).long()

    def __call__(self, features: Sequence[Tensor], rois: Tensor, size: int) -> Tensor:
        """Pyramid L x (B, C, H_l, W_l), of which the first levels are read, and RoIs (R, 5) -> (R, C, size, size)."""
        levels = self.levels(rois)

        def align(level: int, chosen: Tensor) -> Tensor:
            scale = 1 / self.strides[level]
            return roi_align(features[level].float(), chosen, (size, size), scale, self.sampling, self.aligned)

        if torch.compiler.is_compiling():  # sizes must not depend on data: read every RoI on every level
            pooled = torch.zeros((), device=rois.device)
            for level in range(len(self.strides)):
                pooled = torch.where((levels == level)[:, None, None, None], align(level, rois), pooled)
            return pooled
        pooled = torch.zeros(len(rois), features[0].shape[1], size, size, device=rois.device)
        for level in range(len(self.strides)):
            index = (levels == level).nonzero().squeeze(1)
            pooled = pooled.index_copy_(0, index, align(level, rois[index]))
        return pooled


class BoxHead(nn.Module):
    """What an RoI shows, and where its object really is.

    Args:
        channels: of the features pooled.
        rows: of the classifier: classes, and background as the last.
        boxes: predicted per RoI: one per class, or 1 for all classes together (Cascade R-CNN).
        size: side of the pooled features in cells.
        convs, norm: 3x3 conv-norm-ReLU layers first (torchvision's second version has four, with BatchNorm).
        hidden: width of each fully connected layer.
        task_attention: Dynamic Head's two-stage variant (arXiv:2106.08322, section 3.4): instead of the fully connected
            layers, task attention reads the pooled features as many times as there are entries in ``hidden``.

    Shapes: (R, channels, size, size) -> logits (R, rows), deltas (R, boxes * 4).
    """

    def __init__(
        self,
        channels: int,
        rows: int,
        boxes: int,
        *,
        size: int = 7,
        convs: int = 0,
        norm: Norm = False,
        hidden: Sequence[int] = (1024, 1024),
        task_attention: bool = False,
    ) -> None:
        super().__init__()
        self.convs = ConvTower(channels, convs, norm)
        _kaiming(self.convs)
        width = channels * size**2
        if task_attention:
            self.attention = nn.Sequential(*(TaskAttention(channels) for _ in hidden))
            self.fcs = nn.ModuleList()
        else:
            self.attention = nn.Sequential()
            self.fcs = nn.ModuleList(nn.Linear(a, b) for a, b in zip((width, *hidden), hidden, strict=False))
            width = hidden[-1] if hidden else width
        self.cls_logits = nn.Linear(width, rows)
        self.box_deltas = nn.Linear(width, boxes * 4)
        for layer in self.fcs:
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        for layer, std in ((self.cls_logits, 0.01), (self.box_deltas, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.attention(self.convs(x.to(self.cls_logits.weight.dtype))).flatten(1)
        for layer in self.fcs:
            x = F.relu(layer(x))
        return self.cls_logits(x), self.box_deltas(x)


class MaskHead(nn.Module):
    """Which cells of an RoI belong to its object: four convolutions, upsampling by 2, one map per class.

    Shapes: (R, channels, M / 2, M / 2) -> logits (R, num_classes, M, M).
    """

    def __init__(self, channels: int, num_classes: int, *, convs: int = 4, norm: Norm = False) -> None:
        super().__init__()
        self.convs = ConvTower(channels, convs, norm)
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.logits = nn.Conv2d(channels, num_classes, 1)
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x.to(self.logits.weight.dtype))
        return self.logits(self.upsample(x).relu_())


def _kaiming(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def mask_targets(masks: Tensor, index: Tensor, boxes: Tensor, size: int, *, aligned: bool, binary: bool) -> Tensor:
    """The part of an object's mask that a box shows, in the box's frame.

    Args:
        masks: (N, H, W) of the objects of a picture.
        index, boxes: (P,) object and (P, 4) box in pixels of the picture, of each RoI.
        aligned: see ``RoIPooler``.
        binary: whether a cell is in or out, at 0.5 (mmdet, detectron2); torchvision learns the share that is covered.

    Returns:
        (P, size, size) float32.
    """
    rois = torch.cat((index[:, None].to(boxes), boxes), dim=1)
    parts = roi_align(masks[:, None].to(boxes), rois, (size, size), 1.0, 0, aligned).squeeze(1)
    return (parts >= 0.5).float() if binary else parts
