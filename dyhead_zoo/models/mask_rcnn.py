"""Mask R-CNN: Faster R-CNN that also draws each object it finds, in a 28 x 28 grid over its box.

Paper: He et al., "Mask R-CNN", ICCV 2017, arXiv:1703.06870; on a pyramid: arXiv:1612.03144. The variants and their
figures are those of mmdetection (Apache-2.0), detectron2 (Apache-2.0) and torchvision (BSD-3-Clause).
"""

from __future__ import annotations

from typing import Any

from dyhead_zoo.detector import Detector
from dyhead_zoo.models.rcnn_cfgs import (
    MMDET_ARCH,
    TEST_ARCH,
    TORCHVISION_ARCH,
    TORCHVISION_V2_ARCH,
    build_rcnn,
    detectron2,
    lite,
    mmdet,
    small,
    torchvision,
)
from dyhead_zoo.models.sources import DYHEAD_PAPER
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.registry import register_detector, register_family


@register_family("mask_rcnn")
def mask_rcnn(name: str, pretrained: bool, user: dict[str, Any], **defaults: Any) -> Detector:
    """Mask R-CNN on P2 to P6."""
    return build_rcnn(name, pretrained, user, **{"mask_heads": 1, **defaults})


_PAPERS = ("arXiv:1703.06870", "arXiv:1612.03144")
_DYHEAD_PAPERS = (DYHEAD_PAPER, *_PAPERS)
_MMDET_ARCH = {**MMDET_ARCH, "box_low_quality": True}


def _mmdet(ap: float, mask_ap: float, config: str, version: str, folder: str = "mask_rcnn") -> PretrainedCfg:
    return mmdet(_PAPERS, {"AP": ap, "mask_AP": mask_ap}, folder, f"mask_rcnn_{config}", version, _MMDET_ARCH)


def _detectron2(ap: float, mask_ap: float, config: str, file: str) -> PretrainedCfg:
    return detectron2(_PAPERS, {"AP": ap, "mask_AP": mask_ap}, f"COCO-InstanceSegmentation/mask_rcnn_{config}/{file}")


