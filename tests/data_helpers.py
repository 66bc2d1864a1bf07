"""Tiny pictures and annotation files for the data tests."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

FUZZ = int(os.environ.get("DYHEAD_ZOO_FUZZ", "1"))
"""Multiplies the number of examples of the property tests."""

COLOURS = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], dtype=torch.uint8)
"""What objects of label 0..3 are painted with."""


def painted(height: int, width: int, boxes: Tensor, labels: Tensor) -> Tensor:
    """A black picture whose boxes (whole pixels) are filled with the colours of their labels."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
        image[:, y1:y2, x1:x2] = COLOURS[label][:, None, None]
    return image


def has_colour(image: Tensor, label: int) -> Tensor:
    """(H, W) mask of the pixels that are nearer to the label's colour than to black or another colour."""
    return (image.int() - COLOURS[label].int()[:, None, None]).abs().amax(0) < 100


def coco_dict(sizes: list[tuple[int, int]], annotations: list[tuple[int, int, list[float], int]]) -> dict[str, Any]:
    """Image ids 10, 20, ...; categories 3 "cat", 1 "ant", 7 "bee"; annotations (image id, category id, bbox, crowd)."""
    return {
        "images": [
            {"id": 10 * (k + 1), "file_name": f"{k}.png", "height": h, "width": w} for k, (h, w) in enumerate(sizes)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 1, "name": "ant"}, {"id": 7, "name": "bee"}],
        "annotations": [
            {"id": k + 1, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": crowd, "area": 1.0}
            for k, (image, category, bbox, crowd) in enumerate(annotations)
        ],
    }


def write_coco(folder: Path, content: Any, pictures: bool = True) -> tuple[Path, Path]:
    """Write the file and a noise picture for each image; returns (image folder, annotation file)."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    if pictures:
        for entry in content["images"]:
            rng = np.random.default_rng(entry["id"])
            pixels = rng.integers(0, 256, (entry["height"], entry["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / entry["file_name"])
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return images, path


def small_coco(folder: Path, count: int = 7) -> tuple[Path, Path]:
    """A valid data set of ``count`` wide and tall pictures, with zero to two boxes each and one crowd region."""
    sizes = [(24 + 4 * (k % 3), 40) if k % 2 else (40, 24 + 4 * (k % 3)) for k in range(count)]
    rows = [
        (10 * (k + 1), (1, 3, 7)[(k + j) % 3], [1.5 + j, 2.0, 15.0, 17.25], 0)
        for k in range(count)
        for j in range(k % 3)
    ]
    rows.append((20, 3, [0.0, 0.0, 20.0, 20.0], 1))
    return write_coco(folder, coco_dict(sizes, rows))


SHAPES = ("circle", "rectangle", "triangle")
_CORNERS = {"circle": 32, "rectangle": 4, "triangle": 3}


def shapes_coco(folder: Path, count: int = 8, side: int = 96, seed: int = 0) -> tuple[Path, Path]:
    """A data set of ``count`` square pictures with one to four shapes each, which do not overlap, on dark noise.

    The colours say nothing of the class. Masks are the painted pixels; the file has them as polygons, as RLEs and as
    compressed RLEs, by turns; boxes are tight.
    """
    rng = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 2 * k + 1, "name": name} for k, name in enumerate(SHAPES)]
    for image_id in range(1, count + 1):
        pixels = rng.integers(0, 60, (side, side, 3), dtype=np.uint8)
        for quarter in rng.permutation(4)[: rng.integers(1, 5)]:
            name = SHAPES[rng.integers(3)]
            polygon = _shape(name, side, int(quarter), rng)
            rle = coco_mask.merge(coco_mask.frPyObjects([polygon], side, side))
            pixels[coco_mask.decode(rle).astype(bool)] = rng.integers(120, 256, 3)
            content["annotations"].append(
                {
                    "id": (number := len(content["annotations"]) + 1),
                    "image_id": image_id,
                    "category_id": 2 * SHAPES.index(name) + 1,
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "area": int(coco_mask.area(rle)),
                    "iscrowd": 0,
                    "segmentation": _written([polygon], rle, number % 3),
                }
            )
        Image.fromarray(pixels).save(images / f"{image_id}.png")
        content["images"].append({"id": image_id, "file_name": f"{image_id}.png", "height": side, "width": side})
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return images, path


def _shape(name: str, side: int, quarter: int, rng: np.random.Generator) -> list[float]:
    """A turned, stretched polygon within a quarter of the picture."""
    room = side / 4
    radius = rng.uniform(0.65, 0.95, 2) * room
    centre = np.array([quarter % 2, quarter // 2]) * 2 * room + room
    turn = {"circle": 0.0, "rectangle": math.pi / 4, "triangle": rng.uniform(0, 2 * math.pi)}[name]
    angles = turn + 2 * math.pi * np.arange(_CORNERS[name]) / _CORNERS[name]
    points: list[float] = (centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)).ravel().tolist()
    return points


def _written(polygons: list[list[float]], rle: dict[str, Any], form: int) -> Any:
    """A segmentation as polygons, plain RLE or compressed RLE."""
    if form == 0:
        return polygons
    if form == 1:
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    down_the_columns = coco_mask.decode(rle).ravel(order="F")
    edges = np.flatnonzero(np.diff(down_the_columns, prepend=0))
    return {"size": rle["size"], "counts": np.diff(edges, prepend=0, append=len(down_the_columns)).tolist()}
