"""Record a network once and replay it: for sizes that do not change, without the cost of launching its kernels.

Not yet run on a GPU by us; it follows PyTorch's documentation of CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CudaGraph:
    """``function(*inputs)`` for inputs of one shape, recorded as a CUDA graph; inference only.

    What ``function`` does must not depend on values in the tensors and must not wait for the GPU: ``detector.forward``
    and ``decode_tensors`` are such functions, ``decode`` and ``predict`` are not. The parameters are read where they
    lie, so changing them in place is seen and replacing them is not.

    Args:
        function: from tensors to tensors in any nesting.
        inputs: examples, on one CUDA device; later inputs must have the same shapes and dtypes.
        warmup: ordinary runs before recording, in which kernels are compiled and chosen.

    Raises:
        ValueError: an input is not on a CUDA device.
    """

    def __init__(self, function: Callable[..., Any], *inputs: Tensor, warmup: int = 3) -> None:
        for tensor in inputs:
            if tensor.device.type != "cuda":
                raise ValueError(f"a CUDA graph needs inputs on a CUDA device, got one on {tensor.device}")
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(warmup):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """Replay on ``inputs``. The tensors returned are always the same ones: the next call overwrites them.

        Raises:
            ValueError: number, shape or dtype of the inputs differ from those recorded.
        """
        given = [(tuple(tensor.shape), tensor.dtype) for tensor in inputs]
        recorded = [(tuple(tensor.shape), tensor.dtype) for tensor in self._inputs]
        if given != recorded:
            raise ValueError(f"recorded for inputs {recorded}, got {given}: record another graph for this size")
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._output
