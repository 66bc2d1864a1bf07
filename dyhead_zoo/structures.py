"""The few types that travel between the parts: targets, batches, detections.

Boxes are xyxy in absolute pixels of the image they belong to (float32, no "+1"); labels are 0-based and contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor

from dyhead_zoo.data.label_space import LabelSpace


class Target(TypedDict):
    """Ground truth of one image. ``boxes`` (N, 4) float32 xyxy, ``labels`` (N,) int64; N may be 0."""

    boxes: Tensor
    labels: Tensor
    masks: NotRequired[Tensor]


class Batch(NamedTuple):
    """What the loader yields.

    Attributes:
        images: (B, C, H, W) uint8, zero-padded at the right and bottom.
        image_sizes: (B, 2) int64, (height, width) of each picture within the canvas.
        targets: ground truth in pixels of the resized picture; crowd regions are left out.
        image_ids: the data set's ids.
        original_sizes: (B, 2) int64, (height, width) before resizing.
    """

    images: Tensor
    image_sizes: Tensor
    targets: list[Target]
    image_ids: list[int]
    original_sizes: Tensor


class DetectionTensors(NamedTuple):
    """Detections of a batch in fixed-size tensors, exportable; rows from ``count`` on are zeros.

    Attributes:
        boxes: (B, K, 4) xyxy in pixels of the images given to the model.
        scores: (B, K), best first.
        labels: (B, K) int64.
        count: (B,) int64, valid rows.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count, which nobody needs


@dataclass
class Detections:
    """Detections of one image, best first: ``boxes`` (N, 4) xyxy, ``scores`` (N,), ``labels`` (N,) int64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> Detections:
        """Only those whose score is at least ``score``."""
        keep = self.scores >= score
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep])

    def rescale(self, from_size: tuple[int, int], to_size: tuple[int, int]) -> Detections:
        """Move the boxes from an image of (height, width) ``from_size`` to one of ``to_size``, clipped to it."""
        height, width = to_size
        scale = self.boxes.new_tensor([width / from_size[1], height / from_size[0]]).repeat(2)
        limit = self.boxes.new_tensor([width, height]).repeat(2)
        return Detections(torch.minimum(self.boxes * scale, limit).clamp(min=0), self.scores, self.labels)

    def to_coco(self, image_id: int, label_space: LabelSpace) -> list[dict[str, Any]]:
        """COCO results records: ``bbox`` is xywh, ``category_id`` comes from the label space."""
        xywh = self.boxes.clone()
        xywh[:, 2:] -= xywh[:, :2]
        return [
            {"image_id": image_id, "category_id": label_space.category_ids[label], "bbox": box, "score": score}
            for box, score, label in zip(xywh.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        ]
