from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from data_helpers import FUZZ, has_colour, painted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyhead_zoo.data.transforms import (
    FILL,
    MIN_SIDE,
    BatchPlan,
    SmallDataTrain,
    StandardTrain,
    clip_boxes,
    crop_and_resize,
    distort_colour,
    flip_horizontal,
    mosaic,
    pad_and_stack,
    protocol_size,
    random_scale_crop,
    resize,
    resize_to_protocol,
    scale_boxes,
)
from dyhead_zoo.structures import Sample

TOLERANCE = 1.5  # pixels by which interpolation may blur an edge


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample_of(height: int, width: int, box: tuple[float, ...], label: int = 0) -> Sample:
    boxes, labels = torch.tensor([box], dtype=torch.float32), torch.tensor([label])
    image = painted(height, width, boxes, labels)
    return Sample(image, boxes, labels, has_colour(image, label)[None])


def same(first: Sample, second: Sample) -> bool:
    assert first.masks is not None and second.masks is not None
    return all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True)) and torch.equal(
        first.masks, second.masks
    )


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator(seed))


@st.composite
def painted_samples(draw: st.DrawFn, label: int = 0) -> Sample:
    """A black picture with one coloured rectangle, and the box around that."""
    height, width = draw(st.integers(12, 90)), draw(st.integers(12, 90))
    x, y = draw(st.integers(0, width - 6)), draw(st.integers(0, height - 6))
    w, h = draw(st.integers(6, width - x)), draw(st.integers(6, height - y))
    return sample_of(height, width, (x, y, x + w, y + h), label)


def assert_box_fits_paint(image: Tensor, box: Tensor, label: int) -> None:
    rows, columns = has_colour(image, label).nonzero(as_tuple=True)
    paint = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    torch.testing.assert_close(box, torch.tensor(paint, dtype=torch.float32), atol=TOLERANCE, rtol=0)


def assert_valid(sample: Sample, limit: tuple[int, int], blur: float = 1) -> None:
    image, boxes, labels, masks = sample
    height, width = image.shape[1:]
    assert image.dtype == torch.uint8 and 1 <= height <= limit[0] and 1 <= width <= limit[1]
    assert len(boxes) == len(labels) and boxes.dtype == torch.float32 and labels.dtype == torch.int64
    assert boxes.isfinite().all() and (boxes >= 0).all()
    assert (boxes[:, 0::2] <= width).all() and (boxes[:, 1::2] <= height).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE - 1e-3).all()
    if masks is not None:
        assert masks.dtype == torch.bool and masks.shape == (len(boxes), height, width)
        assert_masks_fill_boxes(masks, boxes, blur)


def assert_masks_fill_boxes(masks: Tensor, boxes: Tensor, blur: float) -> None:
    """As they do where objects are painted rectangles, but for what interpolation may do to an edge ``blur`` wide.

    A corner loses most: bilinear weights fall below one half there within 1/sqrt(2) - 1/2 = 0.21 of that width.
    """
    tolerance = TOLERANCE + 0.21 * blur
    y, x = torch.arange(masks.shape[1])[:, None] + 0.5, torch.arange(masks.shape[2]) + 0.5
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        reach = torch.minimum(torch.minimum(x - x1, x2 - x), torch.minimum(y - y1, y2 - y))
        assert mask[reach > tolerance].all() and not mask[reach < -tolerance].any()


# ---- resizing


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),  # 1066.67; the sizes that mmdetection logs for COCO's commonest pictures
        ((640, 480), (1067, 800)),
        ((427, 640), (800, 1199)),
        ((640, 640), (800, 800)),
        ((333, 1000), (444, 1333)),  # the long side rules
        ((1, 1), (800, 800)),
        ((1, 5000), (1, 1333)),
    ],
)
def test_protocol_size_of_the_long_schedules(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert protocol_size(*size, 800, 1333) == expected


def test_rounding_down_is_what_torchvision_does() -> None:
    for height, width in [(480, 640), (427, 640), (333, 1000), (375, 500), (612, 612)]:
        transform = torchvision.models.detection.transform.GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3)
        theirs = transform.resize(torch.zeros(3, height, width))[0].shape[1:]
        assert protocol_size(height, width, 800, 1333, "floor") == theirs
    with pytest.raises(ValueError, match="rounding='up'"):
        protocol_size(4, 4, 8, 8, "up")


