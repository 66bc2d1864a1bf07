"""torchvision's detectors, both published weights and one's own.

Differences that are more than names: the classifier has a row for the background, which comes first, and published
weights have one for each of COCO's 90 ids, of which ten are not in use (but in a softmax they count); FCOS has no
learned scale per level. The oldest files number the layers of towers and pyramid otherwise. Anchors come in our order.

Source of the names: torchvision.models.detection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dyhead_zoo.convert import Conversion, Rename, add_batch_counters, apply_table, renumber, tower_rows, unwrap
from dyhead_zoo.data.label_space import COCO_80

_RESNET = (
    Rename("backbone.body.conv1.weight", "backbone.body.conv1.weight"),
    Rename("backbone.body.bn1.{bn}", "backbone.body.bn1.{bn}"),
    Rename("backbone.body.layer{i}.{j}.conv{k}.weight", "backbone.body.layer{i}.{j}.conv{k}.weight"),
    Rename("backbone.body.layer{i}.{j}.bn{k}.{bn}", "backbone.body.layer{i}.{j}.bn{k}.{bn}"),
    Rename("backbone.body.layer{i}.{j}.downsample.0.weight", "backbone.body.layer{i}.{j}.downsample.0.weight"),
    Rename("backbone.body.layer{i}.{j}.downsample.1.{bn}", "backbone.body.layer{i}.{j}.downsample.1.{bn}"),
)

_MOBILENET_BLOCKS = {
    **{1: "0.0", 2: "1.0", 3: "1.1", 4: "2.0", 5: "2.1", 6: "2.2", 7: "3.0", 8: "3.1", 9: "3.2", 10: "3.3"},
    **{11: "4.0", 12: "4.1", 13: "5.0", 14: "5.1", 15: "5.2"},
}
"""Of MobileNetV3: torchvision counts the blocks through, timm within stages."""


def _conv_norm(source: str, conv: str, norm: str) -> tuple[Rename, ...]:
    return (
        Rename(f"backbone.body.{source}.0.weight", f"backbone.body.{conv}.weight"),
        Rename(f"backbone.body.{source}.1." + "{bn}", f"backbone.body.{norm}." + "{bn}"),
    )


def _mobilenet_block(number: int, place: str) -> tuple[Rename, ...]:
    """Expansion (none in the first block), depthwise convolution, squeeze and excitation (in some), projection."""
    theirs, ours = f"{number}.block", f"blocks.{place}"
    layers = ("conv_dw", "conv_pw") if number == 1 else ("conv_pw", "conv_dw", "conv_pwl", "conv_pwl")
    norms = ("bn1", "bn2", "bn3", "bn3")
    return (
        *(
            row
            for i, (layer, norm) in enumerate(zip(layers, norms, strict=False))
            for row in _conv_norm(f"{theirs}.{i}", f"{ours}.{layer}", f"{ours}.{norm}")
        ),
        Rename(f"backbone.body.{theirs}.2.fc1." + "{wb}", f"backbone.body.{ours}.se.conv_reduce." + "{wb}"),
        Rename(f"backbone.body.{theirs}.2.fc2." + "{wb}", f"backbone.body.{ours}.se.conv_expand." + "{wb}"),
    )


_MOBILENET = (
    *_conv_norm("0", "conv_stem", "bn1"),
    *_conv_norm("16", "blocks.6.0.conv", "blocks.6.0.bn1"),
    *(row for number, place in _MOBILENET_BLOCKS.items() for row in _mobilenet_block(number, place)),
)

_FPN = (
    Rename("backbone.fpn.inner_blocks.{i}.0.{wb}", "neck.fpn.lateral.{i}.{wb}"),
    Rename("backbone.fpn.layer_blocks.{i}.0.{wb}", "neck.fpn.output.{i}.{wb}"),
    Rename("backbone.fpn.inner_blocks.{i}.{wb}", "neck.fpn.lateral.{i}.{wb}"),
    Rename("backbone.fpn.layer_blocks.{i}.{wb}", "neck.fpn.output.{i}.{wb}"),
    Rename("backbone.fpn.extra_blocks.p{i}.{wb}", "neck.fpn.extra.{i}.{wb}"),
)

_FCOS = (
    *tower_rows("head.classification_head.conv.", "head.cls_tower."),
    *tower_rows("head.regression_head.conv.", "head.box_tower."),
    Rename("head.classification_head.cls_logits.{wb}", "head.cls_logits.{wb}"),
    Rename("head.regression_head.bbox_reg.{wb}", "head.box_distances.{wb}"),
    Rename("head.regression_head.bbox_ctrness.{wb}", "head.centerness.{wb}"),
)


def _retinanet_tower(source: str, target: str) -> tuple[Rename, ...]:
    return (
        Rename(source + "{i}.0.{wb}", target + "{i}.conv.{wb}"),
        Rename(source + "{i}.1.{wb}", target + "{i}.norm.{wb}"),
        Rename(source + "{i}.{wb}", target + "{i}.conv.{wb}"),  # the oldest files: 0, 2, 4, 6
    )


_RETINANET = (
    *_retinanet_tower("head.classification_head.conv.", "head.cls_tower."),
    *_retinanet_tower("head.regression_head.conv.", "head.box_tower."),
    Rename("head.classification_head.cls_logits.{wb}", "head.cls_logits.{wb}"),
    Rename("head.regression_head.bbox_reg.{wb}", "head.box_deltas.{wb}"),
)

_NORMED_FPN = (
    Rename("backbone.fpn.inner_blocks.{i}.0.weight", "neck.fpn.lateral.{i}.conv.weight"),
    Rename("backbone.fpn.inner_blocks.{i}.1.{bn}", "neck.fpn.lateral.{i}.norm.{bn}"),
    Rename("backbone.fpn.layer_blocks.{i}.0.weight", "neck.fpn.output.{i}.conv.weight"),
    Rename("backbone.fpn.layer_blocks.{i}.1.{bn}", "neck.fpn.output.{i}.norm.{bn}"),
)

_RCNN = (
    Rename("rpn.head.conv.{i}.0.{wb}", "head.rpn.tower.{i}.conv.{wb}"),
    Rename("rpn.head.conv.{wb}", "head.rpn.tower.0.conv.{wb}"),  # the oldest files
    Rename("rpn.head.cls_logits.{wb}", "head.rpn.objectness.{wb}"),
    Rename("rpn.head.bbox_pred.{wb}", "head.rpn.deltas.{wb}"),
    Rename("roi_heads.box_head.{i}.0.{wb}", "head.box.0.convs.{i}.conv.{wb}"),
    Rename("roi_heads.box_head.{i}.1.{bn}", "head.box.0.convs.{i}.norm.{bn}"),
    Rename("roi_heads.box_head.5.{wb}", "head.box.0.fcs.0.{wb}"),
    Rename("roi_heads.box_head.fc6.{wb}", "head.box.0.fcs.0.{wb}"),
    Rename("roi_heads.box_head.fc7.{wb}", "head.box.0.fcs.1.{wb}"),
    Rename("roi_heads.box_predictor.cls_score.{wb}", "head.box.0.cls_logits.{wb}"),
    Rename("roi_heads.box_predictor.bbox_pred.{wb}", "head.box.0.box_deltas.{wb}"),
    Rename("roi_heads.mask_head.{i}.0.{wb}", "head.mask.0.convs.{i}.conv.{wb}"),
    Rename("roi_heads.mask_head.{i}.1.{bn}", "head.mask.0.convs.{i}.norm.{bn}"),
    Rename("roi_heads.mask_head.mask_fcn{i}.{wb}", "head.mask.0.convs.{previous}.conv.{wb}"),  # the oldest files
    Rename("roi_heads.mask_predictor.conv5_mask.{wb}", "head.mask.0.upsample.{wb}"),
    Rename("roi_heads.mask_predictor.mask_fcn_logits.{wb}", "head.mask.0.logits.{wb}"),
)

_ANCHORS = 9
"""Per cell, of RetinaNet."""
_ROWS_OF_COCO = 1 + 90
"""Of torchvision's published classifiers: background, then COCO's ids."""


def _drop_unnamed_rows(conversion: Conversion, anchors: int) -> None:
    """Keep the rows of the classes: those of COCO's 80 where there is one per id, else all but the background's."""
    for name in ("weight", "bias"):
        key = f"head.cls_logits.{name}"
        if key not in conversion.tensors or len(conversion.tensors[key]) % anchors:
            continue  # left for the comparison of keys and shapes to report
        rows = conversion.tensors[key].unflatten(0, (anchors, -1))
        count = rows.shape[1]
        named = COCO_80.category_ids if count == _ROWS_OF_COCO else range(1, count)
        conversion.tensors[key] = rows[:, torch.tensor(named, device=rows.device)].flatten(0, 1)
        reason = f"{anchors * (count - len(named))} of {anchors * count} rows: background and ids of no class"
        conversion.dropped[f"head.classification_head.cls_logits.{name}"] = reason


def _background_last(conversion: Conversion) -> None:
    """Two-stage detectors: first the rows of the classes, then those of ids in no use, which stay in the softmax, then
    the background's. The boxes and masks of the latter two are never read; one for all classes stays as it is.
    """
    count = len(conversion.tensors["head.box.0.cls_logits.bias"])
    named = list(COCO_80.category_ids if count == _ROWS_OF_COCO else range(1, count))
    unused = [row for row in range(1, count) if row not in named]
    orders = {"box.0.cls_logits": [*named, *unused, 0], "box.0.box_deltas": named, "mask.0.logits": named}
    reason = f"{count - len(named)} of {count} rows: background and ids of no class have neither box nor mask"
    for layer, order in orders.items():
        for key in (f"head.{layer}.weight", f"head.{layer}.bias"):
            tensor = conversion.tensors.get(key)
            if tensor is None or len(tensor) != count * (4 if layer == "box.0.box_deltas" else 1):
                continue  # one for all classes, or left for the comparison of keys and shapes to report
            rows = tensor.unflatten(0, (count, -1))
            conversion.tensors[key] = rows[torch.tensor(order, device=rows.device)].flatten(0, 1)
            if order is named:
                conversion.dropped["roi_heads.box_predictor.bbox_pred, mask_predictor.mask_fcn_logits"] = reason


def _add_scales(conversion: Conversion) -> None:
    """Give FCOS the scales of its levels, all 1."""
    levels = sum(
        key.startswith(("neck.fpn.output.", "neck.fpn.extra.")) and key.endswith(".weight")
        for key in conversion.tensors
    )
    conversion.tensors["head.scales"] = torch.ones(levels)
    conversion.created["head.scales"] = "1: the source does not scale its levels"


def convert(state_dict: Mapping[str, Any], keep_rows: bool = False) -> Conversion:
    """Convert, and keep the record of what was dropped and created.

    Args:
        state_dict: torchvision's keys to tensors; not changed.
        keep_rows: of one-stage detectors, keep all rows of the classifier, background and unused ids too: to compare
            with the source.

    Raises:
        CheckpointError: for keys of no known module.
    """
    source = unwrap(state_dict)[0]
    fcos = any(key.startswith("head.regression_head.bbox_ctrness.") for key in source)
    rcnn = "roi_heads.box_predictor.cls_score.bias" in source
    pyramid = _NORMED_FPN if "backbone.fpn.inner_blocks.0.1.weight" in source else _FPN
    head = _RCNN if rcnn else _FCOS if fcos else _RETINANET
    conversion = apply_table(source, (*_RESNET, *_MOBILENET, *pyramid, *head), "torchvision")
    for prefix in ("neck.fpn.extra.", "head.cls_tower.", "head.box_tower."):
        conversion.tensors = renumber(conversion.tensors, prefix)
    add_batch_counters(conversion)
    if fcos:
        _add_scales(conversion)
    if rcnn:
        _background_last(conversion)
    elif not keep_rows:
        _drop_unnamed_rows(conversion, 1 if fcos else _ANCHORS)
    return conversion


def convert_torchvision(state_dict: Mapping[str, Any], keep_rows: bool = False) -> dict[str, Tensor]:
    """Our state dict from torchvision's; see ``convert``."""
    return convert(state_dict, keep_rows).tensors
