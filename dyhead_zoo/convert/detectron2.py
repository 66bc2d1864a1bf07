"""Checkpoints trained in detectron2: its own, those of DyHead's authors (microsoft/DynamicHead), AdelaiDet's FCOS; and
BorderDet's, from cvpods, which has detectron2's modules.

Differences that are more than names: the frozen BatchNorm layers do not count batches; one learned scale per level
there, one parameter with all of them here; Swin merges patches at the end of a stage, timm at the start of the next.
Anchors of a cell run over the ratios, then over the sizes there, and the other way round here. Other channel orders are
the same, and the deformable convolutions have a bias in both.

Source of the names: the modules of DynamicHead at 9c7cd66, which wrap detectron2's backbone into another, and of
detectron2's ResNet, FPN and RetinaNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dyhead_zoo.convert import (
    CheckpointError,
    Conversion,
    Drop,
    Rename,
    add_batch_counters,
    apply_table,
    renumber,
    stack_scales,
    tower_rows,
    unwrap,
)

_BODY = "backbone.backbone.bottom_up."

_NOT_WEIGHTS = (
    Drop("pixel_mean", "the detector's own normalisation takes its place"),
    Drop("pixel_std", "the detector's own normalisation takes its place"),
    Drop("anchor_generator.cell_anchors.{i}", "follows from the anchor settings"),
    Drop(_BODY + "{any}.relative_position_index", "follows from the window size"),
)


def _resnet(body: str) -> tuple[Rename, ...]:
    """detectron2 numbers the stages by the stride they reach (res2 .. res5), torchvision and timm from 1."""
    return (
        Rename(body + "stem.conv1.weight", "backbone.body.conv1.weight"),
        Rename(body + "stem.conv1.norm.{bn}", "backbone.body.bn1.{bn}"),
        Rename(body + "res{i}.{j}.conv{k}.weight", "backbone.body.layer{previous}.{j}.conv{k}.weight"),
        Rename(body + "res{i}.{j}.conv{k}.norm.{bn}", "backbone.body.layer{previous}.{j}.bn{k}.{bn}"),
        Rename(body + "res{i}.{j}.shortcut.weight", "backbone.body.layer{previous}.{j}.downsample.0.weight"),
        Rename(body + "res{i}.{j}.shortcut.norm.{bn}", "backbone.body.layer{previous}.{j}.downsample.1.{bn}"),
    )


_SWIN_BLOCK = "layers.{i}.blocks.{j}."
_BIAS_TABLE = "attn.relative_position_bias_table"
_SWIN = (
    Rename(_BODY + "patch_embed.proj.{wb}", "backbone.body.patch_embed.proj.{wb}"),
    Rename(_BODY + "patch_embed.norm.{wb}", "backbone.body.patch_embed.norm.{wb}"),
    Rename(_BODY + _SWIN_BLOCK + "norm{k}.{wb}", "backbone.body." + _SWIN_BLOCK + "norm{k}.{wb}"),
    Rename(_BODY + _SWIN_BLOCK + _BIAS_TABLE, "backbone.body." + _SWIN_BLOCK + _BIAS_TABLE),
    Rename(_BODY + _SWIN_BLOCK + "attn.qkv.{wb}", "backbone.body." + _SWIN_BLOCK + "attn.qkv.{wb}"),
    Rename(_BODY + _SWIN_BLOCK + "attn.proj.{wb}", "backbone.body." + _SWIN_BLOCK + "attn.proj.{wb}"),
    Rename(_BODY + _SWIN_BLOCK + "mlp.fc{k}.{wb}", "backbone.body." + _SWIN_BLOCK + "mlp.fc{k}.{wb}"),
    Rename(_BODY + "layers.{i}.downsample.norm.{wb}", "backbone.body.layers.{next}.downsample.norm.{wb}"),
    Rename(_BODY + "layers.{i}.downsample.reduction.weight", "backbone.body.layers.{next}.downsample.reduction.weight"),
    Rename(_BODY + "norm{i}.{wb}", "backbone.norms.{i}.{wb}"),
)


def _fpn(backbone: str) -> tuple[Rename, ...]:
    return (
        Rename(backbone + "fpn_lateral{i}.{wb}", "neck.fpn.lateral.{i}.{wb}"),
        Rename(backbone + "fpn_output{i}.{wb}", "neck.fpn.output.{i}.{wb}"),
        Rename(backbone + "top_block.p{i}.{wb}", "neck.fpn.extra.{i}.{wb}"),
    )


_BLOCK = "backbone.dyhead_tower.{i}."
_OUR_BLOCK = "neck.dyhead.blocks.{i}."
_DYHEAD = (
    Rename(_BLOCK + "offset.{wb}", _OUR_BLOCK + "spatial.offset.{wb}"),
    *(
        Rename(_BLOCK + f"DyConv.{index}.{part}." + "{wb}", _OUR_BLOCK + f"spatial.{ours}_{branch}." + "{wb}")
        for index, branch in enumerate(("high", "mid", "low"))
        for part, ours in (("conv", "conv"), ("bn", "norm"))
    ),
    Rename(_BLOCK + "AttnConv.1.{wb}", _OUR_BLOCK + "scale.fc.{wb}"),
    Rename(_BLOCK + "relu.fc.0.{wb}", _OUR_BLOCK + "task.fc1.{wb}"),
    Rename(_BLOCK + "relu.fc.2.{wb}", _OUR_BLOCK + "task.fc2.{wb}"),
)

_ATSS = (
    Rename("head.cls_logits.{wb}", "head.cls_logits.{wb}"),
    Rename("head.bbox_pred.{wb}", "head.box_deltas.{wb}"),
    Rename("head.centerness.{wb}", "head.centerness.{wb}"),
    Rename("head.scales.{i}.scale", "head.scales.{i}"),
)


def ratio_major(tensor: Tensor) -> Tensor:
    """Bring the rows of three sizes times three ratios, (size, ratio, ...), into our order, (ratio, size, ...).

    Args:
        tensor: (9 * rows per anchor, ...).

    Raises:
        CheckpointError: for rows of another number of anchors.
    """
    if len(tensor) % 9:
        raise CheckpointError(
            f"a prediction layer has {len(tensor)} rows: RetinaNet is read with 9 anchors per cell only"
        )
    return tensor.unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2)


_RETINANET = (
    Rename("head.cls_subnet.{i}.{wb}", "head.cls_tower.{i}.conv.{wb}"),
    Rename("head.bbox_subnet.{i}.{wb}", "head.box_tower.{i}.conv.{wb}"),
    Rename("head.cls_score.{wb}", "head.cls_logits.{wb}", ratio_major),
    Rename("head.bbox_pred.{wb}", "head.box_deltas.{wb}", ratio_major),
)

_FCOS = (
    *tower_rows("proposal_generator.fcos_head.cls_tower.", "head.cls_tower."),
    *tower_rows("proposal_generator.fcos_head.bbox_tower.", "head.box_tower."),
    Rename("proposal_generator.fcos_head.cls_logits.{wb}", "head.cls_logits.{wb}"),
    Rename("proposal_generator.fcos_head.bbox_pred.{wb}", "head.box_distances.{wb}"),
    Rename("proposal_generator.fcos_head.ctrness.{wb}", "head.centerness.{wb}"),
    Rename("proposal_generator.fcos_head.scales.{i}.scale", "head.scales.{i}"),
)


def _border_branch(source: str, target: str) -> tuple[Rename, ...]:
    layers = {"cur_point_conv": "point", "ltrb_conv": "borders", "border_conv": "merge"}
    return tuple(Rename(f"{source}{theirs}.0.{{wb}}", f"{target}{ours}.{{wb}}") for theirs, ours in layers.items())


_BORDERDET = (
    *tower_rows("head.cls_subnet.", "head.cls_tower."),
    *tower_rows("head.bbox_subnet.", "head.box_tower."),
    Rename("head.cls_score.{wb}", "head.cls_logits.{wb}"),
    Rename("head.bbox_pred.{wb}", "head.box_distances.{wb}"),
    Rename("head.centerness.{wb}", "head.centerness.{wb}"),
    Rename("head.scales.{i}.scale", "head.scales.{i}"),
    *_border_branch("head.border_cls_subnet.", "head.border_cls."),
    *_border_branch("head.border_bbox_subnet.", "head.border_box."),
    Rename("head.border_cls_score.{wb}", "head.border_logits.{wb}"),
    Rename("head.border_bbox_pred.{wb}", "head.border_deltas.{wb}"),
)

_RPN = (
    Drop("proposal_generator.anchor_generator.cell_anchors.{i}", "follows from the anchor settings"),
    Rename("proposal_generator.rpn_head.conv.{wb}", "head.rpn.tower.0.conv.{wb}"),
    Rename("proposal_generator.rpn_head.objectness_logits.{wb}", "head.rpn.objectness.{wb}"),
    Rename("proposal_generator.rpn_head.anchor_deltas.{wb}", "head.rpn.deltas.{wb}"),
    Rename("roi_heads.mask_head.mask_fcn{i}.{wb}", "head.mask.0.convs.{previous}.conv.{wb}"),
    Rename("roi_heads.mask_head.deconv.{wb}", "head.mask.0.upsample.{wb}"),
    Rename("roi_heads.mask_head.predictor.{wb}", "head.mask.0.logits.{wb}"),
)


def _box_head(theirs: str, ours: str) -> tuple[Rename, ...]:
    """Box head of one stage; those of Cascade R-CNN are numbered."""
    return (
        Rename(f"roi_heads.box_head{theirs}.fc1." + "{wb}", f"head.box.{ours}.fcs.0." + "{wb}"),
        Rename(f"roi_heads.box_head{theirs}.fc2." + "{wb}", f"head.box.{ours}.fcs.1." + "{wb}"),
        Rename(f"roi_heads.box_predictor{theirs}.cls_score." + "{wb}", f"head.box.{ours}.cls_logits." + "{wb}"),
        Rename(f"roi_heads.box_predictor{theirs}.bbox_pred." + "{wb}", f"head.box.{ours}.box_deltas." + "{wb}"),
    )


_RCNN: tuple[Rename | Drop, ...] = (*_RPN, *_box_head("", "0"), *_box_head(".{i}", "{i}"))

_SHARED: tuple[Rename | Drop, ...] = (
    *_NOT_WEIGHTS,
    *_resnet(_BODY),
    *_resnet("backbone.bottom_up."),
    *_SWIN,
    *_fpn("backbone.backbone."),
    *_fpn("backbone."),
    *_DYHEAD,
)


_NUMBERED = (
    *("backbone.norms.", "neck.fpn.lateral.", "neck.fpn.output.", "neck.fpn.extra."),
    *("head.cls_tower.", "head.box_tower."),
)
"""Prefixes whose numbers there do not count from 0 in steps of 1."""


def _add_running_positives(conversion: Conversion) -> None:
    """Give RetinaNet the running mean by which its losses are divided; the source does not save it."""
    conversion.tensors["head.running_positives"] = torch.tensor(100.0)
    conversion.created["head.running_positives"] = "100: the source starts there again too"


def convert(state_dict: Mapping[str, Any]) -> Conversion:
    """Convert, and keep the record of what was dropped and created.

    Args:
        state_dict: detectron2's keys to tensors, with or without ``{'model': ...}`` around them; not changed.

    Raises:
        CheckpointError: for keys of no known module.
    """
    source = unwrap(state_dict)[0]
    borderdet = "head.border_cls_score.weight" in source
    retinanet = "head.cls_score.weight" in source and not borderdet
    head: tuple[Rename | Drop, ...] = _BORDERDET if borderdet else _RETINANET if retinanet else (*_ATSS, *_FCOS, *_RCNN)
    conversion = apply_table(source, (*_SHARED, *head), "detectron2")
    for prefix in _NUMBERED:
        conversion.tensors = renumber(conversion.tensors, prefix)
    conversion.tensors = stack_scales(conversion.tensors)
    add_batch_counters(conversion)
    if retinanet:
        _add_running_positives(conversion)
    return conversion


def convert_detectron2(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our state dict from detectron2's; see ``convert``."""
    return convert(state_dict).tensors
