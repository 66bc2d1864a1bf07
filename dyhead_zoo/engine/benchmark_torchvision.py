"""Our detectors beside torchvision's own, with the same weights, from a picture to detections.

The weights are random, but scaled so that proposals, scores and boxes spread as those of a trained detector do:
otherwise suppression would have nothing to do, or all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection

from dyhead_zoo.convert.torchvision import convert_torchvision
from dyhead_zoo.detector import Detector
from dyhead_zoo.engine.benchmark import Case, Contestant
from dyhead_zoo.engine.benchmark_parts import random_images, without_gradients
from dyhead_zoo.factory import create_detector
from dyhead_zoo.structures import Detections

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "faster_rcnn_resnet50.torchvision_coco": detection.fasterrcnn_resnet50_fpn,
    "mask_rcnn_resnet50.torchvision_coco": detection.maskrcnn_resnet50_fpn,
}
"""Our name, which says that the variant is torchvision's, and torchvision's builder."""


def torchvision_cases(size: tuple[int, int] = (640, 640)) -> Iterator[Case]:
    """Inference on one picture of that (height, width): ours as built, ours fused, and torchvision's."""
    for name in BUILDERS:
        theirs, ours = same_weights(name, size)
        picture = random_images(ours, *size)
        fused = create_detector(name)
        fused.load_state_dict(ours.state_dict())
        contestants = {
            "ours": _ours(ours, picture),
            "ours fused": _ours(fused.fuse(), picture),
            "torchvision": _theirs(theirs, picture),
        }
        pairs = (("ours", "torchvision"), ("ours fused", "torchvision"))
        yield Case(f"{name.partition('.')[0]} {size[0]}x{size[1]}", contestants, pairs)


def torchvision_work(name: str, contestant: str, size: tuple[int, int]) -> Contestant:
    """One of the contestants ``ours`` and ``torchvision`` alone, for what they hold in memory."""
    theirs, ours = same_weights(name, size)
    picture = random_images(ours, *size)
    return _ours(ours, picture) if contestant == "ours" else _theirs(theirs, picture)


def same_weights(name: str, size: tuple[int, int]) -> tuple[nn.Module, Detector]:
    """torchvision's detector and ours, in evaluation mode, with the same random weights.

    Args:
        name: one of ``BUILDERS``.
        size: (height, width) of the pictures, which torchvision's detector is not to resize.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs: Any = BUILDERS[name](weights=None, weights_backbone=None, min_size=min(size), max_size=max(size)).eval()
        _spread(theirs, torch.randn(1, 3, *size))
        ours = create_detector(name).eval()
        known = {0, *ours.label_space.category_ids}
        scores = theirs.roi_heads.box_predictor.cls_score
        with torch.no_grad():  # nobody trained the rows of ids that COCO has no class for; ours does not show them
            scores.bias[[row for row in range(len(scores.bias)) if row not in known]] = -100
    ours.load_state_dict(convert_torchvision(theirs.state_dict()))
    return theirs, ours


@torch.no_grad()
def _spread(detector: Any, pictures: Tensor) -> None:
    """Scale the weights of a detector of torchvision's: features, objectness, scores and deltas of ordinary size.

    Every level of the pyramid has a convolution of its own, scaled by its own features; what follows is shared.
    """
    height, width = pictures.shape[2:]
    levels = detector.backbone(pictures).values()  # and one more, made from the last
    for layer, level in zip(detector.backbone.fpn.layer_blocks, levels, strict=False):
        layer[0].weight.div_(level.std())
    features = detector.backbone(pictures)
    objectness, deltas = (torch.cat([x.flatten() for x in each]) for each in detector.rpn.head(list(features.values())))
    detector.rpn.head.cls_logits.weight.div_(objectness.std())
    detector.rpn.head.bbox_pred.weight.div_(4 * deltas.std())
    heads = detector.roi_heads
    corners = torch.rand(60, 2) * torch.tensor([0.75 * width, 0.75 * height])
    regions = torch.cat((corners, corners + torch.tensor([0.2 * width, 0.2 * height])), dim=1)
    scores, boxes = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, [regions], [(height, width)])))
    heads.box_predictor.cls_score.weight.div_(0.5 * scores.std())
    heads.box_predictor.bbox_pred.weight.div_(2 * boxes.std())


def _ours(detector: Detector, picture: Tensor) -> Contestant:
    """From a picture (1, 3, H, W) to detections, with masks, where there are any, of the size of the picture."""

    def work() -> Detections:
        (found,) = detector.decode(detector(picture))
        if found.masks is not None:
            found.paste(picture.shape[2], picture.shape[3])
        return found

    return without_gradients(work)


def _theirs(detector: nn.Module, picture: Tensor) -> Contestant:
    return without_gradients(partial(detector, [picture[0] / 255]))
