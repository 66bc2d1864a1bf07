"""DyHead without gradients, at about the price of its matrix products.

Gives what ``DyHead.forward`` gives, up to rounding, with less work around the convolutions:

* **Levels together.** All levels lie one below the other in one table of pixels, (sum of B·H_l·W_l, C). The three
  deformable convolutions of a block each sample that table once, for all levels that they serve: three chunked matrix
  products a block instead of thirteen (five levels), which matters most where the levels are small.
* **The tail as coefficients.** After a convolution, GroupNorm is an affine map of each channel, ``t -> A t + B``, that
  follows from the channel's mean and variance; so does the mean of the normalised map, which is all that ScaleAttention
  and TaskAttention look at. With upsampling, which commutes with the affine map and whose mean is a fixed weighted mean
  of the smaller map, every number that multiplies a map is known before any map is touched:

      out = max(a1 F + b1, a2 F + b2),    F = sum over the branches of (gate A / n) t + (gate B / n)

  so each map is read twice, once for its statistics and once, a few rows at a time, to be combined.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_zoo.ops.deform_conv import Backend, cpu_loops
from dyhead_zoo.ops.deform_conv_cpu import as_matrix, chunk_pixels, packed_linear, sample_and_contract
from dyhead_zoo.ops.deform_conv_plan import Geometry, write_plan
from dyhead_zoo.ops.deform_conv_samples import INT32_LIMIT, samples_of
from dyhead_zoo.ops.pyramid import Pyramid
from dyhead_zoo.ops.trial import undisturbed

if TYPE_CHECKING:
    from dyhead_zoo.layers.dyhead import DyHeadBlock, Field, SpatialAttention

Size = tuple[int, int]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_CHUNK_ROWS = 256  # rows that are combined at a time: what is read, made and written stays in the cache


class _Workspace:
    """Memory that the blocks of one pass use in turn, since fresh memory costs page faults.

    What ``take`` gives holds arbitrary numbers, and is valid until the same name is taken again.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        kept = self._tensors.get(name)
        if kept is None or len(kept) < count or kept.dtype != dtype:
            kept = self._tensors[name] = torch.empty(count, dtype=dtype, device="cpu")
        return kept[:count].view(shape)


class _Branch(NamedTuple):
    """One of the three convolutions on the levels that it serves.

    Attributes:
        levels: that it serves, N of them.
        norm: what follows it.
        out: (rows, C), what the convolution gave for all of them.
        maps: per level (B·H·W, C), the convolution's output, upsampled where that belongs to the branch.
        mean, variance: (N·B, C), of each channel before upsampling.
        final_mean: likewise, after it.
    """

    levels: range
    norm: nn.GroupNorm
    out: Tensor
    maps: list[Tensor]
    mean: Tensor
    variance: Tensor
    final_mean: Tensor


