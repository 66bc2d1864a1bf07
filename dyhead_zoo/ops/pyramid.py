"""How the levels of a feature pyramid lie in one table of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dyhead_zoo.ops.deform_conv_plan import Pair, as_table, joined


class Pyramid(NamedTuple):
    """The layout: level after level, and in a level image after image, row after row.

    Attributes:
        batch: images.
        sizes: (height, width) of each level.
    """

    batch: int
    sizes: tuple[Pair, ...]

    @classmethod
    def of(cls, features: Sequence[Tensor]) -> Pyramid:
        """That of maps (B, C, H_l, W_l)."""
        return cls(features[0].shape[0], tuple((x.shape[2], x.shape[3]) for x in features))

    @property
    def halves(self) -> bool:
        """Whether sides halve from one level to the next, rounded up."""
        pairs = zip(self.sizes, self.sizes[1:], strict=False)
        return all(((height + 1) // 2, (width + 1) // 2) == coarse for (height, width), coarse in pairs)

    def pixels(self, level: int) -> int:
        """Pixels of a level, of one image."""
        return self.sizes[level][0] * self.sizes[level][1]

    def start(self, level: int) -> int:
        """The first row of a level; for the number of levels: how many rows there are."""
        return self.batch * sum(map(self.pixels, range(level)))

    def table(self, features: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The pixels of maps (B, C, H_l, W_l), (rows, C), in another dtype; not differentiable."""
        table = features[0].new_empty(self.start(len(features)), features[0].shape[1], dtype=dtype)
        for x, rows in zip(features, self.maps(table), strict=True):
            if x.is_contiguous(memory_format=torch.channels_last):
                rows.copy_(x)
            else:  # the copy of a 2-D transpose is blocked, that of a 4-D permutation is not and takes twice as long
                for image, target in zip(x, rows, strict=True):
                    target.flatten(1).t().copy_(image.flatten(1).t())
        return table

    def maps(self, table: Tensor) -> list[Tensor]:
        """All levels of a table (rows, C) as channels_last maps (B, C, H_l, W_l), views."""
        lengths = [self.batch * self.pixels(level) for level in range(len(self.sizes))]
        parts = zip(table.split(lengths), self.sizes, strict=True)
        return [rows.view(self.batch, *size, -1).permute(0, 3, 1, 2) for rows, size in parts]

    def maps_of_their_own(self, table: Tensor) -> list[Tensor]:
        """``maps`` that autograd does not know to be views; not differentiable."""
        return [_at(table, int(x.storage_offset()), x.shape, x.stride()) for x in self.maps(table)]

    def table_behind(self, features: Sequence[Tensor]) -> Tensor | None:
        """The table in whose memory maps lie as ``maps`` has them, detached from them; None if they do not."""
        first = features[0]
        shape = (self.start(len(features)), first.shape[1])
        storage, start = first.untyped_storage(), int(first.storage_offset())
        if storage.nbytes() < (start + shape[0] * shape[1]) * first.element_size():
            return None
        table = _at(first, start, shape, (shape[1], 1))
        places = [[(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in maps] for maps in (features, self.maps(table))]
        return table if places[0] == places[1] else None

    def joined(self, features: Sequence[Tensor]) -> Tensor:
        """The table of maps (B, C, H_l, W_l), differentiable; no copy of maps that ``table_behind`` knows."""
        table = self.table_behind(features)
        if table is None:
            return joined([as_table(x) for x in features])
        out: Tensor = _Joined.apply(self, (table,), *features)
        return out


def _at(like: Tensor, offset: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """A tensor in the memory of another, of which autograd does not know."""
    return like.detach().new_empty(0).set_(like.untyped_storage(), offset, shape, strides)


class _Joined(torch.autograd.Function):
    """A table made of maps that lie in it already."""

    @staticmethod
    def forward(ctx: Any, pyramid: Pyramid, table: tuple[Tensor], *features: Tensor) -> Tensor:
        ctx.pyramid = pyramid
        ctx.save_for_backward(*features)  # which costs nothing, and tells whether they were changed in place since
        return table[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return None, None, *ctx.pyramid.maps(grad.contiguous())
