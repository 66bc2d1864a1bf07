"""DETR: mmdetection's outputs, the authors' checkpoints, matching against all permutations, masks and positions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_kit import Case
from set_parity import check_losses, check_outputs

from dyhead_zoo import create_detector, get_pretrained_cfg, load_checkpoint
from dyhead_zoo.layers.matching import box_losses, match_objects, pair_costs
from dyhead_zoo.layers.positions import box_positions, padding_masks, sine_positions
from dyhead_zoo.models.detr import DETROutput
from dyhead_zoo.weights import detect_source

NO_OBJECTS = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}

# --- mmdetection ------------------------------------------------------------------------------------------------------


@pytest.fixture
def case():
    kit = Case("detr_r50")
    detector = create_detector("detr_resnet50.mmdet_150e_coco")
    load_checkpoint(detector, kit.state_dict())
    return kit, detector


@pytest.mark.parametrize("batch", ["a", "b"])
def test_memory_outputs_and_detections(case, batch):
    check_outputs(*case, batch)


def test_losses_and_gradients(case):
    check_losses(*case)


VERSION_2 = (
    ("head.transformer.encoder.", "bbox_head.transformer.encoder.layers."),
    ("head.transformer.decoder.", "bbox_head.transformer.decoder.layers."),
    (".self_attn.", ".attentions.0.attn."),
    (".cross_attn.", ".attentions.1.attn."),
    (".ffn.linear1.", ".ffns.0.layers.0.0."),
    (".ffn.linear2.", ".ffns.0.layers.1."),
    (".norm1.", ".norms.0."),
    (".norm2.", ".norms.1."),
    (".norm3.", ".norms.2."),
    ("head.queries.", "bbox_head.query_embedding."),
    ("head.class_logits.", "bbox_head.fc_cls."),
    ("head.box_mlp.layers.0.", "bbox_head.reg_ffn.layers.0.0."),
    ("head.box_mlp.layers.1.", "bbox_head.reg_ffn.layers.1."),
    ("head.box_mlp.layers.2.", "bbox_head.fc_reg."),
    ("neck.proj.0.", "bbox_head.input_proj."),
    ("head.transformer.norm.", "bbox_head.transformer.decoder.post_norm."),
)
FIRST = {
    "attentions.0.attn": "self_attn.attn",
    "attentions.1.attn": "multihead_attn.attn",
    "ffns.0.": "ffn.",
    "decoder.post_norm": "decoder.norm",
}


@pytest.mark.parametrize("first", [False, True])
def test_names_of_mmdetection_2_have_their_places(first):
    """Those of the published file of 2020 (``first``), and of later ones."""
    detector = create_detector("test_detr", proj_norm=False)
    ours = {k: v for k, v in detector.state_dict().items() if not k.startswith("backbone.")}
    theirs = {}
    for key, value in ours.items():
        for new, old in VERSION_2:
            key = key.replace(new, old)
        for new, old in FIRST.items() if first else ():
            key = key.replace(new, old)
        theirs[key] = torch.randn_like(value)
    report = load_checkpoint(detector, theirs, source="mmdet", strict=False)
    assert set(report.loaded) == set(ours) and not report.unused
    assert all(
        torch.equal(a, b) for a, b in zip([detector.state_dict()[k] for k in ours], theirs.values(), strict=True)
    )


# --- the authors' weights ---------------------------------------------------------------------------------------------


def official_keys(depths=(3, 4, 6, 3), rows=92):
    """Names and shapes of facebookresearch/detr with ResNet-50."""
    norm = ("weight", "bias", "running_mean", "running_var")
    body = "backbone.0.body."
    keys = {f"{body}conv1.weight": (64, 3, 7, 7)} | {f"{body}bn1.{n}": (64,) for n in norm}
    inputs = 64
    for stage, depth in enumerate(depths, start=1):
        width = 32 * 2**stage
        for i in range(depth):
            block = f"{body}layer{stage}.{i}."
            convs = {"conv1": (width, inputs, 1, 1), "conv2": (width, width, 3, 3), "conv3": (4 * width, width, 1, 1)}
            if i == 0:
                convs["downsample.0"] = (4 * width, inputs, 1, 1)
            for conv, shape in convs.items():
                bn = "downsample.1" if conv == "downsample.0" else conv.replace("conv", "bn")
                keys |= {f"{block}{conv}.weight": shape} | {f"{block}{bn}.{n}": shape[:1] for n in norm}
            inputs = 4 * width
    linear = {"input_proj": (256, 2048, 1, 1), "class_embed": (rows, 256)}
    linear |= {f"bbox_embed.layers.{i}": (4 if i == 2 else 256, 256) for i in range(3)}
    norms = ["transformer.decoder.norm"]
    for part, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "multihead_attn"))):
        for i in range(6):
            layer = f"transformer.{part}.layers.{i}."
            linear |= {f"{layer}linear1": (2048, 256), f"{layer}linear2": (256, 2048)}
            norms += [f"{layer}norm{k + 1}" for k in range(len(attentions) + 1)]
            for name in attentions:
                linear[f"{layer}{name}.out_proj"] = (256, 256)
                keys |= {f"{layer}{name}.in_proj_weight": (768, 256), f"{layer}{name}.in_proj_bias": (768,)}
    keys |= {f"{key}.weight": shape for key, shape in linear.items()}
    keys |= {f"{key}.bias": shape[:1] for key, shape in linear.items()}
    keys |= {f"{key}.{wb}": (256,) for key in norms for wb in ("weight", "bias")}
    return keys | {"query_embed.weight": (100, 256)}


@pytest.mark.parametrize("tag", ["official_500e_coco", "official_dc5_500e_coco"])
def test_every_key_of_the_authors_has_its_place(tag):
    keys = official_keys()
    checkpoint = {key: torch.full(shape, float(i)) for i, (key, shape) in enumerate(keys.items())}
    checkpoint["class_embed.bias"] = torch.arange(92.0)
    detector = create_detector(f"detr_resnet50.{tag}")
    assert detect_source(checkpoint) == "detr" == get_pretrained_cfg(f"detr_resnet50.{tag}").source
    report = load_checkpoint(detector, {"model": checkpoint})
    assert not report.fresh_classes and len(report.created) == 53  # counters of the frozen norms
    decoder = "transformer.decoder.layers."
    state, value = detector.state_dict(), {key: float(i) for i, key in enumerate(keys)}
    for ours, theirs in {
        "head.transformer.decoder.4.cross_attn.in_proj_bias": f"{decoder}4.multihead_attn.in_proj_bias",
        "head.transformer.encoder.2.norm2.weight": "transformer.encoder.layers.2.norm2.weight",
        "head.transformer.decoder.0.norm3.bias": f"{decoder}0.norm3.bias",
        "head.transformer.norm.weight": "transformer.decoder.norm.weight",
        "head.box_mlp.layers.1.weight": "bbox_embed.layers.1.weight",
        "backbone.body.layer3.5.bn2.running_var": "backbone.0.body.layer3.5.bn2.running_var",
    }.items():
        assert state[ours].unique().item() == value[theirs]
    rows = state["head.class_logits.bias"].tolist()
    ids = detector.label_space.category_ids
    assert rows[:80] == list(ids) and rows[80] == 91 and set(rows[81:]) == set(range(91)) - set(ids)


def test_own_classes_keep_the_rows_they_share_and_those_without_a_class():
    checkpoint = {key: torch.zeros(shape) for key, shape in official_keys().items()}
    checkpoint["class_embed.bias"] = torch.arange(92.0)
    detector = create_detector("detr_resnet50", class_names=["dog", "unicorn"])
    report = load_checkpoint(detector, checkpoint, label_space=create_detector("test_detr").label_space)
    rows = detector.head.class_logits.bias.tolist()
    assert report.copied_classes == ("dog",) and rows[0] == 18 and rows[2] == 91 and len(rows) == 2 + 1 + 11


def test_rows_without_a_class_count_and_are_never_an_answer():
    head = create_detector("test_detr", num_classes=2, unused_rows=1).head
    logits = torch.log(torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]))
    raw = DETROutput((logits,), (torch.tensor([[[0.5, 0.5, 0.2, 0.4]]]),), torch.tensor([[50, 100]]), (64, 128))
    found = head.decode_tensors(raw)
    assert found.labels.tolist() == [[1]] and found.scores.item() == pytest.approx(0.2)
    torch.testing.assert_close(found.boxes, torch.tensor([[[40.0, 15, 60, 35]]]))


def test_dilated_stage_halves_the_stride():
    with torch.device("meta"):
        detector = create_detector("detr_resnet50.official_dc5_500e_coco")
        (level,) = detector.backbone(torch.zeros(1, 3, 250, 333))
    assert level.shape == (1, 2048, 16, 21)
    convs = [block.conv2 for block in detector.backbone.body.layer4]
    assert [conv.dilation for conv in convs] == [(1, 1), (2, 2), (2, 2)] and {conv.stride for conv in convs} == {(1, 1)}


# --- matching and losses ----------------------------------------------------------------------------------------------


def literal_cost(class_costs, boxes, target, size):
    """Smallest total cost over all ways to give each object a query of its own."""
    scale = torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float32)
    corners = target["boxes"] / scale
    wanted = torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), dim=1)
    cost = class_costs[:, target["labels"]] + pair_costs(boxes[None], wanted, scale)[0]
    few, many = sorted(cost.shape)
    cost = cost if cost.shape[0] == many else cost.T
    return min(
        sum(float(cost[q, o]) for o, q in enumerate(chosen)) for chosen in itertools.permutations(range(many), few)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(0, 5))
def test_matching_is_the_cheapest_of_all_permutations(seed, queries, objects):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(2, 2, queries, 4, generator=generator)
    class_costs = torch.randn(2, 2, queries, 3, generator=generator)
    low = torch.rand(objects, 2, generator=generator) * 50
    target = {
        "boxes": torch.cat((low, low + torch.rand(objects, 2, generator=generator) * 40), dim=1),
        "labels": torch.randint(0, 3, (objects,), generator=generator),
    }
    sizes = torch.tensor([[64, 96], [100, 100]])
    matches = match_objects(class_costs, boxes, [NO_OBJECTS, target], sizes)
    assert matches.image.tolist() == [1] * min(queries, objects)
    for layer in range(2):
        assert len(set(matches.query[layer].tolist())) == len(matches.image)
        found = boxes[layer, 1, matches.query[layer]]
        pairs = pair_costs(found[None], matches.boxes[layer], matches.scale[0] if objects else torch.ones(4))[
            0
        ].diagonal()
        total = (pairs + class_costs[layer, 1, matches.query[layer], matches.labels[layer]]).sum()
        expected = literal_cost(class_costs[layer, 1], boxes[layer, 1], target, (100, 100))
        assert float(total) == pytest.approx(expected, abs=1e-4)


def test_costs_that_are_no_numbers_are_left_to_the_loss():
    boxes = torch.full((1, 1, 3, 4), float("nan"))
    boxes[0, 0, 1] = torch.tensor([0.5, 0.5, 0.2, 0.2])
    target = {"boxes": torch.tensor([[40.0, 40, 60, 60]]), "labels": torch.tensor([0])}
    matches = match_objects(torch.zeros(1, 1, 3, 1), boxes, [target], torch.tensor([[100, 100]]))
    assert matches.query.tolist() == [[1]]


def test_box_losses_by_hand():
    boxes = torch.tensor([[[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]]])
    target = {"boxes": torch.tensor([[40.0, 40, 60, 80]]), "labels": torch.tensor([0])}
    matches = match_objects(torch.zeros(1, 1, 2, 1), boxes, [target], torch.tensor([[100, 100]]))
    distance, overlap = box_losses(boxes, matches)
    assert distance.item() == pytest.approx(5 * (0.1 + 0.2))
    assert overlap.item() == pytest.approx(2 * (1 - 0.5))


def test_unmatched_queries_weigh_a_tenth():
    head = create_detector("test_detr", num_classes=1).head
    raw = DETROutput((torch.zeros(1, 4, 2),), (torch.full((1, 4, 4), 0.5),), torch.tensor([[100, 100]]), (100, 100))
    box = torch.tensor([[25.0, 25, 75, 75]])
    losses = head.loss(raw, [{"boxes": box, "labels": torch.tensor([0])}])
    assert losses["loss_cls"].item() == pytest.approx(math.log(2) * 1.3 / 1.3)
    assert losses["loss_box"].item() == pytest.approx(0) and losses["loss_giou"].item() == pytest.approx(0, abs=1e-6)
    assert head.loss(raw, [NO_OBJECTS])["loss_cls"].item() == pytest.approx(math.log(2) * 0.4)  # divided by at least 1


# --- masks and positions ----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 40), st.integers(0, 40), st.sampled_from([8, 16, 32]))
def test_masks_are_those_of_nearest_neighbour_resizing(height, width, below, right, stride):
    canvas = (height + below, width + right)
    shape = (-(-canvas[0] // stride), -(-canvas[1] // stride))
    mask = torch.ones(1, 1, *canvas)
    mask[:, :, :height, :width] = 0
    (found,) = padding_masks(torch.tensor([[height, width]]), canvas, [shape])
    assert torch.equal(found, F.interpolate(mask, size=shape)[:, 0] > 0) and not found[0, 0, 0]


@pytest.mark.parametrize("offset", [0.0, -0.5])
def test_positions_are_those_of_the_formula(offset):
    padding = torch.zeros(1, 4, 5, dtype=torch.bool)
    padding[:, 3:], padding[:, :, 4:] = True, True
    found = sine_positions(padding, 8, offset).view(4, 5, 8)
    for row, column in itertools.product(range(3), range(4)):
        y, x = ((k + 1 + offset) / (n + 1e-6) * 2 * math.pi for k, n in ((row, 3), (column, 4)))
        expected = [f(v / 10000 ** (2 * i / 4)) for v in (y, x) for i in range(2) for f in (math.sin, math.cos)]
        assert found[row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_positions_of_boxes_take_the_coordinates_in_turn():
    box = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    found = box_positions(box, 4)
    assert found.shape == (1, 16)
    assert found[0, [0, 4, 8, 12]].tolist() == pytest.approx([math.sin(2 * math.pi * v) for v in (0.1, 0.2, 0.3, 0.4)])


# --- the whole --------------------------------------------------------------------------------------------------------


class Inference(torch.nn.Module):
    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images, image_sizes):
        return tuple(self.detector.decode_tensors(self.detector(images, image_sizes)))


@pytest.mark.parametrize("name", ["test_detr", "test_deformable_detr", "test_deformable_detr_dyhead1"])
def test_exported_graph_gives_the_same(name):
    module = Inference(create_detector(name)).eval()
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    sizes = torch.tensor([[50, 90]])
    with torch.no_grad():
        exported = torch.export.export(module, (images, sizes)).module()
        for ours, theirs in zip(module(images, sizes), exported(images, sizes), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["detr", "deformable_detr"])
@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext", "test_nfnet", "test_efficientnet_ln"])
def test_any_backbone_learns(family, backbone):
    detector = create_detector(
        f"{family}_{backbone}_dyhead1", channels=32, num_classes=3, encoder_layers=1, decoder_layers=2, num_queries=10
    )
    side = min(detector.backbone.image_size or (96,))
    sizes = torch.tensor([[side, side], [side // 2, side // 3]])
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    targets = [{"boxes": torch.tensor([[5.0, 5, 30, 40]]), "labels": torch.tensor([1])}, NO_OBJECTS]
    sum(detector.train().loss(detector(images, sizes), targets).values()).backward()
    lacking = [k for k, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking and all(p.grad.isfinite().all() for p in detector.parameters() if p.requires_grad)


def test_a_single_level_leaves_dyhead_its_middle_branch():
    detector = create_detector("test_detr_dyhead1")
    keys = [key for key in detector.state_dict() if key.startswith("neck.dyhead.blocks.0.spatial.")]
    assert any("conv_mid" in key for key in keys) and not any("high" in key or "low" in key for key in keys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": (16, 32)}, r"strides=\(16, 32\): DETR reads one level"),
        ({"channels": 36}, "channels=36 with heads=8"),
        ({"decoder_layers": 0}, "decoder_layers=0: the predictions come from"),
        ({"nms_threshold": 0.5}, "no part of the detector knows the argument 'nms_threshold'"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_detector("test_detr", **options)
