"""What the published weights of two-stage detectors have in common: conventions and recipes of their sources."""

from __future__ import annotations

from typing import Any

from dyhead_zoo.detector import Detector
from dyhead_zoo.factory import build_detector
from dyhead_zoo.models.rcnn import RCNNHead
from dyhead_zoo.models.sources import CAFFE_ARCH, CAFFE_INPUT, DETECTRON2, LITE, MMDET, MMDET_URL, SMALL, TORCHVISION
from dyhead_zoo.pretrained import PretrainedCfg

CAFFE_RESNEXT_INPUT: dict[str, Any] = {**CAFFE_INPUT, "std": (57.375, 57.12, 58.395)}
MMDET_ARCH = {"rpn_low_quality": "owner", "rpn_least": 0.3}
DETECTRON2_ARCH = {"rpn_reach": "canvas"}
TORCHVISION_ARCH = {
    "unused_rows": 10,
    "frozen_stages": 1,
    "whole_pixels": True,
    "canvas_strides": True,
    "rpn_reach": "canvas",
    "rpn_beta": 1 / 9,
    "box_beta": 1 / 9,
    "proposals": (2000, 1000),
    "roi_aligned": False,
    "roi_sampling": 2,
    "soft_masks": True,
}
TORCHVISION_V2_ARCH = {
    **TORCHVISION_ARCH,
    "norm_eval": True,
    "fpn_norm": "batch",
    "roi_norm": "batch",
    "rpn_convs": 2,
    "box_convs": 4,
    "box_hidden": (1024,),
}
LITE_ARCH = {"fpn_norm": True, "box_hidden": (256, 256), "proposals": (500, 300), "samples": (256, 128)}
TEST_ARCH = {"box_hidden": (32,), "proposals": (200, 100)}


def build_rcnn(name: str, pretrained: bool, user: dict[str, Any], **defaults: Any) -> Detector:
    """A two-stage detector on P2 to P6, the last being every second cell of P5.

    With ``task_after_roi`` the blocks of DyHead leave their task attention out, unless ``task=True`` keeps it.
    """
    pyramid = {"strides": (4, 8, 16, 32), "num_extra": 1, "extra_from": "pool"}
    moved = {"task": False} if user.get("task_after_roi", defaults.get("task_after_roi")) else {}
    return build_detector(RCNNHead, name, pretrained, user, **{**pyramid, **moved, **defaults})


def mmdet(
    papers: tuple[str, ...],
    reported: dict[str, float],
    folder: str,
    config: str,
    version: str,
    arch: dict[str, Any] = MMDET_ARCH,
) -> PretrainedCfg:
    """Weights of mmdetection's ``<config>_coco``; the config's name tells input and backbone."""
    name = f"{config}_coco"
    backbone: dict[str, Any] = {"frozen_stages": 1, "norm_eval": True}
    cfg = MMDET.replace(
        url=f"{MMDET_URL}/{folder}/{name}/{name}_{version}.pth",
        hash_prefix=version.rpartition("-")[2],
        paper_ids=papers,
        arch={**arch, **(CAFFE_ARCH if "_caffe_" in config else backbone)},
        reported=reported,
    )
    if "_caffe_" in config:
        return cfg.replace(**CAFFE_INPUT)
    return cfg.replace(**CAFFE_RESNEXT_INPUT) if "_32x8d_" in config else cfg


def detectron2(
    papers: tuple[str, ...], reported: dict[str, float], path: str, arch: dict[str, Any] = DETECTRON2_ARCH
) -> PretrainedCfg:
    """Weights of detectron2's model zoo; file names hold a prefix of the MD5, which is not checked."""
    resnext = "_X_101_" in path
    backbone = {"freeze_norm": True, "frozen_stages": 1, **({} if resnext else {"caffe": True})}
    cfg = DETECTRON2.replace(
        url=f"https://dl.fbaipublicfiles.com/detectron2/{path}.pkl",
        paper_ids=papers,
        arch={**arch, **backbone},
        reported=reported,
    )
    return cfg.replace(**CAFFE_RESNEXT_INPUT) if resnext else cfg


def torchvision(
    papers: tuple[str, ...], reported: dict[str, float], file: str, weights: str, arch: dict[str, Any]
) -> PretrainedCfg:
    """Weights of torchvision, whose first versions have frozen norms with an eps of 0."""
    return TORCHVISION.replace(
        url=f"https://download.pytorch.org/models/{file}.pth",
        hash_prefix=file.rpartition("-")[2],
        paper_ids=papers,
        arch=arch,
        reported=reported,
        reported_by=f"torchvision's {weights}, COCO val2017",
    )


def small(papers: tuple[str, ...], arch: dict[str, Any]) -> PretrainedCfg:
    """Settings of a small detector without weights."""
    return SMALL.replace(paper_ids=papers, arch=arch)


def lite(papers: tuple[str, ...]) -> PretrainedCfg:
    """Settings of a small detector on EfficientNet-Lite0."""
    return LITE.replace(paper_ids=papers, arch=LITE_ARCH)
