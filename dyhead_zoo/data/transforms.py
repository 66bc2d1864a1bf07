"""Resizing and augmentation of pictures (3, H, W) uint8 with boxes (N, 4) xyxy, labels (N,) and masks (N, H, W).

Nothing here has state or touches a global random generator: the same ``torch.Generator`` state gives the same sample.
Pictures stay uint8 and are resized once, after cropping, so that no pixel is computed that is not used. Masks follow
where there are any; boxes stay those of the annotations, cut at borders, whatever a crop has left of the mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dyhead_zoo.structures import Sample

MIN_SIDE = 2.0
"""Boxes that augmentation has made narrower than this many pixels are dropped."""
MIN_VISIBLE = 0.2
"""Boxes of which a crop has left less than this share of the area are dropped."""
FILL = 114
"""Grey of what no picture of a mosaic covers, as in YOLO."""


class Source(Protocol):
    """Where samples come from, e.g. a ``CocoDataset``."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


class BatchPlan(NamedTuple):
    """What all images of a global batch share: the canvas (height, width) and, for multi-scale recipes, the scale."""

    canvas: tuple[int, int]
    short_side: int | None = None


class TrainTransform(Protocol):
    """A training recipe.

    ``plan`` draws what a global batch shares from the upright sizes (height, width) of its images; calling the recipe
    makes one sample that fits the plan's canvas. ``group_by_aspect`` asks the loader for batches of alike shapes.
    """

    group_by_aspect: ClassVar[bool]

    def plan(self, sizes: Sequence[tuple[int, int]], generator: torch.Generator) -> BatchPlan: ...
    def __call__(
        self, source: Source, index: int, generator: torch.Generator, plan: BatchPlan | None = None
    ) -> Sample: ...


# ------------------------------------------------------------------------------------------------- resizing and padding


def protocol_size(
    height: int, width: int, short_side: int, long_side: int, rounding: str = "half_up"
) -> tuple[int, int]:
    """Size of a picture after resizing, keeping its aspect ratio.

    The scale is ``min(long_side / max(h, w), short_side / min(h, w))``; sides become ``int(x * scale + 0.5)`` for
    ``half_up`` (mmcv ``rescale_size``, detectron2) or ``int(x * scale)`` for ``floor`` (torchvision), at least 1.

    Returns:
        (height, width).

    Raises:
        ValueError: for an unknown ``rounding``.
    """
    if rounding not in ("half_up", "floor"):
        raise ValueError(f"rounding={rounding!r}: one of 'half_up', 'floor'")
    scale = min(long_side / max(height, width), short_side / min(height, width))
    bias = 0.5 if rounding == "half_up" else 0.0
    return max(int(height * scale + bias), 1), max(int(width * scale + bias), 1)


def resize(image: Tensor, height: int, width: int, interpolation: str = "bilinear", antialias: bool = True) -> Tensor:
    """Resize (3, H, W) uint8 to (3, height, width); ``interpolation`` is a name of torchvision's, e.g. ``bicubic``."""
    if image.shape[1:] == (height, width):
        return image
    mode = InterpolationMode(interpolation)
    if width == 1:  # torch 2.15's uint8 kernel mixes up channels and rows when the result is one pixel wide
        result = F.resize_image(image.float(), [height, width], interpolation=mode, antialias=antialias)
        return result.round_().clamp_(0, 255).to(torch.uint8)
    return F.resize_image(image, [height, width], interpolation=mode, antialias=antialias)


def resize_to_protocol(
    image: Tensor,
    short_side: int,
    long_side: int,
    interpolation: str = "bilinear",
    antialias: bool = True,
    rounding: str = "half_up",
) -> Tensor:
    """Resize (3, H, W) uint8 as a ``PretrainedCfg`` says; see ``protocol_size``."""
    height, width = protocol_size(image.shape[1], image.shape[2], short_side, long_side, rounding)
    return resize(image, height, width, interpolation, antialias)


