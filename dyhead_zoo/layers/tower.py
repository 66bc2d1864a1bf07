"""Stacks of convolutions before the predictions of a dense head."""

from __future__ import annotations

import math

from torch import Tensor, nn


def prior_bias(probability: float) -> float:
    """Bias of a sigmoid classifier that starts at this probability (Lin et al., arXiv:1708.02002, section 4.1)."""
    return -math.log((1 - probability) / probability)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups; fewer where they do not divide the channels or would hold a single one."""
    return nn.GroupNorm(math.gcd(channels, min(32, channels // 2)), channels)


class ConvNorm(nn.Module):
    """A convolution without bias, and GroupNorm. Shapes as of the convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.norm = conv, group_norm(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class ConvNormAct(nn.Module):
    """3x3 convolution, GroupNorm if ``norm``, ReLU. Shapes: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        norm: FCOS and ATSS normalise, RetinaNet does not.
        bias: of the convolution; by default where no norm follows.
    """

    def __init__(self, channels: int, norm: bool = True, bias: bool | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=not norm if bias is None else bias)
        self.norm = group_norm(channels) if norm else nn.Identity()
        self.act = nn.ReLU(inplace=True)
        nn.init.normal_(self.conv.weight, std=0.01)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class ConvTower(nn.Sequential):
    """``depth`` times ``ConvNormAct``; with depth 0 the features pass unchanged."""

    def __init__(self, channels: int, depth: int, norm: bool = True, bias: bool | None = None) -> None:
        super().__init__(*(ConvNormAct(channels, norm, bias) for _ in range(depth)))
