"""The record of an evaluation, ``eval.json``: figures, how sure they are, and what is needed to repeat them.

One record per set of weights is the only source of the figures that model cards, metadata and tables show.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dyhead_zoo.download import sha256_of
from dyhead_zoo.engine.bootstrap import LEVEL, bootstrap_intervals
from dyhead_zoo.engine.evaluate import MASK_METRIC_NAMES, EvalResult, read_annotations
from dyhead_zoo.engine.info import canvas_of, count_macs, count_parameters
from dyhead_zoo.version import __version__
from dyhead_zoo.weight_files import state_sha256

if TYPE_CHECKING:
    from dyhead_zoo.detector import Detector

RECORD_VERSION = 1
"""Of the record's layout."""


def evaluation_record(
    detector: Detector,
    result: EvalResult,
    *,
    annotations: str | Path,
    dataset: str,
    split: str = "val",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything worth knowing of one evaluation, JSON-able; figures that do not exist are None.

    Args:
        detector: what was evaluated.
        result: of ``evaluate``.
        annotations: the COCO-format file it was evaluated on.
        dataset: the data set in words, such as ``COCO 2017``.
        split: its part.
        resamples: draws of the bootstrap behind ``intervals``; 0 leaves the intervals out.
        seed: of those draws.

    Returns:
        ``record_version, detector, date``; ``state_sha256`` (of the weights); ``metrics`` and ``per_class`` as in
        ``EvalResult``; ``intervals`` (AP and AP50, with masks mask_AP and mask_AP50 too: low, high; with level,
        resamples, seed); ``dataset`` (name, split, images, objects, annotations_sha256); ``predictions`` (count,
        sha256); ``model`` (parameters, multiply-adds and the canvas they are for); ``unknown_classes``; ``evaluator``;
        ``seconds`` and ``environment``.

    Raises:
        FileNotFoundError, ValueError: if the annotation file is missing, or is not the one of the result.
    """
    content = read_annotations(annotations)
    image_ids = [image["id"] for image in content["images"]][: result.num_images]
    intervals = None
    if resamples:
        intervals = {
            **_intervals(content, result, image_ids, resamples, seed),
            "level": LEVEL,
            "resamples": resamples,
            "seed": seed,
            "method": "percentile bootstrap over images",
        }
    height, width = canvas_of(detector.pretrained_cfg)
    record = {
        "record_version": RECORD_VERSION,
        "detector": result.detector,
        "state_sha256": state_sha256(detector),
        "date": datetime.now(UTC).date().isoformat(),
        "metrics": result.metrics,
        "intervals": intervals,
        "dataset": {
            "name": dataset,
            "split": split,
            "images": result.num_images,
            "objects": sum(row["num_gts"] for row in result.per_class),
            "annotations_sha256": sha256_of(annotations),
        },
        "model": {
            "parameters": count_parameters(detector),
            "macs": count_macs(detector, height, width),
            "canvas": [height, width],
        },
        "predictions": {"count": len(result.predictions), "sha256": predictions_sha256(result.predictions)},
        "evaluator": f"{result.backend} {importlib.metadata.version(result.backend)}",
        "num_images": result.num_images,
        "seconds": round(result.seconds, 1),
        "unknown_classes": list(result.unknown_classes),
        "environment": environment(detector.device),
        "per_class": result.per_class,
    }
    return dict(_nan_to_none(record))


def _intervals(
    content: Mapping[str, Any], result: EvalResult, image_ids: Sequence[int], resamples: int, seed: int
) -> dict[str, list[float]]:
    """Those of boxes and, where they were evaluated, of masks, on the same draws of images."""
    settings: dict[str, Any] = {"image_ids": image_ids, "resamples": resamples, "seed": seed}
    intervals = bootstrap_intervals(content, result.predictions, **settings)
    if MASK_METRIC_NAMES[0] in result.metrics:
        of_masks = bootstrap_intervals(content, result.predictions, overlap="segm", **settings)
        intervals |= {f"mask_{name}": interval for name, interval in of_masks.items()}
    return intervals


def record_to_json(record: Mapping[str, Any]) -> str:
    """A record as text, the same for equal records."""
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def predictions_sha256(predictions: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of the predictions as canonical JSON: sorted keys, no spaces, boxes and scores to six decimals.

    Another machine may differ in the last bits of a float, so equal hashes prove equal predictions, but not the
    reverse.
    """
    rounded = [
        {**p, "bbox": [round(float(v), 6) for v in p["bbox"]], "score": round(float(p["score"]), 6)}
        for p in predictions
    ]
    text = json.dumps(rounded, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """What ran: device, its name, threads, versions of the packages that decide the figures, and our commit."""
    packages = ("torch", "torchvision", "timm", "numpy")
    return {
        "device": device.type,
        "hardware": _cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "dyhead_zoo": __version__,
        **{name: importlib.metadata.version(name) for name in packages},
        "commit": commit(),
    }


def commit() -> str | None:
    """The git commit of this package's source, with ``+changes`` if files differ from it; None outside a checkout."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if not (root / ".git").exists():
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "dyhead_zoo")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in names if name), platform.processor() or platform.machine())


def _nan_to_none(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _nan_to_none(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_none(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
