"""Detector families, one file each; importing this package registers their names."""

from dyhead_zoo.models import atss, borderdet, fcos, reppoints, retinanet

__all__ = ["atss", "borderdet", "fcos", "reppoints", "retinanet"]
