"""RepPoints: its assignment against a literal version, points to boxes, where features are read, losses by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_retinanet import body_shapes, layers
from torchvision.ops import deform_conv2d

from dyhead_zoo import TrainStep, create_detector, get_pretrained_cfg, list_detectors, list_tags
from dyhead_zoo.convert import mmdet
from dyhead_zoo.layers.assigners import BACKGROUND, IGNORED, point_assign
from dyhead_zoo.models.reppoints import PointConv, RepPointsHead
from dyhead_zoo.weights import detect_source

# --- assignment -------------------------------------------------------------------------------------------------------

STRIDES = (8, 16, 32)
GRID = [(s * i, s * j) for s in STRIDES for j in range(96 // s) for i in range(96 // s)]
COUNTS = [(96 // s) ** 2 for s in STRIDES]


def literal_assign(boxes: list[tuple[float, float, float, float]]) -> list[set[int]]:
    """What each point may learn, object by object; several objects where they tie."""
    claims: list[dict[int, float]] = [{} for _ in GRID]
    for k, (x, y, width, height) in enumerate(boxes):
        level = math.floor((math.log2(width / 4) + math.log2(height / 4)) / 2)
        stride = 2 ** min(max(level, 3), 5)
        start = sum(COUNTS[: STRIDES.index(stride)])
        places = range(start, start + COUNTS[STRIDES.index(stride)])
        distance = {
            i: math.hypot(
                (GRID[i][0] - x - width / 2) / width,
                (GRID[i][1] - y - height / 2) / height,
            )
            for i in places
        }
        nearest = min(distance, key=lambda i: distance[i])
        claims[nearest][k] = distance[nearest]
    return [{k for k, d in c.items() if d <= min(c.values()) + 1e-6} or {BACKGROUND} for c in claims]


# centres off the middle between two points, sides of all three levels and beyond
place = st.integers(0, 90).map(lambda i: i + 0.3)
side = st.sampled_from([1.0, 9.0, 31.0, 33.0, 64.0, 90.0, 200.0])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(place, place, side, side), max_size=8))
def test_assignment_is_the_literal_one(boxes) -> None:
    corners = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in boxes]).reshape(-1, 4)
    owner = point_assign(torch.tensor(GRID, dtype=torch.float32), COUNTS, STRIDES, corners)
    assert all(k in allowed for k, allowed in zip(owner.tolist(), literal_assign(boxes), strict=True))


@pytest.mark.parametrize(
    ("width", "height", "stride"),
    [(1, 1, 8), (63, 63, 8), (64, 64, 16), (32, 128, 16), (32, 127, 8), (128, 128, 32), (900, 900, 32)],
)
def test_the_level_of_an_object_follows_from_its_size(width, height, stride) -> None:
    points = torch.tensor(GRID, dtype=torch.float32)
    owner = point_assign(points, COUNTS, STRIDES, torch.tensor([[0.0, 0, width, height]]))
    (found,) = (owner == 0).nonzero()
    assert sum(int(found) >= sum(COUNTS[: i + 1]) for i in range(3)) == STRIDES.index(stride)


def test_of_several_objects_a_point_learns_the_nearest_and_the_others_go_without() -> None:
    points = torch.tensor([[0.0, 0], [8, 0], [16, 0]])
    boxes = torch.tensor([[5.0, -3, 13, 5], [4.5, -4, 12.5, 4], [13, -3, 19, 3]])  # 1.4 px, 0.5 px, 0 px
    assert point_assign(points, [3], [8], boxes).tolist() == [BACKGROUND, 1, 2]


def test_distances_are_in_widths_and_heights() -> None:
    """A narrow object prefers the point above it to the nearer one beside it."""
    points = torch.tensor([[0.0, 10], [6, 0]])
    assert point_assign(points, [2], [8], torch.tensor([[-2.0, -40, 2, 40]])).tolist() == [0, BACKGROUND]


def test_nothing_to_assign() -> None:
    points = torch.tensor(GRID, dtype=torch.float32)
    assert (point_assign(points, COUNTS, STRIDES, torch.zeros(0, 4)) == BACKGROUND).all()
    assert point_assign(torch.zeros(0, 2), [0], [8], torch.ones(1, 4)).shape == (0,)
    empty = point_assign(points, COUNTS, STRIDES, torch.tensor([[8.0, 8, 8, 8]]))
    assert (empty >= 0).sum() == 1


# --- points -----------------------------------------------------------------------------------------------------------


def head(**kwargs) -> RepPointsHead:
    torch.manual_seed(0)
    return RepPointsHead(8, (8, 16), 3, towers=0, **kwargs)


def points_of(pairs: list[tuple[float, float]]) -> torch.Tensor:
    """(x, y) pairs as the head has them: one cell, y first."""
    return torch.tensor([[c for x, y in pairs for c in (y, x)]]).view(1, 18, 1, 1)


PAIRS = [(1.0, 7.0), (4, -2), (-3, 5), (0, 0), (9, 1), (2, 2), (-8, 3), (5, 6), (1, -9)]


def test_moments_of_the_points() -> None:
    """Mean and sample standard deviation, the latter times exp of what is learned, width first."""
    module = head()
    torch.nn.init.constant_(module.moment_transfer, 0.5)
    module.moment_transfer.data[1] = -0.25
    x, y = zip(*PAIRS, strict=True)
    half_x, half_y = statistics.stdev(x) * math.exp(0.5), statistics.stdev(y) * math.exp(-0.25)
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    expected = [mean_x - half_x, mean_y - half_y, mean_x + half_x, mean_y + half_y]
    assert module.box_of(points_of(PAIRS)).flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_extremes_of_all_or_of_the_first_four_points() -> None:
    boxes = [head(transform=t).box_of(points_of(PAIRS)).flatten().tolist() for t in ("minmax", "partial_minmax")]
    assert boxes == [[-8, -9, 9, 7], [-3, -2, 4, 7]]


def test_points_in_one_place_have_a_gradient() -> None:
    """As at the very start of training, where the standard deviation has none."""
    points = torch.zeros(1, 18, 2, 2, requires_grad=True)
    head().box_of(points).square().sum().backward()
    assert torch.isfinite(points.grad).all()


def test_scales_of_the_moments_get_a_hundredth_of_their_gradient() -> None:
    module, points = head(), points_of(PAIRS)
    module.box_of(points)[:, 2].sum().backward()
    expected = 0.01 * statistics.stdev(x for x, _ in PAIRS)
    assert module.moment_transfer.grad.tolist() == pytest.approx([expected, 0])


def test_features_are_read_at_the_points() -> None:
    """At the taps of a dense convolution it is one; whole steps aside it reads the shifted map."""
    conv, x = PointConv(4), torch.randn(2, 4, 7, 9)
    dense = F.conv2d(x, conv.weight, padding=1)
    grid = conv.taps.expand(2, -1, 7, 9)
    torch.testing.assert_close(conv(x, grid), dense)
    down = grid + torch.tensor([2.0, 0]).repeat(9).view(1, 18, 1, 1)  # y first
    torch.testing.assert_close(conv(x, down)[:, :, :-3], dense[:, :, 2:-1])
    centres = conv(x, torch.zeros(2, 18, 7, 9))  # all nine at the cell itself
    torch.testing.assert_close(centres, F.conv2d(x, conv.weight.sum((2, 3), keepdim=True)))


def test_outputs_and_gradients_are_those_with_torchvisions_operator(monkeypatch) -> None:
    def reference(x, offset, mask, weight, padding, backend):
        return deform_conv2d(x, offset, weight, padding=padding, mask=mask)

    results = []
    for operator in (None, reference):
        if operator:
            monkeypatch.setattr("dyhead_zoo.models.reppoints.modulated_deform_conv2d", operator)
        module = head()
        for name, parameter in module.named_parameters():
            if name.endswith("weight"):
                torch.nn.init.normal_(parameter, std=0.3)
        features = [torch.randn(2, 8, 6, 10), torch.randn(2, 8, 3, 5)]
        raw = module(features, torch.tensor([[48, 80]] * 2), (48, 80))
        sum(x.sin().sum() for field in raw[:5] for x in field).backward()
        results.append((raw[:5], {name: p.grad for name, p in module.named_parameters()}))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert ours[1][0].std() > 0.5  # the points have moved
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_the_first_points_learn_little_from_what_is_read_there_and_nothing_from_the_second_step() -> None:
    """A tenth of the gradient through the reading; the second points start from the first ones as they are."""
    x = torch.randn(1, 8, 4, 6)
    module = head()
    torch.nn.init.normal_(module.init_out.weight, std=0.3)
    size = torch.tensor([[32, 48]])

    def gradient(field: str) -> torch.Tensor:
        raw = module([x], size, (32, 48))
        return torch.autograd.grad(getattr(raw, field)[0].sum(), module.init_out.bias)[0]

    def literal() -> torch.Tensor:
        points = module.init_out(F.relu(module.init_conv(x)))
        read = F.relu(module.refine_conv(x, points))
        return torch.autograd.grad(module.refine_out(read).sum(), module.init_out.bias)[0]

    torch.testing.assert_close(gradient("init_points"), torch.full((18,), 24.0))
    torch.testing.assert_close(gradient("points"), 0.1 * literal())
    assert literal().abs().max() > 0


def test_points_are_float32_under_autocast() -> None:
    detector = create_detector("test_reppoints", num_classes=3)
    with torch.autocast("cpu", torch.bfloat16):
        raw = detector(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert raw.cls_logits[0].dtype == torch.bfloat16
    assert {x.dtype for field in raw[1:5] for x in field} == {torch.float32}


# --- targets, losses, detections --------------------------------------------------------------------------------------


def raw_of(module: RepPointsHead, size: tuple[int, int] = (32, 48)):
    """An output for a picture of 32 x 48 px whose boxes are one stride around each cell's corner."""
    features = [torch.zeros(1, 8, 4, 6), torch.zeros(1, 8, 2, 3)]
    raw = module(features, torch.tensor([size]), (32, 48))
    boxes = tuple(torch.tensor([-1.0, -1, 1, 1]).view(1, 4, 1, 1).expand(1, 4, *x.shape[2:]) for x in features)
    logits = tuple(torch.zeros(1, 3, *x.shape[2:]) for x in features)
    return raw._replace(cls_logits=logits, init_boxes=boxes, boxes=boxes)


