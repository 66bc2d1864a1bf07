"""What the optimiser is given: parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

BODY = "backbone.body."


def param_groups(
    detector: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    backbone_lr_scale: float = 1.0,
    decay_norm_bias: bool = False,
) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay; frozen ones are left out.

    The pretrained body (``backbone.body.*``) learns at ``lr * backbone_lr_scale``; everything else is new and learns at
    ``lr``, or at the share of it that the module which owns a part states in its ``lr_scales``, a mapping such as
    ``{"sampling_offsets": 0.1}`` from the names of parts (modules or parameters) to factors. Biases, vectors (norm
    weights, per-level scales) and what the body itself lists in timm's ``no_weight_decay()`` are not decayed unless
    ``decay_norm_bias``.

    Args:
        detector: any module whose parameter names follow the contract of ``Detector``.
        lr: peak learning rate.
        weight_decay: of the decayed groups.
        backbone_lr_scale: factor for the body; 0 freezes nothing, it only makes the steps zero.
        decay_norm_bias: decay every parameter.

    Returns:
        Up to four groups, and more with ``lr_scales``, for ``timm.optim.create_optimizer_v2``, with ``lr``, ``peak_lr``
        (what the schedule scales), ``weight_decay`` and ``name``, in a fixed order.

    Raises:
        ValueError: if nothing is trainable.
    """
    exempt, scales = _exempt_names(detector), _lr_scales(detector)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in detector.named_parameters():
        if not parameter.requires_grad:
            continue
        in_body = name.startswith(BODY)
        plain = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
        decay = weight_decay if decay_norm_bias or not plain else 0.0
        scale = math.prod(scale for part, scale in scales.items() if f"{name}.".startswith(f"{part}."))
        key = f"{'body' if in_body else 'new'}{'' if decay else '_no_decay'}{'' if scale == 1 else f'_x{scale:g}'}"
        rate = scale * (lr * backbone_lr_scale if in_body else lr)
        fresh = {"name": key, "params": [], "lr": rate, "peak_lr": rate, "weight_decay": decay}
        groups.setdefault(key, fresh)["params"].append(parameter)
    if not groups:
        raise ValueError("no parameter requires a gradient: unfreeze some of the detector before training it")
    return [groups[key] for key in sorted(groups)]


def _exempt_names(detector: nn.Module) -> set[str]:
    body = getattr(getattr(detector, "backbone", None), "body", None)
    listed = getattr(body, "no_weight_decay", None)
    return {BODY + name for name in listed()} if callable(listed) else set()


def _lr_scales(detector: nn.Module) -> dict[str, float]:
    """Full names of the parts that modules want to learn faster or more slowly, with their factors."""
    return {
        f"{name}.{part}".removeprefix("."): scale
        for name, module in detector.named_modules()
        for part, scale in getattr(module, "lr_scales", {}).items()
    }


def lr_factor(step: int, *, steps_per_epoch: int, epochs: int, schedule: str, warmup_steps: int) -> float:
    """Learning rate of optimiser step ``step`` (from 0) as a fraction of the peak: a pure function, for exact resuming.

    A linear warm-up of at most a quarter of the run multiplies either half a cosine that ends at zero after ``epochs``
    ("cosine"), or the staircase of Detectron's 1x schedule: a tenth after 2/3 of the epochs and a hundredth after 11/12
    ("step"; epochs 8 and 11 of 12).
    """
    total = steps_per_epoch * epochs
    warmup = min(1.0, (step + 1) / max(1, min(warmup_steps, total // 4)))
    if schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    drops = sum(step >= steps_per_epoch * round(epochs * share) for share in (2 / 3, 11 / 12))
    return warmup * 0.1**drops
