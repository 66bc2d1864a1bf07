"""BorderDet: BorderAlign against loops, targets and scores of the border stage, the released code's keys."""

from __future__ import annotations

import math

import pytest
import torch

from dyhead_zoo import create_detector, load_checkpoint
from dyhead_zoo.models.borderdet import BorderDetOutput
from dyhead_zoo.ops.border_align import border_align

# --- BorderAlign ------------------------------------------------------------------------------------------------------


def literal_border_align(x, boxes, pool_size):
    """Figure 4 of the paper, value by value; differentiable."""
    height, width = x.shape[-2:]

    def at(image, channel, px, py):
        left, top = min(math.floor(px), width - 1), min(math.floor(py), height - 1)
        right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
        fx, fy, cells = px - left, py - top, x[image, channel]
        upper = (1 - fx) * cells[top, left] + fx * cells[top, right]
        return (1 - fy) * upper + fy * ((1 - fx) * cells[bottom, left] + fx * cells[bottom, right])

    channels = x.shape[1] // 4
    out = []
    for image in range(x.shape[0]):
        for border in range(4):
            for channel in range(border * channels, (border + 1) * channels):
                for x1, y1, x2, y2 in boxes[image].tolist():
                    values = []
                    for k in range(pool_size + 1):
                        dx, dy = (x2 - x1) * k / pool_size, (y2 - y1) * k / pool_size
                        point = [(x1 + dx, y1), (x1, y1 + dy), (x2 - dx, y2), (x2, y2 - dy)][border]
                        values.append(at(image, channel, *point))
                    out.append(torch.stack(values).max())
    return torch.stack(out).view(x.shape[0], x.shape[1], -1)


def some_boxes(batch, count, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(batch, count, 2, 2, dtype=torch.float64, generator=generator)
    corners = corners.sort(2).values * torch.tensor([width - 1.0, height - 1.0], dtype=torch.float64)
    return corners.flatten(2)


@pytest.mark.parametrize(("height", "width"), [(7, 5), (1, 6), (1, 1)])
def test_border_align_is_the_loop_in_values_and_gradients(height, width):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, height, width, dtype=torch.float64, generator=generator, requires_grad=True)
    boxes = some_boxes(2, 5, height, width, seed=1)
    boxes[:, 3] = torch.tensor([0.0, 0, width - 1, height - 1])  # the whole map
    boxes[:, 4, 2:] = boxes[:, 4, :2]  # a point
    weight = torch.randn(2, 8, 5, dtype=torch.float64, generator=generator)
    out, expected = border_align(x, boxes), literal_border_align(x, boxes, 10)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    (expected,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(border_align(x, boxes), out)


def test_border_align_passes_gradcheck():
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: border_align(t, some_boxes(1, 4, 5, 6, 3), pool_size=4), x)


@pytest.mark.parametrize(
    ("x", "boxes", "message"),
    [
        (torch.zeros(1, 6, 4, 4), torch.zeros(1, 2, 4), "4 \\* C"),
        (torch.zeros(2, 8, 4, 4), torch.zeros(1, 2, 4), "expected \\(2, P, 4\\)"),
    ],
)
def test_border_align_names_wrong_shapes(x, boxes, message):
    with pytest.raises(ValueError, match=message):
        border_align(x, boxes)


# --- the border stage -------------------------------------------------------------------------------------------------


