"""RetinaNet: its assignment against a literal version, torchvision's detectors, checkpoints, losses by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from parity_kit import assert_near
from torch import Tensor
from torchvision.models import resnet
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from dyhead_zoo import (
    PretrainedCfg,
    TrainStep,
    create_detector,
    get_pretrained_cfg,
    list_detectors,
    list_tags,
    load_checkpoint,
)
from dyhead_zoo.convert import CheckpointError, detectron2, mmdet, torchvision
from dyhead_zoo.convert.detectron2 import ratio_major
from dyhead_zoo.convert.torchvision import convert_torchvision
from dyhead_zoo.layers.anchors import AnchorGenerator
from dyhead_zoo.layers.assigners import BACKGROUND, IGNORED, max_iou_assign
from dyhead_zoo.layers.postprocess import by_place
from dyhead_zoo.models.retinanet import RetinaNetHead
from dyhead_zoo.weights import detect_source

Shapes = dict[str, tuple[int, ...]]
assign = partial(max_iou_assign, positive=0.5, negative=0.4)

# --- assignment -------------------------------------------------------------------------------------------------------

# few places and sizes, so that many overlaps are equal
box = st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(1, 5)] * 2).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


def boxes_of(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def literal_assign(anchors: Tensor, boxes: Tensor, low_quality: str) -> list[set[int]]:
    """What each anchor may learn, one anchor and one object after the other; several objects where they tie."""
    overlap = box_iou(anchors, boxes).tolist()
    allowed = []
    for row in overlap:
        if not row or max(row) < 0.4:
            allowed.append({BACKGROUND})
        elif max(row) < 0.5:
            allowed.append({IGNORED})
        else:
            allowed.append({j for j, value in enumerate(row) if value == max(row)})
    if low_quality == "none":
        return allowed
    for j in range(len(boxes)):
        best = max(row[j] for row in overlap)
        for i, row in enumerate(overlap):
            if best > 0 and row[j] == best:
                allowed[i] = {j} if low_quality == "owner" else {k for k, v in enumerate(row) if v == max(row)}
    return allowed


@settings(max_examples=100, deadline=None)
@given(st.lists(box, min_size=1, max_size=12), st.lists(box, max_size=5), st.sampled_from(["owner", "best", "none"]))
def test_assignment_is_the_literal_one(anchors, boxes, low_quality):
    found = assign(boxes_of(anchors), boxes_of(boxes), low_quality=low_quality).tolist()
    allowed = literal_assign(boxes_of(anchors), boxes_of(boxes), low_quality)
    assert all(owner in some for owner, some in zip(found, allowed, strict=True)), (found, allowed)


@settings(max_examples=60, deadline=None)
@given(st.lists(box, min_size=1, max_size=12), st.lists(box, min_size=1, max_size=5))
def test_best_is_what_torchvision_does(anchors, boxes):
    overlap = box_iou(boxes_of(boxes), boxes_of(anchors))
    assume((overlap.max(1).values > 0).all())  # torchvision gives an object that touches nothing everything
    expected = Matcher(0.5, 0.4, allow_low_quality_matches=True)(overlap)
    assert torch.equal(assign(boxes_of(anchors), boxes_of(boxes), low_quality="best"), expected)


def test_thresholds_and_the_ignored_band():
    anchors = boxes_of([[0, 0, 10, 5], [0, 0, 10, 4], [0, 0, 10, 3], [50, 50, 60, 60], [0, 0, 10, 10]])
    owner = assign(anchors, boxes_of([[0, 0, 10, 10]]), low_quality="none")
    assert owner.tolist() == [0, IGNORED, BACKGROUND, BACKGROUND, 0]  # overlaps 0.5, 0.4, 0.3, 0, 1


def test_rescued_anchors_learn_their_owner_or_their_best():
    """Of the second object the first anchor is the best one, though it overlaps the first object more."""
    anchors, boxes = boxes_of([[0, 0, 10, 10], [40, 0, 50, 10]]), boxes_of([[0, 0, 10, 8], [8, 8, 12, 12]])
    assert assign(anchors, boxes, low_quality="owner").tolist() == [1, BACKGROUND]
    assert assign(anchors, boxes, low_quality="best").tolist() == [0, BACKGROUND]


@pytest.mark.parametrize("low_quality", ["owner", "best", "none"])
def test_nothing_to_assign(low_quality):
    anchors = boxes_of([[0, 0, 10, 10], [5, 5, 9, 9]])
    empty, without_area, far = boxes_of([]), boxes_of([[3, 3, 3, 8]]), boxes_of([[100, 100, 110, 110]])
    for boxes in (empty, without_area, far):
        assert assign(anchors, boxes, low_quality=low_quality).tolist() == [BACKGROUND, BACKGROUND]
    assert assign(empty, anchors, low_quality=low_quality).shape == (0,)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_what_losses_are_divided_by():
    positives = torch.tensor([0.0, 3.0])

    def divisors(**kwargs):
        return RetinaNetHead(8, (8, 16), 2, **kwargs).divisors(positives).tolist()

    assert divisors() == [4, 4]  # at least one per picture
    assert divisors(normaliser="per_image") == [2, 6]
    head = RetinaNetHead(8, (8, 16), 2, normaliser="running")
    assert head.divisors(positives).tolist() == pytest.approx([90.3] * 2)  # 0.9 x 100 + 0.1 x 3
    assert head.divisors(torch.zeros(2)).tolist() == pytest.approx([81.37] * 2)
    assert head.eval().divisors(positives).tolist() == pytest.approx([81.37] * 2)
    assert head.state_dict()["running_positives"].item() == pytest.approx(81.37)


def test_the_running_mean_moves_only_in_training():
    detector = create_detector("test_retinanet", num_classes=3, normaliser="running")
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    target = {"boxes": torch.tensor([[8.0, 8, 50, 50]]), "labels": torch.tensor([1])}
    for training, moved in ((False, False), (True, True)):
        detector.train(training)
        losses = TrainStep(detector)(images, torch.tensor([[64, 64]]), [target])
        sum(losses.values()).backward()
        assert (detector.head.running_positives.item() != 100) is moved
        assert not detector.head.running_positives.requires_grad


def test_cells_in_the_padding_are_negatives_or_take_no_part():
    images, sizes = torch.zeros(1, 3, 64, 128, dtype=torch.uint8), torch.tensor([[64, 60]])
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([0])}
    inside, everywhere = (
        create_detector("test_retinanet", num_classes=1, train_padding=flag) for flag in (False, True)
    )
    places, owner = inside.head.assign(inside(images, sizes), [target])
    anchors = torch.cat(places)
    left = (anchors[:, 0] + anchors[:, 2]) / 2 < 64  # 60 px, rounded up
    assert (owner[0, ~left] == IGNORED).all() and (owner[0, left] == BACKGROUND).any()
    _, owner = everywhere.head.assign(everywhere(images, sizes), [target])
    assert (owner[0, ~left] == BACKGROUND).all()


def test_losses_by_hand():
    """One positive anchor exactly on its object, all logits and deltas 0: -log(1/2) times the weights of Eq. 5."""
    head = RetinaNetHead(8, (8,), 2, box_loss="l1")
    raw = head([torch.zeros(1, 8, 2, 2)], torch.tensor([[16, 16]]), (16, 16))
    raw = raw._replace(cls_logits=(torch.zeros(1, 18, 2, 2),), box_deltas=(torch.full((1, 36, 2, 2), 0.25),))
    anchor = head.anchors(raw.cls_logits)[0][13]  # second cell, ratio 1, second size
    losses = head.loss(raw, [{"boxes": anchor[None], "labels": torch.tensor([1])}])
    _, owner = head.assign(raw, [{"boxes": anchor[None], "labels": torch.tensor([1])}])
    positive, ignored = int((owner == 0).sum()), int((owner == IGNORED).sum())
    negative_terms = 2 * (36 - positive - ignored) + positive  # of two classes, and the other class of the positives
    bce = torch.tensor(2.0).log() * 0.25  # (1 - 1/2)^2
    expected = (0.25 * positive + 0.75 * negative_terms) * bce / positive
    torch.testing.assert_close(losses["loss_cls"], expected)
    coded = head.coder.encode(anchor.expand(positive, 4), head.anchors(raw.cls_logits)[0][owner[0] == 0])
    torch.testing.assert_close(losses["loss_box"], (0.25 - coded).abs().sum() / positive)


@pytest.mark.parametrize("option", ["low_quality", "normaliser", "box_loss"])
def test_unknown_variants_are_named(option):
    with pytest.raises(ValueError, match=f"{option}='nonsense'"):
        create_detector("test_retinanet", **{option: "nonsense"})


# --- torchvision ------------------------------------------------------------------------------------------------------

BUILDERS = {
    "retinanet_resnet50.torchvision_coco": retinanet_resnet50_fpn,
    "retinanet_resnet50.torchvision_v2_coco": retinanet_resnet50_fpn_v2,
}
EPS = {"retinanet_resnet50.torchvision_coco": 0.0, "retinanet_resnet50.torchvision_v2_coco": 1e-5}


def torchvision_retinanet(name, **kwargs):
    """torchvision's detector with weights that are random but not idle: scores and boxes of all kinds.

    One norm has so small a variance that its eps shows; torchvision sets it when it loads its first version's weights.
    """
    torch.manual_seed(0)
    model = BUILDERS[name](weights=None, weights_backbone=None, **kwargs)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.eps = EPS[name]
        block = model.backbone.body.layer3[0]
        block.conv1.weight.mul_(0.01)
        block.bn1.running_var.fill_(1e-4)
        for branch in (model.head.classification_head, model.head.regression_head):
            for conv in (module for module in branch.conv.modules() if isinstance(module, torch.nn.Conv2d)):
                torch.nn.init.kaiming_normal_(conv.weight)
        outputs = model.eval().head(list(model.backbone(torch.randn(1, 3, 64, 64)).values()))
        model.head.classification_head.cls_logits.weight.div_(outputs["cls_logits"].std())
        model.head.classification_head.cls_logits.bias.fill_(-3)
        model.head.regression_head.bbox_reg.weight.div_(2 * outputs["bbox_regression"].std())
    return model


@pytest.fixture(scope="module", params=BUILDERS)
def both(request):
    """torchvision's detector and ours with the same weights, with all rows of the classifier."""
    theirs = torchvision_retinanet(request.param, num_classes=5).eval()
    ours = create_detector(request.param, num_classes=5, max_detections=300, norm_eps=EPS[request.param])
    ours.load_state_dict(convert_torchvision(theirs.state_dict(), keep_rows=True))
    return theirs.double(), ours.double()  # float32 rounds boxes by more than the tolerance


