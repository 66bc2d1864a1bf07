"""Set prediction: which query answers for which object, and what it is told. Shared by DETR and its descendants.

Carion et al., "End-to-End Object Detection with Transformers", arXiv:2005.12872, section 3.1. Boxes are (cx, cy, w, h)
in units of the picture's own width and height. Every decoder layer is matched by itself; all layers come in one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from dyhead_zoo.layers.losses import giou_loss, mean_over_ranks
from dyhead_zoo.structures import Target

_L1_WEIGHT, _GIOU_WEIGHT = 5.0, 2.0
_IMPOSSIBLE = 1e6
"""Cost in place of NaN and infinity, which the solver refuses; a loss that is not finite is for the trainer to see."""


class Matches(NamedTuple):
    """M pairs of query and object in each of L layers.

    Attributes:
        image: (M,), the same in all layers.
        query: (L, M).
        labels: (L, M), of the objects.
        boxes: (L, M, 4), of the objects, (cx, cy, w, h) in units of the picture.
        scale: (M, 4), (width, height, width, height) of the picture.
    """

    image: Tensor
    query: Tensor
    labels: Tensor
    boxes: Tensor
    scale: Tensor

    def select(self, x: Tensor) -> Tensor:
        """Rows of the matched queries: (L, B, Q, D) -> (L, M, D)."""
        layers = torch.arange(len(x), device=x.device)[:, None]
        return x[layers, self.image, self.query]

    def fill(self, x: Tensor, values: Tensor) -> Tensor:
        """Set the entries of the matched queries of (L, B, Q) to ``values`` (L, M), in place."""
        layers = torch.arange(len(x), device=x.device)[:, None]
        x[layers, self.image, self.query] = values
        return x


@torch.no_grad()
def match_objects(class_costs: Tensor, boxes: Tensor, targets: Sequence[Target], image_sizes: Tensor) -> Matches:
    """The cheapest one-to-one assignment of objects to queries, for each layer and picture.

    The cost of a pair is the class cost plus 5 times the L1 distance of the boxes minus twice their GIoU. Where there
    are more objects than queries, those that cost most to match stay without.

    Args:
        class_costs: (L, B, Q, C), of answering each class.
        boxes: (L, B, Q, 4), (cx, cy, w, h) in units of the picture.
        targets: one per picture, boxes (xyxy) in pixels.
        image_sizes: (B, 2), (height, width).
    """
    from scipy.optimize import linear_sum_assignment  # a slow import, which only training needs

    scales = image_sizes.flip(1).repeat(1, 2).to(boxes)
    wanted = [box_convert(t["boxes"].to(boxes), "xyxy", "cxcywh") / s for t, s in zip(targets, scales, strict=True)]
    labels = [target["labels"].to(boxes.device) for target in targets]
    costs = [
        class_costs[:, i][..., labels[i]] + pair_costs(boxes[:, i], wanted[i], scales[i]) for i in range(len(targets))
    ]
    table = torch.cat(costs, dim=-1).nan_to_num(_IMPOSSIBLE, _IMPOSSIBLE).cpu().numpy()  # one transfer for all
    ends = np.cumsum([len(x) for x in labels])[:-1]
    pairs = [[linear_sum_assignment(layer) for layer in part] for part in np.split(table, ends, axis=-1)]

    def gather(picture: int, side: int) -> Tensor:
        return torch.from_numpy(np.stack([pair[side] for pair in pairs[picture]])).to(boxes.device)

    queries = [gather(i, 0) for i in range(len(targets))]
    objects = [gather(i, 1) for i in range(len(targets))]
    image = torch.cat([torch.full_like(query[0], i) for i, query in enumerate(queries)])
    return Matches(
        image,
        torch.cat(queries, dim=1),
        torch.cat([x[o] for x, o in zip(labels, objects, strict=True)], dim=1),
        torch.cat([x[o] for x, o in zip(wanted, objects, strict=True)], dim=1),
        scales[image],
    )


def pair_costs(boxes: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
    """Cost of every pair of predicted boxes (L, Q, 4) and objects (N, 4) of one picture: (L, Q, N)."""
    distance = torch.cdist(boxes, wanted[None], p=1)
    corners = box_convert(boxes * scale, "cxcywh", "xyxy").flatten(0, 1)
    overlap = generalized_box_iou(corners, box_convert(wanted * scale, "cxcywh", "xyxy")).view(distance.shape)
    return _L1_WEIGHT * distance - _GIOU_WEIGHT * overlap


def box_losses(boxes: Tensor, matches: Matches) -> tuple[Tensor, Tensor]:
    """5 times L1 and twice 1 - GIoU of the matched boxes, over the number of objects (at least 1 per process).

    Args:
        boxes: (L, B, Q, 4), (cx, cy, w, h) in units of the picture.
        matches: of the same layers.

    Returns:
        Two tensors (L,), one value per layer.
    """
    count = num_matches(matches)
    found = matches.select(boxes)
    distance = (found - matches.boxes).abs().sum((1, 2))
    corners = [box_convert(x * matches.scale, "cxcywh", "xyxy").flatten(0, 1) for x in (found, matches.boxes)]
    overlap = giou_loss(*corners).view(len(boxes), -1).sum(1)
    return _L1_WEIGHT * distance / count, _GIOU_WEIGHT * overlap / count


def num_matches(matches: Matches) -> Tensor:
    """Number of matched objects of a layer, as a mean over the processes and at least 1."""
    return mean_over_ranks(torch.tensor(float(len(matches.image)), device=matches.image.device)).clamp(min=1)


def loss_terms(loss_cls: Tensor, loss_box: Tensor, loss_giou: Tensor) -> dict[str, Tensor]:
    """Loss terms (L,) by layer to scalars: the last layer, and as ``.._aux`` the sum of those before it."""
    terms = {"loss_cls": loss_cls, "loss_box": loss_box, "loss_giou": loss_giou}
    result = {name: term[-1] for name, term in terms.items()}
    if len(loss_cls) > 1:
        result |= {f"{name}_aux": term[:-1].sum() for name, term in terms.items()}
    return result
