"""What ``dyhead-zoo benchmark`` compares.

The yardstick for operator and head are dense 3x3 convolutions of the same shapes (``F.conv2d``, float32,
channels_last): they make the same multiply-adds near the machine's peak, so they are a floor.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_zoo.detector import Detector, TrainStep
from dyhead_zoo.engine import benchmark_runtimes
from dyhead_zoo.engine.benchmark import Case, Contestant
from dyhead_zoo.engine.benchmark_data import DETECTORS, PICTURE, data_cases, eval_cases
from dyhead_zoo.engine.predict import sample_photo
from dyhead_zoo.factory import create_detector
from dyhead_zoo.layers.dyhead import DeformConv3x3, DyHead
from dyhead_zoo.ops import modulated_deform_conv2d

Module = TypeVar("Module", bound=nn.Module)

STRIDES = (8, 16, 32, 64, 128)
MAPS = ((64, 64), (100, 168))
IMAGES = ((640, 640), (800, 1344))

USES: dict[str, tuple[str, ...]] = {
    "op": ("--size",),
    "head": ("--size",),
    "train": ("--size",),
    "detector": ("NAME", "--size"),
    "photo": ("NAME",),
    "data": ("NAME", "--size", "--images", "--annotations"),
    "eval": (),
}
"""Benchmarks, and what each can be given."""

_randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))


def cases(
    what: str,
    name: str | None = None,
    *,
    size: tuple[int, int] | None = None,
    images: Path | None = None,
    annotations: Path | None = None,
) -> Iterator[Case]:
    """The cases of one verb of the command line.

    Args:
        what: op, head, train, detector, photo, data or eval.
        name: of a detector, for detector (with random weights), photo and data.
        size: (height, width) of the maps (op), images (head, train, detector) or files (data), if not the default ones.
        images, annotations: a COCO-format data set, for data.

    Raises:
        ValueError: ``what`` is unknown, or has no use for something that is given.
    """
    if what not in USES:
        raise ValueError(f"unknown benchmark {what!r}: choose {', '.join(USES)}")
    given = {"NAME": name, "--size": size, "--images": images, "--annotations": annotations}
    if useless := [key for key, value in given.items() if value is not None and key not in USES[what]]:
        raise ValueError(f"benchmark {what} has no use for {useless[0]}: leave it out")
    if what == "op":
        return op_cases([size] if size else MAPS)
    if what == "head":
        return head_cases([size] if size else IMAGES)
    if what == "train":
        return train_cases([size] if size else IMAGES)
    if what == "detector":
        return detector_cases(create_detector(name or "atss_resnet50_dyhead6"), size or IMAGES[0])
    if what == "photo":
        return photo_cases(create_detector(name or "atss_lite0_dyhead2", pretrained=True), sample_photo())
    if what == "data":
        names = [name] if name else DETECTORS
        return data_cases(names, size=size or PICTURE, images=images, annotations=annotations)
    return eval_cases()


def op_cases(maps: Sequence[tuple[int, int]] = MAPS, channels: int = 256) -> Iterator[Case]:
    """The deformable convolution: kernel 3x3, stride 1 and 2, batch 1; offsets N(0, 2 pixels), all gradients."""
    for height, width in maps:
        for stride in (1, 2):
            x = _randn(1, channels, height, width).contiguous(memory_format=torch.channels_last)
            weight = _randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
            out_size = (-(-height // stride), -(-width // stride))
            offset, mask = 2 * _randn(1, 18, *out_size), _randn(1, 9, *out_size).sigmoid()
            dense = partial(F.conv2d, stride=stride, padding=1)
            deformable = partial(modulated_deform_conv2d, stride=stride, padding=1)
            bag, reference = (partial(deformable, backend=backend) for backend in ("bag", "torchvision"))
            inputs, low = (x, offset, mask, weight), (x.bfloat16(), offset, mask, weight.bfloat16())
            contestants: dict[str, Contestant] = {
                "dense": _forward(dense, x, weight),
                "dense bf16": _forward(dense, low[0], low[3]),
                "bag": _forward(bag, *inputs),
                "bag bf16": _forward(bag, *low),
                "torchvision": _forward(reference, *inputs),
            }
            name = f"{height}x{width}x{channels} stride {stride}"
            pairs = (("bag", "dense"), ("bag bf16", "dense"), ("dense bf16", "dense"), ("torchvision", "bag"))
            contestants |= (others := _other_runtimes(*inputs, stride))
            yield Case(f"{name} forward", contestants, pairs + tuple(("bag", other) for other in others))
            contestants = {
                "dense": _with_backward(dense, x, weight),
                "bag": _with_backward(bag, *inputs),
                "torchvision": _with_backward(reference, *inputs),
            }
            yield Case(f"{name} forward+backward", contestants, (("bag", "dense"), ("torchvision", "bag")))


def _other_runtimes(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, stride: int) -> dict[str, Contestant]:
    """onnxruntime's (with onnx) and OpenVINO's deformable convolution, on one thread, where they are installed."""
    needs = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino",)}
    return {
        name: getattr(benchmark_runtimes, name)(x, offset, mask, weight, stride)
        for name, packages in needs.items()
        if all(importlib.util.find_spec(package) for package in packages)
    }


def head_cases(
    images: Sequence[tuple[int, int]] = IMAGES, batches: Sequence[int] = (1, 4), blocks: int = 6, channels: int = 256
) -> Iterator[Case]:
    """DyHead's inference on the pyramid of an image, against its convolutions alone, as dense ones."""
    for height, width in images:
        for batch in batches:
            head, features = _head(blocks, channels).eval(), _pyramid(height, width, batch, channels)
            modules, reference = (_with_settings(head, fused=False, backend=b) for b in ("auto", "torchvision"))
            contestants = {
                "dense convs": _without_gradients(partial(_dense_limit, head, features)),
                "fused": _without_gradients(partial(head, features)),
                "fused bf16": _without_gradients(partial(_autocast, head, features)),
                "modules": _without_gradients(partial(modules, features)),
                "torchvision op": _without_gradients(partial(reference, features)),
            }
            pairs = tuple((name, "dense convs") for name in ("fused", "fused bf16", "modules"))
            yield Case(f"{height}x{width} batch {batch}", contestants, (*pairs, ("torchvision op", "fused")))


