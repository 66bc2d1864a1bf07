"""Do detectors learn? Trains each on a COCO-format data set, once per seed, and appends what came out to a CSV.

    python hub/learn.py atss_lite0_dyhead2 fcos_lite0_dyhead2 --images photos/train --annotations train.json \
        --val-images photos/val --val-annotations val.json --backbone lite0.safetensors --seeds 0 1 2 --csv learn.csv

With ``--photos 16`` it trains on that many photos, without augmentation, and evaluates on the very same, padded as in
training: a detector that cannot learn them by heart has a fault. Detectors that learn masks get the rectangles of the
boxes where the data have none. A run whose row is in the CSV is not repeated, and one that was stopped is resumed, so
the script may be killed and started again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from dyhead_zoo import TrainConfig, create_detector, train
from dyhead_zoo.data.label_space import LabelSpace
from dyhead_zoo.version import __version__

FIELDS = [
    "detector",
    "start",
    "arguments",
    "seed",
    "photos",
    "epochs",
    "steps",
    "AP",
    "AP50",
    "AP75",
    "version",
    "torch",
]
SMALL = TrainConfig(
    epochs=8,
    batch_size=8,
    lr=8e-4,
    backbone_lr_scale=0.3,
    warmup_steps=30,
    ema_decay=0.99,
    amp="bf16",
    channels_last=True,
    close_mosaic_epochs=2,
    cache_images=True,
    num_workers=0,
    progress=False,
)
"""Settings for a few hundred photos."""
BY_HEART = SMALL.replace(
    epochs=150,
    batch_size=16,
    lr=2e-3,
    backbone_lr_scale=0.5,
    warmup_steps=10,
    ema_decay=0.0,
    amp="none",
    size=256,
    scale_min=1.0,
    scale_max=1.0,
    mosaic=0.0,
    close_mosaic_epochs=0,
    color=0.0,
    flip=0.0,
    log_every=10,
)
"""Settings for ``--photos``: every step sees all photos as they are."""


NOT_TOLD = ("epochs", "checkpoint_every_steps")
"""Settings that the column ``arguments`` leaves out: the first has a column of its own, the second changes nothing."""


def pick_photos(annotations: Path, count: int, smallest: float, masks: bool, output: Path) -> Path:
    """Write a COCO file with the first ``count`` photos of one to six objects, no crowd, no side below ``smallest``.

    With ``masks``, objects without a segmentation get the rectangle of their box.
    """
    data = json.loads(annotations.read_text())
    objects: dict[int, list[dict[str, Any]]] = {}
    for item in data["annotations"]:
        objects.setdefault(item["image_id"], []).append(item)

    def clear(image: dict[str, Any]) -> bool:
        own = objects.get(image["id"], [])
        return 1 <= len(own) <= 6 and all(not x.get("iscrowd") and min(x["bbox"][2:]) >= smallest for x in own)

    images = [image for image in data["images"] if clear(image)][:count]
    if len(images) < count:
        raise ValueError(f"{annotations} has {len(images)} photos of one to six clear objects, not {count}")
    kept = [item for image in images for item in objects[image["id"]]]
    for item in kept if masks else []:
        x, y, width, height = item["bbox"]
        item.setdefault("segmentation", [[x, y, x + width, y, x + width, y + height, x, y + height]])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**data, "images": images, "annotations": kept}))
    return output


def learn(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run; its row of the CSV."""
    parts = [name, args.start, *told(args).split(), str(args.photos or "all"), str(seed)]
    run = args.runs / "_".join(parts)
    annotations, val_images, val_annotations = args.annotations, args.val_images, args.val_annotations
    if args.photos:
        file = run.with_name(f"{run.name}.json")
        annotations = val_annotations = pick_photos(args.annotations, args.photos, 24, "mask" in name, file)
        val_images = args.images
    config = (BY_HEART if args.photos else SMALL).replace(seed=seed, **dict(args.set))
    config = config.replace(eval_every=config.epochs, test_size=config.size if args.photos else config.test_size)
    torch.manual_seed(seed)
    detector = create_detector(
        name,
        pretrained=args.start == "detector",
        pretrained_backbone=args.backbone if args.start == "backbone" else None,
        class_names=LabelSpace.from_categories(json.loads(annotations.read_text())["categories"]),
        frozen_stages=2,
        norm_eval=True,
        full_precision=True,
        **dict(map(_setting, args.model_args)),
    )
    if args.photos:  # GroupNorm and DyHead take means over the canvas, which thus belongs to what is learned by heart
        detector.pretrained_cfg = detector.pretrained_cfg.replace(pad_divisor=config.size)
    result = train(
        detector,
        images=args.images,
        annotations=annotations,
        val_images=val_images,
        val_annotations=val_annotations,
        output=run,
        config=config,
        resume=True,
    )
    return {
        "detector": name,
        "start": args.start,
        "arguments": told(args),
        "seed": seed,
        "photos": args.photos or "all",
        "epochs": result.epochs,
        "steps": result.steps,
        **{key: f"{result.metrics[key]:.4f}" for key in ("AP", "AP50", "AP75")},
        "version": __version__,
        "torch": torch.__version__,
    }


def told(args: argparse.Namespace) -> str:
    """What was asked of the detector and of the training beyond its defaults, in the words of the command line."""
    return " ".join([*args.model_args, *(f"{key}={value}" for key, value in args.set if key not in NOT_TOLD)])


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--val-images", type=Path)
    parser.add_argument("--val-annotations", type=Path)
    parser.add_argument("--start", choices=("backbone", "detector", "random"), default="backbone")
    parser.add_argument("--backbone", type=Path, help="timm state dict for --start backbone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--photos", type=int, help="learn so many photos by heart")
    parser.add_argument("--model-args", nargs="*", default=[], metavar="KEY=VALUE")
    settings = ", ".join(field.name for field in dataclasses.fields(TrainConfig))
    parser.add_argument("--set", nargs="*", type=_setting, default=[], metavar="KEY=VALUE", help=f"any of {settings}")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/learn"), help="folder of the runs")
    args = parser.parse_args()
    for seed in args.seeds:
        for name in args.names:
            rows = list(csv.DictReader(args.csv.open())) if args.csv.exists() else []
            done = (name, args.start, told(args), str(seed), str(args.photos or "all"))
            if done in [
                tuple(row[key] for key in ("detector", "start", "arguments", "seed", "photos")) for row in rows
            ]:
                continue
            row = learn(name, seed, args)
            print(row, flush=True)
            with args.csv.open("a", newline="") as f:
                writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
                if not rows:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
