"""Batches for training, evaluation and prediction; every batch is a function of its number alone.

So it does not matter which worker makes a batch, whether the run was interrupted before it, or over how many processes
the global batch is spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dyhead_zoo.data.coco import CocoDataset
from dyhead_zoo.data.transforms import (
    BatchPlan,
    TrainTransform,
    pad,
    protocol_size,
    resize,
    round_up,
    scale_boxes,
)
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.structures import Batch, Target

T = TypeVar("T")


def make_train_loader(
    dataset: CocoDataset,
    transform: TrainTransform,
    batch_size: int,
    seed: int,
    epoch: int,
    pad_divisor: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    *,
    accumulate: int = 1,
    first_batch: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """One epoch of training batches, of this process.

    A *global batch* is what one optimiser step sees: ``batch_size * world_size * accumulate`` images. Its order, scale
    and canvas depend on (seed, epoch) only, and each sample on (seed, epoch, index) only. Every batch is full: each
    image comes at least once an epoch, and the last global batch is completed by images from the epoch's start.

    Args:
        dataset: where images and boxes come from.
        transform: ``SmallDataTrain``, ``StandardTrain`` or another ``TrainTransform``.
        batch_size: images per batch of one process.
        seed, epoch: not negative.
        pad_divisor: the canvas is rounded up to a multiple of it.
        rank, world_size: this process and how many there are.
        num_workers: worker processes; the batches are the same for any number.
        accumulate: batches per optimiser step; the yielded batches come in groups of this many.
        first_batch: skip the batches before it without making them, to resume within an epoch.
        pin_memory: for faster copies to a GPU.

    Returns:
        A ``DataLoader`` of ``Batch``; its length is the same on every rank. Crowd regions are left out of the targets.
    """
    _check_counts(batch_size=batch_size, world_size=world_size, accumulate=accumulate, pad_divisor=pad_divisor)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must be in 0..{world_size - 1} (world_size={world_size})")
    groups = _global_batches(dataset, transform, batch_size * world_size * accumulate, seed, epoch)

    def make(number: int) -> Batch:
        step, part = divmod(number, accumulate)
        indices = groups[step]
        generator = _generator(seed, epoch, 1, step)
        plan = transform.plan([dataset.size(i) for i in indices], generator)
        plan = plan._replace(canvas=round_up(plan.canvas, pad_divisor))
        start = (part * world_size + rank) * batch_size
        return _train_batch(dataset, transform, indices[start : start + batch_size], plan, seed, epoch)

    numbers = range(first_batch, len(groups) * accumulate)
    return _loader(_Numbered(make, numbers), num_workers, pin_memory)


def make_eval_loader(
    dataset: CocoDataset,
    cfg: PretrainedCfg,
    batch_size: int = 1,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    *,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Every image once, resized as ``cfg`` says; each image belongs to one rank.

    A batch holds images of equal canvas, and the canvas is the image's own resized size rounded up to the pad divisor,
    so results do not depend on ``batch_size`` or ``world_size``. Batches are ordered by canvas; ranks may get one more
    or less.
    """
    _check_counts(batch_size=batch_size, world_size=world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must be in 0..{world_size - 1} (world_size={world_size})")
    batches = _equal_canvas_batches([dataset.size(i) for i in range(len(dataset))], cfg, batch_size)[rank::world_size]

    def make(number: int) -> Batch:
        indices = batches[number]
        records = [dataset.record(i) for i in indices]
        images = [dataset.image(i) for i in indices]
        targets = [Target(boxes=record.boxes, labels=record.labels) for record in records]
        return _protocol_batch(images, targets, [record.image_id for record in records], cfg)

    return _loader(_Numbered(make, range(len(batches))), num_workers, pin_memory)


def prepare_images(images: Sequence[Tensor], cfg: PretrainedCfg, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of equal canvas from pictures in memory, for prediction.

    Args:
        images: (3, H, W) uint8 tensors of any sizes.
        cfg: how to resize and pad.
        batch_size: at most this many images a batch.

    Yields:
        ``(positions, batch)``: where the images stand in ``images`` (also the ``image_ids``); no targets.
    """
    _check_counts(batch_size=batch_size)
    for positions in _equal_canvas_batches([(i.shape[1], i.shape[2]) for i in images], cfg, batch_size):
        targets = [Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)) for _ in positions]
        yield positions, _protocol_batch([images[i] for i in positions], targets, positions, cfg)


class _Numbered(Dataset[Batch]):
    """Whole batches by number: the loader's workers need no further collation or random state."""

    def __init__(self, make: Callable[[int], Batch], numbers: Sequence[int]) -> None:
        self._make = make
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, position: int) -> Batch:
        return self._make(self._numbers[position])


def _loader(batches: _Numbered, num_workers: int, pin_memory: bool) -> DataLoader[Batch]:
    return DataLoader(batches, batch_size=None, num_workers=num_workers, collate_fn=_identity, pin_memory=pin_memory)


def _identity(item: T) -> T:
    return item


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _generator(*key: int) -> torch.Generator:
    """A generator whose seed depends on all of the key, well mixed."""
    if min(key) < 0:
        raise ValueError(f"seed, epoch and index must not be negative, got {key}")
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _global_batches(
    dataset: CocoDataset, transform: TrainTransform, size: int, seed: int, epoch: int
) -> list[list[int]]:
    """The epoch's order, in full batches of alike shape where the recipe asks for it."""
    generator = _generator(seed, epoch, 0, 0)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    groups = [order]
    if transform.group_by_aspect:
        wide = [i for i in order if dataset.size(i)[1] >= dataset.size(i)[0]]
        tall = [i for i in order if dataset.size(i)[1] < dataset.size(i)[0]]
        groups = [wide, tall]
    batches, rest = [], []
    for group in groups:
        whole = len(group) // size * size
        batches += [group[i : i + size] for i in range(0, whole, size)]
        rest += group[whole:]
    missing = -len(rest) % size
    rest += [order[i % len(order)] for i in range(missing)]
    batches += [rest[i : i + size] for i in range(0, len(rest), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _train_batch(
    dataset: CocoDataset, transform: TrainTransform, indices: Sequence[int], plan: BatchPlan, seed: int, epoch: int
) -> Batch:
    samples = [transform(dataset, index, _generator(seed, epoch, 2, index), plan) for index in indices]
    return Batch(
        images=torch.stack([pad(image, *plan.canvas) for image, _, _ in samples]),
        image_sizes=torch.tensor([image.shape[1:] for image, _, _ in samples]),
        targets=[Target(boxes=boxes, labels=labels) for _, boxes, labels in samples],
        image_ids=[dataset.image_ids[i] for i in indices],
        original_sizes=torch.tensor([dataset.size(i) for i in indices]),
    )


def _equal_canvas_batches(sizes: Sequence[tuple[int, int]], cfg: PretrainedCfg, batch_size: int) -> list[list[int]]:
    """Positions grouped by the canvas that each size gets, in groups of at most ``batch_size``."""
    by_canvas: dict[tuple[int, int], list[int]] = {}
    for position, (height, width) in enumerate(sizes):
        resized = protocol_size(height, width, cfg.short_side, cfg.long_side, cfg.rounding)
        by_canvas.setdefault(round_up(resized, cfg.pad_divisor), []).append(position)
    return [
        members[start : start + batch_size]
        for _, members in sorted(by_canvas.items())
        for start in range(0, len(members), batch_size)
    ]


def _protocol_batch(images: Sequence[Tensor], targets: list[Target], image_ids: list[int], cfg: PretrainedCfg) -> Batch:
    """Resize images of equal canvas, and their boxes, by the cfg's protocol."""
    original = [(image.shape[1], image.shape[2]) for image in images]
    sizes = [protocol_size(h, w, cfg.short_side, cfg.long_side, cfg.rounding) for h, w in original]
    canvas = round_up(sizes[0], cfg.pad_divisor)
    resized = [
        pad(resize(image, *size, cfg.interpolation, cfg.antialias), *canvas)
        for image, size in zip(images, sizes, strict=True)
    ]
    scaled = [
        Target(boxes=scale_boxes(target["boxes"], before, after), labels=target["labels"])
        for target, before, after in zip(targets, original, sizes, strict=True)
    ]
    return Batch(torch.stack(resized), torch.tensor(sizes), scaled, image_ids, torch.tensor(original))
