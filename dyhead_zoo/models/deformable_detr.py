"""Deformable DETR: attention looks at a few sampled places of four levels, so DETR trains in a tenth of the epochs.

Paper: Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR 2021,
arXiv:2010.04159. Three variants: plain, with iterative box refinement, and two-stage, where the encoder's best
proposals become the queries. They and their figures are mmdetection's (Apache-2.0). With DyHead, its blocks stand
between the projections and the encoder, on all levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_zoo.detector import Detector
from dyhead_zoo.factory import build_detector
from dyhead_zoo.layers.deformable_attention import DeformableAttention, Layout
from dyhead_zoo.layers.losses import sigmoid_focal_loss
from dyhead_zoo.layers.matching import box_losses, loss_terms, match_objects, num_matches
from dyhead_zoo.layers.positions import box_positions, padding_masks, sine_positions
from dyhead_zoo.layers.postprocess import query_detections, take_rows
from dyhead_zoo.layers.projection import ProjectionNeck
from dyhead_zoo.layers.tower import prior_bias
from dyhead_zoo.layers.transformer import (
    MLP,
    Attention,
    FeedForward,
    check_sizes,
    init_matrices,
    inverse_sigmoid,
)
from dyhead_zoo.models.sources import LITE, MMDET, SMALL
from dyhead_zoo.registry import register_detector, register_family
from dyhead_zoo.structures import DetectionTensors, Target
from dyhead_zoo.weights import ClassRows

_FIRST_SIDE = 0.05
"""Side of a proposal on the finest level, in units of the picture; it doubles from level to level."""


class DeformableDETROutput(NamedTuple):
    """Raw outputs, one tensor per decoder layer; the last one is the answer.

    Attributes:
        cls_logits: (B, Q, C).
        boxes: (B, Q, 4), (cx, cy, w, h) in units of the picture's own width and height.
        proposal_logits, proposal_boxes: the same for every token of the encoder, of two-stage detectors; else empty.
        image_sizes: (B, 2) int64, (height, width) of each picture within the canvas.
        canvas: (height, width) of the padded batch.
    """

    cls_logits: tuple[Tensor, ...]
    boxes: tuple[Tensor, ...]
    proposal_logits: tuple[Tensor, ...]
    proposal_boxes: tuple[Tensor, ...]
    image_sizes: Tensor
    canvas: tuple[int, int]


class EncoderLayer(nn.Module):
    """Deformable attention of the tokens to themselves and feed-forward, LayerNorm after each."""

    def __init__(self, channels: int, levels: int, heads: int, points: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(channels, levels, heads, points)
        self.norm1 = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels, feedforward, dropout)
        self.norm2 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, reference: Tensor, layout: Layout) -> Tensor:
        """Tokens (B, S, C), positions (B, S, C), their own places (B, S, L, 2) -> (B, S, C)."""
        x = self.norm1(x + self.dropout(self.self_attn(x + positions, reference, x, layout)))
        return self.norm2(x + self.dropout(self.ffn(x)))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to the memory, feed-forward."""

    def __init__(self, channels: int, levels: int, heads: int, points: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(channels, heads, dropout)
        self.norm1 = nn.LayerNorm(channels)
        self.cross_attn = DeformableAttention(channels, levels, heads, points)
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels, feedforward, dropout)
        self.norm3 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, queries: Tensor, reference: Tensor, memory: Tensor, layout: Layout) -> Tensor:
        """States and positions of queries (B, Q, C), references (B, Q, L, 2 or 4), memory (B, S, C) -> (B, Q, C)."""
        key = x + queries
        x = self.norm1(x + self.dropout(self.self_attn(key, key, x)))
        x = self.norm2(x + self.dropout(self.cross_attn(x + queries, reference, memory, layout)))
        return self.norm3(x + self.dropout(self.ffn(x)))


