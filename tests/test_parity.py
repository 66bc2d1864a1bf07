"""Converted weights give mmdetection's features, raw outputs, detections and losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity_kit import Case, assert_near, assert_same_detections

from dyhead_zoo import create_detector, get_pretrained_cfg, load_checkpoint
from dyhead_zoo.convert.mmdet import convert_mmdet
from dyhead_zoo.layers.dyhead import DyHead
from dyhead_zoo.structures import Detections

_SWIN = dict(get_pretrained_cfg("atss_swin_large_dyhead6").arch)
_ALL = {"samples": (100_000, 100_000)}
"""Of two-stage detectors: every anchor and region takes part in the losses, nothing is drawn."""
CASES = {
    "atss_r50": ("atss_resnet50.mmdet_1x_coco", {}),
    "atss_r50_dyhead": ("atss_resnet50_dyhead6.mmdet_1x_coco", {}),
    "atss_r50_caffe_dyhead": ("atss_resnet50_dyhead6.mmdet_caffe_1x_coco", {}),
    "atss_swin_t_dyhead": (
        "atss_swin_dyhead2",
        {**_SWIN, "fpn_norm": False, "pretrained_cfg": get_pretrained_cfg("atss_swin_large_dyhead6")},
    ),
    "fcos_r50_caffe": ("fcos_resnet50.mmdet_1x_coco", {}),
    "fcos_r50_caffe_center_giou": ("fcos_resnet50.mmdet_improved_1x_coco", {}),
    "retinanet_r50": ("retinanet_resnet50.mmdet_1x_coco", {}),
    "retinanet_r50_dyhead": (
        "retinanet_resnet50_dyhead6",
        {
            "pretrained_cfg": get_pretrained_cfg("retinanet_resnet50.mmdet_1x_coco"),
            "towers": 4,
            "coarse_offsets": "reinterpret",
        },
    ),
    "reppoints_moment_r50": ("reppoints_resnet50.mmdet_1x_coco", {}),
    "reppoints_moment_r50_gn": ("reppoints_resnet50.mmdet_gn_1x_coco", {}),
    "faster_rcnn_r50": ("faster_rcnn_resnet50.mmdet_1x_coco", _ALL),
    "faster_rcnn_r50_dyhead": (
        "faster_rcnn_resnet50_dyhead6",
        {
            **_ALL,
            "pretrained_cfg": get_pretrained_cfg("faster_rcnn_resnet50.mmdet_1x_coco"),
            "coarse_offsets": "reinterpret",
        },
    ),
    "mask_rcnn_r50": ("mask_rcnn_resnet50.mmdet_1x_coco", _ALL),
    "cascade_rcnn_r50": ("cascade_rcnn_resnet50.mmdet_1x_coco", _ALL),
    "cascade_mask_rcnn_r50": ("cascade_mask_rcnn_resnet50.mmdet_1x_coco", _ALL),
}
STAGES = {
    "cls_logits": "cls",
    "box_deltas": "reg",
    "box_distances": "reg",
    "centerness": "ctr",
    "init_points": "pts_init",
    "points": "pts_refine",
    "boxes": "box",
    "objectness": "rpn_cls",
    "rpn_deltas": "rpn_reg",
}
"""Field of the raw output to the stored stage."""
_TERMS_OF_STAGES = {"cls": "cls", "box": "bbox", "mask": "mask"}
LOSSES = {
    "loss_cls": "loss_cls",
    "loss_box": "loss_bbox",
    "loss_centerness": "loss_centerness",
    "loss_init_box": "loss_pts_init",
    "loss_refine_box": "loss_pts_refine",
    "loss_rpn_cls": "loss_rpn_cls",
    "loss_rpn_box": "loss_rpn_bbox",
    "loss_mask": "loss_mask",
    **{f"loss_{ours}_{i}": f"s{i}.loss_{theirs}" for i in range(3) for ours, theirs in _TERMS_OF_STAGES.items()},
}
"""Our loss term to the stored one."""


@pytest.fixture(params=CASES)
def case(request):
    kit = Case(request.param)
    name, arguments = CASES[request.param]
    detector = create_detector(name, **arguments)
    load_checkpoint(detector, kit.state_dict(), source="mmdet")
    return kit, detector


@pytest.mark.parametrize("batch", ["a", "b"])
def test_features_outputs_and_detections(case, batch):
    kit, detector = case
    if batch not in kit.batches:
        pytest.skip("this batch is only in the full folder of reference outputs")
    reference = {k.removeprefix(f"{batch}."): v for k, v in kit.outputs.items() if k.startswith(f"{batch}.")}
    images, sizes = kit.pictures(kit.batches[batch])
    with torch.no_grad():
        x = detector.normalise(images, sizes)
        assert list(x.shape) == reference["input_shape"].tolist()
        assert_near(x[:, :, ::16, ::16], reference["input_sample"], "input")
        features = detector.backbone(x)
        first = min(int(k.rpartition(".")[2]) for k in reference if k.startswith("backbone."))
        skipped = sum(k.startswith("backbone.") for k in reference) - len(features)
        for i, feature in enumerate(features):
            assert_near(feature[:, :8], reference[f"backbone.{first + skipped + i}"], f"backbone {i}")
        for i, level in enumerate(detector.neck.fpn(features)):
            assert_near(level[:, :16], reference[f"fpn.{i}"], f"fpn {i}")
        for i, level in enumerate(detector.neck(features) if "dyhead.0" in reference else []):
            assert_near(level[:, :16], reference[f"dyhead.{i}"], f"dyhead {i}")
        raw = detector(images, sizes)
        for field, key in STAGES.items():
            for i, level in enumerate(getattr(raw, field, ())):
                assert_near(level, reference[f"{key}.{i}"], f"{key} {i}")
        for i, detections in enumerate(detector.decode(raw)):
            assert len(detections) > 0
            assert_same_detections(detections, {k: reference[f"det.{k}.{i}"] for k in ("boxes", "scores", "labels")})


@pytest.mark.parametrize("batch", ["a", "b"])
def test_proposals_and_regions(case, batch):
    """Regions are compared on the stored proposals: a last-bit change can swap two of our own."""
    kit, detector = case
    if f"{batch}.proposals.boxes.0" not in kit.outputs:
        pytest.skip("not a two-stage detector")
    reference = {k.removeprefix(f"{batch}."): v for k, v in kit.outputs.items() if k.startswith(f"{batch}.")}
    images, sizes = kit.pictures(kit.batches[batch])
    with torch.no_grad():
        raw = detector(images, sizes)
        found = detector.head.propose(raw)
        stored = [reference[f"proposals.boxes.{i}"] for i in range(len(images))]
        for i, boxes in enumerate(stored):
            assert found.count[i] == len(boxes)
            distance = torch.cdist(boxes, found.boxes[i, : len(boxes)], p=float("inf"))
            assert (distance.min(1).values > 0.02).sum() <= 2
            assert_near(found.scores[i, : len(boxes)], reference[f"proposals.scores.{i}"], "scores of proposals")
        for stage, out in enumerate(detector.head.roi_forward(raw.features, [boxes[:64] for boxes in stored], sizes)):
            torch.testing.assert_close(out.rois, reference[f"roi.rois.{stage}"], rtol=0, atol=0.02)
            assert_near(out.cls_logits, reference[f"roi.cls.{stage}"], f"logits of stage {stage}")
            assert_near(out.box_deltas, reference[f"roi.reg.{stage}"], f"deltas of stage {stage}")
        if "mask.logits.0" in reference:
            boxes = [reference[f"det.boxes.{i}"][:12] for i in range(len(images))]
            labels = torch.cat([reference[f"det.labels.{i}"][:12] for i in range(len(images))])
            logits = detector.head.mask_logits(raw.features, boxes, labels)
            for stage, found_logits in enumerate(logits):
                assert_near(found_logits, reference[f"mask.logits.{stage}"], f"mask logits of stage {stage}")
            for i, masks in enumerate(logits.sigmoid().mean(0).split(12)):
                height, width = sizes[i].tolist()
                pasted = Detections(boxes[i], torch.ones(12), labels[12 * i :][:12], masks).paste(height, width)
                stored = np.unpackbits(reference[f"det.masks_packed.{i}"].numpy(), axis=-1, count=width)
                assert (pasted != torch.from_numpy(stored).bool()).sum() <= 20


def target_of(gt):
    """Boxes, labels and, where they are stored, bitmaps of the objects of one picture."""
    target = {"boxes": torch.tensor(gt["boxes"]), "labels": torch.tensor(gt["labels"])}
    if "masks_rle" in gt:
        target["masks"] = torch.stack([bitmap(rle) for rle in gt["masks_rle"]])
    return target


def bitmap(rle):
    """COCO's runs go column by column and start with zeros."""
    counts = torch.tensor(rle["counts"])
    values = (torch.arange(len(counts)) % 2).repeat_interleave(counts)
    return values.reshape(*rle["size"][::-1]).T.bool()


