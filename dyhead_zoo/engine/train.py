"""Training: one process, or several under torchrun; every run can be stopped, killed and resumed without a trace.

What a step does depends on its number and the seed alone: the learning rate is a function of the step, the loader of
(seed, epoch, batch), and the random generators that dropout reads are seeded anew for every step. A state therefore
holds weights, averages and optimiser moments but no generator, and a resumed run ends with the weights of an
uninterrupted one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, distributed, nn

from dyhead_zoo.engine import checkpoint
from dyhead_zoo.engine.config import TrainConfig
from dyhead_zoo.engine.optim import lr_factor, param_groups
from dyhead_zoo.structures import Batch, Target

if TYPE_CHECKING:
    from dyhead_zoo.data.coco import CocoDataset
    from dyhead_zoo.detector import Detector

_logger = logging.getLogger(__name__)
_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MAY_CHANGE = {
    *("epochs", "device", "num_workers", "cache_images", "eval_every", "eval_batch_size", "log_every"),
    *("checkpoint_every_steps", "tensorboard", "progress"),
}
"""Settings that a resumed run may change: they leave the weights alone, except ``epochs``, which is documented."""


@dataclass
class Progress:
    """Where a run stands: the ``epoch`` and ``step_in_epoch`` to do next; ``eval_due``: an epoch ended unevaluated."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    eval_due: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    best_metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """What ``train`` did.

    Attributes:
        output: the run's directory.
        steps: optimiser steps done, over all resumptions.
        epochs: complete epochs done.
        metrics: of the last evaluation; empty without validation data. ``best_metrics``: of the best one, by AP.
        weights: ``last.safetensors``. ``best_weights``: ``best.safetensors``, or None without validation data.
        stopped_by: name of the signal that ended the run early, or None. ``train(..., resume=True)`` goes on.
    """

    output: Path
    steps: int
    epochs: int
    metrics: dict[str, float]
    best_metrics: dict[str, float]
    weights: Path
    best_weights: Path | None
    stopped_by: str | None = None


def train(
    detector: Detector,
    *,
    images: str | Path,
    annotations: str | Path,
    val_images: str | Path | None = None,
    val_annotations: str | Path | None = None,
    output: str | Path,
    config: TrainConfig | None = None,
    resume: bool | str | Path = False,
    **overrides: Any,
) -> TrainResult:
    """Train a detector on a COCO-format data set.

    ``output`` receives ``run.json`` (what was run), ``log.jsonl``, ``state_*.pt`` (the two newest resumable states),
    ``last.safetensors`` and, with validation data, ``best.safetensors`` (by AP). Weights and metrics are those of the
    running average where there is one. SIGTERM and Ctrl-C end the run after the current step with a state saved; a
    second one kills it.

    Under torchrun each process takes its part of every batch and gradients are averaged; heads divide their losses by
    the mean number of positives over processes, so the result is that of one process with the whole batch. With
    ``accumulate`` a batch's loss is the mean over its parts, each of which has its own number of positives.

    Resuming with other ``epochs`` is allowed: the schedule then spans the new total from the step reached on.
    Everything else that shapes the weights must be as it was.

    Args:
        detector: trained in place; on return it is in eval mode and has the weights of ``last.safetensors``.
        images: folder of the training images. ``annotations``: its COCO-format file, in the detector's label space.
        val_images: folder to evaluate on, with ``val_annotations``; none: no evaluation.
        output: the run's directory.
        config: settings; ``overrides`` are single settings that win over it.
        resume: True goes on from the newest state in ``output`` (and starts afresh where there is none); a path names
            a state file.

    Raises:
        ValueError: for settings that are unknown, out of range, or other than those of the run to resume.
        FileExistsError: if ``output`` holds a run and ``resume`` is False.
        FloatingPointError: if the loss or its gradient is not finite; the states saved before stay.
    """
    config = (config or TrainConfig()).replace(**overrides)
    if (val_images is None) != (val_annotations is None):
        raise ValueError("give both val_images and val_annotations, or neither")
    with _processes(config) as processes:
        run = _Run(detector, config, processes, Path(output), images=images, annotations=annotations)
        if val_images is not None and val_annotations is not None:
            run.validation = val_images, val_annotations
        run.open(resume)
        with StopRequest() as stop:
            return run.fit(stop)


class StopRequest:
    """Remembers SIGTERM and SIGINT within the block; the second one has its usual effect."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self._restore()
        print(f"\n{self.signal}: stopping after this step; once more to stop at once", file=sys.stderr)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


