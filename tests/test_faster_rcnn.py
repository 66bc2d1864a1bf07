"""Faster R-CNN: sampling, RoI levels, losses by hand, torchvision's detectors, published keys, learning."""

from __future__ import annotations

import math

import pytest
import torch
from data_helpers import painted
from rcnn_helpers import (
    beside_torchvision,
    check_detections,
    check_losses,
    check_published_keys,
    detectron2_keys,
    dyhead_keys,
    mmdet_keys,
    torchvision_keys,
)
from torchvision.models.detection import (
    fasterrcnn_mobilenet_v3_large_320_fpn,
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
)
from torchvision.ops import MultiScaleRoIAlign, box_iou

from dyhead_zoo import create_detector, list_detectors, list_tags, load_checkpoint, save_for_hub
from dyhead_zoo.layers.assigners import BACKGROUND, IGNORED, max_iou_assign
from dyhead_zoo.layers.roi_heads import BoxHead, RoIPooler, as_rois
from dyhead_zoo.layers.rpn import sample
from dyhead_zoo.weights import CheckpointError, detect_source

BUILDERS = {
    "faster_rcnn_resnet50.torchvision_coco": fasterrcnn_resnet50_fpn,
    "faster_rcnn_resnet50.torchvision_v2_coco": fasterrcnn_resnet50_fpn_v2,
    "faster_rcnn_mobilenetv3_large.torchvision_320_coco": fasterrcnn_mobilenet_v3_large_320_fpn,
    "faster_rcnn_mobilenetv3_large.torchvision_coco": fasterrcnn_mobilenet_v3_large_fpn,
}

# --- parts ------------------------------------------------------------------------------------------------------------


def test_samples_are_limited_drawn_at_random_and_repeatable():
    owner = torch.tensor([3] * 40 + [BACKGROUND] * 500 + [IGNORED] * 60)
    positive, negative = sample(owner, 64, 0.25)
    assert len(positive) == 16 and len(negative) == 48
    assert (owner[positive] == 3).all() and (owner[negative] == BACKGROUND).all()
    assert len(set(positive.tolist())) == 16 and len(set(negative.tolist())) == 48
    torch.manual_seed(1)
    first = sample(owner, 64, 0.25)[1].tolist()
    assert sample(owner, 64, 0.25)[1].tolist() != first
    torch.manual_seed(1)
    assert sample(owner, 64, 0.25)[1].tolist() == first


def test_negatives_fill_what_positives_leave():
    positive, negative = sample(torch.tensor([0, BACKGROUND, BACKGROUND, IGNORED, BACKGROUND]), 3, 0.5)
    assert positive.tolist() == [0] and len(negative) == 2
    positive, negative = sample(torch.tensor([IGNORED]), 3, 0.5)
    assert len(positive) == len(negative) == 0


def test_an_anchor_is_rescued_only_above_the_least_overlap():
    anchors, box = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]), torch.tensor([[0.0, 0, 10, 4]])
    settings = {"positive": 0.7, "negative": 0.3, "low_quality": "owner"}
    assert max_iou_assign(anchors, box, **settings, least=0.3).tolist() == [0, BACKGROUND]
    assert max_iou_assign(anchors, box, **settings, least=0.5).tolist() == [IGNORED, BACKGROUND]


def test_regions_are_read_from_the_level_of_their_size():
    pooler = RoIPooler((4, 8, 16, 32))
    sides = torch.tensor([1.0, 111, 113, 223, 225, 447, 449, 4000])
    rois = as_rois([torch.stack((sides * 0, sides * 0, sides, sides), dim=1)])
    assert pooler.levels(rois).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert pooler.levels(torch.tensor([[0.0, 5, 5, 5, 5]])).tolist() == [0]  # an empty box


def test_pooling_is_torchvisions():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 3, 256 // s, 256 // s, generator=generator) for s in (4, 8, 16, 32)]
    corner = torch.rand(2, 20, 2, generator=generator) * 100
    boxes = torch.cat((corner, corner + 156 * torch.rand(2, 20, 2, generator=generator) ** 2), dim=-1)
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    expected = theirs(dict(zip("0123", features, strict=True)), list(boxes), [(256, 256)] * 2)
    found = RoIPooler((4, 8, 16, 32), aligned=False, sampling=2)(features, as_rois(list(boxes)), 7)
    torch.testing.assert_close(found, expected)


def test_no_region_at_all():
    pooler = RoIPooler((4, 8))
    features = [torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4)]
    assert pooler(features, as_rois([torch.zeros(0, 4)]), 7).shape == (0, 3, 7, 7)


# --- the detector -----------------------------------------------------------------------------------------------------


def tiny(**kwargs):
    return create_detector("test_faster_rcnn", num_classes=3, **kwargs)


