"""Masks of objects: from the frame of a box into the picture, and from and to COCO's run-length encoding (RLE).

COCO counts pixels down the columns, runs of zeros first (https://github.com/cocodataset/cocoapi, common/maskApi.h);
the compressed form writes these counts as text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


class Rle(TypedDict):
    """A compressed RLE as results files have it: ``size`` is [height, width]."""

    size: list[int]
    counts: str


class MaskWindow(NamedTuple):
    """The part of a picture that a mask reaches: its first row and column, and the probabilities (h, w) there."""

    top: int
    left: int
    values: Tensor


# -------------------------------------------------------------------------------------------------------------- pasting


def mask_windows(masks: Tensor, boxes: Tensor, height: int, width: int) -> Iterator[MaskWindow]:
    """Masks in pixels of their picture, one at a time, and only where they can be above zero.

    Bilinear at the centres of pixels, with zero outside the grid, as in detectron2's ``paste_masks_in_image`` and
    mmdet's ``_do_paste_mask``. (torchvision's ``paste_masks_in_image`` rounds boxes to whole pixels instead.)

    Args:
        masks: (N, M, M) in the frame of each box.
        boxes: (N, 4) xyxy in pixels of a picture of (height, width).
    """
    for mask, (x1, y1, x2, y2) in zip(masks.float(), boxes.tolist(), strict=True):
        rows, y = _pixels(y1, y2, mask.shape[0], height)
        columns, x = _pixels(x1, x2, mask.shape[1], width)
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).to(mask.device)
        values = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
        yield MaskWindow(rows.start, columns.start, values)


def _pixels(low: float, high: float, cells: int, limit: int) -> tuple[range, Tensor]:
    """Pixels from half a cell before ``low`` to half a cell after ``high``, and their centres in -1..1 of that span."""
    size = max(high - low, 1e-6)
    reach = size / (2 * cells)
    start = max(math.floor(low - reach), 0)
    span = range(start, max(min(math.ceil(high + reach), limit), start))
    return span, (torch.arange(span.start, span.stop) + (0.5 - low)) * (2 / size) - 1


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> Tensor:
    """Masks (N, M, M) in the frame of boxes (N, 4), to (N, height, width) bool: where they reach ``threshold``.

    See ``mask_windows`` for how.
    """
    result = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for picture, (top, left, values) in zip(result, mask_windows(masks, boxes, height, width), strict=True):
        picture[top : top + values.shape[0], left : left + values.shape[1]] = values >= threshold
    return result


def encode_masks(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> list[Rle]:
    """``paste_masks`` as compressed RLEs; costs the area of the boxes, not that of the picture."""
    windows = mask_windows(masks.cpu(), boxes.cpu(), height, width)
    return [
        encode_window((values >= threshold).numpy(), top, left, height, width) for top, left, values in windows
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ RLE


def encode_window(window: NDArray[np.bool_], top: int, left: int, height: int, width: int) -> Rle:
    """The RLE of a picture of (height, width), zero but for a ``window`` (h, w) at row ``top`` and column ``left``."""
    from pycocotools import mask as coco_mask

    borders = np.diff(np.pad(window.T.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    column, row = np.nonzero(borders)  # where runs of ones start and end, by turns
    edges = (column + left) * height + row + top
    joint = np.flatnonzero(np.diff(edges) == 0)  # a run to the foot of a column goes on at the head of the next
    edges = np.delete(edges, np.concatenate([joint, joint + 1]))
    counts = np.diff(edges, prepend=0, append=height * width)
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    plain = {"size": [height, width], "counts": counts.tolist()}
    return Rle(size=[height, width], counts=coco_mask.frPyObjects(plain, height, width)["counts"].decode())


def encode_box(box: Sequence[float], height: int, width: int) -> Rle:
    """The RLE of all pixels that a box, xyxy within the picture, touches."""
    left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    return encode_window(np.ones((bottom - top, right - left), dtype=bool), top, left, height, width)


def mask_area(rle: Rle) -> int:
    """Number of pixels."""
    from pycocotools import mask as coco_mask

    return int(coco_mask.area(rle))


def decode_counts(counts: Sequence[str], height: int, width: int) -> Tensor:
    """Compressed counts of N masks of a picture to (N, height, width) bool."""
    from pycocotools import mask as coco_mask

    if not counts:
        return torch.zeros(0, height, width, dtype=torch.bool)
    masks = coco_mask.decode([{"size": [height, width], "counts": text} for text in counts])
    return torch.from_numpy(masks).permute(2, 0, 1).bool()


def compress_segmentation(segmentation: Any, height: int, width: int) -> str | None:
    """Compressed counts of an annotation's ``segmentation``: polygons, or an RLE in either form.

    Polygons of less than three points mark nothing.

    Returns:
        The counts, or None if no pixel is marked.

    Raises:
        ValueError: saying what is wrong with it.
    """
    from pycocotools import mask as coco_mask

    if segmentation is None or segmentation == []:
        return None
    if isinstance(segmentation, list):
        for polygon in segmentation:
            _check_polygon(polygon)
        areas = [polygon for polygon in segmentation if len(polygon) >= 6]  # pycocotools takes four numbers for a box
        if not areas:
            return None
        rle = coco_mask.merge(coco_mask.frPyObjects(areas, height, width))
    elif isinstance(segmentation, dict):
        rle = _compressed(segmentation, height, width)
    else:
        raise ValueError(f"segmentation={segmentation!r:.80} must be a list of polygons or an RLE")
    return rle["counts"].decode() if coco_mask.area(rle) else None


def _check_polygon(polygon: Any) -> None:
    if not isinstance(polygon, list) or not all(type(v) in (int, float) for v in polygon):
        raise ValueError(f"polygon {polygon!r:.80} must be a list of numbers: x, y, x, y, ...")
    if len(polygon) % 2:
        raise ValueError(f"polygon {polygon!r:.80} has {len(polygon)} numbers, not an x and a y for each point")
    if not all(abs(v) < 2**24 for v in polygon):
        raise ValueError(f"polygon {polygon!r:.80} has coordinates that are not finite, or no place in any picture")


def _compressed(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """An RLE of either form as pycocotools' compressed one, checked, since its C code trusts what it is given."""
    from pycocotools import mask as coco_mask

    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise ValueError(f"RLE of size {size!r:.80} for a picture of [height, width] = {[height, width]}")
    if isinstance(counts, list):
        if not all(type(v) is int and v >= 0 for v in counts) or sum(counts) != height * width:
            raise ValueError(f"RLE counts {counts!r:.80} must be integers that add up to {height * width} pixels")
        return dict(coco_mask.frPyObjects({"size": size, "counts": counts}, height, width))
    if not isinstance(counts, str) or not _COUNTS.fullmatch(counts):
        raise ValueError(f"RLE counts {counts!r:.80} must be a list of integers, or compressed text")
    compressed = {"size": size, "counts": counts.encode()}
    try:
        coco_mask.decode(compressed)
    except ValueError as error:
        raise ValueError(f"RLE counts {counts!r:.80} do not describe {height * width} pixels") from error
    return compressed


_COUNTS = re.compile("([P-o]{0,5}[0-O])+")
"""Compressed counts: six bits a character, from "0" on; "P" to "o" say that the number goes on."""
