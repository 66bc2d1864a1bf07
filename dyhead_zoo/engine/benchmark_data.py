"""What ``dyhead-zoo benchmark data`` and ``benchmark eval`` compare: making batches, and scoring detections.

Unless told otherwise both make up what they work on, so that they run anywhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dyhead_zoo.data.coco import CocoDataset
from dyhead_zoo.data.images import read_image
from dyhead_zoo.data.loader import make_eval_loader, make_train_loader
from dyhead_zoo.data.transforms import (
    BatchPlan,
    SmallDataTrain,
    StandardTrain,
    TrainTransform,
    pad_and_stack,
    resize_to_protocol,
)
from dyhead_zoo.engine.benchmark import Case, Contestant
from dyhead_zoo.engine.config import TrainConfig
from dyhead_zoo.engine.evaluate import coco_metrics, resolve_backend
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.registry import get_pretrained_cfg
from dyhead_zoo.structures import Batch, Sample

PICTURE = (480, 640)
"""(height, width) of COCO's commonest pictures; a quarter of the synthetic ones stand upright."""
DETECTORS = ("atss_lite0_dyhead2", "atss_resnet50_dyhead6")
"""Whose input protocols the evaluation recipe is measured with: longer side 384 pixels, and 800 / 1333."""
CLASSES = 80
SMALLEST = 8
"""Side in pixels of the smallest synthetic object."""


def data_cases(
    names: Sequence[str] = DETECTORS,
    *,
    size: tuple[int, int] = PICTURE,
    count: int = 64,
    images: Path | None = None,
    annotations: Path | None = None,
) -> Iterator[Case]:
    """The batches of one epoch, made in this process, and what each stage takes of that.

    Two training recipes, in batches of 16 (the small one reads 2.5 files an image, for its mosaics), and the evaluation
    of each detector, in batches of one. Stages by themselves find warm caches, so they add up to less than the whole.

    Args:
        names: detectors, for the resizing of the evaluation.
        size: (height, width) of the synthetic JPEGs.
        count: of pictures, at most.
        images, annotations: a COCO-format data set to use instead of synthetic JPEGs.

    Raises:
        UnknownDetectorError: for a name that nobody has registered.
        ValueError: for one of ``images`` and ``annotations`` without the other, a faulty file, or too small a ``size``.
    """
    if (images is None) != (annotations is None):
        raise ValueError("--images and --annotations belong together: give both, or neither for synthetic pictures")
    cfgs = [get_pretrained_cfg(name) for name in names]  # faults are told now, not when the first case is made
    if images is None or annotations is None:
        if min(size) < SMALLEST:
            raise ValueError(f"pictures of {size[0]}x{size[1]}: use --size of at least {SMALLEST} pixels a side")
        return _synthetic_cases(cfgs, size, count)
    dataset = CocoDataset(images, annotations, max_images=count)
    return _recipes(cfgs, dataset, f"{len(dataset)} files of {images.name}")


def _synthetic_cases(cfgs: Sequence[PretrainedCfg], size: tuple[int, int], count: int) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        images, annotations = Path(folder), Path(folder) / "annotations.json"
        kilobytes = write_pictures(images, annotations, count, size)
        source = f"{count} JPEGs {size[0]}x{size[1]} of {kilobytes:.0f} kB"
        yield from _recipes(cfgs, CocoDataset(images, annotations), source)


def _recipes(cfgs: Sequence[PretrainedCfg], dataset: CocoDataset, source: str) -> Iterator[Case]:
    yield _train_case(f"small recipe: {source}", dataset, SmallDataTrain())
    yield _train_case(f"standard recipe: {source}", dataset, StandardTrain())
    for cfg in cfgs:
        yield _eval_case(f"eval {cfg.short_side}/{cfg.long_side}: {source}", dataset, cfg)


