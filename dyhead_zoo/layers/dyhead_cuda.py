"""DyHead without gradients on NVIDIA GPUs, a block in six launches.

Run module by module, a block on five levels launches a few hundred kernels, most of them on maps that leave the GPU
idle. Here, as in ``dyhead_inference`` on CPUs, all levels lie in one table of pixels, and what follows the convolutions
is folded into affine maps of the channels. With the kernels of ``ops/pyramid_triton_kernels.py`` a block is

    | launch           | what it computes, for all levels                                                             |
    |------------------|----------------------------------------------------------------------------------------------|
    | `predict_fields` | offsets and masks: the ordinary convolution of 27 outputs                                    |
    | `coarse_fields`  | the fields for the high branch, in either convention; not for a single level                 |
    | `convolve`       | the deformable convolutions of the three branches; and the statistics of each tile of pixels |
    | `statistics`     | mean and variance of each map, and its mean when upsampled                                   |
    | `coefficients`   | GroupNorm, scale attention, mean over the branches and dynamic ReLU, as numbers per channel  |
    | `combine`        | the sum of the maps, high upsampled as it is read, and the larger of two affine maps of it   |

and nothing else, if the weights have the dtype that is computed in and lie in channels_last; else they are copied, four
copies a block. No launch waits for the GPU, reads a table of sizes, or adds atomically: what comes out is the same
every time, and CUDA graphs can record it, after one ordinary run in which Triton compiles.

Checked in Triton's interpreter against the modules and compiled for compute capabilities 8.0 and 9.0, but **not yet run
on a GPU**: no speed is claimed. ``hub/gpu_check.py`` checks and measures it. The tiles were chosen by what the compiler
says of 256 channels: no kernel spills registers, for either capability, in float32 or bfloat16, and none takes more
than 99 KB of shared memory; at 9.0 products run by wgmma, their operands copied ahead of use in pieces of 16 bytes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dyhead_zoo.ops import deform_conv_triton as op
from dyhead_zoo.ops.deform_conv_cpu import as_matrix
from dyhead_zoo.ops.pyramid import Pyramid

if TYPE_CHECKING:
    from dyhead_zoo.layers.dyhead import CoarseOffsets, DeformConv3x3, DyHeadBlock, SpatialAttention

_FIELD = 27  # numbers of a pixel: offsets and masks
_BRANCHES = ("mid", "low", "high")
_INT32_LIMIT = 2**31
_TRIAL_TOLERANCE = {torch.float32: 0.01, torch.float16: 0.01, torch.bfloat16: 0.03}  # of the largest: rounding only
_TRIAL_FINEST = (9, 6)


class _Problem(NamedTuple):
    """What the kernels of a block have in common."""

    pyramid: Pyramid
    channels: int
    outputs: int
    dtype: torch.dtype

    @property
    def sizes(self) -> dict[str, int]:
        """The pyramid and how many levels it has, as the kernels take them."""
        height, width = self.pyramid.sizes[0]
        return {"batch": self.pyramid.batch, "height": height, "width": width, "LEVELS": len(self.pyramid.sizes)}

    @property
    def maps(self) -> int:
        return 3 * len(self.pyramid.sizes) - 2

    def tiles(self, pixels: int, first_level: int = 0) -> int:
        """Tiles of so many pixels of one image, of all images from a level on."""
        levels = range(first_level, len(self.pyramid.sizes))
        return self.pyramid.batch * sum(-(-self.pyramid.pixels(level) // pixels) for level in levels)


def applies(blocks: Sequence[DyHeadBlock], features: Sequence[Tensor]) -> bool:
    """Whether ``forward`` shall stand in for the blocks: without gradients, on a CUDA device, for standard blocks.

    Not while compiling, exporting or tracing; not where ``deform_conv_triton.obstacle`` names one, nor for blocks with
    parts of other types than their own (adapters, quantized layers) or with hooks on them; and not where a small trial
    on the device, once per process, device, dtype, precision, convention of offsets and number of channels, did not
    give what the modules give. It compiles the kernels (some seconds the first time), so it must not happen inside the
    capture of a CUDA graph.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    device = features[0].device
    if device.type != "cuda" or any(x.device != device or x.dtype != features[0].dtype for x in features):
        return False
    if _obstacle(blocks, features) is not None:
        return False
    dtype = _compute_dtype(features[0])
    kinds = {(*_shape(block), block.spatial.coarse_offsets) for block in blocks}
    return all(_passes_trial(device, dtype, *kind) for kind in kinds)


