"""Where the attentions look, and the picture of it."""

from __future__ import annotations

import pytest
import torch
from PIL import ImageDraw

from dyhead_zoo import create_detector
from dyhead_zoo.engine.attention import draw_attention, sampling_points
from dyhead_zoo.layers.dyhead import BlockAttention


def test_zero_offsets_are_the_centres_of_the_nine_cells():
    block = BlockAttention([], [torch.zeros(1, 18, 4, 5)], [torch.full((1, 9, 4, 5), 0.5)], [])
    found = sampling_points(block, 0, (2, 3), 8)
    assert found.points.tolist() == [[8 * (x + 0.5), 8 * (y + 0.5)] for y in (1, 2, 3) for x in (2, 3, 4)]
    assert found.masks.tolist() == [0.5] * 9


def test_offsets_are_dy_then_dx():
    offsets = torch.zeros(1, 18, 1, 1)
    offsets[0, 0], offsets[0, 1] = 1.0, 2.0  # of the first tap, at (-1, -1)
    points = sampling_points(BlockAttention([], [offsets], [torch.ones(1, 9, 1, 1)], []), 0, (0, 0), 10).points
    assert points[0].tolist() == [(-1 + 2 + 0.5) * 10, (-1 + 1 + 0.5) * 10]


@pytest.mark.parametrize("arguments", [{}, {"formulation": "paper"}, {"dyhead": 3}, {"task": False, "scale": False}])
def test_picture_of_every_formulation(arguments):
    detector = create_detector("test_atss_dyhead1", score_threshold=0.0, **arguments)
    photo = torch.randint(0, 256, (3, 120, 200), dtype=torch.uint8)
    picture, plain = (draw_attention(detector, photo, top=top) for top in (2, 0))
    assert picture.size == plain.size and picture.size[0] > 720
    assert picture.tobytes() != plain.tobytes()  # boxes and points were drawn


def test_boxes_below_the_threshold_are_not_drawn():
    detector = create_detector("test_atss_dyhead1", score_threshold=0.0)
    photo = torch.randint(0, 256, (3, 120, 200), dtype=torch.uint8)
    assert (
        draw_attention(detector, photo, score_threshold=1.0).tobytes()
        == draw_attention(detector, photo, top=0).tobytes()
    )


def test_charts_name_levels_by_their_strides(monkeypatch):
    written = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda *args, **more: (written.append(args[2]), text(*args, **more))
    )
    detector = create_detector("test_atss_dyhead1")
    detector.neck.strides = (4, 8, 16, 32, 64)
    draw_attention(detector, torch.zeros(3, 64, 64, dtype=torch.uint8))
    assert [name for name in written if name.startswith("P")] == ["P2", "P3", "P4", "P5", "P6"]


def test_without_dyhead_or_spatial_attention_it_says_so():
    photo = torch.zeros(3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="test_atss has no DyHead"):
        draw_attention(create_detector("test_atss"), photo)
    with pytest.raises(ValueError, match="no spatial attention"):
        sampling_points(BlockAttention([], [], [], []), 0, (0, 0), 8)
