"""Batches for training, evaluation and prediction; every batch is a function of its number alone.

So it does not matter which worker makes a batch, whether the run was interrupted before it, or over how many processes
the global batch is spread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dyhead_zoo.data.coco import CocoDataset
from dyhead_zoo.data.transforms import (
    BatchPlan,
    TrainTransform,
    pad_and_stack,
    protocol_size,
    resize,
    resize_masks,
    round_up,
    scale_boxes,
)
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.structures import Batch, Sample, Target

T = TypeVar("T")

_ORDER, _PLAN, _SAMPLE = range(3)
"""What random numbers are drawn for; part of the seed."""


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
    start_batch: int = 0,
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
        start_batch: skip the batches before it without making them, to resume within an epoch.
        pin_memory: for faster copies to a GPU.

    Returns:
        A ``DataLoader`` of ``Batch``; its length is the same on every rank. Crowd regions are left out of the targets.
    """
    _check_counts(batch_size=batch_size, world_size=world_size, accumulate=accumulate, pad_divisor=pad_divisor)
    _check_rank(rank, world_size)
    if seed < 0 or epoch < 0 or start_batch < 0:
        raise ValueError(f"seed={seed}, epoch={epoch}, start_batch={start_batch}: none may be negative")
    groups = _global_batches(dataset, transform, batch_size * world_size * accumulate, seed, epoch)
    batches = [
        _Part(step, group, group[start : start + batch_size])
        for step, group in enumerate(groups)
        for start in range(rank * batch_size, len(group), world_size * batch_size)
    ]
    return _loader(
        _TrainBatches(dataset, transform, seed, epoch, pad_divisor, batches[start_batch:]), num_workers, pin_memory
    )


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
    _check_rank(rank, world_size)
    batches = _equal_canvas_batches([dataset.size(i) for i in range(len(dataset))], cfg, batch_size)
    return _loader(_EvalBatches(dataset, cfg, batches[rank::world_size]), num_workers, pin_memory)


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
        samples = [Sample(images[i], torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)) for i in positions]
        yield positions, _protocol_batch(samples, positions, cfg)


class _Part(NamedTuple):
    """One process's batch: the number of its global batch, the indices of all of that, and of the part."""

    step: int
    group: list[int]
    indices: list[int]


@dataclass(frozen=True)
class _TrainBatches(Dataset[Batch]):
    """Whole batches by number, so that workers need no further collation and no random state."""

    dataset: CocoDataset
    transform: TrainTransform
    seed: int
    epoch: int
    pad_divisor: int
    batches: list[_Part]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        step, group, indices = self.batches[number]
        shared = _generator(self.seed, self.epoch, _PLAN, step)
        plan = self.transform.plan([self.dataset.size(i) for i in group], shared)
        plan = plan._replace(canvas=round_up(plan.canvas, self.pad_divisor))
        samples = [self._sample(index, plan) for index in indices]
        return Batch(
            images=pad_and_stack([sample.image for sample in samples], *plan.canvas),
            image_sizes=torch.tensor([sample.image.shape[1:] for sample in samples]),
            targets=_targets(samples),
            image_ids=[self.dataset.image_ids[i] for i in indices],
            original_sizes=torch.tensor([self.dataset.size(i) for i in indices]),
        )

    def _sample(self, index: int, plan: BatchPlan) -> Sample:
        return self.transform(self.dataset, index, _generator(self.seed, self.epoch, _SAMPLE, index), plan)


@dataclass(frozen=True)
class _EvalBatches(Dataset[Batch]):
    dataset: CocoDataset
    cfg: PretrainedCfg
    batches: list[list[int]]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        indices = self.batches[number]
        return _protocol_batch(
            [self.dataset[i] for i in indices], [self.dataset.image_ids[i] for i in indices], self.cfg
        )


def _loader(batches: Dataset[Batch], num_workers: int, pin_memory: bool) -> DataLoader[Batch]:
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_identity,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own: else every epoch would draw from the global one
    )


def _targets(samples: Sequence[Sample]) -> list[Target]:
    """One target per image, all in few blocks of memory: each block that a worker sends costs a file descriptor."""
    boxes, labels = _in_one_block([s.boxes for s in samples]), _in_one_block([s.labels for s in samples])
    targets = [Target(boxes=b, labels=n) for b, n in zip(boxes, labels, strict=True)]
    masks = [s.masks for s in samples if s.masks is not None]
    if masks:
        for target, of_image in zip(targets, _in_one_block(masks), strict=True):
            target["masks"] = of_image
    return targets


def _in_one_block(tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.cat([tensor.flatten() for tensor in tensors]).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _identity(item: T) -> T:
    return item


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must be in 0..{world_size - 1} (world_size={world_size})")


def _generator(seed: int, epoch: int, purpose: int, number: int) -> torch.Generator:
    """A generator of its own for each thing that is drawn; ``SeedSequence`` keeps neighbouring keys independent."""
    key = np.random.SeedSequence((seed, epoch, purpose, number))
    return torch.Generator().manual_seed(int(key.generate_state(1)[0]))


def _global_batches(
    dataset: CocoDataset, transform: TrainTransform, size: int, seed: int, epoch: int
) -> list[list[int]]:
    """The epoch's order, in full batches of alike shape where the recipe asks for it."""
    generator = _generator(seed, epoch, _ORDER, 0)
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


def _protocol_batch(samples: Sequence[Sample], image_ids: list[int], cfg: PretrainedCfg) -> Batch:
    """Resize samples of equal canvas by the cfg's protocol."""
    resized = [_to_protocol(sample, cfg) for sample in samples]
    sizes = [(sample.image.shape[1], sample.image.shape[2]) for sample in resized]
    return Batch(
        images=pad_and_stack([sample.image for sample in resized], *round_up(sizes[0], cfg.pad_divisor)),
        image_sizes=torch.tensor(sizes),
        targets=_targets(resized),
        image_ids=image_ids,
        original_sizes=torch.tensor([sample.image.shape[1:] for sample in samples]),
    )


def _to_protocol(sample: Sample, cfg: PretrainedCfg) -> Sample:
    image, boxes, labels, masks = sample
    before = (image.shape[1], image.shape[2])
    size = protocol_size(*before, cfg.short_side, cfg.long_side, cfg.rounding)
    image = resize(image, *size, cfg.interpolation, cfg.antialias)
    return Sample(
        image, scale_boxes(boxes, before, size), labels, None if masks is None else resize_masks(masks, *size)
    )
