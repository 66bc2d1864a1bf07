"""The paper's formulation against a direct loop over its equations, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dyhead_zoo import create_detector
from dyhead_zoo.layers.dyhead_paper import PaperBlock, PaperDyHead, resize

B, L, C, H, W = 2, 3, 4, 3, 4


def sample(plane, y, x):
    """Bilinear value of a map (C, H, W) at (y, x), zero outside."""
    total = torch.zeros(plane.shape[0], dtype=plane.dtype)
    y0, x0 = math.floor(y.item()), math.floor(x.item())
    for yy, xx in itertools.product((y0, y0 + 1), (x0, x0 + 1)):
        if 0 <= yy < H and 0 <= xx < W:
            total = total + plane[:, yy, xx] * (1 - (y - yy).abs()) * (1 - (x - xx).abs())
    return total


def loop(block, features):
    """Equations 3, 4 and 5, one index at a time."""
    images = []
    weight = block.spatial.weight.view(C, L, C, 3, 3)
    for image in features:
        means = [image[level].sum() / (H * W * C) for level in range(L)]
        gated = []
        for level in range(L):
            f = block.scale.fc.bias[level] + sum(block.scale.fc.weight[level, j] * means[j] for j in range(L))
            gated.append(((f + 1) / 2).clamp(0, 1) * image[level])
        field = torch.nn.functional.conv2d(
            gated[L // 2][None], block.spatial.offset.weight, block.spatial.offset.bias, padding=1
        )[0]
        rows = []
        for y, x in itertools.product(range(H), range(W)):
            value = torch.zeros(C, dtype=torch.float64)
            for level, k in itertools.product(range(L), range(9)):
                at = sample(gated[level], y + k // 3 - 1 + field[2 * k, y, x], x + k % 3 - 1 + field[2 * k + 1, y, x])
                importance = 1 / (1 + torch.exp(-field[18 + k, y, x]))
                value = value + weight[:, level, :, k // 3, k % 3] @ at * importance
            rows.append(value / L)
        spatial = torch.stack(rows, dim=1).view(C, H, W)
        levels = torch.stack([spatial] * L)
        pooled = levels.sum((0, 2, 3)) / (L * H * W)
        hidden = (block.task.fc1.weight @ pooled + block.task.fc1.bias).clamp(min=0)
        theta = 2 / (1 + torch.exp(-(block.task.fc2.weight @ hidden + block.task.fc2.bias))) - 1
        a1, b1, a2, b2 = theta.view(4, C, 1, 1)
        images.append(torch.maximum((1 + a1) * levels + b1, a2 * levels + b2))
    return torch.stack(images)


def test_vectorised_block_equals_the_loop_forward_and_backward():
    torch.manual_seed(3)
    block = PaperBlock(L, C).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        block.task.fc1.bias += 1  # keeps the hidden ReLU alive, so that every gradient is tested
    features = torch.randn(B, L, C, H, W, dtype=torch.float64, requires_grad=True)
    inputs = [features, *block.parameters()]
    outputs = block(features), loop(block, features)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
    direction = torch.randn_like(outputs[0])
    for ours, theirs in zip(*(torch.autograd.grad(out, inputs, direction) for out in outputs), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("switches", list(itertools.product((False, True), repeat=3)))
def test_every_parameter_of_every_ablation_learns(switches):
    scale, spatial, task = switches
    block = PaperBlock(L, C, scale=scale, spatial=spatial, task=task)
    features = torch.randn(B, L, C, H, W, requires_grad=True)
    block(features).square().sum().backward()
    assert features.grad.abs().sum() > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in block.parameters())


def test_levels_go_to_the_median_size_and_back():
    sizes = [(13, 9), (7, 5), (4, 3), (2, 2), (1, 1)]
    outputs = PaperDyHead(8, 5, 2)([torch.randn(2, 8, *size) for size in sizes])
    assert [tuple(x.shape[-2:]) for x in outputs] == sizes


def test_resizing_averages_down_and_interpolates_up():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(resize(x, (2, 2)), torch.nn.functional.avg_pool2d(x, 2))
    assert resize(x, (8, 2)).shape == (1, 1, 8, 2)


def test_depth_keeps_the_scale_of_the_features():
    features = [torch.randn(2, 64, s, s) for s in (16, 8, 4)]
    for depth in (1, 6):
        level = PaperDyHead(64, 3, depth)(features)[1]
        assert 0.1 < level.square().mean().sqrt() < 10


def test_trace_has_one_entry_for_all_levels():
    trace = []
    PaperDyHead(8, 3, 2)([torch.randn(2, 8, s, s) for s in (8, 4, 2)], trace)
    shapes = [[tuple(t.shape) for t in field] for field in trace[1]]
    assert shapes == [[(2, 3)], [(2, 18, 4, 4)], [(2, 9, 4, 4)], [(2, 4, 8)]]


def test_a_detector_in_the_papers_formulation():
    detector = create_detector("test_atss_dyhead1", formulation="paper", num_classes=2).train()
    detector.to(memory_format=torch.channels_last)
    target = {"boxes": torch.tensor([[4.0, 4, 60, 60]]), "labels": torch.tensor([1])}
    losses = detector.loss(detector(torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)), [target])
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.neck.dyhead.parameters())
    with pytest.raises(ValueError, match="formulation='papers'"):
        create_detector("test_atss_dyhead1", formulation="papers")