def applies(blocks: Sequence[DyHeadBlock], features: Sequence[Tensor]) -> bool:
    """Whether ``forward`` can stand in for the blocks: without gradients, on a CPU, for ``is_standard`` blocks.

    Not while compiling, exporting or tracing, nor for a pyramid whose sides do not halve from level to level.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    dtype = features[0].dtype
    if dtype not in _DTYPES or any(x.device.type != "cpu" or x.dtype != dtype for x in features):
        return False
    if any(type(x) is not Tensor for x in features):  # what FakeTensor and others compute must not be kept
        return False
    pyramid = Pyramid.of(features)
    samples = pyramid.start(len(features)) * 9 * 4
    return pyramid.halves and 0 < samples < INT32_LIMIT and all(block.is_standard for block in blocks)


def forward(blocks: Sequence[DyHeadBlock], features: Sequence[Tensor]) -> list[Tensor]:
    """The blocks, one after the other, where ``applies``.

    Under autocast the convolutions run in its dtype, everything else in that of ``features``.

    Args:
        blocks: of one DyHead.
        features: L x (B, C, H_l, W_l), fine to coarse.

    Returns:
        L x (B, C_out, H_l, W_l) in channels_last, views of one tensor.
    """
    pyramid = Pyramid.of(features)
    dtype = features[0].dtype
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    table = pyramid.table([x.detach() for x in features], dtype)
    workspace = _Workspace()
    for number, block in enumerate(blocks):
        table = _block(block, table.to(dtype), pyramid, workspace, f"table {number % 2}")
    return pyramid.maps(table.to(features[0].dtype))


def _block(block: DyHeadBlock, table: Tensor, pyramid: Pyramid, workspace: _Workspace, out: str) -> Tensor:
    """One block on a table (rows, C): another, (rows, C_out), the piece of the workspace named ``out``."""
    count, batch = len(pyramid.sizes), pyramid.batch
    fields = block.spatial.fields(pyramid.maps(table))
    branches = [_branch(block.spatial, "mid", table, pyramid, range(count), fields, workspace, out)]
    if count > 1:
        branches.append(_branch(block.spatial, "low", table, pyramid, range(1, count), fields, workspace, "low"))
        branches.append(_branch(block.spatial, "high", table, pyramid, range(count - 1), fields, workspace, "high"))
    maps = [level * batch + image for b in branches for level in b.levels for image in range(batch)]
    served = torch.tensor(maps, device=table.device)
    scale, shift = _group_norms(branches)
    pooled = torch.cat([branch.final_mean for branch in branches]) * scale + shift
    factor = pooled.new_tensor([1 / maps.count(number) for number in maps])[:, None]
    if block.scale is not None:
        factor = factor * block.scale(pooled[:, :, None, None]).flatten(1)  # the mean of a single pixel is that pixel
    sums = pooled.new_zeros(2, count * batch, pooled.shape[1])
    pieces = _pieces(block, *sums.index_add_(1, served, torch.stack((shift, pooled)) * factor))
    scales = (scale * factor).split([len(branch.mean) for branch in branches])
    for level in range(count):
        serving = [
            (branch.maps[level - branch.levels.start], rows[(level - branch.levels.start) * batch :])
            for branch, rows in zip(branches, scales, strict=True)
            if level in branch.levels
        ]
        for image in range(batch):
            rows = slice(image * pyramid.pixels(level), (image + 1) * pyramid.pixels(level))
            affine = [tuple(p[:, level * batch + image]) for p in pieces]
            _combine([m[rows] for m, _ in serving], [scale[image] for _, scale in serving], affine)
    return branches[0].out


def _branch(
    spatial: SpatialAttention,
    name: str,
    table: Tensor,
    pyramid: Pyramid,
    levels: range,
    fields: Sequence[Field | None],
    workspace: _Workspace,
    out_name: str,
) -> _Branch:
    """A convolution of the table on all the ``levels`` that it serves, and the statistics of what it gives."""
    conv, norm = getattr(spatial, f"conv_{name}"), getattr(spatial, f"norm_{name}")
    sources = [level + {"low": -1, "mid": 0, "high": 1}[name] for level in levels]
    geometry = Geometry((3, 3), (conv.stride, conv.stride), (1, 1), (1, 1))
    sizes = [pyramid.sizes[source if name == "high" else level] for level, source in zip(levels, sources, strict=True)]
    lengths = [pyramid.batch * height * width for height, width in sizes]
    loops = cpu_loops(cast(Backend, spatial.backend), table.dtype)
    shape = (min(chunk_pixels(), sum(lengths)), geometry.taps * table.shape[1])
    samples = samples_of(table, geometry.taps, loops, workspace.take("samples", shape, table.dtype) if loops else None)
    index = workspace.take("index", (sum(lengths), geometry.taps, 4), torch.int32)
    weight = workspace.take("weight", index.shape, samples.weight_dtype)
    parts = zip(levels, sources, index.split(lengths), weight.split(lengths), strict=True)
    for level, source, level_index, level_weight in parts:
        offset, mask = cast("Field", fields[level])
        if name == "high":
            offset, mask = (spatial._coarse(field, pyramid.sizes[source]) for field in (offset, mask))
        size, first_row = pyramid.sizes[source], pyramid.start(source)
        write_plan(level_index, level_weight, offset, mask, size, geometry, first_row, loops)
    matrix, bias = as_matrix(conv.weight).to(table.dtype), conv.bias.to(table.dtype)
    linear = (conv.packed if table.dtype == conv.weight.dtype else None) or packed_linear(matrix, sum(lengths))
    out = workspace.take(out_name, (sum(lengths), len(matrix)), norm.weight.dtype)
    products = out if table.dtype == out.dtype else workspace.take("products", out.shape, table.dtype)
    sample_and_contract(samples, index.flatten(), weight.flatten(), matrix, bias, linear, products)
    if products is not out:
        out.copy_(products)
    maps = [m.view(pyramid.batch, h, w, -1) for m, (h, w) in zip(out.split(lengths), sizes, strict=True)]
    mean, variance = (torch.cat(values) for values in zip(*map(_statistics, maps), strict=True))
    final_mean = mean
    if name == "high":
        targets = [pyramid.sizes[level] for level in levels]
        final_mean = torch.cat([_upsampled_mean(m, size) for m, size in zip(maps, targets, strict=True)])
        for place, (level, size) in enumerate(zip(levels, targets, strict=True)):
            larger = workspace.take(f"high {level}", (pyramid.batch, *size, len(matrix)), out.dtype)
            maps[place] = _upsample(maps[place], larger)
    return _Branch(levels, norm, out, [m.flatten(0, 2) for m in maps], mean, variance, final_mean)


def _statistics(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel of maps (B, H, W, C): (B, C) each."""
    moments = [_moments(image) if _moments_work() else _public_moments(image) for image in maps]
    mean, variance = (torch.stack(values) for values in zip(*moments, strict=True))
    return mean, variance