def raw_output(head, logit=-20.0, distance=16.0):
    sizes = [(64 // s or 1, 64 // s or 1) for s in head.strides]

    def maps(channels, value):
        return tuple(torch.full((1, channels, *size), value) for size in sizes)

    return BorderDetOutput(
        maps(head.num_classes, logit),
        maps(4, distance),
        maps(1, 0.0),
        maps(head.num_classes, logit),
        maps(4, 0.0),
        torch.tensor([[64, 64]]),
        (64, 64),
    )


@pytest.mark.parametrize(("threshold", "count"), [(0.35, 1), (0.36, 0)])
def test_score_and_box_of_both_stages(threshold, count):
    """The first stage alone, 0.3536 here, decides what is kept; the score is the root of both."""
    head = create_detector("test_borderdet", num_classes=3, score_threshold=threshold).head
    raw = raw_output(head)
    raw.cls_logits[0][0, 1, 4, 4] = 0.0
    raw.centerness[0][0, 0, 4, 4] = math.log(1 / 3)
    raw.border_logits[0][0, 1, 4, 4] = math.log(4)
    raw.border_deltas[0][0, :, 4, 4] = torch.tensor([0.5, 0.0, 0.0, -0.25])
    found = head.decode_tensors(raw)
    assert found.count.tolist() == [count]
    if count:
        assert found.scores[0, 0] == pytest.approx(math.sqrt(math.sqrt(0.5 * 0.25) * 0.8)) and found.labels[0, 0] == 1
        assert found.boxes[0, 0].tolist() == [24, 16, 48, 44]  # 16 to 48 around the cell's corner, moved by 8 and 4


def test_border_targets_follow_the_boxes_of_the_first_stage():
    head = create_detector("test_borderdet", num_classes=3).head
    raw = raw_output(head)  # boxes of 32 px around every point
    target = {"boxes": torch.tensor([[18.0, 16, 50, 46]]), "labels": torch.tensor([2])}
    boxes = torch.cat(head.first_boxes(raw.first), dim=1)[0]
    low, high = torch.maximum(boxes[:, :2], target["boxes"][:, :2]), torch.minimum(boxes[:, 2:], target["boxes"][:, 2:])
    overlap = (high - low).clamp(min=0).prod(1)
    positive = overlap / (32 * 32 + 32 * 30 - overlap) >= 0.6
    assert 1 < positive.sum() < 10
    expected = ((target["boxes"] - boxes[positive]) / 16).abs().sum() / positive.sum()
    losses = head.loss(raw, [target])
    torch.testing.assert_close(losses["loss_border_box"], expected)
    assert losses["loss_border_cls"] > 4
    flat = [x.flatten(2) for x in raw.border_logits]
    for logits, chosen in zip(flat, positive.split([x.shape[-1] for x in flat]), strict=True):
        logits[0, 2, chosen] = 20.0
    assert head.loss(raw, [target])["loss_border_cls"] < 1e-4


def test_border_losses_do_not_move_the_boxes_they_are_read_at():
    detector = create_detector("test_borderdet", num_classes=3).train()
    with torch.no_grad():
        detector.head.box_distances.bias.fill_(2.0)  # boxes with a size
    raw = detector(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    target = {"boxes": detector.head.first_boxes(raw.first)[0][0, 36:37] + 1, "labels": torch.tensor([0])}
    losses = detector.loss(raw, [target])
    weights = [detector.head.box_distances.weight, detector.head.box_tower[0].conv.weight]
    gradients = torch.autograd.grad(
        losses["loss_border_cls"] + losses["loss_border_box"], weights, allow_unused=True, retain_graph=True
    )
    assert losses["loss_border_box"] > 0
    assert gradients[0] is None and gradients[1].abs().sum() > 0


def test_keys_of_the_released_code_have_their_places():
    """cvpods' names; values that tell the tensors apart."""
    detector = create_detector("borderdet_resnet50.cvpods_1x_coco")
    state = {key: tuple(value.shape) for key, value in detector.state_dict().items()}
    keys = {}
    for key, shape in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        if key == "head.scales":
            keys |= {f"head.scales.{i}.scale": (1,) for i in range(5)}
        elif key.startswith("head."):
            keys[head_key(key)] = shape
        else:
            keys[body_key(key)] = shape
    checkpoint = {key: torch.full(shape, float(i)) for i, (key, shape) in enumerate(keys.items())}
    load_checkpoint(detector, {"model": checkpoint})
    loaded, value = detector.state_dict(), {key: float(i) for i, key in enumerate(keys)}
    for ours, theirs in [
        ("cls_tower.3.norm.bias", "cls_subnet.10.bias"),
        ("box_tower.2.conv.weight", "bbox_subnet.6.weight"),
        ("box_distances.bias", "bbox_pred.bias"),
        ("border_cls.borders.weight", "border_cls_subnet.ltrb_conv.0.weight"),
        ("border_box.merge.bias", "border_bbox_subnet.border_conv.0.bias"),
        ("border_deltas.weight", "border_bbox_pred.weight"),
    ]:
        assert loaded[f"head.{ours}"].unique().item() == value[f"head.{theirs}"]


def head_key(key):
    _, part, *rest = key.split(".")
    names = {"cls_logits": "cls_score", "box_distances": "bbox_pred", "centerness": "centerness"}
    names |= {"border_logits": "border_cls_score", "border_deltas": "border_bbox_pred"}
    if part in names:
        return ".".join(["head", names[part], *rest])
    if part in ("cls_tower", "box_tower"):
        place = 3 * int(rest[0]) + (rest[1] == "norm")
        return f"head.{'cls' if part == 'cls_tower' else 'bbox'}_subnet.{place}.{rest[2]}"
    layer = {"point": "cur_point_conv", "borders": "ltrb_conv", "merge": "border_conv"}[rest[0]]
    return f"head.border_{'cls' if part == 'border_cls' else 'bbox'}_subnet.{layer}.0.{rest[1]}"


def body_key(key):
    parts = key.split(".")
    if key.startswith("neck.fpn.extra."):
        return f"backbone.top_block.p{int(parts[3]) + 6}.{parts[4]}"
    if key.startswith("neck.fpn."):
        return f"backbone.fpn_{parts[2]}{int(parts[3]) + 3}.{parts[4]}"
    parts = parts[2:]
    if parts[0] in ("conv1", "bn1"):
        return "backbone.bottom_up.stem.conv1." + ("weight" if parts[0] == "conv1" else f"norm.{parts[1]}")
    block = f"backbone.bottom_up.res{int(parts[0][-1]) + 1}.{parts[1]}."
    if parts[2] == "downsample":
        return block + ("shortcut.weight" if parts[3] == "0" else f"shortcut.norm.{parts[4]}")
    return block + (f"{parts[2]}.weight" if parts[2].startswith("conv") else f"conv{parts[2][-1]}.norm.{parts[3]}")
