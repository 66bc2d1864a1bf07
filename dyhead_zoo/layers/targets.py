"""From objects to losses: which places learn which object, which cells take part, and what their objects are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dyhead_zoo.structures import Target


class Assignment(NamedTuple):
    """Which anchors or points learn which object, as ``assign(raw, targets)`` of one-stage heads says.

    It depends on no prediction: of ``raw`` it looks at the sizes of the maps, ``image_sizes`` and ``canvas`` only.

    Attributes:
        places: of each level, fine to coarse, in pixels of the canvas: anchors (P_l, 4) xyxy, or points (P_l, 2), x
            first.
        owner: (B, P) over the places of all levels: index of the object in its picture, ``BACKGROUND``, or ``IGNORED``
            where a place takes no part in the loss.
    """

    places: list[Tensor]
    owner: Tensor


def cells_inside(x: Tensor, stride: int, image_size: Sequence[int], divisor: int) -> Tensor:
    """Cells of a map (B, C, H, W) that a picture of (height, width), rounded up to ``divisor``, reaches: (H * W,)."""
    rows, columns = (-(-side // divisor) * divisor for side in image_size)
    y = torch.arange(x.shape[-2], device=x.device) * stride < rows
    z = torch.arange(x.shape[-1], device=x.device) * stride < columns
    return (y[:, None] & z[None, :]).flatten()


def matched_objects(targets: Sequence[Target], image: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (P, 4) and labels (P,) of object ``index`` of picture ``image``, both (P,)."""
    first = torch.tensor([0, *(len(t["labels"]) for t in targets)][:-1], device=image.device).cumsum(0)
    row = first[image] + index
    boxes = torch.cat([t["boxes"] for t in targets]).to(image.device, torch.float32)
    return boxes[row], torch.cat([t["labels"] for t in targets]).to(image.device)[row]
