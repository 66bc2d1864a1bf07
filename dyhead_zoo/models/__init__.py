"""Detector families, one file each; importing this package registers their names."""

from dyhead_zoo.models import atss, borderdet, detr, fcos, reppoints, retinanet

__all__ = ["atss", "borderdet", "detr", "fcos", "reppoints", "retinanet"]
