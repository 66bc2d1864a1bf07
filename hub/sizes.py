"""Parameters and multiply-adds of every family, with and without Dynamic Head, into ``hub/sizes.csv``.

    python hub/sizes.py [--check]

Counted on the meta device by ``dyhead_zoo.engine.info.count_macs``, whose docstring says what is in it, for one picture
that fills the input protocol: 800 x 1344 pixels, 384 x 384 for the small detectors. ``--check`` writes nothing and
fails if the file is not what the code gives.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dyhead_zoo import create_detector, get_pretrained_cfg, list_detectors
from dyhead_zoo.engine.info import canvas_of, count_macs, count_parameters

SIZES = Path(__file__).parent / "sizes.csv"
FAMILIES = {
    "faster_rcnn": "Faster R-CNN",
    "mask_rcnn": "Mask R-CNN",
    "cascade_rcnn": "Cascade R-CNN",
    "cascade_mask_rcnn": "Cascade Mask R-CNN",
    "retinanet": "RetinaNet",
    "fcos": "FCOS",
    "atss": "ATSS",
    "reppoints": "RepPoints",
    "borderdet": "BorderDet",
    "detr": "DETR",
    "deformable_detr": "Deformable DETR",
}
"""By their names in the registry."""


def compared() -> list[tuple[str, str]]:
    """Family and name of the detectors compared: ResNet-50 without and with DyHead, then the small ones."""
    patterns = ("resnet50", "resnet50_dyhead6", "lite0*")
    return [
        (title, name)
        for family, title in FAMILIES.items()
        for pattern in patterns
        for name in list_detectors(f"{family}_{pattern}")
    ]


def size(title: str, name: str) -> dict[str, str]:
    """One row. All canvases are multiples of 32, also where a detector would do without."""
    with torch.device("meta"):
        detector = create_detector(name)
    height, width = canvas_of(get_pretrained_cfg(name).replace(pad_divisor=32))
    return {
        "family": title,
        "name": name,
        "height": str(height),
        "width": str(width),
        "parameters": str(count_parameters(detector)),
        "multiply_adds": str(count_macs(detector, height, width)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the file is stale, write nothing")
    args = parser.parse_args(argv)
    rows = [size(title, name) for title, name in compared()]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    fresh = SIZES.is_file() and SIZES.read_text() == text.getvalue()
    if not fresh:
        print(f"{'stale' if args.check else 'written'}: {SIZES}")
        if not args.check:
            SIZES.write_text(text.getvalue())
    return 1 if args.check and not fresh else 0


if __name__ == "__main__":
    sys.exit(main())