def test_proposals_do_not_overlap_too_much_within_a_level():
    detector = tiny()
    images = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)
    with torch.no_grad():
        found = detector.head.propose(detector(images))
    count = int(found.count[0])
    boxes, levels = found.boxes[0, :count], found.labels[0, :count]
    assert 20 < count <= 100 and (found.scores[0, :count].diff() <= 0).all()
    overlap = box_iou(boxes, boxes).fill_diagonal_(0)
    assert overlap[levels[:, None] == levels].max() <= 0.7
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 128 and boxes[:, 3].max() <= 96
    assert (found.boxes[0, count:] == 0).all()


def test_the_objects_own_boxes_are_among_the_regions():
    detector = tiny()
    boxes = torch.tensor([[10.0, 10, 50, 60], [5.0, 5, 5, 9]])  # the second has no area
    target = {"boxes": boxes, "labels": torch.tensor([2, 1])}
    drawn = detector.head._draw(0, [torch.tensor([[12.0, 10, 50, 60], [80, 80, 90, 90]])], [target])
    assert drawn.boxes[0].tolist() == [[10, 10, 50, 60], [12, 10, 50, 60], [80, 80, 90, 90]]
    assert drawn.labels[0].tolist() == [2, 2, 3] and drawn.owner[0].tolist() == [0, 0]
    assert drawn.added[0].tolist() == [True, False, False]


