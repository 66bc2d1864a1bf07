"""Detector families, one file each; importing this package registers their names."""

from dyhead_zoo.models import (
    atss,
    borderdet,
    cascade_rcnn,
    deformable_detr,
    detr,
    faster_rcnn,
    fcos,
    mask_rcnn,
    reppoints,
    retinanet,
)

__all__ = [
    "atss",
    "borderdet",
    "cascade_rcnn",
    "deformable_detr",
    "detr",
    "faster_rcnn",
    "fcos",
    "mask_rcnn",
    "reppoints",
    "retinanet",
]
