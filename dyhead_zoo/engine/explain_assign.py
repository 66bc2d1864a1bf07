"""Who learns the objects of one picture: what the loss of a detector says of it before anything is predicted.

Assignments depend on the sizes of the maps, not on weights, so the detector runs on the meta device: shapes only.

* One-stage families: the anchors or points of the loss. What RepPoints' second and BorderDet's border stage learn
  depends on predictions; of these the first stage is shown.
* Two-stage families: the anchors of the region proposals; then the level that a region with the object's own box is
  read from, and which anchors would reach the overlaps that the stages ask for if they were the proposals.
* DETR, Deformable DETR: queries are matched by what they predict, so nothing is assigned. In two-stage Deformable DETR
  the encoder's tokens begin with a fixed guess at a box; shown is the cheapest match of these, all classes left aside.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from dyhead_zoo.data.transforms import protocol_size, round_up
from dyhead_zoo.detector import Detector
from dyhead_zoo.layers.anchors import grid_points
from dyhead_zoo.layers.assigners import BACKGROUND, IGNORED
from dyhead_zoo.layers.deformable_attention import Layout
from dyhead_zoo.layers.fpn import DyHeadNeck
from dyhead_zoo.layers.matching import match_objects
from dyhead_zoo.layers.positions import padding_masks
from dyhead_zoo.layers.roi_heads import as_rois
from dyhead_zoo.layers.rpn import POSITIVE_IOU
from dyhead_zoo.layers.targets import Assignment
from dyhead_zoo.models.deformable_detr import DeformableDETRHead, Proposals
from dyhead_zoo.models.detr import DETRHead
from dyhead_zoo.models.rcnn import RCNNHead
from dyhead_zoo.ops.boxes import clip_to_image
from dyhead_zoo.structures import Target


class Terms(NamedTuple):
    """What a family assigns objects to, in words, and what limits the number of objects.

    Attributes:
        place: what learns an object, in the singular; empty where predictions decide.
        weak: what places are that do so for want of better ones: a name, then after a comma more; empty where there
            are none.
        limits: what cannot be more than so many in a picture.
        stage_ious: overlap from which each stage takes a region for an object; empty without regions.
        region_strides: of the levels that regions are read from, fine to coarse.
    """

    place: str
    weak: str = ""
    limits: dict[str, int] = {}  # noqa: RUF012  (never changed)
    stage_ious: tuple[float, ...] = ()
    region_strides: tuple[int, ...] = ()


class Regions(NamedTuple):
    """What the second stage makes of the N objects of a picture.

    Attributes:
        level: (N,) index of the level that a region with the object's box is read from; -1 without a second stage.
        best: (N,) highest IoU of an anchor, clipped to the picture, with the object.
        reaching: (N, S) anchors, clipped to the picture, that each of the S stages would take for the object.
    """

    level: Tensor
    best: Tensor
    reaching: Tensor

    @classmethod
    def none(cls, objects: int) -> Regions:
        """Of detectors that look once."""
        return cls(torch.full((objects,), -1), torch.zeros(objects), torch.zeros(objects, 0, dtype=torch.int64))


class Found(NamedTuple):
    """Who learns the N objects of a picture.

    Attributes:
        places: of each level, fine to coarse, in pixels of the canvas: boxes (P_l, 4) xyxy, or points (P_l, 2).
        owner: (P,) over the places of all levels: index of the object, ``BACKGROUND`` or ``IGNORED``.
        weak: (P,) positives for want of better ones, see ``Terms``.
        regions: of the second stage.
    """

    places: list[Tensor]
    owner: Tensor
    weak: Tensor
    regions: Regions


class AssigningHead(Protocol):
    """What is asked of one-stage heads: that their assignment can be had without their outputs and their loss."""

    def assign(self, raw: Any, targets: list[Target]) -> Assignment: ...


class Maps(NamedTuple):
    """As much of a raw output as assignments look at: of the class logits the height and width only."""

    cls_logits: tuple[Tensor, ...]
    image_sizes: Tensor
    canvas: tuple[int, int]


class Assigner:
    """Who learns what, for pictures resized as the detector asks for. Make one with ``assigner_of``.

    Args:
        detector: its weights are not used, and it may be on the meta device.

    Attributes:
        strides: of the levels.
        terms: what the family assigns objects to.
    """

    terms: Terms

    def __init__(self, detector: Detector) -> None:
        self.cfg, self.strides = detector.pretrained_cfg, cast(DyHeadNeck, detector.neck).strides
        self._shadow = copy.deepcopy(detector).to("meta").eval()
        cast(DyHeadNeck, self._shadow.neck).dyhead = None  # its maps have the sizes of those that it is given
        self._known: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a picture after resizing."""
        return protocol_size(height, width, self.cfg.short_side, self.cfg.long_side, self.cfg.rounding)

    def __call__(self, size: tuple[int, int], boxes: Tensor) -> Found:
        """Who learns the objects of one picture.

        Args:
            size: (height, width) after resizing.
            boxes: (N, 4) xyxy, in pixels after resizing.
        """
        canvas = round_up(size, self.cfg.pad_divisor)
        if canvas not in self._known:
            self._known[canvas] = self._maps(canvas)
        return self._find(Maps(self._known[canvas], torch.tensor([size]), canvas), boxes)

    @torch.no_grad()
    def _maps(self, canvas: tuple[int, int]) -> tuple[Tensor, ...]:
        """Maps (1, 1, H_l, W_l) of the levels for one picture that fills a canvas; they take no memory."""
        images = torch.empty(1, self._shadow.in_chans, *canvas, device="meta")
        levels = self._shadow.neck(self._shadow.backbone(images))
        return tuple(torch.zeros(()).expand(1, 1, *level.shape[2:]) for level in levels)

    def _find(self, maps: Maps, boxes: Tensor) -> Found:
        raise NotImplementedError


