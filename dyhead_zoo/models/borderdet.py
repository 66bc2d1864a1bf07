"""BorderDet: FCOS, then a second look at the features along the borders of its boxes; with conv towers or DyHead.

Paper: Qiu et al., "BorderDet: Border Feature for Dense Object Detection", ECCV 2020, arXiv:2007.11056. Where it is
silent (norms, widths, score), the released code decides: Megvii-BaseDetection/BorderDet (Apache-2.0).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_zoo.detector import Detector
from dyhead_zoo.factory import build_detector
from dyhead_zoo.layers.assigners import max_iou_assign
from dyhead_zoo.layers.losses import mean_over_ranks, sigmoid_focal_loss
from dyhead_zoo.layers.postprocess import by_place, select_detections, take_rows
from dyhead_zoo.layers.targets import matched_objects
from dyhead_zoo.layers.tower import prior_bias
from dyhead_zoo.models.fcos import FCOSHead, FCOSOutput
from dyhead_zoo.models.sources import CAFFE_ARCH, CAFFE_INPUT, DYHEAD_PAPER, LITE
from dyhead_zoo.ops.border_align import border_align
from dyhead_zoo.ops.boxes import boxes_from_distances
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.registry import register_detector, register_family
from dyhead_zoo.structures import DetectionTensors, Target
from dyhead_zoo.weights import ClassRows

DELTA_STD = 0.5
"""Border deltas are in halves of the width and height of FCOS's box."""


class BorderDetOutput(NamedTuple):
    """Raw outputs, one tensor per level, fine to coarse; the first three are those of FCOS.

    Attributes:
        cls_logits: (B, C, H_l, W_l).
        box_distances: (B, 4, H_l, W_l) float32 pixels from the point to the left, top, right and bottom side, >= 0.
        centerness: (B, 1, H_l, W_l) logits.
        border_logits: (B, C, H_l, W_l), of the second classification.
        border_deltas: (B, 4, H_l, W_l), shifts of the box's corners in halves of its width and height.
        image_sizes: (B, 2) int64, (height, width) of each picture within the canvas.
        canvas: (height, width) of the padded batch.
    """

    cls_logits: tuple[Tensor, ...]
    box_distances: tuple[Tensor, ...]
    centerness: tuple[Tensor, ...]
    border_logits: tuple[Tensor, ...]
    border_deltas: tuple[Tensor, ...]
    image_sizes: Tensor
    canvas: tuple[int, int]

    @property
    def first(self) -> FCOSOutput:
        """What FCOS alone gives."""
        return FCOSOutput(self.cls_logits, self.box_distances, self.centerness, self.image_sizes, self.canvas)


def _instance_norm(x: Tensor) -> Tensor:
    """Normalise every channel (B, C, H, W) by its own mean and deviation, also where it is a single cell."""
    return F.layer_norm(x, x.shape[2:])


