"""Mask R-CNN: mask targets, torchvision's masks, published keys, learning shapes."""

from __future__ import annotations

import pytest
import torch
from data_helpers import shapes_coco
from rcnn_helpers import (
    beside_torchvision,
    check_detections,
    check_losses,
    check_published_keys,
    detectron2_keys,
    mmdet_keys,
    torchvision_keys,
)
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2

from dyhead_zoo import LabelSpace, PretrainedCfg, create_detector, list_detectors, list_tags, load_checkpoint
from dyhead_zoo.data import CocoDataset, make_eval_loader
from dyhead_zoo.engine.evaluate import evaluate
from dyhead_zoo.layers.roi_heads import mask_targets

BUILDERS = {
    "mask_rcnn_resnet50.torchvision_coco": maskrcnn_resnet50_fpn,
    "mask_rcnn_resnet50.torchvision_v2_coco": maskrcnn_resnet50_fpn_v2,
}


def test_mask_targets_are_what_a_box_shows_of_its_object():
    masks = torch.zeros(2, 40, 40, dtype=torch.bool)
    masks[0, 10:20, 10:30] = True
    masks[1] = True
    boxes = torch.tensor([[10.0, 10, 30, 20], [10, 0, 30, 20], [30, 20, 40, 40], [0, 0, 5, 5]])
    found = mask_targets(masks, torch.tensor([0, 0, 0, 1]), boxes, 28, aligned=True, binary=True)
    assert found[0].all() and not found[2].any() and found[3].all()
    assert not found[1, :13].any() and found[1, 15:].all()  # the lower half
    soft = mask_targets(masks, torch.tensor([0]), torch.tensor([[10.0, 9.5, 30, 19.5]]), 28, aligned=True, binary=False)
    assert ((soft > 0.1) & (soft < 0.9)).any() and soft.max() == 1


def test_no_mask_targets():
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    assert mask_targets(torch.zeros(0, 8, 8), *nothing, 28, aligned=True, binary=True).shape == (0, 28, 28)


def test_targets_without_masks_are_an_error():
    detector = create_detector("test_mask_rcnn", num_classes=3)
    raw = detector(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="masks"):
        detector.loss(raw, [{"boxes": torch.tensor([[5.0, 5, 20, 20]]), "labels": torch.tensor([0])}])


def test_masks_come_with_the_boxes():
    detector = create_detector("test_mask_rcnn", num_classes=3, score_threshold=0.0, max_detections=10)
    raw = detector(torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8), torch.tensor([[64, 96], [50, 60]]))
    with torch.no_grad():
        out = detector.decode_tensors(raw)
        (_, second) = detector.decode(raw)
    assert out.masks.shape == (2, 10, 28, 28) and 0 < out.masks.min() < out.masks.max() < 1
    assert second.paste(50, 60).shape == (10, 50, 60)


def test_no_detection_no_mask():
    detector = create_detector("test_mask_rcnn", num_classes=3, score_threshold=1.0)
    (found,) = detector.decode(detector(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)))
    assert len(found) == 0 and found.masks.shape == (0, 28, 28)


def test_one_box_and_one_mask_for_all_classes():
    torch.manual_seed(0)
    detector = create_detector("test_mask_rcnn", num_classes=3, class_agnostic=True, class_agnostic_masks=True)
    state = detector.state_dict()
    assert (len(state["head.box.0.box_deltas.bias"]), len(state["head.mask.0.logits.bias"])) == (4, 1)
    raw = detector(torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8))
    target = {
        "boxes": torch.tensor([[5.0, 5, 40, 60], [50, 8, 90, 50]]),
        "labels": torch.tensor([2, 0]),
        "masks": torch.ones(2, 64, 96, dtype=torch.bool),
    }
    sum(detector.loss(raw, [target]).values()).backward()
    assert all(p.grad is not None for p in detector.head.parameters())
    detector.head.score_threshold = 0.0
    (found,) = detector.decode(raw)
    assert found.masks is not None and len(found.masks) == len(found) > 0 and len(found.labels.unique()) == 3
    relabelled = create_detector("test_mask_rcnn", num_classes=5, class_agnostic=True, class_agnostic_masks=True)
    load_checkpoint(relabelled, state, label_space=LabelSpace.from_names(["a", "b", "c"]))
    assert torch.equal(relabelled.head.mask[0].logits.bias, detector.head.mask[0].logits.bias)


def test_mask_rows_follow_their_class_name():
    source = create_detector("test_mask_rcnn", class_names=["cat", "dog", "kite"])
    target = create_detector("test_mask_rcnn", class_names=["kite", "cat"])
    load_checkpoint(target, source.state_dict(), label_space=source.label_space)
    assert torch.equal(target.head.mask[0].logits.weight, source.head.mask[0].logits.weight[[2, 0]])


def test_learns_the_shapes_of_objects(tmp_path):
    """Circles, rectangles and triangles whose colours say nothing: boxes and masks found again, by COCO's measure."""
    paths = shapes_coco(tmp_path, count=3)  # with an object of each class
    data = CocoDataset(*paths, masks=True)
    cfg = PretrainedCfg(short_side=96, long_side=96)
    (batch,) = make_eval_loader(data, cfg, 3)
    detector = create_detector(
        "test_mask_rcnn",
        class_names=data.label_space,
        fpn_norm=True,
        samples=(64, 24),
        proposals=(30, 20),
        pretrained_cfg=cfg,
    )
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 110)
    for _ in range(110):
        losses = detector.loss(detector(batch.images, batch.image_sizes), batch.targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
    result = evaluate(detector, images=paths[0], annotations=paths[1], progress=False)
    assert result.metrics["AP"] > 0.8 and result.metrics["mask_AP"] > 0.8


# --- torchvision and published keys -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=BUILDERS)
def both(request):
    return beside_torchvision(BUILDERS[request.param], request.param)


def test_torchvision_detections_and_masks(both):
    check_detections(*both)


def test_torchvision_losses(both):
    check_losses(*both, masks=True)


TAGS = [f"{name}.{tag}" for name in list_detectors("mask_rcnn_*") for tag in list_tags(name) if tag]


@pytest.mark.parametrize("name", TAGS)
def test_every_published_key_has_its_place(name):
    arch, tag = name.split(".")
    body = arch.removeprefix("mask_rcnn_")
    if tag.startswith("torchvision"):
        keys = torchvision_keys(BUILDERS[name], old="v2" not in tag)
    else:
        keys = (mmdet_keys if tag.startswith("mmdet") else detectron2_keys)("mask_rcnn", body)
    check_published_keys(name, keys)