@given(*[st.integers(1, 3000)] * 4)
@settings(max_examples=100 * FUZZ, deadline=None)
def test_protocol_keeps_the_shape_and_the_limits(height: int, width: int, short: int, long: int) -> None:
    new_height, new_width = protocol_size(height, width, short, long)
    assert 1 <= min(new_height, new_width) <= max(short, 1) and max(new_height, new_width) <= max(long, 1)
    scale = min(long / max(height, width), short / min(height, width))
    assert abs(new_height - height * scale) <= 1 and abs(new_width - width * scale) <= 1


def test_resize_to_protocol_uses_interpolation_and_antialias() -> None:
    image = noise(64, 96)
    variants = [
        resize_to_protocol(image, 16, 100),
        resize_to_protocol(image, 16, 100, antialias=False),
        resize_to_protocol(image, 16, 100, "bicubic"),
        resize_to_protocol(image, 16, 100, "nearest"),
    ]
    assert all(v.shape == (3, 16, 24) and v.dtype == torch.uint8 for v in variants)
    assert len({tuple(v.flatten().tolist()) for v in variants}) == 4
    assert variants[0].float().std() < variants[1].float().std() / 2  # antialiasing averages the noise away
    assert resize(image, 64, 96) is image
    with pytest.raises(ValueError, match="bilinea"):
        resize_to_protocol(image, 16, 100, "bilinea")


@given(*[st.integers(1, 7)] * 4, st.booleans())
@settings(max_examples=100 * FUZZ, deadline=None)
def test_resizing_bytes_agrees_with_resizing_floats(h: int, w: int, new_h: int, new_w: int, antialias: bool) -> None:
    image = noise(h, w)
    exact = torch.nn.functional.interpolate(image[None].float(), (new_h, new_w), mode="bilinear", antialias=antialias)[
        0
    ]
    assert (resize(image, new_h, new_w, antialias=antialias).float() - exact).abs().max() < 1.01


def test_pad_and_stack() -> None:
    batch = pad_and_stack([noise(3, 5), noise(4, 2, 1)], 4, 6)
    assert batch.shape == (2, 3, 4, 6) and batch.dtype == torch.uint8
    assert torch.equal(batch[0, :, :3, :5], noise(3, 5)) and torch.equal(batch[1, :, :4, :2], noise(4, 2, 1))
    assert not batch[0, :, 3:].any() and not batch[0, :, :, 5:].any() and not batch[1, :, :, 2:].any()


# ---- flips, crops, drops


@given(painted_samples())
@settings(max_examples=50 * FUZZ, deadline=None)
def test_flip_moves_boxes_with_the_paint_and_undoes_itself(sample: Sample) -> None:
    flipped = flip_horizontal(sample)
    assert_box_fits_paint(flipped.image, flipped.boxes[0], 0)
    assert flipped.masks is not None and torch.equal(flipped.masks[0], has_colour(flipped.image, 0))
    assert flipped.image[:, 0, 0].equal(sample.image[:, 0, -1])
    assert same(flip_horizontal(flipped), sample)


def test_boxes_cut_away_or_too_thin_are_dropped() -> None:
    boxes = torch.tensor(
        [
            [-5.0, 2, 5, 12],  # half is left
            [-9.0, 2, 1, 12],  # 1 pixel is left
            [-79.0, 2, 19, 12],  # 19 of 98 columns are left: below 20 %
            [-75.0, 2, 19, 12],  # 19 of 94: above
            [3.0, 3, 4.9, 9],  # thin from the start
            [30.0, 3, 40, 9],  # outside
            [0.0, 0, 20, 15],
        ]
    )
    clipped, keep = clip_boxes(boxes, 15, 20)
    assert keep.nonzero().flatten().tolist() == [0, 3, 6]
    assert clipped[keep].tolist() == [[0, 2, 5, 12], [0, 2, 19, 12], [0, 0, 20, 15]]


