"""Detector families, one file each; importing this package registers their names."""

from dyhead_zoo.models import atss, fcos, retinanet

__all__ = ["atss", "fcos", "retinanet"]
