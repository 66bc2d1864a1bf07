"""DETR and Deformable DETR of mmdetection: the rows of version 3 and of version 2, which differ.

Differences that are more than names: projections of coarser levels have their own list there; Deformable DETR without
box refinement has one classifier and one box branch, which its checkpoints repeat for every decoder layer.

Source of the names: the modules of mmdet 3.3.0 (``DETR``, ``DeformableDETR``, ``ChannelMapper``) and of 2.x
(``DETRHead``, ``Transformer``, ``DeformableDetrTransformer``).
"""

from __future__ import annotations

import torch

from dyhead_zoo.convert import Conversion, Rename


def _layers(part: str) -> tuple[Rename, ...]:
    rows = []
    for prefix in ("", "bbox_head.transformer."):  # version 3, version 2
        source, target = f"{prefix}{part}.layers.{{j}}.", f"head.transformer.{part}.{{j}}."
        attentions = {"self_attn": "self_attn", "attentions.0": "self_attn"}
        attentions |= {"cross_attn": "cross_attn", "multihead_attn": "cross_attn", "attentions.1": "cross_attn"}
        for theirs, ours in attentions.items():
            rows.append(Rename(f"{source}{theirs}.attn.{{any}}", f"{target}{ours}.{{any}}"))
            rows.append(Rename(f"{source}{theirs}.{{any}}", f"{target}{ours}.{{any}}"))
        for ffn in ("ffn", "ffns.0"):
            rows.append(Rename(f"{source}{ffn}.layers.0.0.{{wb}}", f"{target}ffn.linear1.{{wb}}"))
            rows.append(Rename(f"{source}{ffn}.layers.1.{{wb}}", f"{target}ffn.linear2.{{wb}}"))
        rows.append(Rename(source + "norms.{i}.{wb}", target + "norm{next}.{wb}"))
    return tuple(rows)


_NECK = (
    Rename("neck.convs.{i}.conv.{wb}", "neck.proj.{i}.{wb}"),
    Rename("neck.convs.{i}.gn.{wb}", "neck.proj.{i}.norm.{wb}"),
    Rename("neck.extra_convs.{i}.conv.{wb}", "neck.extra.{i}.{wb}"),
    Rename("neck.extra_convs.{i}.gn.{wb}", "neck.extra.{i}.norm.{wb}"),
    Rename("bbox_head.input_proj.{wb}", "neck.proj.0.{wb}"),
)

_DETR = (
    Rename("decoder.post_norm.{wb}", "head.transformer.norm.{wb}"),
    Rename("bbox_head.transformer.decoder.post_norm.{wb}", "head.transformer.norm.{wb}"),
    Rename("bbox_head.transformer.decoder.norm.{wb}", "head.transformer.norm.{wb}"),
    Rename("query_embedding.weight", "head.queries.weight"),
    Rename("bbox_head.query_embedding.weight", "head.queries.weight"),
    Rename("bbox_head.fc_cls.{wb}", "head.class_logits.{wb}"),
    Rename("bbox_head.reg_ffn.layers.0.0.{wb}", "head.box_mlp.layers.0.{wb}"),
    Rename("bbox_head.reg_ffn.layers.1.{wb}", "head.box_mlp.layers.1.{wb}"),
    Rename("bbox_head.fc_reg.{wb}", "head.box_mlp.layers.2.{wb}"),
)

_DEFORMABLE = (
    Rename("level_embed", "head.transformer.level_embed"),
    Rename("bbox_head.transformer.level_embeds", "head.transformer.level_embed"),
    Rename("bbox_head.cls_branches.{i}.{wb}", "head.class_logits.{i}.{wb}"),
    *(
        Rename(f"bbox_head.reg_branches.{{i}}.{2 * layer}.{{wb}}", f"head.box_mlps.{{i}}.layers.{layer}.{{wb}}")
        for layer in range(3)
    ),
    *(
        Rename(f"{theirs}.{{wb}}", f"head.{ours}.{{wb}}")
        for names, ours in {
            ("reference_points_fc", "bbox_head.transformer.reference_points"): "reference_points",
            ("memory_trans_fc", "bbox_head.transformer.enc_output"): "proposals.memory_fc",
            ("memory_trans_norm", "bbox_head.transformer.enc_output_norm"): "proposals.memory_norm",
            ("pos_trans_fc", "bbox_head.transformer.pos_trans"): "proposals.query_fc",
            ("pos_trans_norm", "bbox_head.transformer.pos_trans_norm"): "proposals.query_norm",
        }.items()
        for theirs in names
    ),
)

TABLE = (*_NECK, *_layers("encoder"), *_layers("decoder"), *_DETR, *_DEFORMABLE)


def finish(conversion: Conversion) -> None:
    """What the table cannot say: the list of projections, and branches that are stored more than once."""
    _join_projections(conversion)
    _drop_repeated_branches(conversion)


def _join_projections(conversion: Conversion) -> None:
    """One list of projections; a convolution that a norm follows is the ``conv`` of a ``ConvNorm``."""
    tensors = conversion.tensors
    count = len({key.split(".")[2] for key in tensors if key.startswith("neck.proj.")})
    normed = {key.removesuffix(".norm.weight") for key in tensors if key.endswith(".norm.weight")}

    def renamed(key: str) -> str:
        if not key.startswith(("neck.proj.", "neck.extra.")):
            return key
        layer, _, name = key.rpartition(".")
        if layer in normed:
            layer += ".conv"
        if not layer.startswith("neck.extra."):
            return f"{layer}.{name}"
        _, _, number, *rest = layer.split(".")
        return ".".join(["neck.proj", str(int(number) + count), *rest, name])

    conversion.tensors = {renamed(key): tensor for key, tensor in tensors.items()}


def _drop_repeated_branches(conversion: Conversion) -> None:
    """Keep one branch where all are equal, as they are if the detector has a single one for all decoder layers."""
    tensors = conversion.tensors
    branches = [key for key in tensors if key.startswith(("head.class_logits.", "head.box_mlps."))]
    numbered = {key: _first(key) for key in branches if key.split(".")[2].isdigit()}
    if all(torch.equal(tensors[key], tensors[first]) for key, first in numbered.items()):
        for key in [key for key, first in numbered.items() if key != first]:
            del tensors[key]
            conversion.dropped[key] = "the same tensor as that of the first decoder layer, which all layers share"


def _first(key: str) -> str:
    """The key of the same parameter in the first branch."""
    head, part, _, *rest = key.split(".")
    return ".".join([head, part, "0", *rest])
