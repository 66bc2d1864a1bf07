"""The few types that travel between the parts: targets, batches, detections.

Boxes are xyxy in absolute pixels of the image they belong to (float32, no "+1"); labels are 0-based and contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor

from dyhead_zoo.data.label_space import LabelSpace
from dyhead_zoo.ops.masks import Rle, encode_masks, paste_masks


class Target(TypedDict):
    """Ground truth of one image. ``boxes`` (N, 4) float32 xyxy, ``labels`` (N,) int64; N may be 0.

    ``masks``, for detectors that learn them: (N, height, width) bool in the pixels of the picture without padding.
    """

    boxes: Tensor
    labels: Tensor
    masks: NotRequired[Tensor]


class Sample(NamedTuple):
    """A picture with its objects, on the way from a data set to a ``Batch``.

    Attributes:
        image: (3, H, W) uint8.
        boxes: (N, 4) float32 xyxy.
        labels: (N,) int64.
        masks: (N, H, W) bool, or None where nobody asked for them.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None


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
        masks: (B, K, M, M) probabilities in the frame of each box; None for detectors without masks.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count, which nobody needs
    masks: Tensor | None = None


@dataclass
class Detections:
    """Detections of one image, best first: ``boxes`` (N, 4) xyxy, ``scores`` (N,), ``labels`` (N,) int64.

    ``masks`` (N, M, M) are probabilities in the frame of each box, or None: ``paste`` puts them into the image.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def cpu(self) -> Detections:
        """The same in the memory of the CPU."""
        masks = None if self.masks is None else self.masks.cpu()
        return Detections(self.boxes.cpu(), self.scores.cpu(), self.labels.cpu(), masks)

    def above(self, score: float) -> Detections:
        """Only those whose score is at least ``score``."""
        keep = self.scores >= score
        masks = None if self.masks is None else self.masks[keep]
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep], masks)

    def rescale(self, from_size: tuple[int, int], to_size: tuple[int, int]) -> Detections:
        """Move the boxes from an image of (height, width) ``from_size`` to one of ``to_size``, clipped to it.

        Masks go with their boxes, which are within ``from_size`` already, so that clipping mends rounding only.
        """
        height, width = to_size
        scale = self.boxes.new_tensor([width / from_size[1], height / from_size[0]]).repeat(2)
        limit = self.boxes.new_tensor([width, height]).repeat(2)
        return replace(self, boxes=torch.minimum(self.boxes * scale, limit).clamp(min=0))

    def paste(self, height: int, width: int, threshold: float = 0.5) -> Tensor:
        """Masks (N, height, width) bool in an image of that size, the one that the boxes are in; see ``paste_masks``.

        Raises:
            ValueError: for detections without masks.
        """
        return paste_masks(self._masks(), self.boxes, height, width, threshold)

    def rle(self, height: int, width: int, threshold: float = 0.5) -> list[Rle]:
        """``paste`` as one compressed COCO RLE for each detection: ``size`` [height, width] and ``counts``.

        Raises:
            ValueError: for detections without masks.
        """
        return encode_masks(self._masks(), self.boxes, height, width, threshold)

    def to_coco(
        self, image_id: int, label_space: LabelSpace, size: tuple[int, int] | None = None
    ) -> list[dict[str, Any]]:
        """COCO results records: ``bbox`` is xywh, ``category_id`` comes from the label space.

        Args:
            image_id: the data set's id.
            label_space: the detector's.
            size: (height, width) of the image; with it, masks become ``segmentation``: a compressed RLE.
        """
        xywh = self.boxes.clone()
        xywh[:, 2:] -= xywh[:, :2]
        records: list[dict[str, Any]] = [
            {"image_id": image_id, "category_id": label_space.category_ids[label], "bbox": box, "score": score}
            for box, score, label in zip(xywh.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        ]
        if self.masks is not None and size is not None:
            for record, segmentation in zip(records, self.rle(*size), strict=True):
                record["segmentation"] = segmentation
        return records

    def _masks(self) -> Tensor:
        if self.masks is None:
            raise ValueError("these detections have no masks: take a detector that makes them, e.g. mask_rcnn_resnet50")
        return self.masks
