"""BorderDet: BorderAlign against loops, targets and scores of the border stage, the released code's keys."""

from __future__ import annotations

import math

import pytest
import torch

from dyhead_zoo.ops.border_align import border_align

# --- BorderAlign ------------------------------------------------------------------------------------------------------


def literal_border_align(x, boxes, pool_size):
    """Figure 4 of the paper, value by value; differentiable."""
    height, width = x.shape[-2:]

    def at(image, channel, px, py):
        left, top = min(math.floor(px), width - 1), min(math.floor(py), height - 1)
        right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
        fx, fy, cells = px - left, py - top, x[image, channel]
        upper = (1 - fx) * cells[top, left] + fx * cells[top, right]
        return (1 - fy) * upper + fy * ((1 - fx) * cells[bottom, left] + fx * cells[bottom, right])

    channels = x.shape[1] // 4
    out = []
    for image in range(x.shape[0]):
        for border in range(4):
            for channel in range(border * channels, (border + 1) * channels):
                for x1, y1, x2, y2 in boxes[image].tolist():
                    values = []
                    for k in range(pool_size + 1):
                        dx, dy = (x2 - x1) * k / pool_size, (y2 - y1) * k / pool_size
                        point = [(x1 + dx, y1), (x1, y1 + dy), (x2 - dx, y2), (x2, y2 - dy)][border]
                        values.append(at(image, channel, *point))
                    out.append(torch.stack(values).max())
    return torch.stack(out).view(x.shape[0], x.shape[1], -1)


def some_boxes(batch, count, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(batch, count, 2, 2, dtype=torch.float64, generator=generator)
    corners = corners.sort(2).values * torch.tensor([width - 1.0, height - 1.0], dtype=torch.float64)
    return corners.flatten(2)


@pytest.mark.parametrize(("height", "width"), [(7, 5), (1, 6), (1, 1)])
def test_border_align_is_the_loop_in_values_and_gradients(height, width):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, height, width, dtype=torch.float64, generator=generator, requires_grad=True)
    boxes = some_boxes(2, 5, height, width, seed=1)
    boxes[:, 3] = torch.tensor([0.0, 0, width - 1, height - 1])  # the whole map
    boxes[:, 4, 2:] = boxes[:, 4, :2]  # a point
    weight = torch.randn(2, 8, 5, dtype=torch.float64, generator=generator)
    out, expected = border_align(x, boxes), literal_border_align(x, boxes, 10)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    (expected,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(border_align(x, boxes), out)


def test_border_align_passes_gradcheck():
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: border_align(t, some_boxes(1, 4, 5, 6, 3), pool_size=4), x)


@pytest.mark.parametrize(
    ("x", "boxes", "message"),
    [
        (torch.zeros(1, 6, 4, 4), torch.zeros(1, 2, 4), "4 \\* C"),
        (torch.zeros(2, 8, 4, 4), torch.zeros(1, 2, 4), "expected \\(2, P, 4\\)"),
    ],
)
def test_border_align_names_wrong_shapes(x, boxes, message):
    with pytest.raises(ValueError, match=message):
        border_align(x, boxes)
