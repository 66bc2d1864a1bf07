"""Rebuild the data set "COCO 2148/500 subset, 384 px" from COCO itself.

    python hub/data/build_subset.py --coco COCO --output data/coco_small

``COCO`` is an official download (https://cocodataset.org/#download): ``train2017/``, ``val2017/`` and
``annotations/instances_{train,val}2017.json``. Written are ``images/{train,val}`` and
``annotations/instances_{train,val}.json``. ``README.md`` says in what the result differs from the set that the
published figures were measured on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

LIST = Path(__file__).with_name("coco_2148_500.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", type=Path, required=True, help="folder of the official download")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--list", type=Path, default=LIST, help="image ids by part and COCO split; default: ours")
    args = parser.parse_args()
    wanted = json.loads(args.list.read_text())
    for part, ids_by_split in wanted["parts"].items():
        content = build(wanted, part, ids_by_split, args.coco, args.output / "images" / part)
        path = args.output / "annotations" / f"instances_{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        print(f"{part}: {len(content['images'])} images, {len(content['annotations'])} boxes")


def build(
    wanted: Mapping[str, Any], part: str, ids_by_split: Mapping[str, list[int]], coco: Path, images: Path
) -> dict[str, Any]:
    """Resize the photos of one part into ``images``; return its annotations in COCO format.

    Raises:
        SystemExit: if the download lacks a file or an image id.
    """
    images.mkdir(parents=True, exist_ok=True)
    kept: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    categories: list[dict[str, Any]] = []
    for split, ids in ids_by_split.items():
        official = _read(coco / "annotations" / f"instances_{split}.json")
        categories = official["categories"]
        of_id = {image["id"]: image for image in official["images"]}
        if missing := sorted(set(ids) - set(of_id)):
            raise SystemExit(f"instances_{split}.json lacks {len(missing)} images, such as {missing[:3]}")
        sizes = {}
        for image_id in ids:
            file_name = of_id[image_id]["file_name"]
            before, after = _resize(coco / split / file_name, images / file_name, wanted)
            sizes[image_id] = (after[0] / before[0], after[1] / before[1])
            kept.append(
                {"id": image_id, "file_name": file_name, "width": after[0], "height": after[1], "coco_split": split}
                | {"orig_width": before[0], "orig_height": before[1]}
            )
        annotations += [_scaled(a, *sizes[a["image_id"]]) for a in official["annotations"] if a["image_id"] in sizes]
    annotations.sort(key=lambda annotation: annotation["image_id"])  # stable: the official order within an image
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    return {
        "info": {"description": f"{wanted['name']}, {part}"},
        "images": sorted(kept, key=lambda image: image["id"]),
        "annotations": annotations,
        "categories": [{"id": category["id"], "name": category["name"]} for category in categories],
    }


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: --coco must hold annotations/, train2017/ and val2017/ of COCO")
    return dict(json.loads(path.read_text()))


def _resize(source: Path, target: Path, wanted: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Scale a photo down to the longest side, never up; (width, height) before and after."""
    if not source.is_file():
        raise SystemExit(f"{source} does not exist: is the download complete?")
    with Image.open(source) as opened:
        photo = opened.convert("RGB")
    scale = min(1.0, wanted["longest_side"] / max(photo.size))
    after = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    resized = photo if after == photo.size else photo.resize(after, Image.Resampling.LANCZOS)
    resized.save(target, quality=wanted["jpeg_quality"])
    return photo.size, after


def _scaled(annotation: Mapping[str, Any], x_scale: float, y_scale: float) -> dict[str, Any]:
    """An annotation in pixels of the small photo; ``area`` becomes that of the box, as the set has no masks."""
    x, y, width, height = annotation["bbox"]
    box = [round(v, 2) for v in (x * x_scale, y * y_scale, width * x_scale, height * y_scale)]
    return {
        "id": annotation["id"],
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": box,
        "area": round(box[2] * box[3], 2),
        "iscrowd": annotation["iscrowd"],
    }


if __name__ == "__main__":
    main()
