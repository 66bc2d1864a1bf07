from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dyhead_zoo.ops import deform_conv, deform_conv_cpu, deform_conv_samples

conv: Callable[..., Tensor] = deform_conv.modulated_deform_conv2d
HAS_NUMBA = importlib.util.find_spec("numba") is not None
OURS = ("bag", "numba") if HAS_NUMBA else ("bag",)
ours = pytest.mark.parametrize("backend", OURS)


class Case(NamedTuple):
    """One call, without its tensors: x (batch, channels, *size), out_channels, and the convolution's geometry."""

    size: tuple[int, int] = (9, 12)
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    batch: int = 1
    channels: int = 6
    out_channels: int = 5
    spread: float = 2.0
    masked: bool = True
    biased: bool = True
    groups: int = 1
    offset_groups: int = 1

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Any]:
        """x, offset, mask (or None), weight, bias (or None)."""
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        channels = self.channels * math.lcm(self.groups, self.offset_groups)
        x = randn(self.batch, channels, *self.size)
        weight = randn(self.out_channels * self.groups, channels // self.groups, *self.kernel)
        out_size = nn.functional.conv2d(x, weight, None, *self.geometry, self.groups).shape[2:]
        taps = math.prod(self.kernel) * self.offset_groups
        offset = randn(self.batch, 2 * taps, *out_size) * self.spread
        mask = randn(self.batch, taps, *out_size).sigmoid() if self.masked else None
        return [x, offset, mask, weight, randn(len(weight)) if self.biased else None]

    @property
    def geometry(self) -> tuple[Any, Any, Any]:
        return self.stride, self.padding, self.dilation


def assert_same_as_torchvision(
    tensors: list[Any], *geometry: int | tuple[int, int], tolerance: float, backend: deform_conv.Backend
) -> None:
    """Output and the gradients of all inputs, relative to the largest value of each."""

    def run(backend: deform_conv.Backend) -> list[Tensor]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        x, offset, mask, weight, bias = leaves
        out = conv(x, offset, mask, weight, bias, *geometry, backend=backend)
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        return [out, *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad_out)]

    for ours, reference in zip(run(backend), run("torchvision"), strict=True):
        assert ours.shape == reference.shape
        assert ours.dtype == reference.dtype
        assert (ours - reference).abs().max() <= tolerance * reference.abs().max().clamp(min=1)


CASES = {
    "plain": Case(),
    "batch": Case(batch=2),
    "more pixels than a chunk": Case(size=(23, 24), batch=2),
    "stride": Case(stride=2),
    "uneven geometry": Case(size=(11, 17), kernel=(2, 5), stride=(2, 3), padding=(0, 2), dilation=(3, 1)),
    "1x1 kernel": Case(kernel=(1, 1), padding=0),
    "1x1 map": Case(size=(1, 1)),
    "1 channel": Case(channels=1, out_channels=1),
    "padding beyond the kernel": Case(padding=4),
    "whole-pixel positions": Case(spread=0.0),
    "often outside": Case(spread=15.0),
    "always outside": Case(spread=1e6),
    "beyond int32": Case(spread=1e12),
    "without mask": Case(masked=False),
    "without bias": Case(biased=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-13)])
@ours
def test_agrees_with_torchvision(
    case: Case, dtype: torch.dtype, tolerance: float, backend: deform_conv.Backend
) -> None:
    assert_same_as_torchvision(case.tensors(dtype), *case.geometry, tolerance=tolerance, backend=backend)


@settings(deadline=None, max_examples=30)
@given(
    st.builds(
        Case,
        size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        padding=st.tuples(st.integers(2, 4), st.integers(2, 4)),
        dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        batch=st.integers(1, 3),
        channels=st.integers(1, 5),
        out_channels=st.integers(1, 4),
        spread=st.sampled_from([0.0, 0.5, 4.0, 100.0]),
        masked=st.booleans(),
        biased=st.booleans(),
        groups=st.integers(1, 3),
        offset_groups=st.integers(1, 3),
    ),
    st.integers(1, 20),
    st.sampled_from(OURS),
)
def test_agrees_with_torchvision_for_any_shape_and_chunk(case: Case, chunk: int, backend: deform_conv.Backend) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deform_conv_cpu, "_CHUNK_PIXELS", chunk)
        assert_same_as_torchvision(case.tensors(), *case.geometry, tolerance=1e-13, backend=backend)