def _obstacle(blocks: Sequence[DyHeadBlock], features: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot run these blocks on these features, or None if they can."""
    reason = op._device_obstacle(features[0].device)
    if reason is not None:
        return reason
    if _compute_dtype(features[0]) not in op.DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {features[0].dtype}"
    for block in blocks:
        if not block.is_standard:
            return "a block has hooks, or parts that are not its own"
        if block.spatial.backend != "auto":
            return f"a block is to use the backend {block.spatial.backend!r}"
        if cast("nn.Conv2d", block.spatial.offset).weight.device != features[0].device:
            return "weights and features are on different devices"
    shapes = {(x.shape[0], x.shape[1]) for x in features}
    if shapes != {(features[0].shape[0], _shape(blocks[0])[0])}:
        return f"features of (images, channels) {sorted(shapes)} for weights of {_shape(blocks[0])[0]} channels"
    pyramid = Pyramid.of(features)
    if not 0 < 3 * pyramid.start(len(features)) * _FIELD < _INT32_LIMIT:
        return "there are no pixels, or more than int32 can count"
    return None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Of the convolutions and of the tables between the blocks: autocast's, where that is on."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _shape(block: DyHeadBlock) -> tuple[int, int]:
    """Input and output channels."""
    outputs, channels = cast("DeformConv3x3", block.spatial.conv_mid).weight.shape[:2]
    return channels, outputs


def _passes_trial(
    device: torch.device, dtype: torch.dtype, channels: int, outputs: int, coarse_offsets: CoarseOffsets
) -> bool:
    return _trial(device, dtype, channels, outputs, coarse_offsets, op._precision(dtype))


@functools.cache
def _trial(
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    outputs: int,
    coarse_offsets: CoarseOffsets,
    precision: str,
) -> bool:
    """Whether a block on a small pyramid comes out on this device as its modules compute it in float64 on the CPU.

    With the channels that are to be computed, since it depends on them whether a GPU has the registers and the memory
    that a kernel wants. Otherwise the answer is no, with a warning, not an error.
    """
    from dyhead_zoo.layers.dyhead import DyHeadBlock

    sizes = [tuple(-(-side // 2**level) for side in _TRIAL_FINEST) for level in range(3)]
    cpu = torch.device("cpu")
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]), cpu:
        torch.manual_seed(0)
        block, exact = (
            DyHeadBlock(channels, outputs, coarse_offsets=coarse_offsets, zero_init_offset=False).eval().to(kind)
            for kind in (dtype, torch.float64)
        )
        exact.load_state_dict(block.state_dict())
        features = [torch.randn(2, channels, *size).to(dtype) for size in sizes]
        with torch.autocast("cpu", enabled=False):
            expected = exact([x.double() for x in features])
        try:
            with torch.autocast(device.type, enabled=False):
                found = forward([block.to(device)], [x.to(device) for x in features])
            errors = [((a.cpu() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)]
        except Exception as error:  # whatever a compiler, a driver or a launch can raise
            warnings.warn(f"DyHead module by module: Triton's block failed on {device}: {error!r}", stacklevel=2)
            return False
    if not all(error <= _TRIAL_TOLERANCE[dtype] for error in errors):  # a NaN does not pass
        warnings.warn(f"DyHead module by module: Triton's block errs on {device}: {errors}", stacklevel=2)
        return False
    return True


def forward(blocks: Sequence[DyHeadBlock], features: Sequence[Tensor]) -> list[Tensor]:
    """The blocks, one after the other, where ``applies``.

    Under autocast the convolutions run in its dtype; sums, statistics and coefficients are float32 in any case, and so
    are the offsets, which the modules round to the dtype of their convolution.

    Args:
        blocks: of one DyHead.
        features: L x (B, C, H_l, W_l), fine to coarse, whose sides halve from level to level, rounded up.

    Returns:
        L x (B, C_out, H_l, W_l) in channels_last, of the dtype of ``features``, views of one tensor.
    """
    pyramid = Pyramid.of(features)
    dtype = _compute_dtype(features[0])
    table = torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in features]).to(dtype)
    with torch.cuda.device_of(table):
        for block in blocks:
            problem = _Problem(pyramid, *_shape(block), dtype)
            table = _block(block, table, problem, features[0].dtype if block is blocks[-1] else dtype)
    return pyramid.maps(table)


def _block(block: DyHeadBlock, table: Tensor, problem: _Problem, out_dtype: torch.dtype) -> Tensor:
    """One block on a table (rows, C): another, (rows, C_out)."""
    fields = _fields(block.spatial, table, problem)
    maps, partial = _convolve(block.spatial, table, fields, problem)
    scales, pieces = _coefficients(block, partial, problem)
    return _combine(maps, scales, pieces, problem, out_dtype)


def _fields(spatial: SpatialAttention, table: Tensor, problem: _Problem) -> Tensor:
    """(rows of the table + rows of all but its finest level, 27): the fields of each level, then those for coarser."""
    from dyhead_zoo.ops import pyramid_triton_kernels as kernels

    offset = cast("nn.Conv2d", spatial.offset)
    rows, finest = len(table), problem.pyramid.start(1)
    fields = table.new_empty((2 * rows - finest, _FIELD), dtype=torch.float32)
    tiles = field_tiles(problem.dtype, problem.channels)
    _launch(
        kernels.predict_fields,
        (problem.tiles(tiles.pixels),),
        table,
        _matrix(offset.weight, problem.dtype),
        offset.bias,
        fields,
        **problem.sizes,
        IN=problem.channels,
        **_product(tiles, problem.dtype),
    )
    if rows > finest:
        _launch(
            kernels.coarse_fields,
            (problem.tiles(_COARSE_PIXELS, first_level=1),),
            fields,
            fields[rows:],
            **problem.sizes,
            REINTERPRET=spatial.coarse_offsets == "reinterpret",
            TILE_P=_COARSE_PIXELS,
        )
    return fields


def _convolve(spatial: SpatialAttention, table: Tensor, fields: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
    """The maps of all branches and levels, (rows of the maps, C_out), and statistics of tiles, (3, tiles, C_out)."""
    from dyhead_zoo.ops import pyramid_triton_kernels as kernels

    convs = [getattr(spatial, f"conv_{branch}") for branch in _BRANCHES]
    rows, finest = len(table), problem.pyramid.start(1)
    tiles = convolution_tiles(problem.dtype, problem.channels, problem.outputs)
    count = problem.tiles(tiles.pixels) + 2 * problem.tiles(tiles.pixels, first_level=1)
    maps = table.new_empty((3 * rows - 2 * finest, problem.outputs))
    partial = table.new_empty((3, count, problem.outputs), dtype=torch.float32)
    _launch(
        kernels.convolve,
        (count, -(-problem.outputs // tiles.outputs)),
        table,
        fields,
        tuple(_matrix(conv.weight, problem.dtype) for conv in convs),
        tuple(conv.bias for conv in convs),
        maps,
        partial,
        **problem.sizes,
        IN=problem.channels,
        OUT=problem.outputs,
        **_product(tiles, problem.dtype),
    )
    return maps, partial


def _coefficients(block: DyHeadBlock, partial: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
    """What the maps are multiplied by, (maps · B, C_out), and the two affine maps of their sum, (4, L · B, C_out)."""
    from dyhead_zoo.layers.dyhead import TaskAttention
    from dyhead_zoo.ops import pyramid_triton_kernels as kernels

    batch, levels = problem.pyramid.batch, len(problem.pyramid.sizes)
    moments = partial.new_empty((3, problem.maps * batch, problem.outputs))
    _launch(
        kernels.statistics,
        (problem.maps * batch, -(-problem.outputs // _STATISTICS_CHANNELS)),
        partial,
        moments,
        **problem.sizes,
        OUT=problem.outputs,
        TILE_P=convolution_tiles(problem.dtype, problem.channels, problem.outputs).pixels,
        TILE_T=_STATISTICS_TILES,
        TILE_C=_STATISTICS_CHANNELS,
    )
    norms = [cast("nn.GroupNorm", getattr(block.spatial, f"norm_{branch}")) for branch in _BRANCHES]
    gate = None if block.scale is None else (block.scale.fc.weight, block.scale.fc.bias)
    task, hidden = None, 0
    if isinstance(block.task, TaskAttention):
        first, second = block.task.fc1, block.task.fc2
        task, hidden = (first.weight, first.bias, second.weight, second.bias), first.out_features
    scales = torch.empty_like(moments[0])
    pieces = moments.new_empty((4, levels * batch, problem.outputs))
    groups = norms[0].num_groups
    _launch(
        kernels.coefficients,
        (levels * batch,),
        moments,
        tuple(parameter for norm in norms for parameter in (norm.weight, norm.bias)),
        gate,
        task,
        scales,
        pieces,
        batch=batch,
        LEVELS=levels,
        OUT=problem.outputs,
        GROUPS=groups,
        EPS=tuple(norm.eps for norm in norms),
        HIDDEN=hidden,
        TILE_G=_power_of_two(problem.outputs // groups),
        TILE_H=16,
        num_warps=8,
    )
    return scales, pieces


def _combine(maps: Tensor, scales: Tensor, pieces: Tensor, problem: _Problem, dtype: torch.dtype) -> Tensor:
    """The table of the block's output, (rows, C_out)."""
    from dyhead_zoo.ops import pyramid_triton_kernels as kernels

    out = maps.new_empty((problem.pyramid.start(len(problem.pyramid.sizes)), problem.outputs), dtype=dtype)
    channels = min(_power_of_two(problem.outputs), _COMBINE_CHANNELS)
    _launch(
        kernels.combine,
        (problem.tiles(_COMBINE_PIXELS), -(-problem.outputs // channels)),
        maps,
        scales,
        pieces,
        out,
        **problem.sizes,
        OUT=problem.outputs,
        TILE_P=_COMBINE_PIXELS,
        TILE_C=channels,
    )
    return out


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """Every launch of this module."""
    kernel[grid](*arguments, **named)


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(O, C, 3, 3) -> (O, 9·C): a view where dtype and layout are right, else one copy."""
    return as_matrix(weight.to(dtype, memory_format=torch.channels_last))


# -- tiles -------------------------------------------------------------------------------------------------------------

_COARSE_PIXELS = 32
_STATISTICS_TILES, _STATISTICS_CHANNELS = 32, 32
_COMBINE_PIXELS, _COMBINE_CHANNELS = 16, 256


def field_tiles(dtype: torch.dtype, channels: int) -> op.Tiles:
    """Tiles of ``predict_fields``."""
    return op.Tiles(64, 32, op._extent(channels, 32 if dtype == torch.float32 else 64), warps=4, stages=3)


def convolution_tiles(dtype: torch.dtype, channels: int, outputs: int) -> op.Tiles:
    """Tiles of ``convolve``: all outputs at once where they fit, for then each sample is taken only once."""
    wide, stages = (128, 2) if dtype == torch.float32 else (256, 3)
    tile = op._extent(outputs, wide)
    return op.Tiles(64, tile, op._extent(channels, 32), warps=max(4, tile // 16), stages=stages)


def _product(tiles: op.Tiles, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels with a matrix product take by the same names."""
    return {
        "TILE_P": tiles.pixels,
        "TILE_O": tiles.outputs,
        "TILE_C": tiles.channels,
        "PRECISION": op._precision(dtype),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _power_of_two(count: int) -> int:
    """The least that is no smaller."""
    return 1 << (count - 1).bit_length()
