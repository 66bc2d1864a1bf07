"""The end of a DyHead block, from what its convolutions gave to its output, as seven numbers for each channel.

After a convolution, GroupNorm is an affine map of each channel, ``t -> A t + B``, that follows from the channel's mean
and variance; so does the mean of the normalised map, which is all that ScaleAttention and TaskAttention look at. With
upsampling, which commutes with the affine map and whose mean is a fixed weighted mean of the smaller map, every number
that multiplies a map is known before any map is touched:

    out = max(a1 F + b1, a2 F + b2),    F = sum over the branches of (gate A / n) t,

where b1 and b2 hold what B and the gates add. So each map is read twice, once for its statistics and once to be
combined; with gradients nothing is kept but the maps themselves.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dyhead_zoo.ops.deform_conv import Backend, cpu_loops
from dyhead_zoo.ops.deform_conv_plan import Pair
from dyhead_zoo.ops.pyramid import Pyramid
from dyhead_zoo.ops.trial import undisturbed

if TYPE_CHECKING:
    from dyhead_zoo.layers.dyhead import DyHeadBlock

SAMPLED = {"mid": 0, "low": -1, "high": 1}
"""The branches, in the order of their coefficients: which level each samples, counted from its own."""
NAMES = tuple(SAMPLED)


def branches_of(pyramid: Pyramid) -> dict[str, tuple[range, Pyramid]]:
    """The levels that each branch serves, if any, and the layout of what its convolution gives for them.

    That of "high" has the sizes of the coarser levels: upsampling comes after.
    """
    count, (batch, sizes) = len(pyramid.sizes), pyramid
    layouts = {"mid": (range(count), pyramid)}
    if count > 1:
        coarser = Pyramid(batch, sizes[1:])
        layouts |= {"low": (range(1, count), coarser), "high": (range(count - 1), coarser)}
    return layouts


def end_coefficients(block: DyHeadBlock, convolved: Mapping[str, Tensor], pyramid: Pyramid) -> Tensor:
    """The seven numbers of each channel, (L·B, 7, C): slopes of the branches in F, a1, b1, a2, b2; differentiable.

    Args:
        block: of standard parts.
        convolved: for each branch what its convolution gave, (rows, C), see ``branches_of``.
        pyramid: layout of the output.

    Returns:
        Level after level, image after image. Zero for a branch that a level lacks.
    """
    count, batch = len(pyramid.sizes), pyramid.batch
    layouts = branches_of(pyramid)
    branches = [
        _statistics(name, convolved[name], getattr(block.spatial, f"norm_{name}"), layout, pyramid)
        for name, (_, layout) in layouts.items()
    ]
    maps = [level * batch + image for levels, _ in layouts.values() for level in levels for image in range(batch)]
    shares = [sum(level in levels for levels, _ in layouts.values()) for level in range(count)]
    scale, shift = _group_norms(branches)
    pooled = torch.cat([branch.final_mean for branch in branches]) * scale + shift
    factor = pooled.new_tensor([1 / shares[number // batch] for number in maps])[:, None]
    if block.scale is not None:
        factor = factor * block.scale(pooled[:, :, None, None]).flatten(1)  # the mean of a single pixel is that pixel
    served = torch.tensor(maps, device=pooled.device)
    sums = pooled.new_zeros(2, count * batch, pooled.shape[1])
    pieces = _pieces(block, *sums.index_add(1, served, torch.stack((shift, pooled)) * factor))
    slopes = [
        F.pad(slope, (0, 0, batch * levels.start, batch * (count - levels.stop)))
        for (levels, _), slope in zip(
            layouts.values(), (scale * factor).split([len(branch.mean) for branch in branches]), strict=True
        )
    ]
    slopes += [torch.zeros_like(slopes[0])] * (len(NAMES) - len(slopes))
    return torch.stack([*slopes, *pieces[0], *pieces[1]], dim=1)


def end_loops(block: DyHeadBlock, dtype: torch.dtype) -> ModuleType | None:
    """``dyhead_loops``, if they serve for maps of this dtype where the block's convolutions may use numba."""
    if cpu_loops(cast(Backend, block.spatial.backend), dtype) is None:
        return None
    from dyhead_zoo.layers import dyhead_loops

    return dyhead_loops if dtype in dyhead_loops.DTYPES and _loops_work(dyhead_loops, dtype) else None


