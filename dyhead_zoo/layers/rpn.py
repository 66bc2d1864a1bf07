"""Region proposal network: where objects may be, whatever their class.

Paper: Ren et al., "Faster R-CNN", NeurIPS 2015, arXiv:1506.01497; on a pyramid: Lin et al., arXiv:1612.03144. The
variants are those of mmdetection (Apache-2.0), detectron2 (Apache-2.0) and torchvision (BSD-3-Clause).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_zoo.layers.anchors import AnchorGenerator, DeltaCoder
from dyhead_zoo.layers.assigners import BACKGROUND, IGNORED, max_iou_assign
from dyhead_zoo.layers.losses import mean_over_ranks
from dyhead_zoo.layers.postprocess import by_place, select_detections, take_rows
from dyhead_zoo.layers.targets import cells_inside
from dyhead_zoo.layers.tower import ConvTower
from dyhead_zoo.structures import DetectionTensors, Target

POSITIVE_IOU, NEGATIVE_IOU = 0.7, 0.3
"""Of an anchor with an object: from the one on it learns that object, below the other it learns that there is none."""


def sample(owner: Tensor, number: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Draw a fixed number of anchors or RoIs of one picture, so that the many negatives do not drown the positives.

    Args:
        owner: (A,) index of the object of each, ``BACKGROUND`` or ``IGNORED``.
        number: how many to draw; fewer where there are not as many. Missing positives are made up for by negatives.
        positive_fraction: largest share of positives.

    Returns:
        Indices of positives and of negatives, drawn by torch's generator; all of them where they are not too many.
    """

    def draw(index: Tensor, limit: int) -> Tensor:
        return index if len(index) <= limit else index[torch.randperm(len(index), device=index.device)[:limit]]

    positive = draw((owner >= 0).nonzero().squeeze(1), int(number * positive_fraction))
    negative = draw((owner == BACKGROUND).nonzero().squeeze(1), number - len(positive))
    return positive, negative