class Transformer(nn.Module):
    """Encoder, decoder layers, and a learned position of each level."""

    def __init__(
        self,
        channels: int,
        levels: int,
        heads: int,
        points: int,
        encoder_layers: int,
        decoder_layers: int,
        feedforward: int,
        dropout: float,
    ) -> None:
        super().__init__()
        settings = (channels, levels, heads, points, feedforward, dropout)
        self.encoder = nn.ModuleList(EncoderLayer(*settings) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*settings) for _ in range(decoder_layers))
        self.level_embed = nn.Parameter(torch.empty(levels, channels))
        init_matrices(self)
        nn.init.normal_(self.level_embed)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset()

    def encode(self, features: Sequence[Tensor], image_sizes: Tensor, canvas: tuple[int, int]) -> tuple[Tensor, Layout]:
        """Levels (B, C, H_l, W_l) to the memory (B, S, C) and its layout."""
        masks = padding_masks(image_sizes, canvas, [(x.shape[2], x.shape[3]) for x in features])
        layout = Layout.of(masks)
        channels = features[0].shape[1]
        positions = [sine_positions(m, channels, offset=-0.5) + e for m, e in zip(masks, self.level_embed, strict=True)]
        position = torch.cat(positions, dim=1).to(features[0].dtype)
        reference = layout.places()[:, :, None] * layout.ratios[:, None]
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in features], dim=1)
        for layer in self.encoder:
            x = layer(x, position, reference, layout)
        return x, layout


