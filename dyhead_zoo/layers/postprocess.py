"""From dense per-level predictions to detections: what anchor and point heads share.

All sizes are known beforehand: a level gives its ``pre_nms`` best rows, of which those below the threshold are marked
invalid, so the whole can be exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert, nms

from dyhead_zoo.ops.boxes import clip_to_image
from dyhead_zoo.structures import DetectionTensors

DecodeLevel = Callable[[int, Tensor], Tensor]


def by_place(x: Tensor, channels: int) -> Tensor:
    """(B, A * channels, H, W) -> (B, H * W * A, channels): rows in the order of the anchors."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, channels)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (B, K) of (B, P, D), or of (P, D) that all images share: (B, K, D)."""
    if x.ndim == 2:
        return x[rows]
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


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
    sqrt_score: bool = False,
    threshold_score: bool = False,
) -> DetectionTensors:
    """Per level: threshold, top-k; then decode, clip, class-wise NMS over all levels, best ``max_detections``.

    Args:
        class_logits: per level (B, P_l, C), one row per anchor or point.
        quality_logits: per level (B, P_l), centerness or the like; the final score is the product of both sigmoids.
        decode: ``decode(level, rows)`` gives the boxes (B, K, 4) of the rows (B, K) selected.
        image_sizes: (B, 2), (height, width) that boxes are clipped to.
        score_threshold: on the class probability, or on the final score if ``threshold_score`` (torchvision's FCOS).
        pre_nms: top-k per level, ranked by class probability, or by the product if ``rank_by_product``.
        sqrt_score: the final score is the square root of the product, as in FCOS of its authors and of torchvision.
    """
    boxes, scores, labels, valid = [], [], [], []
    for level, logits in enumerate(class_logits):
        count, classes = logits.shape[1:]
        rank = logits.float()
        passes = rank > _logit(score_threshold)
        quality = None if quality_logits is None else quality_logits[level].float().sigmoid()
        if quality is not None and (rank_by_product or threshold_score):
            product = rank.sigmoid() * quality[..., None]
            rank = product if rank_by_product else rank
            if threshold_score:
                passes = (product.sqrt() if sqrt_score else product) > score_threshold
        rank = rank.masked_fill(~passes, -math.inf).flatten(1)
        best, chosen = rank.topk(min(pre_nms, count * classes), dim=1)
        row = chosen // classes
        score = logits.flatten(1).gather(1, chosen).float().sigmoid()
        if quality is not None:
            score = score * quality.gather(1, row)
        boxes.append(decode(level, row))
        scores.append(score.sqrt() if sqrt_score else score)
        labels.append(chosen % classes)
        valid.append(best > -math.inf)
    return select_detections(
        torch.cat(boxes, 1),
        torch.cat(scores, 1),
        torch.cat(labels, 1),
        torch.cat(valid, 1),
        image_sizes,
        nms_threshold=nms_threshold,
        max_detections=max_detections,
    )


def select_detections(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    valid: Tensor,
    image_sizes: Tensor,
    *,
    nms_threshold: float,
    max_detections: int,
) -> DetectionTensors:
    """Clip, class-wise NMS, best ``max_detections``, image by image.

    Args:
        boxes: (B, K, 4). scores, labels: (B, K). valid: (B, K) bool; other rows, and boxes without area, are left out.
        image_sizes: (B, 2), (height, width) that boxes are clipped to.
    """
    results = []
    for image in range(len(boxes)):
        clipped = clip_to_image(boxes[image], image_sizes[image])
        usable = valid[image] & (clipped[:, 2:] > clipped[:, :2]).all(1)
        kept = _class_wise_nms(clipped, scores[image], labels[image], usable, nms_threshold)
        results.append(_best(clipped, scores[image], labels[image], kept, max_detections))
    return DetectionTensors(*(torch.stack(field) for field in zip(*results, strict=True)))


def query_detections(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    image_sizes: Tensor,
    *,
    score_threshold: float,
    max_detections: int,
) -> DetectionTensors:
    """The best answers of set prediction, without NMS.

    Args:
        boxes: (B, K, 4), (cx, cy, w, h) in units of each picture. scores, labels: (B, K).
        image_sizes: (B, 2), (height, width) of the pictures.
        score_threshold: answers below it are left out.
    """
    best, row = scores.topk(min(max_detections, scores.shape[1]), dim=1)
    scale = image_sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)
    corners = box_convert(take_rows(boxes, row), "cxcywh", "xyxy") * scale
    kept = best >= score_threshold
    return DetectionTensors(
        torch.minimum(corners.clamp(min=0), scale) * kept[..., None],
        best * kept,
        labels.gather(1, row) * kept,
        kept.sum(1),
    )


def _logit(p: float) -> float:
    return math.log(p / (1 - p)) if 0 < p < 1 else -math.inf if p <= 0 else math.inf


def _class_wise_nms(boxes: Tensor, scores: Tensor, labels: Tensor, usable: Tensor, threshold: float) -> Tensor:
    """Which rows survive: (K,) bool."""
    kept = torch.zeros_like(usable)
    if torch.compiler.is_compiling():  # sizes must not depend on data: move the classes apart, the unusable to a corner
        side = boxes.amax() + 1
        places = torch.where(usable[:, None], boxes + (labels * side)[:, None], -side)
        return kept.index_fill(0, nms(places, scores.masked_fill(~usable, -1.0), threshold), True) & usable
    index = usable.nonzero().squeeze(1)
    kept[index[batched_nms(boxes[index], scores[index], labels[index], threshold)]] = True
    return kept


def _best(
    boxes: Tensor, scores: Tensor, labels: Tensor, kept: Tensor, limit: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``limit`` best of the rows kept, best first, padded with zeros; the last tensor is their number."""
    best, row = scores.masked_fill(~kept, -1.0).topk(min(limit, len(scores)))
    real = best >= 0
    out = []
    for values in (boxes, scores, labels):
        padded = values.new_zeros(limit, *values.shape[1:])
        padded[: len(row)] = torch.where(real if values.ndim == 1 else real[:, None], values[row], 0)
        out.append(padded)
    return out[0], out[1], out[2], real.sum()
