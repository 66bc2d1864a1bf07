"""From dense per-level predictions to detections: what anchor and point heads share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from dyhead_zoo.ops.boxes import clip_to_image
from dyhead_zoo.structures import DetectionTensors

DecodeLevel = Callable[[int, int, Tensor], Tensor]


def by_place(x: Tensor, channels: int) -> Tensor:
    """(B, A * channels, H, W) -> (B, H * W * A, channels): rows in the order of the anchors."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, channels)


def dense_detections(
    class_logits: Sequence[Tensor],
    quality_logits: Sequence[Tensor] | None,
    decode: DecodeLevel,
    image_sizes: Tensor,
    *,
    score_threshold: float,
    pre_nms: int,
    nms_threshold: float,
    max_detections: int,
    rank_by_product: bool = False,
) -> DetectionTensors:
    """Per level: threshold, top-k; then decode, clip, class-wise NMS over all levels, best ``max_detections``.

    Args:
        class_logits: per level (B, P_l, C), one row per anchor or point.
        quality_logits: per level (B, P_l), centerness or the like; the final score is the product of both sigmoids.
        decode: ``decode(level, image, rows)`` gives the boxes (K, 4) of the rows selected.
        image_sizes: (B, 2), (height, width) that boxes are clipped to.
        score_threshold: on the class probability, without the quality.
        pre_nms: top-k per level, ranked by class probability, or by the product if ``rank_by_product``.
    """
    results = []
    for image in range(image_sizes.shape[0]):
        boxes, scores, labels = [], [], []
        for level, logits in enumerate(class_logits):
            num_classes = logits.shape[-1]
            flat = logits[image].float().flatten()
            chosen = (
                (flat > _logit(score_threshold)).nonzero().squeeze(1)
            )  # threshold first: cheaper than sigmoid of all
            prob = flat[chosen].sigmoid()
            quality = prob.new_ones(())
            if quality_logits is not None:
                quality = quality_logits[level][image].float()[chosen // num_classes].sigmoid()
            score = prob * quality
            if len(chosen) > pre_nms:
                order = (score if rank_by_product else prob).topk(pre_nms).indices
                chosen, score = chosen[order], score[order]
            boxes.append(decode(level, image, chosen // num_classes))
            scores.append(score)
            labels.append(chosen % num_classes)
        results.append(
            _nms(
                clip_to_image(torch.cat(boxes), image_sizes[image]),
                torch.cat(scores),
                torch.cat(labels),
                nms_threshold,
                max_detections,
            )
        )
    return DetectionTensors(*(torch.stack(field) for field in zip(*results, strict=True)))


def _logit(p: float) -> float:
    return math.log(p / (1 - p)) if 0 < p < 1 else -math.inf if p <= 0 else math.inf


def _nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, limit: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Class-wise NMS of one image, padded with zeros to ``limit`` rows; the last tensor is the count."""
    keep = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1).nonzero().squeeze(1)
    keep = keep[batched_nms(boxes[keep], scores[keep], labels[keep], threshold)][:limit]
    count = len(keep)
    out = boxes.new_zeros(limit, 4), scores.new_zeros(limit), labels.new_zeros(limit)
    for padded, values in zip(out, (boxes, scores, labels), strict=True):
        padded[:count] = values[keep]
    return *out, torch.tensor(count, device=boxes.device)
