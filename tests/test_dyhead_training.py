"""With gradients the levels of a DyHead block share a table of pixels; that changes nothing but the time it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dyhead_helpers import random_head, random_pyramid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dyhead_zoo.layers import dyhead
from dyhead_zoo.layers.dyhead import DyHead, SpatialAttention
from dyhead_zoo.ops import deform_conv_cpu


def head_of(channels: int = 16, dtype: torch.dtype = torch.float64, **arguments: Any) -> DyHead:
    return random_head(16, channels, **{"num_blocks": 2, **arguments}).to(dtype)


def pyramid(
    finest: tuple[int, int] = (9, 7), levels: int = 3, batch: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    return [x.to(dtype) for x in random_pyramid(finest, levels, batch)]


def results(head: nn.Module, features: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of all features and parameters for an arbitrary loss."""
    leaves = [x.detach().requires_grad_() for x in features]
    outputs = head(leaves)
    inputs = [*leaves, *head.parameters()]
    return [*outputs, *torch.autograd.grad(sum(out.sin().sum() for out in outputs), inputs, allow_unused=True)]


def assert_table_changes_nothing(head: DyHead, features: list[Tensor], tolerance: float = 1e-9) -> None:
    together = results(head, features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpatialAttention, "table", lambda *_: None)
        one_by_one = results(head, features)
    for ours, reference in zip(together, one_by_one, strict=True):
        if reference is None:  # a single level: the branches of its neighbours
            assert ours is None
        else:
            assert ours.dtype == reference.dtype
            assert (ours - reference).abs().max() <= tolerance * reference.abs().max().clamp(min=1)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of convolutions for each time that a table was convolved."""
    counts: list[int] = []
    original = dyhead.convolve_table

    def convolve_table(table: Tensor, convolutions: Any, *loops: Any) -> Any:
        counts.append(len(convolutions))
        return original(table, convolutions, *loops)

    monkeypatch.setattr(dyhead, "convolve_table", convolve_table)
    return counts


@settings(deadline=None, max_examples=20)
@given(
    finest=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    levels=st.integers(1, 4),
    batch=st.integers(1, 3),
    coarse_offsets=st.sampled_from(["aligned", "reinterpret"]),
    channels=st.sampled_from([16, 32]),
    chunk=st.integers(1, 300),
)
def test_gradients_are_those_of_each_level_alone(
    finest: tuple[int, int], levels: int, batch: int, coarse_offsets: Any, channels: int, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deform_conv_cpu, "chunk_pixels", lambda: 2 * chunk)
        head = head_of(channels, coarse_offsets=coarse_offsets, num_blocks=1)
        assert_table_changes_nothing(head, pyramid(finest, levels, batch))


def test_gradients_are_right() -> None:
    block = head_of(num_blocks=1).blocks[0]
    features = [x.requires_grad_() for x in pyramid((3, 2), 2, 1)]
    assert block.spatial.table(features) is not None
    assert torch.autograd.gradcheck(lambda *xs: tuple(block(list(xs))), features, fast_mode=True, atol=1e-5)


def test_a_block_lays_each_weight_out_once(tables: list[int]) -> None:
    results(head_of(), pyramid())
    assert tables == [3, 3]
    tables.clear()
    results(head_of(), pyramid(levels=1))
    assert tables == [1, 1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_holds_in_float32_and_under_autocast(layout: Any, tables: list[int]) -> None:
    head = head_of(dtype=torch.float32).to(memory_format=layout)
    features = [x.contiguous(memory_format=layout) for x in pyramid(dtype=torch.float32)]
    assert_table_changes_nothing(head, features, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert_table_changes_nothing(head, features, 0.1)
    assert len(tables) == 4


def test_frozen_parts_get_no_gradient(tables: list[int]) -> None:
    head = head_of()
    for part in (head.blocks[0].spatial.conv_low.weight, head.blocks[1].spatial.conv_high.bias):
        part.requires_grad_(False)
    outputs = head(pyramid())
    sum(out.sum() for out in outputs).backward()
    assert tables == [3, 3]
    assert {name for name, p in head.named_parameters() if p.grad is None} == {
        "blocks.0.spatial.conv_low.weight",
        "blocks.1.spatial.conv_high.bias",
    }


def test_checkpointed_blocks_share_tables_too(tables: list[int]) -> None:
    head, features = head_of(), pyramid()
    kept = results(head, features)
    head.grad_checkpointing = True
    for a, b in zip(results(head, features), kept, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert tables == [3] * 6  # twice kept, twice forward, twice again


def test_what_it_cannot_do_is_left_to_the_modules(tables: list[int]) -> None:
    features = pyramid()
    with torch.no_grad():
        head_of()(features)
    for change in (
        lambda head: setattr(head.blocks[0].spatial.conv_mid, "backend", "torchvision"),
        lambda head: head.blocks[0].spatial.conv_low.register_forward_hook(lambda *_: None),
        lambda head: head.blocks[0].spatial.conv_mid.register_full_backward_hook(lambda *_: None),
        lambda head: head.blocks[0].spatial.register_forward_pre_hook(lambda *_: None),
        lambda head: setattr(head.blocks[0].spatial.conv_mid, "forward", head.blocks[0].spatial.conv_mid.forward),
        lambda head: setattr(head.blocks[0].spatial, "conv_high", _Adapted(head.blocks[0].spatial.conv_high)),
        lambda head: head.requires_grad_(False),
    ):
        head = head_of(num_blocks=1)
        expected = head([x.clone() for x in features])
        assert tables.pop() == 3
        change(head)
        for a, b in zip(head(features), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
        assert not tables


class _Adapted(nn.Module):
    """Stands for an adapter around a convolution."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, *args: Tensor) -> Tensor:
        return self.conv(*args)


def test_an_infinite_border_spreads_as_level_by_level(tables: list[int]) -> None:
    head, features = head_of(num_blocks=1), pyramid()
    features[0][0, 3, 0, 2] = float("inf")
    together = head(features)
    assert not tables
    assert [out.isfinite().flatten(1).all(1).tolist() for out in together] == [
        [False, True],
        [False, True],
        [True, True],
    ]


def test_levels_that_do_not_halve_are_refused_as_ever() -> None:
    block = head_of(num_blocks=1).blocks[0]
    for sizes in (((16, 8), (7, 4)), ((16, 8), (8, 1)), ((16, 1), (8, 4))):
        features = [torch.randn(1, 16, *size, dtype=torch.float64, requires_grad=True) for size in sizes]
        with pytest.raises(ValueError, match="offset must have shape"):
            block(features)


def test_what_no_loss_depends_on_gets_no_gradient() -> None:
    head = head_of(num_blocks=1)
    head(pyramid())[0].sum().backward()  # the finest level has no finer neighbour
    spatial = head.blocks[0].spatial
    for parameter in (spatial.conv_low.weight, spatial.conv_low.bias):
        assert parameter.grad is None or not parameter.grad.any()  # the latter where levels end together
    assert spatial.conv_high.weight.grad.any()


def test_a_pass_with_fake_tensors_leaves_no_trace() -> None:
    head, features = head_of(), pyramid()
    expected = results(head, features)
    for gradients in (True, False):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.set_grad_enabled(gradients):
            head.eval()([mode.from_tensor(x) for x in features])
    for a, b in zip(results(head.train(), features), expected, strict=True):
        assert torch.equal(a, b)
