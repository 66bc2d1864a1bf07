"""Deformable DETR: mmdetection's outputs, attention against a literal version, proposals, branches of checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_kit import Case
from set_parity import check_losses, check_outputs

from dyhead_zoo import create_detector, load_checkpoint
from dyhead_zoo.convert.mmdet import convert
from dyhead_zoo.layers.deformable_attention import DeformableAttention, Layout
from dyhead_zoo.models.deformable_detr import focal_costs
from dyhead_zoo.ops import ms_deform_attn as op
from dyhead_zoo.ops.ms_deform_attn import ms_deform_attn

# --- mmdetection ------------------------------------------------------------------------------------------------------

CASES = {
    "deformable_detr_r50": "mmdet_50e_coco",
    "deformable_detr_refine_r50": "mmdet_refine_50e_coco",
    "deformable_detr_refine_twostage_r50": "mmdet_two_stage_50e_coco",
}


@pytest.fixture(params=CASES)
def case(request):
    kit = Case(request.param)
    detector = create_detector(f"deformable_detr_resnet50.{CASES[request.param]}")
    load_checkpoint(detector, kit.state_dict())
    return kit, detector


@pytest.mark.parametrize("batch", ["a", "b"])
def test_memory_outputs_and_detections(case, batch):
    check_outputs(*case, batch)


def test_losses_and_gradients(case):
    check_losses(*case)


def branches(values):
    return {f"bbox_head.cls_branches.{i}.bias": torch.full((3,), float(v)) for i, v in enumerate(values)}


def test_a_branch_that_all_layers_share_is_stored_once():
    conversion = convert(branches([5, 5, 5]))
    assert list(conversion.tensors) == ["head.class_logits.0.bias"]
    assert len(conversion.dropped) == 2 and "share" in conversion.dropped["head.class_logits.1.bias"]


def test_branches_that_differ_are_all_kept():
    assert len(convert(branches([5, 5, 6])).tensors) == 3


VERSION_2 = (
    ("head.transformer.level_embed", "bbox_head.transformer.level_embeds"),
    ("head.transformer.encoder.", "bbox_head.transformer.encoder.layers."),
    ("head.transformer.decoder.", "bbox_head.transformer.decoder.layers."),
    (".self_attn.in_proj", ".attentions.0.attn.in_proj"),
    (".self_attn.out_proj", ".attentions.0.attn.out_proj"),
    (".self_attn.", ".attentions.0."),
    (".cross_attn.", ".attentions.1."),
    (".ffn.linear1.", ".ffns.0.layers.0.0."),
    (".ffn.linear2.", ".ffns.0.layers.1."),
    (".norm1.", ".norms.0."),
    (".norm2.", ".norms.1."),
    (".norm3.", ".norms.2."),
    ("head.proposals.memory_fc", "bbox_head.transformer.enc_output"),
    ("head.proposals.memory_norm", "bbox_head.transformer.enc_output_norm"),
    ("head.proposals.query_fc", "bbox_head.transformer.pos_trans"),
    ("head.proposals.query_norm", "bbox_head.transformer.pos_trans_norm"),
    ("head.reference_points", "bbox_head.transformer.reference_points"),
    ("head.queries.", "bbox_head.query_embedding."),
    ("head.class_logits.", "bbox_head.cls_branches."),
    ("head.box_mlps.", "bbox_head.reg_branches."),
    (".layers.2.weight", ".4.weight"),
    (".layers.2.bias", ".4.bias"),
    ("neck.proj.3.conv", "neck.extra_convs.0.conv"),
    ("neck.proj.3.norm", "neck.extra_convs.0.gn"),
    ("neck.proj.", "neck.convs."),
)


@pytest.mark.parametrize("name", ["test_deformable_detr", "test_deformable_detr_dyhead1"])
def test_names_of_mmdetection_2_have_their_places(name):
    detector = create_detector(name)
    ours = {k: v for k, v in detector.state_dict().items() if not k.startswith(("backbone.", "neck.dyhead."))}
    theirs = {}
    for key, value in ours.items():
        new = key
        for a, b in VERSION_2:
            new = new.replace(a, b)
        if "reg_branches" in new:
            new = new.replace(".layers.1.", ".2.").replace(".layers.0.", ".0.")
        if "convs." in new:
            new = new.replace(".norm.", ".gn.")
        theirs[new] = torch.randn_like(value)
    report = load_checkpoint(detector, theirs, source="mmdet", strict=False)
    assert set(report.loaded) == set(ours) and not report.unused
    assert all(
        torch.equal(a, b) for a, b in zip([detector.state_dict()[k] for k in ours], theirs.values(), strict=True)
    )


# --- attention --------------------------------------------------------------------------------------------------------


def literal_attention(value, shapes, places, weights):
    """Eq. 3 of the paper, sample by sample."""
    batch, queries, heads, levels, _ = weights.shape
    out = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    starts = [sum(h * w for h, w in shapes[:k]) for k in range(levels)]
    for index in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape)).tolist():
        b, q, m, k, _ = index
        height, width = shapes[k]
        x, y = places[tuple(index)][0] * width - 0.5, places[tuple(index)][1] * height - 0.5
        for i in (math.floor(y), math.floor(y) + 1):
            for j in (math.floor(x), math.floor(x) + 1):
                if 0 <= i < height and 0 <= j < width:
                    share = (1 - abs(y - i)) * (1 - abs(x - j)) * weights[tuple(index)]
                    out[b, q, m] += share * value[b, starts[k] + i * width + j, m]
    return out.flatten(2)


def attention_input(seed, shapes, batch=2, queries=3, heads=2, points=2, channels=3):
    generator = torch.Generator().manual_seed(seed)
    cells = sum(h * w for h, w in shapes)
    spread = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, cells, heads, channels, generator=generator, dtype=torch.float64)
    places = torch.rand(*spread, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    return value, places, torch.rand(spread, generator=generator, dtype=torch.float64)


side = st.integers(1, 4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.lists(st.tuples(side, side), min_size=1, max_size=3))
def test_attention_is_that_of_the_paper(seed, shapes):
    value, places, weights = attention_input(seed, shapes)
    expected = literal_attention(value, shapes, places, weights)
    torch.testing.assert_close(ms_deform_attn(value, shapes, places, weights), expected)


def test_attention_in_parts_gives_the_same_with_its_gradients(monkeypatch):
    shapes = [(3, 4), (2, 2)]
    results = []
    for limit in (op._SAMPLES_AT_ONCE, 1):
        monkeypatch.setattr(op, "_SAMPLES_AT_ONCE", limit)
        inputs = [x.requires_grad_() for x in attention_input(0, shapes)]
        value, places, weights = inputs
        out = ms_deform_attn(value, shapes, places, weights)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts)
    value, places, weights = inputs
    assert torch.autograd.gradcheck(lambda v, w: ms_deform_attn(v, shapes, places.detach(), w), (value, weights))


def test_levels_must_have_the_cells_of_the_value():
    value, places, weights = attention_input(0, [(2, 2)])
    with pytest.raises(ValueError, match=r"value has 4 cells, but levels of \[\(3, 2\)\] have 6"):
        ms_deform_attn(value, [(3, 2)], places, weights)


def test_fresh_heads_look_in_all_directions():
    attention = DeformableAttention(8, levels=2, heads=4, points=2)
    attention.reset()
    offsets = attention.sampling_offsets.bias.view(4, 2, 2, 2)
    expected = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for point in range(2):
        torch.testing.assert_close(offsets[:, 0, point], expected * (point + 1), atol=1e-6, rtol=0)
    assert torch.equal(offsets[:, 0], offsets[:, 1])


def test_values_of_the_padding_are_not_seen():
    attention = DeformableAttention(8, levels=1, heads=2, points=2)
    mask = torch.zeros(1, 2, 3, dtype=torch.bool)
    mask[:, :, 2] = True
    layout = Layout.of([mask])
    assert layout.ratios.tolist() == [[[pytest.approx(2 / 3), 1.0]]]
    assert layout.places()[0, :3].tolist() == [pytest.approx([x, 0.25]) for x in (0.25, 0.75, 1.25)]
    query, tokens = torch.randn(1, 4, 8), torch.randn(1, 6, 8)
    reference = torch.rand(1, 4, 1, 2)
    changed = torch.where(layout.padding[..., None], torch.randn(1, 6, 8), tokens)
    assert torch.equal(attention(query, reference, tokens, layout), attention(query, reference, changed, layout))


# --- variants ---------------------------------------------------------------------------------------------------------


def test_two_stage_needs_box_refinement():
    with pytest.raises(ValueError, match="two_stage=True refines the proposals: it needs box_refine=True"):
        create_detector("test_deformable_detr", two_stage=True)


def test_proposals_lie_in_their_cells_and_double_their_side():
    head = create_detector("test_deformable_detr_dyhead1").head
    layout = Layout.of([torch.zeros(1, 4, 8, dtype=torch.bool), torch.zeros(1, 2, 4, dtype=torch.bool)])
    tokens, guess = head.proposals.tokens(torch.randn(1, 40, 32), layout)
    boxes = guess.sigmoid()[0]
    assert tokens.shape == (1, 40, 32)
    assert boxes[9].tolist() == pytest.approx([1.5 / 8, 1.5 / 4, 0.05, 0.05])
    assert boxes[32].tolist() == pytest.approx([0.125, 0.25, 0.1, 0.1])


def test_proposals_in_the_padding_or_at_the_edge_are_blank():
    head = create_detector("test_deformable_detr_dyhead1").head
    mask = torch.zeros(1, 1, 128, dtype=torch.bool)
    mask[..., 100:] = True
    tokens, guess = head.proposals.tokens(torch.randn(1, 128, 32), Layout.of([mask]))
    blank = guess.isinf().all(-1)[0]
    assert blank.nonzero().flatten().tolist() == [0, 99, *range(100, 128)]  # 0.5 % of the width at either edge
    assert len(tokens[0, blank].unique(dim=0)) == 1


@pytest.mark.parametrize(("name", "count"), [("test_deformable_detr", 1), ("test_deformable_detr_dyhead1", 3)])
def test_branches(name, count):
    """One for all layers, or one for each of two layers and the proposals."""
    detector = create_detector(name)
    assert len(detector.head.class_logits) == len(detector.head.box_mlps) == count
    with torch.no_grad():
        raw = detector(torch.zeros(1, 3, 64, 96))
    assert len(raw.proposal_logits) == (count == 3)
    assert [x.shape for x in raw.boxes] == [(1, 60, 4)] * 2


def test_refinement_starts_from_the_box_of_the_layer_before():
    """Fresh branches correct nothing, except that the first makes boxes small."""
    detector = create_detector("test_deformable_detr", box_refine=True)
    with torch.no_grad():
        first, second = detector(torch.zeros(1, 3, 64, 96)).boxes
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first[..., 2:], torch.full((1, 60, 2), 2.0).neg().sigmoid())


def test_detections_are_pairs_of_query_and_class():
    detector = create_detector("test_deformable_detr", num_classes=3, num_queries=2, max_detections=6)
    with torch.no_grad():
        raw = detector(torch.zeros(1, 3, 64, 96))
        found = detector.decode_tensors(raw)
    expected = raw.cls_logits[-1].sigmoid().flatten().sort(descending=True).values
    torch.testing.assert_close(found.scores[0], expected)
    assert sorted(found.labels[0].tolist()) == [0, 0, 1, 1, 2, 2]


def test_a_confident_class_is_cheap():
    costs = focal_costs(torch.tensor([-5.0, 0.0, 5.0]))
    assert (costs.diff() < 0).all() and costs[1].item() == pytest.approx(math.log(2) * 0.25 * (0.25 - 0.75))


def test_losses_under_autocast_are_float32():
    detector = create_detector("test_deformable_detr_dyhead1", num_classes=3).train()
    target = {"boxes": torch.tensor([[5.0, 5, 40, 60]]), "labels": torch.tensor([2])}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = detector.loss(detector(torch.zeros(1, 3, 64, 96)), [target])
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)
