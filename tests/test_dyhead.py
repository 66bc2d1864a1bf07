"""DyHead: shapes, switches, the two readings of coarse offsets, and what each attention computes."""

from __future__ import annotations

import pytest
import torch

from dyhead_zoo import create_detector
from dyhead_zoo.layers.dyhead import DyHead, DyHeadBlock, ScaleAttention, SpatialAttention, TaskAttention

SIZES = [(13, 9), (7, 5), (4, 3)]


def pyramid(levels=3, channels=16, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, *size, generator=generator) for size in SIZES[:levels]]


def shaken(module):
    """Random weights everywhere, so that offsets and gates are not at their initial values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return module


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("coarse_offsets", ["aligned", "reinterpret"])
def test_shapes_are_kept_on_odd_pyramids(levels, coarse_offsets):
    head = shaken(DyHead(16, 32, num_blocks=2, coarse_offsets=coarse_offsets))
    outputs = head(pyramid(levels))
    assert [tuple(x.shape) for x in outputs] == [(2, 32, *size) for size in SIZES[:levels]]
    assert all(torch.isfinite(x).all() for x in outputs)


@pytest.mark.parametrize("switches", [(s, p, t) for s in (0, 1) for p in (0, 1) for t in (0, 1)])
def test_every_parameter_of_every_ablation_learns(switches):
    scale, spatial, task = map(bool, switches)
    block = shaken(DyHeadBlock(16, 16, scale=scale, spatial=spatial, task=task))
    sum(x.square().sum() for x in block(pyramid())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
    names = {name.split(".")[0] for name, _ in block.named_parameters()}
    assert ("scale" in names, "task" in names) == (scale, task)
    assert any("offset" in name for name, _ in block.named_parameters()) == spatial


def test_results_do_not_depend_on_batch_mates():
    head = shaken(DyHead(16, num_blocks=2, coarse_offsets="reinterpret")).double()
    features = [x.double() for x in pyramid()]
    together = head(features)
    for i in range(2):
        alone = head([x[i : i + 1] for x in features])
        assert all(torch.allclose(a, t[i : i + 1], atol=1e-10) for a, t in zip(alone, together, strict=True))


def test_checkpointing_changes_nothing():
    head = shaken(DyHead(16, num_blocks=2))
    inputs = [x.requires_grad_() for x in pyramid()]
    gradients = []
    for enabled in (False, True):
        head.grad_checkpointing = enabled
        gradients.append(torch.autograd.grad(sum(x.sin().sum() for x in head(inputs)), [*inputs, *head.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_reinterpret_reads_the_buffer_as_the_smaller_map():
    spatial = SpatialAttention(16, 16, coarse_offsets="reinterpret")
    field = torch.arange(2 * 18 * 4 * 6.0).view(2, 18, 4, 6)
    coarse = spatial._coarse(field, (2, 3))
    assert coarse.shape == (2, 18, 2, 3)
    for image in range(2):
        assert torch.equal(coarse[image].flatten(), field[image].flatten()[: 18 * 2 * 3])
    channels_last = field.to(memory_format=torch.channels_last)
    assert torch.equal(spatial._coarse(channels_last, (2, 3)), coarse)  # the layout in memory must not matter


def test_aligned_averages_what_the_coarse_cell_covers():
    spatial = SpatialAttention(16, 16, coarse_offsets="aligned")
    field = torch.randn(1, 18, 4, 6)
    expected = field.view(1, 18, 2, 2, 3, 2).mean((3, 5))
    torch.testing.assert_close(spatial._coarse(field, (2, 3)), expected)


def test_zero_offsets_are_a_masked_dense_convolution():
    spatial = SpatialAttention(16, 16)
    x = pyramid(1)[0]
    (branches,) = spatial([x], spatial.fields([x]))
    conv = spatial.conv_mid
    dense = torch.nn.functional.conv2d(x, conv.weight * 0.5, conv.bias, padding=1)  # mask = sigmoid(0)
    torch.testing.assert_close(branches[0], spatial.norm_mid(dense), atol=1e-5, rtol=1e-4)


def test_scale_attention_lies_between_a_half_and_one():
    attention = shaken(ScaleAttention(16))
    weight = attention(100 * pyramid()[0])
    assert weight.shape == (2, 1, 1, 1)
    assert ((weight >= 0.5) & (weight <= 1)).all()


def test_task_attention_is_a_relu_at_neutral_coefficients():
    attention = TaskAttention(16)
    torch.nn.init.zeros_(attention.fc2.weight)
    torch.nn.init.zeros_(attention.fc2.bias)
    x = pyramid()[0]
    assert torch.equal(attention(x), x.relu())
    a1, b1, a2, b2 = shaken(attention).coefficients(1000 * torch.randn(50, 16))
    for coefficient, low, high in ((a1, 0, 2), (a2, -1, 1), (b1, -0.5, 0.5), (b2, -0.5, 0.5)):
        assert coefficient.min() >= low and coefficient.max() <= high


@pytest.mark.parametrize("coarse_offsets", ["aligned", "reinterpret"])
def test_trace_shows_what_each_attention_computed(coarse_offsets):
    head = shaken(DyHead(16, 32, num_blocks=2, coarse_offsets=coarse_offsets))
    trace = []
    outputs = head(pyramid(), trace)
    for a, b in zip(outputs, head(pyramid()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert len(trace) == 2
    assert [tuple(w.shape) for w in trace[0].scale] == [(2, 2), (2, 3), (2, 2)]
    assert [tuple(o.shape) for o in trace[0].offsets] == [(2, 18, *size) for size in SIZES]
    assert [tuple(m.shape) for m in trace[0].masks] == [(2, 9, *size) for size in SIZES]
    assert [tuple(t.shape) for t in trace[1].task] == [(2, 4, 32)] * 3
    block, level = head.blocks[0], pyramid()[0]
    torch.testing.assert_close(trace[0].offsets[0], block.spatial.offset(level)[:, :18].detach())


def test_trace_is_empty_where_an_attention_is_off():
    trace = []
    DyHead(16, num_blocks=1, scale=False, spatial=False, task=False)(pyramid(), trace)
    assert trace == [([], [], [], [])]


@pytest.mark.parametrize(
    ("arguments", "message"), [({"in_channels": 20}, "multiple of 16"), ({"num_blocks": 0}, "0 blocks")]
)
def test_wrong_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DyHead(**{"in_channels": 16, **arguments})


@pytest.mark.parametrize("sizes", [[(8, 8), (8, 8)], [(9, 8), (4, 4)], [(32, 32), (8, 8)], [(8, 8), (4, 4), (2, 3)]])
@pytest.mark.parametrize("spatial", [True, False])
def test_levels_that_do_not_halve_are_named(sizes, spatial):
    shown = ", ".join(f"{h} x {w}" for h, w in sizes)
    with pytest.raises(ValueError, match=f"levels of {shown}: .*use strides that double, or formulation='paper'"):
        DyHead(16, num_blocks=1, spatial=spatial)([torch.zeros(1, 16, *size) for size in sizes])


@pytest.mark.parametrize("name", ["test_atss_dyhead1", "test_deformable_detr_dyhead1"])
def test_strides_that_do_not_double_are_named(name):
    with pytest.raises(ValueError, match=r"strides \(8, 32, .*use strides that double .*, or formulation='paper'"):
        create_detector(name, strides=(8, 32))
    create_detector(name, strides=(8, 32), formulation="paper").eval()(torch.zeros(1, 3, 64, 96))


@pytest.mark.parametrize("spatial", [True, False])
def test_one_value_a_group_is_no_reason_to_stop(spatial):
    """16 channels, one image and a level of one cell: what is normalised is zero, so the norm gives its bias."""
    head = shaken(DyHead(16, num_blocks=1, spatial=spatial)).double()
    features = [torch.randn(2, 16, *size).double() for size in [(2, 2), (1, 1)]]
    together = head(features)
    alone = head([x[:1] for x in features])
    sum(x.sum() for x in alone).backward()
    assert all(torch.allclose(a, t[:1], atol=1e-10) for a, t in zip(alone, together, strict=True))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
