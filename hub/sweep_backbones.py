"""Run every timm architecture as the backbone of a detector, and write what happened to a CSV file.

    python hub/sweep_backbones.py hub/backbones.csv                 # all of timm; resumes where it stopped
    python hub/sweep_backbones.py hub/backbones.csv 'resnet*'       # some

Each is built into an ATSS detector with one DyHead block; bodies that take any size get an odd canvas, the others their
own. Up to ``--limit`` million parameters a training step is run, and each trainable parameter must get a finite
gradient; larger ones run forward on the meta device, for the shapes only.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch

from dyhead_zoo import TrainStep, create_detector
from dyhead_zoo.detector import Detector

FIELDS = ("name", "module", "timm", "parameters", "canvas", "kind", "checked", "result", "seconds")
ODD_CANVAS = (101, 149)  # pixels, no multiple of anything


def check(name: str, limit: float) -> dict[str, Any]:
    """One row: builds, runs and judges one architecture."""
    row: dict[str, Any] = {"name": name, "timm": timm.__version__}
    row["module"] = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    start = time.perf_counter()
    try:
        with torch.device("meta"):
            detector = build(name)
        row["parameters"] = sum(p.numel() for p in detector.backbone.body.parameters())  # type: ignore[union-attr]
        fixed = detector.backbone.image_size
        canvas = fixed or ODD_CANVAS
        row |= {"kind": "fixed" if fixed else "dynamic", "canvas": f"{canvas[0]}x{canvas[1]}"}
        if row["parameters"] > limit * 1e6:
            row["checked"] = "shapes"
            judge_shapes(detector.eval(), canvas)
        else:
            row["checked"] = "gradients"
            judge_gradients(build(name), canvas)
        row["result"] = "ok"
    except Exception as error:  # whatever timm raises is the result
        row["result"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def build(name: str) -> Detector:
    """The detector of the sweep: small, so that the backbone is what costs."""
    return create_detector(f"atss_{name}_dyhead1", channels=32, num_classes=2)


def judge_shapes(detector: Detector, canvas: tuple[int, int]) -> None:
    """Raise unless the levels have the sizes that their strides say."""
    levels = detector.backbone(torch.zeros(1, 3, *canvas, device="meta"))
    sizes = [tuple(x.shape[-2:]) for x in levels]
    expected = [(-(-canvas[0] // s), -(-canvas[1] // s)) for s in detector.backbone.strides]  # type: ignore[union-attr]
    if sizes != expected:
        raise ValueError(f"levels of {sizes}, expected {expected}")


def judge_gradients(detector: Detector, canvas: tuple[int, int]) -> None:
    """Raise unless a training step gives a finite gradient to every trainable parameter."""
    images = torch.randint(0, 256, (2, 3, *canvas), dtype=torch.uint8)
    box = torch.tensor([[canvas[1] * 0.1, canvas[0] * 0.1, canvas[1] * 0.7, canvas[0] * 0.8]])
    targets = [{"boxes": box, "labels": torch.tensor([i])} for i in range(2)]
    sizes = torch.tensor([canvas] * 2)
    sum(TrainStep(detector.train())(images, sizes, targets).values()).backward()  # type: ignore[union-attr]
    parameters = [(k, p.grad) for k, p in detector.named_parameters() if p.requires_grad]
    if none := [key for key, gradient in parameters if gradient is None]:
        raise ValueError(f"no gradient for {len(none)} parameters: {none[:3]}")
    if wild := [key for key, gradient in parameters if gradient is not None and not gradient.isfinite().all()]:
        raise ValueError(f"infinite gradients for {len(wild)} parameters: {wild[:3]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("filters", nargs="*", help="wildcards of timm names; all by default")
    parser.add_argument("--limit", type=float, default=100, help="million parameters of the largest that are trained")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    done = {row["name"] for row in csv.DictReader(args.csv.open())} if args.csv.exists() else set()
    names = [n for n in timm.list_models() if not args.filters or any(fnmatch.fnmatch(n, f) for f in args.filters)]
    with args.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not done:
            writer.writeheader()
        for name in (n for n in names if n not in done):
            torch.manual_seed(0)
            row = check(name, args.limit)
            writer.writerow(row)
            file.flush()
            print(row["name"], row["result"], row["seconds"], flush=True)


if __name__ == "__main__":
    main()
