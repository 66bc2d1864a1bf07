"""ATSS: one square anchor per cell, positives chosen by statistics of the objects; with conv towers or DyHead.

Paper: Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample
Selection", CVPR 2020, arXiv:1912.02424. The variants and their figures are those of mmdetection (Apache-2.0) and of
microsoft/DynamicHead (MIT).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_zoo.detector import Detector
from dyhead_zoo.factory import build_detector
from dyhead_zoo.layers.anchors import AnchorGenerator, DeltaCoder
from dyhead_zoo.layers.assigners import IGNORED, atss_assign
from dyhead_zoo.layers.losses import giou_loss, mean_over_ranks, sigmoid_focal_loss
from dyhead_zoo.layers.postprocess import by_place, dense_detections, take_rows
from dyhead_zoo.layers.targets import Assignment, cells_inside, matched_objects
from dyhead_zoo.layers.tower import ConvTower, prior_bias
from dyhead_zoo.models.sources import CAFFE_ARCH, CAFFE_INPUT, DYHEAD_PAPER, LITE, MMDET, MMDET_URL, SMALL
from dyhead_zoo.ops.boxes import centerness
from dyhead_zoo.pretrained import COCO_SUBSET, PretrainedCfg, bundled_record
from dyhead_zoo.registry import register_detector, register_family
from dyhead_zoo.structures import DetectionTensors, Target
from dyhead_zoo.weights import ClassRows


class ATSSOutput(NamedTuple):
    """Raw outputs, one tensor per level, fine to coarse.

    Attributes:
        cls_logits: (B, C, H_l, W_l).
        box_deltas: (B, 4, H_l, W_l), relative to the anchors, in units of the coder's standard deviations.
        centerness: (B, 1, H_l, W_l) logits.
        image_sizes: (B, 2) int64, (height, width) of each picture within the canvas.
        canvas: (height, width) of the padded batch.
    """

    cls_logits: tuple[Tensor, ...]
    box_deltas: tuple[Tensor, ...]
    centerness: tuple[Tensor, ...]
    image_sizes: Tensor
    canvas: tuple[int, int]


class ATSSHead(nn.Module):
    """Classification, box deltas and centerness from each pyramid level, with weights shared over the levels.

    Args:
        in_channels, strides: of the pyramid.
        num_classes: C.
        towers: conv-GroupNorm-ReLU layers before the predictions of each branch; 0 on top of DyHead.
        pred_kernel: size of the prediction convolutions, 3 (mmdet) or 1 (official DyHead).
        anchor_offset: anchor centres in cells: 0 corner (mmdet), 0.5 middle (official DyHead).
        anchor_scale: side of the anchor in strides.
        pad_divisor: cells beyond a picture's own size rounded up to it take no part in training.
        rank_by_product: pre-NMS ranking by class times centerness (official) instead of class alone (mmdet).
        score_threshold, pre_nms, nms_threshold, max_detections: see ``dense_detections``.
    """

    def __init__(
        self,
        in_channels: int,
        strides: tuple[int, ...],
        num_classes: int,
        *,
        towers: int = 4,
        pred_kernel: int = 3,
        anchor_offset: float = 0.0,
        anchor_scale: float = 8.0,
        pad_divisor: int = 32,
        rank_by_product: bool = False,
        score_threshold: float = 0.05,
        pre_nms: int = 1000,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.num_classes, self.strides, self.pad_divisor = num_classes, strides, pad_divisor
        self.rank_by_product, self.score_threshold, self.pre_nms = rank_by_product, score_threshold, pre_nms
        self.nms_threshold, self.max_detections = nms_threshold, max_detections
        self.cls_tower = ConvTower(in_channels, towers)
        self.box_tower = ConvTower(in_channels, towers)
        pad = pred_kernel // 2
        self.cls_logits = nn.Conv2d(in_channels, num_classes, pred_kernel, padding=pad)
        self.box_deltas = nn.Conv2d(in_channels, 4, pred_kernel, padding=pad)
        self.centerness = nn.Conv2d(in_channels, 1, pred_kernel, padding=pad)
        self.scales = nn.Parameter(torch.ones(len(strides)))
        for conv in (self.cls_logits, self.box_deltas, self.centerness):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.cls_logits.bias, prior_bias(0.01))  # type: ignore[arg-type]
        self.anchors = AnchorGenerator(strides, [[anchor_scale * s] for s in strides], offset=anchor_offset)
        self.coder = DeltaCoder((0.1, 0.1, 0.2, 0.2))

    def class_rows(self) -> dict[str, ClassRows]:
        """Parameters with one row per class."""
        return {"cls_logits.weight": ClassRows(), "cls_logits.bias": ClassRows()}

    def forward(self, features: list[Tensor], image_sizes: Tensor, canvas: tuple[int, int]) -> ATSSOutput:
        """Pyramid L x (B, C, H_l, W_l), fine to coarse -> ``ATSSOutput``."""
        cls_logits, box_deltas, quality = [], [], []
        for level, x in enumerate(features):
            box = self.box_tower(x)
            cls_logits.append(self.cls_logits(self.cls_tower(x)))
            box_deltas.append(self.box_deltas(box) * self.scales[level])
            quality.append(self.centerness(box))
        return ATSSOutput(tuple(cls_logits), tuple(box_deltas), tuple(quality), image_sizes, canvas)

    def assign(self, raw: ATSSOutput, targets: list[Target]) -> Assignment:
        """Which object each anchor learns; those beyond a picture's own padded size are ignored."""
        per_level = self.anchors(raw.cls_logits)
        anchors = torch.cat(per_level)
        owners = []
        for size, target in zip(raw.image_sizes.tolist(), targets, strict=True):
            inside = torch.cat(
                [cells_inside(x, s, size, self.pad_divisor) for x, s in zip(raw.cls_logits, self.strides, strict=True)]
            )
            counts = [int(part.sum()) for part in inside.split([len(level) for level in per_level])]
            owner = torch.full((len(anchors),), IGNORED, dtype=torch.int64, device=anchors.device)
            owner[inside] = atss_assign(anchors[inside], counts, target["boxes"].to(anchors))
            owners.append(owner)
        return Assignment(per_level, torch.stack(owners))

    def loss(self, raw: ATSSOutput, targets: list[Target]) -> dict[str, Tensor]:
        """Focal loss on classes, centerness-weighted GIoU (x 2) on boxes, cross entropy on centerness.

        Classification and centerness are divided by the number of positives (at least one per picture), the box term by
        the sum of the centerness targets, both as means over the processes.
        """
        with torch.autocast(raw.image_sizes.device.type, enabled=False):
            places, owner = self.assign(raw, targets)
            logits = torch.cat([by_place(x, self.num_classes) for x in raw.cls_logits], dim=1).float()
            deltas = torch.cat([by_place(x, 4) for x in raw.box_deltas], dim=1).float()
            quality = torch.cat([by_place(x, 1) for x in raw.centerness], dim=1).float().squeeze(-1)
            positive = owner >= 0
            image, place = positive.nonzero(as_tuple=True)
            boxes, labels = matched_objects(targets, image, owner[positive])
            num_positive = mean_over_ranks(positive.sum(1).clamp(min=1).sum().float())
            wanted = torch.zeros_like(logits)
            wanted[image, place, labels] = 1
            loss_cls = (sigmoid_focal_loss(logits, wanted) * (owner != IGNORED)[..., None]).sum() / num_positive
            anchor = torch.cat(places)[place]
            goal = centerness((anchor[:, :2] + anchor[:, 2:]) / 2, boxes)
            total_goal = mean_over_ranks(goal.sum()).clamp(min=1)
            predicted = self.coder.decode(deltas[positive], anchor)
            loss_box = 2 * (giou_loss(predicted, boxes) * goal).sum() / total_goal
            loss_centerness = (
                F.binary_cross_entropy_with_logits(quality[positive], goal, reduction="sum") / num_positive
            )
        return {"loss_cls": loss_cls, "loss_box": loss_box, "loss_centerness": loss_centerness}

    def decode_tensors(self, raw: ATSSOutput) -> DetectionTensors:
        """Detections in pixels of the canvas, clipped to each picture; score = class probability x centerness."""
        anchors = self.anchors(raw.cls_logits)
        deltas = [by_place(x, 4) for x in raw.box_deltas]

        def decode(level: int, rows: Tensor) -> Tensor:
            return self.coder.decode(take_rows(deltas[level], rows), take_rows(anchors[level], rows))

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
        )


