"""Run every timm architecture as the backbone of a detector, and write what happened to a CSV file.

    python hub/sweep_backbones.py hub/backbones.csv                 # all of timm; resumes where it stopped
    python hub/sweep_backbones.py hub/backbones.csv 'resnet*'       # some
    python hub/sweep_backbones.py hub/backbones.csv --table docs/backbones.md    # no run: the table in the docs

Each is built into an ATSS detector with one DyHead block; bodies that take any size get an odd canvas, the others their
own. Up to ``--limit`` million parameters a training step is run, and each trainable parameter must get a finite
gradient; larger ones run forward for the shapes only, on the meta device where that is possible.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import logging
import time
import warnings
from pathlib import Path
from typing import Any, cast

import timm
import torch

from dyhead_zoo import TrainStep, create_detector
from dyhead_zoo.detector import Detector
from dyhead_zoo.layers.backbone import Backbone

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
        backbone = cast(Backbone, detector.backbone)
        row["parameters"] = sum(p.numel() for p in backbone.body.parameters())
        fixed = backbone.image_size
        canvas = fixed or ODD_CANVAS
        row |= {"kind": "fixed" if fixed else "dynamic", "canvas": f"{canvas[0]}x{canvas[1]}"}
        if row["parameters"] > limit * 1e6:
            row["checked"] = "shapes"
            try:
                judge_shapes(detector, canvas)
            except RuntimeError as error:
                if "meta tensors" not in str(error):
                    raise
                judge_shapes(build(name), canvas)  # asks for values, which the meta device does not have
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
    backbone = cast(Backbone, detector.eval().backbone)
    with torch.no_grad():
        levels = backbone(torch.zeros(1, 3, *canvas, device=detector.device))
    sizes = [tuple(x.shape[-2:]) for x in levels]
    expected = [(-(-canvas[0] // s), -(-canvas[1] // s)) for s in backbone.strides]
    if sizes != expected:
        raise ValueError(f"levels of {sizes}, expected {expected}")


def judge_gradients(detector: Detector, canvas: tuple[int, int]) -> None:
    """Raise unless a training step gives a finite gradient to every trainable parameter."""
    images = torch.randint(0, 256, (2, 3, *canvas), dtype=torch.uint8)
    box = torch.tensor([[canvas[1] * 0.1, canvas[0] * 0.1, canvas[1] * 0.7, canvas[0] * 0.8]])
    targets = [{"boxes": box, "labels": torch.tensor([i])} for i in range(2)]
    sizes = torch.tensor([canvas] * 2)
    sum(TrainStep(detector.train())(images, sizes, targets).values()).backward()
    parameters = [(k, p.grad) for k, p in detector.named_parameters() if p.requires_grad]
    if none := [key for key, gradient in parameters if gradient is None]:
        raise ValueError(f"no gradient for {len(none)} parameters: {none[:3]}")
    if wild := [key for key, gradient in parameters if gradient is not None and not gradient.isfinite().all()]:
        raise ValueError(f"infinite gradients for {len(wild)} parameters: {wild[:3]}")


def table(rows: list[dict[str, str]]) -> str:
    """The page of the docs: a line per timm module, and every architecture that failed with its reason."""
    modules: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        modules.setdefault(row["module"], []).append(row)
    ok = [row for row in rows if row["result"] == "ok"]
    trained = sum(row["checked"] == "gradients" for row in ok)
    versions = ", ".join(sorted({row["timm"] for row in rows}))
    lines = [
        "# Supported backbones",
        "",
        "Written by `hub/sweep_backbones.py`; do not edit. Each architecture of timm was built into an ATSS detector",
        f"with one DyHead block and run on a CPU: {len(ok)} of {len(rows)} work (timm {versions}).",
        f"{trained} of them took a training step with finite gradients for every trainable parameter; the others,",
        "the largest, were run forward, most on the meta device, which shows that the shapes are right and no more.",
        f"*Dynamic* bodies ran on a canvas of {ODD_CANVAS[0]} x {ODD_CANVAS[1]} pixels, *fixed* ones on their own; see",
        "`image_size` of `create_detector`.",
        "",
        "| timm module | work | trained | dynamic | fixed |",
        "|---|---|---|---|---|",
    ]
    for module, members in sorted(modules.items()):
        good = [row for row in members if row["result"] == "ok"]
        counts = [sum(row[key] == value for row in good) for key, value in _COLUMNS]
        lines.append(f"| {module} | {len(good)} of {len(members)} | " + " | ".join(map(str, counts)) + " |")
    if failed := [row for row in rows if row["result"] != "ok"]:
        lines += ["", "## Those that do not", "", "| architecture | why |", "|---|---|"]
        lines += [f"| {row['name']} | {row['result'].replace('|', '/')} |" for row in failed]
    return "\n".join(lines) + "\n"


_COLUMNS = (("checked", "gradients"), ("kind", "dynamic"), ("kind", "fixed"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("filters", nargs="*", help="wildcards of timm names; all by default")
    parser.add_argument("--limit", type=float, default=100, help="million parameters of the largest that are trained")
    parser.add_argument("--table", type=Path, help="write this page of the docs from the CSV file, and run nothing")
    args = parser.parse_args()
    if args.table:
        rows = sorted(csv.DictReader(args.csv.open()), key=lambda row: row["name"])
        args.table.write_text(table(rows))
        return
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
