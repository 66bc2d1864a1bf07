"""Every family on timm backbones of every kind, and every named detector's own settings, from a step to a saved file.

What is asked of each: losses that are finite, with a gradient for every parameter; detections that are well formed; an
image's answer that does not depend on its neighbours in the batch; the same answer after saving and loading, and from
the same seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from dyhead_zoo import (
    Detector,
    Target,
    TrainStep,
    create_detector,
    get_pretrained_cfg,
    list_detectors,
    list_tags,
    save_for_hub,
)
from dyhead_zoo.registry import parse_grammar

BACKBONES = {
    "resnet10t": "residual CNN",
    "hrnet_w18_small": "parallel branches",
    "convnext_atto": "CNN with LayerNorm",
    "mobilenetv3_small_050": "mobile",
    "mobilevitv2_050": "mobile with attention",
    "pvt_v2_b0": "hierarchical transformer",
    "tiny_vit_5m_224": "hierarchical transformer with windows",
    "vit_tiny_patch16_224": "plain ViT",
    "vit_tiny_r_s16_p8_224": "ViT on a CNN, stride 32 alone",
    "crossvit_tiny_240": "two ViTs side by side, strides 12 and 17, one canvas size",
}
OPTIONS: dict[str, dict[str, Any]] = {"crossvit_tiny_240": {"image_size": (120, 120)}}
PYRAMID: dict[str, Any] = {"channels": 32, "score_threshold": 0.0, "max_detections": 20}
REGIONS: dict[str, Any] = {
    **PYRAMID,
    "box_hidden": (32,),
    "rpn_pre_nms": (100, 100),
    "proposals": (60, 60),
    "samples": (4096, 32),  # so many that every anchor takes part, and every level with it
}
QUERIES: dict[str, Any] = {
    **PYRAMID,
    "heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward": 64,
    "num_queries": 20,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "atss": PYRAMID,
    "retinanet": PYRAMID,
    "fcos": PYRAMID,
    "reppoints": PYRAMID,
    "borderdet": PYRAMID,
    "faster_rcnn": REGIONS,
    "mask_rcnn": REGIONS,
    "cascade_rcnn": REGIONS,
    "cascade_mask_rcnn": REGIONS,
    "detr": QUERIES,
    "deformable_detr": {**QUERIES, "box_refine": True, "two_stage": True},
}
_DISTANCES = ("head.box_distances.", "head.scales")  # cut off at zero, where all of them may lie
LEVEL = {  # prefixes of parameters whose gradient may be zero throughout in a first step
    "fcos": _DISTANCES,
    "borderdet": (*_DISTANCES, "head.border_box.", "head.border_deltas."),  # no box is good enough to learn its borders
    "detr": (
        "head.transformer.decoder.0.self_attn.in_proj_weight",  # all states are zeros: attention among equals
        "neck.dyhead.blocks.0.scale.fc.",  # a ReLU of one number, as there is one level
    ),
}


def build(name: str, options: dict[str, Any]) -> Detector:
    """A detector from a fixed seed.

    Weights are moved off their first values: what begins at zero would hide all that lies before it from the gradient.
    """
    torch.manual_seed(0)
    detector = create_detector(name, num_classes=3, **options)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return detector


def batch(detector: Detector) -> tuple[Tensor, Tensor, list[Target]]:
    """Two images, their sizes and targets: three objects, one of them of a single pixel; and none."""
    torch.manual_seed(1)
    height, width = detector.backbone.image_size or (64, 96)
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    sizes = torch.tensor([[height, width], [height * 2 // 3, width * 3 // 4]])
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.4, 0.3, 0.9, 0.9]]) * sizes[0].flip(0).repeat(2)
    boxes = torch.cat((boxes.round(), torch.tensor([[9.0, 9, 10, 10]])))
    targets: list[Target] = [
        {"boxes": boxes, "labels": torch.tensor([0, 2, 1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    if detector.wants_masks:
        x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
        y, x = torch.arange(height)[:, None], torch.arange(width)
        targets[0]["masks"] = (x >= x1) & (y >= y1) & (x < x2) & (y < y2)
        targets[1]["masks"] = torch.zeros(0, *sizes[1].tolist(), dtype=torch.bool)
    return images, sizes, targets


@torch.no_grad()
def answer(detector: Detector, rows: slice = slice(None)) -> Any:
    """The raw output for some images of the batch."""
    images, sizes, _ = batch(detector)
    return detector.eval()(images[rows], sizes[rows])


def tensors(raw: Any) -> list[Tensor]:
    """Those of a raw output, but for the sizes of the images."""
    return [level for field in raw if isinstance(field, tuple) for level in field if isinstance(level, Tensor)]


def losses(detector: Detector) -> dict[str, Tensor]:
    """Of one training step, with all randomness from one seed."""
    images, sizes, targets = batch(detector)
    return TrainStep(detector.train())(images, sizes, targets)


@torch.no_grad()
def check_detections(detector: Detector, raw: Any) -> None:
    """They lie within their pictures, are sorted, and as many as may be; with masks where the detector makes them."""
    for found, size in zip(detector.decode(raw), raw.image_sizes, strict=True):
        assert 0 < len(found) <= 20
        assert found.boxes.shape == (len(found), 4) and found.boxes.isfinite().all()
        assert (found.boxes >= 0).all() and (found.boxes <= size.flip(0).repeat(2)).all()
        assert (found.boxes[:, :2] <= found.boxes[:, 2:]).all()
        assert (found.scores.diff() <= 0).all() and 0 <= found.scores[-1] <= found.scores[0] <= 1
        assert found.labels.dtype == torch.int64 and ((found.labels >= 0) & (found.labels < 3)).all()
        assert (found.masks is not None) == detector.wants_masks
        assert found.masks is None or ((found.masks >= 0) & (found.masks <= 1)).all()


def check_batches(detector: Detector) -> None:
    """An image alone gives what it gives among others, to 1e-5, relative to the largest value where that is beyond one.

    In double precision: where a level is a single cell, GroupNorm makes much of the last digits.
    """
    together = tensors(answer(detector.double()))
    for row in range(2):
        for alone, among in zip(tensors(answer(detector, slice(row, row + 1))), together, strict=True):
            difference = (alone - among[row : row + 1]).abs().max()
            assert difference <= 1e-5 * max(1.0, among.abs().max().item())
    detector.float()


def check_file(detector: Detector, expected: list[Tensor]) -> None:
    """A saved and loaded detector has the same settings and gives the same."""
    with TemporaryDirectory() as folder:
        save_for_hub(detector, Path(folder) / "saved")
        loaded = create_detector(f"local-dir:{folder}/saved")
        assert json.loads(json.dumps(detector.arch)) == loaded.arch
        assert all(map(torch.equal, tensors(answer(loaded)), expected))


def check_gradients(detector: Detector, terms: dict[str, Tensor]) -> list[str]:
    """Every parameter gets a finite gradient; those are returned whose gradient is zero throughout."""
    assert all(term.ndim == 0 and term.isfinite() for term in terms.values()), terms
    torch.stack(list(terms.values())).sum().backward()
    gradients = {key: p.grad for key, p in detector.named_parameters() if p.requires_grad}
    assert not [key for key, gradient in gradients.items() if gradient is None]
    assert not [key for key, gradient in gradients.items() if not gradient.isfinite().all()]
    return [key for key, gradient in gradients.items() if not gradient.any()]


def settings() -> list[str]:
    """Registered names and tags, one of each set of arguments; the tiny ones have tests of their own."""
    first: dict[tuple[str, ...], str] = {}
    for name in (n for n in list_detectors() if not n.startswith("test_")):
        for full in [f"{name}.{tag}" for tag in list_tags(name)] or [name]:
            family, arch = family_of(name), json.dumps(get_pretrained_cfg(full).arch, sort_keys=True)
            first.setdefault((family, str("_dyhead" in name), arch), full)
    return list(first.values())


def family_of(name: str) -> str:
    """The longest that begins a name."""
    return max((family for family in FAMILIES if name.startswith(f"{family}_")), key=len)


def check(name: str, options: dict[str, Any]) -> None:
    """All of the above, and that two detectors from one seed give the same answers and losses."""
    detector, twin = build(name, options), build(name, options)
    raw = answer(detector)
    assert all(map(torch.equal, tensors(raw), tensors(answer(twin))))
    check_detections(detector, raw)
    check_batches(detector)
    check_file(detector, tensors(raw))
    terms = losses(detector)
    assert terms == losses(twin)
    level = LEVEL.get(family_of(name), ())
    assert not [key for key in check_gradients(detector, terms) if not key.startswith(level)]


def test_all_families_are_here():
    with pytest.raises(ValueError, match="a family of") as error:
        parse_grammar("nothing_resnet10t")
    assert str(error.value).endswith(str(sorted(FAMILIES)))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_on_backbone(family, backbone):
    blocks = (list(FAMILIES).index(family) + list(BACKBONES).index(backbone)) % 2
    check(f"{family}_{backbone}" + "_dyhead1" * blocks, {**FAMILIES[family], **OPTIONS.get(backbone, {})})


@pytest.mark.parametrize("name", settings())
def test_settings_of_names(name):
    """The conventions that each published detector comes with, on a small body of its kind."""
    body = {} if "mobilenet" in name else {"backbone": "test_resnet"}
    detector = build(name, {**FAMILIES[family_of(name)], **body})
    check_detections(detector, answer(detector))
    check_gradients(detector, losses(detector))
