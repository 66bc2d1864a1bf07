"""What a detector costs and where it comes from, as text."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch.utils.flop_counter import FlopCounterMode

from dyhead_zoo import registry
from dyhead_zoo.detector import Detector
from dyhead_zoo.factory import create_detector
from dyhead_zoo.hub import fetch_repository
from dyhead_zoo.layers.fpn import DyHeadNeck
from dyhead_zoo.models.rcnn import BOX_SIZE, MASK_SIZE, RCNNHead
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.saved import check_weights, saved_config
from dyhead_zoo.weight_files import weights_in


def count_parameters(detector: Detector) -> int:
    """Number of weights, buffers such as running means left out."""
    return sum(p.numel() for p in detector.parameters())


def count_macs(detector: Detector, height: int, width: int) -> int:
    """Multiply-adds of all layers on one image of ``height`` x ``width`` pixels, decoding left out.

    Counted are convolutions, deformable ones included, and matrix products, attention's among them; not counted are
    normalisation, activations, pooling and bilinear sampling (of deformable convolutions and attention, of regions), as
    in the tables of most papers. Two-stage detectors read as many regions as they propose at most, and draw as many
    masks as they give detections at most. The pass runs on the meta device: shapes only, no arithmetic.
    """
    shadow = copy.deepcopy(detector).to("meta").eval().requires_grad_(False)
    images = torch.empty(1, detector.in_chans, height, width, dtype=torch.uint8, device="meta")
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deform_conv_flops})
    with counter, torch.no_grad():
        shadow(images)
        if isinstance(head := getattr(shadow, "head", None), RCNNHead):
            _read_regions(head, cast(DyHeadNeck, shadow.neck).channels)
    return counter.get_total_flops() // 2


def _read_regions(head: RCNNHead, channels: int) -> None:
    """Every stage looks at every proposal, and every mask head at every detection; which they are does not matter."""
    for box_head in head.box:
        box_head(torch.empty(head.proposals[1], channels, BOX_SIZE, BOX_SIZE, device="meta"))
    for mask_head in head.mask:
        mask_head(torch.empty(head.max_detections, channels, MASK_SIZE // 2, MASK_SIZE // 2, device="meta"))


def _deform_conv_flops(
    x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    """Those of the dense convolution of the same shape, two for each multiply-add."""
    return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])


def canvas_of(cfg: PretrainedCfg) -> tuple[int, int]:
    """(height, width) of the canvas of a landscape image that fills the input protocol of a cfg."""
    short, long = (math.ceil(side / cfg.pad_divisor) * cfg.pad_divisor for side in (cfg.short_side, cfg.long_side))
    return short, long


def build_on_meta(name: str, **arguments: Any) -> tuple[Detector, PretrainedCfg]:
    """A detector on the meta device, where sizes need no numbers, and what is known of its weights, which stay unread.

    Args:
        name: as for ``create_detector``; a saved detector is built from its record.
        **arguments: of ``create_detector``.

    Raises:
        ValueError, FileNotFoundError, DownloadError: as ``create_detector``.
    """
    scheme, _, rest = name.partition(":")
    if scheme not in ("local-dir", "hf-hub"):
        with torch.device("meta"):
            detector = create_detector(name, **arguments)
        named = registry.is_detector(name.partition(".")[0])
        return detector, registry.get_pretrained_cfg(name) if named else detector.pretrained_cfg
    repo_id, _, revision = rest.partition("@")
    path = Path(rest) if scheme == "local-dir" else fetch_repository(repo_id, revision or None)
    config = saved_config(path)
    if config is None:
        raise ValueError(f"{path} does not say which detector it belongs to: give that detector's name instead")
    weights = weights_in(path) if path.is_dir() else path
    place = {"file": str(weights.absolute())} if scheme == "local-dir" else {"hf_hub_id": repo_id}
    cfg = PretrainedCfg.from_dict(config["pretrained_cfg"]).replace(arch=config["arch"], **place)
    check_weights(weights, lambda: create_detector(config["name"], pretrained_cfg=cfg))
    with torch.device("meta"):
        return create_detector(config["name"], pretrained_cfg=cfg, **arguments), cfg


def describe(name: str) -> str:
    """Size, cost, labels, input, source and figures of a named detector; its weights are not loaded."""
    detector, cfg = build_on_meta(name)
    height, width = canvas_of(cfg)
    rows = {
        "name": name,
        "description": cfg.description,
        "parameters": f"{count_parameters(detector) / 1e6:.2f} M",
        "multiply-adds": f"{count_macs(detector, height, width) / 1e9:.1f} G on {height} x {width} pixels",
        "classes": _classes(cfg),
        "input": _input(cfg),
        "weights": _weights(cfg),
        "license": cfg.license or "",
        "reported": _figures(cfg.reported, cfg.reported_by, "by"),
        "measured": _figures({key: 100 * value for key, value in cfg.measured.items()}, cfg.measured_on, "on"),
        "papers": ", ".join(cfg.paper_ids),
    }
    return "\n".join(f"{title + ':':<15}{text}" for title, text in rows.items() if text)


def _classes(cfg: PretrainedCfg) -> str:
    names = cfg.class_names
    shown = ", ".join(names[:5])
    return f"{len(names)} ({shown}{', ..' if len(names) > 5 else ''})"


def _input(cfg: PretrainedCfg) -> str:
    return (
        f"shorter side {cfg.short_side}, longer at most {cfg.long_side} pixels, {cfg.interpolation}, padded to a "
        f"multiple of {cfg.pad_divisor}; {cfg.channel_order.upper()} in 0..255, normalised by the model"
    )


def _weights(cfg: PretrainedCfg) -> str:
    if cfg.file and Path(cfg.file).is_absolute():
        return f"local file: {cfg.file}"
    places = {
        "bundled": f"bundled: {cfg.file}, in the package",
        "hub": f"hub: {cfg.hf_hub_id}",
        "url": f"url: {cfg.url} (published by its authors; not checked whether it is still there)",
    }
    return places.get(cfg.status, "none: train it, or give a checkpoint")


def _figures(figures: Mapping[str, float], origin: str | None, word: str) -> str:
    """``AP 42.0 (by X)``, in percent; who says so is part of a figure."""
    if not figures:
        return ""
    return ", ".join(f"{key} {value:.4g}" for key, value in figures.items()) + (f" ({word} {origin})" if origin else "")
