"""Training: one process, or several under torchrun; every run can be stopped, killed and resumed without a trace.

What a step does depends on its number and the seed alone: the learning rate is a function of the step, the loader of
(seed, epoch, batch), and the generators that dropout reads are seeded anew for every step. A state therefore holds
weights, averages and optimiser moments but no generator, and a resumed run ends with the weights of an uninterrupted
one.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dyhead_zoo.data.coco import CocoDataset
from dyhead_zoo.data.loader import make_train_loader
from dyhead_zoo.data.transforms import SmallDataTrain, StandardTrain, TrainTransform
from dyhead_zoo.engine import checkpoint
from dyhead_zoo.engine.config import TrainConfig
from dyhead_zoo.engine.evaluate import evaluate
from dyhead_zoo.engine.learner import Learner, StepValues
from dyhead_zoo.engine.optim import lr_factor
from dyhead_zoo.engine.processes import Processes, StopRequest, joined_processes
from dyhead_zoo.structures import Batch
from dyhead_zoo.version import __version__

if TYPE_CHECKING:
    from dyhead_zoo.detector import Detector

_logger = logging.getLogger(__name__)
_MAY_CHANGE = {
    *("epochs", "device", "num_workers", "cache_images", "eval_every", "eval_batch_size", "log_every"),
    *("checkpoint_every_steps", "tensorboard", "progress", "test_size"),
}
"""Settings that a resumed run may change: they leave the weights alone, except ``epochs``, which ``train`` explains."""


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
        metrics: of the last evaluation; empty without validation data.
        best_metrics: of the best evaluation, by AP.
        weights: ``last.safetensors``.
        best_weights: ``best.safetensors``, or None without validation data.
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
    second Ctrl-C ends it at once.

    Under torchrun each process takes its share of every batch and gradients are averaged; heads divide their losses by
    the mean number of positives over the processes, so the step is that of one process with the whole batch (but for
    BatchNorm, which sees its own share). With ``accumulate`` the loss of a batch is the mean over its parts, each
    divided by its own number of positives.

    A run may be resumed with other ``epochs``: the schedule then spans the new total from the step reached on. It may
    be resumed by another number of processes. Everything else that shapes the weights must be as it was.

    Args:
        detector: trained in place; on return it is in eval mode and has the weights of ``last.safetensors``.
        images: folder of the training images.
        annotations: their COCO-format file; classes are matched to the detector's by name.
        val_images: folder to evaluate on after each epoch; by default there is no evaluation.
        val_annotations: its COCO-format file.
        output: the run's directory.
        config: settings; ``overrides`` are single settings that win over it.
        resume: True goes on from the newest state in ``output``, and starts afresh where there is none; a path names
            the state file to go on from.

    Raises:
        ValueError: for settings that are unknown, out of range, or other than those of the run to resume; for data that
            do not fit the detector or are not in COCO format.
        FileNotFoundError: for data or a state that does not exist.
        FileExistsError: if ``output`` holds a run and ``resume`` is False.
        FloatingPointError: if the loss or its gradient is not finite; the states saved before stay.
    """
    config = (config or TrainConfig()).replace(**overrides)
    if val_images is not None and val_annotations is not None:
        validation = Path(val_images), Path(val_annotations)
        _check_validation(detector, *validation)
    elif val_images is None and val_annotations is None:
        validation = None
    else:
        raise ValueError("give both val_images and val_annotations, or neither")
    _set_protocol(detector, config)
    detector.pretrained_cfg = detector.pretrained_cfg.without_claims()  # they were of the weights it starts from
    with joined_processes(config.device) as processes:
        dataset = CocoDataset(
            images,
            annotations,
            label_space=detector.label_space,
            cache=config.cache_images,
            masks=detector.wants_masks,
        )
        run = _Run(Learner(detector, config, processes), dataset, validation, Path(output))
        run.open(resume)
        with StopRequest() as stop:
            return run.fit(stop)


def _check_validation(detector: Detector, images: Path, annotations: Path) -> None:
    """Raise now what would otherwise end the run after its first epoch."""
    names = CocoDataset(images, annotations).label_space.names
    if not set(names) & set(detector.label_space.names):
        raise ValueError(
            f"{annotations} has the classes {', '.join(names[:10])}, none of which the detector knows: "
            f"it has {', '.join(detector.label_space.names[:10])}"
        )


