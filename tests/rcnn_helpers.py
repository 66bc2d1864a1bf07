"""Keys of published two-stage checkpoints, and torchvision's detectors beside ours."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.models import resnet

from dyhead_zoo import Detector, create_detector, get_pretrained_cfg
from dyhead_zoo.convert import detectron2, mmdet, torchvision
from dyhead_zoo.convert.torchvision import convert_torchvision
from dyhead_zoo.weights import detect_source

Shapes = dict[str, tuple[int, ...]]
BODIES: dict[str, Callable[[], torch.nn.Module]] = {
    "resnet50": lambda: resnet.resnet50(),
    "resnet101": lambda: resnet.resnet101(),
    "resnext101_32x4d": lambda: resnet.ResNet(resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4),
    "resnext101_32x8d": lambda: resnet.resnext101_32x8d(),
    "resnext101_64x4d": lambda: resnet.resnext101_64x4d(),
}
CHANNELS = (256, 512, 1024, 2048)
CONVERTERS = {"mmdet": mmdet.convert, "detectron2": detectron2.convert, "torchvision": torchvision.convert}


def layers(shapes: Shapes) -> Shapes:
    """A weight of each shape, and a bias."""
    return {f"{name}.{p}": s for name, shape in shapes.items() for p, s in (("weight", shape), ("bias", shape[:1]))}


def body_shapes(name: str) -> Shapes:
    """torchvision's names, which mmdet's are too; without the classifier."""
    with torch.device("meta"):
        state = BODIES[name]().state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if not key.startswith("fc.")}


def box_heads(family: str, name: str, fcs: tuple[str, str], cls: str, reg: str, predictor: str) -> Shapes:
    """Box heads under templates of their names, in which ``{}`` is the stage, with a dot."""
    stages = [f"{i}." for i in range(3)] if family.startswith("cascade") else [""]
    rest: Shapes = {}
    for stage in stages:
        rest |= {f"{name}.{stage}{fcs[0]}": (1024, 256 * 49), f"{name}.{stage}{fcs[1]}": (1024, 1024)}
        rest |= {
            f"{predictor}.{stage}{cls}": (81, 1024),
            f"{predictor}.{stage}{reg}": (4 if len(stages) > 1 else 320, 1024),
        }
    return rest


def mmdet_keys(family: str, body: str) -> Shapes:
    keys = {f"backbone.{key}": shape for key, shape in body_shapes(body).items()}
    rest: Shapes = {f"neck.lateral_convs.{i}.conv": (256, c, 1, 1) for i, c in enumerate(CHANNELS)}
    rest |= {f"neck.fpn_convs.{i}.conv": (256, 256, 3, 3) for i in range(4)}
    rest |= {"rpn_head.rpn_conv": (256, 256, 3, 3), "rpn_head.rpn_cls": (3, 256, 1, 1)}
    rest |= {"rpn_head.rpn_reg": (12, 256, 1, 1)}
    box = "roi_head.bbox_head"
    rest |= box_heads(family, box, ("shared_fcs.0", "shared_fcs.1"), "fc_cls", "fc_reg", box)
    if "mask" in family:
        for stage in [f"{i}." for i in range(3)] if family.startswith("cascade") else [""]:
            mask = f"roi_head.mask_head.{stage}"
            rest |= {f"{mask}convs.{i}.conv": (256, 256, 3, 3) for i in range(4)}
            rest |= {f"{mask}upsample": (256, 256, 2, 2), f"{mask}conv_logits": (80, 256, 1, 1)}
    return keys | layers(rest)


def detectron2_keys(family: str, body: str, prefix: str = "backbone.") -> Shapes:
    keys: Shapes = {}
    for key, shape in body_shapes(body).items():
        key = re.sub(r"^(conv|bn)1", r"stem.\g<1>1", key)
        key = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
        key = re.sub(r"bn(\d)", r"conv\1.norm", key).replace("downsample.0", "shortcut")
        keys[f"{prefix}bottom_up.{key.replace('downsample.1', 'shortcut.norm')}"] = shape
    keys = {key: shape for key, shape in keys.items() if "num_batches" not in key}  # frozen norms
    rest: Shapes = {f"{prefix}fpn_lateral{i}": (256, c, 1, 1) for i, c in zip((2, 3, 4, 5), CHANNELS, strict=True)}
    rest |= {f"{prefix}fpn_output{i}": (256, 256, 3, 3) for i in (2, 3, 4, 5)}
    rpn = "proposal_generator.rpn_head."
    rest |= {f"{rpn}conv": (256, 256, 3, 3), f"{rpn}objectness_logits": (3, 256, 1, 1)}
    rest |= {f"{rpn}anchor_deltas": (12, 256, 1, 1)}
    predictor = "roi_heads.box_predictor"
    rest |= box_heads(family, "roi_heads.box_head", ("fc1", "fc2"), "cls_score", "bbox_pred", predictor)
    if "mask" in family:
        rest |= {f"roi_heads.mask_head.mask_fcn{i}": (256, 256, 3, 3) for i in (1, 2, 3, 4)}
        rest |= {"roi_heads.mask_head.deconv": (256, 256, 2, 2), "roi_heads.mask_head.predictor": (80, 256, 1, 1)}
    keys |= layers(rest)
    return keys | {f"proposal_generator.anchor_generator.cell_anchors.{i}": (3, 4) for i in range(5)}


def dyhead_keys() -> Shapes:
    """Six blocks of the official code."""
    shapes: Shapes = {}
    for i in range(6):
        block = f"backbone.dyhead_tower.{i}."
        for branch in range(3):
            shapes |= {f"{block}DyConv.{branch}.conv": (256, 256, 3, 3), f"{block}DyConv.{branch}.bn": (256,)}
        shapes |= {f"{block}AttnConv.1": (1, 256, 1, 1), f"{block}offset": (27, 256, 3, 3)}
        shapes |= {f"{block}relu.fc.0": (64, 256), f"{block}relu.fc.2": (1024, 64)}
    return layers(shapes)


def torchvision_keys(build: Callable[..., torch.nn.Module], old: bool) -> Shapes:
    """Files of the first versions have older names and frozen norms."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in build(weights=None, weights_backbone=None).state_dict().items()}
    if not old:
        return shapes
    renamed = {}
    for key, shape in shapes.items():
        key = re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0", r"\1.\2", key)
        key = key.replace("rpn.head.conv.0.0", "rpn.head.conv")
        key = re.sub(r"mask_head\.(\d)\.0", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}", key)
        renamed[key] = shape
    return {key: shape for key, shape in renamed.items() if "num_batches" not in key}