def test_no_boxes_pass_through_everything() -> None:
    image = noise(40, 30)
    empty = Sample(
        image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 40, 30, dtype=torch.bool)
    )
    for seed in range(4):
        for recipe in (StandardTrain((24,), 40), SmallDataTrain(32, mosaic=seed % 2)):
            image, boxes, labels, masks = recipe([empty], 0, generator(seed))
            assert masks is not None and masks.shape == (0, *image.shape[1:])
            assert boxes.shape == (0, 4) and labels.shape == (0,) and boxes.dtype == torch.float32


@given(painted_samples(), st.data())
@settings(max_examples=50 * FUZZ, deadline=None)
def test_cropping_and_resizing_keep_the_box_on_the_paint(sample: Sample, data: st.DataObject) -> None:
    height, width = sample[0].shape[1:]
    top, left = data.draw(st.integers(0, height - 4)), data.draw(st.integers(0, width - 4))
    window = top, left, data.draw(st.integers(4, height - top)), data.draw(st.integers(4, width - left))
    size = data.draw(st.integers(4, 200)), data.draw(st.integers(4, 200))
    result = crop_and_resize(sample, window, *size)
    assert result[0].shape[1:] == size
    blur = max(size[0] / window[2], size[1] / window[3])  # an upscaled edge is this wide
    assert_valid(result, size, blur)
    boxes = result[1]
    if len(boxes) and blur < 3 and (boxes[0, 2:] - boxes[0, :2]).min() > 4:
        assert_box_fits_paint(result[0], boxes[0], 0)


@given(painted_samples(), st.tuples(st.integers(16, 80), st.integers(16, 80)), st.integers(0, 2**31))
@settings(max_examples=75 * FUZZ, deadline=None)
def test_scale_jitter_keeps_the_box_on_the_paint(sample: Sample, canvas: tuple[int, int], seed: int) -> None:
    result = random_scale_crop(sample, canvas, (0.5, 1.6), generator(seed))
    assert_valid(result, canvas)
    image, boxes, *_ = result
    scale = max(image.shape[1] / sample[0].shape[1], image.shape[2] / sample[0].shape[2])
    if len(boxes) and scale < 3 and (boxes[0, 2:] - boxes[0, :2]).min() > 4:
        assert_box_fits_paint(image, boxes[0], 0)


def test_scale_jitter_covers_its_range_and_all_places() -> None:
    sample = Sample(noise(40, 80), torch.tensor([[0.0, 0, 80, 40]]), torch.tensor([0]))
    sizes = [random_scale_crop(sample, (64, 64), (0.5, 1.6), generator(seed))[0].shape[1:] for seed in range(200)]
    heights = [size[0] for size in sizes]  # 32 at scale 1
    assert min(heights) <= 18 and max(heights) >= 48
    assert max(size[1] for size in sizes) == 64

    left_edge = sample._replace(image=painted(40, 80, torch.tensor([[0.0, 0, 8, 40]]), torch.tensor([0])))
    right_edge = sample._replace(image=painted(40, 80, torch.tensor([[72.0, 0, 80, 40]]), torch.tensor([0])))
    for edge in (left_edge, right_edge):
        seen = [has_colour(random_scale_crop(edge, (64, 64), (1.5, 1.5), generator(s))[0], 0).any() for s in range(60)]
        assert any(seen) and not all(seen)


def test_scale_boxes_is_the_inverse_of_itself() -> None:
    boxes = torch.tensor([[1.0, 2, 30, 20], [0, 0, 40, 30]])
    there = scale_boxes(boxes, (30, 40), (60, 50))
    assert there.tolist() == [[1.25, 4, 37.5, 40], [0, 0, 50, 60]]
    torch.testing.assert_close(scale_boxes(there, (60, 50), (30, 40)), boxes)


