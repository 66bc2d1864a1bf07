"""Dynamic Head as its paper writes it, beside the released formulation of ``dyhead.py``.

Paper: arXiv:2106.08322, section 3. All pyramid levels are resized to the median level and stacked into one tensor
F in R^{L x S x C}, S = H W; then, block by block, ``W(F) = pi_C( pi_S( pi_L(F) . F ) . F ) . F`` (Eq. 2). With a batch
of B images, L levels, C channels and the median level's H x W:

    | step                       | attention computed                                      | result                |
    |----------------------------|---------------------------------------------------------|-----------------------|
    | resize to the median level |                                                         | (B, L, C, H, W)       |
    | pi_L, ScaleAttention       | one weight per image and level: (B, L)                  | (B, L, C, H, W)       |
    | pi_S, SpatialAttention     | offsets (B, 18, H, W), masks (B, 9, H, W), one set for  | (B, C, H, W), used as |
    |                            | all levels                                              | each of the L levels  |
    | pi_C, TaskAttention        | four coefficients per image and channel: 4 x (B, C)     | (B, L, C, H, W)       |
    | resize back                |                                                         | L x (B, C, H_l, W_l)  |

Eq. 4 sums over the levels, so its result has no level index. The paper stacks blocks and attaches a head per level all
the same; read literally, as here, every level then holds the same map, and levels differ again only by the gates of the
next block's pi_L and by their size. Nothing in the equations normalises; there is no GroupNorm here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dyhead_zoo.layers.dyhead import BlockAttention, Trace
from dyhead_zoo.ops import modulated_deform_conv2d


class PaperScaleAttention(nn.Module):
    """pi_L, Eq. 3: ``sigma(f(1/(S C) sum_{S,C} F)) . F``.

    ``f`` is linear on the L level means; ``sigma(x) = max(0, min(1, (x + 1) / 2))``.

    Shapes: (B, L, C, H, W) -> weights (B, L) and the weighted features (B, L, C, H, W).
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(levels, levels)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = ((self.fc(x.mean((2, 3, 4))) + 1) / 2).clamp(0, 1)
        return weight, x * weight[:, :, None, None, None]


class PaperSpatialAttention(nn.Module):
    """pi_S, Eq. 4: ``1/L sum_l sum_k w_{l,k} . F(l; p_k + dp_k) . dm_k``, K = 9.

    ``w_{l,k}`` is a C x C matrix, as in any deformable convolution; dp and dm = sigmoid come from a 3x3 convolution of
    the median level. Since all levels share them, the double sum is one deformable convolution of L C channels.

    Shapes: (B, L, C, H, W) -> offsets (B, 18, H, W) as (dy, dx) in pixels of the median level, masks (B, 9, H, W), and
    the aggregated features (B, C, H, W).
    """

    def __init__(self, levels: int, channels: int) -> None:
        super().__init__()
        self.levels, self.median = levels, levels // 2
        self.offset = nn.Conv2d(channels, 27, 3, padding=1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]
        self.weight = nn.Parameter(torch.empty(channels, levels * channels, 3, 3))
        # keeps the second moment: gates and masks start at 1/2, a ReLU follows, and the sum is divided by L
        nn.init.normal_(self.weight, std=math.sqrt(32 * levels / (9 * channels)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        predicted = self.offset(x[:, self.median])
        offset, mask = predicted[:, :18], predicted[:, 18:].sigmoid()
        y = modulated_deform_conv2d(x.flatten(1, 2), offset, mask, self.weight, padding=1)
        return offset, mask, y / self.levels


class PaperTaskAttention(nn.Module):
    """pi_C, Eq. 5: ``max(a1 F_c + b1, a2 F_c + b2)``.

    ``[a1, b1, a2, b2] = (1, 0, 0, 0) + 2 sigmoid(fc2(relu(fc1(pool)))) - 1``, the pool over L x S. The "normalisation
    layer" and the "shifted sigmoid" of the text are one thing in the paper it builds on (DY-ReLU, arXiv:2003.10027).

    Shapes: (B, L, C, H, W) -> coefficients 4 x (B, C) in the order a1, b1, a2, b2, and the features (B, L, C, H, W).
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, 4 * channels)
        nn.init.normal_(self.fc2.weight, std=0.01)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        theta = 2 * self.fc2(F.relu(self.fc1(x.mean((1, 3, 4))))).sigmoid() - 1
        a1, b1, a2, b2 = theta.chunk(4, dim=1)
        coefficients = (a1 + 1, b1, a2, b2)
        a1, b1, a2, b2 = (c[:, None, :, None, None] for c in coefficients)
        return coefficients, torch.maximum(x * a1 + b1, x * a2 + b2)


class PaperBlock(nn.Module):
    """One block: scale, then spatial, then task attention. ``scale``, ``spatial`` and ``task`` switch them.

    Without ``spatial`` the levels stay apart; without ``task`` a ReLU follows.

    Shapes: (B, L, C, H, W) -> (B, L, C, H, W).
    """

    def __init__(
        self, levels: int, channels: int, *, scale: bool = True, spatial: bool = True, task: bool = True
    ) -> None:
        super().__init__()
        self.scale = PaperScaleAttention(levels) if scale else None
        self.spatial = PaperSpatialAttention(levels, channels) if spatial else None
        self.task = PaperTaskAttention(channels) if task else None

    def forward(self, x: Tensor, trace: Trace | None = None) -> Tensor:
        """Appends its attentions to ``trace``."""
        seen = BlockAttention([], [], [], [])
        if self.scale is not None:
            weight, x = self.scale(x)
            seen.scale.append(weight.detach())
        if self.spatial is not None:
            offset, mask, y = self.spatial(x)
            x = y[:, None].expand_as(x)
            seen.offsets.append(offset.detach())
            seen.masks.append(mask.detach())
        if self.task is not None:
            coefficients, x = self.task(x)
            seen.task.append(torch.stack(coefficients, dim=1).detach())
        else:
            x = F.relu(x)
        if trace is not None:
            trace.append(seen)
        return x


class PaperDyHead(nn.Module):
    """``num_blocks`` blocks in the paper's formulation.

    Args:
        channels: C.
        levels: L of the pyramid.
        num_blocks: depth.
        scale, spatial, task: see ``PaperBlock``.
    """

    def __init__(
        self,
        channels: int,
        levels: int,
        num_blocks: int = 6,
        *,
        scale: bool = True,
        spatial: bool = True,
        task: bool = True,
    ) -> None:
        super().__init__()
        if num_blocks < 1:
            raise ValueError(f"DyHead with {num_blocks} blocks: use at least 1, or a name without '_dyhead'")
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(
            PaperBlock(levels, channels, scale=scale, spatial=spatial, task=task) for _ in range(num_blocks)
        )

    def forward(self, features: list[Tensor], trace: Trace | None = None) -> list[Tensor]:
        """L x (B, C, H_l, W_l) -> L x (B, C, H_l, W_l), fine to coarse; see ``BlockAttention`` for ``trace``."""
        median = features[len(features) // 2]
        x = torch.stack([resize(f, (median.shape[-2], median.shape[-1])) for f in features], dim=1)
        for block in self.blocks:
            recompute = self.grad_checkpointing and torch.is_grad_enabled() and trace is None
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x, trace)
        return [resize(x[:, level], (f.shape[-2], f.shape[-1])) for level, f in enumerate(features)]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, C, h, w): bilinear when a side grows, averages of the cells covered when both shrink."""
    if size[0] <= x.shape[-2] and size[1] <= x.shape[-1]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
