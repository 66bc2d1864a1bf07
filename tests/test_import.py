"""dyhead-zoo import: a user's checkpoint of another library, told by its keys."""

from __future__ import annotations

import json
import os
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_kit import SMALL
from rcnn_helpers import Shapes, detectron2_keys, dyhead_keys, mmdet_keys, torchvision_keys
from test_detr import official_keys
from torch import Tensor
from torchvision.models.detection import (
    FasterRCNN,
    RetinaNet,
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
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
    assert found.cfg.arch["coarse_offsets"] == "reinterpret"


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


@pytest.mark.parametrize("prefix", ["module.", "model.", "model.module.", "module.model."])
def test_prefixes_of_wrappers_are_no_obstacle(prefix: str) -> None:
    tensors = {f"{prefix}{key}": value for key, value in mmdet_retinanet(num_classes=3).items()}
    found = guess(tensors | {"n_averaged": torch.tensor(7)})
    assert len(found.labels) == 3 and list(found.conversion.dropped) == ["n_averaged"]
    with pytest.raises(CheckpointError, match="layout not recognised"):
        guess({f"teacher.{key}": tensor for key, tensor in tensors.items()})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mine\.pth is no file"):
        import_checkpoint(tmp_path / "mine.pth")
    with pytest.raises(FileNotFoundError, match="is a folder: give a weight file"):
        import_checkpoint(tmp_path)


# --- two-stage detectors ----------------------------------------------------------------------------------------------


def of_classes(keys: Shapes, number: int) -> dict[str, Tensor]:
    """Keys of mmdetection's and detectron2's detectors for COCO, on the meta device, with another number of classes."""
    rows = {
        **dict.fromkeys(("fc_cls", "cls_score"), number + 1),
        **dict.fromkeys(("fc_reg", "bbox_pred"), 4 * number),
        **dict.fromkeys(("conv_logits", "mask_head.predictor", "cls_branches.{i}"), number),
        "retina_cls": 9 * number,
    }
    found = {}
    for key, shape in keys.items():
        layer = re.sub(r"cls_branches\.\d+", "cls_branches.{i}", key.rpartition(".")[0])
        count = next((count for name, count in rows.items() if layer.endswith(name) and shape[0] != 4), None)
        found[key] = torch.empty((count, *shape[1:]) if count else shape, device="meta")
    return found


@pytest.mark.parametrize("family", ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"])
@pytest.mark.parametrize(("library", "body"), [("mmdet", "resnet50"), ("detectron2", "resnet101")])
def test_two_stage_families(family: str, library: str, body: str) -> None:
    keys = {"mmdet": mmdet_keys, "detectron2": detectron2_keys}[library](family, body)
    found = guess(of_classes(keys, 3))
    assert (found.source, found.name, len(found.labels)) == (library, f"{family}_{body}", 3)
    assert found.settings.startswith((f"{family}_{body}.{library}", f"cascade_mask_rcnn_resnet50.{library}"))
    assert found.cfg.channel_order == ("rgb" if library == "mmdet" else "bgr")
    heads = 0 if "mask" not in family else 3 if (library, family) == ("mmdet", "cascade_mask_rcnn") else 1
    assert found.cfg.arch.get("mask_heads", 0) == heads


def test_official_faster_rcnn_with_dyhead() -> None:
    keys = detectron2_keys("faster_rcnn", "resnet50", "backbone.backbone.") | dyhead_keys()
    found = guess(of_classes(keys, 80))
    assert found.settings == "faster_rcnn_resnet50_dyhead6.official_1x_coco"
    assert found.cfg.arch["coarse_offsets"] == "reinterpret" and found.labels.names[0] == "person"


def test_one_box_and_one_mask_for_all_classes() -> None:
    tensors = of_classes(mmdet_keys("mask_rcnn", "resnet50"), 7)
    for key, rows in {"bbox_head.fc_reg": 4, "mask_head.conv_logits": 1}.items():
        for name in ("weight", "bias"):
            tensors[f"roi_head.{key}.{name}"] = tensors[f"roi_head.{key}.{name}"][:rows]
    found = guess(tensors)
    assert len(found.labels) == 7 and found.cfg.arch["class_agnostic"] and found.cfg.arch["class_agnostic_masks"]
    both = guess({key: tensor for key, tensor in tensors.items() if "mask_head" not in key})
    assert both.name == "faster_rcnn_resnet50" and "class_agnostic_masks" not in both.cfg.arch


def test_a_single_class_is_not_taken_for_all_classes_together() -> None:
    found = guess(of_classes(mmdet_keys("mask_rcnn", "resnet50"), 1))
    assert len(found.labels) == 1 and not {"class_agnostic", "class_agnostic_masks"} & set(found.cfg.arch)


@pytest.mark.parametrize(
    ("build", "name", "tag"),
    [
        (fasterrcnn_resnet50_fpn, "faster_rcnn_resnet50", "torchvision_coco"),
        (maskrcnn_resnet50_fpn_v2, "mask_rcnn_resnet50", "torchvision_v2_coco"),
        (fasterrcnn_mobilenet_v3_large_fpn, "faster_rcnn_mobilenetv3_large", "torchvision_coco"),
    ],
)
def test_torchvisions_two_stage_detectors(build: Any, name: str, tag: str) -> None:
    for count, unused, classes in ((91, 10, 80), (5, 0, 4)):  # with the background
        keys = torchvision_keys(partial(build, num_classes=count), old=False)
        found = guess({key: torch.empty(shape, device="meta") for key, shape in keys.items()})
        assert (found.source, found.name, found.settings) == ("torchvision", name, f"{name}.{tag}")
        assert (len(found.labels), found.cfg.arch["unused_rows"]) == (classes, unused)


def test_what_keys_do_not_tell_can_be_given_as_arguments() -> None:
    keys = torchvision_keys(partial(fasterrcnn_resnet50_fpn, num_classes=5), old=False)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    assert guess(tensors).cfg.arch["norm_eps"] == 0
    assert guess(tensors, arch={"norm_eps": 1e-5}).cfg.arch["norm_eps"] == 1e-5
    with pytest.raises(CheckpointError, match="no part of the detector knows the argument 'norm_epsilon'"):
        guess(tensors, arch={"norm_epsilon": 1e-5})


def test_one_box_for_all_classes_of_torchvision() -> None:
    keys = torchvision_keys(partial(fasterrcnn_resnet50_fpn, num_classes=4), old=False)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    for rows in (4, 6):
        tensors["roi_heads.box_predictor.bbox_pred.weight"] = torch.empty(rows, 1024, device="meta")
        tensors["roi_heads.box_predictor.bbox_pred.bias"] = torch.empty(rows, device="meta")
        if rows == 4:
            found = guess(tensors)
            assert len(found.labels) == 3 and found.cfg.arch["class_agnostic"]
        else:
            with pytest.raises(CheckpointError, match=r"box_deltas.bias \(6,\): no whole number of classes"):
                guess(tensors)


def test_widths_that_no_published_weights_have_are_told_by_the_keys() -> None:
    tensors = of_classes(mmdet_keys("cascade_mask_rcnn", "resnet50"), 3)
    for stage in range(3):
        box = f"roi_head.bbox_head.{stage}."
        for part, shape in {"shared_fcs.0": (512, 256 * 49), "shared_fcs.1": (512, 512)}.items():
            tensors[f"{box}{part}.weight"] = torch.empty(shape, device="meta")
            tensors[f"{box}{part}.bias"] = torch.empty(512, device="meta")
        tensors[f"{box}fc_cls.weight"] = torch.empty(4, 512, device="meta")
        tensors[f"{box}fc_reg.weight"] = torch.empty(4, 512, device="meta")
    found = guess(tensors)
    assert found.cfg.arch["box_hidden"] == (512, 512) and found.cfg.arch["mask_heads"] == 3


def test_a_fourth_stage_is_listed() -> None:
    tensors = of_classes(mmdet_keys("cascade_rcnn", "resnet50"), 3)
    more = {key.replace("bbox_head.2.", "bbox_head.3."): tensor for key, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=r"cascade_rcnn with resnet50 .*(\n.*)*unknown .*\n  head.box.3.fcs.0"):
        guess({**tensors, **more})


# --- set prediction ---------------------------------------------------------------------------------------------------


def mmdet_deformable(number: int, two_stage: bool, **kwargs: Any) -> dict[str, Tensor]:
    """mmdetection 3's names; without refinement all decoder layers have the same branches."""
    with torch.device("meta"):
        tag = "mmdet_two_stage_50e_coco" if two_stage else "mmdet_50e_coco"
        state = create_detector(f"deformable_detr_resnet50.{tag}", num_classes=number, **kwargs).state_dict()
    renamed = (
        (r"^backbone\.body\.", "backbone."),
        (r"^neck\.proj\.3\.", "neck.extra_convs.0."),
        (r"^neck\.proj\.", "neck.convs."),
        (r"^(neck\..*)\.norm\.", r"\1.gn."),
        (r"^head\.transformer\.(encoder|decoder)\.", r"\1.layers."),
        (r"\.ffn\.linear1\.", ".ffn.layers.0.0."),
        (r"\.ffn\.linear2\.", ".ffn.layers.1."),
        (r"^(?=encoder|decoder)(.*)\.norm(\d)\.", lambda m: f"{m[1]}.norms.{int(m[2]) - 1}."),
        (r"^head\.transformer\.level_embed", "level_embed"),
        (r"^head\.class_logits\.", "bbox_head.cls_branches."),
        (r"^head\.box_mlps\.(\d)\.layers\.(\d)", lambda m: f"bbox_head.reg_branches.{m[1]}.{2 * int(m[2])}"),
        (r"^head\.reference_points\.", "reference_points_fc."),
        (r"^head\.queries\.", "query_embedding."),
        (r"^head\.proposals\.memory_(fc|norm)\.", r"memory_trans_\1."),
        (r"^head\.proposals\.query_(fc|norm)\.", r"pos_trans_\1."),
    )
    tensors = {}
    for key, tensor in state.items():
        for pattern, replacement in renamed:
            key = re.sub(pattern, replacement, key)
        branch = re.match(r"bbox_head\.(cls|reg)_branches\.(\d)", key)
        copies = range(6) if branch and not two_stage else [int(branch[2])] if branch else [0]
        for i in copies:
            name = re.sub(r"_branches\.\d", f"_branches.{i}", key)
            tensors[name] = torch.full(tensor.shape, float(i * two_stage)) if branch else tensor
    return tensors


@pytest.mark.parametrize("two_stage", [False, True])
def test_deformable_detr(two_stage: bool) -> None:
    found = guess(mmdet_deformable(5, two_stage))
    tag = "mmdet_two_stage_50e_coco" if two_stage else "mmdet_50e_coco"
    assert found.settings == f"deformable_detr_resnet50.{tag}" and not found.others
    assert len(found.labels) == 5 and found.cfg.pad_divisor == 1
    small = guess(mmdet_deformable(5, two_stage, decoder_layers=6, encoder_layers=2, feedforward=512))
    assert (small.cfg.arch["encoder_layers"], small.cfg.arch["feedforward"]) == (2, 512)
    assert bool(small.cfg.arch["two_stage"]) == two_stage


def test_detr_of_its_authors() -> None:
    def keys(rows: int, queries: int) -> dict[str, Tensor]:
        shapes = official_keys(rows=rows) | {"query_embed.weight": (queries, 256)}
        return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}

    published = guess(keys(92, 100))
    assert (published.name, len(published.labels), published.cfg.arch["unused_rows"]) == ("detr_resnet50", 80, 11)
    assert published.settings == "detr_resnet50.official_500e_coco"
    assert "output_stride=16" in published.others["detr_resnet50.official_dc5_500e_coco"]
    own = guess(keys(4, 30), class_names=["a", "b", "c"])
    assert own.labels.names == ("a", "b", "c") and own.cfg.arch["num_queries"] == 30
    assert own.cfg.arch["unused_rows"] == 0


def test_detr_without_a_classifier() -> None:
    keys = {key: torch.empty(shape, device="meta") for key, shape in official_keys().items() if "class_e" not in key}
    with pytest.raises(CheckpointError, match="it has no classifier"):
        guess(keys)


MANIFESTS = {
    "retinanet_r50_dyhead": "retinanet_resnet50.mmdet_",  # the nearest name that has published weights
    "faster_rcnn_r50": "faster_rcnn_resnet50.mmdet_3x_coco",
    "faster_rcnn_r50_dyhead": "faster_rcnn_resnet50.mmdet_3x_coco",
    "mask_rcnn_r50": "mask_rcnn_resnet50.mmdet_3x_coco",
    "cascade_rcnn_r50": "cascade_rcnn_resnet50.mmdet_20e_coco",
    "cascade_mask_rcnn_r50": "cascade_mask_rcnn_resnet50.mmdet_3x_coco",
    "detr_r50": "detr_resnet50.mmdet_150e_coco",
    "deformable_detr_refine_r50": "deformable_detr_resnet50.mmdet_refine_50e_coco",
    "deformable_detr_refine_twostage_r50": "deformable_detr_resnet50.mmdet_two_stage_50e_coco",
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_key_lists_of_mmdetection(case: str) -> None:
    folder = Path(os.environ.get("DYHEAD_ZOO_PARITY", SMALL)) / case
    if not folder.is_dir():
        pytest.skip("DYHEAD_ZOO_PARITY is not set: no key lists of this model")
    rows = json.loads((folder / "manifest.json").read_text())["params"]
    tensors = of_classes({key: tuple(row["shape"]) for key, row in rows.items()}, 6)
    for number, key in enumerate(key for key in tensors if "_branches." in key):
        tensors[key] = torch.full(tensors[key].shape, float(number))
    found = guess(tensors)
    assert len(found.labels) == 6 and found.settings.startswith(MANIFESTS[case])
    assert not case.endswith("dyhead") or found.cfg.arch["coarse_offsets"] == "reinterpret"


# --- from the command line --------------------------------------------------------------------------------------------


def test_command_makes_a_detector_of_a_two_stage_checkpoint(tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    theirs = FasterRCNN(backbone, box_head=TwoMLPHead(256 * 49, 16), box_predictor=FastRCNNPredictor(16, 3)).eval()
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    command = ["import", str(tmp_path / "model.pth"), "--output", str(tmp_path / "saved")]
    status = main([*command, "--model-args", "norm_eps=1e-5"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "torchvision checkpoint: faster_rcnn_resnet18, 2 classes (class_0, class_1" in printed.out
    detector = create_detector(f"local-dir:{tmp_path / 'saved'}")
    assert detector.arch["box_hidden"] in ([16, 16], (16, 16)) and not detector.arch["roi_aligned"]
    assert detector.arch["norm_eps"] == 1e-5
    rows = theirs.roi_heads.box_predictor.cls_score.bias[[1, 2, 0]]
    assert torch.equal(detector.state_dict()["head.box.0.cls_logits.bias"], rows)
    assert len(detector.eval().decode(detector(torch.zeros(1, 3, 64, 64)))) == 1


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
