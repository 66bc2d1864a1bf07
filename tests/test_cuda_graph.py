from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dyhead_zoo.engine.cuda_graph import CudaGraph


def test_inputs_elsewhere_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"got one on cpu"):
        CudaGraph(torch.relu, torch.zeros(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replays_on_new_inputs_of_the_same_shape() -> None:
    def double(x: Tensor) -> list[Tensor]:
        return [x * 2]

    graph = CudaGraph(double, torch.zeros(3, device="cuda"))
    assert graph(torch.arange(3.0, device="cuda"))[0].tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="another graph"):
        graph(torch.zeros(4, device="cuda"))