@register_family("atss")
def atss(name: str, pretrained: bool, user: dict[str, Any], **defaults: Any) -> Detector:
    """ATSS with conv towers, or with DyHead in their place."""
    defaults.setdefault("towers", 0 if user.get("dyhead", defaults.get("dyhead", 0)) else 4)
    return build_detector(ATSSHead, name, pretrained, user, **defaults)


_MMDET = MMDET.replace(paper_ids=("arXiv:1912.02424",), arch={"frozen_stages": 1, "norm_eval": True})
_MMDET_DYHEAD = _MMDET.replace(paper_ids=(DYHEAD_PAPER, *_MMDET.paper_ids))
_OFFICIAL = PretrainedCfg(
    source="detectron2",
    license="mit",
    origin_url="https://github.com/microsoft/DynamicHead",
    paper_ids=_MMDET_DYHEAD.paper_ids,
    reported_by="microsoft/DynamicHead README, COCO val2017",
    pad_divisor=128,
)
_OFFICIAL_ARCH = {
    "coarse_offsets": "reinterpret",
    "zero_init_offset": False,
    "pred_kernel": 1,
    "anchor_offset": 0.5,
    "extra_relu": True,
    "rank_by_product": True,
}
_OFFICIAL_CAFFE_ARCH = {**_OFFICIAL_ARCH, "caffe": True, "freeze_norm": True}
_SMALL = SMALL.replace(paper_ids=_MMDET_DYHEAD.paper_ids)
_LITE = LITE.replace(
    paper_ids=_MMDET_DYHEAD.paper_ids,
    arch={"anchor_offset": 0.5, "fpn_norm": True, "score_threshold": 0.01},
)