@functools.cache
def _loops_work(loops: ModuleType, dtype: torch.dtype) -> bool:
    """Whether the loops give what PyTorch's operators give for small maps, and their gradients."""

    def trial() -> bool:
        numbers = torch.arange(185, dtype=dtype, device="cpu").sin()
        maps = [part.view(-1, 5) for part in numbers.split([60, 60, 30, 35])]
        *tables, coefficients = (part.clone().requires_grad_() for part in maps)
        pyramid = Pyramid(1, ((3, 4), (2, 3)))
        mid, low, high = tables
        larger = F.interpolate(high.view(1, 2, 3, 5).permute(0, 3, 1, 2), (3, 4), mode="bilinear", align_corners=True)
        upsampled = larger.permute(0, 2, 3, 1).view(-1, 5)
        s_mid, s_low, s_high, a1, b1, a2, b2 = coefficients
        total = s_mid * mid + s_low * low + s_high * upsampled
        out = torch.maximum(a1 * total + b1, a2 * total + b2)
        inputs = (*tables, coefficients)
        expected = [out, *torch.autograd.grad(out, inputs, maps[0])]
        ours = [torch.empty_like(t) for t in (out, *inputs)]
        with torch.no_grad():
            branches = loops.Branches(*pyramid.sizes, *tables)
            loops.combine(branches, coefficients, ours[0])
            targets = loops.Branches(*pyramid.sizes, *ours[1:4])
            loops.write_gradients(branches, coefficients, maps[0], targets, ours[4])
        return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, expected, strict=True))

    try:
        works = undisturbed(trial)
    except Exception:  # whatever a numba that does not fit its surroundings may raise
        works = False
    if not works:
        warnings.warn("DyHead is slower than need be: numba's loops for it fail, install another version", stacklevel=4)
    return works


def write_end(
    loops: ModuleType, pyramid: Pyramid, coefficients: Tensor, convolved: Mapping[str, Tensor], out: Tensor
) -> None:
    """The output (rows, C) from ``end_coefficients`` and what these are of; ``out`` may be that of "mid"."""
    parts = zip(_parts(loops, pyramid, convolved), coefficients, _images(pyramid, out), strict=True)
    for branches, numbers, rows in parts:
        loops.combine(branches, numbers, rows)


def end_with_gradients(
    loops: ModuleType, block: DyHeadBlock, pyramid: Pyramid, convolved: Mapping[str, Tensor]
) -> list[Tensor]:
    """The output, L x (B, C, H_l, W_l) in the memory of one table, once differentiable.

    In the block's parameters and ``convolved``, see ``end_coefficients``.
    """
    coefficients = end_coefficients(block, convolved, pyramid)
    return list(_End.apply(loops, pyramid, coefficients, *map(convolved.get, NAMES)))


class _End(torch.autograd.Function):
    """``write_end`` to new maps."""

    @staticmethod
    def forward(
        ctx: Any, loops: ModuleType, pyramid: Pyramid, coefficients: Tensor, *tables: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.loops, ctx.pyramid = loops, pyramid
        ctx.save_for_backward(coefficients, *tables)
        convolved = _named(tables)
        out = torch.empty_like(convolved["mid"])
        write_end(loops, pyramid, coefficients, convolved, out)
        return tuple(pyramid.maps_of_their_own(out))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor | None, ...]:
        loops, pyramid = ctx.loops, ctx.pyramid
        coefficients, *tables = ctx.saved_tensors
        grads = [None if table is None else torch.empty_like(table) for table in tables]
        grad_coefficients = torch.empty_like(coefficients)
        for branches, numbers, grad, targets, sums in zip(
            _parts(loops, pyramid, _named(tables)),
            coefficients,
            [image for level in grads_out for image in level.permute(0, 2, 3, 1).contiguous().flatten(1, 2)],
            _parts(loops, pyramid, _named(grads)),
            grad_coefficients,
            strict=True,
        ):
            loops.write_gradients(branches, numbers, grad, targets, sums)
        return None, None, grad_coefficients, *grads