def target_of(*boxes: list[float]) -> dict[str, torch.Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.full((len(boxes),), 2)}


def test_targets_of_both_steps() -> None:
    """The object's centre is nearest to the cell at (16, 8), whose first box it fits; a few others overlap it less."""
    module = head()
    init_owner, owner = module.targets(raw_of(module), [target_of([8.0, 0, 24, 17])])
    assert (init_owner[0] >= 0).nonzero().flatten().tolist() == [6 + 2]
    assert (owner[0] >= 0).nonzero().flatten().tolist() == [6 + 2]
    assert set(owner[0].tolist()) == {0, BACKGROUND}
    _, owner = module.targets(raw_of(module), [target_of([8.0, 0, 24, 35])])  # overlap 16/35: in between
    assert (owner[0] == 0).sum() > 0 and (owner[0] == IGNORED).sum() > 0


def test_cells_beyond_the_picture_learn_nothing() -> None:
    module = head(pad_divisor=16)
    init_owner, owner = module.targets(raw_of(module, (32, 20)), [target_of([30.0, 0, 46, 16])])  # 20 px: to 32
    beyond = torch.tensor([x >= 4 for _ in range(4) for x in range(6)] + [x >= 2 for _ in range(2) for x in range(3)])
    assert (owner[0, beyond] == IGNORED).all() and (owner[0, ~beyond] != IGNORED).any()
    assert (init_owner[0, beyond] == BACKGROUND).all() and (init_owner[0] == 0).sum() == 1


