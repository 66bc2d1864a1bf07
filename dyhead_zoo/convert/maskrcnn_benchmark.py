"""FCOS by its authors, trained in maskrcnn-benchmark; checkpoints may come with DistributedDataParallel's prefix.

Differences that are more than names: the frozen BatchNorm layers do not count batches; one learned scale per level
there, one parameter with all of them here.

Source of the names: the modules of maskrcnn-benchmark (MIT); its dense heads are called ``rpn``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dyhead_zoo.convert import (
    Conversion,
    Rename,
    add_batch_counters,
    apply_table,
    renumber,
    stack_scales,
    tower_rows,
    unwrap,
)

_RESNET = (
    Rename("backbone.body.stem.conv1.weight", "backbone.body.conv1.weight"),
    Rename("backbone.body.stem.bn1.{bn}", "backbone.body.bn1.{bn}"),
    Rename("backbone.body.layer{i}.{j}.conv{k}.weight", "backbone.body.layer{i}.{j}.conv{k}.weight"),
    Rename("backbone.body.layer{i}.{j}.bn{k}.{bn}", "backbone.body.layer{i}.{j}.bn{k}.{bn}"),
    Rename("backbone.body.layer{i}.{j}.downsample.0.weight", "backbone.body.layer{i}.{j}.downsample.0.weight"),
    Rename("backbone.body.layer{i}.{j}.downsample.1.{bn}", "backbone.body.layer{i}.{j}.downsample.1.{bn}"),
)

_FPN = (
    Rename("backbone.fpn.fpn_inner{i}.{wb}", "neck.fpn.lateral.{i}.{wb}"),
    Rename("backbone.fpn.fpn_layer{i}.{wb}", "neck.fpn.output.{i}.{wb}"),
    Rename("backbone.fpn.top_blocks.p{i}.{wb}", "neck.fpn.extra.{i}.{wb}"),
)

_FCOS = (
    *tower_rows("rpn.head.cls_tower.", "head.cls_tower."),
    *tower_rows("rpn.head.bbox_tower.", "head.box_tower."),
    Rename("rpn.head.cls_logits.{wb}", "head.cls_logits.{wb}"),
    Rename("rpn.head.bbox_pred.{wb}", "head.box_distances.{wb}"),
    Rename("rpn.head.centerness.{wb}", "head.centerness.{wb}"),
    Rename("rpn.head.scales.{i}.scale", "head.scales.{i}"),
)


def convert(state_dict: Mapping[str, Any]) -> Conversion:
    """Convert, and keep the record of what was dropped and created.

    Args:
        state_dict: the authors' keys to tensors, with or without ``{'model': ...}`` around them; not changed.

    Raises:
        CheckpointError: for keys of no known module.
    """
    tensors = {key.removeprefix("module."): tensor for key, tensor in unwrap(state_dict)[0].items()}
    conversion = apply_table(tensors, (*_RESNET, *_FPN, *_FCOS), "maskrcnn_benchmark")
    for prefix in ("neck.fpn.lateral.", "neck.fpn.output.", "neck.fpn.extra."):
        conversion.tensors = renumber(conversion.tensors, prefix)
    conversion.tensors = stack_scales(conversion.tensors)
    add_batch_counters(conversion)
    return conversion


def convert_maskrcnn_benchmark(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our state dict from the authors'; see ``convert``."""
    return convert(state_dict).tensors
