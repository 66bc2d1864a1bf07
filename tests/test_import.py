"""dyhead-zoo import: a user's checkpoint of another library, told by its keys."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_kit import SMALL
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from dyhead_zoo import create_detector
from dyhead_zoo.cli import main
from dyhead_zoo.convert import CheckpointError
from dyhead_zoo.convert.guess import guess, import_checkpoint
from dyhead_zoo.registry import UnknownDetectorError

RENAMED = (
    (r"backbone\.body\.", "backbone."),
    (r"neck\.fpn\.lateral\.(\d)\.", r"neck.lateral_convs.\1.conv."),
    (r"neck\.fpn\.output\.(\d)\.", r"neck.fpn_convs.\1.conv."),
    (r"neck\.fpn\.extra\.0\.", "neck.fpn_convs.3.conv."),
    (r"neck\.fpn\.extra\.1\.", "neck.fpn_convs.4.conv."),
    (r"head\.cls_tower\.", "bbox_head.cls_convs."),
    (r"head\.box_tower\.", "bbox_head.reg_convs."),
    (r"head\.cls_logits\.", "bbox_head.retina_cls."),
    (r"head\.box_deltas\.", "bbox_head.retina_reg."),
)
"""Ours to mmdetection's, for RetinaNet with a ResNet."""