def _set_protocol(detector: Detector, config: TrainConfig) -> None:
    """Make pictures at inference as large as ``test_size`` says; warn if they would be much larger than in training."""
    if config.recipe != "small":
        return
    if config.test_size is not None:
        size = config.test_size
        detector.pretrained_cfg = detector.pretrained_cfg.replace(short_side=size, long_side=size)
    elif detector.pretrained_cfg.short_side >= 2 * config.size:
        _logger.warning(
            "size=%d in training, but at inference the detector makes the shorter side of a picture %d: "
            "pass test_size=%d, or recipe='standard'",
            *(config.size, detector.pretrained_cfg.short_side, config.size),
        )


class _Run:
    """A learner, its data, its output directory: ``open`` prepares the run, ``fit`` does the epochs that are left."""

    def __init__(
        self, learner: Learner, dataset: CocoDataset, validation: tuple[Path, Path] | None, output: Path
    ) -> None:
        self.learner, self.dataset, self.validation, self.output = learner, dataset, validation, output
        self.config: TrainConfig = learner.config
        self.processes: Processes = learner.processes
        self.progress = Progress()
        self.steps_per_epoch = len(self._loader(epoch=0, first_step=0)) // self.config.accumulate
        self.log: checkpoint.RunLog | None = None
        self.meter = _Meter()

    # -- beginning and resuming ---------------------------------------------------------------------------------------

    def open(self, resume: bool | str | Path) -> None:
        """Make the output directory, or load the state to resume from; write ``run.json``."""
        found = self._find_state(resume)
        if found:
            path, state = found
            self._require_same_run(path, state)
            self.learner.load_state_dict(state)
            self.progress = Progress(**state["progress"])
        self.processes.wait()  # no process may look for states after the first has begun to write
        if not self.processes.first:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_leftovers(self.output)
        if found:
            _logger.warning("resuming after step %d from %s", self.progress.step, found[0])
            self._remove_later_states()
        self.log = checkpoint.RunLog(
            self.output, self.progress.step, eval_due=self.progress.eval_due, tensorboard=self.config.tensorboard
        )
        checkpoint.write_text(self.output / "run.json", json.dumps(self._description(), indent=2) + "\n")
        _logger.info("%s", self.dataset.report.summary())
        _logger.info("%d parameters train, %d steps per epoch", self.learner.num_trainable, self.steps_per_epoch)

    def _find_state(self, resume: bool | str | Path) -> tuple[Path, dict[str, Any]] | None:
        if resume is True:
            return checkpoint.newest_state(self.output)
        path = Path(resume) if resume else None
        own = path is not None and path.resolve().parent == self.output.resolve()
        if not own and ((self.output / "run.json").exists() or checkpoint.state_files(self.output)):
            raise FileExistsError(
                f"{self.output} already holds a run: pass resume=True to go on with it, or another output directory"
            )
        return (path, checkpoint.load_state(path)) if path else None

    def _require_same_run(self, path: Path, state: Mapping[str, Any]) -> None:
        """Raise unless the state's run would go on as it began."""
        changed = []
        for part, now in (("config", self.config.to_dict()), ("detector", self._identity()), ("data", self._data())):
            then = state[part]  # what one side lacks is a setting that the other's version does not know
            shared = [key for key in now if key in then and key not in _MAY_CHANGE]
            changed += [f"{key}: {then[key]!r} -> {now[key]!r}" for key in shared if now[key] != then[key]]
        if changed:
            raise ValueError(
                f"{path} belongs to a run with other settings ({'; '.join(changed)}): "
                "give the old settings to resume it, or another output directory to start a new run"
            )

    def _remove_later_states(self) -> None:
        """Remove damaged or abandoned states beyond the one resumed from: they would count as the newest."""
        for path in checkpoint.state_files(self.output):
            if path.name > checkpoint.state_name(self.progress.step):
                _logger.warning("removing %s, which lies beyond the state resumed from", path)
                path.unlink()

    def _description(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "detector": self.learner.detector.config(),
            "data": {"annotations": str(self.dataset.annotations), **self._data()},
            "trainable_parameters": self.learner.num_trainable,
            "steps_per_epoch": self.steps_per_epoch,
            "processes": self.processes.size,
            "versions": {"dyhead_zoo": __version__, "torch": torch.__version__, "timm": timm.__version__},
        }

    def _identity(self) -> dict[str, Any]:
        """Name, architecture and classes, in the form that JSON gives them (tuples become lists)."""
        config = self.learner.detector.config()
        content = {"name": config["name"], **config["arch"], "classes": self.learner.detector.label_space.names}
        return cast(dict[str, Any], json.loads(json.dumps(content)))

    def _data(self) -> dict[str, int]:
        """Numbers of images, boxes and so on."""
        return dict(self.dataset.report.totals)

    # -- the epochs ---------------------------------------------------------------------------------------------------

    def fit(self, stop: StopRequest) -> TrainResult:
        """Train and evaluate from where the run stands to its last epoch, or to a stop request."""
        progress, stopped = self.progress, False
        self._finish_epoch()
        while progress.epoch < self.config.epochs and not stopped:
            stopped = self._train_epoch(stop)
            if not stopped:
                self._finish_epoch()
        weights, best = self.output / "last.safetensors", self.output / "best.safetensors"
        if stopped and self.processes.first:
            checkpoint.write_weights(weights, self.learner.averaged, {})
            _logger.warning(
                "stopped after step %d; train(..., output=%r, resume=True) goes on", progress.step, str(self.output)
            )
        if self.learner.ema is not None:
            self.learner.detector.load_state_dict(self.learner.ema.module.state_dict())
        self.learner.detector.eval()
        self.processes.wait()
        return TrainResult(
            output=self.output,
            steps=progress.step,
            epochs=progress.epoch,
            metrics=progress.metrics,
            best_metrics=progress.best_metrics,
            weights=weights,
            best_weights=best if best.exists() else None,
            stopped_by=(stop.signal or "another process") if stopped else None,
        )

    def _train_epoch(self, stop: StopRequest) -> bool:
        """The rest of the current epoch; True if a stop request ended it early, with a state saved."""
        config, progress = self.config, self.progress
        batches = iter(self._loader(progress.epoch, progress.step_in_epoch))
        self.meter.reset()
        with self._bar() as bar:
            while progress.step_in_epoch < self.steps_per_epoch:
                (stopping,) = self.processes.any(stop.requested)
                try:
                    parts = [] if stopping else [next(batches) for _ in range(config.accumulate)]
                except RuntimeError:
                    if not stop.requested:
                        raise
                    parts = []  # the signal went to the loader's workers too
                if not parts:
                    self._save()
                    return True
                values = self.learner.step(parts, number=progress.step, lr_factor=self._lr_factor())
                progress.step += 1
                progress.step_in_epoch += 1
                bar.update()
                self.meter.add(values, config.batch_size)
                ended = progress.step_in_epoch == self.steps_per_epoch
                if ended or progress.step % config.log_every == 0:
                    self._log_step(bar)
                if config.checkpoint_every_steps and not ended and progress.step % config.checkpoint_every_steps == 0:
                    self._save()
        progress.epoch, progress.step_in_epoch, progress.eval_due = progress.epoch + 1, 0, True
        self._save()
        return False

    def _lr_factor(self) -> float:
        config = self.config
        return lr_factor(
            self.progress.step,
            steps_per_epoch=self.steps_per_epoch,
            epochs=config.epochs,
            schedule=config.schedule,
            warmup_steps=config.warmup_steps,
        )

    def _loader(self, epoch: int, first_step: int) -> DataLoader[Batch]:
        """This process's parts of the batches of an epoch, from ``first_step`` on."""
        config, processes = self.config, self.processes
        share, rest = divmod(config.batch_size, processes.size * config.accumulate)
        if rest or not share:
            raise ValueError(
                f"batch_size={config.batch_size} cannot be spread evenly over {processes.size} processes and "
                f"accumulate={config.accumulate} parts: use a multiple of {processes.size * config.accumulate}"
            )
        return make_train_loader(
            self.dataset,
            self._transform(epoch),
            share,
            config.seed,
            epoch,
            self.learner.detector.pretrained_cfg.pad_divisor,
            rank=processes.rank,
            world_size=processes.size,
            num_workers=config.num_workers,
            accumulate=config.accumulate,
            start_batch=first_step * config.accumulate,
            pin_memory=processes.device.type == "cuda",
        )

    def _transform(self, epoch: int) -> TrainTransform:
        config = self.config
        if config.recipe == "standard":
            return StandardTrain(flip=config.flip)
        return SmallDataTrain(
            size=config.size,
            scale=(config.scale_min, config.scale_max),
            mosaic=config.mosaic if epoch < config.epochs - config.close_mosaic_epochs else 0.0,
            color=config.color,
            flip=config.flip,
        )

    def _finish_epoch(self) -> None:
        """Evaluate and write weights after an epoch. Its state is saved already: a kill in here costs no training."""
        config, progress = self.config, self.progress
        if not progress.eval_due:
            return
        progress.eval_due = False
        ended = progress.epoch >= config.epochs
        metrics: dict[str, float] = {}
        if self.validation is not None and (ended or progress.epoch % config.eval_every == 0):
            metrics = progress.metrics = self._evaluate(*self.validation)
        if self.processes.first:
            checkpoint.write_weights(self.output / "last.safetensors", self.learner.averaged, metrics)
        if not metrics:
            return
        if not progress.best_metrics or _score(metrics) > _score(progress.best_metrics):
            progress.best_metrics = metrics
            if self.processes.first:
                checkpoint.write_weights(self.output / "best.safetensors", self.learner.averaged, metrics)
        if self.log is not None:
            self.log.write("eval", progress.step, progress.epoch, metrics)
        self._save()

    def _evaluate(self, images: Path, annotations: Path) -> dict[str, float]:
        result = evaluate(
            self.learner.averaged,
            images=images,
            annotations=annotations,
            batch_size=self.config.eval_batch_size,
            num_workers=self.config.num_workers,
            progress=self.config.progress and sys.stderr.isatty(),
        )
        if self.processes.first:
            _logger.info("after epoch %d:\n%s", self.progress.epoch, result.summary())
        return dict(result.metrics)

    # -- files and display --------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.processes.first:
            state = {
                "progress": asdict(self.progress),
                "config": self.config.to_dict(),
                "detector": self._identity(),
                "data": self._data(),
                **self.learner.state_dict(),
            }
            checkpoint.save_state(self.output, state, step=self.progress.step)

    def _bar(self) -> Any:
        return tqdm(
            total=self.steps_per_epoch,
            initial=self.progress.step_in_epoch,
            desc=f"epoch {self.progress.epoch + 1}/{self.config.epochs}",
            unit="step",
            disable=None if self.config.progress and self.processes.first else True,  # None: only on a terminal
        )

    def _log_step(self, bar: Any) -> None:
        """Means since the last line, over the processes too, go to the log, the bar and the logger."""
        means, images_per_second, seconds_per_step = self.meter.read(self.processes)
        if self.log is None:
            return
        left = timedelta(
            seconds=round((self.steps_per_epoch * self.config.epochs - self.progress.step) * seconds_per_step)
        )
        epoch = round(self.progress.epoch + self.progress.step_in_epoch / self.steps_per_epoch, 4)
        values = {**means, "lr": self.learner.lr, "images_per_second": round(images_per_second, 2)}
        self.log.write("train", self.progress.step, epoch, values)
        shown = {name: f"{value:.3g}" for name, value in values.items()}
        bar.set_postfix({**shown, "left": str(left)})
        text = " ".join(f"{name} {value}" for name, value in shown.items())
        _logger.info("epoch %.2f step %d %s left %s", epoch, self.progress.step, text, left)


class _Meter:
    """Means since the last ``reset``; values stay on their device until they are read."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = self.images = 0
        self.start = time.perf_counter()

    def add(self, values: StepValues, images: int) -> None:
        total = torch.stack(list(values.terms.values())).sum()
        for name, value in {"loss": total, **values.terms, "grad_norm": values.grad_norm}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.images += images

    def read(self, processes: Processes) -> tuple[dict[str, float], float, float]:
        """Means by name, images per second, seconds per step; the count starts again."""
        values = processes.mean(torch.stack([value / self.steps for value in self.sums.values()])).tolist()
        means = dict(zip(self.sums, values, strict=True))
        seconds = time.perf_counter() - self.start
        speed = self.images / seconds, seconds / self.steps
        self.reset()
        return means, *speed


def _score(metrics: Mapping[str, float]) -> float:
    """AP; -1 where it is undefined."""
    return -1.0 if math.isnan(metrics["AP"]) else metrics["AP"]
