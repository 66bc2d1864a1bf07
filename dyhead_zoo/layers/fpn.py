"""Feature pyramid network, and the neck that puts DyHead on top of it.

Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, arXiv:1612.03144; P6 and P7 by strided
convolutions as in RetinaNet, arXiv:1708.02002.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_zoo.layers.dyhead import BlockAttention, CoarseOffsets, DyHead
from dyhead_zoo.layers.dyhead_paper import PaperDyHead
from dyhead_zoo.layers.tower import ConvNorm, Norm

ExtraLevels = Literal["p5", "c5", "pool"]
Formulation = Literal["released", "paper"]

MAX_BLOCKS = 32
"""Of DyHead: the paper goes to 10; each has some 2 million parameters."""
_MAX_EXTRA = 8  # beyond it a cell would be larger than any picture


class FPN(nn.Module):
    """Backbone levels C_l to a pyramid P_l with equal channels, plus coarser levels by stride 2.

    Args:
        in_channels: channels of the backbone levels, fine to coarse.
        out_channels: channels of every pyramid level.
        num_extra: how many coarser levels to add.
        extra_from: ``'p5'``: a 3x3 stride-2 convolution of the last pyramid level; ``'c5'``: of the last backbone
            level; ``'pool'``: every second cell of the last pyramid level (max pooling with kernel 1), no parameters.
        extra_relu: ReLU before the second and later extra convolutions.
        fpn_norm: after every convolution: GroupNorm (RepPoints' "GN neck"), ``'batch'`` norm, or none. Bodies that end
            in a linear layer give features of large magnitude, from which DyHead's offsets would leave the picture;
            GroupNorm bounds them.

    Shapes: L x (B, C_l, H_l, W_l) -> (L + num_extra) x (B, out_channels, ., .), fine to coarse.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        *,
        num_extra: int = 2,
        extra_from: ExtraLevels = "p5",
        extra_relu: bool = False,
        fpn_norm: Norm = False,
    ) -> None:
        super().__init__()
        if extra_from not in ("p5", "c5", "pool"):
            raise ValueError(f"extra_from={extra_from!r}: use 'p5', 'c5' or 'pool'")
        self.num_extra, self.extra_from, self.extra_relu = num_extra, extra_from, extra_relu

        def conv(channels: int, kernel: int, stride: int = 1) -> nn.Module:
            layer = nn.Conv2d(channels, out_channels, kernel, stride, padding=kernel // 2, bias=not fpn_norm)
            nn.init.xavier_uniform_(layer.weight)
            if fpn_norm:
                return ConvNorm(layer, fpn_norm)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            return layer

        self.lateral = nn.ModuleList(conv(channels, 1) for channels in in_channels)
        self.output = nn.ModuleList(conv(out_channels, 3) for _ in in_channels)
        self.extra = nn.ModuleList()
        if extra_from != "pool":
            first = in_channels[-1] if extra_from == "c5" else out_channels
            self.extra.extend(conv(first if i == 0 else out_channels, 3, 2) for i in range(num_extra))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        inner = [lateral(x) for lateral, x in zip(self.lateral, features, strict=True)]
        for i in range(len(inner) - 1, 0, -1):
            inner[i - 1] = inner[i - 1] + F.interpolate(inner[i], size=inner[i - 1].shape[-2:], mode="nearest")
        outputs = [output(x) for output, x in zip(self.output, inner, strict=True)]
        x = features[-1] if self.extra_from == "c5" else outputs[-1]
        for i in range(self.num_extra):
            if self.extra_from == "pool":
                x = x[:, :, ::2, ::2]
            else:
                x = self.extra[i](F.relu(x) if self.extra_relu and i > 0 else x)
            outputs.append(x)
        return outputs


class DyHeadNeck(nn.Module):
    """Levels of equal channels, then DyHead if there is one: what stands between a backbone and a head.

    Subclasses give the levels.

    Attributes:
        channels, strides: of the levels.
        dyhead: the blocks on top, or None.
    """

    channels: int
    strides: tuple[int, ...]
    dyhead: DyHead | PaperDyHead | None

    def __init__(self) -> None:
        super().__init__()
        self.dyhead = None  # of the instance: a class attribute would hide the module that a subclass puts there

    def levels(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Backbone levels to levels of ``channels`` channels, one for each stride."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each DyHead block in the backward pass instead of keeping its activations."""
        if self.dyhead is not None:
            self.dyhead.grad_checkpointing = enable

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        levels = self.levels(features)
        return levels if self.dyhead is None else self.dyhead(levels)

    def attention(self, features: Sequence[Tensor]) -> list[BlockAttention]:
        """What the attentions of each DyHead block compute for these features; empty without DyHead."""
        trace: list[BlockAttention] = []
        if self.dyhead is not None:
            self.dyhead(self.levels(features), trace)
        return trace


def build_dyhead(
    channels: int,
    strides: Sequence[int],
    num_blocks: int,
    *,
    scale: bool,
    spatial: bool,
    task: bool,
    coarse_offsets: CoarseOffsets,
    zero_init_offset: bool,
    formulation: Formulation,
) -> DyHead | PaperDyHead | None:
    """DyHead in the released or in the paper's formulation; None for no blocks.

    Raises:
        ValueError: for another ``formulation``, more than ``MAX_BLOCKS`` blocks, or strides that do not double, which
            only the paper's formulation takes.
    """
    if formulation not in ("released", "paper"):
        raise ValueError(f"formulation={formulation!r}: use 'released' (published weights) or 'paper'")
    if not 0 <= num_blocks <= MAX_BLOCKS:
        raise ValueError(f"dyhead={num_blocks}: use 0..{MAX_BLOCKS} blocks")
    if not num_blocks:
        return None
    if formulation == "paper":
        return PaperDyHead(channels, len(strides), num_blocks, scale=scale, spatial=spatial, task=task)
    if any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
        raise ValueError(
            f"DyHead on levels of strides {tuple(strides)}: use strides that double from one level to the next, or "
            "formulation='paper', which takes any"
        )
    return DyHead(
        channels,
        num_blocks=num_blocks,
        scale=scale,
        spatial=spatial,
        task=task,
        coarse_offsets=coarse_offsets,
        zero_init_offset=zero_init_offset,
    )


class Neck(DyHeadNeck):
    """FPN, then DyHead if ``dyhead`` blocks are asked for.

    ``strides`` are those of the pyramid: the backbone's, then doubling. Arguments as in ``FPN`` and ``DyHead``;
    ``formulation='paper'`` runs the paper's equations (``PaperDyHead``) instead of the released code's.

    Shapes: L x (B, C_l, H_l, W_l) -> (L + num_extra) x (B, channels, ., .), fine to coarse.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        *,
        channels: int = 256,
        num_extra: int = 2,
        extra_from: ExtraLevels = "p5",
        extra_relu: bool = False,
        fpn_norm: Norm = False,
        dyhead: int = 0,
        scale: bool = True,
        spatial: bool = True,
        task: bool = True,
        coarse_offsets: CoarseOffsets = "aligned",
        zero_init_offset: bool = True,
        formulation: Formulation = "released",
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels={channels}: a pyramid has at least one channel")
        if not 0 <= num_extra <= _MAX_EXTRA:
            raise ValueError(f"num_extra={num_extra}: use 0..{_MAX_EXTRA} coarser levels, each of twice the stride")
        self.channels = channels
        self.strides = (*in_strides, *(in_strides[-1] * 2 ** (i + 1) for i in range(num_extra)))
        self.fpn = FPN(
            in_channels, channels, num_extra=num_extra, extra_from=extra_from, extra_relu=extra_relu, fpn_norm=fpn_norm
        )
        self.dyhead = build_dyhead(
            channels,
            self.strides,
            dyhead,
            scale=scale,
            spatial=spatial,
            task=task,
            coarse_offsets=coarse_offsets,
            zero_init_offset=zero_init_offset,
            formulation=formulation,
        )

    def levels(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The pyramid, before DyHead."""
        return self.fpn(features)