def _moments(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the channels of an image (H, W, C), by the operator behind BatchNorm's statistics."""
    mean, variance = torch.ops.aten.batch_norm_update_stats(image.permute(2, 0, 1)[None], None, None, 0.0)
    return mean, variance


def _public_moments(image: Tensor) -> tuple[Tensor, Tensor]:
    """The same in documented operators, twenty times as slow where the channels are innermost."""
    variance, mean = torch.var_mean(image, (0, 1), correction=0)
    return mean, variance


@functools.cache
def _moments_work() -> bool:
    """Whether this build of torch has the undocumented operator of ``_moments``, and it gives what we rely on."""

    def trial() -> bool:
        image = torch.arange(12.0).view(2, 3, 2)
        try:
            return all(map(torch.allclose, _moments(image), _public_moments(image)))
        except (AttributeError, RuntimeError, TypeError):
            return False

    return undisturbed(trial)


def _group_norms(branches: Sequence[_Branch]) -> tuple[Tensor, Tensor]:
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


def _upsample(maps: Tensor, out: Tensor) -> Tensor:
    """Maps (B, h, w, C) to ``out`` (B, H, W, C), bilinear, corners on corners."""
    size = list(out.shape[1:3])
    torch.ops.aten.upsample_bilinear2d.out(maps.permute(0, 3, 1, 2), size, True, out=out.permute(0, 3, 1, 2))
    return out


def _upsampled_mean(maps: Tensor, size: Size) -> Tensor:
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


def _combine(maps: Sequence[Tensor], scales: Sequence[Tensor], pieces: Sequence[tuple[Tensor, ...]]) -> None:
    """The first map becomes the larger of the two affine maps ``pieces`` of the sum of scale · map; (rows, C) each."""
    (slope1, intercept1), (slope2, intercept2) = pieces
    for start in range(0, len(maps[0]), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        total = maps[0][rows].mul_(scales[0])
        for other, scale in zip(maps[1:], scales[1:], strict=True):
            total.addcmul_(other[rows], scale)
        torch.maximum(torch.addcmul(intercept1, total, slope1), torch.addcmul(intercept2, total, slope2), out=total)
