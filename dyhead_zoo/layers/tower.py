"""Stacks of convolutions before the predictions of a dense head."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

Norm = bool | Literal["batch"]
"""GroupNorm (True), none (False), or BatchNorm, which torchvision's second versions have."""


def prior_bias(probability: float) -> float:
    """Bias of a sigmoid classifier that starts at this probability (Lin et al., arXiv:1708.02002, section 4.1)."""
    return -math.log((1 - probability) / probability)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups; fewer where they do not divide the channels or would hold a single one."""
    return nn.GroupNorm(math.gcd(channels, min(32, channels // 2)), channels)


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """The layer that a setting ``norm`` of ``ConvNormAct`` or ``FPN`` stands for.

    Raises:
        ValueError: for a setting that is none.
    """
    if norm not in (True, False, "batch"):
        raise ValueError(f"norm={norm!r}: use True (GroupNorm), False (none) or 'batch'")
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return group_norm(channels) if norm else nn.Identity()


class ConvNorm(nn.Module):
    """A convolution without bias, and a norm. Shapes as of the convolution."""

    def __init__(self, conv: nn.Conv2d, norm: Norm = True) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm_layer(norm, conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class ConvNormAct(nn.Module):
    """3x3 convolution, ``norm``, ReLU. Shapes: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        norm: see ``Norm``; FCOS and ATSS normalise, RetinaNet does not.
        bias: of the convolution; by default where no norm follows.
    """

    def __init__(self, channels: int, norm: Norm = True, bias: bool | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=not norm if bias is None else bias)
        self.norm = norm_layer(norm, channels)
        self.act = nn.ReLU(inplace=True)
        nn.init.normal_(self.conv.weight, std=0.01)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class ConvTower(nn.Sequential):
    """``depth`` times ``ConvNormAct``; with depth 0 the features pass unchanged."""

    def __init__(self, channels: int, depth: int, norm: Norm = True, bias: bool | None = None) -> None:
        super().__init__(*(ConvNormAct(channels, norm, bias) for _ in range(depth)))
