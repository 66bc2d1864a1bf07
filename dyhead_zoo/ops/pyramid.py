"""How the levels of a feature pyramid lie in one table of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dyhead_zoo.ops.deform_conv_plan import Pair


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

    def table_behind(self, features: Sequence[Tensor]) -> Tensor | None:
        """The table whose ``maps`` these are, if that is what they are."""
        table = features[0]._base
        if table is None or table.shape != (self.start(len(features)), features[0].shape[1]):
            return None
        if not table.is_contiguous() or any(x._base is not table or x.dtype != table.dtype for x in features):
            return None
        places = [(x.data_ptr(), x.stride()) for x in features]
        return table if places == [(x.data_ptr(), x.stride()) for x in self.maps(table.detach())] else None