class BorderBranch(nn.Module):
    """Border Alignment Module: features of the point and of the four borders of its box (section 3.3).

    Statistics are those of the whole canvas, padding included.

    Args:
        in_channels: of the features, in and out.
        channels: C of each border and of the point.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.point = nn.Conv2d(in_channels, channels, 1)
        self.borders = nn.Conv2d(in_channels, 4 * channels, 1)
        self.merge = nn.Conv2d(5 * channels, in_channels, 1)
        for conv in (self.point, self.borders, self.merge):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        """Features (B, in_channels, H, W) and a box (B, H * W, 4) xyxy in cells for each -> (B, in_channels, H, W)."""
        point = F.relu(_instance_norm(self.point(x)))
        borders = border_align(F.relu(_instance_norm(self.borders(x))), boxes)
        borders = borders.view(len(x), -1, *x.shape[2:]).to(point.dtype)
        return F.relu(self.merge(torch.cat((borders, point), dim=1)))


class BorderDetHead(FCOSHead):
    """FCOS, whose boxes say where a second classification and regression read the features.

    Args:
        in_channels, strides, num_classes, towers: as in ``FCOSHead``.
        point_offset: points in cells; the released code has them in the corner.
        border_iou: IoU of FCOS's box with an object from which on the border stage learns that object.
        score_threshold, pre_nms, nms_threshold, max_detections: see ``decode_tensors`` and ``select_detections``.
        pad_divisor: not used, as in ``FCOSHead``.
    """

    def __init__(
        self,
        in_channels: int,
        strides: tuple[int, ...],
        num_classes: int,
        *,
        towers: int = 4,
        point_offset: float = 0.0,
        border_iou: float = 0.6,
        score_threshold: float = 0.05,
        pre_nms: int = 1000,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
        pad_divisor: int = 32,
    ) -> None:
        super().__init__(
            in_channels,
            strides,
            num_classes,
            towers=towers,
            point_offset=point_offset,
            score_threshold=score_threshold,
            pre_nms=pre_nms,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
            pad_divisor=pad_divisor,
        )
        self.border_iou = border_iou
        self.border_cls = BorderBranch(in_channels, in_channels)
        self.border_box = BorderBranch(in_channels, in_channels // 2)
        self.border_logits = nn.Conv2d(in_channels, num_classes, 1)
        self.border_deltas = nn.Conv2d(in_channels, 4, 1)
        for conv in (self.border_logits, self.border_deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.border_logits.bias, prior_bias(0.01))  # type: ignore[arg-type]

    def class_rows(self) -> dict[str, ClassRows]:
        """Parameters with one row per class."""
        return super().class_rows() | {"border_logits.weight": ClassRows(), "border_logits.bias": ClassRows()}

    def forward(  # type: ignore[override]
        self, features: list[Tensor], image_sizes: Tensor, canvas: tuple[int, int]
    ) -> BorderDetOutput:
        """Pyramid L x (B, C, H_l, W_l), fine to coarse -> ``BorderDetOutput``."""
        branches = [(self.cls_tower(x), self.box_tower(x)) for x in features]
        first = FCOSOutput(*self.predictions(branches), image_sizes, canvas)
        border_logits, border_deltas = [], []
        for (cls, box), boxes, stride in zip(branches, self.first_boxes(first), self.strides, strict=True):
            cells = boxes / stride - self.point_offset
            limit = cells.new_tensor([cls.shape[-1] - 1, cls.shape[-2] - 1]).repeat(2)
            cells = torch.minimum(cells.clamp(min=0), limit)
            border_logits.append(self.border_logits(self.border_cls(cls, cells)))
            border_deltas.append(self.border_deltas(self.border_box(box, cells)))
        return BorderDetOutput(*first[:3], tuple(border_logits), tuple(border_deltas), image_sizes, canvas)

    def first_boxes(self, raw: FCOSOutput) -> list[Tensor]:
        """Boxes of the FCOS stage by level, (B, H_l * W_l, 4) xyxy in pixels, without gradients, not clipped."""
        points = self.points(raw)
        return [
            boxes_from_distances(p, by_place(x, 4).detach()) for p, x in zip(points, raw.box_distances, strict=True)
        ]

    def loss(self, raw: BorderDetOutput, targets: list[Target]) -> dict[str, Tensor]:  # type: ignore[override]
        """FCOS's terms, and focal loss and L1 of the border stage, divided by its number of positives (Eq. 3)."""
        losses = super().loss(raw.first, targets)
        with torch.autocast(raw.image_sizes.device.type, enabled=False):
            first = torch.cat(self.first_boxes(raw.first), dim=1)
            logits = torch.cat([by_place(x, self.num_classes) for x in raw.border_logits], dim=1).float()
            deltas = torch.cat([by_place(x, 4) for x in raw.border_deltas], dim=1).float()
            threshold = self.border_iou
            owner = torch.stack(
                [
                    max_iou_assign(
                        boxes, t["boxes"].to(boxes), positive=threshold, negative=threshold, low_quality="none"
                    )
                    for boxes, t in zip(first, targets, strict=True)
                ]
            )
            positive = owner >= 0
            image, place = positive.nonzero(as_tuple=True)
            boxes, labels = matched_objects(targets, image, owner[positive])
            num_positive = mean_over_ranks(positive.sum().float()).clamp(min=1)
            wanted = torch.zeros_like(logits)
            wanted[image, place, labels] = 1
            loss_cls = sigmoid_focal_loss(logits, wanted).sum() / num_positive
            base = first[positive]
            goal = (boxes - base) / (DELTA_STD * (base[:, 2:] - base[:, :2]).repeat(1, 2))
            loss_box = F.l1_loss(deltas[positive], goal, reduction="sum") / num_positive
        return losses | {"loss_border_cls": loss_cls, "loss_border_box": loss_box}

    def decode_tensors(self, raw: BorderDetOutput) -> DetectionTensors:  # type: ignore[override]
        """Detections in pixels of the canvas, clipped to each picture.

        Those whose FCOS score, the root of class probability x centerness, is above the threshold; the score is the
        root of that times the border stage's class probability, and the ``pre_nms`` best of each level are kept.
        """
        boxes, scores, labels, valid = [], [], [], []
        for level, first_boxes in enumerate(self.first_boxes(raw.first)):
            quality = by_place(raw.centerness[level], 1).float().sigmoid()
            first = (by_place(raw.cls_logits[level], self.num_classes).float().sigmoid() * quality).sqrt()
            score = (first * by_place(raw.border_logits[level], self.num_classes).float().sigmoid()).sqrt()
            score = score.masked_fill(first <= self.score_threshold, -1.0).flatten(1)
            best, chosen = score.topk(min(self.pre_nms, score.shape[1]), dim=1)
            row = chosen // self.num_classes
            base, deltas = take_rows(first_boxes, row), take_rows(by_place(raw.border_deltas[level], 4).float(), row)
            size = base[..., 2:] - base[..., :2]
            boxes.append(base + deltas * DELTA_STD * size.repeat(1, 1, 2))
            scores.append(best)
            labels.append(chosen % self.num_classes)
            valid.append(best >= 0)
        return select_detections(
            torch.cat(boxes, 1),
            torch.cat(scores, 1),
            torch.cat(labels, 1),
            torch.cat(valid, 1),
            raw.image_sizes,
            nms_threshold=self.nms_threshold,
            max_detections=self.max_detections,
        )