class Proposals(nn.Module):
    """First stage: tokens as proposals, and the best of them as queries (section 4.2 and appendix A.4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.memory_fc, self.memory_norm = nn.Linear(channels, channels), nn.LayerNorm(channels)
        self.query_fc, self.query_norm = nn.Linear(2 * channels, 2 * channels), nn.LayerNorm(2 * channels)
        init_matrices(self)

    @staticmethod
    def guesses(layout: Layout) -> Tensor:
        """The first guess at the box of each token: logits (B, S, 4) of (cx, cy, w, h) in units of the picture.

        Tokens in the padding or within a hundredth of the picture's edge are blank; their guess is infinite.
        """
        places = layout.places()
        sides = [torch.full((h * w,), _FIRST_SIDE * 2.0**k) for k, (h, w) in enumerate(layout.shapes)]
        side = torch.cat(sides).to(places)[:, None].expand(len(places), -1, 2)
        boxes = torch.cat((places, side), dim=-1)
        blank = layout.padding[..., None] | ((boxes <= 0.01) | (boxes >= 0.99)).any(-1, keepdim=True)
        return torch.log(boxes / (1 - boxes)).masked_fill(blank, math.inf)

    def tokens(self, memory: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Memory (B, S, C) to what is classified (B, S, C), zero where blank, and ``guesses`` (B, S, 4)."""
        guess = self.guesses(layout)
        blank = guess.isinf().any(-1, keepdim=True)
        return self.memory_norm(self.memory_fc(memory.masked_fill(blank, 0))), guess

    def queries(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, Q, 4) to positions and states of queries (B, Q, C) each."""
        embedded = box_positions(boxes, self.query_fc.in_features // 4).to(self.query_fc.weight.dtype)
        positions, states = self.query_norm(self.query_fc(embedded)).chunk(2, dim=-1)
        return positions, states


class DeformableDETRHead(nn.Module):
    """Transformer, queries and predictions.

    Args:
        in_channels: C of every level, a multiple of 4 and of ``heads``.
        strides: of the L levels.
        num_classes: number of classes.
        pad_divisor: of the canvas; not used here, attention looks at the pictures alone.
        num_queries: Q.
        heads, points, encoder_layers, decoder_layers, feedforward, dropout: of the transformer.
        box_refine: each decoder layer corrects the box of the one before, with predictions of its own.
        two_stage: queries come from the encoder's best tokens; needs ``box_refine``.
        score_threshold, max_detections: see ``query_detections``.

    Attributes:
        lr_scales: reference points learn at a tenth of the rate, as sampling offsets do (section 5).

    Raises:
        ValueError: for channels that the heads do not divide, a decoder without layers, or ``two_stage`` alone.
    """

    lr_scales: ClassVar[Mapping[str, float]] = {"reference_points": 0.1}

    def __init__(
        self,
        in_channels: int,
        strides: tuple[int, ...],
        num_classes: int,
        *,
        pad_divisor: int = 32,
        num_queries: int = 300,
        heads: int = 8,
        points: int = 4,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        feedforward: int = 1024,
        dropout: float = 0.1,
        box_refine: bool = False,
        two_stage: bool = False,
        score_threshold: float = 0.0,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        if two_stage and not box_refine:
            raise ValueError("two_stage=True refines the proposals: it needs box_refine=True")
        check_sizes(in_channels, heads, decoder_layers)
        self.num_classes, self.num_queries, self.box_refine = num_classes, num_queries, box_refine
        self.score_threshold, self.max_detections = score_threshold, max_detections
        self.transformer = Transformer(
            in_channels, len(strides), heads, points, encoder_layers, decoder_layers, feedforward, dropout
        )
        self.proposals = Proposals(in_channels) if two_stage else None
        if self.proposals is None:
            self.queries = nn.Embedding(num_queries, 2 * in_channels)
            self.reference_points = nn.Linear(in_channels, 2)
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)
        branches = decoder_layers + two_stage if box_refine else 1
        self.class_logits = nn.ModuleList(nn.Linear(in_channels, num_classes) for _ in range(branches))
        self.box_mlps = nn.ModuleList(MLP(in_channels, in_channels, in_channels, 4) for _ in range(branches))
        self._reset_branches(two_stage)

    def _reset_branches(self, two_stage: bool) -> None:
        """Classes start improbable; boxes at their reference, and without one small."""
        for logits, mlp in zip(self.class_logits, self.box_mlps, strict=True):
            nn.init.constant_(cast(nn.Linear, logits).bias, prior_bias(0.01))
            nn.init.zeros_(cast(MLP, mlp).last.weight)
            nn.init.zeros_(cast(MLP, mlp).last.bias)
        if not two_stage:
            nn.init.constant_(cast(MLP, self.box_mlps[0]).last.bias[2:], -2.0)

    def class_rows(self) -> dict[str, ClassRows]:
        """Parameters with one row per class."""
        return {f"class_logits.{i}.{k}": ClassRows() for i in range(len(self.class_logits)) for k in ("weight", "bias")}

    def forward(self, features: list[Tensor], image_sizes: Tensor, canvas: tuple[int, int]) -> DeformableDETROutput:
        """L x (B, C, H_l, W_l), fine to coarse -> ``DeformableDETROutput``."""
        memory, layout = self.transformer.encode(features, image_sizes, canvas)
        first: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = (), ()
        if self.proposals is None:
            positions, states = self.queries.weight.expand(len(memory), -1, -1).chunk(2, dim=-1)
            reference = self.reference_points(positions).float().sigmoid()
        else:
            tokens, guess = self.proposals.tokens(memory, layout)
            logits = self.class_logits[-1](tokens)
            boxes = (self.box_mlps[-1](tokens).float() + guess).sigmoid()
            best = logits[..., 0].topk(min(self.num_queries, logits.shape[1]), dim=1).indices
            reference = take_rows(boxes, best).detach()
            positions, states = self.proposals.queries(reference)
            first = (logits,), (boxes,)
        cls_logits, boxes_of = self._decode(states, positions, reference, memory, layout)
        return DeformableDETROutput(cls_logits, boxes_of, *first, image_sizes, canvas)

    def _decode(
        self, x: Tensor, positions: Tensor, reference: Tensor, memory: Tensor, layout: Layout
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """States, positions and references of the queries to class logits and boxes of every layer."""
        cls_logits, boxes = [], []
        for i, layer in enumerate(self.transformer.decoder):
            branch = i if self.box_refine else 0
            ratios = layout.ratios.repeat(1, 1, reference.shape[-1] // 2)
            x = layer(x, positions, reference[:, :, None] * ratios[:, None], memory, layout)
            delta = self.box_mlps[branch](x).float()
            box = (delta + F.pad(inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))).sigmoid()
            cls_logits.append(self.class_logits[branch](x))
            boxes.append(box)
            if self.box_refine:
                reference = box.detach()
        return tuple(cls_logits), tuple(boxes)

    def loss(self, raw: DeformableDETROutput, targets: list[Target]) -> dict[str, Tensor]:
        """Focal loss (x 2) of every query, L1 and GIoU of those that have an object, for every decoder layer.

        All are divided by the number of objects, as a mean over the processes. Proposals of two-stage detectors learn
        the same with all objects as class 0: there is something, or not.
        """
        with torch.autocast(raw.image_sizes.device.type, enabled=False):
            terms = loss_terms(*self._set_loss(raw.cls_logits, raw.boxes, targets, raw.image_sizes))
            if raw.proposal_logits:
                things: list[Target] = [{"boxes": t["boxes"], "labels": torch.zeros_like(t["labels"])} for t in targets]
                first = self._set_loss(raw.proposal_logits, raw.proposal_boxes, things, raw.image_sizes)
                terms |= {f"{name}_proposal": term for name, term in loss_terms(*first).items()}
        return terms

    def _set_loss(
        self, cls_logits: Sequence[Tensor], boxes: Sequence[Tensor], targets: list[Target], image_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, all_boxes = torch.stack(tuple(cls_logits)).float(), torch.stack(tuple(boxes)).float()
        matches = match_objects(2 * focal_costs(logits.detach()), all_boxes, targets, image_sizes)
        nothing = torch.full(logits.shape[:-1], self.num_classes, device=logits.device)
        wanted = matches.fill(nothing, matches.labels)[..., None] == torch.arange(
            self.num_classes, device=logits.device
        )
        loss_cls = 2 * sigmoid_focal_loss(logits, wanted).sum((1, 2, 3)) / num_matches(matches)
        return loss_cls, *box_losses(all_boxes, matches)

    def decode_tensors(self, raw: DeformableDETROutput) -> DetectionTensors:
        """The best pairs of query and class of the last layer; boxes in pixels of the canvas."""
        scores = raw.cls_logits[-1].float().sigmoid().flatten(1)
        scores, pair = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        return query_detections(
            take_rows(raw.boxes[-1], pair // self.num_classes),
            scores,
            pair % self.num_classes,
            raw.image_sizes,
            score_threshold=self.score_threshold,
            max_detections=self.max_detections,
        )


def focal_costs(logits: Tensor, alpha: float = 0.25, gamma: float = 2.0, eps: float = 1e-12) -> Tensor:
    """What the focal loss of a class would gain if it were right: element by element, the class part of the cost."""
    p = logits.sigmoid()
    right = -(p + eps).log() * alpha * (1 - p) ** gamma
    wrong = -(1 - p + eps).log() * (1 - alpha) * p**gamma
    return right - wrong


@register_family("deformable_detr")
def deformable_detr(name: str, pretrained: bool, user: dict[str, Any], **defaults: Any) -> Detector:
    """Deformable DETR on four levels; ``_dyhead<N>`` puts DyHead before the encoder."""
    defaults.pop("fpn_norm", None)  # the projections are always normalised
    defaults = {"num_extra": 1, "proj_norm": True, **defaults}
    return build_detector(DeformableDETRHead, name, pretrained, user, neck_cls=ProjectionNeck, **defaults)


_URL = "https://download.openmmlab.com/mmdetection"
_ARCH = {"freeze_norm": True, "frozen_stages": 1, "pad_to_cells": False}
_REFINE = {**_ARCH, "box_refine": True}
_TWO_STAGE = {**_REFINE, "two_stage": True}
_MMDET = MMDET.replace(paper_ids=("arXiv:2010.04159",), pad_divisor=1, arch=_ARCH)
_MMDET2 = _MMDET.replace(reported_by="mmdetection's model zoo (version 2), COCO val2017")
_SMALL = SMALL.replace(paper_ids=_MMDET.paper_ids)
_LITE = LITE.replace(
    paper_ids=_MMDET.paper_ids,
    arch={"encoder_layers": 2, "decoder_layers": 3, "feedforward": 384, "num_queries": 100, "dropout": 0.0},
)
_TINY_ARCH = {"encoder_layers": 1, "decoder_layers": 2, "feedforward": 64, "num_queries": 60, "dropout": 0.0}
_TINY = _SMALL.replace(arch=_TINY_ARCH)

cfgs = {
    "deformable_detr_resnet50.mmdet_50e_coco": _MMDET.replace(
        url=f"{_URL}/v3.0/deformable_detr/deformable-detr_r50_16xb2-50e_coco/"
        "deformable-detr_r50_16xb2-50e_coco_20221029_210934-6bc7d21b.pth",
        hash_prefix="6bc7d21b",
        reported={"AP": 44.3},
    ),
    "deformable_detr_resnet50.mmdet_refine_50e_coco": _MMDET.replace(
        url=f"{_URL}/v3.0/deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco/"
        "deformable-detr-refine_r50_16xb2-50e_coco_20221022_225303-844e0f93.pth",
        hash_prefix="844e0f93",
        arch=_REFINE,
        reported={"AP": 46.2},
    ),
    "deformable_detr_resnet50.mmdet_two_stage_50e_coco": _MMDET.replace(
        url=f"{_URL}/v3.0/deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco/"
        "deformable-detr-refine-twostage_r50_16xb2-50e_coco_20221021_184714-acc8a5ff.pth",
        hash_prefix="acc8a5ff",
        arch=_TWO_STAGE,
        reported={"AP": 47.0},
    ),
    "deformable_detr_resnet50.mmdet2_50e_coco": _MMDET2.replace(
        url=f"{_URL}/v2.0/deformable_detr/deformable_detr_r50_16x2_50e_coco/"
        "deformable_detr_r50_16x2_50e_coco_20210419_220030-a12b9512.pth",
        hash_prefix="a12b9512",
        reported={"AP": 44.5},
    ),
    "deformable_detr_resnet50.mmdet2_refine_50e_coco": _MMDET2.replace(
        url=f"{_URL}/v2.0/deformable_detr/deformable_detr_refine_r50_16x2_50e_coco/"
        "deformable_detr_refine_r50_16x2_50e_coco_20210419_220503-5f5dff21.pth",
        hash_prefix="5f5dff21",
        arch=_REFINE,
        reported={"AP": 46.1},
    ),
    "deformable_detr_resnet50.mmdet2_two_stage_50e_coco": _MMDET2.replace(
        url=f"{_URL}/v2.0/deformable_detr/deformable_detr_twostage_refine_r50_16x2_50e_coco/"
        "deformable_detr_twostage_refine_r50_16x2_50e_coco_20210419_220613-9d28ab72.pth",
        hash_prefix="9d28ab72",
        arch=_TWO_STAGE,
        reported={"AP": 46.8},
    ),
    "deformable_detr_lite0": _LITE,
    "deformable_detr_lite0_dyhead2": _LITE,
    "test_deformable_detr": _TINY,
    "test_deformable_detr_dyhead1": _TINY.replace(arch={**_TINY_ARCH, "box_refine": True, "two_stage": True}),
}
"""Weights by ``name.tag``, the default tag of a name first."""


@register_detector
def deformable_detr_resnet50(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Deformable DETR, ResNet-50; the tags are its three variants."""
    return deformable_detr("deformable_detr_resnet50", pretrained, kwargs, backbone="resnet50")