@ours
def test_first_derivatives_agree_with_finite_differences(backend: deform_conv.Backend) -> None:
    case = Case(size=(4, 5), channels=2, out_channels=2, spread=0.7)
    leaves = [t.requires_grad_() for t in case.tensors() if t is not None]
    assert torch.autograd.gradcheck(lambda *t: conv(*t, padding=1, backend=backend), leaves)


@ours
def test_zero_offsets_make_it_a_convolution(backend: deform_conv.Backend) -> None:
    x, offset, _, weight, bias = Case(spread=0.0).tensors()
    out = conv(x, offset, None, weight, bias, padding=1, backend=backend)
    torch.testing.assert_close(out, nn.functional.conv2d(x, weight, bias, padding=1))


@ours
def test_memory_layout_of_the_inputs_does_not_matter(backend: deform_conv.Backend) -> None:
    tensors = Case(batch=2).tensors()
    expected = conv(*tensors, padding=1, backend=backend)
    channels_last = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    transposed = [t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() == 4 else t for t in tensors]
    strided = [t.repeat_interleave(2, dim=-1)[..., ::2] for t in tensors]
    for variant in (channels_last, transposed, strided):
        torch.testing.assert_close(conv(*variant, padding=1, backend=backend), expected)
        assert_same_as_torchvision(variant, 1, 1, tolerance=1e-13, backend=backend)
    assert expected.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wanted", range(5), ids=["x", "offset", "mask", "weight", "bias"])
@ours
def test_gradient_of_one_input_alone(wanted: int, backend: deform_conv.Backend) -> None:
    tensors = Case().tensors()
    leaf = tensors[wanted]
    leaf.requires_grad_()
    ours, reference = (
        torch.autograd.grad(conv(*tensors, padding=1, backend=one).sum(), leaf) for one in (backend, "torchvision")
    )
    torch.testing.assert_close(ours, reference)


@ours
def test_without_gradients_nothing_is_recorded(backend: deform_conv.Backend) -> None:
    tensors = Case().tensors()
    assert not conv(*tensors, padding=1, backend=backend).requires_grad


@pytest.mark.parametrize("backend", [*OURS, "torchvision", "auto"])
def test_empty_batch(backend: deform_conv.Backend) -> None:
    tensors = [t.requires_grad_() for t in Case(batch=2).tensors(torch.float32)]
    x, offset, mask, weight, bias = tensors
    out = conv(x[:0], offset[:0], mask[:0], weight, bias, padding=1, backend=backend)
    assert out.shape == (0, 5, 9, 12)
    out.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [(0, 0), (8, 5), (3, 11), (4, 6)], ids=["corner", "bottom", "right", "inside"])
@ours
def test_non_finite_inputs_reach_what_they_reach_in_torchvision(
    value: float, place: tuple[int, int], backend: deform_conv.Backend
) -> None:
    x, offset, mask, weight, bias = Case(spread=3.0).tensors()
    x[0, 2, *place] = value
    ours, reference = (conv(x, offset, mask, weight, bias, padding=1, backend=b) for b in (backend, "torchvision"))
    assert not reference.isfinite().all() and reference.isfinite().any()
    torch.testing.assert_close(ours, reference, equal_nan=True)


@ours
def test_infinite_offsets_are_outside_and_nan_comes_through(backend: deform_conv.Backend) -> None:
    x, offset, mask, weight, _ = Case().tensors(torch.float32)
    out = conv(x, torch.full_like(offset, math.inf), mask, weight, padding=1, backend=backend)
    assert not out.any()
    offset[0, 3, 4, 5] = math.nan
    out = conv(x, offset, mask, weight, padding=1, backend=backend)
    assert out[0, :, 4, 5].isnan().all()
    assert out.isnan().sum() == out.shape[1]


# -- dtypes ------------------------------------------------------------------------------------------------------------


