"""mmdetection's checkpoints: names of mmdet 2.x and 3.x, which agree for the detectors here.

Differences that are more than names:

* patch merging of Swin orders its inputs as ``nn.Unfold`` does, see ``unpermute_merging``;
* the deformable convolutions of DyHead have no bias there: ours become 0;
* the two layers of DyReLU are 1x1 convolutions there, linear layers here;
* one learned scale per level there, one parameter with all of them here.

Source of the names: the modules of mmdet 3.3.0 (``ResNet``, ``SwinTransformer``, ``FPN``, ``DyHead``, ``ATSSHead``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dyhead_zoo.convert import (
    Conversion,
    Drop,
    Rename,
    add_batch_counters,
    add_deform_conv_biases,
    apply_table,
    as_linear,
    mmdet_detr,
    renumber,
    stack_scales,
    unwrap,
)


def unpermute_merging(tensor: Tensor) -> Tensor:
    """Put the inputs of Swin's patch merging into the order of timm and of the original code.

    A merged vector holds C channels of a 2x2 neighbourhood. mmdet gathers it by ``nn.Unfold``: index
    ``c * 4 + row * 2 + col``; the original concatenates x00, x10, x01, x11: index ``(col * 2 + row) * C + c``.

    Args:
        tensor: (4C,) or (C_out, 4C), inputs last.
    """
    channels = tensor.shape[-1] // 4
    return tensor.reshape(-1, channels, 2, 2).permute(0, 3, 2, 1).reshape(tensor.shape)


_NOT_WEIGHTS = (
    Drop("data_preprocessor.{any}", "the detector's own normalisation takes its place"),
    Drop("ema_{any}", "second copy of the weights by mmdet's EMA hook; the regular keys are used"),
    Drop("backbone.{any}.relative_position_index", "follows from the window size"),
)

_RESNET = (
    Rename("backbone.conv1.weight", "backbone.body.conv1.weight"),
    Rename("backbone.bn1.{bn}", "backbone.body.bn1.{bn}"),
    Rename("backbone.layer{i}.{j}.conv{k}.weight", "backbone.body.layer{i}.{j}.conv{k}.weight"),
    Rename("backbone.layer{i}.{j}.bn{k}.{bn}", "backbone.body.layer{i}.{j}.bn{k}.{bn}"),
    Rename("backbone.layer{i}.{j}.downsample.0.weight", "backbone.body.layer{i}.{j}.downsample.0.weight"),
    Rename("backbone.layer{i}.{j}.downsample.1.{bn}", "backbone.body.layer{i}.{j}.downsample.1.{bn}"),
)

_SWIN_BLOCK = "backbone.stages.{i}.blocks.{j}."
_OUR_SWIN_BLOCK = "backbone.body.layers.{i}.blocks.{j}."
_BIAS_TABLE = "relative_position_bias_table"
_SWIN = (
    Rename("backbone.patch_embed.projection.{wb}", "backbone.body.patch_embed.proj.{wb}"),
    Rename("backbone.patch_embed.norm.{wb}", "backbone.body.patch_embed.norm.{wb}"),
    Rename(_SWIN_BLOCK + "norm{k}.{wb}", _OUR_SWIN_BLOCK + "norm{k}.{wb}"),
    Rename(_SWIN_BLOCK + f"attn.w_msa.{_BIAS_TABLE}", _OUR_SWIN_BLOCK + f"attn.{_BIAS_TABLE}"),
    Rename(_SWIN_BLOCK + "attn.w_msa.qkv.{wb}", _OUR_SWIN_BLOCK + "attn.qkv.{wb}"),
    Rename(_SWIN_BLOCK + "attn.w_msa.proj.{wb}", _OUR_SWIN_BLOCK + "attn.proj.{wb}"),
    Rename(_SWIN_BLOCK + "ffn.layers.0.0.{wb}", _OUR_SWIN_BLOCK + "mlp.fc1.{wb}"),
    Rename(_SWIN_BLOCK + "ffn.layers.1.{wb}", _OUR_SWIN_BLOCK + "mlp.fc2.{wb}"),
    # there at the end of a stage, in timm at the start of the next
    Rename(
        "backbone.stages.{i}.downsample.norm.{wb}",
        "backbone.body.layers.{next}.downsample.norm.{wb}",
        unpermute_merging,
    ),
    Rename(
        "backbone.stages.{i}.downsample.reduction.weight",
        "backbone.body.layers.{next}.downsample.reduction.weight",
        unpermute_merging,
    ),
    Rename("backbone.norm{i}.{wb}", "backbone.norms.{i}.{wb}"),
)


def _fpn(prefix: str) -> tuple[Rename, ...]:
    return (
        Rename(prefix + "lateral_convs.{i}.conv.{wb}", "neck.fpn.lateral.{i}.{wb}"),
        Rename(prefix + "lateral_convs.{i}.gn.{wb}", "neck.fpn.lateral.{i}.norm.{wb}"),
        Rename(prefix + "fpn_convs.{i}.conv.{wb}", "neck.fpn.output.{i}.{wb}"),
        Rename(prefix + "fpn_convs.{i}.gn.{wb}", "neck.fpn.output.{i}.norm.{wb}"),
    )


_BLOCK = "neck.1.dyhead_blocks.{i}."
_OUR_BLOCK = "neck.dyhead.blocks.{i}."
_DYHEAD = (
    Rename(_BLOCK + "spatial_conv_offset.{wb}", _OUR_BLOCK + "spatial.offset.{wb}"),
    Rename(_BLOCK + "spatial_conv_{branch}.conv.{wb}", _OUR_BLOCK + "spatial.conv_{branch}.{wb}"),
    Rename(_BLOCK + "spatial_conv_{branch}.norm.{wb}", _OUR_BLOCK + "spatial.norm_{branch}.{wb}"),
    Rename(_BLOCK + "scale_attn_module.1.{wb}", _OUR_BLOCK + "scale.fc.{wb}"),
    Rename(_BLOCK + "task_attn_module.conv{k}.conv.weight", _OUR_BLOCK + "task.fc{k}.weight", as_linear),
    Rename(_BLOCK + "task_attn_module.conv{k}.conv.bias", _OUR_BLOCK + "task.fc{k}.bias"),
)

_TOWERS = (
    Rename("bbox_head.cls_convs.{i}.conv.{wb}", "head.cls_tower.{i}.conv.{wb}"),
    Rename("bbox_head.cls_convs.{i}.gn.{wb}", "head.cls_tower.{i}.norm.{wb}"),
    Rename("bbox_head.reg_convs.{i}.conv.{wb}", "head.box_tower.{i}.conv.{wb}"),
    Rename("bbox_head.reg_convs.{i}.gn.{wb}", "head.box_tower.{i}.norm.{wb}"),
    Rename("bbox_head.scales.{i}.scale", "head.scales.{i}"),
)

_ATSS = (
    Rename("bbox_head.atss_cls.{wb}", "head.cls_logits.{wb}"),
    Rename("bbox_head.atss_reg.{wb}", "head.box_deltas.{wb}"),
    Rename("bbox_head.atss_centerness.{wb}", "head.centerness.{wb}"),
)

_RETINANET = (
    Rename("bbox_head.retina_cls.{wb}", "head.cls_logits.{wb}"),
    Rename("bbox_head.retina_reg.{wb}", "head.box_deltas.{wb}"),
)

_FCOS = (
    Rename("bbox_head.conv_cls.{wb}", "head.cls_logits.{wb}"),
    Rename("bbox_head.conv_reg.{wb}", "head.box_distances.{wb}"),
    Rename("bbox_head.conv_centerness.{wb}", "head.centerness.{wb}"),
)

_REPPOINTS = (
    Rename("bbox_head.moment_transfer", "head.moment_transfer"),
    Rename("bbox_head.reppoints_pts_init_conv.{wb}", "head.init_conv.{wb}"),
    Rename("bbox_head.reppoints_pts_init_out.{wb}", "head.init_out.{wb}"),
    Rename("bbox_head.reppoints_pts_refine_conv.weight", "head.refine_conv.weight"),
    Rename("bbox_head.reppoints_pts_refine_out.{wb}", "head.refine_out.{wb}"),
    Rename("bbox_head.reppoints_cls_conv.weight", "head.cls_conv.weight"),
    Rename("bbox_head.reppoints_cls_out.{wb}", "head.cls_logits.{wb}"),
)

_RPN = (
    Rename("rpn_head.rpn_conv.{wb}", "head.rpn.tower.0.conv.{wb}"),
    Rename("rpn_head.rpn_cls.{wb}", "head.rpn.objectness.{wb}"),
    Rename("rpn_head.rpn_reg.{wb}", "head.rpn.deltas.{wb}"),
)


def _roi_head(theirs: str, ours: str) -> tuple[Rename, ...]:
    """Box and mask head of one stage; those of Cascade R-CNN are numbered."""
    box, mask = f"roi_head.bbox_head.{theirs}", f"roi_head.mask_head.{theirs}"
    return (
        Rename(box + "shared_fcs.{j}.{wb}", f"head.box.{ours}.fcs." + "{j}.{wb}"),
        Rename(box + "fc_cls.{wb}", f"head.box.{ours}.cls_logits." + "{wb}"),
        Rename(box + "fc_reg.{wb}", f"head.box.{ours}.box_deltas." + "{wb}"),
        Rename(mask + "convs.{j}.conv.{wb}", f"head.mask.{ours}.convs." + "{j}.conv.{wb}"),
        Rename(mask + "upsample.{wb}", f"head.mask.{ours}.upsample." + "{wb}"),
        Rename(mask + "conv_logits.{wb}", f"head.mask.{ours}.logits." + "{wb}"),
    )


_RCNN = (*_RPN, *_roi_head("", "0"), *_roi_head("{i}.", "{i}"))

_TABLE: tuple[Rename | Drop, ...] = (
    *_NOT_WEIGHTS,
    *_RESNET,
    *_SWIN,
    *_fpn("neck."),
    *_fpn("neck.0."),
    *_DYHEAD,
    *_TOWERS,
    *_ATSS,
    *_RETINANET,
    *_FCOS,
    *_REPPOINTS,
    *_RCNN,
    *mmdet_detr.TABLE,
)


def _split_extra_levels(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """mmdet numbers P6, P7 on from the output convolutions; those beyond the laterals are ``neck.fpn.extra``."""
    laterals = len({key.split(".")[3] for key in tensors if key.startswith("neck.fpn.lateral.")})
    prefix = "neck.fpn.output."

    def renamed(key: str) -> str:
        if not key.startswith(prefix):
            return key
        level, name = key[len(prefix) :].split(".", 1)
        return key if int(level) < laterals else f"neck.fpn.extra.{int(level) - laterals}.{name}"

    return {renamed(key): tensor for key, tensor in tensors.items()}


def _nest_normed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A convolution of the pyramid that a norm follows is the ``conv`` of a ``ConvNorm`` here."""
    suffix = ".norm.weight"
    normed = {key.removesuffix(suffix) for key in tensors if key.startswith("neck.fpn.") and key.endswith(suffix)}

    def renamed(key: str) -> str:
        layer, _, name = key.rpartition(".")
        return f"{layer}.conv.{name}" if layer in normed else key

    return {renamed(key): tensor for key, tensor in tensors.items()}


def convert(state_dict: Mapping[str, Any]) -> Conversion:
    """Convert, and keep the record of what was dropped and created.

    Args:
        state_dict: mmdet's keys to tensors, with or without ``{'state_dict', 'meta'}`` around them; not changed.

    Raises:
        CheckpointError: for keys of no known module.
    """
    conversion = apply_table(unwrap(state_dict)[0], _TABLE, "mmdet")
    tensors = renumber(conversion.tensors, "backbone.norms.")
    conversion.tensors = stack_scales(_nest_normed(_split_extra_levels(tensors)))
    mmdet_detr.finish(conversion)
    add_batch_counters(conversion)
    add_deform_conv_biases(conversion)
    return conversion


def convert_mmdet(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our state dict from mmdet's; see ``convert``."""
    return convert(state_dict).tensors
