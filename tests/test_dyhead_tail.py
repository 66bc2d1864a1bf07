"""The end of a block as coefficients, and the loops that apply them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dyhead_helpers import random_head, random_pyramid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")
from dyhead_zoo.layers import dyhead_loops, dyhead_tail
from dyhead_zoo.layers.dyhead import DyHead
from dyhead_zoo.ops.pyramid import Pyramid

Size = tuple[int, int]


def end(branches: dyhead_loops.Branches, coefficients: Tensor) -> Tensor:
    """The formula, by PyTorch's operators."""
    size, coarse, mid, low, high = branches
    total = coefficients[0] * mid
    if low is not None:
        total = total + coefficients[1] * low
    if high is not None:
        x = high.view(1, *coarse, -1).permute(0, 3, 1, 2)
        x = F.interpolate(x, size, mode="bilinear", align_corners=True)
        total = total + coefficients[2] * x.permute(0, 2, 3, 1).flatten(0, 2)
    return torch.maximum(coefficients[3] * total + coefficients[4], coefficients[5] * total + coefficients[6])


def gradients_of(head: DyHead, features: list[Tensor]) -> list[Any]:
    """Outputs, and gradients of features and parameters; None for what no output depends on."""
    leaves = [x.detach().requires_grad_() for x in features]
    outputs = head(leaves)
    inputs = [*leaves, *head.parameters()]
    return [*outputs, *torch.autograd.grad(sum(x.sin().sum() for x in outputs), inputs, allow_unused=True)]


