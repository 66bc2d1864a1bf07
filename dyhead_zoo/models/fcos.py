"""FCOS: every point inside an object predicts the distances to its four sides; with conv towers or DyHead.

Paper: Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019, arXiv:1904.01355; its later
version, arXiv:2006.09214, adds what is the default here: centre sampling, centerness on the regression branch, GIoU,
distances in strides. Variants and figures are those of mmdetection (Apache-2.0), torchvision (BSD-3-Clause) and of the
authors' two repositories, whose weights are for non-commercial use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_zoo.detector import Detector
from dyhead_zoo.factory import build_detector
from dyhead_zoo.layers.anchors import grid_points
from dyhead_zoo.layers.assigners import fcos_assign
from dyhead_zoo.layers.losses import giou_loss, iou_loss, mean_over_ranks, sigmoid_focal_loss
from dyhead_zoo.layers.postprocess import by_place, dense_detections, take_rows
from dyhead_zoo.layers.targets import Assignment, matched_objects
from dyhead_zoo.layers.tower import ConvTower, prior_bias
from dyhead_zoo.models.sources import CAFFE_ARCH, CAFFE_INPUT, DYHEAD_PAPER, LITE, MMDET, MMDET_URL, SMALL, TORCHVISION
from dyhead_zoo.ops.boxes import boxes_from_distances, centerness
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.registry import register_detector, register_family
from dyhead_zoo.structures import DetectionTensors, Target
from dyhead_zoo.weights import ClassRows


class FCOSOutput(NamedTuple):
    """Raw outputs, one tensor per level, fine to coarse.

    Attributes:
        cls_logits: (B, C, H_l, W_l).
        box_distances: (B, 4, H_l, W_l) float32 pixels from the point to the left, top, right and bottom side, >= 0.
        centerness: (B, 1, H_l, W_l) logits.
        image_sizes: (B, 2) int64, (height, width) of each picture within the canvas.
        canvas: (height, width) of the padded batch.
    """

    cls_logits: tuple[Tensor, ...]
    box_distances: tuple[Tensor, ...]
    centerness: tuple[Tensor, ...]
    image_sizes: Tensor
    canvas: tuple[int, int]


class FCOSHead(nn.Module):
    """Classification, distances and centerness from each pyramid level, with weights shared over the levels.

    Args:
        in_channels, strides: of the pyramid.
        num_classes: C.
        towers: conv-GroupNorm-ReLU layers before the predictions of each branch; 0 on top of DyHead.
        tower_bias: whether their convolutions have a bias.
        point_offset: points in cells: 0.5 middle, 0 corner (torchvision).
        canvas_strides: points as torchvision places them, see ``AnchorGenerator``.
        distances: ``'relu'``: in strides, cut off at 0; ``'exp'``: the exponential, in pixels (plain FCOS).
        centerness_on: branch that predicts it: ``'box'`` or ``'cls'`` (plain FCOS).
        centre_radius: of centre sampling, in strides; None: every point inside an object is positive (plain FCOS).
        box_loss: ``'giou'`` or ``'iou'`` (plain FCOS).
        weigh_boxes: box losses weighted by centerness; False is torchvision's plain mean.
        rank_by_product, sqrt_score, threshold_score, score_threshold, pre_nms, nms_threshold, max_detections:
            see ``dense_detections``.
        pad_divisor: not used; points in the padding are negatives, as in every published FCOS.
    """

    def __init__(
        self,
        in_channels: int,
        strides: tuple[int, ...],
        num_classes: int,
        *,
        towers: int = 4,
        tower_bias: bool = True,
        point_offset: float = 0.5,
        canvas_strides: bool = False,
        distances: Literal["relu", "exp"] = "relu",
        centerness_on: Literal["box", "cls"] = "box",
        centre_radius: float | None = 1.5,
        box_loss: Literal["giou", "iou"] = "giou",
        weigh_boxes: bool = True,
        rank_by_product: bool = False,
        sqrt_score: bool = False,
        threshold_score: bool = False,
        score_threshold: float = 0.05,
        pre_nms: int = 1000,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
        pad_divisor: int = 32,
    ) -> None:
        super().__init__()
        _check_choice("distances", distances, ("relu", "exp"))
        _check_choice("centerness_on", centerness_on, ("box", "cls"))
        _check_choice("box_loss", box_loss, ("giou", "iou"))
        self.num_classes, self.strides = num_classes, strides
        self.point_offset, self.canvas_strides = point_offset, canvas_strides
        self.distances, self.centerness_on, self.centre_radius = distances, centerness_on, centre_radius
        self.box_loss, self.weigh_boxes = box_loss, weigh_boxes
        self.rank_by_product, self.sqrt_score, self.threshold_score = rank_by_product, sqrt_score, threshold_score
        self.score_threshold, self.pre_nms = score_threshold, pre_nms
        self.nms_threshold, self.max_detections = nms_threshold, max_detections
        self.cls_tower = ConvTower(in_channels, towers, bias=tower_bias)
        self.box_tower = ConvTower(in_channels, towers, bias=tower_bias)
        self.cls_logits = nn.Conv2d(in_channels, num_classes, 3, padding=1)
        self.box_distances = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(in_channels, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(strides)))
        for conv in (self.cls_logits, self.box_distances, self.centerness):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.cls_logits.bias, prior_bias(0.01))  # type: ignore[arg-type]

    def class_rows(self) -> dict[str, ClassRows]:
        """Parameters with one row per class."""
        return {"cls_logits.weight": ClassRows(), "cls_logits.bias": ClassRows()}

    def forward(self, features: list[Tensor], image_sizes: Tensor, canvas: tuple[int, int]) -> FCOSOutput:
        """Pyramid L x (B, C, H_l, W_l), fine to coarse -> ``FCOSOutput``."""
        branches = [(self.cls_tower(x), self.box_tower(x)) for x in features]
        return FCOSOutput(*self.predictions(branches), image_sizes, canvas)

    def predictions(
        self, branches: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Class logits, distances in pixels and centerness logits of each level's (classification, box) features."""
        cls_logits, box_distances, quality = [], [], []
        for level, (cls, box) in enumerate(branches):
            cls_logits.append(self.cls_logits(cls))
            x = self.box_distances(box).float() * self.scales[level]
            box_distances.append(x.exp() if self.distances == "exp" else F.relu(x) * self.strides[level])
            quality.append(self.centerness(box if self.centerness_on == "box" else cls))
        return tuple(cls_logits), tuple(box_distances), tuple(quality)

    def points(self, raw: FCOSOutput) -> list[Tensor]:
        """Points of each level's map: (H_l * W_l, 2), x first, in pixels of the canvas."""
        points = []
        for x, stride in zip(raw.cls_logits, self.strides, strict=True):
            size = (x.shape[-2], x.shape[-1])
            steps = (raw.canvas[0] // size[0], raw.canvas[1] // size[1]) if self.canvas_strides else stride
            points.append(grid_points(size, steps, self.point_offset, x))
        return points

    def assign(self, raw: FCOSOutput, targets: list[Target]) -> Assignment:
        """Which object each point learns."""
        per_level = self.points(raw)
        points, counts = torch.cat(per_level), [len(level) for level in per_level]
        owners = [fcos_assign(points, counts, self.strides, t["boxes"].to(points), self.centre_radius) for t in targets]
        return Assignment(per_level, torch.stack(owners))

    def loss(self, raw: FCOSOutput, targets: list[Target]) -> dict[str, Tensor]:
        """Focal loss on classes, IoU or GIoU on boxes weighted by centerness, cross entropy on centerness.

        Classification and centerness are divided by the number of positives, the box term by the sum of its weights,
        both as means over the processes.
        """
        with torch.autocast(raw.image_sizes.device.type, enabled=False):
            places, owner = self.assign(raw, targets)
            points = torch.cat(places)
            logits = torch.cat([by_place(x, self.num_classes) for x in raw.cls_logits], dim=1).float()
            distances = torch.cat([by_place(x, 4) for x in raw.box_distances], dim=1)
            quality = torch.cat([by_place(x, 1) for x in raw.centerness], dim=1).float().squeeze(-1)
            positive = owner >= 0
            image, place = positive.nonzero(as_tuple=True)
            boxes, labels = matched_objects(targets, image, owner[positive])
            num_positive = mean_over_ranks(positive.sum().float()).clamp(min=1)
            wanted = torch.zeros_like(logits)
            wanted[image, place, labels] = 1
            loss_cls = sigmoid_focal_loss(logits, wanted).sum() / num_positive
            goal = centerness(points[place], boxes)
            predicted = boxes_from_distances(points[place], distances[positive])
            box_terms = (giou_loss if self.box_loss == "giou" else iou_loss)(predicted, boxes)
            if self.weigh_boxes:
                loss_box = (box_terms * goal).sum() / mean_over_ranks(goal.sum()).clamp(min=1e-6)
            else:
                loss_box = box_terms.sum() / num_positive
            loss_centerness = (
                F.binary_cross_entropy_with_logits(quality[positive], goal, reduction="sum") / num_positive
            )
        return {"loss_cls": loss_cls, "loss_box": loss_box, "loss_centerness": loss_centerness}

    def decode_tensors(self, raw: FCOSOutput) -> DetectionTensors:
        """Detections in pixels of the canvas, clipped to each picture; score = class probability x centerness."""
        points = self.points(raw)
        distances = [by_place(x, 4) for x in raw.box_distances]

        def decode(level: int, rows: Tensor) -> Tensor:
            return boxes_from_distances(take_rows(points[level], rows), take_rows(distances[level], rows))

        return dense_detections(
            [by_place(x, self.num_classes) for x in raw.cls_logits],
            [by_place(x, 1).squeeze(-1) for x in raw.centerness],
            decode,
            raw.image_sizes,
            score_threshold=self.score_threshold,
            pre_nms=self.pre_nms,
            nms_threshold=self.nms_threshold,
            max_detections=self.max_detections,
            rank_by_product=self.rank_by_product,
            sqrt_score=self.sqrt_score,
            threshold_score=self.threshold_score,
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: use {' or '.join(map(repr, choices))}")


@register_family("fcos")
def fcos(name: str, pretrained: bool, user: dict[str, Any], **defaults: Any) -> Detector:
    """FCOS with conv towers, or with DyHead in their place; a ReLU before P7, as in every published FCOS."""
    defaults.setdefault("towers", 0 if user.get("dyhead", defaults.get("dyhead", 0)) else 4)
    defaults.setdefault("extra_relu", True)
    return build_detector(FCOSHead, name, pretrained, user, **defaults)


_HUB = "https://huggingface.co/tianzhi"
_PAPERS = ("arXiv:1904.01355", "arXiv:2006.09214")
_DYHEAD_PAPERS = (DYHEAD_PAPER, *_PAPERS)
_OLD_CAFFE_INPUT: dict[str, Any] = {**CAFFE_INPUT, "mean": (102.9801, 115.9465, 122.7717)}
_PLAIN_ARCH = {"distances": "exp", "centerness_on": "cls", "centre_radius": None, "box_loss": "iou"}
_AUTHORS_ARCH = {**CAFFE_ARCH, "rank_by_product": True, "sqrt_score": True}

_MMDET = MMDET.replace(paper_ids=_PAPERS)
_MMDET_PLAIN_ARCH = {**_PLAIN_ARCH, "tower_bias": False, "nms_threshold": 0.5}
_MMDET_PLAIN = _MMDET.replace(**_OLD_CAFFE_INPUT, arch={**CAFFE_ARCH, **_MMDET_PLAIN_ARCH})
_AUTHORS = PretrainedCfg(
    license="other",
    limits=("Its authors' code and weights are for non-commercial purposes only.",),
    paper_ids=_PAPERS,
    arch=_AUTHORS_ARCH,
    **CAFFE_INPUT,
)
_OFFICIAL = _AUTHORS.replace(
    source="maskrcnn_benchmark",
    origin_url="https://github.com/tianzhi0549/FCOS",
    reported_by="tianzhi0549/FCOS README, COCO minival",
    rounding="floor",
    **_OLD_CAFFE_INPUT,
)
_ADELAIDET = _AUTHORS.replace(
    source="detectron2",
    origin_url="https://github.com/aim-uofa/AdelaiDet",
    reported_by="AdelaiDet README, COCO val2017",
)
_SMALL = SMALL.replace(paper_ids=_PAPERS)
_LITE = LITE.replace(
    paper_ids=_DYHEAD_PAPERS,
    arch={"fpn_norm": True, "score_threshold": 0.01},
)


def _mmdet_url(config: str, digest: str) -> dict[str, str]:
    return {"url": f"{MMDET_URL}/fcos/{config}/{config}-{digest}.pth", "hash_prefix": digest}


cfgs = {
    "fcos_resnet50.torchvision_coco": TORCHVISION.replace(
        paper_ids=_PAPERS,
        url="https://download.pytorch.org/models/fcos_resnet50_fpn_coco-99b0c9b7.pth",
        hash_prefix="99b0c9b7",
        description="torchvision's own detector shows scores above 0.2 only; here as few are cut off as for its AP.",
        arch={
            "freeze_norm": True,
            "frozen_stages": 1,
            "point_offset": 0.0,
            "canvas_strides": True,
            "weigh_boxes": False,
            "rank_by_product": True,
            "sqrt_score": True,
            "threshold_score": True,
        },
        reported={"AP": 39.2},
        reported_by="torchvision's FCOS_ResNet50_FPN_Weights.COCO_V1, COCO val2017",
    ),
    "fcos_resnet50.mmdet_improved_1x_coco": _MMDET.replace(
        **_mmdet_url("fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco", "0a0d75a8"),
        description="With centre sampling, centerness on the regression branch, GIoU and distances in strides.",
        **CAFFE_INPUT,
        arch=CAFFE_ARCH,
        reported={"AP": 38.7},
    ),
    "fcos_resnet50.mmdet_1x_coco": _MMDET_PLAIN.replace(
        **_mmdet_url("fcos_r50_caffe_fpn_gn-head_1x_coco", "821213aa"),
        reported={"AP": 36.6},
    ),
    "fcos_resnet50.mmdet_2x_coco": _MMDET_PLAIN.replace(
        **_mmdet_url("fcos_r50_caffe_fpn_gn-head_mstrain_640-800_2x_coco", "d92ceeea"),
        reported={"AP": 38.5},
    ),
    "fcos_resnet50.official_1x_coco": _OFFICIAL.replace(
        url=f"{_HUB}/FCOS/resolve/main/FCOS_R_50_FPN_1x.pth",
        arch={**_AUTHORS_ARCH, **_PLAIN_ARCH},
        reported={"AP": 37.1},
    ),
    "fcos_resnet50.official_improved_1x_coco": _OFFICIAL.replace(
        url=f"{_HUB}/FCOS/resolve/main/FCOS_imprv_R_50_FPN_1x.pth",
        reported={"AP": 38.7},
    ),
    "fcos_resnet50.adelaidet_1x_coco": _ADELAIDET.replace(
        url=f"{_HUB}/AdelaiDet-FCOS/resolve/main/FCOS_R_50_1x.pth",
        reported={"AP": 38.7},
    ),
    "fcos_resnet50.adelaidet_2x_coco": _ADELAIDET.replace(
        url=f"{_HUB}/AdelaiDet-FCOS/resolve/main/FCOS_MS_R_50_2x.pth",
        reported={"AP": 41.0},
    ),
    "fcos_resnet101.mmdet_2x_coco": _MMDET_PLAIN.replace(
        **_mmdet_url("fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco", "511424d6"),
        reported={"AP": 40.8},
    ),
    "fcos_resnet101.mmdet_1x_coco": _MMDET_PLAIN.replace(
        **_mmdet_url("fcos_r101_caffe_fpn_gn-head_1x_coco", "0e37b982"),
        reported={"AP": 39.1},
    ),
    "fcos_resnet101.official_improved_2x_coco": _OFFICIAL.replace(
        url=f"{_HUB}/FCOS/resolve/main/FCOS_imprv_R_101_FPN_2x.pth",
        reported={"AP": 43.0},
    ),
    "fcos_resnext101_64x4d.mmdet_2x_coco": _MMDET.replace(
        **_mmdet_url("fcos_x101_64x4d_fpn_gn-head_mstrain_640-800_2x_coco", "ede514a8"),
        arch={**_MMDET_PLAIN_ARCH, "frozen_stages": 1, "norm_eval": True},
        reported={"AP": 42.6},
    ),
    "fcos_resnet50_dyhead6": PretrainedCfg(license="apache-2.0", paper_ids=_DYHEAD_PAPERS),
    "fcos_swin_dyhead6": PretrainedCfg(license="apache-2.0", paper_ids=_DYHEAD_PAPERS, arch={"drop_path": 0.2}),
    "fcos_lite0_dyhead2": _LITE,
    "test_fcos": _SMALL,
    "test_fcos_dyhead1": _SMALL.replace(paper_ids=_DYHEAD_PAPERS),
}
"""Weights by ``name.tag``, the default tag of a name first."""


@register_detector
def fcos_resnet50(pretrained: bool = False, **kwargs: Any) -> Detector:
    """FCOS with its four-convolution towers, ResNet-50."""
    return fcos("fcos_resnet50", pretrained, kwargs, backbone="resnet50")


@register_detector
def fcos_resnet101(pretrained: bool = False, **kwargs: Any) -> Detector:
    """FCOS with its four-convolution towers, ResNet-101."""
    return fcos("fcos_resnet101", pretrained, kwargs, backbone="resnet101")


@register_detector
def fcos_resnext101_64x4d(pretrained: bool = False, **kwargs: Any) -> Detector:
    """FCOS with its four-convolution towers, ResNeXt-101 64x4d."""
    return fcos("fcos_resnext101_64x4d", pretrained, kwargs, backbone="resnext101_64x4d")


@register_detector
def fcos_resnet50_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """FCOS, ResNet-50, six DyHead blocks."""
    return fcos("fcos_resnet50_dyhead6", pretrained, kwargs, backbone="resnet50", dyhead=6)


@register_detector
def fcos_swin_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """FCOS, Swin-T, six DyHead blocks."""
    return fcos("fcos_swin_dyhead6", pretrained, kwargs, backbone="swin", dyhead=6)


@register_detector
def fcos_lite0_dyhead2(pretrained: bool = False, **kwargs: Any) -> Detector:
    """FCOS, EfficientNet-Lite0, two DyHead blocks of 96 channels: trains and runs on a CPU."""
    return fcos("fcos_lite0_dyhead2", pretrained, kwargs, backbone="lite0", channels=96, dyhead=2)


@register_detector
def test_fcos(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny FCOS with one tower layer, for tests."""
    return fcos("test_fcos", pretrained, kwargs, backbone="test_resnet", channels=32, towers=1)


@register_detector
def test_fcos_dyhead1(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny FCOS with one DyHead block, for tests."""
    return fcos("test_fcos_dyhead1", pretrained, kwargs, backbone="test_efficientnet", channels=32, dyhead=1)
