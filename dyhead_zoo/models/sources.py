"""What all weights of one source have in common, and the input of caffe's backbones and of small detectors.

A family's ``cfgs`` are made from these with ``replace``: papers, URL, figures and architecture are its own.
"""

from __future__ import annotations

from typing import Any

from dyhead_zoo.pretrained import PretrainedCfg

DYHEAD_PAPER = "arXiv:2106.08322"

CAFFE_INPUT: dict[str, Any] = {"mean": (103.53, 116.28, 123.675), "std": (1.0, 1.0, 1.0), "channel_order": "bgr"}
CAFFE_ARCH = {"caffe": True, "freeze_norm": True, "frozen_stages": 1}

MMDET = PretrainedCfg(
    source="mmdet",
    license="apache-2.0",
    origin_url="https://github.com/open-mmlab/mmdetection",
    reported_by="mmdetection's model zoo, COCO val2017",
    antialias=False,
)
MMDET_URL = "https://download.openmmlab.com/mmdetection/v2.0"
DETECTRON2 = PretrainedCfg(
    source="detectron2",
    license="cc-by-sa-3.0",
    license_url="https://github.com/facebookresearch/detectron2/blob/main/MODEL_ZOO.md",
    origin_url="https://github.com/facebookresearch/detectron2",
    reported_by="detectron2's model zoo, COCO val2017",
    **CAFFE_INPUT,
)
TORCHVISION = PretrainedCfg(
    source="torchvision",
    license="bsd-3-clause",
    origin_url="https://github.com/pytorch/vision",
    rounding="floor",
    antialias=False,
)

SMALL = PretrainedCfg(short_side=384, long_side=384, license="apache-2.0")
"""Small detectors, whether trained here or not yet."""
LITE = SMALL.replace(mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5))
"""Small detectors on EfficientNet-Lite, whose input lies in -1..1."""