def _named(tables: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {name: table for name, table in zip(NAMES, tables, strict=True) if table is not None}


def _parts(loops: ModuleType, pyramid: Pyramid, convolved: Mapping[str, Tensor]) -> Iterator[Any]:
    """``loops.Branches`` of each level and image."""
    rows = {}
    for name, (levels, layout) in branches_of(pyramid).items():
        missing = (levels.start * pyramid.batch, (len(pyramid.sizes) - levels.stop) * pyramid.batch)
        rows[name] = [None] * missing[0] + [*_images(layout, convolved[name])] + [None] * missing[1]
    for number in range(len(pyramid.sizes) * pyramid.batch):
        level = number // pyramid.batch
        coarse = pyramid.sizes[min(level + 1, len(pyramid.sizes) - 1)]
        maps = [rows[name][number] if name in rows else None for name in NAMES]
        yield loops.Branches(pyramid.sizes[level], coarse, *maps)


def _images(layout: Pyramid, table: Tensor) -> list[Tensor]:
    """The (H·W, C) of each level and image."""
    lengths = [layout.pixels(level) for level in range(len(layout.sizes)) for _ in range(layout.batch)]
    return list(table.split(lengths))


# -- statistics --------------------------------------------------------------------------------------------------------


class _Statistics(NamedTuple):
    """Of what the convolution of a branch gave for the N levels that it serves.

    Attributes:
        norm: what follows the convolution.
        mean, variance: (N·B, C), of each channel before upsampling.
        final_mean: likewise, after it.
    """

    norm: nn.GroupNorm
    mean: Tensor
    variance: Tensor
    final_mean: Tensor


def _statistics(name: str, table: Tensor, norm: nn.GroupNorm, layout: Pyramid, pyramid: Pyramid) -> _Statistics:
    mean, variance = cast("tuple[Tensor, Tensor]", _Moments.apply(table, layout))
    final_mean = mean
    if name == "high":
        pairs = zip(layout.maps(table), pyramid.sizes, strict=False)
        final_mean = torch.cat([_upsampled_mean(x.permute(0, 2, 3, 1), size) for x, size in pairs])
    return _Statistics(norm, mean, variance, final_mean)


class _Moments(torch.autograd.Function):
    """Mean and (biased) variance of each channel of each map in a table (rows, C): (N·B, C) each."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, layout: Pyramid) -> tuple[Tensor, Tensor]:
        measure = _moments if _moments_work() else _public_moments
        mean, variance = (torch.stack(values) for values in zip(*map(measure, _images(layout, table)), strict=True))
        ctx.layout = layout
        ctx.save_for_backward(table, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> tuple[Tensor | None, ...]:
        table, mean = ctx.saved_tensors
        maps = _images(ctx.layout, table)
        count = mean.new_tensor([len(x) for x in maps])[:, None]
        slope = 2 * grad_variance / count
        intercept = grad_mean / count - slope * mean
        grad = torch.empty_like(table)
        for x, k, b, out in zip(maps, slope, intercept, _images(ctx.layout, grad), strict=True):
            torch.addcmul(b, x, k, out=out)
        return grad, None


def _moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the channels of pixels (N, C), by the operator behind BatchNorm's statistics."""
    mean, variance = torch.ops.aten.batch_norm_update_stats(pixels.t()[None, :, :, None], None, None, 0.0)
    return mean, variance


def _public_moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The same in documented operators, twenty times as slow where the channels are innermost."""
    variance, mean = torch.var_mean(pixels, 0, correction=0)
    return mean, variance


@functools.cache
def _moments_work() -> bool:
    """Whether this build of torch has the undocumented operator of ``_moments``, and it gives what we rely on."""

    def trial() -> bool:
        pixels = torch.arange(12.0).view(6, 2)
        try:
            return all(map(torch.allclose, _moments(pixels), _public_moments(pixels)))
        except (AttributeError, RuntimeError, TypeError):
            return False

    return undisturbed(trial)


# -- coefficients ------------------------------------------------------------------------------------------------------


def _group_norms(branches: Sequence[_Statistics]) -> tuple[Tensor, Tensor]:
    """GroupNorm of all maps as ``t -> scale t + shift`` per channel: (maps, C) each, in the order of the branches."""
    mean, variance, weight, bias = (
        torch.cat(values)
        for values in zip(
            *((b.mean, b.variance, b.norm.weight.expand_as(b.mean), b.norm.bias.expand_as(b.mean)) for b in branches),
            strict=True,
        )
    )
    grouped_mean, grouped_variance = (s.unflatten(1, (branches[0].norm.num_groups, -1)) for s in (mean, variance))
    centre = grouped_mean.mean(2, keepdim=True)
    spread = (grouped_variance + (grouped_mean - centre).square()).mean(2, keepdim=True)
    scale = (spread + branches[0].norm.eps).rsqrt().expand_as(grouped_mean).flatten(1) * weight
    return scale, bias - scale * centre.expand_as(grouped_mean).flatten(1)


def _upsampled_mean(maps: Tensor, size: Pair) -> Tensor:
    """Mean over the pixels of maps (B, h, w, C) upsampled to ``size``, (B, C), without making them."""
    vertical, horizontal = (_axis_weights(n, to, maps.dtype) for n, to in zip(maps.shape[1:3], size, strict=True))
    return torch.outer(vertical, horizontal).flatten() @ maps.flatten(1, 2)


@functools.lru_cache(maxsize=64)
def _axis_weights(size: int, upsampled: int, dtype: torch.dtype) -> Tensor:
    """How much each of ``size`` numbers counts in the mean of their linear interpolation at ``upsampled`` points."""
    with torch.inference_mode(False):
        unit = torch.eye(size, dtype=dtype, device="cpu")[:, None]
        return F.interpolate(unit, size=upsampled, mode="linear", align_corners=True).mean((1, 2))


def _pieces(block: DyHeadBlock, shift: Tensor, pooled: Tensor) -> list[Tensor]:
    """What follows the sum of the branches: the larger of two affine maps.

    Args:
        shift: (L·B, C), what is still to be added to the sum of the scaled maps.
        pooled: (L·B, C), the mean of that sum.

    Returns:
        The two maps, each (2, L·B, C): slope and intercept.
    """
    from dyhead_zoo.layers.dyhead import TaskAttention

    if not isinstance(block.task, TaskAttention):
        return [torch.stack((torch.ones_like(shift), shift)), torch.zeros_like(shift).expand(2, *shift.shape)]
    a1, b1, a2, b2 = (c.to(shift.dtype) for c in block.task.coefficients(pooled))
    return [torch.stack((a1, a1 * shift + b1)), torch.stack((a2, a2 * shift + b2))]
