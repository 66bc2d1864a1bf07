"""What keys and shapes in our layout tell of a detector: family, backbone, DyHead blocks, arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import timm
import torch

from dyhead_zoo.convert import CheckpointError, listing

Shapes = Mapping[str, tuple[int, ...]]
"""Our keys to the shapes of their tensors."""

_BOX, _MASK = "head.box.{}.cls_logits.weight", "head.mask.0.logits.weight"
_MARKS: dict[str, tuple[str, ...]] = {
    "cascade_mask_rcnn": (_BOX.format(1), _MASK),
    "cascade_rcnn": (_BOX.format(1),),
    "mask_rcnn": (_BOX.format(0), _MASK),
    "faster_rcnn": (_BOX.format(0),),
    "deformable_detr": ("head.transformer.level_embed",),
    "detr": ("head.queries.weight", "head.transformer.norm.weight"),
    "borderdet": ("head.border_logits.weight",),
    "fcos": ("head.box_distances.weight",),
    "reppoints": ("head.refine_conv.weight",),
    "atss": ("head.centerness.weight",),
    "retinanet": ("head.box_deltas.weight",),
}
"""Families, and the keys by which the first that has them all is told."""

FAMILIES = tuple(sorted(_MARKS))

_BODIES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x4d", "resnext101_64x4d", "resnext101_32x8d"),
    *("wide_resnet50_2", "wide_resnet101_2", "mobilenetv3_large_100"),
    *("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224"),
    *("swin_base_patch4_window12_384", "swin_large_patch4_window7_224", "swin_large_patch4_window12_384"),
)
"""timm's names of the backbones that the converters know."""

_PRUNED = ("norm.", "conv_head.")
"""Of timm's bodies, after the last stage: no detector reads it."""


def family_of(shapes: Shapes) -> str:
    """The family whose head has these keys.

    Raises:
        CheckpointError: with the keys of the head, if it is of none.
    """
    for family, keys in _MARKS.items():
        if all(key in shapes for key in keys):
            return family
    heads = sorted({re.sub(r"\d+", "*", key) for key in shapes if key.startswith("head.")})
    raise CheckpointError(
        f"its head is none of {', '.join(FAMILIES)}. In our names it has\n"
        f"{listing(heads, 30) or '  no head: a backbone alone is no detector'}"
    )


def backbone_of(shapes: Shapes) -> str:
    """timm's name of the body whose tensors these are.

    Raises:
        CheckpointError: with the keys in which it departs from the most similar one.
    """
    prefix = "backbone.body."
    body = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    differences: dict[str, list[str]] = {}
    for name in _BODIES:
        wanted = _body_shapes(name)
        lines = [
            f"{key}: {body.get(key, 'missing')} here, {wanted.get(key, 'missing')} in {name}"
            for key in [*wanted, *(key for key in body if key not in wanted)]
            if body.get(key) != wanted.get(key)
        ]
        if not lines:
            return name
        differences[name] = lines
    nearest = min(differences, key=lambda name: len(differences[name]))
    raise CheckpointError(
        f"its backbone is none of {', '.join(_BODIES)}. It is most like {nearest}, but for "
        f"{len(differences[nearest])} of {len(body)} keys:\n{listing(differences[nearest])}"
    )


@cache
def _body_shapes(name: str) -> Shapes:
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=0).state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if not key.startswith(_PRUNED)}


def dyhead_blocks(shapes: Shapes) -> int:
    """Number of DyHead blocks in the neck."""
    return _count(shapes, r"neck\.dyhead\.blocks")


def class_arguments(shapes: Shapes, family: str, source: str) -> dict[str, Any]:
    """Arguments that decide how the rows of the classifier are laid out.

    Rows of no class are those of ids that COCO does not use, in classifiers with a row for each id: torchvision's of
    two stages, told by their 91 rows, and those of DETR's authors, by 92.
    """
    if family.endswith("rcnn"):
        rows = _rows(shapes, "head.box.0.cls_logits.bias") - 1  # without the background's
        found: dict[str, Any] = {"unused_rows": 10 if source == "torchvision" and rows == 90 else 0}
        if _rows(shapes, "head.box.0.box_deltas.bias") == 4 and rows > 1 and not family.startswith("cascade"):
            found["class_agnostic"] = True
        if "mask" in family:
            found["mask_heads"] = _count(shapes, r"head\.mask")
            if _rows(shapes, "head.mask.0.logits.bias") == 1 and rows > 1:
                found["class_agnostic_masks"] = True
        return found
    if family == "detr":
        return {"unused_rows": 11 if source == "detr" and _rows(shapes, "head.class_logits.bias") == 92 else 0}
    return {}


def arguments(shapes: Shapes, family: str) -> dict[str, Any]:
    """Other arguments that keys and shapes tell."""
    return _neck(shapes) | _HEADS.get(family, _dense)(shapes)


def _neck(shapes: Shapes) -> dict[str, Any]:
    for first, norm in (("neck.fpn.lateral.0", "fpn_norm"), ("neck.proj.0", "proj_norm")):
        for conv in (f"{first}.conv.weight", f"{first}.weight"):
            if conv in shapes:
                return {"channels": shapes[conv][0], norm: _norm(shapes, first)}
    return {}


def _norm(shapes: Shapes, layer: str) -> bool | str:
    if f"{layer}.norm.running_mean" in shapes:
        return "batch"
    return f"{layer}.norm.weight" in shapes


def _dense(shapes: Shapes) -> dict[str, Any]:
    return {"towers": _count(shapes, r"head\.cls_tower")}


def _rcnn(shapes: Shapes) -> dict[str, Any]:
    fcs = _count(shapes, r"head\.box\.0\.fcs")
    norm = _norm(shapes, "head.box.0.convs.0") or _norm(shapes, "head.mask.0.convs.0")
    return {
        "rpn_convs": _count(shapes, r"head\.rpn\.tower"),
        "box_convs": _count(shapes, r"head\.box\.0\.convs"),
        "box_hidden": tuple(_rows(shapes, f"head.box.0.fcs.{i}.bias") for i in range(fcs)),
        "roi_norm": norm,
        "mask_heads": _count(shapes, r"head\.mask"),
    }


def _transformer(shapes: Shapes) -> dict[str, Any]:
    found = {f"{part}_layers": _count(shapes, rf"head\.transformer\.{part}") for part in ("encoder", "decoder")}
    feedforward = _rows(shapes, "head.transformer.decoder.0.ffn.linear1.bias")
    queries = _rows(shapes, "head.queries.weight")  # which proposals take the place of in two-stage detectors
    return found | {"feedforward": feedforward} | ({"num_queries": queries} if queries else {})


def _deformable(shapes: Shapes) -> dict[str, Any]:
    two_stage = "head.proposals.memory_fc.weight" in shapes
    extra = [key for key, shape in shapes.items() if key.startswith("neck.proj.") and shape[2:] == (3, 3)]
    return {
        **_transformer(shapes),
        "num_extra": len(extra),
        "box_refine": two_stage or _count(shapes, r"head\.class_logits") > 1,
        "two_stage": two_stage,
    }


_HEADS: dict[str, Callable[[Shapes], dict[str, Any]]] = {
    **dict.fromkeys(("faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"), _rcnn),
    "detr": _transformer,
    "deformable_detr": _deformable,
}


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbers follow a prefix."""
    return len({m[1] for key in shapes if (m := re.match(prefix + r"\.(\d+)\.", key))})


def _rows(shapes: Shapes, key: str) -> int:
    """First dimension of a tensor; 0 if there is none."""
    return shapes[key][0] if key in shapes else 0
