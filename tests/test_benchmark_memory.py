"""Peak memory: the figure is what the work adds, and every contestant does its work."""

from __future__ import annotations

import csv
import os
import pickle
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from dyhead_zoo import cli
from dyhead_zoo.engine import benchmark_cases, benchmark_memory
from dyhead_zoo.engine.benchmark import Contestant
from dyhead_zoo.engine.benchmark_memory import (
    MemoryCase,
    detector_work,
    head_work,
    memory_cases,
    operator_work,
    run_memory_benchmark,
)

SMALL = (256, 128)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self")


def allocates(contestant: str, size: tuple[int, int]) -> Contestant:
    """Inputs of 40 MB, and work that has ``size[0]`` MB at its peak, half of it in the end, besides what was free."""
    inputs = np.ones((40, 1 << 17))
    free = [np.ones(1 << 7) for _ in range(1 << 15)]  # 32 MB in pieces, which the C library keeps
    assert len(free)

    def work() -> int:
        if contestant == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        first = np.ones((size[0] // 2, 1 << 17))
        return len(inputs) + len(first + 1)

    return work


@pytest.fixture
def fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that start at once; fresh ones would load PyTorch first."""
    monkeypatch.setattr(benchmark_memory, "_START", "fork")


@linux
def test_the_peak_is_what_the_work_adds(tmp_path: Path, capsys: pytest.CaptureFixture[str], fork: None) -> None:
    case = MemoryCase("x", allocates, ("works",), size=(64, 0), small=(2, 0))
    (row,) = run_memory_benchmark([case], 2, tmp_path / "memory.csv")
    assert 60 < row.lower <= row.extra_mb <= row.upper < 68
    assert row.process_mb > row.extra_mb + 40 and row.reps == 2
    assert f"{row.extra_mb:.1f} (" in capsys.readouterr().out
    (record,) = csv.DictReader((tmp_path / "memory.csv").open())
    assert float(record["extra_mb"]) == row.extra_mb and record["machine"] and record["threads"] == "1"


@linux
def test_a_killed_process_is_told(fork: None) -> None:
    case = MemoryCase("x", allocates, ("dies",), size=(2, 0), small=(2, 0))
    with pytest.raises(OSError, match="x, dies: its process was killed, most likely for want of memory"):
        run_memory_benchmark([case], 2)


def test_other_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_memory, "_CLEAR", tmp_path / "none")
    with pytest.raises(OSError, match="only Linux"):
        run_memory_benchmark([])
    with pytest.raises(ValueError, match="reps must be at least 2, got 1"):
        run_memory_benchmark([], 1)


def test_every_contestant_does_its_work() -> None:
    for backward in (False, True):
        for contestant in ("dense", "ours", "bag", "torchvision"):
            result = operator_work(contestant, (9, 6), backward=backward, channels=4)()
            assert isinstance(result, tuple) == backward
    for contestant in ("dense convs", "ours", "bag", "checkpointed"):
        head_work(contestant, SMALL, blocks=1, channels=16)()
    for contestant in ("ours", "ours, checkpointed", "torchvision op"):
        detector_work("test_atss_dyhead1", contestant, SMALL)()


def test_cases_can_be_sent_to_fresh_processes() -> None:
    assert benchmark_memory._START == "spawn"
    for case in memory_cases():
        assert set(pickle.loads(pickle.dumps(case)).contestants) == set(case.contestants)
    assert [case.name for case in memory_cases()] == [
        "op 100x168x256 inference",
        "op 100x168x256 training",
        "head 800x1344 training",
        "atss_resnet50_dyhead6 640x640 training",
        "faster_rcnn_resnet50 640x640 inference",
        "mask_rcnn_resnet50 640x640 inference",
    ]


def test_the_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    monkeypatch.setattr(benchmark_memory, "run_memory_benchmark", lambda *args, **kwargs: seen.append((args, kwargs)))
    assert cli.main(["benchmark", "memory", "--threads", "2"]) == 0
    ((_, reps, path), options) = seen[0]
    assert (reps, path, options) == (3, None, {"threads": 2})
    assert cli.main(["benchmark", "memory", "--size", "9", "9"]) == 2
    assert "benchmark memory has no use for --size" in capsys.readouterr().err
    assert "memory" in benchmark_cases.USES