def eval_cases(images: int = 500, objects: int = 7, detections: int = 100) -> Iterator[Case]:
    """COCOeval on boxes: what ``dyhead-zoo eval`` does with detections against pycocotools as its authors show it.

    Args:
        images: in the synthetic data set.
        objects, detections: of each image.
    """
    content, found = synthetic_detections(images, objects, detections)
    own = [dict(record) for record in found]  # pycocotools writes into its records
    contestants: dict[str, Contestant] = {"pycocotools": lambda: _pycocotools(content, own)}
    for backend in dict.fromkeys(("pycocotools", resolve_backend("auto"))):
        contestants[f"ours by {backend}"] = _ours(content, found, backend)
    name = f"{images} images, {CLASSES} classes, {images * objects} objects, {images * detections} detections"
    yield Case(name, contestants, tuple((other, "pycocotools") for other in contestants if other != "pycocotools"))


# -- batches -----------------------------------------------------------------------------------------------------------


def _train_case(name: str, dataset: CocoDataset, transform: TrainTransform) -> Case:
    def epoch(data: Any, recipe: Any) -> Iterator[Batch]:
        return iter(make_train_loader(data, recipe, TrainConfig.batch_size, seed=0, epoch=0, pad_divisor=32))

    memory, noted = _InMemory(dataset), _Noted(transform)
    batches = list(epoch(memory, noted))
    contestants = {
        **_reading(dataset, memory.asked.copy()),
        "augment": lambda: [_replay(transform, memory, call) for call in noted.calls],
        **_batching(batches),
        "whole": lambda: _exhaust(epoch(dataset, transform)),
    }
    return _stages_of_whole(name, contestants, batches)


def _eval_case(name: str, dataset: CocoDataset, cfg: PretrainedCfg) -> Case:
    def epoch(data: Any) -> Iterator[Batch]:
        return iter(make_eval_loader(data, cfg, TrainConfig.eval_batch_size))

    def resize_all() -> None:
        for sample in memory.samples.values():
            resize_to_protocol(
                sample.image, cfg.short_side, cfg.long_side, cfg.interpolation, cfg.antialias, cfg.rounding
            )

    memory = _InMemory(dataset)
    batches = list(epoch(memory))
    contestants = {
        **_reading(dataset, memory.asked.copy()),
        "resize": resize_all,
        **_batching(batches),
        "whole": lambda: _exhaust(epoch(dataset)),
    }
    return _stages_of_whole(name, contestants, batches)


def _exhaust(batches: Iterator[Batch]) -> None:
    for _ in batches:
        pass


def _stages_of_whole(name: str, contestants: dict[str, Contestant], batches: Sequence[Batch]) -> Case:
    pairs = tuple((stage, "whole") for stage in contestants if stage != "whole")
    return Case(name, contestants, pairs, images=sum(len(batch.images) for batch in batches))