cfgs = {
    "atss_resnet50.mmdet_1x_coco": _MMDET.replace(
        url=f"{MMDET_URL}/atss/atss_r50_fpn_1x_coco/atss_r50_fpn_1x_coco_20200209-985f7bd0.pth",
        hash_prefix="985f7bd0",
        reported={"AP": 39.4},
    ),
    "atss_resnet101.mmdet_1x_coco": _MMDET.replace(
        url=f"{MMDET_URL}/atss/atss_r101_fpn_1x_coco/atss_r101_fpn_1x_20200825-dfcadd6f.pth",
        hash_prefix="dfcadd6f",
        reported={"AP": 41.5},
    ),
    "atss_resnet50_dyhead6.mmdet_1x_coco": _MMDET_DYHEAD.replace(
        url=f"{MMDET_URL}/dyhead/atss_r50_fpn_dyhead_4x4_1x_coco/"
        "atss_r50_fpn_dyhead_4x4_1x_coco_20211219_023314-eaa620c6.pth",
        mirrors=(
            "https://github.com/shinya7y/weights/releases/download/v1.0.0/"
            "atss_r50_fpn_dyhead_4x4_1x_coco_20211219_023314-eaa620c6.pth",
        ),
        hash_prefix="eaa620c6",
        arch={**_MMDET.arch, "coarse_offsets": "reinterpret"},
        reported={"AP": 43.3},
    ),
    "atss_resnet50_dyhead6.mmdet_caffe_1x_coco": _MMDET_DYHEAD.replace(
        url=f"{MMDET_URL}/dyhead/atss_r50_fpn_dyhead_for_reproduction_1x_coco/"
        "atss_r50_fpn_dyhead_for_reproduction_4x4_1x_coco_20220107_213939-162888e6.pth",
        mirrors=(
            "https://github.com/shinya7y/weights/releases/download/v1.0.0/"
            "atss_r50_fpn_dyhead_for_reproduction_4x4_1x_coco_20220107_213939-162888e6.pth",
        ),
        hash_prefix="162888e6",
        **CAFFE_INPUT,
        antialias=True,
        pad_divisor=128,
        arch={**_OFFICIAL_ARCH, **CAFFE_ARCH, "extra_relu": False, "rank_by_product": False},
        reported={"AP": 42.5},
    ),
    "atss_resnet50_dyhead6.official_1x_coco": _OFFICIAL.replace(
        url="https://xiyang.blob.core.windows.net/public/dyhead_r50_atss_fpn_1x.pth",
        mirrors=("https://huggingface.co/fuliucansheng/detectron2/resolve/main/dyhead/atss_r50_model.bin",),
        **CAFFE_INPUT,
        arch=_OFFICIAL_CAFFE_ARCH,
        reported={"AP": 42.4},
    ),
    "atss_resnet50_dyhead6.official_mmdet_names_1x_coco": _OFFICIAL.replace(
        source="mmdet",
        url="https://github.com/shinya7y/weights/releases/download/v1.0.0/dyhead_r50_atss_fpn_1x_mmdet-4d5fec82.pth",
        hash_prefix="4d5fec82",
        description="The official weights with mmdetection's parameter names.",
        **CAFFE_INPUT,
        arch=_OFFICIAL_CAFFE_ARCH,
        reported={"AP": 42.3},
        reported_by="mmdetection pull request 6823, COCO val2017",
    ),
    "atss_swin_dyhead6.official_2x_coco": _OFFICIAL.replace(
        url="https://xiyang.blob.core.windows.net/public/dyhead_swint_atss_fpn_2x_ms.pth",
        mirrors=("https://huggingface.co/fuliucansheng/detectron2/resolve/main/dyhead/atss_swin_tiny_model.bin",),
        arch={**_OFFICIAL_ARCH, "drop_path": 0.2},
        reported={"AP": 49.8},
    ),
    "atss_swin_large_dyhead6.mmdet_2x_coco": _MMDET_DYHEAD.replace(
        url=f"{MMDET_URL}/dyhead/atss_swin-l-p4-w12_fpn_dyhead_mstrain_2x_coco/"
        "atss_swin-l-p4-w12_fpn_dyhead_mstrain_2x_coco_20220509_100315-bc5b6516.pth",
        hash_prefix="bc5b6516",
        short_side=1200,
        long_side=2000,
        antialias=True,
        pad_divisor=128,
        arch={**_OFFICIAL_ARCH, "drop_path": 0.2, "extra_relu": False, "rank_by_product": False},
        reported={"AP": 56.2},
    ),
    "atss_lite0_dyhead2.coco2148": _LITE.replace(
        **bundled_record("atss_lite0_dyhead2.coco2148"),
        **COCO_SUBSET,
        base_model="timm/tf_efficientnet_lite0.in1k",
        description="Trained from ImageNet weights on 2,148 COCO photos of at most 384 px, on two CPU cores: to try "
        "things out and to fine-tune from, not for accuracy.",
    ),
    "atss_lite2_dyhead3": _LITE,
    "test_atss": _SMALL,
    "test_atss_dyhead1.coco2148": _SMALL.replace(
        **bundled_record("test_atss_dyhead1.coco2148"),
        **COCO_SUBSET,
        short_side=192,
        long_side=192,
        description="Trained from random weights for a few minutes: for tests of code that needs weights, not for use.",
    ),
}
"""Weights by ``name.tag``, the default tag of a name first."""


