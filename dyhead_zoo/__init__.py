"""A timm-style zoo of object detectors built around Dynamic Head.

The names below are the public API. They are imported on first use, so that ``import dyhead_zoo`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dyhead_zoo.version import __version__

if TYPE_CHECKING:
    from dyhead_zoo.data.label_space import COCO_80, LabelSpace
    from dyhead_zoo.detector import Detector, TrainStep
    from dyhead_zoo.engine.config import TrainConfig
    from dyhead_zoo.engine.evaluate import evaluate
    from dyhead_zoo.engine.train import train
    from dyhead_zoo.factory import create_detector
    from dyhead_zoo.hub import pull, push_to_hub, save_for_hub
    from dyhead_zoo.pretrained import PretrainedCfg
    from dyhead_zoo.registry import (
        detector_entrypoint,
        get_pretrained_cfg,
        is_detector,
        list_detectors,
        list_pretrained,
        list_tags,
        register_detector,
    )
    from dyhead_zoo.structures import Batch, Detections, DetectionTensors, Target
    from dyhead_zoo.weights import load_checkpoint

DEFAULT_DETECTOR = "atss_lite0_dyhead2"
"""What ``dyhead-zoo predict`` uses; its weights ship with the package."""

_HOME = {
    "COCO_80": "data.label_space",
    "LabelSpace": "data.label_space",
    "Detector": "detector",
    "TrainStep": "detector",
    "evaluate": "engine.evaluate",
    "train": "engine.train",
    "TrainConfig": "engine.config",
    "create_detector": "factory",
    "pull": "hub",
    "push_to_hub": "hub",
    "save_for_hub": "hub",
    "PretrainedCfg": "pretrained",
    "detector_entrypoint": "registry",
    "get_pretrained_cfg": "registry",
    "is_detector": "registry",
    "list_detectors": "registry",
    "list_pretrained": "registry",
    "list_tags": "registry",
    "register_detector": "registry",
    "Batch": "structures",
    "Detections": "structures",
    "DetectionTensors": "structures",
    "Target": "structures",
    "load_checkpoint": "weights",
}

__all__ = [
    "COCO_80",
    "DEFAULT_DETECTOR",
    "Batch",
    "DetectionTensors",
    "Detections",
    "Detector",
    "LabelSpace",
    "PretrainedCfg",
    "Target",
    "TrainConfig",
    "TrainStep",
    "__version__",
    "create_detector",
    "detector_entrypoint",
    "evaluate",
    "get_pretrained_cfg",
    "is_detector",
    "list_detectors",
    "list_pretrained",
    "list_tags",
    "load_checkpoint",
    "pull",
    "push_to_hub",
    "register_detector",
    "save_for_hub",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dyhead_zoo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dyhead_zoo.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
