"""Peak memory: what ``dyhead-zoo benchmark memory`` measures. Linux only.

Every figure comes from a process of its own: first the same work on something small, which loads code and starts
threads; then the inputs are made, what is free goes back to the system, and the kernel's record of the peak (VmHWM in
/proc/self/status) is reset. What the work then adds to the resident memory is the figure: results, gradients and all
that is needed on the way, but neither inputs nor weights.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F

from dyhead_zoo.engine import heap
from dyhead_zoo.engine.benchmark import Contestant, kept_rows
from dyhead_zoo.engine.benchmark_parts import (
    detector_step,
    forward,
    frozen_as_trained,
    head_step,
    numba_works,
    operator_inputs,
    random_head,
    random_images,
    random_pyramid,
    with_backward,
    with_dense_convs,
    with_settings,
)
from dyhead_zoo.engine.benchmark_torchvision import BUILDERS, torchvision_work
from dyhead_zoo.factory import create_detector
from dyhead_zoo.ops import modulated_deform_conv2d
from dyhead_zoo.ops.deform_conv import Backend

Size = tuple[int, int]

_START = "spawn"
"""How processes start: afresh, since a copy of this one would find its memory in use already."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryCase(NamedTuple):
    """Contestants that do the same work.

    Attributes:
        name: what the work is.
        make: a function of a module, and of a contestant's name and a size (height, width), that readies the work.
        contestants: their names.
        size: what to measure at.
        small: what to warm up at.
    """

    name: str
    make: Callable[[str, Size], Contestant]
    contestants: tuple[str, ...]
    size: Size
    small: Size


@dataclass(frozen=True)
class MemoryRow:
    """Megabytes (of 2**20 bytes) that the work adds at its peak: median and quartiles over ``reps`` processes.

    ``process_mb`` is the median of all that the process held then, with Python, PyTorch, weights and inputs.
    """

    case: str
    contestant: str
    extra_mb: float
    lower: float
    upper: float
    process_mb: float
    reps: int


def memory_cases() -> Iterator[MemoryCase]:
    """Operator, head, detector and torchvision's detectors, see ``operator_work`` and the like."""
    plain = ("bag",) if numba_works() else ()
    operators, small = ("dense", "ours", *plain, "torchvision"), (48, 48)  # large enough for the matrix to be packed
    for backward, way in ((False, "inference"), (True, "training")):
        make = partial(operator_work, backward=backward)
        yield MemoryCase(f"op 100x168x256 {way}", make, operators, (100, 168), small)
    yield MemoryCase(
        "head 800x1344 training", head_work, ("dense convs", "ours", *plain, "checkpointed"), (800, 1344), (128, 128)
    )
    name = "atss_resnet50_dyhead6"
    contestants = ("ours", "ours, checkpointed", "torchvision op")
    yield MemoryCase(f"{name} 640x640 training", partial(detector_work, name), contestants, (640, 640), (128, 128))
    for name in BUILDERS:
        case = f"{name.partition('.')[0]} 640x640 inference"
        yield MemoryCase(case, partial(torchvision_work, name), ("ours", "torchvision"), (640, 640), (128, 128))


def run_memory_benchmark(
    cases: Iterable[MemoryCase], reps: int = 3, csv: str | os.PathLike[str] | None = None, *, threads: int = 1
) -> list[MemoryRow]:
    """Measure the cases one after the other and print a line for each contestant as soon as it is known.

    Args:
        cases: from ``memory_cases``.
        reps: processes for each contestant.
        csv: also write the rows to this file, with the machine and the versions; those known so far if interrupted.
        threads: of PyTorch in each process.

    Raises:
        ValueError: ``reps`` is less than 2, which has no quartiles.
        OSError: ``csv`` cannot be written, or the system is not Linux, or killed a process.
    """
    if reps < 2:
        raise ValueError(f"reps must be at least 2, got {reps}")
    if not _CLEAR.exists():
        raise OSError("peak memory is read from /proc/self, which only Linux has: measure it there")
    with kept_rows(csv, threads) as rows:
        print(f"{'case':40s} {'contestant':20s} peak over the inputs (quartiles), MB of 2**20 bytes")
        for case in cases:
            for contestant in case.contestants:
                rows.append(row := _measure(case, contestant, reps, threads))
                print(
                    f"{row.case:40s} {row.contestant:20s} {row.extra_mb:.1f} ({row.lower:.1f} to {row.upper:.1f}), "
                    f"the process {row.process_mb:.0f}",
                    flush=True,
                )
    return rows