SIZES = pytest.mark.parametrize("size", [(128, 128), (96, 160)], ids=["even", "beyond the canvas"])
"""The coarsest maps of 96 x 160 px reach beyond the canvas, where torchvision's strides are not the nominal ones."""


def pictures_for(theirs, size, count=2):
    """Pictures of a size that torchvision's transform leaves as it is."""
    theirs.transform.min_size, theirs.transform.max_size = (min(size),), max(size)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@SIZES
def test_torchvision_outputs_and_anchors(both, size):
    theirs, ours = both
    pictures = pictures_for(theirs, size)
    with torch.no_grad():
        batch, _ = theirs.transform(list(pictures.double() / 255))
        features = list(theirs.backbone(batch.tensors).values())
        raw = ours(pictures)
        for level, (logits, deltas) in enumerate(zip(raw.cls_logits, raw.box_deltas, strict=True)):
            expected = theirs.head([features[level]])
            assert_near(by_place(logits, 5), expected["cls_logits"], f"classes of level {level}")
            assert_near(by_place(deltas, 4), expected["bbox_regression"], f"boxes of level {level}")
        anchors = torch.cat(ours.head.anchors(raw.cls_logits, raw.canvas))
        assert torch.equal(anchors, theirs.anchor_generator(batch, features)[0])


