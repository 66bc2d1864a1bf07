"""Pictures and boxes on their way to the model: reading, checking, augmenting, batching."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dyhead_zoo.data.coco import CocoDataset, DataReport
    from dyhead_zoo.data.images import read_image
    from dyhead_zoo.data.label_space import COCO_80, LabelSpace
    from dyhead_zoo.data.loader import make_eval_loader, make_train_loader, prepare_images
    from dyhead_zoo.data.transforms import SmallDataTrain, StandardTrain

__all__ = [
    "COCO_80",
    "CocoDataset",
    "DataReport",
    "LabelSpace",
    "SmallDataTrain",
    "StandardTrain",
    "make_eval_loader",
    "make_train_loader",
    "prepare_images",
    "read_image",
]

_HOMES = {
    "COCO_80": "label_space",
    "CocoDataset": "coco",
    "DataReport": "coco",
    "LabelSpace": "label_space",
    "SmallDataTrain": "transforms",
    "StandardTrain": "transforms",
    "make_eval_loader": "loader",
    "make_train_loader": "loader",
    "prepare_images": "loader",
    "read_image": "images",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the loader needs ``structures``, which needs this package's label space."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