def check_published_keys(name: str, keys: Shapes) -> None:
    """Every key of a checkpoint has its place in the detector, and the detector needs no other."""
    with torch.device("meta"):
        detector = create_detector(name)
    source = get_pretrained_cfg(name).source
    assert detect_source(keys) == source
    converted = CONVERTERS[source]({key: torch.empty(shape, device="meta") for key, shape in keys.items()})
    found = {key: tuple(value.shape) for key, value in converted.tensors.items()}
    assert found == {key: tuple(value.shape) for key, value in detector.state_dict().items()}


# --- torchvision ------------------------------------------------------------------------------------------------------


def beside_torchvision(build: Callable[..., torch.nn.Module], name: str) -> tuple[torch.nn.Module, Detector]:
    """torchvision's detector with weights that are random but not idle, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = build(weights=None, weights_backbone=None, num_classes=5).eval()
    theirs.transform.min_size, theirs.transform.max_size = (96,), 160  # pictures of that size stay as they are
    theirs.transform.postprocess = lambda result, *sizes: result  # masks in the frames of their boxes
    with torch.no_grad():
        x = torch.randn(1, 3, 96, 160)
        features = theirs.backbone(x)
        for layer, level in zip(theirs.backbone.fpn.layer_blocks, features.values(), strict=False):
            layer[0].weight.div_(level.std())
        features = theirs.backbone(x)
        objectness, deltas = theirs.rpn.head(list(features.values()))
        theirs.rpn.head.cls_logits.weight.div_(objectness[0].std())
        theirs.rpn.head.bbox_pred.weight.div_(4 * deltas[0].std())
        heads = theirs.roi_heads
        region = [torch.tensor([[8.0 * i, 5, 8 * i + 60, 70] for i in range(12)])]
        scores, boxes = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, region, [(96, 160)])))
        heads.box_predictor.cls_score.weight.div_(scores.std())
        heads.box_predictor.bbox_pred.weight.div_(2 * boxes.std())
    theirs.rpn._post_nms_top_n = {"training": 80, "testing": 60}  # the default thousands take their time
    theirs.roi_heads.detections_per_img = 60  # whose masks do too
    sizes = {"samples": (10**6, 10**6), "proposals": (80, 60), "max_detections": 60}
    ours = create_detector(name, num_classes=4, unused_rows=0, **sizes)
    ours.load_state_dict(convert_torchvision(theirs.state_dict()))
    for sampler in (theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image = 10**6
    return theirs.double(), ours.double()  # float32 rounds boxes, and swaps neighbours, by more than the tolerance


def pictures() -> Tensor:
    return torch.randint(0, 256, (2, 3, 96, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def check_detections(theirs: torch.nn.Module, ours: Detector) -> None:
    """The same boxes, scores, labels and masks; neighbours' scores can be equal up to rounding, and change places."""
    with torch.no_grad():
        expected = theirs([picture.double() / 255 for picture in pictures()])
        found = ours.decode(ours(pictures()))
    for a, b in zip(found, expected, strict=True):
        assert len(a) == len(b["scores"]) > 50
        other_class = b["labels"][:, None] - 1 != a.labels
        distance = torch.cdist(b["boxes"], a.boxes.double(), p=float("inf")) + 1e6 * other_class
        row = distance.argmin(1)
        assert len(row.unique()) == len(row) and distance.amin(1).max() < 1e-4
        torch.testing.assert_close(a.scores[row], b["scores"].float(), rtol=0, atol=1e-4)
        if "masks" in b:
            assert a.masks is not None
            torch.testing.assert_close(a.masks[row], b["masks"].squeeze(1).float(), rtol=0, atol=1e-4)


