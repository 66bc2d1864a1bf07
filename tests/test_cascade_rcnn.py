"""Cascade R-CNN: what passes from stage to stage, and published keys."""

from __future__ import annotations

import pytest
import torch
from rcnn_helpers import check_published_keys, detectron2_keys, mmdet_keys

from dyhead_zoo import create_detector, list_detectors, list_tags


def tiny(name="test_cascade_rcnn", **kwargs):
    return create_detector(name, num_classes=3, **kwargs)


def test_each_stage_looks_at_the_boxes_of_the_one_before():
    detector = tiny()
    for head in detector.head.box:
        torch.nn.init.zeros_(head.box_deltas.weight)
        head.box_deltas.bias.data = torch.tensor([1.0, 0, 0, 0])  # a tenth, then a twentieth of the width to the right
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        raw = detector(images)
        stages = detector.head.roi_forward(raw.features, [torch.tensor([[10.0, 10, 50, 50]])], raw.image_sizes)
    boxes = [stage.rois[0, 1:].tolist() for stage in stages]
    assert boxes[0] == [10, 10, 50, 50]
    assert boxes[1] == pytest.approx([14, 10, 54, 50])
    assert boxes[2] == pytest.approx([16, 10, 56, 50])
    assert detector.head._boxes(stages[-1])[0, 0].tolist() == pytest.approx([17.32, 10, 57.32, 50])


def test_boxes_are_clipped_between_stages():
    detector = tiny()
    torch.nn.init.zeros_(detector.head.box[0].box_deltas.weight)
    detector.head.box[0].box_deltas.bias.data = torch.tensor([10.0, 10, 0, 0])
    raw = detector(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), torch.tensor([[50, 60]]))
    stages = detector.head.roi_forward(raw.features, [torch.tensor([[10.0, 10, 50, 40]])], raw.image_sizes)
    assert stages[1].rois[0, 1:].tolist() == pytest.approx([50, 40, 60, 50])


def test_scores_are_means_of_the_stages():
    logits = torch.tensor([[[4.0, 0, 0, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 2]]])
    empty = torch.zeros(1, 5), torch.zeros(1, 4)
    detector = tiny()
    stages = [type("Stage", (), {"rois": empty[0], "cls_logits": x, "box_deltas": empty[1]}) for x in logits]
    torch.testing.assert_close(detector.head._scores(stages), logits.softmax(-1).mean(0)[:, :3])
    detector.head.score_mean = "logits"
    torch.testing.assert_close(detector.head._scores(stages), logits.mean(0).softmax(-1)[:, :3])


def test_later_stages_ask_for_more_and_count_less():
    detector = tiny()
    proposal = torch.tensor([[10.0, 10, 50, 35]])  # overlaps the object by 0.625
    target = [{"boxes": torch.tensor([[10.0, 10, 50, 50]]), "labels": torch.tensor([1])}]
    positives = [len(detector.head._draw(stage, [proposal], target).owner[0]) for stage in range(3)]
    assert positives == [2, 2, 1]  # one of them is the object itself
    raw = detector(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    for head in detector.head.box:
        torch.nn.init.zeros_(head.cls_logits.weight)
    losses = detector.loss(raw, target)
    undecided = torch.tensor(4.0).log()
    for stage, weight in enumerate((1, 0.5, 0.25)):
        torch.testing.assert_close(losses[f"loss_cls_{stage}"], weight * undecided)


def test_one_mask_head_or_one_per_stage():
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 10:50, 10:50] = True
    target = [{"boxes": torch.tensor([[10.0, 10, 50, 50]]), "labels": torch.tensor([1]), "masks": mask}]
    for heads in (1, 3):
        detector = tiny("test_cascade_mask_rcnn", mask_heads=heads, score_threshold=0.0)
        losses = detector.loss(detector(images), target)
        assert sorted(k for k in losses if "mask" in k) == [f"loss_mask_{i}" for i in range(heads)]
        (found,) = detector.decode(detector(images))
        assert found.masks.shape == (len(found), 28, 28)


TAGS = [f"{name}.{tag}" for name in list_detectors("cascade_*") for tag in list_tags(name) if tag]


@pytest.mark.parametrize("name", TAGS)
def test_every_published_key_has_its_place(name):
    arch, tag = name.split(".")
    family = "cascade_mask_rcnn" if "mask" in arch else "cascade_rcnn"
    body = arch.removeprefix(f"{family}_").removesuffix("_dyhead6")
    check_published_keys(name, (mmdet_keys if tag.startswith("mmdet") else detectron2_keys)(family, body))
