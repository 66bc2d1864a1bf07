"""What learns: a detector with its optimiser, loss scaler and running average, and the one step that changes them."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dyhead_zoo.detector import TrainStep
from dyhead_zoo.engine import heap
from dyhead_zoo.engine.config import TrainConfig
from dyhead_zoo.engine.optim import param_groups
from dyhead_zoo.engine.processes import Processes
from dyhead_zoo.structures import Batch, Target

if TYPE_CHECKING:
    from dyhead_zoo.detector import Detector

_AMP_DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepValues(NamedTuple):
    """What a step found: detached loss terms of this process's images, and the norm of the averaged gradient."""

    terms: dict[str, Tensor]
    grad_norm: Tensor


class Learner:
    """A detector in training.

    Attributes:
        detector: trained in place.
        ema: its running average with timm's warm-up of the decay (1 - (1 + step) ** -2/3, at most ``ema_decay``), so
            that short runs are not held back by their first weights; None without.
        num_trainable: trainable parameters.
        lr: of the fastest group in the last step.
    """

    def __init__(self, detector: Detector, config: TrainConfig, processes: Processes) -> None:
        self.config, self.processes = config, processes
        self.detector = detector.to(processes.device)
        if config.channels_last:
            detector.to(memory_format=torch.channels_last)
        if config.grad_checkpointing:
            detector.set_grad_checkpointing()
            heap.return_large_blocks()
        groups = param_groups(
            detector,
            lr=config.lr,
            weight_decay=config.weight_decay,
            backbone_lr_scale=config.backbone_lr_scale,
            decay_norm_bias=config.decay_norm_bias,
        )
        self.num_trainable = sum(p.numel() for group in groups for p in group["params"])
        self.optimizer = create_optimizer_v2(groups, config.optimizer, lr=config.lr, weight_decay=config.weight_decay)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.amp == "fp16")
        self.ema = ModelEmaV3(detector, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self._module: nn.Module = TrainStep(detector)
        if processes.size > 1:
            devices = [processes.device] if processes.device.type == "cuda" else None
            self._module = nn.parallel.DistributedDataParallel(self._module, device_ids=devices)
        self.lr = 0.0

    @property
    def averaged(self) -> Detector:
        """The detector to evaluate and to keep: the running average where there is one."""
        return self.detector if self.ema is None else cast("Detector", self.ema.module)

    def step(self, parts: Sequence[Batch], *, number: int, lr_factor: float) -> StepValues:
        """One optimiser step on the mean loss of the parts of a batch.

        Args:
            parts: processed one after the other; their gradients add up.
            number: of the step, from 0; with the seed it determines all randomness.
            lr_factor: learning rate of each group as a fraction of its ``peak_lr``.

        Raises:
            FloatingPointError: on every process, and before any weight changes, if loss or gradient of one is not
                finite. (fp16 gradients overflow now and then: the scaler skips such a step and lowers its scale.)
        """
        self._module.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        self.lr = max(group["lr"] for group in self.optimizer.param_groups)
        terms: dict[str, Tensor] = {}
        for k, part in enumerate(parts):
            _seed_generators(self.config.seed, number, k, self.processes.rank)
            with self._gradients_shared(k == len(parts) - 1):
                losses = self._losses(part)
                self.scaler.scale(torch.stack(list(losses.values())).sum() / len(parts)).backward()
            for name, value in losses.items():
                share = value.detach() / len(parts)
                terms[name] = terms[name] + share if name in terms else share
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_grad or math.inf)
        self._require_finite(terms, norm, parts, number)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.detector, step=number + 1)
        return StepValues(terms, norm)

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        device, amp = self.processes.device, self.config.amp
        layout = torch.channels_last if self.config.channels_last else torch.preserve_format
        images = batch.images.to(device, non_blocking=True, memory_format=layout)
        targets = [{k: v.to(device, non_blocking=True) for k, v in cast(Any, t).items()} for t in batch.targets]
        with torch.autocast(device.type, dtype=_AMP_DTYPES[amp], enabled=amp != "none"):
            losses = self._module(images, batch.image_sizes.to(device), cast(list[Target], targets))
        return cast(dict[str, Tensor], losses)

    def _gradients_shared(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Processes exchange gradients in the last part of a batch only."""
        if isinstance(self._module, nn.parallel.DistributedDataParallel) and not last:
            return self._module.no_sync()
        return contextlib.nullcontext()

    def _require_finite(self, terms: Mapping[str, Tensor], norm: Tensor, parts: Sequence[Batch], number: int) -> None:
        values = [float(value) for value in terms.values()]
        if not self.scaler.is_enabled():
            values.append(float(norm))
        (failed,) = self.processes.any(not all(map(math.isfinite, values)))
        if failed:
            shown = ", ".join(f"{name}={float(value):.4g}" for name, value in terms.items())
            raise FloatingPointError(
                f"step {number} is not finite on process {self.processes.rank}: {shown}, gradient norm "
                f"{float(norm):.4g}, for images {[i for part in parts for i in part.image_ids]}. The weights did not "
                "change and the last saved state is good. Look at those images' boxes, or start a run from the last "
                "weights with a lower lr, a longer warm-up or amp='none'"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step changes; tensors and plain values only."""
        return {
            "model": self.detector.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.detector.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def _seed_generators(*numbers: int) -> None:
    """Seed the global generators from the numbers that identify one part of a step on one process."""
    low, high = np.random.SeedSequence(numbers).generate_state(2).tolist()
    torch.manual_seed(low << 32 | high)
    np.random.seed(low)
    random.seed(high)
