"""Compile our Triton kernels for a GPU that need not be there; print their names.

A process of its own for ``test_deform_conv_triton.py``: where kernels are interpreted they cannot be compiled. With an
argument, the compute capability as in 90, it compiles for 256 channels and prints what ptxas tells of registers and
spills, by which the tile sizes were chosen.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dyhead_zoo.layers import dyhead, dyhead_cuda
from dyhead_zoo.ops import deform_conv_triton as op
from dyhead_zoo.ops import deform_conv_triton_kernels as kernels

TILES = {
    "forward": op.forward_tiles,
    "backward_samples": op.backward_samples_tiles,
    "backward_weight": op.backward_weight_tiles,
}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
BLOCK_SIZES = ((6, 5), (3, 3), (2, 2), (1, 1), (1, 1))
ALWAYS_FLOAT32 = ("offset", "mask", "grad_x", "grad_offset", "grad_mask", "grad_weight")
ALIGNED = [["tt.divisibility", 16]]


def compile_kernel(name: str, dtype: torch.dtype, channels: int, capability: int) -> Any:
    """A 3x3 convolution with mask and contiguous offsets, of a map that is no special case."""
    kernel = getattr(kernels, name)
    tiles = TILES[name](dtype, channels, channels)
    fixed: dict[str, Any] = {"CONV": ((3, 3), (1, 1), (1, 1), (1, 1)), "IN": channels, "OUT": channels}
    fixed |= {"GROUPS": 1, "OFFSET_GROUPS": 1, "SEGMENT": channels, "PRECISION": "tf32x3"}
    fixed |= {"TILE_P": tiles.pixels, "TILE_O": tiles.outputs, "TILE_C": tiles.channels}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes = {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in fixed:
            signature[argument], constants[(i,)] = "constexpr", fixed[argument]
        elif argument.endswith("_strides"):
            signature[argument], constants[(i, 3)] = ("i32", "i32", "i32", "constexpr"), 1
        elif argument in ("sizes", "tiles_per_part"):
            signature[argument] = ("i32",) * 5 if argument == "sizes" else "i32"
        else:
            signature[argument] = "*fp32" if argument in ALWAYS_FLOAT32 else TYPES[dtype]
            attributes[(i,)] = ALIGNED
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


class NoGpu:
    """As much of a driver as Triton asks for until there is something to launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_blocks(dtype: torch.dtype, channels: int, capability: int) -> dict[str, Any]:
    """What blocks of all kinds launch on five levels, from the arguments of the launches: compiled, by name."""
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"coarse_offsets": "reinterpret"},
        {"scale": False, "task": False},
    )
    features = [torch.zeros(1, channels, *size, dtype=dtype) for size in BLOCK_SIZES]
    compiled: dict[str, Any] = {}

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        result = kernel.warmup(*arguments, grid=grid, **named)
        if all(result is not other for other in compiled.values()):
            again = sum(name.startswith(kernel.fn.__name__) for name in compiled)
            compiled[kernel.fn.__name__ + ("_again" if again else "")] = result

    triton.runtime.driver.set_active(NoGpu(capability))
    with mock.patch.object(dyhead_cuda, "_launch", launch), torch.no_grad():
        for kind in kinds:
            dyhead_cuda.forward([dyhead.DyHeadBlock(channels, channels, **kind).to(dtype).eval()], features)
    return compiled


def resources(compiled: Any) -> str:
    """Registers and stack of a thread; a stack other than 0 is spilled registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    usage = next(line for line in text.splitlines() if "REG:" in line)
    return f"{usage.strip()} dynamic shared memory {compiled.metadata.shared}"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        for kernel_name in TILES:
            compile_kernel(kernel_name, torch.bfloat16, 32, 80)
            print(kernel_name)
        print(*compile_blocks(torch.bfloat16, 32, 80), sep="\n")
    else:
        for kernel_dtype in TYPES:
            print(kernel_dtype)
            compiled_kernels = compile_blocks(kernel_dtype, 256, int(sys.argv[1]))
            for kernel_name in TILES:
                compiled_kernels[kernel_name] = compile_kernel(kernel_name, kernel_dtype, 256, int(sys.argv[1]))
            for kernel_name, compiled_kernel in compiled_kernels.items():
                print(f"{kernel_name:18s}", resources(compiled_kernel))
