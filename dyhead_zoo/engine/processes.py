"""The processes of one training run and the signals that end it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: ``rank`` of ``size``, on ``device``."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process raises it. Every process must call this."""
        if self.size == 1:
            return list(flags)
        shared = torch.tensor(flags, dtype=torch.int32, device=self.device)
        distributed.all_reduce(shared, distributed.ReduceOp.MAX)
        return [bool(flag) for flag in shared.tolist()]

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, each of which must call this."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values / self.size

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            distributed.barrier()


@contextlib.contextmanager
def joined_processes(device: str | None) -> Iterator[Processes]:
    """Join the processes that torchrun started, for the duration of the block; a single process forms no group.

    Args:
        device: of this process; by default its GPU (by ``LOCAL_RANK``), or the CPU where there is none.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0")) if size > 1 else 0
    default = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device or default)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    own_group = size > 1 and not distributed.is_initialized()
    if own_group:
        # Generous, because all wait while the slowest of them reads and scores validation images.
        distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        yield Processes(rank, size, chosen)
    finally:
        if own_group:
            distributed.destroy_process_group()


class StopRequest:
    """Remembers SIGTERM or SIGINT within the block.

    A second SIGINT raises ``KeyboardInterrupt``, unless it comes within a second: torchrun passes on to its processes a
    signal that the terminal or the scheduler has sent them already.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._time = 0.0
        self._process = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # Ctrl-C reaches the loader's workers too, and they must live until the step is done
        if self.signal is None:
            self.signal, self._time = signal.Signals(number).name, time.monotonic()
            print(f"\n{self.signal}: stopping after this step; Ctrl-C stops at once", file=sys.stderr)
        elif number == signal.SIGINT and time.monotonic() - self._time > 1:
            raise KeyboardInterrupt
