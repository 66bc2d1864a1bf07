"""The fused DyHead gives what the plain one gives, and stands aside where it must."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from dyhead_helpers import random_head, random_pyramid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dyhead_zoo.engine.benchmark_parts import numba_works
from dyhead_zoo.layers import dyhead_inference, dyhead_tail
from dyhead_zoo.layers.dyhead import DeformConv3x3, DyHead, pack_weights


def head_of(in_channels: int = 16, **arguments: Any) -> DyHead:
    """In evaluation mode."""
    return random_head(in_channels, 32, **{"num_blocks": 2, **arguments}).eval()


def pyramid(
    finest: tuple[int, int] = (13, 9), levels: int = 3, batch: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [x.to(dtype) for x in random_pyramid(finest, levels, batch)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that the fused path was taken."""
    taken: list[int] = []
    original = dyhead_inference.forward

    def forward(*args: Any) -> list[Tensor]:
        taken.append(1)
        return original(*args)

    monkeypatch.setattr(dyhead_inference, "forward", forward)
    return taken


def assert_fused_is_plain(head: DyHead, features: list[Tensor], tolerance: float) -> None:
    with torch.no_grad():
        assert dyhead_inference.applies(list(head.blocks), features)
        fused = head(features)
        head.fused = False
        plain = head(features)
    for ours, reference in zip(fused, plain, strict=True):
        assert ours.shape == reference.shape and ours.dtype == reference.dtype
        assert (ours - reference).abs().max() <= tolerance * reference.abs().max()


@settings(deadline=None, max_examples=25)
@given(
    finest=st.tuples(st.integers(1, 26), st.integers(1, 26)),
    levels=st.integers(1, 5),
    batch=st.integers(1, 3),
    scale=st.booleans(),
    task=st.booleans(),
    coarse_offsets=st.sampled_from(["aligned", "reinterpret"]),
    rows=st.integers(1, 600),
)
def test_fused_is_plain(
    finest: tuple[int, int], levels: int, batch: int, scale: bool, task: bool, coarse_offsets: Any, rows: int
) -> None:
    head = head_of(scale=scale, task=task, coarse_offsets=coarse_offsets).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dyhead_inference, "_CHUNK_ROWS", rows)
        assert_fused_is_plain(head, pyramid(finest, levels, batch, torch.float64), 1e-10)


@pytest.mark.parametrize("coarse_offsets", ["aligned", "reinterpret"])
def test_fused_is_plain_in_float32(coarse_offsets: Any) -> None:
    assert_fused_is_plain(head_of(coarse_offsets=coarse_offsets), pyramid((25, 13), 5), 1e-5)


