"""Dynamic Head: scale-aware, spatial-aware and task-aware attention in one head.

Paper: Dai et al., "Dynamic Head: Unifying Object Detection Heads with Attentions", CVPR 2021, arXiv:2106.08322.
Code released with it: github.com/microsoft/DynamicHead (MIT). Both describe

    W(F) = pi_C( pi_S( pi_L(F) . F ) . F ) . F        F in R^{L x S x C}                            (Eq. 2)

but the released code, which every published weight was trained with, is not the paper. It never builds the L x S x C
tensor; level l meets only its neighbours l-1 and l+1, and the order is spatial, then scale, then task:

    | step                     | in                               | out                                             |
    |--------------------------|----------------------------------|-------------------------------------------------|
    | SpatialAttention, level l| x[l-1], x[l], x[l+1]             | 2 or 3 branches, each (B, C, H_l, W_l)          |
    | ScaleAttention           | each branch (B, C, H_l, W_l)     | one number per image and branch: (B, 1, 1, 1)   |
    | mean over the branches   | 2 or 3 x (B, C, H_l, W_l)        | (B, C, H_l, W_l)                                |
    | TaskAttention            | (B, C, H_l, W_l)                 | (B, C, H_l, W_l), by 4 coefficients per channel |

All weights of a block are shared by all levels, and a block has no residual connection.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from dyhead_zoo.layers import dyhead_cuda, dyhead_inference, dyhead_tail
from dyhead_zoo.layers.dyhead_tail import SAMPLED
from dyhead_zoo.ops import modulated_deform_conv2d
from dyhead_zoo.ops.deform_conv import Backend, cpu_loops
from dyhead_zoo.ops.deform_conv_cpu import (
    Convolution,
    Linear,
    as_matrix,
    border_is_finite,
    convolve_table,
    packed_linear,
)
from dyhead_zoo.ops.deform_conv_plan import Geometry
from dyhead_zoo.ops.deform_conv_samples import INT32_LIMIT
from dyhead_zoo.ops.pyramid import Pyramid

CoarseOffsets = Literal["reinterpret", "aligned"]
Field = tuple[Tensor, Tensor]  # offsets and masks of a level
_GROUPS = 16  # of GroupNorm, as in the released code
_TABLE_BACKENDS = ("auto", "numba", "bag")  # of convolutions that can take all levels in one table


class BlockAttention(NamedTuple):
    """What the attentions of one block computed, detached; a field is empty where its attention is switched off.

    One entry per level, fine to coarse; a single entry in the paper's formulation, which has one for all levels.

    Attributes:
        scale: (B, n), weight of each branch: the level itself, the finer one, the coarser one, as far as they exist; in
            the paper's formulation (B, L), weight of each level.
        offsets: (B, 18, H, W), (dy, dx) of the nine taps in pixels of the map that is sampled.
        masks: (B, 9, H, W) in 0..1.
        task: (B, 4, C), a1, b1, a2, b2 of each channel.
    """

    scale: list[Tensor]
    offsets: list[Tensor]
    masks: list[Tensor]
    task: list[Tensor]


Trace = list[BlockAttention]


class ScaleAttention(nn.Module):
    """How much a branch counts, pi_L: one number in [0.5, 1] per image.

    Paper (Eq. 3): ``sigma(f(1/(S C) sum_{S,C} F))`` with ``f`` a 1x1 convolution over the L levels and
    ``sigma(x) = max(0, min(1, (x + 1) / 2))``. Released code, followed here: ``f`` maps the C pooled channels of one
    branch to one number, then ReLU, then ``max(0, min(1, (x + 3) / 6))``; the ReLU is why the result is at least 0.5.

    Shapes: (B, C, H, W) -> (B, 1, 1, 1).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, 1, 1)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(F.relu(self.fc(x.mean((2, 3), keepdim=True))))