def check_losses(theirs: torch.nn.Module, ours: Detector, masks: bool) -> None:
    """The same losses where everything is sampled; the second picture has no object."""
    targets = [
        {"boxes": torch.tensor([[10.3, 12.1, 70.7, 80.9], [90.2, 20.4, 121.6, 90.8]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    if masks:
        circle = (torch.arange(96)[:, None] - 45) ** 2 + (torch.arange(160) - 40) ** 2 < 900
        targets[0]["masks"] = torch.stack((circle, torch.rand(96, 160) > 0.5))
        targets[1]["masks"] = torch.zeros(0, 96, 160, dtype=torch.bool)
    their_targets = [{**t, "labels": t["labels"] + 1} for t in targets]
    if masks:
        their_targets = [{**t, "masks": t["masks"].byte()} for t in their_targets]
    parts = (theirs, theirs.rpn, theirs.roi_heads)
    for part in parts:
        part.training = True  # losses, while the norms stay in evaluation mode
    with torch.no_grad():
        expected = theirs([picture.double() / 255 for picture in pictures()], their_targets)
        found = ours.loss(ours(pictures()), targets)
    for part in parts:
        part.training = False
    names = {"loss_rpn_cls": "loss_objectness", "loss_rpn_box": "loss_rpn_box_reg", "loss_cls": "loss_classifier"}
    for key, their_key in {
        **names,
        "loss_box": "loss_box_reg",
        **({"loss_mask": "loss_mask"} if masks else {}),
    }.items():
        assert found[key] > 0
        torch.testing.assert_close(found[key], expected[their_key].float(), rtol=1e-4, atol=1e-6)
