"""``dyhead-zoo benchmark``: what things cost on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dyhead_zoo.cli.shared import positive_int


def _add_benchmark(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "benchmark",
        help="measure what things cost on this machine",
        description="op: the deformable convolution; head: six DyHead blocks, inference; train: the same, forward and "
        "backward; each against dense convolutions and torchvision's operator. detector: a whole detector, its parts "
        "and a training step. torchvision: its two-stage detectors beside ours with the same weights. photo: the "
        "stages from a JPEG to boxes. memory: what operator, head and detectors need at their peak, each in a process "
        "of its own. data: making batches, by stages. eval: scoring detections, against pycocotools.",
    )
    choices = ("op", "head", "train", "detector", "torchvision", "photo", "memory", "data", "eval")
    verb.add_argument("what", choices=choices)
    verb.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="of detector, photo and data; default: atss_resnet50_dyhead6, the bundled one, both",
    )
    verb.add_argument("--reps", type=positive_int, metavar="N", help="rounds; default: 7, of memory 3")
    verb.add_argument("--threads", type=positive_int, default=1, metavar="N", help="of PyTorch; default: %(default)s")
    verb.add_argument(
        "--size", type=positive_int, nargs=2, metavar=("H", "W"), help="of the maps (op), images, or files (data)"
    )
    verb.add_argument("--images", type=Path, metavar="DIR", help="data: folder of images; default: synthetic JPEGs")
    verb.add_argument("--annotations", type=Path, metavar="FILE", help="data: COCO-format JSON file of the same")
    verb.add_argument("--csv", type=Path, metavar="FILE", help="also write the figures there")
    verb.set_defaults(run=run_benchmark)
    return verb


def run_benchmark(args: argparse.Namespace) -> int:
    """Measure and print a table."""
    from dyhead_zoo.engine import benchmark, benchmark_cases, benchmark_memory

    given = {"name": args.name, "images": args.images, "annotations": args.annotations}
    given["size"] = tuple(args.size) if args.size else None
    if args.what == "memory":
        benchmark_cases.check_use(args.what, **given)
        benchmark_memory.run_memory_benchmark(
            benchmark_memory.memory_cases(), args.reps or 3, args.csv, threads=args.threads
        )
    else:
        cases = benchmark_cases.cases(args.what, **given)
        benchmark.run_benchmark(cases, args.reps or 7, args.csv, threads=args.threads)
    return 0


VERBS = (_add_benchmark,)