class TaskAttention(nn.Module):
    """Which channels a task uses, pi_C: a dynamic ReLU (DY-ReLU-B, arXiv:2003.10027) per image and channel.

    Paper (Eq. 5): ``max(a1 F_c + b1, a2 F_c + b2)`` with ``[a1, a2, b1, b2] = theta(F)``, theta = average pooling over
    L x S, two fully connected layers, normalisation and a sigmoid shifted to [-1, 1]. Released code, followed here:
    pooling over the S of one level; hard sigmoid ``(x + 3) / 6``; a1 in [0, 2], a2 in [-1, 1], b1 and b2 in
    [-0.5, 0.5]. At ``theta = 1/2`` this is a ReLU (a1 = 1, the rest 0).

    Shapes: (B, C, H, W) -> (B, C, H, W); ``coefficients``: (B, C) -> 4 x (B, C), in the order a1, b1, a2, b2.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, 4 * channels)

    def coefficients(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four coefficients of each image and channel, from the pooled features (B, C)."""
        theta = F.hardsigmoid(self.fc2(F.relu(self.fc1(pooled)))) - 0.5
        a1, b1, a2, b2 = theta.chunk(4, dim=1)
        return 2 * a1 + 1, b1, 2 * a2, b2

    def forward(self, x: Tensor) -> Tensor:
        a1, b1, a2, b2 = (c[:, :, None, None] for c in self.coefficients(x.mean((2, 3))))
        first, second = torch.addcmul(b1, x, a1), torch.addcmul(b2, x, a2)
        # their maximum; torch.maximum would keep both for the backward pass, this a mask
        return torch.where(first >= second, first, second)