@register_detector
def deformable_detr_resnet50_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Deformable DETR, ResNet-50, six DyHead blocks before the encoder."""
    return deformable_detr("deformable_detr_resnet50_dyhead6", pretrained, kwargs, backbone="resnet50", dyhead=6)


@register_detector
def deformable_detr_lite0(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Deformable DETR, EfficientNet-Lite0, layers of 96 channels."""
    return deformable_detr("deformable_detr_lite0", pretrained, kwargs, backbone="lite0", channels=96)


@register_detector
def deformable_detr_lite0_dyhead2(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Deformable DETR, EfficientNet-Lite0, two DyHead blocks of 96 channels before the encoder."""
    return deformable_detr("deformable_detr_lite0_dyhead2", pretrained, kwargs, backbone="lite0", channels=96, dyhead=2)


@register_detector
def test_deformable_detr(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny Deformable DETR, for tests."""
    return deformable_detr("test_deformable_detr", pretrained, kwargs, backbone="test_resnet", channels=32)


@register_detector
def test_deformable_detr_dyhead1(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny two-stage Deformable DETR with one DyHead block, for tests."""
    return deformable_detr(
        "test_deformable_detr_dyhead1", pretrained, kwargs, backbone="test_efficientnet", channels=32, dyhead=1
    )