def test_losses_and_gradients(case):
    kit, detector = case
    images, sizes = kit.pictures(kit.losses["images"])
    targets = [target_of(gt) for gt in kit.losses["gt"]]
    for parameter in detector.parameters():
        parameter.requires_grad_(True)
    losses = detector.loss(detector(images, sizes), targets)
    for name, loss in losses.items():
        stored = kit.losses["losses"][LOSSES[name]]
        expected = torch.tensor(sum(stored) if isinstance(stored, list) else stored)
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)
    total = sum(losses.values())
    torch.testing.assert_close(total.detach(), torch.tensor(kit.losses["total"]), rtol=1e-4, atol=1e-6)
    total.backward()
    parameters, theirs = dict(detector.named_parameters()), kit.state_dict()
    for name, norm in kit.losses["grad_norms"].items():
        (ours,) = convert_mmdet({name: theirs[name]})
        gradient = parameters[ours].grad
        gradient = gradient[int(name.split(".")[2])] if "scales" in name else gradient
        torch.testing.assert_close(gradient.norm(), torch.tensor(norm), rtol=2e-3, atol=0)


def test_dyhead_block_outputs_and_every_gradient():
    kit = Case("dyhead_block")
    module = DyHead(32, num_blocks=2, coarse_offsets="reinterpret")
    module.load_state_dict(_converted(kit.state_dict()))
    shapes = [list(kit.outputs[f"dyhead.{i}"].shape) for i in range(5)]
    inputs = [kit.value(f"input.{i}", s).requires_grad_() for i, s in enumerate(shapes)]
    outputs = module(inputs)
    for i, output in enumerate(outputs):
        assert_near(output.detach(), kit.outputs[f"dyhead.{i}"], f"level {i}")
    sum((y * kit.value(f"gw.{i}", s)).sum() for i, (y, s) in enumerate(zip(outputs, shapes, strict=True))).backward()
    for i, x in enumerate(inputs):
        assert_near(x.grad, kit.outputs[f"grad.input.{i}"], f"gradient of input {i}")
    gradients = {k.removeprefix("grad."): v for k, v in kit.outputs.items() if k.startswith("grad.dyhead_blocks.")}
    parameters = dict(module.named_parameters())
    expected = {k: v for k, v in _converted(gradients).items() if not (".conv_" in k and k.endswith("bias"))}
    assert len(expected) == len(gradients) == len(parameters) - 6  # mmdet's deformable convolutions have no bias
    for key, gradient in expected.items():
        assert_near(parameters[key].grad, gradient, f"gradient of {key}")


def _converted(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of mmdetection's bare neck under our names; gradients have the shapes of their parameters."""
    renamed = convert_mmdet({f"neck.1.{key}": value for key, value in tensors.items()})
    return {k.removeprefix("neck.dyhead."): v for k, v in renamed.items()}
