"""What the deformable convolution costs on this machine, in ratios that travel to others.

Everything is measured in one process on one thread, in CPU time of that thread (``time.thread_time``), which does not
count what other processes take. The two of a pair take turns, alone (a third that uses much memory would change what
the caches hold), and a row gives the median and the quartiles of the ratios within the turns. The yardstick is the
dense 3x3 convolution of the same shape (``F.conv2d``, float32, channels_last): it makes the same multiply-adds near the
machine's peak, so it is a floor.
"""

from __future__ import annotations

import csv as csv_format
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from dyhead_zoo.ops import modulated_deform_conv2d
from dyhead_zoo.version import __version__

SIZES = ((64, 64), (100, 168))
PAIRS = (("bag", "dense"), ("torchvision", "bag"))


@dataclass(frozen=True)
class BenchmarkRow:
    """Time of ``subject`` / time of ``baseline``: median, lower and upper quartile over ``reps`` turns.

    ``size`` is height x width x channels of the input; ``subject_ms`` and ``baseline_ms`` are medians of CPU time.
    """

    size: str
    direction: str
    subject: str
    baseline: str
    ratio: float
    lower: float
    upper: float
    subject_ms: float
    baseline_ms: float
    reps: int


def benchmark_op(
    reps: int = 7,
    csv: str | os.PathLike[str] | None = None,
    *,
    sizes: Sequence[tuple[int, int]] = SIZES,
    channels: int = 256,
) -> list[BenchmarkRow]:
    """Time the deformable convolution against a dense one and against torchvision's, and print a table.

    Args:
        reps: turns to measure; about 10 s each with the default sizes.
        csv: also write the rows to this file, with the machine and the versions.
        sizes: (height, width) of the maps; the kernel is 3x3, the stride 1, the batch 1.
        channels: input and output channels.

    Returns:
        A row for each size, direction and pair of operators.

    Raises:
        ValueError: ``reps`` is less than 2, which has no quartiles.
    """
    if reps < 2:
        raise ValueError(f"reps must be at least 2, got {reps}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        directions = ("forward", "forward+backward")
        rows = [row for size in sizes for way in directions for row in _compare(size, channels, way, reps)]
    finally:
        torch.set_num_threads(threads)
    print(f"{'size':12s} {'direction':17s} {'pair':20s} ratio  (quartiles)     times")
    for row in rows:
        print(
            f"{row.size:12s} {row.direction:17s} {row.subject + ' / ' + row.baseline:20s} {row.ratio:5.2f}  "
            f"({row.lower:.2f} to {row.upper:.2f})  {row.subject_ms:.1f} / {row.baseline_ms:.1f} ms"
        )
    if csv is not None:
        _write_csv(rows, Path(csv))
    return rows


def _compare(size: tuple[int, int], channels: int, direction: str, reps: int) -> list[BenchmarkRow]:
    operators = _operators(size, channels, with_backward=direction != "forward")
    label = f"{size[0]}x{size[1]}x{channels}"
    rows = []
    for subject, baseline in PAIRS:
        turns = [(_seconds(operators[subject]), _seconds(operators[baseline])) for _ in range(1 + reps)]
        a, b = zip(*turns[1:], strict=True)  # the first turn is for warming up
        lower, ratio, upper = statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], method="inclusive")
        milliseconds = (1000 * statistics.median(a), 1000 * statistics.median(b))
        rows.append(BenchmarkRow(label, direction, subject, baseline, ratio, lower, upper, *milliseconds, reps))
    return rows


def _seconds(operator: Callable[[], object]) -> float:
    start = time.thread_time()
    operator()
    return time.thread_time() - start


def _operators(size: tuple[int, int], channels: int, with_backward: bool) -> dict[str, Callable[[], object]]:
    """The contestants, ready to be called; offsets are N(0, 2 pixels), gradients are those of every input."""
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator)
    x = randn(1, channels, *size).contiguous(memory_format=torch.channels_last)
    weight = randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    offset, mask, bias = 2 * randn(1, 18, *size), randn(1, 9, *size).sigmoid(), randn(channels)
    grad_out = randn(x.shape).contiguous(memory_format=torch.channels_last)

    def contestant(operator: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
        leaves = [tensor.requires_grad_(with_backward) for tensor in inputs]
        if with_backward:
            return lambda: torch.autograd.grad(operator(*leaves), leaves, grad_out)
        return lambda: operator(*leaves)

    deform_conv = partial(modulated_deform_conv2d, padding=1)
    return {
        "dense": contestant(partial(F.conv2d, padding=1), x, weight, bias),
        "bag": contestant(partial(deform_conv, backend="bag"), x, offset, mask, weight, bias),
        "torchvision": contestant(partial(deform_conv, backend="torchvision"), x, offset, mask, weight, bias),
    }


def _write_csv(rows: Sequence[BenchmarkRow], path: Path) -> None:
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "dyhead_zoo": __version__}
    records = [asdict(row) | {"machine": _machine(), "threads": 1} | versions for row in rows]
    with path.open("w", newline="") as file:
        writer = csv_format.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def _machine() -> str:
    """The processor's name, where the system tells, and the vector instructions that torch uses."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
