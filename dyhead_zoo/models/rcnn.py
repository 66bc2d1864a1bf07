"""The head of two-stage detectors: proposals first, then one or several looks at each of them.

Faster R-CNN (``faster_rcnn.py``) looks once, Mask R-CNN (``mask_rcnn.py``) draws a mask besides, Cascade R-CNN
(``cascade_rcnn.py``) looks three times, each time from the boxes of the time before. Here they are one thing: a list of
stages, with a mask head each or without.

Boxes of proposals are constants: no gradient flows through them, nor from one stage's boxes to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_zoo.layers.anchors import AnchorGenerator, DeltaCoder
from dyhead_zoo.layers.assigners import max_iou_assign
from dyhead_zoo.layers.losses import mean_over_ranks
from dyhead_zoo.layers.postprocess import select_detections
from dyhead_zoo.layers.roi_heads import BoxHead, MaskHead, RoIPooler, as_rois, mask_targets
from dyhead_zoo.layers.rpn import RegionProposalNetwork, sample
from dyhead_zoo.layers.tower import Norm
from dyhead_zoo.ops.boxes import clip_to_image
from dyhead_zoo.structures import DetectionTensors, Target
from dyhead_zoo.weights import ClassRows

BOX_SIZE, MASK_SIZE = 7, 28
"""Cells a side of what the box head reads and of what the mask head draws."""
_MASK_REGIONS = 32  # that the mask head draws at a time


class RCNNOutput(NamedTuple):
    """Raw outputs of the first stage, one tensor per level, fine to coarse; the second reads the pyramid again.

    Attributes:
        features: the pyramid, (B, C, H_l, W_l).
        objectness: logits, (B, A, H_l, W_l) for the A anchors of a cell.
        rpn_deltas: (B, A * 4, H_l, W_l), relative to the anchors.
        image_sizes: (B, 2) int64, (height, width) of each picture within the canvas.
        canvas: (height, width) of the padded batch.
    """

    features: tuple[Tensor, ...]
    objectness: tuple[Tensor, ...]
    rpn_deltas: tuple[Tensor, ...]
    image_sizes: Tensor
    canvas: tuple[int, int]


class RoIOutput(NamedTuple):
    """What one stage says of R regions.

    Attributes:
        rois: (R, 5), index of the picture, then the box that was looked at, xyxy in pixels.
        cls_logits: (R, C + unused + 1), the background last.
        box_deltas: (R, C * 4) or, for all classes together, (R, 4), relative to the boxes of ``rois``.
    """

    rois: Tensor
    cls_logits: Tensor
    box_deltas: Tensor


class _Sample(NamedTuple):
    """Regions drawn for the losses of one stage: lists over the pictures.

    ``boxes`` (N, 4), positives first; ``owner`` (P,) the object of each positive; ``labels`` (N,); ``added`` (N,)
    whether a box is that of an object, not a proposal.
    """

    boxes: list[Tensor]
    owner: list[Tensor]
    labels: list[Tensor]
    added: list[Tensor]


class RCNNHead(nn.Module):
    """Region proposals, box heads and mask heads of Faster, Mask and Cascade R-CNN.

    Args:
        in_channels, strides: of the pyramid.
        num_classes: C.
        unused_rows: rows of the softmax, before the background's, that belong to no class (torchvision's classifiers
            have ten: ids that COCO does not use).
        anchor_scale: side of the square anchor in strides; ``anchor_sizes`` gives the sides in pixels instead, the same
            for every level (torchvision's MobileNets).
        whole_pixels, canvas_strides: anchors as torchvision places them, see ``AnchorGenerator``.
        rpn_convs, rpn_low_quality, rpn_least, rpn_reach, rpn_beta, rpn_nms, rpn_score_threshold: see
            ``RegionProposalNetwork``.
        rpn_pre_nms, proposals: how many per level before, and in all after non-maximum suppression: (for losses, for
            detections).
        samples: anchors and regions per picture that the losses are computed on.
        roi_levels: how many levels, from the finest, regions are read from; ``roi_aligned``, ``roi_sampling``: see
            ``RoIPooler``.
        stage_ious: overlap with an object from which a region is positive, one per stage; ``stage_weights``: of the
            losses of each; ``stage_stds``: of its deltas. Several stages have one box per region for all classes.
        box_beta: where the smooth L1 loss of the deltas becomes linear; 0 is L1.
        box_low_quality: whether the region that overlaps an object best is its own whatever other object it overlaps
            more (mmdet's Mask R-CNN), see ``max_iou_assign``.
        box_convs, roi_norm, box_hidden: see ``BoxHead``; the norm is the mask heads' too.
        class_agnostic: one box per region for all classes, as several stages have in any case.
        task_after_roi: task attention in place of the fully connected layers, see ``BoxHead``; the blocks of DyHead
            then have none, see ``build_rcnn``.
        score_mean: what several stages' scores are the mean of: ``'logits'`` or ``'probabilities'``.
        mask_heads: 0: no masks; else the first so many stages have a mask head, which learns on their regions
            (detectron2's Cascade R-CNN has one, mmdet's one per stage).
        class_agnostic_masks: one mask per region for all classes.
        soft_masks: see ``binary`` of ``mask_targets``.
        pad_divisor: see ``RegionProposalNetwork``.
        score_threshold, nms_threshold, max_detections: of the detections.
    """

    def __init__(
        self,
        in_channels: int,
        strides: tuple[int, ...],
        num_classes: int,
        *,
        unused_rows: int = 0,
        anchor_scale: float = 8.0,
        anchor_sizes: Sequence[float] | None = None,
        whole_pixels: bool = False,
        canvas_strides: bool = False,
        rpn_convs: int = 1,
        rpn_low_quality: Literal["owner", "best", "none"] = "best",
        rpn_least: float = 0.0,
        rpn_reach: Literal["picture", "canvas", "inside"] = "picture",
        rpn_beta: float = 0.0,
        rpn_nms: float = 0.7,
        rpn_score_threshold: float = 0.0,
        rpn_pre_nms: tuple[int, int] = (2000, 1000),
        proposals: tuple[int, int] = (1000, 1000),
        samples: tuple[int, int] = (256, 512),
        roi_levels: int = 4,
        roi_aligned: bool = True,
        roi_sampling: int = 0,
        stage_ious: Sequence[float] = (0.5,),
        stage_stds: Sequence[Sequence[float]] = ((0.1, 0.1, 0.2, 0.2),),
        stage_weights: Sequence[float] = (1.0,),
        box_beta: float = 0.0,
        box_low_quality: bool = False,
        box_convs: int = 0,
        box_hidden: Sequence[int] = (1024, 1024),
        class_agnostic: bool = False,
        roi_norm: Norm = False,
        task_after_roi: bool = False,
        score_mean: Literal["logits", "probabilities"] = "probabilities",
        mask_heads: int = 0,
        class_agnostic_masks: bool = False,
        soft_masks: bool = False,
        pad_divisor: int = 32,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        if not len(stage_ious) == len(stage_stds) == len(stage_weights) > 0:
            raise ValueError(
                f"stage_ious={stage_ious}, stage_stds={stage_stds}, stage_weights={stage_weights}: "
                "give one of each per stage"
            )
        if not 0 <= mask_heads <= len(stage_ious):
            raise ValueError(f"mask_heads={mask_heads}: use 0, or up to one for each of {len(stage_ious)} stages")
        if score_mean not in ("logits", "probabilities"):
            raise ValueError(f"score_mean={score_mean!r}: use 'logits' or 'probabilities'")
        if not 1 <= roi_levels <= len(strides):
            raise ValueError(f"roi_levels={roi_levels}: use 1..{len(strides)}, the levels there are")
        for name, pair in (("rpn_pre_nms", rpn_pre_nms), ("proposals", proposals), ("samples", samples)):
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise ValueError(f"{name}={pair!r}: give two numbers")
        self.num_classes, self.strides, self.unused_rows = num_classes, strides, unused_rows
        self.stage_ious, self.stage_weights = tuple(stage_ious), tuple(stage_weights)
        self.coders = [DeltaCoder(cast(tuple[float, float, float, float], tuple(stds))) for stds in stage_stds]
        self.rpn_pre_nms, self.proposals, self.samples = tuple(rpn_pre_nms), tuple(proposals), tuple(samples)
        self.box_beta, self.box_low_quality, self.score_mean = box_beta, box_low_quality, score_mean
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.max_detections, self.wants_masks, self.soft_masks = max_detections, mask_heads > 0, soft_masks
        anchors = AnchorGenerator(
            strides,
            [list(anchor_sizes) if anchor_sizes else [anchor_scale * stride] for stride in strides],
            ratios=(0.5, 1.0, 2.0),
            rounded=whole_pixels,
            canvas_strides=canvas_strides,
        )
        self.rpn = RegionProposalNetwork(
            in_channels,
            anchors,
            convs=rpn_convs,
            low_quality=rpn_low_quality,
            least=rpn_least,
            reach=rpn_reach,
            pad_divisor=pad_divisor,
            samples=self.samples[0],
            beta=rpn_beta,
            nms_threshold=rpn_nms,
            score_threshold=rpn_score_threshold,
        )
        self.pooler = RoIPooler(strides[:roi_levels], roi_aligned, roi_sampling)
        self.per_class = len(self.stage_ious) == 1 and not class_agnostic
        self.masks_per_class = not class_agnostic_masks
        self.box = nn.ModuleList(
            BoxHead(
                in_channels,
                num_classes + unused_rows + 1,
                num_classes if self.per_class else 1,
                size=BOX_SIZE,
                convs=box_convs,
                norm=roi_norm,
                hidden=box_hidden,
                task_attention=task_after_roi,
            )
            for _ in self.stage_ious
        )
        maps = num_classes if self.masks_per_class else 1
        self.mask = nn.ModuleList(MaskHead(in_channels, maps, norm=roi_norm) for _ in range(mask_heads))

    def class_rows(self) -> dict[str, ClassRows]:
        """Parameters with rows per class."""
        rows = {}
        for stage in range(len(self.box)):
            for name in ("weight", "bias"):
                rows[f"box.{stage}.cls_logits.{name}"] = ClassRows(extra=self.unused_rows + 1)
                if self.per_class:
                    rows[f"box.{stage}.box_deltas.{name}"] = ClassRows(rows_per_class=4)
                if stage < len(self.mask) and self.masks_per_class:
                    rows[f"mask.{stage}.logits.{name}"] = ClassRows()
        return rows

    def forward(self, features: list[Tensor], image_sizes: Tensor, canvas: tuple[int, int]) -> RCNNOutput:
        """Pyramid L x (B, C, H_l, W_l), fine to coarse -> ``RCNNOutput``."""
        objectness, deltas = self.rpn(features)
        return RCNNOutput(tuple(features), objectness, deltas, image_sizes, canvas)

    def propose(self, raw: RCNNOutput, training: bool = False) -> DetectionTensors:
        """Proposals of each picture, best first; as many as losses need if ``training``, else as many as detections."""
        use = 0 if training else 1
        return self.rpn.propose(
            raw.objectness,
            raw.rpn_deltas,
            raw.image_sizes,
            raw.canvas,
            pre_nms=self.rpn_pre_nms[use],
            post_nms=self.proposals[use],
        )

    # --- regions -----------------------------------------------------------------------------------------------------

    def roi_forward(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], image_sizes: Tensor
    ) -> list[RoIOutput]:
        """What every stage says of some proposals, each stage of the boxes that the one before made of them.

        Args:
            features: the pyramid.
            proposals: (N_i, 4) of each picture.
            image_sizes: (B, 2), that boxes are clipped to between stages.
        """
        outputs: list[RoIOutput] = []
        boxes = list(proposals)
        for stage in range(len(self.box)):
            if stage:
                boxes = self._refined(stage - 1, outputs[-1], boxes, image_sizes)
            outputs.append(self._look(stage, features, boxes))
        return outputs

    def _look(self, stage: int, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> RoIOutput:
        rois = as_rois(boxes)
        return RoIOutput(rois, *self.box[stage](self.pooler(features, rois, BOX_SIZE)))

    def _refined(self, stage: int, output: RoIOutput, boxes: Sequence[Tensor], image_sizes: Tensor) -> list[Tensor]:
        """The boxes that a stage makes of those it looked at, clipped; lists over the pictures."""
        moved = self.coders[stage].decode(output.box_deltas.detach(), output.rois[:, 1:])
        parts = moved.split([len(b) for b in boxes])
        return [clip_to_image(part, size) for part, size in zip(parts, image_sizes, strict=True)]

    # --- training ----------------------------------------------------------------------------------------------------

    def loss(self, raw: RCNNOutput, targets: list[Target]) -> dict[str, Tensor]:
        """Terms of the proposals, then of every stage on regions drawn from them and from the objects' own boxes."""
        if self.wants_masks and (lacking := [i for i, target in enumerate(targets) if "masks" not in target]):
            raise ValueError(
                f"targets {lacking} have no masks, which this detector learns: give each (N, height, width)"
            )
        losses = self.rpn.loss(raw.objectness, raw.rpn_deltas, raw.image_sizes, raw.canvas, targets)
        found = self.propose(raw, training=True)
        boxes = [b[:n] for b, n in zip(found.boxes, found.count.tolist(), strict=True)]
        for stage, weight in enumerate(self.stage_weights):
            drawn = self._draw(stage, boxes, targets)
            output = self._look(stage, raw.features, drawn.boxes)
            terms = self._box_losses(stage, output, drawn, targets)
            if stage < len(self.mask):
                terms["loss_mask"] = self._mask_loss(stage, raw.features, drawn, targets)
            suffix = f"_{stage}" if len(self.box) > 1 else ""
            losses |= {f"{name}{suffix}": weight * term for name, term in terms.items()}
            if stage + 1 < len(self.box):
                refined = self._refined(stage, output, drawn.boxes, raw.image_sizes)
                boxes = [b[~added] for b, added in zip(refined, drawn.added, strict=True)]
        return losses

    @torch.no_grad()
    def _draw(self, stage: int, proposals: Sequence[Tensor], targets: list[Target]) -> _Sample:
        """Draw at most a quarter of positives, as Fast R-CNN does."""
        drawn = _Sample([], [], [], [])
        for boxes, target in zip(proposals, targets, strict=True):
            objects = target["boxes"].to(boxes)
            own = objects[(objects[:, 2:] > objects[:, :2]).all(1)]
            candidates = torch.cat((own, boxes))
            owner = max_iou_assign(
                candidates,
                objects,
                positive=self.stage_ious[stage],
                negative=self.stage_ious[stage],
                low_quality="owner" if self.box_low_quality else "none",
                least=self.stage_ious[stage],
            )
            positive, negative = sample(owner, self.samples[1], 0.25)
            background = torch.full_like(negative, self.num_classes + self.unused_rows)
            drawn.owner.append(owner[positive])
            drawn.labels.append(torch.cat((target["labels"].to(boxes.device)[owner[positive]], background)))
            chosen = torch.cat((positive, negative))
            drawn.boxes.append(candidates[chosen])
            drawn.added.append(chosen < len(own))
        return drawn

    def _box_losses(self, stage: int, output: RoIOutput, drawn: _Sample, targets: list[Target]) -> dict[str, Tensor]:
        """Cross entropy of all regions and smooth L1 of the positive ones' deltas, both over the number of regions."""
        logits, deltas = output.cls_logits.float(), output.box_deltas.float()
        labels = torch.cat(drawn.labels)
        positive = (labels < self.num_classes).nonzero().squeeze(1)
        objects = torch.cat(
            [target["boxes"].to(deltas)[owner] for target, owner in zip(targets, drawn.owner, strict=True)]
        )
        coded = self.coders[stage].encode(objects, output.rois[positive, 1:])
        place = labels[positive] if self.per_class else torch.zeros_like(positive)
        chosen = deltas.unflatten(1, (-1, 4))[positive, place]
        divisor = mean_over_ranks(logits.new_tensor(float(len(labels)))).clamp(min=1)
        return {
            "loss_cls": F.cross_entropy(logits, labels, reduction="sum") / divisor,
            "loss_box": F.smooth_l1_loss(chosen, coded, reduction="sum", beta=self.box_beta) / divisor,
        }

    def _mask_loss(self, stage: int, features: Sequence[Tensor], drawn: _Sample, targets: list[Target]) -> Tensor:
        """Binary cross entropy of the object's class on the positive regions: the mean over their cells."""
        boxes = [b[: len(owner)] for b, owner in zip(drawn.boxes, drawn.owner, strict=True)]
        labels = torch.cat([k[: len(owner)] for k, owner in zip(drawn.labels, drawn.owner, strict=True)])
        wanted = torch.cat(
            [
                mask_targets(
                    target["masks"].to(b.device),
                    owner,
                    b,
                    MASK_SIZE,
                    aligned=self.pooler.aligned,
                    binary=not self.soft_masks,
                )
                for target, owner, b in zip(targets, drawn.owner, boxes, strict=True)
            ]
        )
        chosen = self._of_class(self.mask[stage](self.pooler(features, as_rois(boxes), MASK_SIZE // 2)), labels)
        divisor = mean_over_ranks(chosen.new_tensor(float(wanted.numel()))).clamp(min=1)
        return F.binary_cross_entropy_with_logits(chosen, wanted, reduction="sum") / divisor

    def _of_class(self, maps: Tensor, labels: Tensor) -> Tensor:
        """Maps (R, C or 1, M, M) of the labels (R,): (R, M, M) float32."""
        place = labels if self.masks_per_class else torch.zeros_like(labels)
        return maps.float()[torch.arange(len(labels), device=labels.device), place]

    # --- detections --------------------------------------------------------------------------------------------------

    def decode_tensors(self, raw: RCNNOutput) -> DetectionTensors:
        """Detections in pixels of the canvas, clipped to each picture; score = class probability."""
        found = self.propose(raw)
        real = _rows_in_use(found)
        stages = self.roi_forward(raw.features, [b[r] for b, r in zip(found.boxes, real, strict=True)], raw.image_sizes)
        scores, moved = _spread(self._scores(stages), real), _spread(self._boxes(stages[-1]), real)
        labels = torch.arange(self.num_classes, device=scores.device).expand_as(scores)
        result = select_detections(
            moved.expand(-1, -1, self.num_classes, -1).flatten(1, 2),
            scores.flatten(1),
            labels.flatten(1),
            (scores > self.score_threshold).flatten(1),
            raw.image_sizes,
            nms_threshold=self.nms_threshold,
            max_detections=self.max_detections,
        )
        return result._replace(masks=self._masks(raw.features, result)) if self.wants_masks else result

    def _scores(self, stages: Sequence[RoIOutput]) -> Tensor:
        """Class probabilities (R, C), the mean over the stages."""
        logits = torch.stack([stage.cls_logits.float() for stage in stages])
        if self.score_mean == "logits":
            return logits.mean(0).softmax(-1)[:, : self.num_classes]
        return logits.softmax(-1).mean(0)[:, : self.num_classes]

    def _boxes(self, output: RoIOutput) -> Tensor:
        """Boxes (R, C or 1, 4) of the last stage."""
        return self.coders[-1].decode(output.box_deltas.unflatten(1, (-1, 4)), output.rois[:, None, 1:])

    def _masks(self, features: Sequence[Tensor], found: DetectionTensors) -> Tensor:
        """Probabilities (B, K, M, M) in the frame of each detection's box, the mean over the mask heads."""
        real = _rows_in_use(found)
        labels = torch.cat([k[r] for k, r in zip(found.labels, real, strict=True)])
        boxes = [b[r] for b, r in zip(found.boxes, real, strict=True)]
        return _spread(self.mask_logits(features, boxes, labels).sigmoid().mean(0), real)

    def mask_logits(self, features: Sequence[Tensor], boxes: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Logits (S, R, M, M) of each of S mask heads, for boxes (N_i, 4) of each picture and their labels (R,)."""
        pooled = self.pooler(features, as_rois(boxes), MASK_SIZE // 2)
        # a few regions at a time: maps of all classes are large, and but one of each region is kept
        parts = list(zip(pooled.split(_MASK_REGIONS), labels.split(_MASK_REGIONS), strict=True))
        return torch.stack([torch.cat([self._of_class(head(x), k) for x, k in parts]) for head in self.mask])


def _rows_in_use(found: DetectionTensors) -> Tensor:
    """Which rows (B, K) are worth computing on: the valid ones; all where sizes must not depend on data."""
    rows = torch.arange(found.boxes.shape[1], device=found.boxes.device).expand(found.boxes.shape[:2])
    if torch.compiler.is_compiling():
        return rows
    return rows < found.count[:, None]


def _spread(values: Tensor, rows: Tensor) -> Tensor:
    """Values (R, ...), picture after picture, to their places (B, K, ...); zeros elsewhere."""
    if rows.dtype != torch.bool:
        return values.unflatten(0, rows.shape)
    out = values.new_zeros(*rows.shape, *values.shape[1:])
    out[rows] = values
    return out