def train_cases(
    images: Sequence[tuple[int, int]] = IMAGES, blocks: int = 6, channels: int = 256, *, reference: bool = False
) -> Iterator[Case]:
    """One forward and backward pass of DyHead, against the same head with dense convolutions in its place.

    Args:
        images: sizes, (height, width) in pixels.
        blocks: of the head.
        channels: of the pyramid.
        reference: also with torchvision's operator, which takes minutes.
    """
    for height, width in images:
        features = _pyramid(height, width, 1, channels)
        head = _head(blocks, channels).train()
        checkpointed = _with_settings(head, grad_checkpointing=True)
        contestants = {
            "dense convs": _step(_with_dense_convs(head), features),
            "bag": _step(head, features),
            "checkpointed": _step(checkpointed, features),
            "torchvision op": _step(_with_settings(head, backend="torchvision"), features),
        }
        pairs = [("bag", "dense convs"), ("checkpointed", "dense convs")]
        if reference:
            pairs.append(("torchvision op", "bag"))
        yield Case(f"{height}x{width} step", contestants, tuple(pairs))


def detector_cases(detector: Detector, size: tuple[int, int] = (640, 640), *, steps: bool = True) -> Iterator[Case]:
    """A whole detector: this package at its best against torchvision's operator, unfused, in contiguous format.

    First inference from a padded batch to detections, then its parts as shares of the whole, then a training step.
    """
    images = torch.randint(0, 256, (1, detector.in_chans, *size), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    ours = copy.deepcopy(detector).fuse()
    theirs = _with_settings(copy.deepcopy(detector).eval(), fused=False, backend="torchvision")
    whole = {
        "ours": _without_gradients(partial(_detect, ours, images, channels_last=True)),
        "torchvision op": _without_gradients(partial(_detect, theirs, images)),
    }
    name = f"{detector.name} {size[0]}x{size[1]}"
    yield Case(f"{name} inference", whole, (("torchvision op", "ours"),))
    for label, part in (("ours", ours), ("torchvision op", theirs)):
        stages = _stages(part, images, channels_last=label == "ours") | {"whole": whole[label]}
        yield Case(f"{name} {label}", stages, tuple((stage, "whole") for stage in stages if stage != "whole"))
    if steps:
        target = {"boxes": torch.tensor([[10.0, 20.0, size[1] / 2, size[0] / 2]]), "labels": torch.tensor([0])}
        sizes = torch.tensor([size])
        ours = copy.deepcopy(detector).train().to(memory_format=torch.channels_last)
        theirs = _with_settings(copy.deepcopy(detector).train(), backend="torchvision")
        training: dict[str, Contestant] = {
            label: partial(_train_step, TrainStep(part), images, sizes, target)
            for label, part in (("ours", ours), ("torchvision op", theirs))
        }
        yield Case(f"{name} training step", training, (("torchvision op", "ours"),))


def photo_cases(detector: Detector, photo: Path) -> Iterator[Case]:
    """From a JPEG to boxes: the whole of ``Detector.predict``, what each stage takes of it, and the whole if fused."""
    from dyhead_zoo.data import prepare_images, read_image

    detector = detector.eval()
    fused = copy.deepcopy(detector).fuse()
    picture = read_image(photo)
    ((_, batch),) = prepare_images([picture], detector.pretrained_cfg, 1)
    stages = {
        "read": lambda: read_image(photo),
        "resize": lambda: list(prepare_images([picture], detector.pretrained_cfg, 1)),
        **_stages(detector, batch.images, batch.image_sizes),
        "predict": lambda: detector.predict(photo),
        "predict, fused": lambda: fused.predict(photo),
    }
    pairs = tuple((stage, "predict") for stage in stages if stage != "predict")
    yield Case(f"{detector.name} {photo.name}", stages, pairs)


# -- parts of the cases ------------------------------------------------------------------------------------------------


def _forward(operator: Callable[..., Tensor], *inputs: Tensor) -> Contestant:
    return _without_gradients(partial(operator, *inputs))


def _with_backward(operator: Callable[..., Tensor], *inputs: Tensor) -> Contestant:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    grad_out = torch.ones_like(operator(*inputs))
    return lambda: torch.autograd.grad(operator(*leaves), leaves, grad_out)


def _without_gradients(work: Contestant) -> Contestant:
    return torch.no_grad()(work)


def _autocast(module: nn.Module, *inputs: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return module(*inputs)


def _head(blocks: int, channels: int) -> DyHead:
    """With random weights everywhere: offsets of some pixels, gates that differ."""
    head = DyHead(channels, num_blocks=blocks, coarse_offsets="reinterpret")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(_randn(parameter.shape), alpha=0.02 if parameter.dim() > 1 else 0.1)
    return head.to(memory_format=torch.channels_last)


def _pyramid(height: int, width: int, batch: int, channels: int) -> list[Tensor]:
    sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    return [_randn(batch, channels, *size).contiguous(memory_format=torch.channels_last) for size in sizes]


def _with_settings(module: Module, **settings: Any) -> Module:
    """A copy whose heads and deformable convolutions have other attributes."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, (DyHead, DeformConv3x3)):
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


def _with_dense_convs(head: DyHead) -> DyHead:
    head = copy.deepcopy(head)
    for block in head.blocks:
        for name in ("conv_mid", "conv_low", "conv_high"):
            spatial = cast(nn.Module, block.spatial)
            setattr(spatial, name, _DenseConv(getattr(spatial, name)))
    return head


def _dense_limit(head: DyHead, features: Sequence[Tensor]) -> None:
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


def _step(head: DyHead, features: Sequence[Tensor]) -> Contestant:
    leaves = [*(x.detach().requires_grad_() for x in features)]

    def step() -> None:
        outputs = head(leaves)
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
        head.zero_grad()

    return step


def _detect(detector: Detector, images: Tensor, *, channels_last: bool = False) -> Any:
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return detector.decode(detector(images))


def _train_step(step: TrainStep, images: Tensor, sizes: Tensor, target: Any) -> None:
    torch.stack(list(step(images, sizes, [target]).values())).sum().backward()
    step.zero_grad()


@torch.no_grad()
def _stages(
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
    raw = cast(Any, detector.head)(features, given, canvas)
    stages: dict[str, Contestant] = {
        "normalise": partial(detector.normalise, images, sizes),
        "backbone": partial(detector.backbone, x),
        "FPN": partial(neck.levels, levels),
        "head": partial(cast(Any, detector.head), features, given, canvas),
        "decode": partial(detector.decode, raw),
    }
    if neck.dyhead is not None:
        stages["DyHead"] = partial(neck.dyhead, pyramid)
    return {name: _without_gradients(stage) for name, stage in stages.items()}
