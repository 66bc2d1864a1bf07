"""FCOS: its assignment against a literal version, torchvision's detector, the authors' checkpoints, losses by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection import fcos_resnet50_fpn

from dyhead_zoo import create_detector, get_pretrained_cfg, list_pretrained, load_checkpoint
from dyhead_zoo.convert.torchvision import convert_torchvision
from dyhead_zoo.layers.assigners import fcos_assign
from dyhead_zoo.layers.losses import iou_loss
from dyhead_zoo.models.fcos import FCOSOutput
from dyhead_zoo.ops.boxes import boxes_from_distances
from dyhead_zoo.weights import detect_source

# --- assignment -------------------------------------------------------------------------------------------------------

STRIDES = (8, 16)


def literal_owner(x, y, level, boxes, radius):
    """Section 3.1 and 3.2 of the paper, point by point."""
    nearest, farthest = [(0, 64), (64, math.inf)][level]
    best, area = -1, math.inf
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        sides = (x - x1, y - y1, x2 - x, y2 - y)
        centre = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
        if (
            min(sides) > 0
            and nearest <= max(sides) <= farthest
            and (radius is None or centre < radius * STRIDES[level])
            and (x2 - x1) * (y2 - y1) < area
        ):
            best, area = i, (x2 - x1) * (y2 - y1)
    return best


whole = st.integers(-20, 140).map(float)  # whole pixels: points fall on the limits of ranges and radii
sides = st.integers(0, 140).map(float)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(whole, whole, sides, sides), max_size=6), st.sampled_from([None, 0.5, 1.5]))
def test_assignment_is_that_of_the_paper(specs, radius):
    boxes = [(x, y, x + w, y + h) for x, y, w, h in specs]
    points = [[(8 * i + 4, 8 * j + 4) for j in range(12) for i in range(12)]]
    points.append([(16 * i + 8, 16 * j + 8) for j in range(6) for i in range(6)])
    places = torch.tensor(points[0] + points[1], dtype=torch.float32)
    owner = fcos_assign(places, [144, 36], STRIDES, torch.tensor(boxes).reshape(-1, 4), radius)
    assert owner.tolist() == [literal_owner(x, y, k, boxes, radius) for k in (0, 1) for x, y in points[k]]


def test_of_nested_objects_the_smaller_one_is_learned():
    boxes = torch.tensor([[0.0, 0, 60, 60], [10, 10, 40, 40]])
    owner = fcos_assign(torch.tensor([[20.0, 20], [50, 50], [70, 70]]), [3], [8], boxes, radius=None)
    assert owner.tolist() == [1, 0, -1]


# --- losses and boxes -------------------------------------------------------------------------------------------------


def test_boxes_lie_around_their_points():
    boxes = boxes_from_distances(torch.tensor([[10.0, 20]]), torch.tensor([[1.0, 2, 3, 4]]))
    assert boxes.tolist() == [[9, 18, 13, 24]]


def test_iou_loss_is_minus_log_and_ends_at_a_millionth():
    target = torch.tensor([[0.0, 0, 10, 10]]).expand(3, 4)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 5, 10], [20, 20, 30, 30]], requires_grad=True)
    loss = iou_loss(boxes, target)
    torch.testing.assert_close(loss.detach(), torch.tensor([0, math.log(2), -math.log(1e-6)]), atol=1e-5, rtol=1e-5)
    loss.sum().backward()
    assert boxes.grad.isfinite().all() and boxes.grad[2].abs().max() == 0


def raw_output(head, logit=-20.0, distance=16.0, centerness=0.0):
    sizes = [(64 // s or 1, 64 // s or 1) for s in head.strides]
    return FCOSOutput(
        tuple(torch.full((1, head.num_classes, *size), logit) for size in sizes),
        tuple(torch.full((1, 4, *size), distance) for size in sizes),
        tuple(torch.full((1, 1, *size), centerness) for size in sizes),
        torch.tensor([[64, 64]]),
        (64, 64),
    )


@pytest.mark.parametrize(
    ("flags", "threshold", "score"),
    [
        ({}, 0.4, 0.125),
        ({"sqrt_score": True}, 0.4, math.sqrt(0.125)),
        ({"sqrt_score": True, "threshold_score": True}, 0.3, math.sqrt(0.125)),
        ({"sqrt_score": True, "threshold_score": True}, 0.4, None),
        ({"threshold_score": True}, 0.2, None),
    ],
)
def test_scores_and_thresholds_of_the_variants(flags, threshold, score):
    head = create_detector("test_fcos", num_classes=3, score_threshold=threshold, **flags).head
    raw = raw_output(head, centerness=math.log(1 / 3))  # probability 1/4
    raw.cls_logits[0][0, 1, 4, 4] = 0.0
    found = head.decode_tensors(raw)
    assert found.count.tolist() == [0 if score is None else 1]
    if score is not None:
        assert found.scores[0, 0] == pytest.approx(score) and found.labels[0, 0] == 1
        assert found.boxes[0, 0].tolist() == [20, 20, 52, 52]  # around the middle of the cell


def test_perfect_predictions_cost_next_to_nothing():
    head = create_detector("test_fcos", num_classes=3).head
    raw = raw_output(head)
    raw.cls_logits[0][0, 2, 3:5, 3:5] = 20
    box = torch.tensor([[22.0, 22, 42, 42]])
    for i in (3, 4):
        for j in (3, 4):
            x, y = 8 * i + 4.0, 8 * j + 4.0
            raw.box_distances[0][0, :, j, i] = torch.tensor([x - 22, y - 22, 42 - x, 42 - y])
            ratio = (min(x - 22, 42 - x) / max(x - 22, 42 - x)) * (min(y - 22, 42 - y) / max(y - 22, 42 - y))
            raw.centerness[0][0, 0, j, i] = torch.logit(torch.tensor(math.sqrt(ratio)))
    losses = head.loss(raw, [{"boxes": box, "labels": torch.tensor([2])}])
    assert losses["loss_cls"] < 1e-4 and losses["loss_box"] < 1e-4
    missed = head.loss(raw, [{"boxes": box, "labels": torch.tensor([1])}])
    assert missed["loss_cls"] > 5


@pytest.mark.parametrize("option", ["distances", "centerness_on", "box_loss"])
def test_unknown_variants_are_named(option):
    with pytest.raises(ValueError, match=f"{option}='nonsense'"):
        create_detector("test_fcos", **{option: "nonsense"})


# --- torchvision ------------------------------------------------------------------------------------------------------


def torchvision_fcos(seed, **kwargs):
    """torchvision's detector with weights that are random but not idle: scores and boxes of all kinds."""
    torch.manual_seed(seed)
    model = fcos_resnet50_fpn(weights=None, weights_backbone=None, **kwargs)
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            if "bbox_reg" in name:
                parameter.copy_(
                    torch.randn_like(parameter) * 0.05 if parameter.ndim > 1 else torch.full_like(parameter, 2)
                )
        model.head.classification_head.cls_logits.weight.normal_(std=0.1)
        model.head.classification_head.cls_logits.bias.fill_(-3)
    return model


