"""Cascade R-CNN: three looks at each proposal, each at the boxes of the one before and asking for a tighter fit.

Paper: Cai and Vasconcelos, "Cascade R-CNN: Delving into High Quality Object Detection", CVPR 2018, arXiv:1712.00726;
with masks: arXiv:1906.09756. The variants and their figures are those of mmdetection and detectron2 (both Apache-2.0).

In training detectron2 weighs all stages alike, hands a third of their gradient to the pyramid, and draws regions for
the first stage only. That is not repeated here: training its weights further uses mmdetection's weights of 1, 1/2 and
1/4, and draws in every stage.
"""

from __future__ import annotations

from typing import Any

from dyhead_zoo.detector import Detector
from dyhead_zoo.models.rcnn_cfgs import (
    DETECTRON2_ARCH,
    MMDET_ARCH,
    TEST_ARCH,
    build_rcnn,
    detectron2,
    lite,
    mmdet,
    small,
)
from dyhead_zoo.models.sources import DYHEAD_PAPER
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.registry import register_detector, register_family

_STAGES: dict[str, Any] = {
    "stage_ious": (0.5, 0.6, 0.7),
    "stage_stds": ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)),
    "stage_weights": (1.0, 0.5, 0.25),
    "box_beta": 1.0,
    "proposals": (2000, 1000),
}


@register_family("cascade_rcnn")
def cascade_rcnn(name: str, pretrained: bool, user: dict[str, Any], **defaults: Any) -> Detector:
    """Cascade R-CNN on P2 to P6."""
    return build_rcnn(name, pretrained, user, **{**_STAGES, **defaults})


@register_family("cascade_mask_rcnn")
def cascade_mask_rcnn(name: str, pretrained: bool, user: dict[str, Any], **defaults: Any) -> Detector:
    """Cascade R-CNN with a mask head in every stage."""
    return build_rcnn(name, pretrained, user, **{**_STAGES, "mask_heads": 3, **defaults})


_PAPERS = ("arXiv:1712.00726", "arXiv:1612.03144")
_MASK_PAPERS = ("arXiv:1906.09756", "arXiv:1703.06870", "arXiv:1612.03144")
_MMDET_ARCH = {**MMDET_ARCH, "rpn_reach": "inside", "rpn_beta": 1 / 9, "score_mean": "logits"}
_DETECTRON2_ARCH = {
    **DETECTRON2_ARCH,
    "stage_stds": ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (1 / 30, 1 / 30, 1 / 15, 1 / 15)),
    "box_beta": 0.0,
    "mask_heads": 1,
}


def _mmdet(ap: float, config: str, version: str) -> PretrainedCfg:
    return mmdet(_PAPERS, {"AP": ap}, "cascade_rcnn", f"cascade_rcnn_{config}", version, _MMDET_ARCH)


def _mmdet_mask(ap: float, mask_ap: float, config: str, version: str) -> PretrainedCfg:
    figures = {"AP": ap, "mask_AP": mask_ap}
    return mmdet(_MASK_PAPERS, figures, "cascade_rcnn", f"cascade_mask_rcnn_{config}", version, _MMDET_ARCH)


def _detectron2(ap: float, mask_ap: float, config: str, file: str) -> PretrainedCfg:
    path = f"Misc/cascade_mask_rcnn_{config}/{file}"
    return detectron2(_MASK_PAPERS, {"AP": ap, "mask_AP": mask_ap}, path, _DETECTRON2_ARCH)