def relative_error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach(), reference.detach()
    return float((value.double() - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (b, t)
        for b in (*OURS, "torchvision")
        for t in (torch.bfloat16, torch.float16)
        if (b, t) != ("numba", torch.float16)
    ],
)
def test_low_precision_is_as_close_as_its_inputs_allow(dtype: torch.dtype, backend: deform_conv.Backend) -> None:
    x, offset, mask, weight, bias = Case(size=(20, 30), channels=32).tensors()
    reference = conv(x, offset, mask, weight, bias, padding=1)
    low = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    offset = offset.float().requires_grad_()
    out = conv(low[0], offset, mask.float(), low[1], low[2], padding=1, backend=backend)
    assert out.dtype == dtype
    assert relative_error(out, reference) < 2 * torch.finfo(dtype).eps
    out.float().sum().backward()
    assert [t.grad.dtype for t in (*low, offset) if t.grad is not None] == [dtype, dtype, dtype, torch.float32]


@ours
def test_positions_keep_their_precision_with_bfloat16_features(backend: deform_conv.Backend) -> None:
    # a ramp read at quarter pixels beyond column 256, where bfloat16 itself steps by 2
    x = (torch.arange(300.0) - 280).expand(1, 1, 1, 300).bfloat16()
    offset = torch.zeros(1, 2, 1, 300)
    offset[:, 1] = 0.25
    out = conv(x, offset, None, torch.ones(1, 1, 1, 1).bfloat16(), backend=backend)
    torch.testing.assert_close(out[0, 0, 0, 265:295].float(), torch.arange(265.0, 295.0) - 280 + 0.25)


@ours
def test_bfloat16_gradients(backend: deform_conv.Backend) -> None:
    tensors = Case(size=(20, 30), channels=32).tensors()
    features, positions = torch.bfloat16, torch.float32
    gradients = []
    for dtypes in ([torch.float64] * 5, [features, positions, positions, features, features]):
        leaves = [t.to(dtype).requires_grad_() for t, dtype in zip(tensors, dtypes, strict=True)]
        gradients.append(torch.autograd.grad(conv(*leaves, padding=1, backend=backend).square().mean(), leaves))
    for name, reference, value in zip(("x", "offset", "mask", "weight", "bias"), *gradients, strict=True):
        assert relative_error(value, reference) < 0.02, name


@pytest.mark.parametrize("backend", [*OURS, "torchvision"])
def test_autocast_runs_in_its_dtype_and_returns_float32_gradients(backend: deform_conv.Backend) -> None:
    leaves = [t.requires_grad_() for t in Case(channels=16).tensors(torch.float32)]
    expected = conv(*leaves, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(*leaves, padding=1, backend=backend)
        gradients = torch.autograd.grad(out.float().sum(), leaves)  # inside, where it must not be cast again
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected.double()) < 0.03
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


# -- choice of the backend ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test in which torchvision's operator is called."""

    def fail(*args: object) -> None:
        pytest.fail("torchvision's operator was called")

    monkeypatch.setattr(deform_conv, "deform_conv2d", fail)