cfgs = {
    "mask_rcnn_resnet50.mmdet_3x_coco": _mmdet(40.9, 37.1, "r50_fpn_mstrain-poly_3x", "20210524_201154-21b550bb"),
    "mask_rcnn_resnet50.mmdet_2x_coco": _mmdet(
        39.2, 35.4, "r50_fpn_2x", "bbox_mAP-0.392__segm_mAP-0.354_20200505_003907-3e542a40"
    ),
    "mask_rcnn_resnet50.mmdet_1x_coco": _mmdet(38.2, 34.7, "r50_fpn_1x", "20200205-d4b0c5d6"),
    "mask_rcnn_resnet50.mmdet_fp16_1x_coco": _mmdet(38.1, 34.7, "r50_fpn_fp16_1x", "20200205-59faf7e4", folder="fp16"),
    "mask_rcnn_resnet50.mmdet_caffe_3x_coco": _mmdet(
        40.8, 37.0, "r50_caffe_fpn_mstrain-poly_3x", "bbox_mAP-0.408__segm_mAP-0.37_20200504_163245-42aa3d00"
    ),
    "mask_rcnn_resnet50.mmdet_caffe_2x_coco": _mmdet(
        40.3, 36.5, "r50_caffe_fpn_mstrain-poly_2x", "bbox_mAP-0.403__segm_mAP-0.365_20200504_231822-a75c98ce"
    ),
    "mask_rcnn_resnet50.mmdet_caffe_1x_coco": _mmdet(
        38.0, 34.4, "r50_caffe_fpn_1x", "bbox_mAP-0.38__segm_mAP-0.344_20200504_231812-0ebd1859"
    ),
    "mask_rcnn_resnet50.detectron2_3x_coco": _detectron2(41.0, 37.2, "R_50_FPN_3x", "137849600/model_final_f10217"),
    "mask_rcnn_resnet50.detectron2_1x_coco": _detectron2(38.6, 35.2, "R_50_FPN_1x", "137260431/model_final_a54504"),
    "mask_rcnn_resnet50.torchvision_v2_coco": torchvision(
        _PAPERS,
        {"AP": 47.4, "mask_AP": 41.8},
        "maskrcnn_resnet50_fpn_v2_coco-73cbd019",
        "MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1",
        TORCHVISION_V2_ARCH,
    ),
    "mask_rcnn_resnet50.torchvision_coco": torchvision(
        _PAPERS,
        {"AP": 37.9, "mask_AP": 34.6},
        "maskrcnn_resnet50_fpn_coco-bf2d0c1e",
        "MaskRCNN_ResNet50_FPN_Weights.COCO_V1",
        {**TORCHVISION_ARCH, "freeze_norm": True, "norm_eps": 0.0},
    ),
    "mask_rcnn_resnet101.mmdet_3x_coco": _mmdet(42.7, 38.5, "r101_fpn_mstrain-poly_3x", "20210524_200244-5675c317"),
    "mask_rcnn_resnet101.mmdet_2x_coco": _mmdet(
        40.8, 36.6, "r101_fpn_2x", "bbox_mAP-0.408__segm_mAP-0.366_20200505_071027-14b391c7"
    ),
    "mask_rcnn_resnet101.mmdet_1x_coco": _mmdet(40.0, 36.1, "r101_fpn_1x", "20200204-1efe0ed5"),
    "mask_rcnn_resnet101.mmdet_caffe_3x_coco": _mmdet(
        42.9, 38.5, "r101_caffe_fpn_mstrain-poly_3x", "20210526_132339-3c33ce02"
    ),
    "mask_rcnn_resnet101.mmdet_caffe_1x_coco": _mmdet(40.4, 36.4, "r101_caffe_fpn_1x", "20200601_095758-805e06c1"),
    "mask_rcnn_resnet101.detectron2_3x_coco": _detectron2(42.9, 38.6, "R_101_FPN_3x", "138205316/model_final_a3ec72"),
    "mask_rcnn_resnext101_32x4d.mmdet_3x_coco": _mmdet(
        43.6, 39.0, "x101_32x4d_fpn_mstrain-poly_3x", "20210524_201410-abcd7859"
    ),
    "mask_rcnn_resnext101_32x4d.mmdet_2x_coco": _mmdet(
        42.2, 37.8, "x101_32x4d_fpn_2x", "bbox_mAP-0.422__segm_mAP-0.378_20200506_004702-faef898c"
    ),
    "mask_rcnn_resnext101_32x4d.mmdet_1x_coco": _mmdet(41.9, 37.5, "x101_32x4d_fpn_1x", "20200205-478d0b67"),
    "mask_rcnn_resnext101_64x4d.mmdet_3x_coco": _mmdet(
        44.5, 39.7, "x101_64x4d_fpn_mstrain-poly_3x", "20210526_120447-c376f129"
    ),
    "mask_rcnn_resnext101_64x4d.mmdet_2x_coco": _mmdet(42.7, 38.1, "x101_64x4d_fpn_2x", "20200509_224208-39d6f70c"),
    "mask_rcnn_resnext101_64x4d.mmdet_1x_coco": _mmdet(42.8, 38.4, "x101_64x4d_fpn_1x", "20200201-9352eb0d"),
    "mask_rcnn_resnext101_32x8d.mmdet_3x_coco": mmdet(
        _PAPERS,
        {"AP": 44.3},
        "mask_rcnn",
        "mask_rcnn_x101_32x8d_fpn_mstrain-poly_3x",
        "20210607_161042-8bd2c639",
        _MMDET_ARCH,
    ),
    "mask_rcnn_resnext101_32x8d.mmdet_poly_1x_coco": _mmdet(
        43.4, 39.0, "x101_32x8d_fpn_mstrain-poly_1x", "20220630_170346-b4637974"
    ),
    "mask_rcnn_resnext101_32x8d.mmdet_1x_coco": _mmdet(42.8, 38.3, "x101_32x8d_fpn_1x", "20220630_173841-0aaf329e"),
    "mask_rcnn_resnext101_32x8d.detectron2_3x_coco": _detectron2(
        44.3, 39.5, "X_101_32x8d_FPN_3x", "139653917/model_final_2d9806"
    ),
    "mask_rcnn_swin_dyhead6": PretrainedCfg(license="apache-2.0", paper_ids=_DYHEAD_PAPERS, arch={"drop_path": 0.2}),
    "mask_rcnn_lite0": lite(_PAPERS),
    "mask_rcnn_lite0_dyhead2": lite(_DYHEAD_PAPERS),
    "test_mask_rcnn": small(_PAPERS, TEST_ARCH),
    "test_mask_rcnn_dyhead1": small(_DYHEAD_PAPERS, TEST_ARCH),
}
"""Weights by ``name.tag``, the default tag of a name first."""


