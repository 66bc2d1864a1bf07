"""Check and measure the GPU code in one command: ``python hub/gpu_check.py [--csv FILE] [--tune]``.

Needs one NVIDIA GPU of compute capability 8.0 or newer, Triton and a C compiler; takes some minutes. Prints

1. errors of the operator's output and gradients against torchvision's in float64, and of a head of two blocks by six
   launches a block (``dyhead_cuda``) against its modules in float64, and fails (exit status 1) where they exceed what
   the type's rounding explains;
2. times (CUDA events, median and quartiles) and peak memory of the operator at 100x168, of the 6-block head at 800x1344
   with and without a CUDA graph, and of the head's training step; each for this package's kernels, for torchvision's
   operator and with dense convolutions in its place; of the head in inference also for ``dyhead_cuda``;
3. a floor for each: its multiply-adds at the rate that an 8192^3 matrix product reaches in the same run.

``--tune`` also times other tiles for the forward kernel and for a block's convolutions. Not yet run on a GPU by us.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.ops import deform_conv2d

from dyhead_zoo.engine.cuda_graph import CudaGraph
from dyhead_zoo.layers import dyhead, dyhead_cuda
from dyhead_zoo.ops import deform_conv_triton as op

LEVELS = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))  # of an image of 800x1344
CHECKED_LEVELS = ((51, 37), (26, 19), (13, 10), (7, 5), (4, 3))
CHANNELS = 256
DEVICE = "cuda"
BLOCKS = 6
PRECISIONS = (  # name, dtype, whether TF32 is allowed, error to expect, relative to the largest value
    ("bfloat16", torch.bfloat16, True, 2e-2),
    ("float16", torch.float16, True, 3e-3),
    ("TF32", torch.float32, True, 3e-3),
    ("float32", torch.float32, False, 1e-5),
)
TUNED_TILES = tuple(
    op.Tiles(*numbers)
    for numbers in (
        (64, 256, 32, 16, 3),
        (64, 256, 32, 8, 3),
        (64, 256, 64, 8, 2),
        (128, 256, 32, 8, 2),
        (128, 128, 32, 8, 3),
        (128, 128, 64, 8, 2),
        (64, 128, 64, 4, 3),
        (64, 128, 32, 8, 2),
    )
)


@dataclass(frozen=True)
class Row:
    """One measurement: milliseconds (median, quartiles), peak memory over the inputs, and the floor."""

    what: str
    variant: str
    dtype: str
    ms: float
    lower_ms: float
    upper_ms: float
    peak_mb: float
    floor_ms: float


def triton_conv(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    return op.triton_deform_conv2d(x, offset, mask, weight, bias, (stride,) * 2, (padding,) * 2, (1, 1))


def torchvision_conv(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0
) -> Tensor:
    """torchvision's operator wants one dtype throughout."""
    return deform_conv2d(x, offset.to(x), weight, bias, stride, padding, mask=mask.to(x))