@pytest.mark.usefixtures("no_torchvision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_auto_is_ours_on_the_cpu(dtype: torch.dtype) -> None:
    assert conv(*Case().tensors(dtype), padding=1).isfinite().all()


@pytest.mark.parametrize(("groups", "offset_groups"), [(2, 1), (1, 3), (3, 2), (2, 4), (4, 2)])
@ours
def test_groups(groups: int, offset_groups: int, backend: deform_conv.Backend) -> None:
    case = Case(batch=2, channels=2, groups=groups, offset_groups=offset_groups)
    assert_same_as_torchvision(case.tensors(), *case.geometry, tolerance=1e-13, backend=backend)


def test_what_int32_cannot_count_falls_back_to_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = Case().tensors()
    expected = conv(*tensors, padding=1)
    monkeypatch.setattr(deform_conv, "INT32_LIMIT", 9 * 12 * 9 * 4)
    monkeypatch.setattr(deform_conv_cpu, "deform_conv2d", None)
    torch.testing.assert_close(conv(*tensors, padding=1), expected)
    for backend in OURS:
        with pytest.raises(ValueError, match=f"'{backend}' counts in int32, not 3888 samples"):
            conv(*tensors, padding=1, backend=backend)


def test_many_chunks_of_a_large_map_sort_by_int64(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(size=(24, 24), kernel=(1, 1), stride=3, padding=0)  # 64 pixels, 256 corners, 576 rows
    monkeypatch.setattr(deform_conv_samples, "INT32_LIMIT", 1000)
    monkeypatch.setattr(deform_conv_cpu, "_CHUNK_PIXELS", 4)
    key, _ = deform_conv_samples._readers(torch.zeros(256, dtype=torch.int32), 576, 16)
    assert key.dtype == torch.int64
    assert_same_as_torchvision(case.tensors(), *case.geometry, tolerance=1e-13, backend="bag")


@pytest.mark.usefixtures("no_torchvision")
@pytest.mark.parametrize("packing_pays", [0, math.inf], ids=["packed", "plain"])
def test_packed_and_plain_products_agree(monkeypatch: pytest.MonkeyPatch, packing_pays: float) -> None:
    tensors = Case(size=(23, 24), batch=2, channels=16).tensors(torch.float32)
    reference = conv(*(t.double() for t in tensors), padding=1)
    pays = dict.fromkeys((torch.float32, torch.bfloat16), packing_pays)
    monkeypatch.setattr(deform_conv_cpu, "_PACKING_PAYS", pays)
    assert relative_error(conv(*tensors, padding=1), reference) < 1e-6
    low = [t.bfloat16() if number in (0, 3, 4) else t for number, t in enumerate(tensors)]
    assert relative_error(conv(*low, padding=1), reference) < 0.02


def test_works_without_the_private_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed_signature(*args: object) -> Tensor:
        raise TypeError("takes other arguments now")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", changed_signature)
    monkeypatch.setattr(deform_conv_cpu, "_PACKING_PAYS", {torch.float32: 0})
    deform_conv_cpu._packed_linear_works.cache_clear()
    try:
        assert not deform_conv_cpu._packed_linear_works(torch.float32)
        assert_same_as_torchvision(Case().tensors(torch.float32), 1, 1, tolerance=5e-6, backend="bag")
    finally:
        deform_conv_cpu._packed_linear_works.cache_clear()


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6, 3, 3))

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return conv(x, offset, mask, self.weight, padding=1)


def test_export_keeps_one_deform_conv_node_and_free_sizes() -> None:
    layer = _Layer()
    x, offset, mask = Case(size=(8, 10)).tensors(torch.float32)[:3]
    auto = torch.export.Dim.AUTO
    sizes = {2: auto, 3: auto}
    program = torch.export.export(layer, (x, offset, mask), dynamic_shapes=(sizes, sizes, sizes))
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and "deform_conv2d" in str(node.target)]
    assert len(nodes) == 1
    larger = [torch.nn.functional.pad(t, (0, 3, 0, 2)) for t in (x, offset, mask)]
    torch.testing.assert_close(program.module()(*larger), layer(*larger))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(6, 9, 12)}, r"x must have 4 dimensions, got shape \(6, 9, 12\)"),
        ({"x": torch.zeros(2, 6, 9, 12)}, r"offset must have shape \(2, 18, 9, 12\), got \(1, 18, 9, 12\)"),
        ({"x": torch.zeros(1, 8, 9, 12)}, r"C and O divisible by groups, got x \(1, 8, 9, 12\), weight \(5, 6, 3, 3\)"),
        ({"offset": torch.zeros(1, 20, 9, 12)}, r"offset has 20 channels, but 9 taps need 18"),
        ({"offset": torch.zeros(1, 9, 9, 12)}, r"offset has 9 channels"),
        ({"offset": torch.zeros(1, 18, 12, 9)}, r"offset must have shape \(1, 18, 9, 12\), got \(1, 18, 12, 9\)"),
        ({"mask": torch.zeros(1, 1, 9, 12)}, r"mask must have shape \(1, 9, 9, 12\), got \(1, 1, 9, 12\)"),
        ({"bias": torch.zeros(6)}, r"bias must have shape \(5,\), got \(6,\)"),
        ({"weight": torch.zeros(5, 6, 3, 3).double()}, r"weight is torch.float64 but x is torch.float32"),
        ({"stride": 2}, r"offset must have shape \(1, 18, 5, 6\)"),
        ({"stride": 0}, r"stride and dilation must be at least 1"),
        ({"dilation": (1, 7)}, r"the kernel is larger than the padded input"),
        ({"backend": "fast"}, r"unknown backend 'fast'"),
    ],
)
def test_errors_name_what_does_not_fit(changes: dict[str, object], message: str) -> None:
    names = ("x", "offset", "mask", "weight", "bias")
    arguments = dict(zip(names, Case().tensors(torch.float32), strict=True)) | {"padding": 1} | changes
    with pytest.raises(ValueError, match=message):
        conv(**arguments)