def without_loops(head: DyHead, features: list[Tensor]) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dyhead_tail, "end_loops", lambda *_: None)
        return gradients_of(head, features)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each block whose end was one step."""
    calls: list[int] = []
    original = dyhead_tail.end_with_gradients
    monkeypatch.setattr(dyhead_tail, "end_with_gradients", lambda *args: calls.append(1) or original(*args))
    return calls


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    coarse=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    channels=st.integers(1, 40),
    low=st.booleans(),
    high=st.booleans(),
    seed=st.integers(0, 99),
)
def test_loops_give_the_formula_and_its_gradients(
    size: Size, coarse: Size, channels: int, low: bool, high: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels, fewer = size[0] * size[1], coarse[0] * coarse[1]
    mid, finer, coarser, coefficients, grad_out = (
        torch.randn(rows, channels, generator=generator, dtype=torch.float64)
        for rows in (pixels, pixels, fewer, 7, pixels)
    )
    branches = dyhead_loops.Branches(size, coarse, mid, finer if low else None, coarser if high else None)
    inputs = [t.requires_grad_() for t in (*branches[2:], coefficients) if t is not None]
    expected = end(branches, coefficients)
    gradients = torch.autograd.grad(expected, inputs, grad_out)
    with torch.no_grad():
        out = torch.empty_like(expected)
        dyhead_loops.combine(branches, coefficients, out)
        maps = [None if t is None else torch.full_like(t, torch.nan) for t in branches[2:]]
        ours = [*(t for t in maps if t is not None), torch.full_like(coefficients, torch.nan)]
        dyhead_loops.write_gradients(
            branches, coefficients, grad_out, dyhead_loops.Branches(size, coarse, *maps), ours[-1]
        )
        for a, b in zip([out, *ours], [expected, *gradients], strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
        dyhead_loops.combine(branches, coefficients, mid)
        assert torch.equal(mid, out)  # in place


def test_sums_do_not_depend_on_the_number_of_threads(threads: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    mid, high, grad, coefficients = (torch.randn(n, 64, generator=generator) for n in (40 * 40, 20 * 20, 40 * 40, 7))
    branches = dyhead_loops.Branches((40, 40), (20, 20), mid, None, high)
    found = []
    for count in (1, 2, 3):
        threads(count)
        targets = dyhead_loops.Branches(
            *branches[:2], *(None if t is None else torch.empty_like(t) for t in branches[2:])
        )
        sums, out = torch.empty_like(coefficients), torch.empty_like(mid)
        dyhead_loops.combine(branches, coefficients, out)
        dyhead_loops.write_gradients(branches, coefficients, grad, targets, sums)
        found.append((out, targets.mid, targets.high, sums))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_loops_refuse_what_they_would_misread() -> None:
    mid, coefficients = torch.zeros(4, 3), torch.zeros(7, 3)
    branches = dyhead_loops.Branches((2, 2), (1, 1), mid, None, None)
    for wrong in (coefficients.double(), torch.zeros(3, 7).t()):
        with pytest.raises(TypeError, match="expected a plain contiguous"):
            dyhead_loops.combine(branches, wrong, mid)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("task", [True, False])
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_a_head_trains_as_by_its_modules(scale: bool, task: bool, levels: int, ends: list[int]) -> None:
    head = random_head(16, 32, num_blocks=2, scale=scale, task=task).double()
    features = [x.double() for x in random_pyramid((9, 6), levels, 2)]
    ours = gradients_of(head, features)
    assert len(ends) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dyhead_tail, "end_loops", lambda *_: None)
        expected = gradients_of(head, features)
    for a, b in zip(ours, expected, strict=True):
        if a is None or b is None:
            assert all(t is None or not t.any() for t in (a, b))
        else:
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_it_keeps_the_maps_and_little_else() -> None:
    head, features = random_head(64, 64, num_blocks=1).float(), random_pyramid((40, 40), 3, 1, 64)

    def kept() -> int:
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = head([x.requires_grad_() for x in features])
            total = sum(storages.values())
        assert outputs[0].requires_grad
        return total

    ours = kept()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dyhead_tail, "end_loops", lambda *_: None)
        assert ours < 0.65 * kept()


def test_who_watches_a_part_is_heard(ends: list[int]) -> None:
    head, features, heard = random_head(16, 16, num_blocks=1), random_pyramid((8, 8), 3, 1), []
    features = [x.requires_grad_() for x in features]
    for part, calls in ((head.blocks[0].scale, 7), (head.blocks[0].spatial.norm_mid, 3), (head.blocks[0].task.fc1, 3)):
        handle = part.register_forward_hook(lambda *_: heard.append(1))
        head(features)
        handle.remove()
        assert len(heard) == calls and not ends
        heard.clear()
    head.blocks[0].register_forward_hook(lambda *_: heard.append(1))
    head(features)
    assert heard == ends == [1]


def test_under_autocast_the_modules_do_it(ends: list[int]) -> None:
    head, features = random_head(16, 16, num_blocks=1), random_pyramid((8, 8), 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        head([x.requires_grad_() for x in features])
    assert not ends


def test_loops_that_give_wrong_numbers_are_not_used(monkeypatch: pytest.MonkeyPatch, ends: list[int]) -> None:
    head, features = random_head(16, 16, num_blocks=1), random_pyramid((8, 8), 2, 1)
    expected = without_loops(head, features)
    dyhead_tail._loops_work.cache_clear()
    monkeypatch.setattr(dyhead_loops, "combine", lambda branches, coefficients, out: out.zero_())
    try:
        with pytest.warns(UserWarning, match="numba's loops for it fail"):
            gradients_of(head, features)
        assert all(map(torch.equal, gradients_of(head, features), expected))
        assert not ends
    finally:
        dyhead_tail._loops_work.cache_clear()


def test_a_block_takes_the_table_of_the_one_before() -> None:
    table = torch.randn(21, 4)
    pyramid = Pyramid(1, ((4, 4), (2, 2), (1, 1)))
    maps = pyramid.maps(table)
    for same in (maps, [x.detach() for x in maps], pyramid.maps_of_their_own(table)):
        found = pyramid.table_behind(same)
        assert found is not None and found.data_ptr() == table.data_ptr() and torch.equal(found, table)
    for others in (
        [maps[0], maps[1], maps[2].clone()],
        [maps[0].transpose(2, 3), *maps[1:]],
        [maps[0], maps[2], maps[1]],
        [x.contiguous() for x in maps],
        [maps[0], maps[1][:, :2], maps[2]],
        [maps[0][:0], *maps[1:]],
        [maps[0].view(torch.int32), *maps[1:]],
    ):
        assert pyramid.table_behind(others) is None
    assert Pyramid(2, pyramid.sizes).table_behind(maps) is None


def test_maps_between_blocks_are_in_the_graph() -> None:
    head, features = random_head(16, 16, num_blocks=2).double(), [x.double() for x in random_pyramid((9, 6), 3, 2)]

    def gradients(scale: float = 1.0) -> list[Tensor]:
        between = head.blocks[0]([x.requires_grad_() for x in features])
        between[0].retain_grad()
        between[1].register_hook(lambda grad: scale * grad)
        loss = sum(x.sin().sum() for x in head.blocks[1](between))
        found = torch.autograd.grad(loss, [*between, features[0]], retain_graph=True)
        loss.backward()
        return [*found, between[0].grad]

    for scale in (1.0, 0.0):
        ours = gradients(scale)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dyhead_tail, "end_loops", lambda *_: None)
            expected = gradients(scale)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    assert not torch.equal(gradients(0.0)[3], gradients(1.0)[3])  # the hook is heard


def test_outputs_may_be_changed_in_place_until_a_block_needs_them() -> None:
    head, features = random_head(16, 16, num_blocks=1).double(), [x.double() for x in random_pyramid((9, 6), 3, 1)]
    features = [x.requires_grad_() for x in features]
    plain = torch.autograd.grad(head(features)[0].relu().sum(), features[0])
    assert torch.equal(torch.autograd.grad(torch.relu_(head(features)[0]).sum(), features[0])[0], plain[0])
    between = head(features)
    after = head(between)
    between[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        after[0].sum().backward()


@pytest.mark.parametrize("sizes", [[(1, 1)], [(1, 7), (1, 4)], [(5, 1), (3, 1), (2, 1)]])
def test_small_maps_in_float32(sizes: list[Size]) -> None:
    generator = torch.Generator().manual_seed(3)
    for channels in (16, 64):
        features = [torch.randn(2, channels, *size, generator=generator) for size in sizes]
        head = random_head(channels, channels, num_blocks=1)
        exact = gradients_of(head.double(), [x.double() for x in features])
        scale = max(float(b.detach().abs().max()) for b in exact if b is not None)
        for a, b in zip(gradients_of(head.float(), features), exact, strict=True):
            if a is not None and b is not None:
                assert (a.double() - b).abs().max() <= 1e-4 * scale