cfgs = {
    "cascade_rcnn_resnet50.mmdet_20e_coco": _mmdet(41.0, "r50_fpn_20e", "bbox_mAP-0.41_20200504_175131-e9872a90"),
    "cascade_rcnn_resnet50.mmdet_1x_coco": _mmdet(40.3, "r50_fpn_1x", "20200316-3dc56deb"),
    "cascade_rcnn_resnet50.mmdet_caffe_1x_coco": _mmdet(
        40.4, "r50_caffe_fpn_1x", "bbox_mAP-0.404_20200504_174853-b857be87"
    ),
    "cascade_rcnn_resnet101.mmdet_20e_coco": _mmdet(42.5, "r101_fpn_20e", "bbox_mAP-0.425_20200504_231812-5057dcc5"),
    "cascade_rcnn_resnet101.mmdet_1x_coco": _mmdet(42.0, "r101_fpn_1x", "20200317-0b6a2fbf"),
    "cascade_rcnn_resnet101.mmdet_caffe_1x_coco": _mmdet(
        42.3, "r101_caffe_fpn_1x", "bbox_mAP-0.423_20200504_175649-cab8dbd5"
    ),
    "cascade_rcnn_resnext101_32x4d.mmdet_20e_coco": _mmdet(43.7, "x101_32x4d_fpn_20e", "20200906_134608-9ae0a720"),
    "cascade_rcnn_resnext101_32x4d.mmdet_1x_coco": _mmdet(43.7, "x101_32x4d_fpn_1x", "20200316-95c2deb6"),
    "cascade_rcnn_resnext101_64x4d.mmdet_20e_coco": _mmdet(44.5, "x101_64x4d_fpn_20e", "20200509_224357-051557b1"),
    "cascade_rcnn_resnext101_64x4d.mmdet_1x_coco": _mmdet(44.7, "x101_64x4d_fpn_1x", "20200515_075702-43ce6a30"),
    "cascade_mask_rcnn_resnet50.mmdet_3x_coco": _mmdet_mask(
        44.3, 38.5, "r50_fpn_mstrain_3x", "20210628_164719-5bdc3824"
    ),
    "cascade_mask_rcnn_resnet50.mmdet_20e_coco": _mmdet_mask(
        41.9, 36.5, "r50_fpn_20e", "bbox_mAP-0.419__segm_mAP-0.365_20200504_174711-4af8e66e"
    ),
    "cascade_mask_rcnn_resnet50.mmdet_1x_coco": _mmdet_mask(41.2, 35.9, "r50_fpn_1x", "20200203-9d4dcb24"),
    "cascade_mask_rcnn_resnet50.mmdet_caffe_3x_coco": _mmdet_mask(
        44.0, 38.1, "r50_caffe_fpn_mstrain_3x", "20210707_002651-6e29b3a6"
    ),
    "cascade_mask_rcnn_resnet50.mmdet_caffe_1x_coco": _mmdet_mask(
        41.2, 36.0, "r50_caffe_fpn_1x", "bbox_mAP-0.412__segm_mAP-0.36_20200504_174659-5004b251"
    ),
    "cascade_mask_rcnn_resnet50.detectron2_3x_coco": _detectron2(
        44.3, 38.5, "R_50_FPN_3x", "144998488/model_final_480dd8"
    ),
    "cascade_mask_rcnn_resnet50.detectron2_1x_coco": _detectron2(
        42.1, 36.4, "R_50_FPN_1x", "138602847/model_final_e9d89b"
    ),
    "cascade_mask_rcnn_resnet101.mmdet_3x_coco": _mmdet_mask(
        45.5, 39.6, "r101_fpn_mstrain_3x", "20210628_165236-51a2d363"
    ),
    "cascade_mask_rcnn_resnet101.mmdet_20e_coco": _mmdet_mask(
        43.4, 37.8, "r101_fpn_20e", "bbox_mAP-0.434__segm_mAP-0.378_20200504_174836-005947da"
    ),
    "cascade_mask_rcnn_resnet101.mmdet_1x_coco": _mmdet_mask(42.9, 37.3, "r101_fpn_1x", "20200203-befdf6ee"),
    "cascade_mask_rcnn_resnet101.mmdet_caffe_3x_coco": _mmdet_mask(
        45.4, 39.5, "r101_caffe_fpn_mstrain_3x", "20210707_002620-a5bd2389"
    ),
    "cascade_mask_rcnn_resnet101.mmdet_caffe_1x_coco": _mmdet_mask(
        43.2, 37.6, "r101_caffe_fpn_1x", "bbox_mAP-0.432__segm_mAP-0.376_20200504_174813-5c1e9599"
    ),
    "cascade_mask_rcnn_resnext101_32x4d.mmdet_3x_coco": _mmdet_mask(
        46.3, 40.1, "x101_32x4d_fpn_mstrain_3x", "20210706_225234-40773067"
    ),
    "cascade_mask_rcnn_resnext101_32x4d.mmdet_20e_coco": _mmdet_mask(
        45.0, 39.0, "x101_32x4d_fpn_20e", "20200528_083917-ed1f4751"
    ),
    "cascade_mask_rcnn_resnext101_32x4d.mmdet_1x_coco": _mmdet_mask(
        44.3, 38.3, "x101_32x4d_fpn_1x", "20200201-0f411b1f"
    ),
    "cascade_mask_rcnn_resnext101_64x4d.mmdet_3x_coco": _mmdet_mask(
        46.6, 40.3, "x101_64x4d_fpn_mstrain_3x", "20210719_210311-d3e64ba0"
    ),
    "cascade_mask_rcnn_resnext101_64x4d.mmdet_20e_coco": _mmdet_mask(
        45.6, 39.5, "x101_64x4d_fpn_20e", "20200512_161033-bdb5126a"
    ),
    "cascade_mask_rcnn_resnext101_64x4d.mmdet_1x_coco": _mmdet_mask(
        45.3, 39.2, "x101_64x4d_fpn_1x", "20200203-9a2db89d"
    ),
    "cascade_mask_rcnn_resnext101_32x8d.mmdet_3x_coco": _mmdet_mask(
        46.1, 39.9, "x101_32x8d_fpn_mstrain_3x", "20210719_180640-9ff7e76f"
    ),
    "cascade_rcnn_lite0": lite(_PAPERS),
    "test_cascade_rcnn": small(_PAPERS, TEST_ARCH),
    "test_cascade_mask_rcnn": small(_MASK_PAPERS, TEST_ARCH),
    "test_cascade_rcnn_dyhead1": small((DYHEAD_PAPER, *_PAPERS), TEST_ARCH),
}
"""Weights by ``name.tag``, the default tag of a name first."""