def problem(
    size: tuple[int, int], stride: int, dtype: torch.dtype, *, batch: int = 1, groups: int = 1, spread: float = 2.0
) -> list[Tensor]:
    """x, offset, mask, weight and bias of a 3x3 convolution with padding 1, the offsets N(0, spread)."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    randn = partial(torch.randn, generator=generator, device=DEVICE)
    out_size = [(n - 1) // stride + 1 for n in size]
    x = randn(batch, CHANNELS, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = randn(CHANNELS, CHANNELS // groups, 3, 3).to(dtype) / (9 * CHANNELS / groups) ** 0.5
    offset, mask = randn(batch, 18 * groups, *out_size) * spread, randn(batch, 9 * groups, *out_size).sigmoid()
    return [x, offset, mask, weight.contiguous(memory_format=torch.channels_last), randn(CHANNELS).to(dtype)]


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor], **geometry: int) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, **geometry)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, leaves, grad_out)]


def check() -> bool:
    """Print the errors; whether all are small."""
    cases: dict[str, dict[str, Any]] = {
        "100x168": {"size": (100, 168), "stride": 1},
        "stride 2, batch 2": {"size": (51, 33), "stride": 2, "batch": 2},
        "4 groups": {"size": (25, 42), "stride": 1, "groups": 4},
        "far offsets": {"size": (7, 11), "stride": 1, "spread": 30.0},
        "zero offsets": {"size": (7, 11), "stride": 1, "spread": 0.0},
    }
    good = True
    print("largest error / largest value:", "output, grad x, offset, mask, weight, bias", sep="\n")
    for precision, dtype, allowed, tolerance in PRECISIONS:
        for name, case in cases.items():
            tensors = problem(dtype=dtype, **case)
            geometry = {"stride": case["stride"], "padding": 1}
            exact = with_gradients(torchvision_conv, [t.double() for t in tensors], **geometry)
            with tf32(allowed):
                ours = with_gradients(triton_conv, tensors, **geometry)
            errors = [
                ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in zip(ours, exact, strict=True)
            ]
            passed = all(error <= tolerance for error in errors)  # a NaN does not pass
            good &= passed
            verdict = "" if passed else "  WRONG"
            print(f"  {precision:9s} {name:18s}", *(f"{error:.1e}" for error in errors), verdict)
    return good


def blocks_of(head: dyhead.DyHead) -> list[dyhead.DyHeadBlock]:
    return [cast(dyhead.DyHeadBlock, block) for block in head.blocks]


def check_head() -> bool:
    """Print the errors of a head by ``dyhead_cuda``; whether all are small and DyHead chooses it."""
    good = True
    print("head by six launches a block: largest error / largest value of each level")
    for precision, dtype, allowed, tolerance in PRECISIONS:
        for convention in ("aligned", "reinterpret"):
            torch.manual_seed(0)
            head = dyhead.DyHead(CHANNELS, num_blocks=2, coarse_offsets=convention, zero_init_offset=False)
            head = head.to(DEVICE, dtype).to(memory_format=torch.channels_last).eval()
            features = [torch.randn(2, CHANNELS, *size, device=DEVICE).to(dtype) for size in CHECKED_LEVELS]
            exact = copy.deepcopy(head).double()  # which the kernels do not take, so the modules run
            with torch.no_grad(), tf32(allowed):
                chosen = dyhead_cuda.applies(blocks_of(head), features)
                ours = dyhead_cuda.forward(blocks_of(head), features)
                again = dyhead_cuda.forward(blocks_of(head), features)
                recorded = CudaGraph(lambda *levels, head=head: head(list(levels)), *features)(*features)
                reference = exact([x.double() for x in features])
            errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, reference, strict=True)]
            same = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(ours, again, recorded, strict=True))
            # offsets of the second block depend on what the first one rounded
            passed = chosen and same and all(error <= 3 * tolerance for error in errors)
            good &= passed
            verdict = "" if passed else f"  WRONG (chosen: {chosen}, the same every time: {same})"
            print(f"  {precision:9s} {convention:18s}", *(f"{error:.1e}" for error in errors), verdict)
    return good


def measure(function: Callable[[], object], reps: int) -> tuple[float, float, float, float]:
    """Milliseconds (median, lower and upper quartile) and peak memory in MB beyond what was there."""
    for _ in range(5):
        function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(reps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return median, lower, upper, (torch.cuda.max_memory_allocated() - before) / 1e6


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let matrix products and convolutions in float32 use TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def matmul_rate(dtype: torch.dtype, reps: int) -> float:
    """FLOP per millisecond of a large matrix product."""
    size = 8192
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * size**3 / measure(lambda: a @ b, reps)[0]


def convolution_flop(blocks: int) -> int:
    """Of a head: the offset convolution and the three branches of every level, 3x3."""
    pixels = [height * width for height, width in LEVELS]
    branches = sum(pixels) + sum(pixels[1:]) + sum(pixels[1:])  # mid; low, at the coarser level's size; high
    return blocks * 2 * 9 * CHANNELS * (sum(pixels) * 27 + branches * CHANNELS)


def measure_all(reps: int) -> list[Row]:
    rows = []
    for name, dtype, allowed, _ in PRECISIONS:
        with tf32(allowed):
            rate = matmul_rate(dtype, reps)
            for what, variant, function, flop in subjects(dtype):
                row = Row(what, variant, name, *measure(function, reps), flop / rate)
                print(
                    f"{row.what:24s} {row.variant:24s} {row.dtype:9s} {row.ms:8.3f} ms ({row.lower_ms:.3f} to "
                    f"{row.upper_ms:.3f})  floor {row.floor_ms:.3f} ms  peak {row.peak_mb:.0f} MB",
                    flush=True,
                )
                rows.append(row)
    return rows


def subjects(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object], float]]:
    """What to time: (what, variant, function, its multiply-adds in FLOP)."""
    convs: dict[str, Callable[..., Tensor]] = {"triton": triton_conv}
    if dtype != torch.bfloat16:  # which torchvision's operator does not know
        convs["torchvision"] = torchvision_conv
    yield from operator_subjects(dtype, convs)
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(1, CHANNELS, *size, generator=generator) for size in LEVELS]
    features = [x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last) for x in features]
    flop = convolution_flop(BLOCKS)
    for variant in (*convs, "dense"):
        head = dyhead.DyHead(CHANNELS, num_blocks=BLOCKS, spatial=variant != "dense", zero_init_offset=False)
        # in training mode the plain modules run, whatever shortcuts inference has
        head = head.to(DEVICE, dtype).to(memory_format=torch.channels_last).train()
        with mock.patch.object(dyhead, "modulated_deform_conv2d", convs.get(variant)):
            yield "head", variant, torch.no_grad()(partial(head, features)), flop
            graph = CudaGraph(lambda *levels, head=head: head(list(levels)), *features)
            yield "head", f"{variant}, CUDA graph", partial(graph, *features), flop
            yield "head training step", variant, partial(training_step, head, features), 3 * flop
    head = dyhead.DyHead(CHANNELS, num_blocks=BLOCKS, zero_init_offset=False).to(DEVICE, dtype)
    blocks = blocks_of(head.to(memory_format=torch.channels_last).eval())
    yield "head", "six launches a block", torch.no_grad()(partial(dyhead_cuda.forward, blocks, features)), flop
    graph = CudaGraph(lambda *levels: dyhead_cuda.forward(blocks, levels), *features)
    yield "head", "six launches, CUDA graph", partial(graph, *features), flop


def operator_subjects(
    dtype: torch.dtype, convs: dict[str, Callable[..., Tensor]]
) -> Iterator[tuple[str, str, Callable[[], object], float]]:
    size = LEVELS[0]
    flop = 2 * 9 * CHANNELS**2 * size[0] * size[1]
    tensors = problem(size, 1, dtype)
    grad_out = torch.randn_like(tensors[0])

    def dense(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, weight, bias, padding=padding)

    contestants: dict[str, Callable[..., Tensor]] = {**convs, "dense": dense}
    for variant, conv in contestants.items():
        yield "operator 100x168", variant, torch.no_grad()(partial(conv, *tensors, padding=1)), flop
        leaves = [t.detach().requires_grad_() for t in tensors]
        if variant == "dense":
            leaves[1:3] = [t.detach() for t in tensors[1:3]]

        def forward_backward(conv: Callable[..., Tensor] = conv, leaves: list[Tensor] = leaves) -> object:
            wanted = [t for t in leaves if t.requires_grad]
            return torch.autograd.grad(conv(*leaves, padding=1), wanted, grad_out)

        yield "operator, with backward", variant, forward_backward, 3 * flop


def training_step(head: torch.nn.Module, features: list[Tensor]) -> None:
    head.zero_grad(set_to_none=True)
    leaves = [x.detach().requires_grad_() for x in features]
    torch.stack([out.float().square().mean() for out in head(leaves)]).sum().backward()


def tune(reps: int) -> None:
    """Time the forward kernel at 100x168, and a block on all levels, with other tiles."""
    conv: Callable[..., Tensor] = triton_conv
    for dtype in (torch.bfloat16, torch.float32):
        tensors = problem(LEVELS[0], 1, dtype)
        features = [torch.randn(1, CHANNELS, *size, device=DEVICE).to(dtype) for size in LEVELS]
        features = [x.contiguous(memory_format=torch.channels_last) for x in features]
        block = dyhead.DyHeadBlock(CHANNELS, CHANNELS, zero_init_offset=False).to(DEVICE, dtype).eval()
        block = block.to(memory_format=torch.channels_last)
        subjects: tuple[tuple[Any, str, Callable[[], object]], ...] = (
            (op, "forward_tiles", partial(conv, *tensors, padding=1)),
            (dyhead_cuda, "convolution_tiles", partial(dyhead_cuda.forward, [block], features)),
        )
        for module, name, function in subjects:
            for tiles in TUNED_TILES:
                try:
                    with mock.patch.object(module, name, lambda *_, tiles=tiles: tiles), torch.no_grad(), tf32(True):
                        milliseconds = measure(function, reps)[0]
                except Exception as error:  # tiles that this GPU has no memory for
                    print(f"{name} {dtype} {tuple(tiles)}: {type(error).__name__}")
                else:
                    print(f"{name} {dtype} {tuple(tiles)}: {milliseconds:.3f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="also write the measurements to this file")
    parser.add_argument("--reps", type=int, default=50, help="measurements of each (50)")
    parser.add_argument("--tune", action="store_true", help="also time other tiles")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: this checks and measures GPU code", file=sys.stderr)
        return 2
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    machine = {"gpu": torch.cuda.get_device_name(), **versions}
    print(machine)
    good = check() & check_head()
    rows = measure_all(args.reps)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)] + list(machine))
            writer.writeheader()
            writer.writerows(asdict(row) | machine for row in rows)
    if args.tune:
        tune(args.reps)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