def test_losses_by_hand() -> None:
    module = head()
    raw, target = raw_of(module), target_of([8.0, 0, 24, 17])
    losses = module.loss(raw, [target])
    error = 1 / 32  # of the lower side alone, in units of four strides; below beta
    box_term = 0.5 * error**2 / 0.11
    torch.testing.assert_close(losses["loss_init_box"], torch.tensor(0.5 * box_term))
    torch.testing.assert_close(losses["loss_refine_box"], torch.tensor(box_term))
    entropy = math.log(2) * 0.25  # (1 - 1/2)^2
    torch.testing.assert_close(losses["loss_cls"], torch.tensor((0.25 + 0.75 * (30 * 3 - 1)) * entropy))
    wide = tuple(x + torch.tensor([0.0, 0, 2, 0]).view(1, 4, 1, 1) for x in raw.boxes)  # two strides off on the right
    far = module.loss(raw._replace(boxes=wide), [target])["loss_refine_box"]
    torch.testing.assert_close(far, torch.tensor(box_term + 0.5 - 0.055))  # beyond beta it grows linearly


def test_detections_are_the_second_boxes_in_pixels() -> None:
    module = head()
    raw = raw_of(module)
    logits = [torch.full_like(x, -9.0) for x in raw.cls_logits]
    logits[1][0, 1, 1, 2] = 3.0
    found = module.decode_tensors(raw._replace(cls_logits=tuple(logits)))
    assert found.count.tolist() == [1] and found.labels[0, 0] == 1
    assert found.boxes[0, 0].tolist() == [16, 0, 48, 32]  # around (32, 16)
    assert found.scores[0, 0] == pytest.approx(1 / (1 + math.exp(-3)))


