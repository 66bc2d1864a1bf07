"""What the benchmarks are put together from: operators, heads and detectors with random weights, ready to be called.

Tensors are float32 in channels-last format unless something else is said.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_zoo.detector import Detector, TrainStep
from dyhead_zoo.engine.benchmark import Contestant
from dyhead_zoo.layers.dyhead import DeformConv3x3, DyHead
from dyhead_zoo.models.reppoints import PointConv
from dyhead_zoo.ops.deform_conv_samples import compiled_loops

Module = TypeVar("Module", bound=nn.Module)

STRIDES = (8, 16, 32, 64, 128)

_randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))


def numba_works() -> bool:
    """Whether deformable convolutions in float32 use it, so that doing without it is something else."""
    return compiled_loops(torch.float32) is not None


class OperatorInputs(NamedTuple):
    """What a modulated deformable convolution takes, in its order."""

    x: Tensor
    offset: Tensor
    mask: Tensor
    weight: Tensor


def operator_inputs(height: int, width: int, channels: int, stride: int = 1) -> OperatorInputs:
    """For kernel 3x3, padding 1 and batch 1; offsets are N(0, 2 pixels)."""
    x = _randn(1, channels, height, width).contiguous(memory_format=torch.channels_last)
    weight = _randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    out_size = (-(-height // stride), -(-width // stride))
    return OperatorInputs(x, 2 * _randn(1, 18, *out_size), _randn(1, 9, *out_size).sigmoid(), weight)


def forward(operator: Callable[..., Tensor], *inputs: Tensor) -> Contestant:
    """An operator without gradients."""
    return without_gradients(partial(operator, *inputs))


def with_backward(operator: Callable[..., Tensor], *inputs: Tensor) -> Contestant:
    """An operator and the gradients of all its inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    grad_out = torch.ones_like(operator(*inputs))
    return lambda: torch.autograd.grad(operator(*leaves), leaves, grad_out)


def without_gradients(work: Contestant) -> Contestant:
    """The same work as inference does it."""
    return torch.no_grad()(work)


def with_autocast(module: nn.Module, *inputs: Any) -> Any:
    """A module in bfloat16 where autocast says so."""
    with torch.autocast("cpu", torch.bfloat16):
        return module(*inputs)


def random_head(blocks: int, channels: int) -> DyHead:
    """A DyHead with random weights everywhere: offsets of some pixels, gates that differ."""
    head = DyHead(channels, num_blocks=blocks, coarse_offsets="reinterpret")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(_randn(parameter.shape), alpha=0.02 if parameter.dim() > 1 else 0.1)
    return head.to(memory_format=torch.channels_last)


def random_pyramid(height: int, width: int, batch: int, channels: int) -> list[Tensor]:
    """Features (batch, channels, H_l, W_l) of an image of (height, width), for each of ``STRIDES``."""
    sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    return [_randn(batch, channels, *size).contiguous(memory_format=torch.channels_last) for size in sizes]


def with_settings(module: Module, **settings: Any) -> Module:
    """A copy whose heads and deformable convolutions have other attributes."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, (DyHead, DeformConv3x3, PointConv)):
            for name in settings.keys() & vars(part).keys():
                setattr(part, name, settings[name])
    return module


class _DenseConv(nn.Module):
    """A dense convolution with the weights of a deformable one; takes offsets and masks, and ignores them."""

    def __init__(self, conv: DeformConv3x3) -> None:
        super().__init__()
        self.weight, self.bias, self.stride = conv.weight, conv.bias, conv.stride

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, padding=1)


def with_dense_convs(head: DyHead) -> DyHead:
    """A copy whose deformable convolutions are dense ones."""
    head = copy.deepcopy(head)
    for block in head.blocks:
        for name in ("conv_mid", "conv_low", "conv_high"):
            spatial = cast(nn.Module, block.spatial)
            setattr(spatial, name, _DenseConv(getattr(spatial, name)))
    return head


def dense_limit(head: DyHead, features: Sequence[Tensor]) -> None:
    """The convolutions of all blocks as dense ones, and nothing else."""
    for block in head.blocks:
        spatial: Any = block.spatial
        for level, x in enumerate(features):
            spatial.offset(x)
            F.conv2d(x, spatial.conv_mid.weight, padding=1)
            if level > 0:
                F.conv2d(features[level - 1], spatial.conv_low.weight, stride=2, padding=1)
            if level + 1 < len(features):
                F.conv2d(features[level + 1], spatial.conv_high.weight, padding=1)


def head_step(head: DyHead, features: Sequence[Tensor]) -> Contestant:
    """One forward and backward pass, with gradients of all features and parameters."""
    leaves = [*(x.detach().requires_grad_() for x in features)]

    def step() -> None:
        outputs = head(leaves)
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
        head.zero_grad()
        for leaf in leaves:
            leaf.grad = None

    return step


def detect(detector: Detector, images: Tensor, *, channels_last: bool = False) -> Any:
    """Images (B, C, H, W) to detections."""
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return detector.decode(detector(images))


def random_images(detector: Detector, height: int, width: int) -> Tensor:
    """One image (1, C, height, width) uint8."""
    size = (1, detector.in_chans, height, width)
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def frozen_as_trained(detector: Detector) -> dict[str, Any]:
    """What the recipe of the weights of this name freezes, as arguments of ``create_detector``; empty without any."""
    arch = detector.pretrained_cfg.arch
    return {key: arch[key] for key in ("frozen_stages", "norm_eval", "freeze_norm") if key in arch}


def detector_step(detector: Detector, images: Tensor) -> Contestant:
    """One training step without the optimiser: forward, loss with one object in the image, backward."""
    step, height, width = TrainStep(detector), images.shape[2], images.shape[3]
    target: Any = {"boxes": torch.tensor([[10.0, 20.0, width / 2, height / 2]]), "labels": torch.tensor([0])}

    def work() -> None:
        torch.stack(list(step(images, torch.tensor([[height, width]]), [target]).values())).sum().backward()
        step.zero_grad()

    return work


@torch.no_grad()
def stages_of(
    detector: Detector, images: Tensor, sizes: Tensor | None = None, *, channels_last: bool = False
) -> dict[str, Contestant]:
    """The parts of a detector, each on what the parts before it gave."""
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    given = torch.tensor([images.shape[-2:]]) if sizes is None else sizes
    canvas = (images.shape[2], images.shape[3])
    neck: Any = detector.neck
    x = detector.normalise(images, sizes)
    levels = detector.backbone(x)
    pyramid = neck.levels(levels)
    features = neck(levels)
    head = cast(Any, detector.head)
    raw = head(features, given, canvas)
    stages: dict[str, Contestant] = {
        "normalise": partial(detector.normalise, images, sizes),
        "backbone": partial(detector.backbone, x),
        "FPN": partial(neck.levels, levels),
    }
    if neck.dyhead is not None:
        stages["DyHead"] = partial(neck.dyhead, pyramid)
    stages |= {"head": partial(head, features, given, canvas), "decode": partial(detector.decode, raw)}
    return {name: without_gradients(stage) for name, stage in stages.items()}