class DeformConv3x3(nn.Module):
    """Parameters of a modulated deformable 3x3 convolution (DCNv2) whose offsets and mask come from elsewhere.

    Shapes: x (B, C, H, W), offset (B, 18, h, w) in (dy, dx) pairs, mask (B, 9, h, w) -> (B, C_out, h, w), where
    (h, w) is the size of a dense 3x3 convolution with this stride and padding 1.

    ``backend`` is that of ``modulated_deform_conv2d``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.backend: Backend = "auto"
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self._packed: tuple[int, Linear] | None = None
        bound = 1 / math.sqrt(9 * in_channels)
        nn.init.uniform_(self.weight, -bound, bound)

    def pack(self) -> None:
        """Lay the weight out for ``dyhead_inference`` once, not at every call. Copies of the module are not packed."""
        with torch.no_grad():
            self._packed = (self.weight._version, packed_linear(as_matrix(self.weight)))

    @property
    def packed(self) -> Linear | None:
        """The product with the weight as ``pack`` laid it out; None if it did not, or if the weight changed since."""
        if self._packed is None or self._packed[0] != self.weight._version:
            return None
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return modulated_deform_conv2d(
            x, offset, mask, self.weight, self.bias, stride=self.stride, padding=1, backend=self.backend
        )


def pack_weights(module: nn.Module) -> None:
    """``DeformConv3x3.pack`` of all parts of a module, whose weights are final."""
    for part in module.modules():
        if isinstance(part, DeformConv3x3):
            part.pack()


class _GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` without its refusal of a single image whose groups hold one value each; of two it takes them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody may rely on the module being called: by hooks, or by a ``forward`` of their own."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks) or "forward" in vars(module) or _has_any_global_hook()


class SpatialAttention(nn.Module):
    """Where to look, pi_S: modulated deformable convolutions on a level and on its two neighbours.

    Paper (Eq. 4): ``1/L sum_l sum_k w_{l,k} F(l; p_k + dp_k; c) dm_k``, summed over all L levels, resized to the median
    level from which dp and dm are learned. Released code, followed here, for level l:

        mid   x[l]    stride 1                           -> GroupNorm
        low   x[l-1]  stride 2 (the finer level)         -> GroupNorm
        high  x[l+1]  stride 1 (the coarser level)       -> GroupNorm -> bilinear upsampling to level l

    with one set of offsets and masks, computed from x[l], for all three.

    The high branch needs them at the size (h, w) of level l+1, but they have the size (H, W) of level l.
    ``coarse_offsets`` says what happens:

    * ``'reinterpret'``: what the released kernels do and the published weights depend on. They address the buffer with
      the strides of the smaller map: the first ``18 h w`` numbers of each image's offsets are read as an (18, h, w)
      map (masks likewise), so that channels and positions are mixed (microsoft/DynamicHead issue 25).
    * ``'aligned'``: offsets and masks are average-pooled to (h, w); one unit stays one pixel of the map sampled.

    Shapes: L x (B, C, H_l, W_l) -> for each level its 1 to 3 branches, each (B, C_out, H_l, W_l). Sides halve from one
    level to the next, rounded up; only then does the low branch have the size of its level.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        deformable: bool = True,
        coarse_offsets: CoarseOffsets = "aligned",
        zero_init_offset: bool = True,
    ) -> None:
        super().__init__()
        if coarse_offsets not in ("reinterpret", "aligned"):
            raise ValueError(f"coarse_offsets={coarse_offsets!r}: use 'reinterpret' (released weights) or 'aligned'")
        self.coarse_offsets = coarse_offsets
        self.offset = nn.Conv2d(in_channels, 27, 3, padding=1) if deformable else None
        if self.offset is not None and zero_init_offset:
            nn.init.zeros_(self.offset.weight)
            nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]
        for branch, stride in (("high", 1), ("mid", 1), ("low", 2)):
            conv: nn.Module = (
                DeformConv3x3(in_channels, out_channels, stride)
                if deformable
                else nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)
            )
            self.add_module(f"conv_{branch}", conv)
            self.add_module(f"norm_{branch}", _GroupNorm(_GROUPS, out_channels))

    @property
    def backend(self) -> Backend | None:
        """That of the deformable convolutions; None if they differ or are ordinary ones."""
        convs = [conv for name in SAMPLED if (conv := getattr(self, f"conv_{name}", None)) is not None]
        backends = {getattr(conv, "backend", None) for conv in convs}
        return backends.pop() if len(backends) == 1 else None

    def _coarse(self, field: Tensor, size: tuple[int, int]) -> Tensor:
        """Offsets or masks (B, K, H, W) of a level for its coarser neighbour of ``size``: (B, K, h, w)."""
        if self.coarse_offsets == "aligned":
            return F.adaptive_avg_pool2d(field, size)
        batch, channels, height, width = field.shape
        numbers = channels * size[0] * size[1]
        read = field[:, : -(-numbers // (height * width))]  # the channels that hold them
        return read.flatten(1)[:, :numbers].reshape(batch, channels, *size)

    def fields(self, features: list[Tensor]) -> list[Field | None]:
        """Offsets (B, 18, H_l, W_l) and masks (B, 9, H_l, W_l) of each level; None for ordinary convolutions."""
        if self.offset is None:
            return [None] * len(features)
        predicted = [self.offset(x) for x in features]
        predicted = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in predicted]  # positions need the digits
        return [(p[:, :18], p[:, 18:].sigmoid()) for p in predicted]

    def table(self, features: list[Tensor]) -> Tensor | None:
        """The pixels of all levels, (rows, C), where the convolutions can take them together; else None.

        They can with gradients on a CPU, if they are as they were built and nobody hooks into them. Then weights are
        laid out, and get their gradients, once and not once for each level (``convolve_table``).
        """
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        if not any(t.requires_grad for t in (*features, *self.parameters())):
            return None
        if any(type(x) is not Tensor or x.device.type != "cpu" or x.dtype != features[0].dtype for x in features):
            return None
        convs = [getattr(self, f"conv_{name}") for name in SAMPLED if self._served(name, len(features))]
        plain = all(type(conv) is DeformConv3x3 for conv in convs) and self.backend in _TABLE_BACKENDS
        if not plain or type(self) is not SpatialAttention or any(map(_is_watched, (self, *convs))):
            return None
        pyramid = Pyramid.of(features)
        countable = 0 < 36 * pyramid.start(len(features)) < INT32_LIMIT  # entries of a plan: nine taps, four corners
        if not (countable and pyramid.halves and all(map(border_is_finite, features))):
            return None
        return pyramid.joined(features)

    def forward(
        self, features: list[Tensor], fields: list[Field | None], table: Tensor | None = None
    ) -> list[list[Tensor]]:
        """The branches of each level; ``table``, if there is one, comes from the method and holds ``features``."""
        convolved = self._one_by_one(features, fields) if table is None else self._together(table, features, fields)
        levels = []
        for level, x in enumerate(features):
            branches = []
            for name in SAMPLED:
                if level not in self._served(name, len(features)):
                    continue
                branch = getattr(self, f"norm_{name}")(convolved[name][level])
                if name == "high":
                    branch = F.interpolate(branch, size=x.shape[-2:], mode="bilinear", align_corners=True)
                branches.append(branch)
            levels.append(branches)
        return levels

    @staticmethod
    def _served(name: str, count: int) -> range:
        """The levels, of ``count``, that have this branch."""
        return range(int(name == "low"), count - int(name == "high"))

    def _field(self, name: str, level: int, features: list[Tensor], fields: list[Field | None]) -> Field | None:
        """Where a branch of a level samples."""
        field = fields[level]
        if name != "high" or field is None:
            return field
        size = (features[level + 1].shape[-2], features[level + 1].shape[-1])
        return self._coarse(field[0], size), self._coarse(field[1], size)

    def _one_by_one(self, features: list[Tensor], fields: list[Field | None]) -> dict[str, dict[int, Tensor]]:
        """What the convolutions give, by branch and level."""
        convolved: dict[str, dict[int, Tensor]] = {name: {} for name in SAMPLED}
        for level in range(len(features)):
            for name, neighbour in SAMPLED.items():
                if level in self._served(name, len(features)):
                    field = self._field(name, level, features, fields)
                    conv, x = getattr(self, f"conv_{name}"), features[level + neighbour]
                    convolved[name][level] = conv(x, *field) if field else conv(x)
        return convolved

    def _together(
        self, table: Tensor, features: list[Tensor], fields: list[Field | None]
    ) -> dict[str, dict[int, Tensor]]:
        """The same for features that lie in a table."""
        tables, layouts = self.convolve(table, features, fields), dyhead_tail.branches_of(Pyramid.of(features))
        return {
            name: dict(zip(levels, layout.maps(tables[name]), strict=True))
            for name, (levels, layout) in layouts.items()
        }

    def convolve(self, table: Tensor, features: list[Tensor], fields: list[Field | None]) -> dict[str, Tensor]:
        """What the convolutions give for features that lie in a table, by branch: (rows, C_out), level after level."""
        pyramid = Pyramid.of(features)
        convolutions: dict[str, Convolution] = {}
        for name, neighbour in SAMPLED.items():
            levels = self._served(name, len(features))
            if not levels:
                continue
            conv = cast(DeformConv3x3, getattr(self, f"conv_{name}"))
            sources = [(pyramid.start(level + neighbour), pyramid.sizes[level + neighbour]) for level in levels]
            served = [cast("Field", self._field(name, level, features, fields)) for level in levels]
            geometry = Geometry((3, 3), (conv.stride, conv.stride), (1, 1), (1, 1))
            convolutions[name] = Convolution(sources, served, conv.weight, conv.bias, geometry)
        if torch.is_autocast_enabled("cpu") and table.dtype != torch.float64:
            table = table.to(torch.get_autocast_dtype("cpu"))
        with torch.autocast("cpu", enabled=False):
            loops = cpu_loops(cast(Backend, self.backend), table.dtype)
            outputs = convolve_table(table, list(convolutions.values()), loops)
        return dict(zip(convolutions, outputs, strict=True))


class DyHeadBlock(nn.Module):
    """One block in the released formulation; see the module docstring for the order and the shapes.

    ``scale``, ``spatial`` and ``task`` switch the three attentions (Table 1 of the paper): without ``scale`` the
    branches are averaged, without ``spatial`` the convolutions are ordinary ones, without ``task`` a ReLU follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        scale: bool = True,
        spatial: bool = True,
        task: bool = True,
        coarse_offsets: CoarseOffsets = "aligned",
        zero_init_offset: bool = True,
    ) -> None:
        super().__init__()
        self.spatial = SpatialAttention(
            in_channels,
            out_channels,
            deformable=spatial,
            coarse_offsets=coarse_offsets,
            zero_init_offset=zero_init_offset,
        )
        self.scale = ScaleAttention(out_channels) if scale else None
        self.task = TaskAttention(out_channels) if task else nn.ReLU()

    @property
    def is_standard(self) -> bool:
        """In evaluation mode, deformable, of its own parts without hooks, and able to take all levels in a table."""
        return not self.training and not _is_watched(self) and self._is_plain

    @property
    def _is_plain(self) -> bool:
        """Likewise in any mode, and whoever may watch the block itself."""
        parts = list(self.modules())
        if any(type(part) not in _OWN_PARTS for part in parts) or any(map(_is_watched, parts[1:])):
            return False
        kept = [name for name in SAMPLED if hasattr(self.spatial, f"conv_{name}")]  # a single level needs "mid" only
        convs, norms = ([getattr(self.spatial, f"{part}_{name}") for name in kept] for part in ("conv", "norm"))
        deformable = all(type(conv) is DeformConv3x3 for conv in convs) and self.spatial.backend in _TABLE_BACKENDS
        return deformable and len({(norm.num_groups, norm.eps) for norm in norms}) == 1

    def forward(self, features: list[Tensor], trace: Trace | None = None) -> list[Tensor]:
        """L x (B, C_in, H_l, W_l) -> L x (B, C_out, H_l, W_l), fine to coarse; appends its attentions to ``trace``."""
        table, pyramid = self.spatial.table(features), Pyramid.of(features)
        if table is not None:
            features = pyramid.maps(table)
        fields = self.spatial.fields(features)
        if table is not None and trace is None and (loops := self._end_loops(table)):
            convolved = self.spatial.convolve(table, features, fields)
            return dyhead_tail.end_with_gradients(loops, self, pyramid, convolved)
        outputs, weights, coefficients = [], [], []
        for branches in self.spatial(features, fields, *(() if table is None else (table,))):
            if self.scale is not None:
                weight = [self.scale(branch) for branch in branches]
                branches = [w * branch for w, branch in zip(weight, branches, strict=True)]
                weights.append(torch.cat(weight, dim=1).flatten(1).detach())
            x = sum(branches[1:], branches[0]) / len(branches)
            if trace is not None and isinstance(self.task, TaskAttention):
                coefficients.append(torch.stack(self.task.coefficients(x.mean((2, 3))), dim=1).detach())
            outputs.append(self.task(x))
        if trace is not None:
            known = [field for field in fields if field is not None]
            offsets, masks = [o.detach() for o, _ in known], [m.detach() for _, m in known]
            trace.append(BlockAttention(weights, offsets, masks, coefficients))
        return outputs

    def _end_loops(self, table: Tensor) -> ModuleType | None:
        """Loops for what follows the convolutions, where these can take its place."""
        if torch.is_autocast_enabled("cpu") or not self._is_plain:
            return None
        return dyhead_tail.end_loops(self, table.dtype)


_OWN_PARTS = (
    *(DyHeadBlock, SpatialAttention, ScaleAttention, TaskAttention, DeformConv3x3, _GroupNorm),
    *(nn.Conv2d, nn.Linear, nn.ReLU),
)
"""What ``DyHeadBlock`` is built of; others (adapters, quantised layers) may compute other things."""


class DyHead(nn.Module):
    """``num_blocks`` DyHead blocks on a feature pyramid.

    Args:
        in_channels: C of the pyramid.
        out_channels: C of every block's output; defaults to ``in_channels``. A multiple of 16.
        num_blocks: depth; the paper's best is 6.
        scale, spatial, task, coarse_offsets, zero_init_offset: see ``DyHeadBlock`` and ``SpatialAttention``.

    Attributes:
        fused: in evaluation mode and without gradients, run all blocks by ``dyhead_inference`` on a CPU and by
            ``dyhead_cuda`` on NVIDIA GPUs, which give the same up to rounding in less work. False runs the modules one
            by one.
        grad_checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: for channels that GroupNorm's 16 groups do not divide, or fewer than one block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        num_blocks: int = 6,
        *,
        scale: bool = True,
        spatial: bool = True,
        task: bool = True,
        coarse_offsets: CoarseOffsets = "aligned",
        zero_init_offset: bool = True,
    ) -> None:
        super().__init__()
        out_channels = out_channels or in_channels
        if out_channels % _GROUPS:
            raise ValueError(f"DyHead with {out_channels} channels: use a multiple of {_GROUPS} (its GroupNorm groups)")
        if num_blocks < 1:
            raise ValueError(f"DyHead with {num_blocks} blocks: use at least 1, or a name without '_dyhead'")
        self.fused = True
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(
            DyHeadBlock(
                in_channels if i == 0 else out_channels,
                out_channels,
                scale=scale,
                spatial=spatial,
                task=task,
                coarse_offsets=coarse_offsets,
                zero_init_offset=zero_init_offset,
            )
            for i in range(num_blocks)
        )

    def forward(self, features: list[Tensor], trace: Trace | None = None) -> list[Tensor]:
        """L x (B, C_in, H_l, W_l) -> L x (B, C_out, H_l, W_l), fine to coarse; see ``BlockAttention`` for ``trace``.

        Raises:
            ValueError: for sides that do not halve from one level to the next, rounded up.
        """
        pyramid = Pyramid.of(features)
        if not pyramid.halves:
            sizes = ", ".join(f"{h} x {w}" for h, w in pyramid.sizes)
            raise ValueError(
                f"DyHead on levels of {sizes}: sides must halve from one to the next, rounded up; "
                "use strides that double, or formulation='paper', which takes any"
            )
        blocks = [cast(DyHeadBlock, block) for block in self.blocks]
        if self.fused and trace is None and dyhead_inference.applies(blocks, features):
            return dyhead_inference.forward(blocks, features)
        if self.fused and trace is None and dyhead_cuda.applies(blocks, features):
            return dyhead_cuda.forward(blocks, features)
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled() and trace is None:
                features = checkpoint(block, features, use_reentrant=False)
            else:
                features = block(features, trace)
        return features
