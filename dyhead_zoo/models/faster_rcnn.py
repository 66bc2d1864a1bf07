"""Faster R-CNN on a feature pyramid: proposals, then one look at each; with or without DyHead before both.

Papers: Ren et al., "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", NeurIPS 2015,
arXiv:1506.01497; Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, arXiv:1612.03144. The variants
and their figures are those of mmdetection (Apache-2.0), detectron2 (Apache-2.0), torchvision (BSD-3-Clause) and of
microsoft/DynamicHead (MIT), which puts DyHead between the pyramid and everything that reads it.

The paper of DyHead (arXiv:2106.08322, section 3.4) describes another detector, which was never released: scale and
spatial attention before RoI pooling, task attention after it, in place of the fully connected layers. One switch gives
it: ``create_detector("faster_rcnn_resnet50_dyhead6", task_after_roi=True)``; Mask and Cascade R-CNN have it too. With
``task=True`` besides, the blocks keep their task attention, as all but the last do in the paper's figure 2(c).
"""

from __future__ import annotations

from typing import Any

from dyhead_zoo.detector import Detector
from dyhead_zoo.models.rcnn_cfgs import (
    DETECTRON2_ARCH,
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
from dyhead_zoo.models.sources import CAFFE_ARCH, CAFFE_INPUT, DYHEAD_PAPER
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.registry import register_detector, register_family


@register_family("faster_rcnn")
def faster_rcnn(name: str, pretrained: bool, user: dict[str, Any], **defaults: Any) -> Detector:
    """Faster R-CNN on P2 to P6."""
    return build_rcnn(name, pretrained, user, **defaults)


_PAPERS = ("arXiv:1506.01497", "arXiv:1612.03144")
_DYHEAD_PAPERS = (DYHEAD_PAPER, *_PAPERS)

_MOBILENET_ARCH = {
    **TORCHVISION_ARCH,
    "frozen_stages": -1,
    "freeze_norm": True,
    "strides": (32, 32),
    "read_from": ("blocks.5.0", None),
    "anchor_sizes": (32, 64, 128, 256, 512),
    "rpn_score_threshold": 0.05,
    "roi_levels": 1,
}
"""torchvision's MobileNets: two levels of stride 32 and their P6, with the same anchors on each; RoIs see the first."""


def _mmdet(ap: float, config: str, version: str, folder: str = "faster_rcnn") -> PretrainedCfg:
    return mmdet(_PAPERS, {"AP": ap}, folder, f"faster_rcnn_{config}", version)


def _detectron2(ap: float, config: str, file: str) -> PretrainedCfg:
    return detectron2(_PAPERS, {"AP": ap}, f"COCO-Detection/faster_rcnn_{config}/{file}")


cfgs = {
    "faster_rcnn_resnet50.mmdet_3x_coco": _mmdet(40.3, "r50_fpn_mstrain_3x", "20210524_110822-e10bd31c"),
    "faster_rcnn_resnet50.mmdet_2x_coco": _mmdet(38.4, "r50_fpn_2x", "bbox_mAP-0.384_20200504_210434-a5d8aa15"),
    "faster_rcnn_resnet50.mmdet_1x_coco": _mmdet(37.4, "r50_fpn_1x", "20200130-047c8118"),
    "faster_rcnn_resnet50.mmdet_tnr_1x_coco": _mmdet(40.2, "r50_fpn_tnr-pretrain_1x", "20220320_085147-efedfda4"),
    "faster_rcnn_resnet50.mmdet_fp16_1x_coco": _mmdet(37.5, "r50_fpn_fp16_1x", "20200204-d4dc1471", folder="fp16"),
    "faster_rcnn_resnet50.mmdet_caffe_3x_coco": _mmdet(39.9, "r50_caffe_fpn_mstrain_3x", "20210526_095054-1f77628b"),
    "faster_rcnn_resnet50.mmdet_caffe_2x_coco": _mmdet(
        39.7, "r50_caffe_fpn_mstrain_2x", "bbox_mAP-0.397_20200504_231813-10b2de58"
    ),
    "faster_rcnn_resnet50.mmdet_caffe_1x_coco": _mmdet(
        37.8, "r50_caffe_fpn_1x", "bbox_mAP-0.378_20200504_180032-c5925ee5"
    ),
    "faster_rcnn_resnet50.detectron2_3x_coco": _detectron2(40.2, "R_50_FPN_3x", "137849458/model_final_280758"),
    "faster_rcnn_resnet50.detectron2_1x_coco": _detectron2(37.9, "R_50_FPN_1x", "137257794/model_final_b275ba"),
    "faster_rcnn_resnet50.torchvision_v2_coco": torchvision(
        _PAPERS,
        {"AP": 46.7},
        "fasterrcnn_resnet50_fpn_v2_coco-dd69338a",
        "FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1",
        TORCHVISION_V2_ARCH,
    ),
    "faster_rcnn_resnet50.torchvision_coco": torchvision(
        _PAPERS,
        {"AP": 37.0},
        "fasterrcnn_resnet50_fpn_coco-258fb6c6",
        "FasterRCNN_ResNet50_FPN_Weights.COCO_V1",
        {**TORCHVISION_ARCH, "freeze_norm": True, "norm_eps": 0.0},
    ),
    "faster_rcnn_mobilenetv3_large.torchvision_coco": torchvision(
        _PAPERS,
        {"AP": 32.8},
        "fasterrcnn_mobilenet_v3_large_fpn-fb6a3cc7",
        "FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1",
        _MOBILENET_ARCH,
    ),
    "faster_rcnn_mobilenetv3_large.torchvision_320_coco": torchvision(
        _PAPERS,
        {"AP": 22.8},
        "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9",
        "FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1",
        {**_MOBILENET_ARCH, "rpn_pre_nms": (2000, 150), "proposals": (2000, 150)},
    ).replace(short_side=320, long_side=640),
    "faster_rcnn_resnet101.mmdet_3x_coco": _mmdet(41.8, "r101_fpn_mstrain_3x", "20210524_110822-4d4d2ca8"),
    "faster_rcnn_resnet101.mmdet_2x_coco": _mmdet(39.8, "r101_fpn_2x", "bbox_mAP-0.398_20200504_210455-1d2dac9c"),
    "faster_rcnn_resnet101.mmdet_1x_coco": _mmdet(39.4, "r101_fpn_1x", "20200130-f513f705"),
    "faster_rcnn_resnet101.mmdet_caffe_3x_coco": _mmdet(42.0, "r101_caffe_fpn_mstrain_3x", "20210526_095742-a7ae426d"),
    "faster_rcnn_resnet101.mmdet_caffe_1x_coco": _mmdet(
        39.8, "r101_caffe_fpn_1x", "bbox_mAP-0.398_20200504_180057-b269e9dd"
    ),
    "faster_rcnn_resnet101.detectron2_3x_coco": _detectron2(42.0, "R_101_FPN_3x", "137851257/model_final_f6e8b1"),
    "faster_rcnn_resnext101_32x4d.mmdet_3x_coco": _mmdet(42.5, "x101_32x4d_fpn_mstrain_3x", "20210524_124151-16b9b260"),
    "faster_rcnn_resnext101_32x4d.mmdet_2x_coco": _mmdet(
        41.2, "x101_32x4d_fpn_2x", "bbox_mAP-0.412_20200506_041400-64a12c0b"
    ),
    "faster_rcnn_resnext101_32x4d.mmdet_1x_coco": _mmdet(41.2, "x101_32x4d_fpn_1x", "20200203-cff10310"),
    "faster_rcnn_resnext101_64x4d.mmdet_3x_coco": _mmdet(43.1, "x101_64x4d_fpn_mstrain_3x", "20210524_124528-26c63de6"),
    "faster_rcnn_resnext101_64x4d.mmdet_2x_coco": _mmdet(41.6, "x101_64x4d_fpn_2x", "20200512_161033-5961fa95"),
    "faster_rcnn_resnext101_64x4d.mmdet_1x_coco": _mmdet(42.1, "x101_64x4d_fpn_1x", "20200204-833ee192"),
    "faster_rcnn_resnext101_32x8d.mmdet_3x_coco": _mmdet(42.4, "x101_32x8d_fpn_mstrain_3x", "20210604_182954-002e082a"),
    "faster_rcnn_resnext101_32x8d.detectron2_3x_coco": _detectron2(
        43.0, "X_101_32x8d_FPN_3x", "139173657/model_final_68b088"
    ),
    "faster_rcnn_resnet50_dyhead6.official_1x_coco": PretrainedCfg(
        source="detectron2",
        url="https://xiyang.blob.core.windows.net/public/dyhead_r50_rcnn_fpn_1x.pth",
        mirrors=("https://huggingface.co/fuliucansheng/detectron2/resolve/main/dyhead/faster_rcnn_r50_model.bin",),
        license="mit",
        origin_url="https://github.com/microsoft/DynamicHead",
        paper_ids=_DYHEAD_PAPERS,
        **CAFFE_INPUT,
        pad_divisor=64,
        arch={
            **DETECTRON2_ARCH,
            **CAFFE_ARCH,
            "frozen_stages": -1,
            "coarse_offsets": "reinterpret",
            "zero_init_offset": False,
        },
        reported={"AP": 40.3},
        reported_by="microsoft/DynamicHead README, COCO val2017",
    ),
    "faster_rcnn_swin_dyhead6": PretrainedCfg(license="apache-2.0", paper_ids=_DYHEAD_PAPERS, arch={"drop_path": 0.2}),
    "faster_rcnn_lite0": lite(_PAPERS),
    "faster_rcnn_lite0_dyhead2": lite(_DYHEAD_PAPERS),
    "test_faster_rcnn": small(_PAPERS, TEST_ARCH),
    "test_faster_rcnn_dyhead1": small(_DYHEAD_PAPERS, TEST_ARCH),
}
"""Weights by ``name.tag``, the default tag of a name first."""


@register_detector
def faster_rcnn_resnet50(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Faster R-CNN, ResNet-50."""
    return faster_rcnn("faster_rcnn_resnet50", pretrained, kwargs, backbone="resnet50")


@register_detector
def faster_rcnn_mobilenetv3_large(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Faster R-CNN, MobileNetV3-Large, on its two coarsest maps as torchvision has it."""
    return faster_rcnn("faster_rcnn_mobilenetv3_large", pretrained, kwargs, backbone="mobilenetv3_large_100")


@register_detector
def faster_rcnn_resnet101(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Faster R-CNN, ResNet-101."""
    return faster_rcnn("faster_rcnn_resnet101", pretrained, kwargs, backbone="resnet101")


@register_detector
def faster_rcnn_resnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Faster R-CNN, ResNeXt-101 32x4d."""
    return faster_rcnn("faster_rcnn_resnext101_32x4d", pretrained, kwargs, backbone="resnext101_32x4d")


@register_detector
def faster_rcnn_resnext101_64x4d(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Faster R-CNN, ResNeXt-101 64x4d."""
    return faster_rcnn("faster_rcnn_resnext101_64x4d", pretrained, kwargs, backbone="resnext101_64x4d")


@register_detector
def faster_rcnn_resnext101_32x8d(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Faster R-CNN, ResNeXt-101 32x8d."""
    return faster_rcnn("faster_rcnn_resnext101_32x8d", pretrained, kwargs, backbone="resnext101_32x8d")


@register_detector
def faster_rcnn_resnet50_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Faster R-CNN, ResNet-50, six DyHead blocks on P2 to P6, before the proposals and RoI pooling."""
    return faster_rcnn("faster_rcnn_resnet50_dyhead6", pretrained, kwargs, backbone="resnet50", dyhead=6)


@register_detector
def faster_rcnn_swin_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Faster R-CNN, Swin-T, six DyHead blocks."""
    return faster_rcnn("faster_rcnn_swin_dyhead6", pretrained, kwargs, backbone="swin", dyhead=6)


@register_detector
def faster_rcnn_lite0(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Faster R-CNN, EfficientNet-Lite0, 96 channels: trains and runs on a CPU."""
    return faster_rcnn("faster_rcnn_lite0", pretrained, kwargs, backbone="lite0", channels=96)


@register_detector
def faster_rcnn_lite0_dyhead2(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Faster R-CNN, EfficientNet-Lite0, two DyHead blocks of 96 channels: trains and runs on a CPU."""
    return faster_rcnn("faster_rcnn_lite0_dyhead2", pretrained, kwargs, backbone="lite0", channels=96, dyhead=2)


@register_detector
def test_faster_rcnn(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny Faster R-CNN, for tests."""
    return faster_rcnn("test_faster_rcnn", pretrained, kwargs, backbone="test_resnet", channels=32)


@register_detector
def test_faster_rcnn_dyhead1(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny Faster R-CNN with one DyHead block, for tests."""
    return faster_rcnn(
        "test_faster_rcnn_dyhead1", pretrained, kwargs, backbone="test_efficientnet", channels=32, dyhead=1
    )