@pytest.mark.parametrize("size", [(128, 128), (96, 160)], ids=["even", "beyond the canvas"])
def test_torchvision_detections_and_losses(size):
    """96 x 160 px: its coarsest maps reach beyond the canvas, where torchvision's strides are not the nominal ones.

    torchvision's detections contain boxes without area, which we leave out.
    """
    settings = {"score_thresh": 0.05, "detections_per_img": 1000, "min_size": size[0], "max_size": size[1]}
    overlap = 0.597  # at 0.6, boxes cut at the borders overlap by just that, which dtypes round to either side
    theirs = torchvision_fcos(0, num_classes=5, nms_thresh=overlap, **settings)
    ours = create_detector("fcos_resnet50.torchvision_coco", num_classes=5, max_detections=1000, nms_threshold=overlap)
    ours.load_state_dict(convert_torchvision(theirs.state_dict(), keep_rows=True))
    theirs, ours = theirs.double(), ours.double()  # float32 rounds boxes by more than the tolerance
    pictures = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.eval()([picture.double() / 255 for picture in pictures])
        found = ours.decode(ours(pictures))
    for a, b in zip(found, expected, strict=True):
        real = (b["boxes"][:, 2:].float() > b["boxes"][:, :2].float()).all(1)
        b = {key: value[real] for key, value in b.items()}
        assert len(a) == len(b["scores"]) > 50
        torch.testing.assert_close(a.scores, b["scores"].float(), rtol=0, atol=1e-4)
        torch.testing.assert_close(a.boxes, b["boxes"].float(), rtol=0, atol=1e-4)
        assert torch.equal(a.labels, b["labels"])
    targets = [
        {"boxes": torch.tensor([[10.3, 12.1, 70.7, 80.9], [90.2, 20.4, 180.6, 110.8]]), "labels": torch.tensor([1, 4])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    theirs.train()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        expected = theirs([picture.double() / 255 for picture in pictures], [dict(t) for t in targets])
        found = ours.loss(ours(pictures), targets)
    names = {"loss_cls": "classification", "loss_box": "bbox_regression", "loss_centerness": "bbox_ctrness"}
    for name, their_name in names.items():
        torch.testing.assert_close(found[name], expected[their_name].float(), rtol=1e-4, atol=1e-5)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_torchvision_rows_of_background_and_unused_ids_are_dropped():
    with torch.device("meta"):
        checkpoint = fcos_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    checkpoint = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in checkpoint.items()}
    checkpoint["head.classification_head.cls_logits.bias"] = torch.arange(91.0)
    checkpoint = {
        key: value for key, value in checkpoint.items() if "num_batches" not in key
    }  # frozen norms, as published
    detector = create_detector("fcos_resnet50.torchvision_coco")
    assert detect_source(checkpoint) == "torchvision"
    report = load_checkpoint(detector, checkpoint)
    assert detector.head.cls_logits.bias.tolist() == list(detector.label_space.category_ids)
    assert "11 of 91 rows" in report.summary() and not report.fresh_classes


def test_torchvision_rows_of_other_classes_are_all_kept_but_the_first():
    theirs = torchvision_fcos(0, num_classes=4)
    converted = convert_torchvision(theirs.state_dict())
    assert torch.equal(converted["head.cls_logits.bias"], theirs.head.classification_head.cls_logits.bias[1:])


def tower_keys(prefix, channels=256):
    conv = {"weight": (channels, channels, 3, 3), "bias": (channels,)}
    norm = {"weight": (channels,), "bias": (channels,)}
    return {
        f"{prefix}{3 * i + j}.{k}": v for i in range(4) for j, part in enumerate((conv, norm)) for k, v in part.items()
    }


def head_keys(cls_tower, box_tower, logits, distances, centerness, scales):
    keys = tower_keys(cls_tower) | tower_keys(box_tower)
    for name, rows in ((logits, 80), (distances, 4), (centerness, 1)):
        keys |= {f"{name}.weight": (rows, 256, 3, 3), f"{name}.bias": (rows,)}
    return keys | {f"{scales}{i}.scale": (1,) for i in range(5)}


NORM = ("weight", "bias", "running_mean", "running_var")


def resnet_blocks(third=6):
    """(stage, block, {convolution: shape}) of a ResNet-50, or -101 with 23 blocks in its third stage."""
    inputs = 64
    for stage, (depth, width) in enumerate(zip((3, 4, third, 3), (64, 128, 256, 512), strict=True), start=1):
        for i in range(depth):
            convs = {"1": (width, inputs, 1, 1), "2": (width, width, 3, 3), "3": (4 * width, width, 1, 1)}
            if i == 0:
                convs["shortcut"] = (4 * width, inputs, 1, 1)
            yield stage, i, convs
            inputs = 4 * width


def official_keys(prefix, third=6):
    """maskrcnn-benchmark's layout."""
    keys = {"backbone.body.stem.conv1.weight": (64, 3, 7, 7)} | {f"backbone.body.stem.bn1.{n}": (64,) for n in NORM}
    for stage, i, convs in resnet_blocks(third):
        for name, shape in convs.items():
            conv, norm = ("downsample.0", "downsample.1") if name == "shortcut" else (f"conv{name}", f"bn{name}")
            block = f"backbone.body.layer{stage}.{i}."
            keys |= {f"{block}{conv}.weight": shape} | {f"{block}{norm}.{n}": shape[:1] for n in NORM}
    for i, channels in zip((2, 3, 4), (512, 1024, 2048), strict=True):
        for name, shape in (("inner", (256, channels, 1, 1)), ("layer", (256, 256, 3, 3))):
            keys |= {f"backbone.fpn.fpn_{name}{i}.weight": shape, f"backbone.fpn.fpn_{name}{i}.bias": (256,)}
    for p in ("p6", "p7"):
        keys |= {f"backbone.fpn.top_blocks.{p}.weight": (256, 256, 3, 3), f"backbone.fpn.top_blocks.{p}.bias": (256,)}
    head = "rpn.head."
    keys |= head_keys(
        *(head + n for n in ("cls_tower.", "bbox_tower.", "cls_logits", "bbox_pred", "centerness", "scales."))
    )
    return {prefix + key: shape for key, shape in keys.items()}


def adelaidet_keys():
    """detectron2's layout."""
    body = "backbone.bottom_up."
    keys = {"pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1), f"{body}stem.conv1.weight": (64, 3, 7, 7)}
    keys |= {f"{body}stem.conv1.norm.{n}": (64,) for n in NORM}
    for stage, i, convs in resnet_blocks():
        for name, shape in convs.items():
            conv = f"{body}res{stage + 1}.{i}." + (name if name == "shortcut" else f"conv{name}")
            keys |= {f"{conv}.weight": shape} | {f"{conv}.norm.{n}": shape[:1] for n in NORM}
    for i, channels in zip((3, 4, 5), (512, 1024, 2048), strict=True):
        for name, shape in (("lateral", (256, channels, 1, 1)), ("output", (256, 256, 3, 3))):
            keys |= {f"backbone.fpn_{name}{i}.weight": shape, f"backbone.fpn_{name}{i}.bias": (256,)}
    for p in ("p6", "p7"):
        keys |= {f"backbone.top_block.{p}.weight": (256, 256, 3, 3), f"backbone.top_block.{p}.bias": (256,)}
    head = "proposal_generator.fcos_head."
    return keys | head_keys(
        *(head + n for n in ("cls_tower.", "bbox_tower.", "cls_logits", "bbox_pred", "ctrness", "scales."))
    )


@pytest.mark.parametrize(
    ("name", "keys", "source"),
    [
        ("fcos_resnet50.official_1x_coco", official_keys(""), "maskrcnn_benchmark"),
        ("fcos_resnet50.official_improved_1x_coco", official_keys("module."), "maskrcnn_benchmark"),
        ("fcos_resnet101.official_improved_2x_coco", official_keys("", third=23), "maskrcnn_benchmark"),
        ("fcos_resnet50.adelaidet_1x_coco", adelaidet_keys(), "detectron2"),
        ("fcos_resnet50.adelaidet_2x_coco", adelaidet_keys(), "detectron2"),
    ],
)
def test_every_key_of_the_authors_has_its_place(name, keys, source):
    """Values that tell the tensors apart: each arrives where its name says."""
    checkpoint = {key: torch.full(shape, float(i)) for i, (key, shape) in enumerate(keys.items())}
    detector = create_detector(name)
    assert detect_source(checkpoint) == source == get_pretrained_cfg(name).source
    load_checkpoint(detector, {"model": checkpoint})
    tower = "cls_tower.0.weight"
    (head,) = (key.removesuffix(tower) for key in keys if key.endswith(tower))
    value = {key.removeprefix(head): float(i) for i, key in enumerate(keys)}
    assert detector.head.cls_tower[3].norm.bias.unique().item() == value["cls_tower.10.bias"]
    assert detector.head.box_tower[2].conv.weight.unique().item() == value["bbox_tower.6.weight"]
    assert detector.head.box_distances.weight.unique().item() == value["bbox_pred.weight"]
    assert detector.head.scales.tolist() == [value[f"scales.{i}.scale"] for i in range(5)]


def mmdet_keys(body, tower_bias):
    """mmdetection names a ResNet's parts as torchvision does."""
    with torch.device("meta"):
        state = getattr(torchvision.models, body)().state_dict()
    keys = {f"backbone.{key}": tuple(value.shape) for key, value in state.items() if not key.startswith("fc.")}
    for i, channels in enumerate((512, 1024, 2048)):
        keys |= {
            f"neck.lateral_convs.{i}.conv.weight": (256, channels, 1, 1),
            f"neck.lateral_convs.{i}.conv.bias": (256,),
        }
    for i in range(5):
        keys |= {f"neck.fpn_convs.{i}.conv.weight": (256, 256, 3, 3), f"neck.fpn_convs.{i}.conv.bias": (256,)}
    for i in range(4):
        for branch in ("cls_convs", "reg_convs"):
            keys |= {f"bbox_head.{branch}.{i}.conv.weight": (256, 256, 3, 3)}
            keys |= {f"bbox_head.{branch}.{i}.gn.weight": (256,), f"bbox_head.{branch}.{i}.gn.bias": (256,)}
            keys |= {f"bbox_head.{branch}.{i}.conv.bias": (256,)} if tower_bias else {}
    for name, rows in (("conv_cls", 80), ("conv_reg", 4), ("conv_centerness", 1)):
        keys |= {f"bbox_head.{name}.weight": (rows, 256, 3, 3), f"bbox_head.{name}.bias": (rows,)}
    return keys | {f"bbox_head.scales.{i}.scale": () for i in range(5)}


@pytest.mark.parametrize("name", [n for n in list_pretrained("fcos*") if ".mmdet" in n])
def test_every_mmdet_key_has_its_place(name):
    body = name.removeprefix("fcos_").partition(".")[0]
    keys = mmdet_keys(body, tower_bias="improved" in name)
    with torch.device("meta"):
        detector = create_detector(name)
        checkpoint = {key: torch.empty(shape) for key, shape in keys.items()}
    report = load_checkpoint(detector, checkpoint)
    assert report.source == get_pretrained_cfg(name).source == "mmdet"
    assert len(report.loaded) == len(keys) - 4  # the five scales become one parameter