def test_first_losses():
    """Fresh heads are undecided: log 2 per anchor, and log of the number of rows per region."""
    detector = tiny()
    for layer in (detector.head.rpn.objectness, detector.head.box[0].cls_logits):
        torch.nn.init.zeros_(layer.weight)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    targets = [
        {"boxes": torch.tensor([[8.0, 8, 50, 50]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    losses = detector.loss(detector(images), targets)
    assert losses["loss_rpn_cls"].item() == pytest.approx(math.log(2), rel=1e-5)
    assert losses["loss_cls"].item() == pytest.approx(math.log(4), rel=1e-5)


def test_losses_draw_by_torchs_generator():
    detector = tiny(samples=(16, 16))
    raw = detector(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    target = [{"boxes": torch.tensor([[8.0, 8, 50, 50]]), "labels": torch.tensor([1])}]

    def total(seed):
        torch.manual_seed(seed)
        return sum(detector.loss(raw, target).values()).item()

    assert total(1) == total(1) != total(2)


def test_rows_follow_their_class_name_and_the_background_stays():
    source = create_detector("test_faster_rcnn", class_names=["cat", "dog", "kite"])
    target = create_detector("test_faster_rcnn", class_names=["kite", "cat"])
    report = load_checkpoint(target, source.state_dict(), label_space=source.label_space)
    assert report.copied_classes == ("kite", "cat")
    theirs, ours = source.head.box[0], target.head.box[0]
    assert torch.equal(ours.cls_logits.weight, theirs.cls_logits.weight[[2, 0, 3]])
    assert torch.equal(ours.box_deltas.weight, theirs.box_deltas.weight.unflatten(0, (3, 4))[[2, 0]].flatten(0, 1))


PAPERS_VARIANT = [
    ("test_faster_rcnn_dyhead1", {}),
    ("test_faster_rcnn_dyhead1", {"formulation": "paper"}),
    ("test_mask_rcnn_dyhead1", {"coarse_offsets": "reinterpret"}),
    ("test_cascade_rcnn_dyhead1", {}),
]


@pytest.mark.parametrize(("name", "options"), PAPERS_VARIANT)
def test_one_switch_moves_task_attention_behind_pooling(name, options):
    released, paper, both = (
        create_detector(name, num_classes=3, score_threshold=0.0, **options, **switches)
        for switches in ({}, {"task_after_roi": True}, {"task_after_roi": True, "task": True})
    )
    before, behind, layers = ".task.", ".attention.", ".fcs."
    for detector, there in ((released, (before, layers)), (paper, (behind,)), (both, (before, behind))):
        keys = detector.state_dict()
        assert [part for part in (before, behind, layers) if any(part in key for key in keys)] == list(there)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    sizes = torch.tensor([[64, 64], [40, 56]])
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[:, 10:40, 10:40] = True
    targets = [
        {"boxes": torch.tensor([[8.0, 8, 50, 50]]), "labels": torch.tensor([1]), "masks": masks},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": masks[:0, :40, :56]},
    ]
    theirs, ours = (detector.loss(detector(images, sizes), targets) for detector in (released, paper))
    assert theirs.keys() == ours.keys() and all(term.isfinite() for term in ours.values())
    sum(ours.values()).backward()
    for key, parameter in paper.named_parameters():
        assert parameter.grad is not None and (parameter.grad.any() or behind not in key), key
    with torch.no_grad():
        found = paper.decode(paper(images, sizes))
        (alone,) = paper.decode(paper(images[:1], sizes[:1]))
    assert all(len(d) > 10 and d.boxes.isfinite().all() for d in found)
    assert torch.allclose(alone.scores, found[0].scores, atol=1e-5)


def test_the_papers_variant_comes_back_from_a_folder_and_from_its_arguments(tmp_path):
    detector = create_detector("test_faster_rcnn_dyhead1", num_classes=3, task_after_roi=True)
    save_for_hub(detector, tmp_path)
    again = create_detector(f"local-dir:{tmp_path}")
    assert again.config()["arch"]["task"] is False and again.state_dict().keys() == detector.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in detector.state_dict().items())
    with pytest.raises(CheckpointError, match="attention"):  # weights of one variant do not pass for those of the other
        create_detector("test_faster_rcnn_dyhead1", num_classes=3, checkpoint=detector.state_dict())


def test_task_attention_behind_pooling_tells_regions_apart():
    """Its coefficients come from the region, not from the picture: other regions change nothing."""
    head = BoxHead(8, 4, 3, size=7, hidden=(1, 1), task_attention=True)
    assert len(head.attention) == 2
    x = torch.randn(5, 8, 7, 7)
    scaled = torch.cat((x[:1], 3 * x[1:]))
    for ours, theirs in zip(head(x), head(scaled), strict=True):
        assert torch.allclose(ours[0], theirs[0], atol=1e-6) and not torch.allclose(ours[1:], theirs[1:])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"rpn_reach": "nonsense"}, "rpn_reach='nonsense'"),
        ({"rpn_low_quality": "nonsense"}, "rpn_low_quality='nonsense'"),
        ({"score_mean": "nonsense"}, "score_mean='nonsense'"),
        ({"stage_ious": (0.5, 0.6)}, "one of each per stage"),
        ({"mask_heads": 2}, "mask_heads=2"),
        ({"roi_levels": 9}, "roi_levels=9: use 1..5"),
        ({"proposals": 50}, "proposals=50: give two numbers"),
    ],
)
def test_unknown_variants_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        tiny(**option)


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [("test_faster_rcnn", {}, 60), ("test_faster_rcnn_dyhead1", {"task_after_roi": True}, 45)],
)
def test_learns_four_pictures(name, options, steps):
    """Rectangles in the colours of their classes: found again, all four, and nothing else with confidence."""
    boxes = [[[8, 8, 40, 40]], [[20, 30, 60, 56]], [[4, 20, 30, 60]], [[30, 4, 62, 34]]]
    targets = [
        {"boxes": torch.tensor(b, dtype=torch.float32), "labels": torch.tensor([i % 3])} for i, b in enumerate(boxes)
    ]
    images = torch.stack([painted(64, 64, t["boxes"], t["labels"]) for t in targets])
    detector = create_detector(name, num_classes=3, fpn_norm=True, samples=(64, 64), proposals=(50, 50), **options)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    for _ in range(steps):
        losses = detector.loss(detector(images), targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    with torch.no_grad():
        found = detector.decode(detector(images))
    for detections, target in zip(found, targets, strict=True):
        sure = detections.above(0.5)
        assert sure.labels.tolist() == target["labels"].tolist()
        assert box_iou(sure.boxes, target["boxes"]).item() > 0.7


# --- torchvision and published keys -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=BUILDERS)
def both(request):
    return beside_torchvision(BUILDERS[request.param], request.param)


def test_torchvision_detections(both):
    check_detections(*both)


def test_torchvision_losses(both):
    check_losses(*both, masks=False)


def test_torchvision_rows_of_unused_ids_stay_in_the_softmax():
    name = "faster_rcnn_resnet50.torchvision_coco"
    shapes = torchvision_keys(fasterrcnn_resnet50_fpn, old=True)
    checkpoint = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    checkpoint["roi_heads.box_predictor.cls_score.bias"] = torch.arange(91.0)
    checkpoint["roi_heads.box_predictor.bbox_pred.bias"] = torch.arange(91.0 * 4)
    detector = create_detector(name)
    assert detect_source(checkpoint) == "torchvision"
    assert not load_checkpoint(detector, checkpoint).fresh_classes
    rows = detector.head.box[0].cls_logits.bias.tolist()
    ids = list(detector.label_space.category_ids)
    assert rows[:80] == ids and rows[-1] == 0 and sorted(rows) == list(range(91))
    assert detector.head.box[0].box_deltas.bias[::4].tolist() == [4 * i for i in ids]


TAGS = [f"{name}.{tag}" for name in list_detectors("faster_rcnn_*") for tag in list_tags(name) if tag]


@pytest.mark.parametrize("name", TAGS)
def test_every_published_key_has_its_place(name):
    arch, tag = name.split(".")
    body = arch.removeprefix("faster_rcnn_").removesuffix("_dyhead6")
    if tag.startswith("torchvision"):
        keys = torchvision_keys(BUILDERS[name], old="v2" not in tag)
    elif tag.startswith("mmdet"):
        keys = mmdet_keys("faster_rcnn", body)
    elif tag.startswith("official"):
        keys = detectron2_keys("faster_rcnn", body, "backbone.backbone.") | dyhead_keys()
    else:
        keys = detectron2_keys("faster_rcnn", body)
    check_published_keys(name, keys)
