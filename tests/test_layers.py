"""The small parts that families share, against other implementations or a direct reading of their definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou, generalized_box_iou
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from dyhead_zoo.layers.anchors import AnchorGenerator, DeltaCoder, grid_points
from dyhead_zoo.layers.assigners import atss_assign
from dyhead_zoo.layers.fpn import FPN, Neck
from dyhead_zoo.layers.losses import giou_loss, sigmoid_focal_loss
from dyhead_zoo.layers.postprocess import dense_detections, take_rows
from dyhead_zoo.ops.boxes import centerness, clip_to_image


def boxes_of(seed, count, size=100.0):
    generator = torch.Generator().manual_seed(seed)
    corner, extent = torch.rand(2, count, 2, generator=generator) * size
    return torch.cat((corner, corner + extent + 5), dim=1)


def features(channels=(8, 16, 24)):
    return [torch.randn(2, c, s, s + 1) for c, s in zip(channels, (16, 8, 4), strict=True)]


# -- pyramid -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra_from", ["p5", "c5", "pool"])
@pytest.mark.parametrize("fpn_norm", [False, True])
def test_pyramid_sizes_and_where_the_extra_levels_come_from(extra_from, fpn_norm):
    fpn = FPN((8, 16, 24), 16, extra_from=extra_from, fpn_norm=fpn_norm)
    inputs = features()
    levels = fpn(inputs)
    assert [tuple(x.shape) for x in levels] == [
        (2, 16, 16, 17),
        (2, 16, 8, 9),
        (2, 16, 4, 5),
        (2, 16, 2, 3),
        (2, 16, 1, 2),
    ]
    if extra_from == "pool":
        assert not list(fpn.extra.parameters())
        assert torch.equal(levels[3], F.max_pool2d(levels[2], 1, stride=2))
    else:
        source = inputs[2] if extra_from == "c5" else levels[2]
        assert torch.equal(levels[3], fpn.extra[0](source))


def test_top_down_path_adds_the_upsampled_coarser_level():
    fpn = FPN((8, 16, 24), 16, num_extra=0)
    inputs = features()
    middle = fpn.lateral[1](inputs[1]) + F.interpolate(fpn.lateral[2](inputs[2]), size=(8, 9))
    torch.testing.assert_close(fpn(inputs)[1], fpn.output[1](middle))


def test_relu_stands_before_p7_only():
    fpn = FPN((8, 16, 24), 16, extra_relu=True)
    levels = fpn(features())
    assert torch.equal(levels[3], fpn.extra[0](levels[2]))
    assert torch.equal(levels[4], fpn.extra[1](levels[3].relu()))


def test_neck_states_its_strides():
    assert Neck((8, 16), (8, 16), channels=16, num_extra=3).strides == (8, 16, 32, 64, 128)


# -- anchors and boxes -------------------------------------------------------------------------------------------------


def test_points_run_over_y_then_x():
    points = grid_points((2, 3), 8, 0.5, torch.zeros(1))
    assert points.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]


def test_anchors_have_their_area_ratio_and_centre():
    generate = AnchorGenerator((8, 16), [[32, 64], [64, 128]], ratios=(0.5, 2.0), offset=0.0)
    first, second = generate([torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 1)])
    assert len(first) == 2 * 3 * generate.per_cell == 24
    size = first[:, 2:] - first[:, :2]
    torch.testing.assert_close(size.prod(1), torch.tensor([32.0**2, 64**2, 32**2, 64**2] * 6))
    torch.testing.assert_close(size[:, 1] / size[:, 0], torch.tensor([0.5, 0.5, 2, 2] * 6))
    centre = (first[:, :2] + first[:, 2:]) / 2
    torch.testing.assert_close(centre[4:8], torch.tensor([[8.0, 0]] * 4))
    torch.testing.assert_close(
        second[0], torch.tensor([-(64 / 0.5**0.5) / 2, -64 * 0.5**0.5 / 2] * 2) * torch.tensor([1, 1, -1, -1])
    )


@given(st.integers(0, 2**31))
def test_coder_round_trip(seed):
    coder = DeltaCoder((0.1, 0.1, 0.2, 0.2))
    anchors, boxes = boxes_of(seed, 5), boxes_of(seed + 1, 5)
    torch.testing.assert_close(coder.decode(coder.encode(boxes, anchors), anchors), boxes, atol=1e-2, rtol=1e-4)


def test_decoding_wild_deltas_stays_finite():
    wild = torch.tensor([[0.0, 0, 1e6, -1e6]])
    assert DeltaCoder().decode(wild, torch.tensor([[0.0, 0, 8, 8]])).isfinite().all()


def test_centerness_is_one_in_the_middle_and_zero_outside():
    box = torch.tensor([[0.0, 0, 10, 20]]).expand(4, 4)
    points = torch.tensor([[5.0, 10], [2.5, 10], [0, 10], [11, 10]])
    torch.testing.assert_close(centerness(points, box), torch.tensor([1.0, (2.5 / 7.5) ** 0.5, 0, 0]))


def test_clipping_to_height_and_width():
    clipped = clip_to_image(torch.tensor([[-5.0, -5, 300, 300]]), torch.tensor([100, 200]))
    assert clipped.tolist() == [[0, 0, 200, 100]]


# -- losses ------------------------------------------------------------------------------------------------------------


def test_focal_loss_is_torchvisions():
    logits, targets = torch.randn(50, 4) * 3, (torch.rand(50, 4) > 0.8).float()
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets), torchvision_focal_loss(logits, targets, 0.25, 2.0))


@given(st.integers(0, 2**31))
def test_giou_loss_is_torchvisions(seed):
    a, b = boxes_of(seed, 6), boxes_of(seed + 1, 6)
    torch.testing.assert_close(giou_loss(a, b), 1 - generalized_box_iou(a, b).diag(), atol=1e-5, rtol=1e-4)


def test_giou_gradients_are_finite_for_empty_boxes():
    boxes = torch.tensor([[5.0, 5, 5, 5], [0, 0, 0, 0]], requires_grad=True)
    giou_loss(boxes, torch.tensor([[5.0, 5, 5, 5], [3, 3, 9, 9]])).sum().backward()
    assert boxes.grad.isfinite().all()


# -- assignment --------------------------------------------------------------------------------------------------------


def atss_by_the_paper(anchors, per_level, boxes, top_k=9):
    """Algorithm 1, one object after the other."""
    owner, best = [-1] * len(anchors), [-1.0] * len(anchors)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    for number, box in enumerate(boxes):
        candidates, start = [], 0
        middle = (box[:2] + box[2:]) / 2
        for count in per_level:
            distance = (centres[start : start + count] - middle).norm(dim=1)
            candidates += [start + int(i) for i in distance.argsort()[:top_k]]
            start += count
        ious = box_iou(anchors[candidates], box[None])[:, 0]
        threshold = ious.mean() + ious.std()
        for index, iou in zip(candidates, ious.tolist(), strict=True):
            x, y = centres[index].tolist()
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if iou >= threshold and inside and iou > best[index]:
                owner[index], best[index] = number, iou
    return owner


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(0, 6))
def test_atss_assigns_as_the_paper_says(seed, count):
    generate = AnchorGenerator((8, 16, 32), [[64], [128], [256]], offset=0.5)
    levels = generate([torch.zeros(1, 1, s, s) for s in (16, 8, 4)])
    boxes = boxes_of(seed, count)
    anchors, per_level = torch.cat(levels), [len(x) for x in levels]
    assert atss_assign(anchors, per_level, boxes).tolist() == atss_by_the_paper(anchors, per_level, boxes)


# -- post-processing ---------------------------------------------------------------------------------------------------


def detections(logits, boxes, **changes):
    settings = {"score_threshold": 0.05, "pre_nms": 100, "nms_threshold": 0.5, "max_detections": 5} | changes
    return dense_detections([logits], None, lambda level, rows: boxes[rows], torch.tensor([[50, 50]]), **settings)


def test_only_boxes_of_one_class_suppress_one_another():
    boxes = torch.tensor([[0.0, 0, 20, 20], [1, 1, 21, 21], [30, 30, 80, 80]])
    logits = torch.tensor([[[3.0, -9], [2, 2.5], [1, -9]]])
    out = detections(logits, boxes)
    assert out.count.tolist() == [3] and out.labels[0, :3].tolist() == [0, 1, 0]
    assert out.boxes[0, 2].tolist() == [30, 30, 50, 50]  # clipped to the picture
    torch.testing.assert_close(out.scores[0], torch.tensor([3.0, 2.5, 1.0, -torch.inf, -torch.inf]).sigmoid())


def test_thresholds_and_limits():
    boxes = torch.tensor([[float(10 * i), 0, 10 * i + 9, 9] for i in range(4)])
    logits = torch.tensor([[[2.0], [1], [0], [-4]]])
    assert detections(logits, boxes).count.tolist() == [3]  # sigmoid(-4) < 0.05
    assert detections(logits, boxes, pre_nms=2).count.tolist() == [2]
    assert detections(logits, boxes, max_detections=1).labels.shape == (1, 1)
    assert detections(logits, boxes, score_threshold=0.999).count.tolist() == [0]


def test_ranking_by_the_product_keeps_another_set():
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 0, 29, 9]])
    logits, quality = torch.tensor([[[1.0], [0.5]]]), torch.tensor([[-3.0, 3.0]])
    kept = [
        dense_detections(
            [logits],
            [quality],
            lambda level, rows: boxes[rows],
            torch.tensor([[50, 50]]),
            score_threshold=0.05,
            pre_nms=1,
            nms_threshold=0.5,
            max_detections=1,
            rank_by_product=by_product,
        )
        .boxes[0, 0, 0]
        .item()
        for by_product in (False, True)
    ]
    assert kept == [0, 20]


class _Decode(torch.nn.Module):
    def forward(self, logits, boxes):
        return tuple(
            dense_detections(
                [logits],
                None,
                lambda level, rows: take_rows(boxes, rows),
                torch.tensor([[50, 50], [40, 60]]),
                score_threshold=0.05,
                pre_nms=20,
                nms_threshold=0.5,
                max_detections=8,
            )
        )


def test_decoding_exports_and_its_program_follows_the_data():
    generator = torch.Generator().manual_seed(0)

    def case():
        corner = torch.rand(2, 30, 2, generator=generator) * 40
        boxes = torch.cat((corner, corner + torch.rand(2, 30, 2, generator=generator) * 30), -1)
        return torch.randn(2, 30, 3, generator=generator) * 3 - 1, boxes

    program = torch.export.export(_Decode(), case()).module()
    for _ in range(3):
        inputs = case()
        for exported, eager in zip(program(*inputs), _Decode()(*inputs), strict=True):
            torch.testing.assert_close(exported, eager)
