"""Dynamic heads with random weights and the pyramids that they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyhead_zoo.layers.dyhead import DyHead


def random_head(in_channels: int, out_channels: int, **arguments: Any) -> DyHead:
    """With random weights everywhere: offsets that are not zero, gates that differ."""
    generator = torch.Generator().manual_seed(1)
    head = DyHead(in_channels, out_channels, **arguments)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return head


def random_pyramid(finest: tuple[int, int], levels: int, batch: int, channels: int = 16) -> list[Tensor]:
    """Maps (batch, channels, H_l, W_l) whose sides halve from level to level, rounded up; float32."""
    generator, size = torch.Generator().manual_seed(0), finest
    features = []
    for _ in range(levels):
        features.append(torch.randn(batch, channels, *size, generator=generator))
        size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    return features
