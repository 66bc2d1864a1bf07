"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", arXiv:2010.04159, Eq. 3) in plain PyTorch.

For every query q and head m the values of all levels are sampled bilinearly at a few places, and summed with weights:

    y(q, m) = sum_l sum_p  A_mlqp · v_m(phi_l(place_mlqp)),

where phi_l maps 0..1 to level l and v is zero outside it. The projections before and after belong to the module that
calls this. Sampling one level of a part of the queries at a time bounds the memory; in training the samples, L P times
as large as what comes out, are not kept but made again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_SAMPLES_AT_ONCE = 1 << 24
"""Numbers that one call of ``grid_sample`` may give: 64 MiB in float32."""


def ms_deform_attn(value: Tensor, shapes: Sequence[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of sampled values.

    Everything is computed in float32 (float64 for float64), also under autocast.

    Args:
        value: (B, S, M, D), the cells of all levels one after the other, for M heads.
        shapes: (height, width) of each of the L levels; their areas add up to S.
        places: (B, Q, M, L, P, 2), (x, y) in 0..1: 0 is the left or upper edge of the map, 1 the opposite one.
        weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M * D) of the dtype of ``value``.

    Raises:
        ValueError: if the levels do not have S cells.
    """
    areas = [height * width for height, width in shapes]
    if sum(areas) != value.shape[1]:
        raise ValueError(f"value has {value.shape[1]} cells, but levels of {list(shapes)} have {sum(areas)}")
    dtype = torch.promote_types(value.dtype, torch.float32)
    with nullcontext() if value.is_meta else torch.autocast(value.device.type, enabled=False):
        levels = [
            part.permute(0, 2, 3, 1).reshape(-1, value.shape[3], *shape)
            for part, shape in zip(value.to(dtype).split(areas, dim=1), shapes, strict=True)
        ]
        out = _in_parts(levels, places.to(dtype), weights.to(dtype))
    return out.to(value.dtype)


def _in_parts(levels: list[Tensor], places: Tensor, weights: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph has no use for parts whose number varies
        return _attend(places, weights, *levels)
    batch, queries, heads, _, points = weights.shape
    size = max(1, _SAMPLES_AT_ONCE // (batch * heads * levels[0].shape[1] * points))
    parts = []
    for start in range(0, queries, size):
        part = places[:, start : start + size], weights[:, start : start + size]
        if torch.is_grad_enabled():
            parts.append(checkpoint(_attend, *part, *levels, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_attend(*part, *levels))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _attend(places: Tensor, weights: Tensor, *levels: Tensor) -> Tensor:
    """Places (B, Q, M, L, P, 2), weights (B, Q, M, L, P), levels (B * M, D, H_l, W_l) -> (B, Q, M * D)."""
    batch, queries, heads = weights.shape[:3]
    grids = (2 * places - 1).transpose(1, 2).flatten(0, 1)
    shares = weights.transpose(1, 2).flatten(0, 1)
    out = torch.zeros((), dtype=weights.dtype, device=weights.device)
    for k, level in enumerate(levels):
        samples = F.grid_sample(level, grids[:, :, k], mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out + torch.einsum("ndqp,nqp->nqd", samples, shares[:, :, k])
    return out.unflatten(0, (batch, heads)).transpose(1, 2).reshape(batch, queries, -1)