@SIZES
def test_torchvision_detections(both, size):
    """torchvision's detections contain boxes without area, which we leave out."""
    theirs, ours = both
    pictures = pictures_for(theirs, size)
    with torch.no_grad():
        expected = theirs([picture.double() / 255 for picture in pictures])
        found = ours.decode(ours(pictures))
    for a, b in zip(found, expected, strict=True):
        real = (b["boxes"][:, 2:] > b["boxes"][:, :2]).all(1)
        count = int(real.sum())
        assert len(a) >= count > 50
        torch.testing.assert_close(a.scores[:count], b["scores"][real].float(), rtol=0, atol=1e-4)
        torch.testing.assert_close(a.boxes[:count], b["boxes"][real].float(), rtol=0, atol=1e-4)
        assert torch.equal(a.labels[:count], b["labels"][real])


@SIZES
def test_torchvision_losses(both, size):
    theirs, ours = both
    pictures = pictures_for(theirs, size, count=3)
    targets = [
        {"boxes": torch.tensor([[10.3, 12.1, 70.7, 80.9], [90.2, 20.4, 121.6, 90.8]]), "labels": torch.tensor([1, 4])},
        {"boxes": torch.tensor([[5.0, 4, 90, 93]]), "labels": torch.tensor([0])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    theirs.training = True  # losses, while its norms stay in evaluation mode
    with torch.no_grad():
        expected = theirs([picture.double() / 255 for picture in pictures], [dict(target) for target in targets])
        found = ours.loss(ours(pictures), targets)
    theirs.training = False
    for key, their_key in (("loss_cls", "classification"), ("loss_box", "bbox_regression")):
        assert found[key] > 0.01
        torch.testing.assert_close(found[key], expected[their_key].float(), rtol=1e-4, atol=1e-5)


def test_torchvision_rows_of_background_and_unused_ids_are_dropped_of_each_anchor():
    name = "retinanet_resnet50.torchvision_coco"
    checkpoint = {key: torch.zeros(shape) for key, shape in published_torchvision(name).items()}
    checkpoint["head.classification_head.cls_logits.bias"] = torch.arange(9 * 91.0)
    detector = create_detector(name)
    assert detect_source(checkpoint) == "torchvision" == get_pretrained_cfg(name).source
    report = load_checkpoint(detector, checkpoint)
    ids = detector.label_space.category_ids
    assert detector.head.cls_logits.bias.tolist() == [91 * anchor + i for anchor in range(9) for i in ids]
    assert "99 of 819 rows" in report.summary() and not report.fresh_classes


def test_rows_of_each_anchor_follow_their_class_name():
    source = create_detector("test_retinanet", class_names=["cat", "dog", "kite"])
    target = create_detector("test_retinanet", class_names=["kite", "cat"])
    report = load_checkpoint(target, source.state_dict(), label_space=source.label_space)
    assert report.copied_classes == ("kite", "cat")
    theirs, ours = (d.head.cls_logits.weight.unflatten(0, (9, -1)) for d in (source, target))
    assert torch.equal(ours, theirs[:, [2, 0]])


def test_eps_of_the_norms_comes_with_the_weights_only():
    """A norm that learns from batches must not divide by the variance of a constant."""
    arguments = {"pretrained_cfg": PretrainedCfg(arch={"norm_eps": 0.0})}
    fresh = create_detector("test_retinanet", **arguments)
    loaded = create_detector("test_retinanet", checkpoint=fresh.state_dict(), **arguments)
    assert (fresh.backbone.body.bn1.eps, loaded.backbone.body.bn1.eps) == (1e-5, 0)


# --- checkpoints ------------------------------------------------------------------------------------------------------

BODIES: dict[str, Callable[[], torch.nn.Module]] = {
    "resnet18": lambda: resnet.resnet18(),
    "resnet50": lambda: resnet.resnet50(),
    "resnet101": lambda: resnet.resnet101(),
    "resnext101_32x4d": lambda: resnet.ResNet(resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4),
    "resnext101_64x4d": lambda: resnet.resnext101_64x4d(),
}


def meta_shapes(build: Callable[[], torch.nn.Module]) -> Shapes:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build().state_dict().items()}


def body_shapes(name: str) -> Shapes:
    """torchvision's names, which mmdet's are too; without the classifier."""
    return {key: shape for key, shape in meta_shapes(BODIES[name]).items() if not key.startswith("fc.")}


def layers(shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {f"{name}.{p}": s for name, shape in shapes.items() for p, s in (("weight", shape), ("bias", shape[:1]))}


def mmdet_keys(body: str) -> Shapes:
    keys = {f"backbone.{key}": shape for key, shape in body_shapes(body).items()}
    channels = (128, 256, 512) if body == "resnet18" else (512, 1024, 2048)
    rest = {f"neck.lateral_convs.{i}.conv": (256, c, 1, 1) for i, c in enumerate(channels)}
    rest |= {f"neck.fpn_convs.{i}.conv": (256, channels[-1] if i == 3 else 256, 3, 3) for i in range(5)}
    rest |= {f"bbox_head.{branch}_convs.{i}.conv": (256, 256, 3, 3) for branch in ("cls", "reg") for i in range(4)}
    return keys | layers(rest | {"bbox_head.retina_cls": (720, 256, 3, 3), "bbox_head.retina_reg": (36, 256, 3, 3)})


def detectron2_keys(body: str, prefix: str = "backbone.", extra_from: int = 2048) -> Shapes:
    keys: Shapes = {}
    for key, shape in body_shapes(body).items():
        key = re.sub(r"^(conv|bn)1", r"stem.\g<1>1", key)
        key = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
        key = re.sub(r"bn(\d)", r"conv\1.norm", key).replace("downsample.0", "shortcut")
        keys[f"{prefix}bottom_up.{key.replace('downsample.1', 'shortcut.norm')}"] = shape
    keys = {key: shape for key, shape in keys.items() if "num_batches" not in key}  # frozen norms
    rest = {f"{prefix}fpn_lateral{i}": (256, c, 1, 1) for i, c in zip((3, 4, 5), (512, 1024, 2048), strict=True)}
    rest |= {f"{prefix}fpn_output{i}": (256, 256, 3, 3) for i in (3, 4, 5)}
    rest |= {f"{prefix}top_block.p6": (256, extra_from, 3, 3), f"{prefix}top_block.p7": (256, 256, 3, 3)}
    rest |= {f"head.{branch}_subnet.{i}": (256, 256, 3, 3) for branch in ("cls", "bbox") for i in (0, 2, 4, 6)}
    keys |= layers(rest | {"head.cls_score": (720, 256, 3, 3), "head.bbox_pred": (36, 256, 3, 3)})
    keys |= {f"anchor_generator.cell_anchors.{i}": (9, 4) for i in range(5)}
    return keys | {"pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1)}


def dyhead_keys() -> Shapes:
    """Six blocks of the official code."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(6):
        block = f"backbone.dyhead_tower.{i}."
        for branch in range(3):
            shapes |= {f"{block}DyConv.{branch}.conv": (256, 256, 3, 3), f"{block}DyConv.{branch}.bn": (256,)}
        shapes |= {f"{block}AttnConv.1": (1, 256, 1, 1), f"{block}offset": (27, 256, 3, 3)}
        shapes |= {f"{block}relu.fc.0": (64, 256), f"{block}relu.fc.2": (1024, 64)}
    return layers(shapes)


def published_torchvision(name: str) -> Shapes:
    """The second version's file has the names of today; the first's is older, with frozen norms."""
    shapes = meta_shapes(lambda: BUILDERS[name](weights=None, weights_backbone=None))
    if "v2" in name:
        return shapes
    old = {}
    for key, shape in shapes.items():
        key = re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0", r"\1.\2", key)
        key = re.sub(r"_head\.conv\.(\d)\.0", lambda m: f"_head.conv.{2 * int(m[1])}", key)
        old[key] = shape
    return {key: shape for key, shape in old.items() if "num_batches" not in key}


def keys_of(name: str) -> Shapes:
    arch, tag = name.split(".")
    body = arch.split("_", 1)[1].removesuffix("_dyhead6")
    if tag.startswith("torchvision"):
        return published_torchvision(name)
    if tag.startswith("mmdet"):
        return mmdet_keys(body)
    if tag.startswith("official"):
        return detectron2_keys(body, "backbone.backbone.", extra_from=256) | dyhead_keys()
    return detectron2_keys(body)


TAGS = [f"{name}.{tag}" for name in list_detectors("retinanet_*") for tag in list_tags(name) if tag]
CONVERTERS = {"mmdet": mmdet.convert, "detectron2": detectron2.convert, "torchvision": torchvision.convert}


@pytest.mark.parametrize("name", TAGS)
def test_every_published_key_has_its_place(name):
    keys = keys_of(name)
    with torch.device("meta"):
        detector = create_detector(name)
    source = get_pretrained_cfg(name).source
    assert detect_source(keys) == source
    converted = CONVERTERS[source]({key: torch.empty(shape, device="meta") for key, shape in keys.items()})
    found = {key: tuple(value.shape) for key, value in converted.tensors.items()}
    assert found == {key: tuple(value.shape) for key, value in detector.state_dict().items()}


def test_detectron2_towers_and_predictions_arrive_in_our_order():
    name = "retinanet_resnet50.detectron2_1x_coco"
    source = {key: torch.full(shape, float(i)) for i, (key, shape) in enumerate(detectron2_keys("resnet50").items())}
    source["head.bbox_pred.bias"] = torch.arange(36.0)
    source["head.cls_score.bias"] = torch.arange(720.0)
    detector = create_detector(name)
    report = load_checkpoint(detector, {"model": source})
    head = detector.head
    assert head.running_positives == 100 and "starts there again" in report.summary()
    for i in range(4):
        for theirs, tower in (("cls_subnet", head.cls_tower), ("bbox_subnet", head.box_tower)):
            assert torch.equal(tower[i].conv.weight, source[f"head.{theirs}.{2 * i}.weight"])
    sizes_first = [3 * size + ratio for ratio in range(3) for size in range(3)]
    assert head.box_deltas.bias.tolist() == [4 * anchor + k for anchor in sizes_first for k in range(4)]
    assert head.cls_logits.bias.tolist() == [80 * anchor + k for anchor in sizes_first for k in range(80)]


def test_detectron2_anchors_in_our_order_are_ours():
    """detectron2's loop: for each size, for each ratio (height over width), around the origin."""
    sizes = [32.0, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)]
    theirs = []
    for size in sizes:
        for ratio in (0.5, 1.0, 2.0):
            width = (size**2 / ratio) ** 0.5
            theirs.append([-width / 2, -ratio * width / 2, width / 2, ratio * width / 2])
    (ours,) = AnchorGenerator((8,), [sizes], (0.5, 1.0, 2.0))([torch.zeros(1, 1, 1, 1)])
    torch.testing.assert_close(ratio_major(torch.tensor(theirs)), ours)


def test_detectron2_heads_with_other_anchors_are_refused():
    with pytest.raises(CheckpointError, match=r"240 rows.*9 anchors"):
        detectron2.convert({"head.cls_score.weight": torch.zeros(3 * 80, 1, 3, 3)})
