"""DyHead without gradients, at about the price of its matrix products.

Gives what ``DyHead.forward`` gives, up to rounding, with less work around the convolutions:

* **Levels together.** All levels lie one below the other in one table of pixels, (sum of B·H_l·W_l, C). The three
  deformable convolutions of a block each sample that table once, for all levels that they serve: three chunked matrix
  products a block instead of thirteen (five levels), which matters most where the levels are small.
* **The end of a block as coefficients**, see ``dyhead_tail``.
* **Memory** that blocks use in turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dyhead_zoo.layers.dyhead_tail import NAMES, SAMPLED, branches_of, end_coefficients, end_loops, write_end
from dyhead_zoo.ops.deform_conv import Backend, cpu_loops
from dyhead_zoo.ops.deform_conv_cpu import as_matrix, chunk_pixels, packed_linear, sample_and_contract
from dyhead_zoo.ops.deform_conv_plan import Geometry, write_plan
from dyhead_zoo.ops.deform_conv_samples import INT32_LIMIT, samples_of
from dyhead_zoo.ops.pyramid import Pyramid

if TYPE_CHECKING:
    from dyhead_zoo.layers.dyhead import DyHeadBlock, Field, SpatialAttention

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
    fields = block.spatial.fields(pyramid.maps(table))
    convolved = {
        name: _convolve(block.spatial, name, table, pyramid, fields, workspace, out if name == "mid" else name)
        for name in branches_of(pyramid)
    }
    coefficients = end_coefficients(block, convolved, pyramid)
    own = convolved["mid"]
    if loops := end_loops(block, own.dtype):
        write_end(loops, pyramid, coefficients, convolved, own)
    else:
        _write_end(pyramid, coefficients, convolved, workspace)
    return own


def _convolve(
    spatial: SpatialAttention,
    name: str,
    table: Tensor,
    pyramid: Pyramid,
    fields: Sequence[Field | None],
    workspace: _Workspace,
    out_name: str,
) -> Tensor:
    """What the convolution of a branch gives for all the levels that it serves, (rows, C_out)."""
    conv, norm = getattr(spatial, f"conv_{name}"), getattr(spatial, f"norm_{name}")
    levels, layout = branches_of(pyramid)[name]
    geometry = Geometry((3, 3), (conv.stride, conv.stride), (1, 1), (1, 1))
    rows = layout.start(len(levels))
    loops = cpu_loops(cast(Backend, spatial.backend), table.dtype)
    shape = (min(chunk_pixels(), rows), geometry.taps * table.shape[1])
    samples = samples_of(table, geometry.taps, loops, workspace.take("samples", shape, table.dtype) if loops else None)
    index = workspace.take("index", (rows, geometry.taps, 4), torch.int32)
    weight = workspace.take("weight", index.shape, samples.weight_dtype)
    lengths = [layout.batch * layout.pixels(number) for number in range(len(levels))]
    for level, level_index, level_weight in zip(levels, index.split(lengths), weight.split(lengths), strict=True):
        source = level + SAMPLED[name]
        offset, mask = cast("Field", fields[level])
        if name == "high":
            offset, mask = (spatial._coarse(field, pyramid.sizes[source]) for field in (offset, mask))
        size, first_row = pyramid.sizes[source], pyramid.start(source)
        write_plan(level_index, level_weight, offset, mask, size, geometry, first_row, loops)
    matrix, bias = as_matrix(conv.weight).to(table.dtype), conv.bias.to(table.dtype)
    linear = (conv.packed if table.dtype == conv.weight.dtype else None) or packed_linear(matrix, rows)
    out = workspace.take(out_name, (rows, len(matrix)), norm.weight.dtype)
    products = out if table.dtype == out.dtype else workspace.take("products", out.shape, table.dtype)
    sample_and_contract(samples, index.flatten(), weight.flatten(), matrix, bias, linear, products)
    return out if products is out else out.copy_(products)


def _write_end(pyramid: Pyramid, coefficients: Tensor, convolved: Mapping[str, Tensor], workspace: _Workspace) -> None:
    """``dyhead_tail.write_end`` by PyTorch's operators; the output takes the place of "mid"."""
    for level, size in enumerate(pyramid.sizes):
        maps = {}
        for name, (levels, layout) in branches_of(pyramid).items():
            if level in levels:
                maps[name] = layout.maps(convolved[name])[level - levels.start]
        if "high" in maps:
            larger = workspace.take("upsampled", (pyramid.batch, *size, maps["high"].shape[1]), maps["high"].dtype)
            larger = larger.permute(0, 3, 1, 2)
            torch.ops.aten.upsample_bilinear2d.out(maps["high"], list(size), True, out=larger)
            maps["high"] = larger
        for image in range(pyramid.batch):
            rows = {name: x[image].permute(1, 2, 0).flatten(0, 1) for name, x in maps.items()}
            _combine(rows, coefficients[level * pyramid.batch + image])


def _combine(maps: Mapping[str, Tensor], coefficients: Tensor) -> None:
    """For one level of one image, maps (H·W, C) and coefficients (7, C)."""
    scales, (slope1, intercept1, slope2, intercept2) = dict(zip(NAMES, coefficients, strict=False)), coefficients[3:]
    for start in range(0, len(maps["mid"]), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        total = maps["mid"][rows].mul_(scales["mid"])
        for name in [name for name in NAMES[1:] if name in maps]:
            total.addcmul_(maps[name][rows], scales[name])
        torch.maximum(torch.addcmul(intercept1, total, slope1), torch.addcmul(intercept2, total, slope2), out=total)