def pad_and_stack(images: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Pictures (3, H, W) of different sizes to (B, 3, height, width), with zeros at the right and bottom."""
    batch = images[0].new_zeros((len(images), 3, height, width))
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch


def round_up(size: tuple[int, int], divisor: int) -> tuple[int, int]:
    """Both sides to the next multiple of ``divisor``."""
    return -(-size[0] // divisor) * divisor, -(-size[1] // divisor) * divisor


def resize_masks(masks: Tensor, height: int, width: int) -> Tensor:
    """Resize (N, H, W) bool to (N, height, width): pixels of which half or more is covered."""
    if not len(masks):
        return masks.new_zeros(0, height, width)
    return resize(masks.to(torch.uint8) * 255, height, width) >= 128


def scale_boxes(boxes: Tensor, from_size: tuple[int, int], to_size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) of a picture of (height, width) ``from_size``, after it was resized to ``to_size``."""
    scale = boxes.new_tensor([to_size[1] / from_size[1], to_size[0] / from_size[0]]).repeat(2)
    limit = boxes.new_tensor([to_size[1], to_size[0]]).repeat(2)
    return torch.minimum(boxes * scale, limit)


# --------------------------------------------------------------------------------------------------- pure augmentations


def flip_horizontal(sample: Sample) -> Sample:
    """Mirror left and right."""
    image, boxes, labels, masks = sample
    width = image.shape[2]
    boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    return Sample(image.flip(2), boxes, labels, None if masks is None else masks.flip(2))


def clip_boxes(boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Clip to the picture, and say what is worth keeping.

    Returns:
        The boxes (N, 4), and (N,) bool: neither narrower than ``MIN_SIDE`` nor left with less than ``MIN_VISIBLE`` of
        the area.
    """
    limit = boxes.new_tensor([width, height, width, height])
    clipped = torch.minimum(boxes, limit).clamp(min=0)
    sides, before = clipped[:, 2:] - clipped[:, :2], boxes[:, 2:] - boxes[:, :2]
    return clipped, (sides >= MIN_SIDE).all(1) & (sides.prod(1) >= MIN_VISIBLE * before.prod(1))


def crop_and_resize(sample: Sample, window: tuple[int, int, int, int], height: int, width: int) -> Sample:
    """Cut ``window`` = (top, left, height, width) out of the picture and resize it to (height, width).

    Objects of which too little is left are dropped, see ``clip_boxes``.
    """
    image, boxes, labels, masks = sample
    top, left, window_height, window_width = window
    rows, columns = slice(top, top + window_height), slice(left, left + window_width)
    scale = boxes.new_tensor([width / window_width, height / window_height]).repeat(2)
    boxes, keep = clip_boxes((boxes - boxes.new_tensor([left, top, left, top])) * scale, height, width)
    if masks is not None:
        masks = resize_masks(masks[:, rows, columns][keep], height, width)
    return Sample(resize(image[:, rows, columns], height, width), boxes[keep], labels[keep], masks)


def random_scale_crop(
    sample: Sample,
    canvas: tuple[int, int],
    scale: tuple[float, float],
    generator: torch.Generator,
    reference: tuple[int, int] | None = None,
) -> Sample:
    """Large-scale jitter (Ghiasi et al., "Simple Copy-Paste", 2021, section 3.1): a random scale, then a random crop.

    The picture is scaled by ``u * min(H / h, W / w)`` with ``u`` uniform in ``scale`` and (H, W) the ``reference``, by
    default the canvas: at 1 it just fits. What passes the canvas is cropped at a random place; a smaller picture stays
    small, so the result is at most as large as the canvas.
    """
    height, width = sample.image.shape[1:]
    fit_height, fit_width = reference or canvas
    ratio = _uniform(generator, *scale) * min(fit_height / height, fit_width / width)
    top, window_height, out_height = _random_span(height, canvas[0], ratio, generator)
    left, window_width, out_width = _random_span(width, canvas[1], ratio, generator)
    return crop_and_resize(sample, (top, left, window_height, window_width), out_height, out_width)


def mosaic(
    samples: Sequence[Sample], canvas: tuple[int, int], scale: tuple[float, float], generator: torch.Generator
) -> Sample:
    """Four pictures around a random centre (YOLOv4, Bochkovskiy et al., 2020, section 3.4).

    Each is scaled relative to the *whole* canvas, as in ``random_scale_crop``, and cropped to its quarter, so objects
    keep the sizes that they have without mosaic.

    Raises:
        ValueError: unless there are four samples.
    """
    if len(samples) != 4:
        raise ValueError(f"a mosaic takes four samples, not {len(samples)}")
    height, width = canvas
    centre_y = round(height * _uniform(generator, 0.3, 0.7))
    centre_x = round(width * _uniform(generator, 0.3, 0.7))
    image = samples[0].image.new_full((3, height, width), FILL)
    parts = []
    for k, sample in enumerate(samples):
        top, bottom = (0, centre_y) if k < 2 else (centre_y, height)
        left, right = (0, centre_x) if k % 2 == 0 else (centre_x, width)
        part = random_scale_crop(sample, (bottom - top, right - left), scale, generator, reference=canvas)
        rows, columns = slice(top, top + part.image.shape[1]), slice(left, left + part.image.shape[2])
        image[:, rows, columns] = part.image
        masks = None
        if part.masks is not None:
            masks = part.masks.new_zeros(len(part.masks), height, width)
            masks[:, rows, columns] = part.masks
        parts.append(part._replace(boxes=part.boxes + part.boxes.new_tensor([left, top, left, top]), masks=masks))
    masks = torch.cat([p.masks for p in parts if p.masks is not None]) if parts[0].masks is not None else None
    return Sample(image, torch.cat([p.boxes for p in parts]), torch.cat([p.labels for p in parts]), masks)


def distort_colour(image: Tensor, generator: torch.Generator) -> Tensor:
    """Random brightness, contrast, saturation and hue as one linear map of RGB: (3, H, W) uint8 to the same.

    The ranges are those of SSD (Liu et al., 2016): brightness +-32 levels, contrast and saturation 0.5 to 1.5, hue
    +-18 degrees, here a rotation in the chrominance plane of YIQ, which makes all four one 3 x 3 matrix.
    """
    brightness = _uniform(generator, -32, 32)
    contrast, saturation = _uniform(generator, 0.5, 1.5), _uniform(generator, 0.5, 1.5)
    angle = _uniform(generator, -math.pi / 10, math.pi / 10)
    chroma = saturation * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turn = torch.eye(3)
    turn[1:, 1:] = chroma
    matrix = contrast * torch.linalg.inv(_RGB_TO_YIQ) @ turn @ _RGB_TO_YIQ
    pixels = image.reshape(3, -1).float()
    centre = 128 * (1 - contrast) + brightness  # contrast about mid-grey, which the colour turn leaves in place
    return (matrix @ pixels).add_(centre + 0.5).clamp_(0, 255).to(torch.uint8).view_as(image)


_RGB_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def _random_span(length: int, room: int, ratio: float, generator: torch.Generator) -> tuple[int, int, int]:
    """Along one axis: (start, length) of the window in source pixels, and its length after scaling, within ``room``."""
    scaled = max(round(length * ratio), 1)
    if scaled <= room:
        return 0, length, scaled
    window = min(max(round(room / ratio), 1), length)
    return _integer(generator, length - window), window, room


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _integer(generator: torch.Generator, high: int) -> int:
    """Uniform in 0..high, both included."""
    return int(torch.randint(high + 1, (), generator=generator))


# -------------------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class StandardTrain:
    """The recipe of the long schedules: multi-scale resizing with one scale per global batch, and a flip.

    Attributes:
        short_sides: one is drawn per global batch.
        long_side: limit of the longer side.
        flip: probability of a horizontal flip.
    """

    short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    long_side: int = 1333
    flip: float = 0.5
    group_by_aspect: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.short_sides or min(self.short_sides) < 1 or self.long_side < 1:
            raise ValueError(
                f"short_sides={self.short_sides}, long_side={self.long_side}: sides must be at least 1 pixel"
            )
        _check_probabilities(flip=self.flip)

    def plan(self, sizes: Sequence[tuple[int, int]], generator: torch.Generator) -> BatchPlan:
        """Draw the scale; the canvas is the smallest that holds every image of the global batch."""
        short_side = self.short_sides[_integer(generator, len(self.short_sides) - 1)]
        resized = [protocol_size(height, width, short_side, self.long_side) for height, width in sizes]
        return BatchPlan((max(size[0] for size in resized), max(size[1] for size in resized)), short_side)

    def __call__(self, source: Source, index: int, generator: torch.Generator, plan: BatchPlan | None = None) -> Sample:
        """One sample; without a plan the scale is drawn from the generator too."""
        sample = source[index]
        size = sample.image.shape[1], sample.image.shape[2]
        short_side = plan.short_side if plan is not None else self.plan([size], generator).short_side
        if short_side is None:
            raise ValueError("this plan has no short_side: make it by StandardTrain.plan")
        sample = crop_and_resize(sample, (0, 0, *size), *protocol_size(*size, short_side, self.long_side))
        return flip_horizontal(sample) if _uniform(generator, 0, 1) < self.flip else sample


@dataclass(frozen=True)
class SmallDataTrain:
    """The recipe for small data: a fixed square canvas with large-scale jitter, mosaic, colour distortion, flips.

    Attributes:
        size: side of the canvas in pixels.
        scale: range of the jitter; at 1 the picture just fits the canvas. Mosaics use its part below 1.
        mosaic, color, flip: probabilities.
    """

    size: int = 320
    scale: tuple[float, float] = (0.5, 1.6)
    mosaic: float = 0.5
    color: float = 0.5
    flip: float = 0.5
    group_by_aspect: ClassVar[bool] = False

    def __post_init__(self) -> None:
        low, high = self.scale
        if self.size < 2 or not 0 < low <= high < math.inf:
            raise ValueError(f"size={self.size}, scale={self.scale}: size must be at least 2, and 0 < low <= high")
        _check_probabilities(mosaic=self.mosaic, color=self.color, flip=self.flip)

    def plan(self, sizes: Sequence[tuple[int, int]], generator: torch.Generator) -> BatchPlan:
        """The same canvas for every batch."""
        return BatchPlan((self.size, self.size))

    def __call__(self, source: Source, index: int, generator: torch.Generator, plan: BatchPlan | None = None) -> Sample:
        """One sample of at most (size, size) pixels; a mosaic reads three further images."""
        canvas = (self.size, self.size)
        if _uniform(generator, 0, 1) < self.mosaic:
            others = [_integer(generator, len(source) - 1) for _ in range(3)]
            parts = [source[i] for i in (index, *others)]
            low, high = self.scale
            sample = mosaic(parts, canvas, (low, max(low, min(high, 1.0))), generator)
        else:
            sample = random_scale_crop(source[index], canvas, self.scale, generator)
        if _uniform(generator, 0, 1) < self.color:
            sample = sample._replace(image=distort_colour(sample.image, generator))
        return flip_horizontal(sample) if _uniform(generator, 0, 1) < self.flip else sample


def _check_probabilities(**probabilities: float) -> None:
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is a probability: it must be in 0..1")
