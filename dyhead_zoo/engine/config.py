"""Settings of the training engine. This module imports no torch: the command line makes its flags from these fields.

A field's type becomes the flag's type (``int``, ``float``, ``str``, ``bool``, ``X | None``, ``Literal``), its default
the flag's default, and ``metadata["help"]`` the flag's help text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a help text for the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """How to train. See ``dyhead_zoo.engine.train.train``."""

    epochs: int = setting(12, "passes over the training images")
    batch_size: int = setting(16, "images per step, over all processes")
    lr: float = setting(1e-3, "peak learning rate")
    weight_decay: float = setting(0.05, "decoupled weight decay")
    num_workers: int = setting(2, "processes per rank that read images")
    seed: int = setting(0, "seed of weights, order and augmentation")