@register_detector
def mask_rcnn_resnet50(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Mask R-CNN, ResNet-50."""
    return mask_rcnn("mask_rcnn_resnet50", pretrained, kwargs, backbone="resnet50")


@register_detector
def mask_rcnn_resnet101(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Mask R-CNN, ResNet-101."""
    return mask_rcnn("mask_rcnn_resnet101", pretrained, kwargs, backbone="resnet101")


@register_detector
def mask_rcnn_resnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Mask R-CNN, ResNeXt-101 32x4d."""
    return mask_rcnn("mask_rcnn_resnext101_32x4d", pretrained, kwargs, backbone="resnext101_32x4d")


@register_detector
def mask_rcnn_resnext101_64x4d(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Mask R-CNN, ResNeXt-101 64x4d."""
    return mask_rcnn("mask_rcnn_resnext101_64x4d", pretrained, kwargs, backbone="resnext101_64x4d")


@register_detector
def mask_rcnn_resnext101_32x8d(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Mask R-CNN, ResNeXt-101 32x8d."""
    return mask_rcnn("mask_rcnn_resnext101_32x8d", pretrained, kwargs, backbone="resnext101_32x8d")


@register_detector
def mask_rcnn_resnet50_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Mask R-CNN, ResNet-50, six DyHead blocks on P2 to P6."""
    return mask_rcnn("mask_rcnn_resnet50_dyhead6", pretrained, kwargs, backbone="resnet50", dyhead=6)


@register_detector
def mask_rcnn_swin_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Mask R-CNN, Swin-T, six DyHead blocks."""
    return mask_rcnn("mask_rcnn_swin_dyhead6", pretrained, kwargs, backbone="swin", dyhead=6)


@register_detector
def mask_rcnn_lite0(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Mask R-CNN, EfficientNet-Lite0, 96 channels: trains and runs on a CPU."""
    return mask_rcnn("mask_rcnn_lite0", pretrained, kwargs, backbone="lite0", channels=96)


@register_detector
def mask_rcnn_lite0_dyhead2(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Mask R-CNN, EfficientNet-Lite0, two DyHead blocks of 96 channels: trains and runs on a CPU."""
    return mask_rcnn("mask_rcnn_lite0_dyhead2", pretrained, kwargs, backbone="lite0", channels=96, dyhead=2)


@register_detector
def test_mask_rcnn(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny Mask R-CNN, for tests."""
    return mask_rcnn("test_mask_rcnn", pretrained, kwargs, backbone="test_resnet", channels=32)


@register_detector
def test_mask_rcnn_dyhead1(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny Mask R-CNN with one DyHead block, for tests."""
    return mask_rcnn("test_mask_rcnn_dyhead1", pretrained, kwargs, backbone="test_efficientnet", channels=32, dyhead=1)