@cache
def mmdet_retinanet(name: str = "retinanet_resnet50.mmdet_1x_coco", **kwargs: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        tensors = create_detector(name, **kwargs).state_dict()
    for pattern, replacement in RENAMED:
        tensors = {re.sub(f"^{pattern}", replacement, key): tensor for key, tensor in tensors.items()}
    return tensors


def test_family_backbone_and_classes_are_told_by_the_keys() -> None:
    found = guess(mmdet_retinanet(num_classes=3), {"CLASSES": ("a", "b", "c")})
    assert (found.source, found.name) == ("mmdet", "retinanet_resnet50")
    assert found.labels.names == ("a", "b", "c") and "named in the file" in found.summary()
    assert found.settings == "retinanet_resnet50.mmdet_3x_coco"


@pytest.mark.parametrize(
    ("count", "first", "words"), [(80, "person", "taken for COCO's"), (5, "class_0", "--class-names")]
)
def test_classes_that_nobody_names(count: int, first: str, words: str) -> None:
    found = guess(mmdet_retinanet(num_classes=count))
    assert (len(found.labels), found.labels.names[0]) == (count, first) and words in found.summary()


def test_what_keys_do_not_tell_is_said_and_can_be_decided() -> None:
    tensors, caffe = mmdet_retinanet(num_classes=3), "retinanet_resnet50.mmdet_caffe_1x_coco"
    found = guess(tensors)
    assert not found.cfg.arch.get("caffe") and "caffe=True" in found.others[caffe]
    assert f"or as for {caffe}" in found.summary()
    decided = guess(tensors, name=caffe)
    assert decided.cfg.arch["caffe"] and decided.cfg.channel_order == "bgr" and not decided.others
    recorded = guess(tensors, {"cfg": "model = dict(backbone=dict(type='ResNet', style='caffe'))"})
    assert recorded.settings == caffe


def test_a_backbone_without_a_registered_name_gets_one_by_the_grammar() -> None:
    tensors = mmdet_retinanet("retinanet_resnet34", extra_relu=False, num_classes=2, fpn_norm=False)
    assert guess(tensors).name == "retinanet_resnet34"


def test_towers_and_widths_are_told_by_the_keys() -> None:
    found = guess(mmdet_retinanet(num_classes=2, towers=2, channels=64))
    assert (found.cfg.arch["towers"], found.cfg.arch["channels"]) == (2, 64)


def test_swin_with_dyhead() -> None:
    folder = Path(os.environ.get("DYHEAD_ZOO_PARITY", SMALL)) / "atss_swin_t_dyhead"
    keys = json.loads((folder / "manifest.json").read_text())["params"]
    found = guess({key: torch.empty(row["shape"], device="meta") for key, row in keys.items()})
    assert found.name == "atss_swin_tiny_patch4_window7_224_dyhead2"


def test_hints_may_be_families_names_or_tags_but_must_agree() -> None:
    tensors = mmdet_retinanet(num_classes=3)
    for hint in ("retinanet", "retinanet_resnet50", "retinanet_resnet50.mmdet_1x_coco"):
        assert guess(tensors, name=hint).name == "retinanet_resnet50"
    for hint in ("fcos", "retinanet_resnet101", "atss_resnet50.mmdet_1x_coco", "retinanet_resnet50_dyhead6"):
        with pytest.raises(CheckpointError, match=f"it is no {hint}: by its keys it is a retinanet with .* resnet50"):
            guess(tensors, name=hint)
    for hint in ("retinanet_resnet50.mmdet_1y_coco", "yolo"):
        with pytest.raises(UnknownDetectorError):
            guess(tensors, name=hint)


def test_unknown_keys_are_listed() -> None:
    tensors = {**mmdet_retinanet(), "bbox_head.sugar.weight": torch.empty(2, 3)}
    with pytest.raises(CheckpointError, match=r"1 of \d+ keys are not known to the mmdet converter:\n.*sugar.weight"):
        guess(tensors)


def test_departures_from_the_nearest_backbone_are_listed() -> None:
    tensors = {**mmdet_retinanet(), "backbone.layer3.5.conv2.weight": torch.empty(256, 256, 5, 5, device="meta")}
    message = r"most like resnet50, but for 1 of \d+ keys:\n  layer3.5.conv2.weight: \(256, 256, 5, 5\) here"
    with pytest.raises(CheckpointError, match=message):
        guess(tensors)


def test_departures_from_the_detector_are_listed() -> None:
    tensors = dict(mmdet_retinanet())
    del tensors["neck.lateral_convs.1.conv.bias"]
    with pytest.raises(
        CheckpointError, match=r"retinanet with resnet50 .*(\n.*)*missing .*\n  neck.fpn.lateral.1.bias"
    ):
        guess(tensors)


def test_heads_of_other_families_are_named() -> None:
    tensors = {key: value for key, value in mmdet_retinanet().items() if not key.startswith("bbox_head.")}
    with pytest.raises(CheckpointError, match="its head is none of .*retinanet"):
        guess(tensors)


def test_a_wrong_number_of_names() -> None:
    with pytest.raises(CheckpointError, match="rows for 3 classes, but 2 are as given"):
        guess(mmdet_retinanet(num_classes=3), class_names=["a", "b"])


def test_ddp_prefix_is_no_obstacle() -> None:
    tensors = {f"module.{key}": value for key, value in mmdet_retinanet(num_classes=3).items()}
    assert len(guess(tensors).labels) == 3


def test_command_makes_a_detector_of_a_torchvision_checkpoint(tmp_path: Path, capsys: Any) -> None:
    extra = LastLevelP6P7(256, 256)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, returned_layers=[2, 3, 4], extra_blocks=extra
    )
    theirs = RetinaNet(backbone, num_classes=3)  # with the background
    torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "model.pth")
    output, names = tmp_path / "saved", ["cat", "dog"]
    command = ["import", str(tmp_path / "model.pth"), "--as", "retinanet", "--output", str(output)]
    status = main([*command, "--class-names", ",".join(names), "--license", "mit"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "torchvision checkpoint: retinanet_resnet18, 2 classes (cat, dog; as given)" in printed.out
    detector = create_detector(f"local-dir:{output}")
    assert detector.label_space.names == ("cat", "dog") and detector.pretrained_cfg.license == "mit"
    rows = theirs.head.classification_head.cls_logits.bias.unflatten(0, (9, 3))[:, 1:].flatten()
    assert torch.equal(detector.state_dict()["head.cls_logits.bias"], rows)
    with pytest.raises(ValueError, match="written by dyhead_zoo"):
        import_checkpoint(output / "model.safetensors")


def test_files_that_would_run_code_are_refused(tmp_path: Path, capsys: Any) -> None:
    torch.save({"state_dict": {}, "extra": Path("x")}, tmp_path / "model.pth")
    assert main(["import", str(tmp_path / "model.pth"), "--output", str(tmp_path / "out")]) == 2
    assert "refused" in capsys.readouterr().err and not (tmp_path / "out").exists()
