"""Files of a training run: resumable states, weights, and the log. A file is complete or absent, never half written."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dyhead_zoo.weights import write_safetensors

if TYPE_CHECKING:
    from dyhead_zoo.detector import Detector

STATE_VERSION = 1
_logger = logging.getLogger(__name__)


class CorruptStateError(ValueError):
    """A state file that cannot be read back."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place once the block has written it without an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """Make the folder of a file that is to be written after long work; tell now what would lose that work.

    Raises:
        OSError: the path cannot be written, or is that of a folder or device.
    """
    advice = "give another path for it"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): {advice}") from error
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file: {advice}")


def save_state(directory: Path, state: Mapping[str, Any], *, step: int, keep: int = 2) -> Path:
    """Write ``state_<step>.pt`` and delete all but the newest ``keep`` states.

    Args:
        directory: the run's output directory.
        state: tensors and plain Python values only, so that ``torch.load(weights_only=True)`` reads it back.
        step: optimiser steps done.
        keep: states that remain; two, so that one damaged file does not end a run.
    """
    path = directory / state_name(step)
    with atomic_path(path) as temporary:
        torch.save({"version": STATE_VERSION, **state}, temporary)
    for old in state_files(directory)[keep:]:
        old.unlink(missing_ok=True)
    return path


def state_name(step: int) -> str:
    """File name of the state after ``step`` steps; names sort as steps do."""
    return f"state_{step:08d}.pt"


def state_files(directory: Path) -> list[Path]:
    """State files of a run, newest first."""
    return sorted(directory.glob("state_*.pt"), reverse=True)


def remove_leftovers(directory: Path) -> None:
    """Delete the temporary files of a run that was killed while it wrote."""
    for path in directory.glob(".*.tmp"):
        path.unlink()


def load_state(path: Path) -> dict[str, Any]:
    """Read one state file; every record's CRC is checked, which ``torch.load`` does not do.

    Raises:
        CorruptStateError: if it is truncated or damaged.
        ValueError: if it was written by a newer version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise CorruptStateError(f"{path} is damaged: checksum of {damaged} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, CorruptStateError):
        raise
    except Exception as error:
        raise CorruptStateError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict) or "version" not in state:
        raise CorruptStateError(f"{path} is not a training state")
    if state["version"] > STATE_VERSION:
        raise ValueError(
            f"{path} has state version {state['version']}, and this dyhead_zoo reads up to {STATE_VERSION}: upgrade it"
        )
    return state


def newest_state(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest state that can be read; damaged ones are passed over with a warning. None if there is no state file.

    Raises:
        CorruptStateError: if there are state files but none can be read.
    """
    files = state_files(directory)
    for path in files:
        try:
            return path, load_state(path)
        except CorruptStateError as error:
            _logger.warning("%s; trying the state before it", error)
    if files:
        raise CorruptStateError(
            f"none of the states in {directory} can be read ({', '.join(f.name for f in files)}): "
            "start again in another output directory"
        )
    return None


def write_weights(path: Path, detector: Detector, metrics: Mapping[str, float]) -> None:
    """Native weights with what is needed to use them: name, config, label space and metrics in the header."""
    metadata = {
        "name": detector.name,
        "config": json.dumps(detector.config()),
        "label_space": json.dumps(detector.label_space.to_dict()),
        "metrics": json.dumps({name: None if math.isnan(value) else value for name, value in metrics.items()}),
    }
    write_safetensors(path, detector.state_dict(), metadata)


class RunLog:
    """``log.jsonl``, one JSON object a line with ``event``, ``step`` and ``epoch``; on request TensorBoard's files too.

    Reopening drops what a resumed run writes again: lines beyond ``step``, the evaluation at ``step`` if it is still
    due, and a line that a kill cut off.

    Raises:
        ModuleNotFoundError: if TensorBoard is asked for but not installed.
    """

    def __init__(self, directory: Path, step: int, *, eval_due: bool, tensorboard: bool = False) -> None:
        self.path = directory / "log.jsonl"
        if self.path.exists():
            lines = self.path.read_text("utf-8").splitlines()
            write_text(self.path, "".join(line + "\n" for line in lines if _is_done(line, step, eval_due)))
        self._writer = _summary_writer(directory, step) if tensorboard else None

    def write(self, event: str, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Append one line; NaN, which JSON lacks, becomes null."""
        numbers = {name: None if math.isnan(value) else value for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "step": step, "epoch": epoch, **numbers}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{event}/{name}", value, step)
            self._writer.flush()


def _summary_writer(directory: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("tensorboard=True needs the package: pip install 'dyhead-zoo[train]'") from error
    return SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)


def _is_done(line: str, step: int, eval_due: bool) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return bool(record["step"] < step or (record["step"] == step and not (eval_due and record["event"] == "eval")))