def operator_work(contestant: str, size: Size, *, backward: bool, channels: int = 256) -> Contestant:
    """The deformable convolution on a map, stride 1, batch 1; ``backward`` with the gradients of all inputs.

    Contestants: ``dense`` (convolution), ``ours``, and the backends ``bag`` and ``torchvision``.
    """
    inputs = operator_inputs(*size, channels)
    ready = with_backward if backward else forward
    if contestant == "dense":
        return ready(partial(F.conv2d, padding=1), inputs.x, inputs.weight)
    backend = cast(Backend, "auto" if contestant == "ours" else contestant)
    return ready(partial(modulated_deform_conv2d, padding=1, backend=backend), *inputs)


def head_work(contestant: str, size: Size, *, blocks: int = 6, channels: int = 256) -> Contestant:
    """One forward and backward pass of DyHead on the pyramid of an image, batch 1.

    Contestants: ``dense convs`` in place of the deformable ones, ``ours``, the backend ``bag``, and ours
    ``checkpointed`` by block, with the C library told what ``train --grad-checkpointing`` tells it.
    """
    if contestant == "checkpointed":
        heap.return_large_blocks()
    head = random_head(blocks, channels).train()
    if contestant == "dense convs":
        head = with_dense_convs(head)
    backend = "bag" if contestant == "bag" else "auto"
    head = with_settings(head, grad_checkpointing=contestant == "checkpointed", backend=backend)
    return head_step(head, random_pyramid(*size, 1, channels))


def detector_work(name: str, contestant: str, size: Size) -> Contestant:
    """A training step of a detector with random weights, without the optimiser, batch 1.

    Contestants: ``ours``, ``ours, checkpointed`` (backbone and DyHead), and ``torchvision op``.
    """
    detector = create_detector(name)
    detector = create_detector(name, **frozen_as_trained(detector)).train()
    if contestant == "torchvision op":
        detector = with_settings(detector, backend="torchvision")
    else:
        detector.to(memory_format=torch.channels_last)
        if contestant == "ours, checkpointed":
            detector.set_grad_checkpointing()
            heap.return_large_blocks()
    return detector_step(detector, random_images(detector, *size))


# -- measuring ---------------------------------------------------------------------------------------------------------


def _measure(case: MemoryCase, contestant: str, reps: int, threads: int) -> MemoryRow:
    figures = []
    for _ in range(reps):
        with ProcessPoolExecutor(1, multiprocessing.get_context(_START)) as process:
            work = process.submit(_peak_of, case.make, contestant, case.size, case.small, threads)
            try:
                figures.append(work.result())
            except BrokenProcessPool as error:
                raise OSError(
                    f"{case.name}, {contestant}: its process was killed, most likely for want of memory"
                ) from error
    extra, whole = zip(*figures, strict=True)
    lower, median, upper = statistics.quantiles(extra, n=4, method="inclusive")
    return MemoryRow(case.name, contestant, median, lower, upper, statistics.median(whole), reps)


def _peak_of(
    make: Callable[[str, Size], Contestant], contestant: str, size: Size, small: Size, threads: int
) -> tuple[float, float]:
    """What one call adds to the resident memory at its peak, and that peak, in MB."""
    torch.set_num_threads(threads)
    make(contestant, small)()
    work = make(contestant, size)
    _give_back()
    _CLEAR.write_text("5")  # VmHWM becomes VmRSS, see proc(5)
    before = _megabytes("VmRSS")
    work()
    peak = _megabytes("VmHWM")
    return peak - before, peak


def _give_back() -> None:
    """Return what the C library holds without using it to the system; else the work would get it for nothing."""
    gc.collect()
    heap.trim()


def _megabytes(field: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024