@pytest.mark.parametrize("transform", ["moment", "minmax", "partial_minmax"])
@pytest.mark.parametrize("towers", [0, 2])
def test_every_variant_trains(transform, towers) -> None:
    detector = create_detector("test_reppoints", num_classes=3, transform=transform, towers=towers).train()
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    sizes, targets = torch.tensor([[64, 96]] * 2), [target_of([8.0, 4, 60, 60]), target_of()]
    sum(TrainStep(detector)(images, sizes, targets).values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters())
    assert detector.head.init_out.weight.grad.abs().max() > 0
    assert ("head.moment_transfer" in detector.state_dict()) is (transform == "moment")


def test_unknown_transforms_are_named() -> None:
    with pytest.raises(ValueError, match=r"transform='maxmin': use 'moment', 'minmax' or 'partial_minmax'"):
        create_detector("test_reppoints", transform="maxmin")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def mmdet_keys(body: str, gn: bool) -> dict[str, tuple[int, ...]]:
    keys = {f"backbone.{key}": shape for key, shape in body_shapes(body).items()}
    convs = {f"neck.lateral_convs.{i}": (256, c, 1, 1) for i, c in enumerate((512, 1024, 2048))}
    convs |= {f"neck.fpn_convs.{i}": (256, 2048 if i == 3 else 256, 3, 3) for i in range(5)}
    convs |= {f"bbox_head.{branch}_convs.{i}": (256, 256, 3, 3) for branch in ("cls", "reg") for i in range(3)}
    if gn:
        keys |= {f"{name}.conv.weight": shape for name, shape in convs.items()}
        keys |= layers({f"{name}.gn": (256,) for name in convs})
    else:
        keys |= layers({f"{name}.conv": shape for name, shape in convs.items()})
    part = "bbox_head.reppoints_"
    keys |= layers({f"{part}cls_out": (80, 256, 1, 1), f"{part}pts_init_conv": (256, 256, 3, 3)})
    keys |= layers({f"{part}pts_init_out": (18, 256, 1, 1), f"{part}pts_refine_out": (18, 256, 1, 1)})
    keys |= {f"{part}{name}_conv.weight": (256, 256, 3, 3) for name in ("cls", "pts_refine")}
    return keys | {"bbox_head.moment_transfer": (2,)}


TAGS = [f"{name}.{tag}" for name in list_detectors("reppoints_*") for tag in list_tags(name) if tag]


@pytest.mark.parametrize("name", TAGS)
def test_every_published_key_has_its_place(name: str) -> None:
    arch, tag = name.split(".")
    keys = mmdet_keys(arch.split("_")[1], gn="_gn_" in tag)
    with torch.device("meta"):
        detector = create_detector(name)
    assert detect_source(keys) == "mmdet" == get_pretrained_cfg(name).source
    converted = mmdet.convert({key: torch.empty(shape, device="meta") for key, shape in keys.items()})
    found = {key: tuple(value.shape) for key, value in converted.tensors.items()}
    assert found == {key: tuple(value.shape) for key, value in detector.state_dict().items()}
    assert not converted.dropped
