"""Deformable attention of Deformable DETR (Zhu et al., arXiv:2010.04159, section 4.1), and where its tokens lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dyhead_zoo.ops.ms_deform_attn import ms_deform_attn


class Layout(NamedTuple):
    """Where the S tokens of the L levels lie.

    Attributes:
        shapes: (height, width) of each level.
        padding: (B, S) bool, True outside the picture.
        ratios: (B, L, 2), share of each level's width and height that the picture covers.
    """

    shapes: list[tuple[int, int]]
    padding: Tensor
    ratios: Tensor

    @classmethod
    def of(cls, masks: Sequence[Tensor]) -> Layout:
        """From the padding (B, H_l, W_l) of each level."""
        shapes = [(mask.shape[1], mask.shape[2]) for mask in masks]
        widths = torch.stack([(~mask[:, 0]).float().mean(1) for mask in masks], dim=1)
        heights = torch.stack([(~mask[:, :, 0]).float().mean(1) for mask in masks], dim=1)
        padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        return cls(shapes, padding, torch.stack((widths, heights), dim=-1))

    def places(self) -> Tensor:
        """Middle of every token's cell, (x, y) in units of its picture: (B, S, 2); beyond 1 in the padding."""
        device, places = self.padding.device, []
        for level, (height, width) in enumerate(self.shapes):
            y, x = ((torch.arange(side, device=device) + 0.5) / side for side in (height, width))
            grid = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), dim=-1).flatten(0, 1)
            places.append(grid / self.ratios[:, level, None])
        return torch.cat(places, dim=1)


class DeformableAttention(nn.Module):
    """Each query looks at ``points`` places of each level per head, around its reference.

    Args:
        channels: C. levels: L. heads: M. points: P.

    Attributes:
        lr_scales: offsets learn at a tenth of the rate (section 5), see ``engine.optim.param_groups``.
    """

    lr_scales: ClassVar[Mapping[str, float]] = {"sampling_offsets": 0.1}

    def __init__(self, channels: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)

    def reset(self) -> None:
        """Heads look in different directions, points 1 to P cells away, all with the same weight (appendix A.4)."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1.0, self.points + 1)
        places = direction[:, None, None] * distance[:, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(places.expand(-1, self.levels, -1, -1).flatten())

    def forward(self, query: Tensor, reference: Tensor, value: Tensor, layout: Layout) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C), with its position.
            reference: (B, Q, L, 2 or 4), places (x, y) or boxes (cx, cy, w, h) in units of each level's map. Offsets
                are in cells of the map, or in shares of half the box.
            value: (B, S, C), tokens.
            layout: of the tokens.

        Returns:
            (B, Q, C).
        """
        spread = (self.heads, self.levels, self.points)
        value = self.value_proj(value).masked_fill(layout.padding[..., None], 0).unflatten(-1, (self.heads, -1))
        offsets = self.sampling_offsets(query).float().unflatten(-1, (*spread, 2))
        weights = self.attention_weights(query).float().unflatten(-1, (self.heads, -1)).softmax(-1)
        if reference.shape[-1] == 2:
            unit = torch.tensor([(1 / w, 1 / h) for h, w in layout.shapes], device=query.device)[:, None]
        else:
            unit = reference[:, :, None, :, None, 2:] * (0.5 / self.points)
        places = reference[:, :, None, :, None, :2] + offsets * unit
        return self.output_proj(ms_deform_attn(value, layout.shapes, places, weights.unflatten(-1, spread[1:])))
