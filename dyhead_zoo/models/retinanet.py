"""RetinaNet: nine anchors per cell, trained on all of them by the focal loss; with conv towers or DyHead.

Paper: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002. The variants and their figures
are those of mmdetection (Apache-2.0), detectron2 (Apache-2.0), torchvision (BSD-3-Clause) and of
microsoft/DynamicHead (MIT), whose RetinaNet keeps its towers on top of DyHead.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_zoo.detector import Detector
from dyhead_zoo.factory import build_detector
from dyhead_zoo.layers.anchors import AnchorGenerator, DeltaCoder
from dyhead_zoo.layers.assigners import IGNORED, max_iou_assign
from dyhead_zoo.layers.losses import giou_loss, mean_over_ranks, sigmoid_focal_loss
from dyhead_zoo.layers.postprocess import by_place, dense_detections, take_rows
from dyhead_zoo.layers.targets import Assignment, cells_inside, matched_objects
from dyhead_zoo.layers.tower import ConvTower, prior_bias
from dyhead_zoo.models.sources import CAFFE_ARCH, CAFFE_INPUT, DETECTRON2, LITE, MMDET, MMDET_URL, SMALL, TORCHVISION
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.registry import register_detector, register_family
from dyhead_zoo.structures import DetectionTensors, Target
from dyhead_zoo.weights import ClassRows


class RetinaNetOutput(NamedTuple):
    """Raw outputs, one tensor per level, fine to coarse. Channels run over the A anchors of a cell (see
    ``AnchorGenerator``), then over the classes or deltas.

    Attributes:
        cls_logits: (B, A * C, H_l, W_l).
        box_deltas: (B, A * 4, H_l, W_l), relative to the anchors.
        image_sizes: (B, 2) int64, (height, width) of each picture within the canvas.
        canvas: (height, width) of the padded batch.
    """

    cls_logits: tuple[Tensor, ...]
    box_deltas: tuple[Tensor, ...]
    image_sizes: Tensor
    canvas: tuple[int, int]


class RetinaNetHead(nn.Module):
    """Classes and box deltas of nine anchors per cell of each pyramid level, with weights shared over the levels.

    Args:
        in_channels, strides: of the pyramid.
        num_classes: C.
        towers: conv-ReLU layers before the predictions of each branch; 0 on top of DyHead.
        tower_norm: GroupNorm in them (torchvision's second version).
        anchor_scale: side of the smallest square anchor in strides; the others are 1/3 and 2/3 of an octave larger.
        whole_pixels: sides of the square anchors and corners of all anchors are whole pixels (torchvision).
        canvas_strides: anchors as torchvision places them, see ``AnchorGenerator``.
        low_quality: see ``max_iou_assign``.
        train_padding: whether cells beyond a picture's own size, rounded up to ``pad_divisor``, are negatives
            (detectron2, torchvision) or take no part in training (mmdet).
        normaliser: what losses are divided by: ``'positives'``: positive anchors of the batch, at least one per picture
            (mmdet); ``'per_image'``: those of each picture, then the mean over the pictures (torchvision);
            ``'running'``: a running mean of the batch's positives, moved in training mode (detectron2).
        box_loss: ``'l1'`` of the deltas, or ``'giou'`` of the boxes (torchvision's second version).
        score_threshold, pre_nms, nms_threshold, max_detections: see ``dense_detections``.
    """

    running_positives: Tensor

    def __init__(
        self,
        in_channels: int,
        strides: tuple[int, ...],
        num_classes: int,
        *,
        towers: int = 4,
        tower_norm: bool = False,
        anchor_scale: float = 4.0,
        whole_pixels: bool = False,
        canvas_strides: bool = False,
        low_quality: Literal["owner", "best", "none"] = "best",
        train_padding: bool = False,
        normaliser: Literal["positives", "per_image", "running"] = "positives",
        box_loss: Literal["l1", "giou"] = "l1",
        pad_divisor: int = 32,
        score_threshold: float = 0.05,
        pre_nms: int = 1000,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("low_quality", low_quality, ("owner", "best", "none")),
            ("normaliser", normaliser, ("positives", "per_image", "running")),
            ("box_loss", box_loss, ("l1", "giou")),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: use one of {', '.join(map(repr, choices))}")
        self.num_classes, self.strides, self.pad_divisor = num_classes, strides, pad_divisor
        self.low_quality, self.train_padding = low_quality, train_padding
        self.normaliser, self.box_loss = normaliser, box_loss
        self.score_threshold, self.pre_nms = score_threshold, pre_nms
        self.nms_threshold, self.max_detections = nms_threshold, max_detections
        sizes = [[anchor_scale * stride * 2 ** (octave / 3) for octave in range(3)] for stride in strides]
        self.anchors = AnchorGenerator(
            strides,
            [[int(side) for side in level] for level in sizes] if whole_pixels else sizes,
            ratios=(0.5, 1.0, 2.0),
            rounded=whole_pixels,
            canvas_strides=canvas_strides,
        )
        self.coder = DeltaCoder()
        self.cls_tower = ConvTower(in_channels, towers, tower_norm)
        self.box_tower = ConvTower(in_channels, towers, tower_norm)
        self.cls_logits = nn.Conv2d(in_channels, self.anchors.per_cell * num_classes, 3, padding=1)
        self.box_deltas = nn.Conv2d(in_channels, self.anchors.per_cell * 4, 3, padding=1)
        for conv in (self.cls_logits, self.box_deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.cls_logits.bias, prior_bias(0.01))  # type: ignore[arg-type]
        if normaliser == "running":
            self.register_buffer("running_positives", torch.tensor(100.0))  # detectron2's first value

    def class_rows(self) -> dict[str, ClassRows]:
        """Parameters with one row per anchor and class."""
        rows = ClassRows(groups=self.anchors.per_cell)
        return {"cls_logits.weight": rows, "cls_logits.bias": rows}

    def forward(self, features: list[Tensor], image_sizes: Tensor, canvas: tuple[int, int]) -> RetinaNetOutput:
        """Pyramid L x (B, C, H_l, W_l), fine to coarse -> ``RetinaNetOutput``."""
        cls_logits = tuple(self.cls_logits(self.cls_tower(x)) for x in features)
        box_deltas = tuple(self.box_deltas(self.box_tower(x)) for x in features)
        return RetinaNetOutput(cls_logits, box_deltas, image_sizes, canvas)

    def assign(self, raw: RetinaNetOutput, targets: list[Target]) -> Assignment:
        """Which object each anchor learns; ignored are those that overlap one a little, see ``max_iou_assign``."""
        per_level = self.anchors(raw.cls_logits, raw.canvas)
        anchors = torch.cat(per_level)
        owners = []
        for size, target in zip(raw.image_sizes.tolist(), targets, strict=True):
            reach = raw.canvas if self.train_padding else size
            cells = [
                cells_inside(x, s, reach, self.pad_divisor) for x, s in zip(raw.cls_logits, self.strides, strict=True)
            ]
            inside = torch.cat(cells).repeat_interleave(self.anchors.per_cell)
            owner = torch.full((len(anchors),), IGNORED, dtype=torch.int64, device=anchors.device)
            owner[inside] = max_iou_assign(
                anchors[inside],
                target["boxes"].to(anchors),
                positive=0.5,
                negative=0.4,
                low_quality=self.low_quality,
            )
            owners.append(owner)
        return Assignment(per_level, torch.stack(owners))

    def divisors(self, positives: Tensor) -> Tensor:
        """What the losses of each picture are divided by: (B,), from its number of positive anchors (B,).

        In training mode this moves the running mean, if that is the normaliser.
        """
        if self.normaliser == "per_image":
            pictures = mean_over_ranks(positives.new_tensor(float(len(positives))))
            return positives.clamp(min=1) * pictures
        if self.normaliser == "positives":
            return mean_over_ranks(positives.clamp(min=1).sum()).expand_as(positives)
        if self.training:
            count = mean_over_ranks(positives.sum()).clamp(min=1)
            self.running_positives.lerp_(count, 0.1)
        return self.running_positives.clone().expand_as(positives)

    def loss(self, raw: RetinaNetOutput, targets: list[Target]) -> dict[str, Tensor]:
        """Focal loss on the classes of all anchors but the ignored, L1 or GIoU on the boxes of the positive ones."""
        with torch.autocast(raw.image_sizes.device.type, enabled=False):
            places, owner = self.assign(raw, targets)
            anchors = torch.cat(places)
            logits = torch.cat([by_place(x, self.num_classes) for x in raw.cls_logits], dim=1).float()
            deltas = torch.cat([by_place(x, 4) for x in raw.box_deltas], dim=1).float()
            positive = owner >= 0
            image, place = positive.nonzero(as_tuple=True)
            boxes, labels = matched_objects(targets, image, owner[positive])
            divisor = self.divisors(positive.sum(1).float())
            wanted = torch.zeros_like(logits)
            wanted[image, place, labels] = 1
            cls_terms = sigmoid_focal_loss(logits, wanted) * (owner != IGNORED)[..., None]
            box_terms = self._box_terms(deltas[positive], anchors[place], boxes)
            return {
                "loss_cls": (cls_terms.sum((1, 2)) / divisor).sum(),
                "loss_box": (box_terms / divisor[image]).sum(),
            }

    def _box_terms(self, deltas: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Box loss of each positive anchor: three times (P, 4) -> (P,)."""
        if self.box_loss == "giou":
            return giou_loss(self.coder.decode(deltas, anchors), boxes)
        return F.l1_loss(deltas, self.coder.encode(boxes, anchors), reduction="none").sum(1)

    def decode_tensors(self, raw: RetinaNetOutput) -> DetectionTensors:
        """Detections in pixels of the canvas, clipped to each picture; score = class probability."""
        anchors = self.anchors(raw.cls_logits, raw.canvas)
        deltas = [by_place(x, 4) for x in raw.box_deltas]

        def decode(level: int, rows: Tensor) -> Tensor:
            return self.coder.decode(take_rows(deltas[level], rows), take_rows(anchors[level], rows))

        return dense_detections(
            [by_place(x, self.num_classes) for x in raw.cls_logits],
            None,
            decode,
            raw.image_sizes,
            score_threshold=self.score_threshold,
            pre_nms=self.pre_nms,
            nms_threshold=self.nms_threshold,
            max_detections=self.max_detections,
        )


@register_family("retinanet")
def retinanet(name: str, pretrained: bool, user: dict[str, Any], **defaults: Any) -> Detector:
    """RetinaNet with conv towers, or with DyHead in their place; P6 from C5 and a ReLU before P7, as in the paper."""
    defaults.setdefault("towers", 0 if user.get("dyhead", defaults.get("dyhead", 0)) else 4)
    defaults.setdefault("extra_from", "c5")
    defaults.setdefault("extra_relu", True)
    return build_detector(RetinaNetHead, name, pretrained, user, **defaults)


_PAPERS = ("arXiv:1708.02002",)
_DYHEAD_PAPERS = ("arXiv:2106.08322", *_PAPERS)
_MMDET_ARCH = {"extra_relu": False, "low_quality": "owner"}
_DETECTRON2_ARCH = {**CAFFE_ARCH, "train_padding": True, "normaliser": "running"}
_TORCHVISION_ARCH = {
    "frozen_stages": 1,
    "whole_pixels": True,
    "canvas_strides": True,
    "train_padding": True,
    "normaliser": "per_image",
}

_MMDET = MMDET.replace(paper_ids=_PAPERS, arch={**_MMDET_ARCH, "frozen_stages": 1, "norm_eval": True})
_DETECTRON2 = DETECTRON2.replace(paper_ids=_PAPERS, arch=_DETECTRON2_ARCH)
_TORCHVISION = TORCHVISION.replace(paper_ids=_PAPERS)
_SMALL = SMALL.replace(paper_ids=_PAPERS)
_LITE = LITE.replace(
    paper_ids=_DYHEAD_PAPERS,
    arch={"fpn_norm": True, "score_threshold": 0.01},
)


def _mmdet(ap: float, config: str, version: str, folder: str = "retinanet") -> PretrainedCfg:
    """Weights of mmdetection's ``retinanet_<config>_coco``; a caffe config has that input and backbone."""
    name = f"retinanet_{config}_coco"
    cfg = _MMDET.replace(
        url=f"{MMDET_URL}/{folder}/{name}/{name}_{version}.pth",
        hash_prefix=version.rpartition("-")[2],
        reported={"AP": ap},
    )
    return cfg.replace(**CAFFE_INPUT, arch={**_MMDET_ARCH, **CAFFE_ARCH}) if "_caffe_" in config else cfg


def _detectron2(ap: float, config: str, file: str) -> PretrainedCfg:
    """Weights of detectron2's ``retinanet_<config>``; file names hold a prefix of the MD5, which is not checked."""
    folder = "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection"
    return _DETECTRON2.replace(url=f"{folder}/retinanet_{config}/{file}.pkl", reported={"AP": ap})


cfgs = {
    "retinanet_resnet50.mmdet_3x_coco": _mmdet(39.5, "r50_fpn_mstrain_3x", "20210718_220633-88476508"),
    "retinanet_resnet50.mmdet_2x_coco": _mmdet(37.4, "r50_fpn_2x", "20200131-fdb43119"),
    "retinanet_resnet50.mmdet_1x_coco": _mmdet(36.5, "r50_fpn_1x", "20200130-c2398f9e"),
    "retinanet_resnet50.mmdet_fp16_1x_coco": _mmdet(36.4, "r50_fpn_fp16_1x", "20200702-0dbfb212", folder="fp16"),
    "retinanet_resnet50.mmdet_caffe_1x_coco": _mmdet(36.3, "r50_caffe_fpn_1x", "20200531-f11027c5"),
    "retinanet_resnet50.detectron2_3x_coco": _detectron2(38.7, "R_50_FPN_3x", "190397829/model_final_5bd44e"),
    "retinanet_resnet50.detectron2_1x_coco": _detectron2(37.4, "R_50_FPN_1x", "190397773/model_final_bfca0b"),
    "retinanet_resnet50.torchvision_v2_coco": _TORCHVISION.replace(
        url="https://download.pytorch.org/models/retinanet_resnet50_fpn_v2_coco-5905b1c5.pth",
        hash_prefix="5905b1c5",
        arch={**_TORCHVISION_ARCH, "norm_eval": True, "tower_norm": True, "box_loss": "giou"},
        reported={"AP": 41.5},
        reported_by="torchvision's RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1, COCO val2017",
    ),
    "retinanet_resnet50.torchvision_coco": _TORCHVISION.replace(
        url="https://download.pytorch.org/models/retinanet_resnet50_fpn_coco-eeacb38b.pth",
        hash_prefix="eeacb38b",
        arch={**_TORCHVISION_ARCH, "freeze_norm": True, "norm_eps": 0.0, "extra_from": "p5"},
        reported={"AP": 36.4},
        reported_by="torchvision's RetinaNet_ResNet50_FPN_Weights.COCO_V1, COCO val2017",
    ),
    "retinanet_resnet18.mmdet_1x_coco": _mmdet(31.7, "r18_fpn_1x", "20220407_171055-614fd399"),
    "retinanet_resnet18.mmdet_1x8_1x_coco": _mmdet(31.7, "r18_fpn_1x8_1x", "20220407_171255-4ea310d7"),
    "retinanet_resnet101.mmdet_3x_coco": _mmdet(41.0, "r101_fpn_mstrain_3x", "20210720_214650-7ee888e0"),
    "retinanet_resnet101.mmdet_2x_coco": _mmdet(38.9, "r101_fpn_2x", "20200131-5560aee8"),
    "retinanet_resnet101.mmdet_1x_coco": _mmdet(38.5, "r101_fpn_1x", "20200130-7a93545f"),
    "retinanet_resnet101.mmdet_caffe_3x_coco": _mmdet(40.7, "r101_caffe_fpn_mstrain_3x", "20210721_063439-88a8a944"),
    "retinanet_resnet101.mmdet_caffe_1x_coco": _mmdet(38.5, "r101_caffe_fpn_1x", "20200531-b428fa0f"),
    "retinanet_resnet101.detectron2_3x_coco": _detectron2(40.4, "R_101_FPN_3x", "190397697/model_final_971ab9"),
    "retinanet_resnext101_32x4d.mmdet_2x_coco": _mmdet(40.1, "x101_32x4d_fpn_2x", "20200131-237fc5e1"),
    "retinanet_resnext101_32x4d.mmdet_1x_coco": _mmdet(39.9, "x101_32x4d_fpn_1x", "20200130-5c8b7ec4"),
    "retinanet_resnext101_64x4d.mmdet_3x_coco": _mmdet(41.6, "x101_64x4d_fpn_mstrain_3x", "20210719_051838-022c2187"),
    "retinanet_resnext101_64x4d.mmdet_2x_coco": _mmdet(40.8, "x101_64x4d_fpn_2x", "20200131-bca068ab"),
    "retinanet_resnext101_64x4d.mmdet_1x_coco": _mmdet(41.0, "x101_64x4d_fpn_1x", "20200130-366f5af1"),
    "retinanet_resnet50_dyhead6.official_1x_coco": _DETECTRON2.replace(
        url="https://xiyang.blob.core.windows.net/public/dyhead_r50_retina_fpn_1x.pth",
        mirrors=("https://huggingface.co/fuliucansheng/detectron2/resolve/main/dyhead/retinanet_r50_model.bin",),
        license="mit",
        license_url=None,
        origin_url="https://github.com/microsoft/DynamicHead",
        paper_ids=_DYHEAD_PAPERS,
        pad_divisor=128,
        arch={
            "caffe": True,
            "freeze_norm": True,
            "coarse_offsets": "reinterpret",
            "zero_init_offset": False,
            "extra_from": "p5",
            "towers": 4,
            "train_padding": True,
            "normaliser": "running",
        },
        reported={"AP": 39.9},
        reported_by="microsoft/DynamicHead README, COCO val2017",
    ),
    "retinanet_swin_dyhead6": PretrainedCfg(license="apache-2.0", paper_ids=_DYHEAD_PAPERS, arch={"drop_path": 0.2}),
    "retinanet_lite0_dyhead2": _LITE,
    "test_retinanet": _SMALL,
    "test_retinanet_dyhead1": _SMALL.replace(paper_ids=_DYHEAD_PAPERS),
}
"""Weights by ``name.tag``, the default tag of a name first."""


@register_detector
def retinanet_resnet18(pretrained: bool = False, **kwargs: Any) -> Detector:
    """RetinaNet with its four-convolution towers, ResNet-18."""
    return retinanet("retinanet_resnet18", pretrained, kwargs, backbone="resnet18")


@register_detector
def retinanet_resnet50(pretrained: bool = False, **kwargs: Any) -> Detector:
    """RetinaNet with its four-convolution towers, ResNet-50."""
    return retinanet("retinanet_resnet50", pretrained, kwargs, backbone="resnet50")


@register_detector
def retinanet_resnet101(pretrained: bool = False, **kwargs: Any) -> Detector:
    """RetinaNet with its four-convolution towers, ResNet-101."""
    return retinanet("retinanet_resnet101", pretrained, kwargs, backbone="resnet101")


@register_detector
def retinanet_resnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> Detector:
    """RetinaNet with its four-convolution towers, ResNeXt-101 32x4d."""
    return retinanet("retinanet_resnext101_32x4d", pretrained, kwargs, backbone="resnext101_32x4d")


@register_detector
def retinanet_resnext101_64x4d(pretrained: bool = False, **kwargs: Any) -> Detector:
    """RetinaNet with its four-convolution towers, ResNeXt-101 64x4d."""
    return retinanet("retinanet_resnext101_64x4d", pretrained, kwargs, backbone="resnext101_64x4d")


@register_detector
def retinanet_resnet50_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """RetinaNet, ResNet-50, six DyHead blocks; with its towers on top of them, as its authors published it."""
    return retinanet("retinanet_resnet50_dyhead6", pretrained, kwargs, backbone="resnet50", dyhead=6)


@register_detector
def retinanet_swin_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """RetinaNet, Swin-T, six DyHead blocks."""
    return retinanet("retinanet_swin_dyhead6", pretrained, kwargs, backbone="swin", dyhead=6)


@register_detector
def retinanet_lite0_dyhead2(pretrained: bool = False, **kwargs: Any) -> Detector:
    """RetinaNet, EfficientNet-Lite0, two DyHead blocks of 96 channels: trains and runs on a CPU."""
    return retinanet("retinanet_lite0_dyhead2", pretrained, kwargs, backbone="lite0", channels=96, dyhead=2)


@register_detector
def test_retinanet(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny RetinaNet with one tower layer, for tests."""
    return retinanet("test_retinanet", pretrained, kwargs, backbone="test_resnet", channels=32, towers=1)


@register_detector
def test_retinanet_dyhead1(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny RetinaNet with one DyHead block, for tests."""
    return retinanet("test_retinanet_dyhead1", pretrained, kwargs, backbone="test_efficientnet", channels=32, dyhead=1)