class DenseAssigner(Assigner):
    """One-stage families: every anchor or point answers for itself."""

    def __init__(self, detector: Detector) -> None:
        super().__init__(detector)
        self.terms = Terms("anchor or point", limits=_limits(detector.head))

    def _find(self, maps: Maps, boxes: Tensor) -> Found:
        target: Target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}
        places, owner = cast(AssigningHead, self._shadow.head).assign(maps, [target])
        return Found(places, owner[0], torch.zeros_like(owner[0], dtype=torch.bool), Regions.none(len(boxes)))


class RCNNAssigner(Assigner):
    """Two-stage families: anchors learn objectness, regions learn classes."""

    def __init__(self, detector: Detector) -> None:
        super().__init__(detector)
        self._head = cast(RCNNHead, self._shadow.head)
        self.terms = Terms(
            "anchor",
            f"low-quality matches, anchors that overlap an object best, but by less than {POSITIVE_IOU}",
            _limits(detector.head),
            tuple(self._head.stage_ious),
            tuple(self._head.pooler.strides),
        )

    def _find(self, maps: Maps, boxes: Tensor) -> Found:
        rpn = self._head.rpn
        target: Target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}
        anchors, owners = rpn.targets(maps.cls_logits, maps.image_sizes, maps.canvas, [target])
        owner = owners[0]
        learning = (owner >= 0).nonzero()[:, 0]
        weak = torch.zeros_like(owner, dtype=torch.bool)
        weak[learning] = box_iou(anchors[learning], boxes)[range(len(learning)), owner[learning]] < POSITIVE_IOU
        clipped = clip_to_image(anchors, maps.image_sizes[0])
        return Found(rpn.anchors(maps.cls_logits, maps.canvas), owner, weak, self._regions(clipped, boxes))

    def _regions(self, candidates: Tensor, boxes: Tensor) -> Regions:
        """Of objects (N, 4), where regions (R, 4) are proposed; as in the loss, a region is its best object's."""
        if not len(boxes):
            return Regions.none(0)._replace(reaching=torch.zeros(0, len(self.terms.stage_ious), dtype=torch.int64))
        overlap = box_iou(candidates, boxes)
        iou, owner = overlap.max(1)
        reaching = [torch.bincount(owner[iou >= least], minlength=len(boxes)) for least in self.terms.stage_ious]
        return Regions(self._head.pooler.levels(as_rois([boxes])), overlap.amax(0), torch.stack(reaching, dim=1))


class QueryAssigner(Assigner):
    """DETR and its descendants: predictions decide which query learns an object, so no place does."""

    def __init__(self, detector: Detector) -> None:
        super().__init__(detector)
        head = cast(DETRHead | DeformableDETRHead, detector.head)
        self.terms = Terms("", limits={"queries": head.num_queries, **_limits(head)})

    def _find(self, maps: Maps, boxes: Tensor) -> Found:
        levels = zip(maps.cls_logits, self.strides, strict=True)
        places = [grid_points((x.shape[2], x.shape[3]), stride, 0.5, x) for x, stride in levels]
        owner = torch.full((sum(map(len, places)),), IGNORED)
        return Found(places, owner, torch.zeros_like(owner, dtype=torch.bool), Regions.none(len(boxes)))


class GuessAssigner(QueryAssigner):
    """Two-stage Deformable DETR: the cheapest match of the encoder's first guesses, were all of them equally likely.

    Fresh predictions correct no guess (Zhu et al., arXiv:2010.04159, appendix A.4), but classify them at random; that
    part of the cost is left out.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__(detector)
        weak = "blank tokens, in the padding or at the picture's edge, which cannot learn a box"
        self.terms = self.terms._replace(place="first guess", weak=weak)

    def _find(self, maps: Maps, boxes: Tensor) -> Found:
        shapes = [(x.shape[2], x.shape[3]) for x in maps.cls_logits]
        logits = Proposals.guesses(Layout.of(padding_masks(maps.image_sizes, maps.canvas, shapes)))
        guesses = logits.sigmoid()
        names = torch.arange(len(boxes))  # the classes: matches name the object by its label
        costs = torch.zeros(()).expand(1, *guesses.shape[:2], max(len(boxes), 1))
        matches = match_objects(costs, guesses[None], [{"boxes": boxes, "labels": names}], maps.image_sizes)
        owner = torch.full(guesses.shape[1:2], BACKGROUND)
        owner[matches.query[0]] = matches.labels[0]
        corners = box_convert(guesses[0] * maps.image_sizes[0].flip(0).repeat(2), "cxcywh", "xyxy")
        weak = (owner >= 0) & logits[0].isinf().any(-1)
        return Found(list(corners.split([h * w for h, w in shapes])), owner, weak, Regions.none(len(boxes)))


def _limits(head: Any) -> dict[str, int]:
    return {"detections": head.max_detections}


def assigner_of(detector: Detector) -> Assigner:
    """The assigner of a detector's family.

    Raises:
        ValueError: for a head of no known family.
    """
    head = detector.head
    if isinstance(head, RCNNHead):
        return RCNNAssigner(detector)
    if isinstance(head, DeformableDETRHead) and head.proposals is not None:
        return GuessAssigner(detector)
    if isinstance(head, DETRHead | DeformableDETRHead):
        return QueryAssigner(detector)
    if hasattr(head, "assign"):
        return DenseAssigner(detector)
    raise ValueError(
        f"{detector.name} has a {type(head).__name__}, which does not say which places learn an object: "
        "give it a method assign(raw, targets), see docs/architecture.md"
    )