# ---- mosaic


@given(st.data(), st.integers(0, 2**31))
@settings(max_examples=50 * FUZZ, deadline=None)
def test_mosaic_keeps_every_box_on_its_own_paint(data: st.DataObject, seed: int) -> None:
    samples = [data.draw(painted_samples(label)) for label in range(4)]
    result = mosaic(samples, (72, 96), (0.5, 1.0), generator(seed))
    image, boxes, labels, _ = result
    assert image.shape == (3, 72, 96) and len(set(labels.tolist())) == len(labels)
    assert_valid(result, (72, 96))
    for box, label in zip(boxes, labels.tolist(), strict=True):
        if (box[2:] - box[:2]).min() > 4 and max(96 / s[0].shape[1] for s in samples) < 3:
            assert_box_fits_paint(image, box, label)


def test_mosaic_puts_one_picture_into_each_quarter() -> None:
    samples = [sample_of(64, 64, (0, 0, 64, 64), label) for label in range(4)]
    image = mosaic(samples, (64, 64), (1.0, 1.0), generator(3)).image
    assert sum(has_colour(image, label) for label in range(4)).eq(1).all()
    corners = [image[:, y, x].tolist() for y in (0, -1) for x in (0, -1)]
    assert corners == [s[0][:, 0, 0].tolist() for s in samples]
    with pytest.raises(ValueError, match="four samples, not 3"):
        mosaic(samples[:3], (64, 64), (1.0, 1.0), generator(0))


def test_mosaic_fills_what_no_picture_covers() -> None:
    small = [sample_of(64, 64, (0, 0, 64, 64), 0)] * 4
    image = mosaic(small, (64, 64), (0.1, 0.1), generator(0))[0]
    assert image[:, -1, -1].tolist() == [FILL] * 3


# ---- colour


def test_colour_changes_pixels_within_limits_and_leaves_grey_grey() -> None:
    image = noise(20, 30)
    changed = [distort_colour(image, generator(seed)) for seed in range(20)]
    assert all(c.shape == image.shape and c.dtype == torch.uint8 and not torch.equal(c, image) for c in changed)
    for seed in range(20):
        grey = distort_colour(image[:1].expand(3, -1, -1), generator(seed)).int()
        assert (grey.amax(0) - grey.amin(0)).max() <= 2
    middle = torch.full((3, 1, 1), 128, dtype=torch.uint8)
    levels = torch.stack([distort_colour(middle, generator(seed)).flatten() for seed in range(300)]).int()
    assert 90 <= levels.min() <= 100 and 156 <= levels.max() <= 162  # brightness alone moves mid-grey, by up to 32


def test_colour_turns_hue() -> None:
    red = torch.tensor([180, 60, 60], dtype=torch.uint8)[:, None, None]
    turned = torch.stack([distort_colour(red, generator(seed)).flatten() for seed in range(100)]).int()
    assert (turned[:, 0] > turned[:, 1:].amax(1)).all()  # still reddish
    assert (turned[:, 1] > turned[:, 2]).any() and (turned[:, 1] < turned[:, 2]).any()


# ---- recipes


class Pictures(list[Sample]):
    """A list of samples that remembers what was read."""

    def __init__(self, samples: list[Sample]) -> None:
        super().__init__(samples)
        self.read: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.read.append(index)
        return super().__getitem__(index)


def pictures() -> Pictures:
    sizes = [(40, 60), (60, 40), (50, 50), (30, 90)]
    return Pictures([sample_of(h, w, (4, 5, 24, 25), k) for k, (h, w) in enumerate(sizes)])