@register_detector
def atss_resnet50(pretrained: bool = False, **kwargs: Any) -> Detector:
    """ATSS with its four-convolution towers, ResNet-50."""
    return atss("atss_resnet50", pretrained, kwargs, backbone="resnet50")


@register_detector
def atss_resnet101(pretrained: bool = False, **kwargs: Any) -> Detector:
    """ATSS with its four-convolution towers, ResNet-101."""
    return atss("atss_resnet101", pretrained, kwargs, backbone="resnet101")


@register_detector
def atss_resnet50_dyhead1(pretrained: bool = False, **kwargs: Any) -> Detector:
    """ATSS, ResNet-50, one DyHead block; the depths of Table 4 of the DyHead paper."""
    return atss("atss_resnet50_dyhead1", pretrained, kwargs, backbone="resnet50", dyhead=1)


@register_detector
def atss_resnet50_dyhead2(pretrained: bool = False, **kwargs: Any) -> Detector:
    """ATSS, ResNet-50, two DyHead blocks."""
    return atss("atss_resnet50_dyhead2", pretrained, kwargs, backbone="resnet50", dyhead=2)


@register_detector
def atss_resnet50_dyhead4(pretrained: bool = False, **kwargs: Any) -> Detector:
    """ATSS, ResNet-50, four DyHead blocks."""
    return atss("atss_resnet50_dyhead4", pretrained, kwargs, backbone="resnet50", dyhead=4)