class RegionProposalNetwork(nn.Module):
    """Objectness and box deltas of a few anchors per cell, with weights shared over the levels.

    Args:
        in_channels: of the pyramid.
        anchors: of its levels.
        convs: 3x3 conv-ReLU layers before the predictions; torchvision's second version has two.
        low_quality, least: see ``max_iou_assign``.
        reach: which anchors take part in training: ``'picture'``: those of cells within the picture, its size rounded
            up to ``pad_divisor`` (mmdet); ``'canvas'``: all (detectron2, torchvision); ``'inside'``: only anchors that
            lie wholly inside the picture (the paper; mmdet's Cascade R-CNN).
        samples: anchors per picture that the losses are computed on, at most half of them positive.
        beta: where the smooth L1 loss of the deltas becomes linear; 0 is L1.
        nms_threshold: of the proposals, level by level.
        score_threshold: proposals below it are left out (torchvision's MobileNets).
    """

    def __init__(
        self,
        in_channels: int,
        anchors: AnchorGenerator,
        *,
        convs: int = 1,
        low_quality: Literal["owner", "best", "none"] = "owner",
        least: float = 0.3,
        reach: Literal["picture", "canvas", "inside"] = "picture",
        pad_divisor: int = 32,
        samples: int = 256,
        beta: float = 0.0,
        nms_threshold: float = 0.7,
        score_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        if reach not in ("picture", "canvas", "inside"):
            raise ValueError(f"rpn_reach={reach!r}: use 'picture', 'canvas' or 'inside'")
        if low_quality not in ("owner", "best", "none"):
            raise ValueError(f"rpn_low_quality={low_quality!r}: use 'owner', 'best' or 'none'")
        self.anchors, self.coder = anchors, DeltaCoder()
        self.low_quality, self.least, self.reach, self.pad_divisor = low_quality, least, reach, pad_divisor
        self.samples, self.beta = samples, beta
        self.nms_threshold, self.score_threshold = nms_threshold, score_threshold
        self.tower = ConvTower(in_channels, convs, norm=False)
        self.objectness = nn.Conv2d(in_channels, anchors.per_cell, 1)
        self.deltas = nn.Conv2d(in_channels, anchors.per_cell * 4, 1)
        for conv in (self.objectness, self.deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Pyramid L x (B, C, H_l, W_l) -> objectness logits L x (B, A, H_l, W_l), deltas L x (B, A * 4, H_l, W_l)."""
        hidden = [self.tower(x) for x in features]
        return tuple(self.objectness(x) for x in hidden), tuple(self.deltas(x) for x in hidden)

    @torch.no_grad()
    def propose(
        self,
        objectness: Sequence[Tensor],
        deltas: Sequence[Tensor],
        image_sizes: Tensor,
        canvas: tuple[int, int],
        *,
        pre_nms: int,
        post_nms: int,
    ) -> DetectionTensors:
        """The best boxes of each picture, clipped to it; ``labels`` are their levels. No gradient flows through them.

        Args:
            objectness, deltas: as ``forward`` gives them.
            pre_nms: how many of each level enter non-maximum suppression.
            post_nms: how many leave it, of all levels together.
        """
        boxes, scores, levels = [], [], []
        for level, anchors in enumerate(self.anchors(objectness, canvas)):
            logits = by_place(objectness[level], 1).squeeze(-1).float()
            best, rows = logits.topk(min(pre_nms, logits.shape[1]), dim=1)
            chosen = take_rows(by_place(deltas[level], 4), rows)
            boxes.append(self.coder.decode(chosen, take_rows(anchors, rows)))
            scores.append(best.sigmoid())
            levels.append(torch.full_like(rows, level))
        score = torch.cat(scores, 1)
        return select_detections(
            torch.cat(boxes, 1),
            score,
            torch.cat(levels, 1),
            score >= self.score_threshold,
            image_sizes,
            nms_threshold=self.nms_threshold,
            max_detections=post_nms,
        )

    def targets(
        self, objectness: Sequence[Tensor], image_sizes: Tensor, canvas: tuple[int, int], targets: list[Target]
    ) -> tuple[Tensor, Tensor]:
        """What each anchor learns: anchors (A, 4), and the object of each (B, A), ``BACKGROUND`` or ``IGNORED``."""
        anchors = torch.cat(self.anchors(objectness, canvas))
        owners = []
        for size, target in zip(image_sizes.tolist(), targets, strict=True):
            inside = self._taking_part(objectness, anchors, size, canvas)
            owner = torch.full((len(anchors),), IGNORED, dtype=torch.int64, device=anchors.device)
            owner[inside] = max_iou_assign(
                anchors[inside],
                target["boxes"].to(anchors),
                positive=POSITIVE_IOU,
                negative=NEGATIVE_IOU,
                low_quality=self.low_quality,
                least=self.least,
            )
            owners.append(owner)
        return anchors, torch.stack(owners)

    def _taking_part(
        self, objectness: Sequence[Tensor], anchors: Tensor, size: Sequence[int], canvas: tuple[int, int]
    ) -> Tensor:
        """Anchors (A,) that a picture of (height, width) ``size`` trains."""
        reach = canvas if self.reach == "canvas" else size
        cells = [
            cells_inside(x, stride, reach, self.pad_divisor)
            for x, stride in zip(objectness, self.anchors.strides, strict=True)
        ]
        inside = torch.cat(cells).repeat_interleave(self.anchors.per_cell)
        if self.reach == "inside":
            inside &= (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < size[1]) & (anchors[:, 3] < size[0])
        return inside

    def loss(
        self,
        objectness: Sequence[Tensor],
        deltas: Sequence[Tensor],
        image_sizes: Tensor,
        canvas: tuple[int, int],
        targets: list[Target],
    ) -> dict[str, Tensor]:
        """Cross entropy of the anchors sampled and smooth L1 of the positive ones' deltas, over the number sampled."""
        anchors, owners = self.targets(objectness, image_sizes, canvas, targets)
        logits = torch.cat([by_place(x, 1) for x in objectness], dim=1).squeeze(-1).float()
        predicted = torch.cat([by_place(x, 4) for x in deltas], dim=1).float()
        count, cls_terms, box_terms = logits.new_zeros(()), [], []
        for i, (owner, target) in enumerate(zip(owners, targets, strict=True)):
            positive, negative = sample(owner, self.samples, 0.5)
            count += len(positive) + len(negative)
            chosen = logits[i][torch.cat((positive, negative))]
            wanted = torch.zeros_like(chosen)
            wanted[: len(positive)] = 1
            cls_terms.append(F.binary_cross_entropy_with_logits(chosen, wanted, reduction="sum"))
            boxes = target["boxes"].to(anchors)[owner[positive]]
            coded = self.coder.encode(boxes, anchors[positive])
            box_terms.append(F.smooth_l1_loss(predicted[i][positive], coded, reduction="sum", beta=self.beta))
        divisor = mean_over_ranks(count).clamp(min=1)
        return {
            "loss_rpn_cls": torch.stack(cls_terms).sum() / divisor,
            "loss_rpn_box": torch.stack(box_terms).sum() / divisor,
        }
