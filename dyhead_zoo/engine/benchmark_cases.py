"""What ``dyhead-zoo benchmark`` compares.

The yardstick for operator and head are dense 3x3 convolutions of the same shapes (``F.conv2d``, float32,
channels_last): they make the same multiply-adds near the machine's peak, so they are a floor. Where numba is installed,
``bag`` does without it, and whatever else is ours uses it.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_zoo.detector import Detector
from dyhead_zoo.engine import benchmark_runtimes
from dyhead_zoo.engine.benchmark import Case, Contestant
from dyhead_zoo.engine.benchmark_data import DETECTORS, PICTURE, data_cases, eval_cases
from dyhead_zoo.engine.benchmark_parts import (
    dense_limit,
    detect,
    detector_step,
    forward,
    frozen_as_trained,
    head_step,
    numba_works,
    operator_inputs,
    random_head,
    random_images,
    random_pyramid,
    stages_of,
    with_autocast,
    with_backward,
    with_dense_convs,
    with_settings,
    without_gradients,
)
from dyhead_zoo.engine.benchmark_torchvision import torchvision_cases
from dyhead_zoo.engine.predict import sample_photo
from dyhead_zoo.factory import create_detector
from dyhead_zoo.layers.dyhead import pack_weights
from dyhead_zoo.ops import modulated_deform_conv2d
from dyhead_zoo.ops.deform_conv import Backend

MAPS = ((64, 64), (100, 168))
IMAGES = ((640, 640), (800, 1344))

USES: dict[str, tuple[str, ...]] = {
    "op": ("size",),
    "head": ("size",),
    "train": ("size",),
    "detector": ("name", "size"),
    "torchvision": ("size",),
    "photo": ("name",),
    "memory": (),
    "data": ("name", "size", "images", "annotations"),
    "eval": (),
}
"""Benchmarks, and what each can be given."""


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
        what: op, head, train, detector, torchvision, photo, data or eval; for memory see ``benchmark_memory``.
        name: of a detector, for detector (with random weights), photo and data.
        size: (height, width) of the maps (op), images (head, train, detector, torchvision) or files (data), if not the
            default ones.
        images, annotations: a COCO-format data set, for data.

    Raises:
        ValueError: ``what`` is unknown, or has no use for something that is given.
    """
    check_use(what, name=name, size=size, images=images, annotations=annotations)
    if what == "op":
        return op_cases([size] if size else MAPS)
    if what == "head":
        return head_cases([size] if size else IMAGES)
    if what == "train":
        return train_cases([size] if size else IMAGES)
    if what == "detector":
        return detector_cases(create_detector(name or "atss_resnet50_dyhead6"), size or IMAGES[0])
    if what == "torchvision":
        return torchvision_cases(size or IMAGES[0])
    if what == "photo":
        return photo_cases(create_detector(name or "atss_lite0_dyhead2", pretrained=True), sample_photo())
    if what == "data":
        names = [name] if name else DETECTORS
        return data_cases(names, size=size or PICTURE, images=images, annotations=annotations)
    return eval_cases()


def check_use(what: str, **given: object) -> None:
    """Raise a ValueError if there is no benchmark ``what``, or if it has no use for something that is not None."""
    if what not in USES:
        raise ValueError(f"unknown benchmark {what!r}: choose {', '.join(USES)}")
    useless = [key for key, value in given.items() if value is not None and key not in USES[what]]
    if useless:
        flag = "NAME" if useless[0] == "name" else f"--{useless[0]}"
        raise ValueError(f"benchmark {what} has no use for {flag}: leave it out")