@register_detector
def atss_resnet50_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """ATSS, ResNet-50, six DyHead blocks: the paper's main model."""
    return atss("atss_resnet50_dyhead6", pretrained, kwargs, backbone="resnet50", dyhead=6)


@register_detector
def atss_resnet50_dyhead8(pretrained: bool = False, **kwargs: Any) -> Detector:
    """ATSS, ResNet-50, eight DyHead blocks."""
    return atss("atss_resnet50_dyhead8", pretrained, kwargs, backbone="resnet50", dyhead=8)


@register_detector
def atss_resnet50_dyhead10(pretrained: bool = False, **kwargs: Any) -> Detector:
    """ATSS, ResNet-50, ten DyHead blocks."""
    return atss("atss_resnet50_dyhead10", pretrained, kwargs, backbone="resnet50", dyhead=10)


@register_detector
def atss_swin_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """ATSS, Swin-T, six DyHead blocks."""
    return atss("atss_swin_dyhead6", pretrained, kwargs, backbone="swin", dyhead=6)


@register_detector
def atss_swin_large_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """ATSS, Swin-L with windows of 12, six DyHead blocks."""
    return atss("atss_swin_large_dyhead6", pretrained, kwargs, backbone="swin_large", dyhead=6)


@register_detector
def atss_lite0_dyhead2(pretrained: bool = False, **kwargs: Any) -> Detector:
    """ATSS, EfficientNet-Lite0, two DyHead blocks of 96 channels: trains and runs on a CPU."""
    return atss("atss_lite0_dyhead2", pretrained, kwargs, backbone="lite0", channels=96, dyhead=2)


@register_detector
def atss_lite2_dyhead3(pretrained: bool = False, **kwargs: Any) -> Detector:
    """ATSS, EfficientNet-Lite2, three DyHead blocks of 160 channels."""
    return atss("atss_lite2_dyhead3", pretrained, kwargs, backbone="lite2", channels=160, dyhead=3)


@register_detector
def test_atss(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny ATSS with one tower layer, for tests."""
    return atss("test_atss", pretrained, kwargs, backbone="test_resnet", channels=32, towers=1)


@register_detector
def test_atss_dyhead1(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny ATSS with one DyHead block, for tests."""
    return atss("test_atss_dyhead1", pretrained, kwargs, backbone="test_efficientnet", channels=32, dyhead=1)
