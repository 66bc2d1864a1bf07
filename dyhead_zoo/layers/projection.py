"""The neck of set-prediction detectors: one projection for each level, then DyHead if asked for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dyhead_zoo.layers.dyhead import CoarseOffsets, DyHead
from dyhead_zoo.layers.fpn import DyHeadNeck, Formulation, build_dyhead
from dyhead_zoo.layers.tower import ConvNorm


class ProjectionNeck(DyHeadNeck):
    """A 1x1 convolution for each backbone level, and 3x3 convolutions of stride 2 for coarser ones.

    DETR (arXiv:2005.12872) projects one level; Deformable DETR (arXiv:2010.04159, appendix A.2) three, and adds a
    fourth from C5. Levels do not mix, the transformer does that; DyHead on top mixes neighbours before it does. With
    one level it has no neighbours and becomes its middle branch.

    Args:
        in_channels, in_strides: of the backbone levels, fine to coarse.
        channels: of every projected level.
        num_extra: coarser levels: the first is computed from the last backbone level, the others from the one before.
        proj_norm: GroupNorm after every convolution, which then has no bias (Deformable DETR).
        dyhead: number of blocks; ``scale`` to ``formulation`` as in ``Neck``.

    Shapes: L x (B, C_l, H_l, W_l) -> (L + num_extra) x (B, channels, ., .), fine to coarse.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        *,
        channels: int = 256,
        num_extra: int = 0,
        proj_norm: bool = False,
        dyhead: int = 0,
        scale: bool = True,
        spatial: bool = True,
        task: bool = True,
        coarse_offsets: CoarseOffsets = "aligned",
        zero_init_offset: bool = True,
        formulation: Formulation = "released",
    ) -> None:
        super().__init__()
        self.channels = channels
        self.strides = (*in_strides, *(in_strides[-1] * 2 ** (i + 1) for i in range(num_extra)))

        def conv(source: int, kernel: int, stride: int = 1) -> nn.Module:
            layer = nn.Conv2d(source, channels, kernel, stride, padding=kernel // 2, bias=not proj_norm)
            nn.init.xavier_uniform_(layer.weight)
            if proj_norm:
                return ConvNorm(layer)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            return layer

        self.proj = nn.ModuleList(conv(source, 1) for source in in_channels)
        self.proj.extend(conv(channels if i else in_channels[-1], 3, 2) for i in range(num_extra))
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
        if isinstance(self.dyhead, DyHead) and len(self.strides) == 1:
            _keep_middle_branch(self.dyhead)

    def levels(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The projections, before DyHead."""
        levels = [proj(x) for proj, x in zip(self.proj, features, strict=False)]
        x = features[-1]
        for proj in self.proj[len(features) :]:
            x = proj(x)
            levels.append(x)
        return levels


def _keep_middle_branch(dyhead: DyHead) -> None:
    """Without neighbours the other branches would get no gradient, which DistributedDataParallel refuses."""
    for block in dyhead.blocks:
        for part in ("conv_high", "norm_high", "conv_low", "norm_low"):
            delattr(block.spatial, part)