class _InMemory:
    """A data set that reads each picture once, and notes which were asked for."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset, self.image_ids = dataset, dataset.image_ids
        self.samples: dict[int, Sample] = {}
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def size(self, index: int) -> tuple[int, int]:
        return self.dataset.size(index)

    def __getitem__(self, index: int) -> Sample:
        self.asked.append(index)
        if index not in self.samples:
            self.samples[index] = self.dataset[index]
        return self.samples[index]


class _Call(NamedTuple):
    picture: int
    random_state: Tensor
    plan: BatchPlan | None


class _Noted:
    """A recipe that notes its calls, so that they can be repeated without the rest of the loader."""

    def __init__(self, transform: TrainTransform) -> None:
        self.transform, self.group_by_aspect = transform, transform.group_by_aspect
        self.calls: list[_Call] = []

    def plan(self, sizes: Sequence[tuple[int, int]], generator: torch.Generator) -> BatchPlan:
        return self.transform.plan(sizes, generator)

    def __call__(self, source: Any, index: int, generator: torch.Generator, plan: BatchPlan | None = None) -> Sample:
        self.calls.append(_Call(index, generator.get_state(), plan))
        return self.transform(source, index, generator, plan)


def _replay(transform: TrainTransform, memory: _InMemory, call: _Call) -> Sample:
    generator = torch.Generator()
    generator.set_state(call.random_state)
    return transform(cast(Any, memory), call.picture, generator, call.plan)


def _reading(dataset: CocoDataset, indices: Sequence[int]) -> dict[str, Contestant]:
    """From the disk (whose cache holds the files by then) to bytes, and from bytes to pixels."""
    paths = [dataset.record(index).path for index in indices]
    content = {path: path.read_bytes() for path in paths}

    def read() -> None:
        for path in paths:
            path.read_bytes()

    def decode() -> None:
        for path in paths:
            read_image(content[path])

    return {"read": read, "decode": decode}


def _batching(batches: Sequence[Batch]) -> dict[str, Contestant]:
    parts = []
    for batch in batches:
        sizes = batch.image_sizes.tolist()
        images = [image[:, :h, :w].clone() for image, (h, w) in zip(batch.images, sizes, strict=True)]
        parts.append((images, *batch.images.shape[2:]))

    def stack() -> None:
        for images, height, width in parts:
            pad_and_stack(images, height, width)

    return {"batch": stack}


# -- scoring -----------------------------------------------------------------------------------------------------------


def _ours(content: Any, found: Any, backend: Literal["pycocotools", "hotcoco"]) -> Contestant:
    return lambda: list(coco_metrics(content, found, backend=backend)[0].values())


def _pycocotools(content: dict[str, Any], found: list[dict[str, Any]]) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return list(evaluator.stats)


# -- what they work on -------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, annotations: Path, count: int, size: tuple[int, int] = PICTURE) -> float:
    """Write JPEGs of noise whose files are as large as COCO's, and a COCO-format file with boxes.

    Args:
        folder: for the pictures.
        annotations: the file.
        count: of pictures.
        size: (height, width); every fourth picture has it the other way round.

    Returns:
        Mean size of a file in kB.
    """
    rng, total = np.random.default_rng(0), 0
    content = _content([size if number % 4 else (size[1], size[0]) for number in range(1, count + 1)], 7, rng)
    for image in content["images"]:
        path = folder / image["file_name"]
        _noise(image["height"], image["width"], rng).save(path, quality=95)
        total += path.stat().st_size
    annotations.write_text(json.dumps(content))
    return total / count / 1000


def _noise(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """Octaves of noise, each twice as fine and four fifths as strong as the one before."""
    pixels, strength = np.full((height, width, 3), 128.0, np.float32), 64.0
    for cells in (4, 8, 16, 32, 64, 128, 256, 512):
        rough = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        smooth = np.asarray(rough.resize((width, height), Image.Resampling.BILINEAR), np.float32)
        pixels += strength * (smooth / 127.5 - 1)
        strength *= 0.8
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def synthetic_detections(images: int, objects: int, detections: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO-format data set without pictures, and COCO results records: the objects, moved a little, and false alarms.

    Args:
        images: in the data set.
        objects, detections: of each image; the detections are not fewer than the objects.
    """
    rng = np.random.default_rng(0)
    content, found = _content([PICTURE] * images, objects, rng), []
    for annotation in content["annotations"]:
        moved = np.asarray(annotation["bbox"]) * rng.uniform(0.85, 1.15, 4)
        found.append(_detection(annotation["image_id"], annotation["category_id"], moved, rng))
    for image in content["images"]:
        for box in _boxes(PICTURE, detections - objects, rng):
            found.append(_detection(image["id"], int(rng.integers(1, CLASSES + 1)), box, rng))
    return content, found


def _detection(image: int, category: int, box: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box.tolist(), "score": float(rng.random())}


def _content(sizes: Sequence[tuple[int, int]], objects: int, rng: np.random.Generator) -> dict[str, Any]:
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
    for number, (height, width) in enumerate(sizes, start=1):
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": height, "width": width})
        for box in _boxes((height, width), objects, rng):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": int(rng.integers(1, CLASSES + 1)),
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                }
            )
    return content


def _boxes(size: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 4) as x, y, width, height, wholly within (height, width), of all sizes alike on a logarithmic scale."""
    limit = np.array([size[1], size[0]])
    sides = np.exp(rng.uniform(np.log(SMALLEST), np.log(limit), (count, 2)))
    return np.concatenate([rng.uniform(0, limit - sides), sides], axis=1)
