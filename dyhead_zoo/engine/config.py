"""Settings of the training engine. This module imports no torch: the command line makes its flags from these fields.

A field's type becomes the flag's type (``int``, ``float``, ``str``, ``bool``, ``X | None``, ``Literal``), its default
the flag's default, and ``metadata["help"]`` the flag's help text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a help text for the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """How to train: flat, JSON-able. See ``dyhead_zoo.engine.train.train``.

    Raises:
        ValueError: for a value out of range, naming it.
    """

    epochs: int = setting(12, "passes over the training images; the schedule spans them")
    batch_size: int = setting(16, "images per optimiser step, over all processes and parts")
    accumulate: int = setting(1, "parts in which each batch is processed, one after the other, to save memory")
    optimizer: str = setting("adamw", "any name that timm.optim knows")
    lr: float = setting(1e-3, "peak learning rate")
    backbone_lr_scale: float = setting(0.1, "learning rate of the pretrained body, as a fraction of lr")
    weight_decay: float = setting(0.05, "weight decay")
    decay_norm_bias: bool = setting(False, "decay biases and norm weights too")
    schedule: Literal["cosine", "step"] = setting("cosine", "cosine to zero, or a tenth at 2/3 and 11/12 of the epochs")
    warmup_steps: int = setting(100, "steps of linear warm-up, at most a quarter of the run")
    clip_grad: float = setting(10.0, "largest norm of the gradient; 0 for no limit")
    ema_decay: float = setting(0.9998, "decay of the averaged weights, reached gradually; 0 for no average")
    amp: Literal["none", "bf16", "fp16"] = setting("none", "mixed precision")
    channels_last: bool = setting(False, "memory format of convolutions")
    grad_checkpointing: bool = setting(
        False,
        "compute stages of the backbone and blocks of DyHead again in the backward pass: less memory, more time; "
        "BatchNorm that is not frozen updates its running statistics twice a step",
    )
    device: str | None = setting(None, "device; by default this process's GPU, or the CPU where there is none")
    seed: int = setting(0, "seed of order, augmentation and dropout")
    recipe: Literal["small", "standard"] = setting(
        "small", "random crops of a fixed size, or resizing as in the papers"
    )
    size: int = setting(320, "small recipe: side of the square crop, pixels")
    scale_min: float = setting(0.5, "small recipe: smallest random scale")
    scale_max: float = setting(1.6, "small recipe: largest random scale")
    test_size: int | None = setting(
        None, "small recipe: longer side of pictures at inference, pixels; by default as the detector says"
    )
    mosaic: float = setting(0.5, "small recipe: probability of putting four images into one")
    close_mosaic_epochs: int = setting(1, "small recipe: last epochs without mosaic")
    color: float = setting(0.5, "small recipe: probability of colour distortion")
    flip: float = setting(0.5, "probability of a horizontal flip")
    cache_images: bool = setting(False, "keep the images in memory")
    num_workers: int = setting(2, "processes per rank that read images; 0 reads in the training process")
    eval_every: int = setting(1, "epochs between evaluations; the last epoch is always evaluated")
    eval_batch_size: int = setting(1, "images of equal canvas per evaluation step")
    log_every: int = setting(20, "steps between lines of the log")
    checkpoint_every_steps: int = setting(0, "steps between states within an epoch; 0 saves after each epoch only")
    tensorboard: bool = setting(False, "write TensorBoard scalars too")
    progress: bool = setting(True, "show a progress bar on terminals")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "size", "eval_every", "eval_batch_size", "log_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        non_negative = "weight_decay warmup_steps clip_grad backbone_lr_scale close_mosaic_epochs num_workers"
        for name in [*non_negative.split(), "checkpoint_every_steps"]:
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("mosaic", "color", "flip"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a probability")
        for name, choices in (
            ("schedule", ("cosine", "step")),
            ("amp", ("none", "bf16", "fp16")),
            ("recipe", ("small", "standard")),
        ):
            self._check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        self._check("test_size", self.test_size is None or self.test_size >= 1, "at least 1")
        self._check("lr", self.lr > 0, "positive")
        self._check("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        self._check(
            "scale_min", 0 < self.scale_min <= self.scale_max, f"positive and at most scale_max={self.scale_max}"
        )

    def _check(self, name: str, valid: bool, rule: str) -> None:
        if not valid:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {rule}")

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some settings changed; an unknown name is an error that lists the known ones."""
        known = [f.name for f in dataclasses.fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            raise ValueError(f"unknown training settings {unknown}; known: {', '.join(known)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)