@register_family("borderdet")
def borderdet(name: str, pretrained: bool, user: dict[str, Any], **defaults: Any) -> Detector:
    """BorderDet with conv towers, or with DyHead in their place; a ReLU before P7, as in FCOS."""
    defaults.setdefault("towers", 0 if user.get("dyhead", defaults.get("dyhead", 0)) else 4)
    defaults.setdefault("extra_relu", True)
    return build_detector(BorderDetHead, name, pretrained, user, **defaults)


_CFG = PretrainedCfg(license="apache-2.0", paper_ids=("arXiv:2007.11056",))
_DYHEAD = _CFG.replace(paper_ids=(DYHEAD_PAPER, *_CFG.paper_ids))
_LITE = LITE.replace(
    paper_ids=_DYHEAD.paper_ids,
    arch={"fpn_norm": True, "score_threshold": 0.01},
)
_CVPODS = _CFG.replace(
    source="detectron2",
    origin_url="https://github.com/Megvii-BaseDetection/BorderDet",
    description="The released weights are on a file share without a direct address: download the file that the "
    "repository's README links to and pass it as checkpoint=.",
    **CAFFE_INPUT,
    arch=CAFFE_ARCH,
    reported_by="Megvii-BaseDetection/BorderDet README, COCO val2017",
)

cfgs = {
    "borderdet_resnet50": _CFG,
    "borderdet_resnet50.cvpods_1x_coco": _CVPODS.replace(reported={"AP": 41.4}),
    "borderdet_resnet101": _CFG,
    "borderdet_resnet101.cvpods_2x_coco": _CVPODS.replace(reported={"AP": 45.0}),
    "borderdet_resnet50_dyhead6": _DYHEAD,
    "borderdet_swin_dyhead6": _DYHEAD.replace(arch={"drop_path": 0.2}),
    "borderdet_lite0_dyhead2": _LITE,
    "test_borderdet": _CFG.replace(short_side=384, long_side=384),
    "test_borderdet_dyhead1": _DYHEAD.replace(short_side=384, long_side=384),
}
"""Weights by ``name.tag``, the default tag of a name first."""


@register_detector
def borderdet_resnet50(pretrained: bool = False, **kwargs: Any) -> Detector:
    """BorderDet with FCOS's four-convolution towers, ResNet-50."""
    return borderdet("borderdet_resnet50", pretrained, kwargs, backbone="resnet50")


@register_detector
def borderdet_resnet101(pretrained: bool = False, **kwargs: Any) -> Detector:
    """BorderDet with FCOS's four-convolution towers, ResNet-101."""
    return borderdet("borderdet_resnet101", pretrained, kwargs, backbone="resnet101")


@register_detector
def borderdet_resnet50_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """BorderDet, ResNet-50, six DyHead blocks."""
    return borderdet("borderdet_resnet50_dyhead6", pretrained, kwargs, backbone="resnet50", dyhead=6)


@register_detector
def borderdet_swin_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """BorderDet, Swin-T, six DyHead blocks."""
    return borderdet("borderdet_swin_dyhead6", pretrained, kwargs, backbone="swin", dyhead=6)


@register_detector
def borderdet_lite0_dyhead2(pretrained: bool = False, **kwargs: Any) -> Detector:
    """BorderDet, EfficientNet-Lite0, two DyHead blocks of 96 channels: trains and runs on a CPU."""
    return borderdet("borderdet_lite0_dyhead2", pretrained, kwargs, backbone="lite0", channels=96, dyhead=2)


@register_detector
def test_borderdet(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny BorderDet with one tower layer, for tests."""
    return borderdet("test_borderdet", pretrained, kwargs, backbone="test_resnet", channels=32, towers=1)


@register_detector
def test_borderdet_dyhead1(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny BorderDet with one DyHead block, for tests."""
    return borderdet("test_borderdet_dyhead1", pretrained, kwargs, backbone="test_efficientnet", channels=32, dyhead=1)
