"""DyHead by Triton gives what its modules give: on a GPU where there is one, else in Triton's interpreter.

The interpreter takes some milliseconds for each operation of a program: tiny pyramids.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections import Counter
from typing import Any

import pytest
import torch
from dyhead_helpers import random_head, random_pyramid
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton_helpers import DEVICE, make_dot_exact

from dyhead_zoo.layers import dyhead_cuda, dyhead_inference
from dyhead_zoo.layers.dyhead import DyHead

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def head_of(in_channels: int = 16, out_channels: int = 32, num_blocks: int = 1, **arguments: Any) -> DyHead:
    """In evaluation mode."""
    return random_head(in_channels, out_channels, num_blocks=num_blocks, **arguments).eval().to(DEVICE)


def pyramid(finest: tuple[int, int], levels: int, batch: int = 1, channels: int = 16) -> list[Tensor]:
    return [x.to(DEVICE) for x in random_pyramid(finest, levels, batch, channels)]


@torch.no_grad()
def by_triton(head: DyHead, features: list[Tensor]) -> list[Tensor]:
    assert dyhead_cuda._obstacle(list(head.blocks), features) is None
    return dyhead_cuda.forward(list(head.blocks), features)


@torch.no_grad()
def by_modules(head: DyHead, features: list[Tensor]) -> list[Tensor]:
    """In float64 on the CPU."""
    head = copy.deepcopy(head).cpu().double()
    head.fused = False
    return head([x.cpu().double() for x in features])


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, reference in zip(found, expected, strict=True):
        assert ours.shape == reference.shape
        assert (ours.cpu().double() - reference).abs().max() <= tolerance * reference.abs().max()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one level": ({"num_blocks": 2}, {"finest": (5, 3), "levels": 1, "batch": 2}),
    "two levels, several tiles of pixels": ({}, {"finest": (9, 16), "levels": 2}),
    "three levels of two images": ({}, {"finest": (6, 7), "levels": 3, "batch": 2}),
    "three levels, reinterpreted": ({"coarse_offsets": "reinterpret"}, {"finest": (7, 5), "levels": 3, "batch": 2}),
    "five levels": ({}, {"finest": (3, 12), "levels": 5}),
    "levels of a pixel": ({"coarse_offsets": "reinterpret"}, {"finest": (1, 1), "levels": 3}),
    "channels that are no power of two": (
        {"in_channels": 20, "out_channels": 48},
        {"finest": (4, 4), "levels": 2, "channels": 20},
    ),
    "several tiles of channels": (
        {"in_channels": 80, "out_channels": 144},
        {"finest": (3, 2), "levels": 1, "channels": 80},
    ),
    "without scale attention": ({"scale": False}, {"finest": (4, 5), "levels": 2}),
    "without task attention": ({"task": False}, {"finest": (4, 5), "levels": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_gives_what_the_modules_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dyhead_cuda, "_STATISTICS_TILES", 2)  # more tiles of pixels than are read at a time
    arguments, sizes = CASES[name]
    head, features = head_of(**arguments), pyramid(**sizes)
    found = by_triton(head, features)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in found)
    assert_close(found, by_modules(head, features), 1e-5)


def test_features_of_any_layout() -> None:
    features = pyramid((4, 5), 2)
    strided = [features[0].mT.contiguous().mT, features[1].contiguous(memory_format=torch.channels_last)]
    head = head_of().to(memory_format=torch.channels_last)
    assert_close(by_triton(head, strided), by_modules(head, features), 1e-5)


def test_variance_of_values_far_from_zero() -> None:
    head, features = head_of(), pyramid((8, 9), 1)
    with torch.no_grad():
        head.blocks[0].spatial.conv_mid.bias += 3000  # in float32 the mean of squares less the squared mean is noise
    assert_close(by_triton(head, features), by_modules(head, features), 5e-3)


@pytest.fixture
def exact_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    make_dot_exact(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, exact_dot: None) -> None:
    head, features = head_of().to(dtype), [x.to(dtype) for x in pyramid((4, 5), 2)]
    found = by_triton(head, features)
    assert all(x.dtype == dtype for x in found)
    assert_close(found, by_modules(head, features), 0.03)


def test_autocast_is_for_the_convolutions(exact_dot: None) -> None:
    head, features = head_of(num_blocks=2), pyramid((4, 5), 2)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = by_triton(head, features)
    assert all(x.dtype == torch.float32 for x in found)
    exact = by_modules(head, features)
    assert_close(found, exact, 0.05)
    with pytest.raises(AssertionError):
        assert_close(found, exact, 1e-4)


def test_what_is_not_finite_spreads_as_through_the_modules() -> None:
    head, features = head_of(), pyramid((4, 3), 2, batch=3)
    features[1][0, 3, 0, 0], features[0][1, 3, 0, 0] = math.nan, math.inf
    expected = by_modules(head, features)
    assert [any(x[image].isnan().any() for x in expected) for image in range(3)] == [True, True, False]
    for ours, reference in zip(by_triton(head, features), expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), reference, atol=1e-5, rtol=1e-4, equal_nan=True)


# -- launches ----------------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts the operators of PyTorch that compute or copy, each of which would be a launch."""

    FREE = frozenset(
        (
            "empty",
            "empty_like",
            "new_empty",
            "view",
            "permute",
            "slice",
            "select",
            "split_with_sizes",
            "alias",
            "detach",
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (1, ["predict_fields", "convolve", "statistics", "coefficients", "combine"]),
        (5, ["predict_fields", "coarse_fields", "convolve", "statistics", "coefficients", "combine"]),
    ],
)
def test_a_block_is_six_launches(levels: int, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(dyhead_cuda, "_launch", lambda kernel, *_, **__: launched.append(kernel.fn.__name__))
    head = head_of(num_blocks=2).to(memory_format=torch.channels_last)
    features = [x.contiguous(memory_format=torch.channels_last) for x in pyramid((20, 9), levels, batch=2)]
    with Operators() as operators:
        by_triton(head, features)
    assert launched == expected * 2
    assert operators.counts == {"cat": 1}  # the table


# -- when it is used ---------------------------------------------------------------------------------------------------


def test_dyhead_takes_it_for_inference_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    head, features, taken = head_of(), pyramid((2, 2), 2), []
    monkeypatch.setattr(dyhead_inference, "applies", lambda *_: False)
    monkeypatch.setattr(dyhead_cuda, "_obstacle", lambda *_: None)
    monkeypatch.setattr(dyhead_cuda, "_passes_trial", lambda *_: True)
    monkeypatch.setattr(dyhead_cuda, "forward", lambda blocks, features: taken.append(1) or features)
    if DEVICE == "cpu":
        with torch.no_grad():
            head(features)  # which the interpreter must not run unasked
        assert not taken
        features = [_OnCuda(x) for x in features]
        monkeypatch.setattr(head.blocks[0], "forward", lambda features, trace=None: features)
    with torch.inference_mode():
        head(features)
    assert taken.pop()
    head(features)  # with gradients
    with torch.no_grad():
        head(features, [])  # the attentions are asked for
        for module, name, value in (
            (dyhead_cuda, "_passes_trial", False),
            (dyhead_cuda, "_obstacle", "one"),
            (torch.compiler, "is_compiling", True),
            (torch.jit, "is_tracing", True),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, lambda *_, value=value: value)
                head(features)
        head.fused = False
        head(features)
    assert not taken


class _OnCuda:
    """A tensor as far as its caller asks where it lies."""

    def __init__(self, tensor: Tensor) -> None:
        self.device, self.shape, self.dtype = torch.device("cuda", 0), tensor.shape, tensor.dtype


def test_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    def obstacle(head: DyHead, features: list[Tensor]) -> str:
        return str(dyhead_cuda._obstacle(list(head.blocks), features))

    head, features = head_of(), pyramid((2, 2), 2)
    assert obstacle(head, features) == "None"
    assert "float64" in obstacle(head, [x.double() for x in features])
    assert "no pixels" in obstacle(head, [x[:0] for x in features])
    assert "different devices" in obstacle(copy.deepcopy(head).to("meta"), features)
    assert "not its own" in obstacle(head_of(spatial=False), features)
    assert "hooks" in obstacle(copy.deepcopy(head).train(), features)
    adapted = copy.deepcopy(head)
    adapted.blocks[0].task.fc1 = type("Adapter", (nn.Linear,), {})(32, 8)
    assert "not its own" in obstacle(adapted, features)
    with head.blocks[0].scale.register_forward_hook(lambda *_: None):
        assert "hooks" in obstacle(head, features)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in obstacle(head, features)


def test_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def trial() -> bool:
        dyhead_cuda._trial.cache_clear()
        return dyhead_cuda._passes_trial(torch.device(DEVICE), torch.float32, 16, 16, "reinterpret")

    state = torch.random.get_rng_state()
    with torch.inference_mode():
        assert trial()
    assert torch.equal(torch.random.get_rng_state(), state)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="errs"):
        patch.setattr(dyhead_cuda, "forward", lambda blocks, features: [x * math.nan for x in features])
        assert not trial()
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="no compiler"):
        patch.setattr(dyhead_cuda, "_launch", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no compiler")))
        assert not trial()
    dyhead_cuda._trial.cache_clear()
