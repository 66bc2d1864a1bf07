"""The checkpoints of DETR's authors.

Differences that are more than names: the classifier has a row for each of COCO's ids 0 to 90, then one for "no object".
Ours has the 80 classes first, then "no object", then the 11 rows of ids without a class: they stay, since they take
part in the softmax. Classifiers of other sizes (one's own classes) keep their order.

Source of the names: the modules of facebookresearch/detr (``DETR``, ``Transformer``, ``Backbone``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dyhead_zoo.convert import Conversion, Rename, add_batch_counters, apply_table, unwrap
from dyhead_zoo.data.label_space import COCO_80

_BODY = "backbone.0.body."
_RESNET = (
    Rename(_BODY + "conv1.weight", "backbone.body.conv1.weight"),
    Rename(_BODY + "bn1.{bn}", "backbone.body.bn1.{bn}"),
    Rename(_BODY + "layer{i}.{j}.conv{k}.weight", "backbone.body.layer{i}.{j}.conv{k}.weight"),
    Rename(_BODY + "layer{i}.{j}.bn{k}.{bn}", "backbone.body.layer{i}.{j}.bn{k}.{bn}"),
    Rename(_BODY + "layer{i}.{j}.downsample.0.weight", "backbone.body.layer{i}.{j}.downsample.0.weight"),
    Rename(_BODY + "layer{i}.{j}.downsample.1.{bn}", "backbone.body.layer{i}.{j}.downsample.1.{bn}"),
)


def _layers(part: str) -> tuple[Rename, ...]:
    source, target = f"transformer.{part}.layers.{{j}}.", f"head.transformer.{part}.{{j}}."
    return (
        Rename(source + "self_attn.{any}", target + "self_attn.{any}"),
        Rename(source + "multihead_attn.{any}", target + "cross_attn.{any}"),
        Rename(source + "linear{i}.{wb}", target + "ffn.linear{i}.{wb}"),
        Rename(source + "norm{i}.{wb}", target + "norm{i}.{wb}"),
    )


_TABLE = (
    *_RESNET,
    Rename("input_proj.{wb}", "neck.proj.0.{wb}"),
    *_layers("encoder"),
    *_layers("decoder"),
    Rename("transformer.decoder.norm.{wb}", "head.transformer.norm.{wb}"),
    Rename("query_embed.weight", "head.queries.weight"),
    Rename("class_embed.{wb}", "head.class_logits.{wb}"),
    Rename("bbox_embed.layers.{i}.{wb}", "head.box_mlp.layers.{i}.{wb}"),
)

_NO_OBJECT = 91
"""Row of "no object" in the published classifiers, after COCO's ids."""


def _sort_rows(tensors: dict[str, Tensor]) -> None:
    """Classes, "no object", unused ids: the order of our classifier."""
    unused = [row for row in range(_NO_OBJECT) if row not in COCO_80.category_ids]
    order = torch.tensor([*COCO_80.category_ids, _NO_OBJECT, *unused])
    for key in ("head.class_logits.weight", "head.class_logits.bias"):
        if key in tensors and len(tensors[key]) == _NO_OBJECT + 1:
            tensors[key] = tensors[key][order.to(tensors[key].device)]


def convert(state_dict: Mapping[str, Any]) -> Conversion:
    """Convert, and keep the record of what was created.

    Args:
        state_dict: the authors' keys to tensors, with or without ``{'model': ..}`` around them; not changed.

    Raises:
        CheckpointError: for keys of no known module.
    """
    conversion = apply_table(unwrap(state_dict)[0], _TABLE, "DETR")
    _sort_rows(conversion.tensors)
    add_batch_counters(conversion)
    return conversion