def op_cases(maps: Sequence[tuple[int, int]] = MAPS, channels: int = 256) -> Iterator[Case]:
    """The deformable convolution: kernel 3x3, stride 1 and 2, batch 1; offsets N(0, 2 pixels), all gradients."""
    for height, width in maps:
        for stride in (1, 2):
            inputs = operator_inputs(height, width, channels, stride)
            x, offset, mask, weight = inputs
            dense = partial(F.conv2d, stride=stride, padding=1)
            deformable = partial(modulated_deform_conv2d, stride=stride, padding=1)
            backends: dict[str, Backend] = {"ours": "auto", **({"bag": "bag"} if numba_works() else {})}
            ours = {name: partial(deformable, backend=backend) for name, backend in backends.items()}
            reference = partial(deformable, backend="torchvision")
            low = (x.bfloat16(), offset, mask, weight.bfloat16())
            contestants: dict[str, Contestant] = {
                "dense": forward(dense, x, weight),
                "dense bf16": forward(dense, low[0], low[3]),
                **{name: forward(operator, *inputs) for name, operator in ours.items()},
                **{f"{name} bf16": forward(operator, *low) for name, operator in ours.items()},
                "torchvision": forward(reference, *inputs),
                **(others := _other_runtimes(*inputs, stride)),
            }
            name = f"{height}x{width}x{channels} stride {stride}"
            pairs = [(own, "dense") for own in ours] + [(f"{own} bf16", "dense") for own in ours]
            pairs += [("dense bf16", "dense"), ("torchvision", "ours")]
            pairs += [(own, other) for other in others for own in ours]
            yield Case(f"{name} forward", contestants, tuple(pairs))
            contestants = {
                "dense": with_backward(dense, x, weight),
                **{name: with_backward(operator, *inputs) for name, operator in ours.items()},
                "torchvision": with_backward(reference, *inputs),
            }
            pairs = [(own, "dense") for own in ours] + [("torchvision", "ours")]
            yield Case(f"{name} forward+backward", contestants, tuple(pairs))


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
            head, features = random_head(blocks, channels).eval(), random_pyramid(height, width, batch, channels)
            modules, reference = (with_settings(head, fused=False, backend=b) for b in ("auto", "torchvision"))
            pack_weights(packed := copy.deepcopy(head))
            contestants = {
                "dense convs": without_gradients(partial(dense_limit, head, features)),
                "fused": without_gradients(partial(head, features)),
                "fused, packed": without_gradients(partial(packed, features)),
                "fused bf16": without_gradients(partial(with_autocast, head, features)),
                "modules": without_gradients(partial(modules, features)),
                "torchvision op": without_gradients(partial(reference, features)),
            }
            subjects = ["fused", "fused, packed", "fused bf16", "modules"]
            if numba_works():
                plain = with_settings(head, backend="bag")
                contestants["fused, bag"] = without_gradients(partial(plain, features))
                subjects.insert(1, "fused, bag")
            pairs = [(name, "dense convs") for name in subjects]
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
        features = random_pyramid(height, width, 1, channels)
        head = random_head(blocks, channels).train()
        checkpointed = with_settings(head, grad_checkpointing=True)
        contestants = {
            "dense convs": head_step(with_dense_convs(head), features),
            "ours": head_step(head, features),
            "checkpointed": head_step(checkpointed, features),
            "torchvision op": head_step(with_settings(head, backend="torchvision"), features),
        }
        pairs = [("ours", "dense convs"), ("checkpointed", "dense convs")]
        if numba_works():
            contestants["bag"] = head_step(with_settings(head, backend="bag"), features)
            pairs.insert(1, ("bag", "dense convs"))
        if reference:
            pairs.append(("torchvision op", "ours"))
        yield Case(f"{height}x{width} step", contestants, tuple(pairs))


def detector_cases(detector: Detector, size: tuple[int, int] = (640, 640), *, steps: bool = True) -> Iterator[Case]:
    """A whole detector: this package at its best against torchvision's operator, unfused, in contiguous format.

    First inference from a padded batch to detections, then its parts as shares of the whole, then a training step with
    random weights, of which those are frozen that the recipe of the name's weights freezes.
    """
    images = random_images(detector, *size)
    ours = copy.deepcopy(detector).fuse()
    theirs = with_settings(copy.deepcopy(detector).eval(), fused=False, backend="torchvision")
    whole = {
        "ours": without_gradients(partial(detect, ours, images, channels_last=True)),
        "torchvision op": without_gradients(partial(detect, theirs, images)),
    }
    pairs = [("torchvision op", "ours")]
    if numba_works():
        plain = with_settings(ours, backend="bag")
        pack_weights(plain)
        whole["ours, bag"] = without_gradients(partial(detect, plain, images, channels_last=True))
        pairs.append(("torchvision op", "ours, bag"))
    name = f"{detector.name} {size[0]}x{size[1]}"
    yield Case(f"{name} inference", whole, tuple(pairs))
    for label, part in (("ours", ours), ("torchvision op", theirs)):
        stages = stages_of(part, images, channels_last=label == "ours") | {"whole": whole[label]}
        yield Case(f"{name} {label}", stages, tuple((stage, "whole") for stage in stages if stage != "whole"))
    if steps:
        trained = create_detector(detector.name, **frozen_as_trained(detector)).train()
        ours = copy.deepcopy(trained).to(memory_format=torch.channels_last)
        theirs = with_settings(trained, backend="torchvision")
        training = {"ours": detector_step(ours, images), "torchvision op": detector_step(theirs, images)}
        if numba_works():
            training["ours, bag"] = detector_step(with_settings(ours, backend="bag"), images)
        yield Case(f"{name} training step", training, tuple(pairs))


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
        **stages_of(detector, batch.images, batch.image_sizes),
        "predict": lambda: detector.predict(photo),
        "predict, fused": lambda: fused.predict(photo),
    }
    pairs = tuple((stage, "predict") for stage in stages if stage != "predict")
    yield Case(f"{detector.name} {photo.name}", stages, pairs)
