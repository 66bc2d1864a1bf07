"""Write the card of every bundled detector from its record, recipe and measured speed: ``hub/<name.tag>/README.md``.

    python hub/cards.py [--check]

``--check`` writes nothing and fails if a card is not what its record gives.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from dyhead_zoo import Detector, create_detector, get_pretrained_cfg, list_pretrained
from dyhead_zoo.card import render_card
from dyhead_zoo.data import prepare_images, read_image
from dyhead_zoo.engine.predict import sample_photo
from dyhead_zoo.pretrained import HUB_ORGANISATION

HUB = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if a card is stale, write nothing")
    args = parser.parse_args()
    stale = []
    for name in bundled_names():
        path = HUB / name / "README.md"
        text = card_of(name)
        if not path.exists() or path.read_text() != text:
            stale.append(str(path))
            if not args.check:
                path.write_text(text)
    if stale:
        print(("stale: " if args.check else "written: ") + ", ".join(stale))
    sys.exit(1 if stale and args.check else 0)


def bundled_names() -> list[str]:
    """``name.tag`` of all weights in the package."""
    return [name for name in list_pretrained() if get_pretrained_cfg(name).status == "bundled"]


def card_of(name: str, organisation: str = HUB_ORGANISATION) -> str:
    """The card of one set of weights, from what ``hub/<name.tag>`` holds."""
    detector = create_detector(name, pretrained=True)
    return render_card(
        detector.config(),
        read(name, "eval.json"),
        recipe=read(name, "recipe.json"),
        benchmark=speed(name, detector),
        repo_id=f"{organisation}/{name}",
    )


def speed(name: str, detector: Detector) -> list[dict[str, Any]]:
    """What ``dyhead-zoo benchmark photo NAME --csv hub/<name.tag>/speed.csv`` measured; empty without that file."""
    path = HUB / name / "speed.csv"
    if not path.exists():
        return []
    rows = list(csv.DictReader(path.open()))
    ((_, batch),) = prepare_images([read_image(sample_photo())], detector.pretrained_cfg, 1)
    milliseconds = statistics.median(float(row["baseline_ms"]) for row in rows if row["baseline"] == "predict")
    runtime = f"torch {rows[0]['torch'].partition('+')[0]}, float32, {rows[0]['threads']} threads, from JPEG to boxes"
    return [
        {
            "hardware": rows[0]["machine"],
            "runtime": runtime,
            "canvas": batch.images.shape[-2:],
            "batch_size": 1,
            "images_per_second": 1000 / milliseconds,
        }
    ]


def read(name: str, file: str) -> dict[str, Any] | None:
    """A JSON file of ``hub/<name.tag>``; None if there is none."""
    path = HUB / name / file
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    main()
