"""What this package costs on this machine, in ratios that travel to others.

Everything is measured in one process. The two of a pair take turns, alone (a third that uses much memory would change
what the caches hold), and a row gives the median and the quartiles of the ratios within the turns. On one thread the
clock is the CPU time of the process, which does not count what other processes take; on several it is the wall clock,
which only means something on a quiet machine.
"""

from __future__ import annotations

import contextlib
import csv as csv_format
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dyhead_zoo.engine.checkpoint import atomic_path, check_writable
from dyhead_zoo.version import __version__

Contestant = Callable[[], object]

OTHERS = ("numba", "onnxruntime", "openvino", "pycocotools", "hotcoco")
"""Packages whose version a figure may depend on, where they are installed."""


class Case(NamedTuple):
    """Contestants that do the same work, and which of them to compare.

    Attributes:
        name: what the work is.
        contestants: what to time, by name.
        pairs: (subject, baseline), names of contestants.
        images: how many of them a baseline handles, where its speed is to be told in images/s; else 0.
    """

    name: str
    contestants: dict[str, Contestant]
    pairs: tuple[tuple[str, str], ...]
    images: int = 0


@dataclass(frozen=True)
class BenchmarkRow:
    """Time of ``subject`` / time of ``baseline``: median, lower and upper quartile over ``reps`` turns.

    ``subject_ms`` and ``baseline_ms`` are medians; ``images`` is as in ``Case``.
    """

    case: str
    subject: str
    baseline: str
    ratio: float
    lower: float
    upper: float
    subject_ms: float
    baseline_ms: float
    reps: int
    images: int = 0


def run_benchmark(
    cases: Iterable[Case], reps: int = 7, csv: str | os.PathLike[str] | None = None, *, threads: int = 1
) -> list[BenchmarkRow]:
    """Time the cases one after the other and print a line for each pair as soon as it is known.

    Args:
        cases: from ``benchmark_cases``; made one at a time.
        reps: turns of each pair, after one to warm up.
        csv: also write the rows to this file, with the machine and the versions; those known so far if interrupted.
        threads: of PyTorch.

    Raises:
        ValueError: ``reps`` is less than 2, which has no quartiles.
        OSError: ``csv`` cannot be written.
    """
    if reps < 2:
        raise ValueError(f"reps must be at least 2, got {reps}")
    clock = time.process_time if threads == 1 else time.perf_counter
    before = torch.get_num_threads()
    with kept_rows(csv, threads) as rows:
        torch.set_num_threads(threads)
        try:
            print(f"{'case':34s} {'pair':32s} ratio  (quartiles)     times")
            for case in cases:
                for subject, baseline in case.pairs:
                    rows.append(row := _compare(case, subject, baseline, reps, clock))
                    print(
                        f"{row.case:34s} {row.subject + ' / ' + row.baseline:32s} {row.ratio:5.2f}  "
                        f"({row.lower:.2f} to {row.upper:.2f})  {row.subject_ms:.1f} / {row.baseline_ms:.1f} ms"
                        + (f", {1000 * row.images / row.baseline_ms:.1f} images/s" if row.images else ""),
                        flush=True,
                    )
        finally:
            torch.set_num_threads(before)
    return rows


@contextlib.contextmanager
def kept_rows(csv: str | os.PathLike[str] | None, threads: int) -> Iterator[list[Any]]:
    """A list for the rows that the block measures, written to ``csv`` at its end, however it ends.

    Raises:
        OSError: ``csv`` cannot be written: before the block runs, where that can be told.
    """
    rows: list[Any] = []

    def keep() -> None:
        if csv is not None and rows:
            write_csv(rows, csv, threads)

    if csv is not None:
        check_writable(Path(csv))
    try:
        yield rows
    except BaseException:
        try:
            keep()
        except OSError as error:  # the reason for which the block ended matters more
            warnings.warn(f"the figures known so far were not written: {error}", stacklevel=2)
        raise
    keep()


def _compare(case: Case, subject: str, baseline: str, reps: int, clock: Callable[[], float]) -> BenchmarkRow:
    pair = case.contestants[subject], case.contestants[baseline]
    turns = [tuple(_seconds(contestant, clock) for contestant in pair) for _ in range(1 + reps)]
    a, b = zip(*turns[1:], strict=True)  # the first turn is for warming up
    lower, ratio, upper = statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], n=4, method="inclusive")
    milliseconds = (1000 * statistics.median(a), 1000 * statistics.median(b))
    return BenchmarkRow(case.name, subject, baseline, ratio, lower, upper, *milliseconds, reps, case.images)


def _seconds(contestant: Contestant, clock: Callable[[], float]) -> float:
    start = clock()
    contestant()
    return clock() - start


def write_csv(rows: Sequence[Any], path: str | os.PathLike[str], threads: int) -> None:
    """Rows of one dataclass as a CSV file, each with the machine, the number of threads, and the versions."""
    versions = {"dyhead_zoo": __version__, "torch": torch.__version__}
    versions |= {name: _version(name) for name in ("torchvision", "timm", *OTHERS)}
    records = [asdict(row) | {"machine": _machine(), "threads": threads} | versions for row in rows]
    with atomic_path(Path(path)) as temporary, temporary.open("w", newline="") as file:
        writer = csv_format.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _machine() -> str:
    """The processor's name, where the system tells, and the vector instructions that torch uses."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