@dataclass(frozen=True)
class _Processes:
    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process raises it."""
        if self.size == 1:
            return list(flags)
        shared = torch.tensor(flags, dtype=torch.int32, device=self.device)
        distributed.all_reduce(shared, distributed.ReduceOp.MAX)
        return [bool(flag) for flag in shared.tolist()]


@contextlib.contextmanager
def _processes(config: TrainConfig) -> Iterator[_Processes]:
    """This process's place among those that torchrun started (one process: no group)."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    default = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    device = torch.device(config.device or default)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    own_group = size > 1 and not distributed.is_initialized()
    if own_group:
        # Every process waits while the slowest one reads and scores the validation images.
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        yield _Processes(int(os.environ.get("RANK", "0")) if size > 1 else 0, size, device)
    finally:
        if own_group:
            distributed.destroy_process_group()


class _Run:
    """Everything one run holds; ``open`` prepares it, ``fit`` does the epochs that are left."""

    def __init__(
        self,
        detector: Detector,
        config: TrainConfig,
        processes: _Processes,
        output: Path,
        *,
        images: str | Path,
        annotations: str | Path,
    ) -> None:
        from timm.optim import create_optimizer_v2
        from timm.utils import ModelEmaV3

        from dyhead_zoo.data.coco import CocoDataset
        from dyhead_zoo.detector import TrainStep

        self.config, self.processes, self.output, self.progress = config, processes, output, Progress()
        self.validation: tuple[str | Path, str | Path] | None = None
        self.dataset: CocoDataset = CocoDataset(images, annotations, label_space=detector.label_space)
        self.detector = detector.to(processes.device)
        if config.channels_last:
            self.detector.to(memory_format=torch.channels_last)
        groups = param_groups(
            detector,
            lr=config.lr,
            weight_decay=config.weight_decay,
            backbone_lr_scale=config.backbone_lr_scale,
            decay_norm_bias=config.decay_norm_bias,
        )
        self.trainable = sum(p.numel() for group in groups for p in group["params"])
        self.optimizer = create_optimizer_v2(groups, config.optimizer, lr=config.lr, weight_decay=config.weight_decay)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.amp == "fp16")
        self.ema = ModelEmaV3(detector, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        step: nn.Module = TrainStep(detector)
        if processes.size > 1:
            devices = [processes.device.index] if processes.device.type == "cuda" else None
            step = nn.parallel.DistributedDataParallel(step, device_ids=devices)
        self.train_step = step
        self.parts_per_epoch = len(self._loader(0, 0))
        self.steps_per_epoch = math.ceil(self.parts_per_epoch / config.accumulate)
        self.log: checkpoint.RunLog | None = None
        self.meter = _Meter()

    # -- beginning and resuming ---------------------------------------------------------------------------------------

    def open(self, resume: bool | str | Path) -> None:
        """Make or find the output directory, load the state to resume from, write ``run.json``."""
        self.output.mkdir(parents=True, exist_ok=True)
        found = self._find_state(resume)
        if found:
            self._load(*found)
        if self.processes.size > 1:
            distributed.barrier()  # no process may look for states after the first has begun to write
        if not self.processes.first:
            return
        if found:
            self._discard_later_states()
        self.log = checkpoint.RunLog(self.output / "log.jsonl", self.progress.step, self.progress.eval_due)
        checkpoint.write_text(self.output / "run.json", json.dumps(self._description(), indent=2) + "\n")
        _logger.info(
            "%s parameters train, %s steps per epoch, %s images",
            self.trainable,
            self.steps_per_epoch,
            len(self.dataset),
        )

    def _find_state(self, resume: bool | str | Path) -> tuple[Path, dict[str, Any]] | None:
        if resume is False:
            if (self.output / "run.json").exists() or checkpoint.state_files(self.output):
                raise FileExistsError(
                    f"{self.output} already holds a run: pass resume=True to go on with it, or another output directory"
                )
            return None
        if resume is True:
            return checkpoint.newest_state(self.output)
        return Path(resume), checkpoint.load_state(Path(resume))

    def _load(self, path: Path, state: Mapping[str, Any]) -> None:
        self._require_same_run(path, state)
        self.detector.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        if self.processes.first:
            _logger.warning("resuming from %s: epoch %d, step %d", path, self.progress.epoch, self.progress.step)

    def _require_same_run(self, path: Path, state: Mapping[str, Any]) -> None:
        """Raise unless the state's run would go on as it began."""
        defaults = TrainConfig().to_dict()
        now = {"data": self._data_description(), "detector": _plain(self.detector.config()), **self.config.to_dict()}
        then = {**defaults, "data": state["data"], "detector": state["detector"], **state["config"]}
        changed = [f"{k}: {then.get(k)!r} -> {now[k]!r}" for k in now if k not in _MAY_CHANGE and now[k] != then.get(k)]
        if changed:
            raise ValueError(
                f"{path} belongs to a run with other settings ({'; '.join(changed)}): "
                "give the old settings to resume it, or another output directory to start a new run"
            )

    def _discard_later_states(self) -> None:
        """Remove the damaged or abandoned states beyond the step resumed from: they would count as the newest."""
        for path in checkpoint.state_files(self.output):
            if path.name > f"state_{self.progress.step:08d}.pt":
                _logger.warning("removing %s, which lies beyond the state resumed from", path)
                path.unlink()

    def _description(self) -> dict[str, Any]:
        import timm

        from dyhead_zoo.version import __version__

        return {
            "config": self.config.to_dict(),
            "detector": _plain(self.detector.config()),
            "data": self._data_description(),
            "trainable_parameters": self.trainable,
            "steps_per_epoch": self.steps_per_epoch,
            "versions": {"dyhead_zoo": __version__, "torch": torch.__version__, "timm": timm.__version__},
        }

    def _data_description(self) -> dict[str, Any]:
        return {"images": len(self.dataset), "processes": self.processes.size}

    # -- the epochs ---------------------------------------------------------------------------------------------------

    def fit(self, stop: StopRequest) -> TrainResult:
        """Train and evaluate from where the run stands to its last epoch, or to a stop request."""
        progress, stopped = self.progress, False
        self._finish_epoch()
        while progress.epoch < self.config.epochs and not stopped:
            stopped = self._train_epoch(stop)
            if not stopped:
                self._finish_epoch()
                (stopped,) = self.processes.any(stop.signal is not None)
        stopped = stopped and progress.epoch < self.config.epochs
        if stopped and self.processes.first:
            _logger.warning(
                "stopped by %s after step %d; train(..., output=%r, resume=True) goes on from there",
                *(stop.signal or "another process", progress.step, str(self.output)),
            )
        self._write_weights("last.safetensors")
        if self.ema is not None:
            self.detector.load_state_dict(self.ema.module.state_dict())
        self.detector.eval()
        best = self.output / "best.safetensors"
        return TrainResult(
            output=self.output,
            steps=progress.step,
            epochs=progress.epoch,
            metrics=progress.metrics,
            best_metrics=progress.best_metrics,
            weights=self.output / "last.safetensors",
            best_weights=best if best.exists() else None,
            stopped_by=(stop.signal or "another process") if stopped else None,
        )

    def _train_epoch(self, stop: StopRequest) -> bool:
        """The rest of the current epoch; True if a stop request ended it (a state has been saved then)."""
        config, progress = self.config, self.progress
        self.train_step.train()
        self.meter.reset()
        batches = iter(self._loader(progress.epoch, progress.step_in_epoch * config.accumulate))
        with self._bar() as bar:
            while progress.step_in_epoch < self.steps_per_epoch:
                stopping = self._step(batches, stop)
                bar.update()
                ended = progress.step_in_epoch == self.steps_per_epoch
                if ended or progress.step % config.log_every == 0:
                    self._log_step(bar)
                if ended:
                    break
                every = config.checkpoint_every_steps
                if stopping or (every and progress.step % every == 0):
                    self._save()
                if stopping:
                    return True
        progress.epoch, progress.step_in_epoch, progress.eval_due = progress.epoch + 1, 0, True
        self._save()
        return stopping

    def _step(self, batches: Iterator[Batch], stop: StopRequest) -> bool:
        """One optimiser step; returns whether any process was asked to stop.

        Raises:
            FloatingPointError: on every process, before weights change, if loss or gradient of any is not finite.
        """
        config, progress, device = self.config, self.progress, self.processes.device
        factor = lr_factor(
            progress.step,
            steps_per_epoch=self.steps_per_epoch,
            epochs=config.epochs,
            schedule=config.schedule,
            warmup_steps=config.warmup_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        parts = min(config.accumulate, self.parts_per_epoch - progress.step_in_epoch * config.accumulate)
        image_ids: list[int] = []
        terms: dict[str, Tensor] = {}
        for part in range(parts):
            _seed(config.seed, progress.step, part, self.processes.rank)
            batch = next(batches)
            image_ids += batch.image_ids
            with self._sync(part == parts - 1):
                losses = self._forward(_to_device(batch, device, config.channels_last))
                self.scaler.scale(torch.stack(list(losses.values())).sum() / parts).backward()
            for name, value in losses.items():
                terms[name] = terms.get(name, 0) + value.detach() / parts
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_grad or math.inf)
        # fp16 overflows now and then: the scaler skips such a step and lowers its scale.
        finite = all(
            math.isfinite(value)
            for value in [*map(float, terms.values()), *([] if self.scaler.is_enabled() else [float(norm)])]
        )
        stopping, failed = self.processes.any(stop.signal is not None, not finite)
        if failed:
            raise self._not_finite(terms, norm, image_ids)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.step_in_epoch += 1
        if self.ema is not None:
            self.ema.update(self.detector, step=progress.step)
        self.meter.add(terms, norm, len(image_ids) * self.processes.size)
        return stopping

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        amp = self.config.amp
        with torch.autocast(self.processes.device.type, dtype=_AMP_DTYPES.get(amp), enabled=amp != "none"):
            return self.train_step(batch.images, batch.image_sizes, batch.targets)

    def _sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients travel between processes with the last part of a batch only."""
        step = self.train_step
        return (
            step.no_sync()
            if isinstance(step, nn.parallel.DistributedDataParallel) and not last
            else contextlib.nullcontext()
        )

    def _not_finite(self, terms: Mapping[str, Tensor], norm: Tensor, image_ids: list[int]) -> FloatingPointError:
        states = checkpoint.state_files(self.output)
        shown = ", ".join(f"{name}={float(value):.4g}" for name, value in terms.items())
        return FloatingPointError(
            f"step {self.progress.step} of epoch {self.progress.epoch} on process {self.processes.rank} gave {shown}, "
            f"gradient norm {float(norm):.4g}, for images {image_ids} (one process's values may be finite where "
            f"another's are not). Weights are unchanged since {states[0] if states else 'the start'}, "
            "which resume=True goes on from; try a lower lr, a longer warm-up or amp='none'"
        )

    # -- what an epoch needs ------------------------------------------------------------------------------------------

    def _loader(self, epoch: int, start_batch: int) -> Any:
        from dyhead_zoo.data.loader import make_train_loader

        config = self.config
        return make_train_loader(
            self.dataset,
            self._transform(epoch),
            config.batch_size // config.accumulate,
            config.seed,
            epoch,
            self.detector.cfg.pad_divisor,
            rank=self.processes.rank,
            world_size=self.processes.size,
            num_workers=config.num_workers,
            start_batch=start_batch,
        )

    def _transform(self, epoch: int) -> Any:
        from dyhead_zoo.data.transforms import SmallDataTrain, StandardTrain

        config = self.config
        if config.recipe == "standard":
            return StandardTrain()
        mosaic = config.mosaic if epoch < config.epochs - config.close_mosaic_epochs else 0.0
        scale = (config.scale_min, config.scale_max)
        return SmallDataTrain(size=config.size, scale=scale, mosaic=mosaic, color=config.color)

    def _bar(self) -> Any:
        from tqdm.auto import tqdm

        return tqdm(
            total=self.steps_per_epoch,
            initial=self.progress.step_in_epoch,
            desc=f"epoch {self.progress.epoch + 1}/{self.config.epochs}",
            unit="step",
            disable=None if self.config.progress and self.processes.first else True,  # None: silent off a terminal
        )

    def _log_step(self, bar: Any) -> None:
        """Means since the last line go to the log, the bar and the logger."""
        means, images_per_second, seconds_per_step = self.meter.read()
        steps_left = self.steps_per_epoch * self.config.epochs - self.progress.step
        left = timedelta(seconds=round(steps_left * seconds_per_step))
        record: dict[str, float] = {
            **means,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "images_per_second": round(images_per_second, 2),
        }
        epoch = round(self.progress.epoch + self.progress.step_in_epoch / self.steps_per_epoch, 4)
        self._write_log({"event": "train", "step": self.progress.step, "epoch": epoch, **record})
        shown = {name: f"{value:.3g}" for name, value in record.items()}
        bar.set_postfix({**shown, "left": str(left)})
        if self.processes.first:
            text = " ".join(f"{name} {value}" for name, value in shown.items())
            _logger.info("epoch %.2f step %d %s left %s", epoch, self.progress.step, text, left)

    def _write_log(self, record: Mapping[str, Any]) -> None:
        if self.log is not None:
            self.log.write(record)

    def _finish_epoch(self) -> None:
        """Evaluate where it is due and write weights. The state before it is saved, so a kill costs no training."""
        config, progress = self.config, self.progress
        if not progress.eval_due:
            return
        progress.eval_due = False
        due = progress.epoch % config.eval_every == 0 or progress.epoch >= config.epochs
        if self.validation is None or not due:
            self._write_weights("last.safetensors")
            return
        progress.metrics = self._evaluate(self.validation)
        if _score(progress.metrics) > _score(progress.best_metrics) or not progress.best_metrics:
            progress.best_metrics = progress.metrics
            self._write_weights("best.safetensors")
        self._write_weights("last.safetensors")
        self._write_log(
            {"event": "eval", "step": progress.step, "epoch": progress.epoch, **_without_nan(progress.metrics)}
        )
        self._save()

    def _evaluate(self, validation: tuple[str | Path, str | Path]) -> dict[str, float]:
        from dyhead_zoo.engine.evaluate import evaluate

        images, annotations = validation
        result = evaluate(
            self._averaged(),
            images=images,
            annotations=annotations,
            batch_size=self.config.eval_batch_size,
            num_workers=self.config.num_workers,
            progress=self.config.progress and sys.stderr.isatty(),
        )
        if self.processes.first:
            _logger.info("epoch %d:\n%s", self.progress.epoch, result.summary())
        return dict(result.metrics)

    def _averaged(self) -> Detector:
        """The detector that counts: the running average where there is one."""
        return self.detector if self.ema is None else cast("Detector", self.ema.module)

    def _save(self) -> None:
        if not self.processes.first:
            return
        state = {
            "progress": asdict(self.progress),
            "config": self.config.to_dict(),
            "data": self._data_description(),
            "detector": _plain(self.detector.config()),
            "model": self.detector.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        checkpoint.save_state(self.output, state, step=self.progress.step)

    def _write_weights(self, name: str) -> None:
        if self.processes.first:
            checkpoint.write_weights(self.output / name, self._averaged(), self.progress.metrics)


class _Meter:
    """Means since the last ``reset``; values stay on their device until they are read."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.images = 0
        self.start = time.perf_counter()

    def add(self, terms: Mapping[str, Tensor], norm: Tensor, images: int) -> None:
        total = torch.stack(list(terms.values())).sum()
        for name, value in {"loss": total, **terms, "grad_norm": norm}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.images += images

    def read(self) -> tuple[dict[str, float], float, float]:
        """Means by name, images per second, seconds per step; the count starts again."""
        seconds = time.perf_counter() - self.start
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        speed = self.images / seconds, seconds / self.steps
        self.reset()
        return means, *speed


def _seed(*numbers: int) -> None:
    """Seed every global generator from the numbers that identify a part of a step."""
    words = np.random.SeedSequence(numbers).generate_state(2)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[0]))
    random.seed(int(words[1]))


def _to_device(batch: Batch, device: torch.device, channels_last: bool) -> Batch:
    layout = torch.channels_last if channels_last else torch.preserve_format
    targets = [
        {k: v.to(device, non_blocking=True) for k, v in cast(dict[str, Tensor], t).items()} for t in batch.targets
    ]
    return batch._replace(
        images=batch.images.to(device, non_blocking=True, memory_format=layout),
        image_sizes=batch.image_sizes.to(device, non_blocking=True),
        targets=cast(list[Target], targets),
    )


def _score(metrics: Mapping[str, float]) -> float:
    """AP; -1 where it is missing or undefined."""
    ap = metrics.get("AP", -1.0)
    return -1.0 if math.isnan(ap) else ap


def _without_nan(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


def _plain(value: Any) -> Any:
    """What JSON makes of a value (tuples become lists), so that saved and present settings compare equal."""
    return json.loads(json.dumps(value))
