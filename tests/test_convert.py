"""Converters: every foreign key has one place in our detectors, in the right shape and channel order."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dyhead_zoo.convert import (
    CheckpointError,
    Drop,
    Rename,
    apply_table,
    detectron2,
    mmdet,
    renumber,
    stack_scales,
    unwrap,
)
from dyhead_zoo.convert.detectron2 import convert_detectron2
from dyhead_zoo.convert.mmdet import convert_mmdet, unpermute_merging
from dyhead_zoo.factory import create_detector

Shapes = dict[str, tuple[int, ...]]

MANIFESTS = Path(os.environ.get("DYHEAD_ZOO_PARITY", Path(__file__).parent / "parity"))
KIT = {
    "atss_r50": "atss_resnet50.mmdet_1x_coco",
    "atss_r50_dyhead": "atss_resnet50_dyhead6.mmdet_1x_coco",
    "atss_r50_caffe_dyhead": "atss_resnet50_dyhead6.mmdet_caffe_1x_coco",
    "atss_swin_t_dyhead": "atss_swin_dyhead2",
}


@cache
def detector_shapes(name: str, **kwargs: Any) -> Shapes:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in create_detector(name, **kwargs).state_dict().items()}


def meta_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def shapes_of(tensors: dict[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in tensors.items()}


# --- key lists of the sources, from their module definitions ----------------------------------------------------------


def pairs(prefix: str, weight: tuple[int, ...], bias: bool = True) -> Shapes:
    return {f"{prefix}.weight": weight} | ({f"{prefix}.bias": weight[:1]} if bias else {})


def frozen_norm(prefix: str, channels: int) -> Shapes:
    return {f"{prefix}.{name}": (channels,) for name in ("weight", "bias", "running_mean", "running_var")}


def official_resnet50() -> Shapes:
    body = "backbone.backbone.bottom_up."
    shapes = {f"{body}stem.conv1.weight": (64, 3, 7, 7)} | frozen_norm(f"{body}stem.conv1.norm", 64)
    inputs = 64
    for stage, (depth, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), start=2):
        for i in range(depth):
            block = f"{body}res{stage}.{i}."
            convs = {"conv1": (width, inputs, 1, 1), "conv2": (width, width, 3, 3), "conv3": (4 * width, width, 1, 1)}
            if i == 0:
                convs["shortcut"] = (4 * width, inputs, 1, 1)
            for name, shape in convs.items():
                shapes |= {f"{block}{name}.weight": shape} | frozen_norm(f"{block}{name}.norm", shape[0])
            inputs = 4 * width
    return shapes


def official_swin_tiny() -> Shapes:
    body = "backbone.backbone.bottom_up."
    shapes = pairs(f"{body}patch_embed.proj", (96, 3, 4, 4)) | pairs(f"{body}patch_embed.norm", (96,))
    for stage, (depth, heads) in enumerate(zip((2, 2, 6, 2), (3, 6, 12, 24), strict=True)):
        width = 96 * 2**stage
        for i in range(depth):
            block = f"{body}layers.{stage}.blocks.{i}."
            shapes |= pairs(f"{block}norm1", (width,)) | pairs(f"{block}norm2", (width,))
            shapes |= pairs(f"{block}attn.qkv", (3 * width, width)) | pairs(f"{block}attn.proj", (width, width))
            shapes |= pairs(f"{block}mlp.fc1", (4 * width, width)) | pairs(f"{block}mlp.fc2", (width, 4 * width))
            shapes[f"{block}attn.relative_position_bias_table"] = (169, heads)
            shapes[f"{block}attn.relative_position_index"] = (49, 49)
        if stage < 3:
            merging = f"{body}layers.{stage}.downsample."
            shapes |= pairs(f"{merging}norm", (4 * width,))
            shapes |= pairs(f"{merging}reduction", (2 * width, 4 * width), bias=False)
        if stage > 0:
            shapes |= pairs(f"{body}norm{stage}", (width,))
    return shapes


def official_rest(channels: tuple[int, ...]) -> Shapes:
    shapes: Shapes = {}
    for level, inputs in zip((3, 4, 5), channels, strict=True):
        shapes |= pairs(f"backbone.backbone.fpn_lateral{level}", (256, inputs, 1, 1))
        shapes |= pairs(f"backbone.backbone.fpn_output{level}", (256, 256, 3, 3))
    for level in (6, 7):
        shapes |= pairs(f"backbone.backbone.top_block.p{level}", (256, 256, 3, 3))
    for i in range(6):
        block = f"backbone.dyhead_tower.{i}."
        for branch in range(3):
            shapes |= pairs(f"{block}DyConv.{branch}.conv", (256, 256, 3, 3))
            shapes |= pairs(f"{block}DyConv.{branch}.bn", (256,))
        shapes |= pairs(f"{block}AttnConv.1", (1, 256, 1, 1)) | pairs(f"{block}offset", (27, 256, 3, 3))
        shapes |= pairs(f"{block}relu.fc.0", (64, 256)) | pairs(f"{block}relu.fc.2", (1024, 64))
        shapes[f"head.scales.{i}.scale"] = (1,)
    del shapes["head.scales.5.scale"]  # five levels, six blocks
    for name, outputs in (("cls_logits", 80), ("bbox_pred", 4), ("centerness", 1)):
        shapes |= pairs(f"head.{name}", (outputs, 256, 1, 1))
    return shapes


OFFICIAL = {
    "atss_resnet50_dyhead6.official_1x_coco": lambda: official_resnet50() | official_rest((512, 1024, 2048)),
    "atss_swin_dyhead6.official_2x_coco": lambda: official_swin_tiny() | official_rest((192, 384, 768)),
}


def mmdet_swin(width: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int) -> Shapes:
    shapes = pairs("backbone.patch_embed.projection", (width, 3, 4, 4)) | pairs("backbone.patch_embed.norm", (width,))
    for stage, (depth, num_heads) in enumerate(zip(depths, heads, strict=True)):
        for i in range(depth):
            block = f"backbone.stages.{stage}.blocks.{i}."
            attention = f"{block}attn.w_msa."
            shapes |= pairs(f"{block}norm1", (width,)) | pairs(f"{block}norm2", (width,))
            shapes |= pairs(f"{attention}qkv", (3 * width, width)) | pairs(f"{attention}proj", (width, width))
            shapes |= pairs(f"{block}ffn.layers.0.0", (4 * width, width))
            shapes |= pairs(f"{block}ffn.layers.1", (width, 4 * width))
            shapes[f"{attention}relative_position_bias_table"] = ((2 * window - 1) ** 2, num_heads)
            shapes[f"{attention}relative_position_index"] = (window**2, window**2)
        if stage > 0:
            shapes |= pairs(f"backbone.norm{stage}", (width,))
        if stage < len(depths) - 1:
            merging = f"backbone.stages.{stage}.downsample."
            shapes |= pairs(f"{merging}norm", (4 * width,))
            shapes |= pairs(f"{merging}reduction", (2 * width, 4 * width), bias=False)
        width *= 2
    return shapes


def mmdet_rest(channels: tuple[int, ...]) -> Shapes:
    shapes: Shapes = {}
    for level, inputs in enumerate(channels):
        shapes |= pairs(f"neck.0.lateral_convs.{level}.conv", (256, inputs, 1, 1))
    for level in range(5):
        shapes |= pairs(f"neck.0.fpn_convs.{level}.conv", (256, 256, 3, 3))
        shapes[f"bbox_head.scales.{level}.scale"] = ()
    for i in range(6):
        shapes |= mmdet_dyhead_block(256, i)
    for name, outputs in (("cls", 80), ("reg", 4), ("centerness", 1)):
        shapes |= pairs(f"bbox_head.atss_{name}", (outputs, 256, 1, 1))
    return shapes


def mmdet_dyhead_block(channels: int = 8, index: int = 0) -> Shapes:
    block = f"neck.1.dyhead_blocks.{index}."
    shapes = pairs(f"{block}spatial_conv_offset", (27, channels, 3, 3))
    for branch in ("high", "mid", "low"):
        shapes |= pairs(f"{block}spatial_conv_{branch}.conv", (channels, channels, 3, 3), bias=False)
        shapes |= pairs(f"{block}spatial_conv_{branch}.norm", (channels,))
    shapes |= pairs(f"{block}scale_attn_module.1", (1, channels, 1, 1))
    shapes |= pairs(f"{block}task_attn_module.conv1.conv", (channels // 4, channels, 1, 1))
    return shapes | pairs(f"{block}task_attn_module.conv2.conv", (4 * channels, channels // 4, 1, 1))


def random_tensors(shapes: Shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


# --- whole detectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", KIT)
def test_every_mmdet_key_has_its_place(case: str) -> None:
    manifest_path = MANIFESTS / case / "manifest.json"
    if not manifest_path.is_file():
        pytest.skip("reference data: set DYHEAD_ZOO_PARITY to its folder")
    manifest = json.loads(manifest_path.read_text())
    converted = mmdet.convert(meta_tensors({key: tuple(rule["shape"]) for key, rule in manifest["params"].items()}))
    options = {"pred_kernel": 1, "fpn_norm": False} if "swin" in case else {}
    assert shapes_of(converted.tensors) == detector_shapes(KIT[case], **options)
    assert len(converted.dropped) == (12 if "swin" in case else 0)  # one index buffer a block


def test_every_mmdet_key_of_swin_large_has_its_place() -> None:
    source = mmdet_swin(192, (2, 2, 18, 2), (6, 12, 24, 48), window=12) | mmdet_rest((384, 768, 1536))
    assert len(source) == 484  # of the published file
    converted = mmdet.convert(meta_tensors(source))
    assert shapes_of(converted.tensors) == detector_shapes("atss_swin_large_dyhead6.mmdet_2x_coco")


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_key_has_its_place(name: str) -> None:
    source = OFFICIAL[name]()
    converted = detectron2.convert(meta_tensors(source))
    assert shapes_of(converted.tensors) == detector_shapes(name)
    norms = sum(key.endswith("running_mean") for key in source)
    assert len(converted.created) == norms
    assert all(key.endswith("num_batches_tracked") for key in converted.created)
    counters = [converted.tensors[key] for key in converted.created]
    assert all(counter.dtype == torch.int64 and counter == 0 for counter in counters)


def test_official_branches_and_biases_are_kept() -> None:
    source = random_tensors({k: (2,) for k in OFFICIAL["atss_resnet50_dyhead6.official_1x_coco"]()})
    converted = convert_detectron2(source)
    same = {
        "backbone.backbone.bottom_up.stem.conv1.norm.running_var": "backbone.body.bn1.running_var",
        "backbone.backbone.bottom_up.res2.0.shortcut.weight": "backbone.body.layer1.0.downsample.0.weight",
        "backbone.backbone.bottom_up.res5.2.conv3.norm.bias": "backbone.body.layer4.2.bn3.bias",
        "backbone.backbone.fpn_output5.bias": "neck.fpn.output.2.bias",
        "backbone.backbone.top_block.p7.weight": "neck.fpn.extra.1.weight",
        "backbone.dyhead_tower.4.DyConv.0.conv.bias": "neck.dyhead.blocks.4.spatial.conv_high.bias",
        "backbone.dyhead_tower.4.DyConv.1.conv.weight": "neck.dyhead.blocks.4.spatial.conv_mid.weight",
        "backbone.dyhead_tower.4.DyConv.2.bn.weight": "neck.dyhead.blocks.4.spatial.norm_low.weight",
        "backbone.dyhead_tower.4.relu.fc.2.bias": "neck.dyhead.blocks.4.task.fc2.bias",
        "head.bbox_pred.bias": "head.box_deltas.bias",
    }
    for theirs, ours in same.items():
        assert torch.equal(source[theirs], converted[ours]), ours


def test_official_swin_merges_at_the_start_of_the_next_stage_in_the_same_order() -> None:
    source = random_tensors({k: (8,) for k in official_swin_tiny()})
    converted = convert_detectron2(source)
    body = "backbone.backbone.bottom_up."
    assert torch.equal(
        converted["backbone.body.layers.2.downsample.norm.weight"], source[f"{body}layers.1.downsample.norm.weight"]
    )
    assert torch.equal(converted["backbone.norms.0.bias"], source[f"{body}norm1.bias"])


def test_input_protocol_of_older_official_files_is_dropped_with_a_reason() -> None:
    extra = {"pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1), "anchor_generator.cell_anchors.0": (1, 4)}
    converted = detectron2.convert(meta_tensors(extra))
    assert not converted.tensors
    assert set(converted.dropped) == set(extra)


# --- mmdet ------------------------------------------------------------------------------------------------------------


def test_mmdet_deform_convs_get_zero_biases_and_keep_real_ones() -> None:
    source = random_tensors(mmdet_dyhead_block())
    real = torch.arange(8.0)
    source["neck.1.dyhead_blocks.0.spatial_conv_mid.conv.bias"] = real
    converted = mmdet.convert(source)
    spatial = "neck.dyhead.blocks.0.spatial."
    assert torch.equal(converted.tensors[f"{spatial}conv_mid.bias"], real)
    assert torch.equal(converted.tensors[f"{spatial}conv_low.bias"], torch.zeros(8))
    assert set(converted.created) == {f"{spatial}conv_low.bias", f"{spatial}conv_high.bias"}


def test_mmdet_dyrelu_convolutions_become_linear_layers() -> None:
    source = random_tensors(mmdet_dyhead_block())
    converted = convert_mmdet(source)
    x = torch.randn(3, 2)
    weight = source["neck.1.dyhead_blocks.0.task_attn_module.conv2.conv.weight"]
    expected = torch.nn.functional.conv2d(x[:, :, None, None], weight).flatten(1)
    actual = torch.nn.functional.linear(x, converted["neck.dyhead.blocks.0.task.fc2.weight"])
    torch.testing.assert_close(actual, expected)


def test_mmdet_patch_merging_gives_the_same_result_on_the_original_order() -> None:
    """mmdet unfolds 2x2 patches, the original concatenates x00, x10, x01, x11 (row, column)."""
    x = torch.randn(1, 5, 4, 6)  # (B, C, H, W)
    weight, norm = torch.randn(7, 20), torch.randn(20)
    unfolded = torch.nn.functional.unfold(x, 2, stride=2)[0].T  # (cells, 4C)
    nhwc = x[0].permute(1, 2, 0)
    original = torch.cat([nhwc[0::2, 0::2], nhwc[1::2, 0::2], nhwc[0::2, 1::2], nhwc[1::2, 1::2]], -1).reshape(-1, 20)
    torch.testing.assert_close(
        (original * unpermute_merging(norm)) @ unpermute_merging(weight).T, (unfolded * norm) @ weight.T
    )


def test_mmdet_frozen_batch_norm_without_counters_gets_them() -> None:
    norm = frozen_norm("backbone.bn1", 4)
    converted = mmdet.convert(random_tensors(norm))
    assert converted.tensors["backbone.body.bn1.num_batches_tracked"] == 0
    counted = convert_mmdet(random_tensors(norm) | {"backbone.bn1.num_batches_tracked": torch.tensor(1234)})
    assert counted["backbone.body.bn1.num_batches_tracked"] == 1234


def test_mmdet_extra_levels_are_those_beyond_the_laterals() -> None:
    shapes: Shapes = {}
    for level in range(2):
        shapes |= pairs(f"neck.lateral_convs.{level}.conv", (4, 4, 1, 1))
    for level in range(5):
        shapes |= pairs(f"neck.fpn_convs.{level}.conv", (4, 4, 3, 3))
    source = random_tensors(shapes)
    converted = convert_mmdet(source)
    assert torch.equal(converted["neck.fpn.output.1.weight"], source["neck.fpn_convs.1.conv.weight"])
    assert torch.equal(converted["neck.fpn.extra.0.weight"], source["neck.fpn_convs.2.conv.weight"])
    assert torch.equal(converted["neck.fpn.extra.2.bias"], source["neck.fpn_convs.4.conv.bias"])


def test_second_copies_and_preprocessors_are_dropped_with_a_reason() -> None:
    source = {"ema_backbone_conv1_weight": (1,), "data_preprocessor.mean": (3,), "bbox_head.atss_reg.bias": (4,)}
    converted = mmdet.convert(meta_tensors(source))
    assert list(converted.tensors) == ["head.box_deltas.bias"]
    assert set(converted.dropped) == {"ema_backbone_conv1_weight", "data_preprocessor.mean"}


# --- strictness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [convert_mmdet, convert_detectron2])
def test_unknown_keys_are_an_error_that_lists_them(convert: Callable[[Mapping[str, Any]], Any]) -> None:
    keys = {f"backbone.layer1.0.conv2.conv_offset.{i}": (i,) for i in range(30)}
    with pytest.raises(CheckpointError, match=r"30 of 30 keys.*\n.*conv_offset\.0 \(0,\)[\s\S]*and 10 more"):
        convert(meta_tensors(keys))


def test_a_rule_fits_whole_keys_only() -> None:
    table: list[Rename | Drop] = [Rename("a.{i}.{wb}", "b.{next}.{wb}"), Drop("c.{any}", "why")]
    result = apply_table(meta_tensors({"a.0.weight": (1,), "c.x.y": (1,)}), table, "test")
    assert (list(result.tensors), result.dropped) == (["b.1.weight"], {"c.x.y": "why"})
    for key in ("xa.0.weight", "a.0.weight_g", "a.0.running_mean", "axb.0.weight", "a.b.weight"):
        with pytest.raises(CheckpointError, match="not known to the test converter"):
            apply_table(meta_tensors({key: (1,)}), table, "test")


def test_two_keys_for_one_place_are_an_error() -> None:
    both = pairs("neck.lateral_convs.0.conv", (1, 1, 1, 1)) | pairs("neck.0.lateral_convs.0.conv", (1, 1, 1, 1))
    with pytest.raises(CheckpointError, match=r"both 'neck\.lateral.*and 'neck\.0\.lateral"):
        convert_mmdet(meta_tensors(both))


def test_conversion_leaves_its_input_alone() -> None:
    source = random_tensors(mmdet_dyhead_block())
    before = {key: value.clone() for key, value in source.items()}
    convert_mmdet(source)
    assert source.keys() == before.keys()
    assert all(torch.equal(source[key], before[key]) for key in before)


# --- small steps ------------------------------------------------------------------------------------------------------


def test_renumber_keeps_the_order_of_numbers_not_of_strings() -> None:
    tensors = {f"n.{i}.weight": torch.tensor(i) for i in (10, 9, 3)}
    assert renumber(tensors, "n.") == {"n.2.weight": 10, "n.1.weight": 9, "n.0.weight": 3}


def test_scales_are_stacked_by_level() -> None:
    stacked = stack_scales(
        {"head.scales.1": torch.tensor([2.0]), "x": torch.zeros(1), "head.scales.0": torch.tensor(1.0)}
    )
    assert stacked["head.scales"].tolist() == [1.0, 2.0]
    assert set(stacked) == {"x", "head.scales"}


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "ema", "model_state_dict"])
def test_wrappers_are_opened(wrapper: str) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    checkpoint = {wrapper: {"bbox_head.atss_reg.bias": weight}, "meta": {"CLASSES": ("cat",)}, "optimizer": {"lr": 1}}
    tensors, meta = unwrap(checkpoint)
    assert (list(tensors), meta) == (["bbox_head.atss_reg.bias"], {"CLASSES": ("cat",)})
    assert not tensors["bbox_head.atss_reg.bias"].requires_grad
    assert list(convert_mmdet(checkpoint)) == ["head.box_deltas.bias"]


def test_of_two_state_dicts_none_is_taken() -> None:
    with pytest.raises(CheckpointError, match="2 state dicts, 'net', 'ema'"):
        unwrap({"net": {"x": torch.ones(1)}, "ema": {"x": torch.ones(1)}, "epoch": 3})


@pytest.mark.parametrize("content", [{}, {"lr": 0.1}, {"state_dict": {"epoch": 3}}, {"model": {}}, {0: torch.ones(1)}])
def test_what_is_no_state_dict_is_named(content: dict[Any, Any]) -> None:
    with pytest.raises(CheckpointError, match="no state dict"):
        unwrap(content)