@register_detector
def cascade_rcnn_resnet50(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Cascade R-CNN, ResNet-50."""
    return cascade_rcnn("cascade_rcnn_resnet50", pretrained, kwargs, backbone="resnet50")


@register_detector
def cascade_rcnn_resnet101(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Cascade R-CNN, ResNet-101."""
    return cascade_rcnn("cascade_rcnn_resnet101", pretrained, kwargs, backbone="resnet101")


@register_detector
def cascade_rcnn_resnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Cascade R-CNN, ResNeXt-101 32x4d."""
    return cascade_rcnn("cascade_rcnn_resnext101_32x4d", pretrained, kwargs, backbone="resnext101_32x4d")


@register_detector
def cascade_rcnn_resnext101_64x4d(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Cascade R-CNN, ResNeXt-101 64x4d."""
    return cascade_rcnn("cascade_rcnn_resnext101_64x4d", pretrained, kwargs, backbone="resnext101_64x4d")


@register_detector
def cascade_rcnn_resnet50_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Cascade R-CNN, ResNet-50, six DyHead blocks on P2 to P6."""
    return cascade_rcnn("cascade_rcnn_resnet50_dyhead6", pretrained, kwargs, backbone="resnet50", dyhead=6)


@register_detector
def cascade_rcnn_lite0(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Cascade R-CNN, EfficientNet-Lite0, 96 channels: trains and runs on a CPU."""
    return cascade_rcnn("cascade_rcnn_lite0", pretrained, kwargs, backbone="lite0", channels=96)


@register_detector
def cascade_mask_rcnn_resnet50(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Cascade R-CNN with masks, ResNet-50."""
    return cascade_mask_rcnn("cascade_mask_rcnn_resnet50", pretrained, kwargs, backbone="resnet50")


@register_detector
def cascade_mask_rcnn_resnet50_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Cascade R-CNN with masks, ResNet-50, six DyHead blocks on P2 to P6."""
    return cascade_mask_rcnn("cascade_mask_rcnn_resnet50_dyhead6", pretrained, kwargs, backbone="resnet50", dyhead=6)


@register_detector
def cascade_mask_rcnn_resnet101(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Cascade R-CNN with masks, ResNet-101."""
    return cascade_mask_rcnn("cascade_mask_rcnn_resnet101", pretrained, kwargs, backbone="resnet101")


@register_detector
def cascade_mask_rcnn_resnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Cascade R-CNN with masks, ResNeXt-101 32x4d."""
    return cascade_mask_rcnn("cascade_mask_rcnn_resnext101_32x4d", pretrained, kwargs, backbone="resnext101_32x4d")


@register_detector
def cascade_mask_rcnn_resnext101_64x4d(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Cascade R-CNN with masks, ResNeXt-101 64x4d."""
    return cascade_mask_rcnn("cascade_mask_rcnn_resnext101_64x4d", pretrained, kwargs, backbone="resnext101_64x4d")


@register_detector
def cascade_mask_rcnn_resnext101_32x8d(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Cascade R-CNN with masks, ResNeXt-101 32x8d."""
    return cascade_mask_rcnn("cascade_mask_rcnn_resnext101_32x8d", pretrained, kwargs, backbone="resnext101_32x8d")


@register_detector
def test_cascade_rcnn(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny Cascade R-CNN, for tests."""
    return cascade_rcnn("test_cascade_rcnn", pretrained, kwargs, backbone="test_resnet", channels=32)


@register_detector
def test_cascade_mask_rcnn(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny Cascade R-CNN with masks, for tests."""
    return cascade_mask_rcnn("test_cascade_mask_rcnn", pretrained, kwargs, backbone="test_resnet", channels=32)


@register_detector
def test_cascade_rcnn_dyhead1(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny Cascade R-CNN with one DyHead block, for tests."""
    return cascade_rcnn(
        "test_cascade_rcnn_dyhead1", pretrained, kwargs, backbone="test_efficientnet", channels=32, dyhead=1
    )