@pytest.mark.parametrize(
    "backend", ["bag", pytest.param("numba", marks=pytest.mark.skipif(not numba_works(), reason="needs numba"))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_takes_the_backend_of_its_convolutions(
    backend: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, taken = head_of().to(dtype), []
    original = dyhead_inference.samples_of
    monkeypatch.setattr(dyhead_inference, "samples_of", lambda *args: taken.append(type(args[2])) or original(*args))
    for part in head.modules():
        if isinstance(part, DeformConv3x3):
            part.backend = backend
    assert_fused_is_plain(head, pyramid(dtype=dtype), 1e-5)
    assert set(taken) == {ModuleType if backend == "numba" else type(None)}


def test_mixed_backends_are_left_to_the_modules() -> None:
    head, features = head_of(), pyramid()
    head.blocks[1].spatial.conv_low.backend = "torchvision"
    with torch.no_grad():
        assert not dyhead_inference.applies(list(head.blocks), features)


def test_fused_is_plain_for_channels_last_and_non_contiguous_features() -> None:
    features = [x.double() for x in pyramid()]
    for change in (
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    ):
        assert_fused_is_plain(head_of().double(), [change(x) for x in features], 1e-10)


def test_fused_leaves_its_input_alone() -> None:
    features = [x.contiguous(memory_format=torch.channels_last) for x in pyramid(levels=1)]
    before = [x.clone() for x in features]
    with torch.inference_mode():
        head_of()(features)
    assert all(torch.equal(a, b) for a, b in zip(features, before, strict=True))


def test_fused_under_autocast_is_as_close_as_bfloat16_allows(calls: list[int]) -> None:
    head, features = head_of(), pyramid()
    with torch.no_grad():
        exact = head(features)
        with torch.autocast("cpu", torch.bfloat16):
            fused = head(features)
            head.fused = False
            plain = head(features)
    assert len(calls) == 2
    for a, b, reference in zip(fused, plain, exact, strict=True):
        assert a.dtype == torch.float32
        error = [float((x.float() - reference).square().mean().sqrt() / reference.std()) for x in (a, b)]
        assert 0 < error[0] < 1.5 * error[1] + 0.01


def test_an_image_gives_the_same_alone_and_in_a_batch() -> None:
    head, features = head_of().double(), [x.double() for x in pyramid(batch=3)]
    with torch.no_grad():
        together, alone = head(features), head([x[1:2] for x in features])
    for a, t in zip(alone, together, strict=True):
        torch.testing.assert_close(a, t[1:2], atol=1e-10, rtol=1e-10)


def test_it_is_used_for_inference_only(calls: list[int]) -> None:
    head, features = head_of(), pyramid()
    with torch.no_grad():
        head(features)
    with torch.inference_mode():
        head(features)
    assert len(calls) == 2
    assert all(x.requires_grad for x in head(features))  # gradients are on
    with torch.no_grad():
        head.train()(features)
        head.eval()(features, [])  # the attentions are asked for
        head.fused = False
        head(features)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [({"spatial": False}, [(8, 8), (4, 4)]), ({}, [(8, 8), (3, 3)]), ({}, [(8, 8), (8, 8)])],
    ids=["ordinary convolutions", "not half", "equal"],
)
def test_what_it_cannot_do_is_left_to_the_modules(arguments: Any, sizes: list[tuple[int, int]]) -> None:
    features = [torch.zeros(1, 16, *size) for size in sizes]
    with torch.no_grad():
        assert not dyhead_inference.applies(list(head_of(**arguments).blocks), features)


def test_hooks_are_heard() -> None:
    head, features, heard = head_of(), pyramid(), []
    handle = head.blocks[1].scale.register_forward_hook(lambda *_: heard.append(1))
    with torch.no_grad():
        head(features)
        handle.remove()
        head(features)
    assert len(heard) == 2 + 3 + 2  # branches of the three levels


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("task", nn.SiLU()),
        ("spatial.norm_low", nn.GroupNorm(4, 32)),
        ("spatial.norm_low.eps", 10.0),
        ("spatial.conv_mid.forward", lambda x, *_: x[:, :1].expand(-1, 32, -1, -1)),
    ],
)
def test_other_parts_are_heard(part: str, other: Any) -> None:
    head, features = head_of(num_blocks=1), pyramid()
    parent, _, name = f"blocks.0.{part}".rpartition(".")
    setattr(head.get_submodule(parent), name, other)
    with torch.no_grad():
        ours = head(features)
        head.fused = False
        assert all(map(torch.equal, ours, head(features)))


def test_export_sees_the_modules(calls: list[int]) -> None:
    head, features = head_of(num_blocks=1), pyramid(batch=1)
    with torch.no_grad():
        program = torch.export.export(head, (features,))
        traced = program.module()(features)
        assert not calls
        fused = head(features)
    assert len(calls) == 1
    for a, b in zip(traced, fused, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_it_follows_changed_weights() -> None:
    head, features = head_of(), pyramid()
    with torch.no_grad():
        before = head(features)
        head.blocks[0].spatial.conv_mid.weight.data.mul_(2)
        after = head(features)
        head.fused = False
        plain = head(features)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(after[0], plain[0], atol=1e-5, rtol=1e-4)


def test_works_without_the_undocumented_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(image: Tensor) -> Any:
        raise AttributeError("no such operator")

    dyhead_tail._moments_work.cache_clear()
    monkeypatch.setattr(dyhead_tail, "_moments", missing)
    try:
        assert_fused_is_plain(head_of(), pyramid(), 1e-5)
    finally:
        dyhead_tail._moments_work.cache_clear()


def test_packed_weights_give_the_same_until_they_change() -> None:
    head, features = head_of(), pyramid()
    convs = [part for part in head.modules() if isinstance(part, DeformConv3x3)]
    pack_weights(head)
    assert all(conv.packed is not None for conv in convs)
    assert_fused_is_plain(head, features, 1e-5)
    copied = copy.deepcopy(head)
    assert all(conv.packed is None for conv in copied.modules() if isinstance(conv, DeformConv3x3))

    head.fused = True
    with torch.no_grad():
        for conv in convs:
            conv.weight.mul_(3)
    assert all(conv.packed is None for conv in convs)
    assert_fused_is_plain(head, features, 1e-5)


def test_a_single_level_needs_the_middle_branch_only(calls: list[int]) -> None:
    head, features = head_of(), pyramid(levels=1)
    with torch.no_grad():
        expected = head(features)
    for block in head.blocks:
        for part in ("conv_low", "norm_low", "conv_high", "norm_high"):
            delattr(block.spatial, part)
    assert_fused_is_plain(head, features, 1e-5)
    with torch.no_grad():
        head.fused = True
        assert torch.equal(head(features)[0], expected[0])
    assert len(calls) == 3