@pytest.mark.parametrize("recipe", [StandardTrain((32, 48), 80), SmallDataTrain(48), SmallDataTrain(48, mosaic=1.0)])
def test_recipes_depend_on_the_generator_alone_and_leave_their_input(recipe: Any) -> None:
    source, untouched = pictures(), pictures()
    for index in range(4):
        torch.manual_seed(index)
        first = recipe(source, index, generator(index))
        torch.manual_seed(99)
        state = torch.get_rng_state()
        second = recipe(source, index, generator(index))
        assert same(first, second)
        assert torch.equal(torch.get_rng_state(), state)
        others = [recipe(source, index, generator(seed)) for seed in range(100, 110)]
        assert any(a[0].shape != first[0].shape or not torch.equal(a[0], first[0]) for a in others)
        assert_valid(first, (80, 80))
    for a, b in zip(source, untouched, strict=True):
        assert same(a, b)


@given(st.integers(0, 3), st.integers(0, 2**31), st.sampled_from(["standard", "small", "mosaic"]))
@settings(max_examples=75 * FUZZ, deadline=None)
def test_recipes_keep_boxes_on_the_paint(index: int, seed: int, kind: str) -> None:
    recipe = {
        "standard": StandardTrain((32, 48), 80),
        "small": SmallDataTrain(64, mosaic=0.0, color=0.0),
        "mosaic": SmallDataTrain(64, mosaic=1.0, color=0.0),
    }[kind]
    image, boxes, labels, masks = recipe(pictures(), index, generator(seed))
    assert_masks_fill_boxes(masks, boxes, blur=1.6)
    for box, label in zip(boxes, labels.tolist(), strict=True):
        x1, y1, x2, y2 = (box + torch.tensor([TOLERANCE, TOLERANCE, -TOLERANCE, -TOLERANCE])).round().int().tolist()
        assert has_colour(image, label)[y1:y2, x1:x2].all()
        if labels.tolist().count(label) == 1 and kind != "mosaic":
            assert_box_fits_paint(image, box, label)


def test_standard_recipe_uses_the_planned_scale_and_fits_the_canvas() -> None:
    recipe, source = StandardTrain((32, 48), 80), pictures()
    sizes = [(s[0].shape[1], s[0].shape[2]) for s in source]
    plans = [recipe.plan(sizes, generator(seed)) for seed in range(20)]
    assert {plan.short_side for plan in plans} == {32, 48}
    for plan in plans[:4]:
        images = [recipe(source, i, generator(7), plan)[0] for i in range(4)]
        assert (max(i.shape[1] for i in images), max(i.shape[2] for i in images)) == plan.canvas
        assert images[2].shape[1:] == (plan.short_side, plan.short_side)
    with pytest.raises(ValueError, match=r"StandardTrain\.plan"):
        recipe(source, 0, generator(0), BatchPlan((80, 80)))


def test_small_recipe_reads_three_further_pictures_for_a_mosaic_only() -> None:
    source = pictures()
    SmallDataTrain(48, mosaic=0.0)(source, 2, generator(0))
    assert source.read == [2]
    image = SmallDataTrain(48, mosaic=1.0)(source, 2, generator(0)).image
    assert source.read[1] == 2 and len(source.read) == 5 and image.shape == (3, 48, 48)
    one = Pictures([sample_of(40, 40, (5, 5, 30, 30))])
    assert SmallDataTrain(48, mosaic=1.0)(one, 0, generator(0))[0].shape == (3, 48, 48)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(2, 64), st.integers(0, 2**31))
@settings(max_examples=75 * FUZZ, deadline=None)
def test_small_recipe_takes_pictures_of_any_shape(height: int, width: int, size: int, seed: int) -> None:
    source = [Sample(noise(height, width), torch.tensor([[0.0, 0, width, height]]), torch.tensor([2]))]
    assert_valid(SmallDataTrain(size)(source, 0, generator(seed)), (size, size))


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (SmallDataTrain, {"scale": (0.0, 1.0)}),
        (SmallDataTrain, {"scale": (1.6, 0.5)}),
        (SmallDataTrain, {"size": 1}),
        (SmallDataTrain, {"mosaic": 1.5}),
        (StandardTrain, {"short_sides": ()}),
        (StandardTrain, {"flip": -0.1}),
    ],
)
def test_impossible_recipes_are_refused(recipe: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        recipe(**options)
