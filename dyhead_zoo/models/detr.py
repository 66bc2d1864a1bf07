"""DETR: a transformer reads one feature map, and a fixed set of queries answers with the set of objects.

Paper: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, arXiv:2005.12872. The variants and
their figures are those of facebookresearch/detr and mmdetection (both Apache-2.0). With DyHead, its blocks stand
between the projection and the encoder; on a single level only their middle branch remains.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dyhead_zoo.detector import Detector
from dyhead_zoo.factory import build_detector
from dyhead_zoo.layers.losses import mean_over_ranks
from dyhead_zoo.layers.matching import box_losses, loss_terms, match_objects
from dyhead_zoo.layers.positions import padding_masks, sine_positions
from dyhead_zoo.layers.postprocess import query_detections
from dyhead_zoo.layers.projection import ProjectionNeck
from dyhead_zoo.layers.transformer import MLP, Attention, FeedForward, check_sizes, init_matrices
from dyhead_zoo.models.sources import LITE, SMALL
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.registry import register_detector, register_family
from dyhead_zoo.structures import DetectionTensors, Target
from dyhead_zoo.weights import ClassRows


class DETROutput(NamedTuple):
    """Raw outputs, one tensor per decoder layer; the last one is the answer.

    Attributes:
        cls_logits: (B, Q, C + 1 + unused rows): classes, no object, rows that mean nothing.
        boxes: (B, Q, 4), (cx, cy, w, h) in units of the picture's own width and height.
        image_sizes: (B, 2) int64, (height, width) of each picture within the canvas.
        canvas: (height, width) of the padded batch.
    """

    cls_logits: tuple[Tensor, ...]
    boxes: tuple[Tensor, ...]
    image_sizes: Tensor
    canvas: tuple[int, int]


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with a residual connection and LayerNorm after it."""

    def __init__(self, channels: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(channels, heads, dropout)
        self.norm1 = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels, feedforward, dropout)
        self.norm2 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        """Tokens (B, N, C), their positions (B, N, C), ``padding`` (B, N) -> (B, N, C)."""
        key = x + positions
        x = self.norm1(x + self.dropout(self.self_attn(key, key, x, padding)))
        return self.norm2(x + self.dropout(self.ffn(x)))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the memory, feed-forward."""

    def __init__(self, channels: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(channels, heads, dropout)
        self.norm1 = nn.LayerNorm(channels)
        self.cross_attn = Attention(channels, heads, dropout)
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels, feedforward, dropout)
        self.norm3 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        """States (B, Q, C) of the ``queries`` (B, Q, C), memory and its positions (B, N, C) -> (B, Q, C)."""
        key = x + queries
        x = self.norm1(x + self.dropout(self.self_attn(key, key, x)))
        x = self.norm2(x + self.dropout(self.cross_attn(x + queries, memory + positions, memory, padding)))
        return self.norm3(x + self.dropout(self.ffn(x)))


class Transformer(nn.Module):
    """Encoder and decoder; ``norm`` follows every decoder layer before its predictions."""

    def __init__(
        self, channels: int, heads: int, encoder_layers: int, decoder_layers: int, feedforward: int, dropout: float
    ) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(EncoderLayer(channels, heads, feedforward, dropout) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(channels, heads, feedforward, dropout) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(channels)
        init_matrices(self)

    def encode(self, tokens: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        """Tokens (B, N, C) to the memory (B, N, C)."""
        for layer in self.encoder:
            tokens = layer(tokens, positions, padding)
        return tokens

    def decode(self, queries: Tensor, memory: Tensor, positions: Tensor, padding: Tensor) -> list[Tensor]:
        """What the queries (B, Q, C) have become after each layer: L x (B, Q, C)."""
        x, states = torch.zeros_like(queries), []
        for layer in self.decoder:
            x = layer(x, queries, memory, positions, padding)
            states.append(self.norm(x))
        return states


class DETRHead(nn.Module):
    """Transformer and predictions, which all decoder layers share.

    Args:
        in_channels: C of the feature map, a multiple of 4 and of ``heads``.
        strides: of the one level.
        num_classes: number of classes.
        pad_divisor: of the canvas; not used here, attention looks at the pictures alone.
        num_queries: Q, the most objects that can be found.
        heads, encoder_layers, decoder_layers, feedforward, dropout: of the transformer.
        no_object_weight: of unmatched queries in the classification loss.
        unused_rows: classifier rows after "no object" that stand for nothing. The authors' weights have one for each
            COCO id without a class; they take part in the softmax and are never an answer.
        score_threshold, max_detections: see ``query_detections``.

    Raises:
        ValueError: for more than one level, channels that the heads do not divide, or a decoder without layers.
    """

    def __init__(
        self,
        in_channels: int,
        strides: tuple[int, ...],
        num_classes: int,
        *,
        pad_divisor: int = 32,
        num_queries: int = 100,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        feedforward: int = 2048,
        dropout: float = 0.1,
        no_object_weight: float = 0.1,
        unused_rows: int = 0,
        score_threshold: float = 0.0,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        if len(strides) != 1:
            raise ValueError(f"strides={strides}: DETR reads one level, such as strides=(32,)")
        check_sizes(in_channels, heads, decoder_layers)
        self.num_classes, self.unused_rows, self.no_object_weight = num_classes, unused_rows, no_object_weight
        self.num_queries = num_queries
        self.score_threshold, self.max_detections = score_threshold, max_detections
        self.transformer = Transformer(in_channels, heads, encoder_layers, decoder_layers, feedforward, dropout)
        self.queries = nn.Embedding(num_queries, in_channels)
        self.class_logits = nn.Linear(in_channels, num_classes + 1 + unused_rows)
        self.box_mlp = MLP(in_channels, in_channels, in_channels, 4)

    def class_rows(self) -> dict[str, ClassRows]:
        """Parameters with one row per class, then those for no object and for nothing."""
        rows = ClassRows(extra=1 + self.unused_rows)
        return {"class_logits.weight": rows, "class_logits.bias": rows}

    def forward(self, features: list[Tensor], image_sizes: Tensor, canvas: tuple[int, int]) -> DETROutput:
        """One level (B, C, H, W) -> ``DETROutput``."""
        (x,) = features
        (padding,) = padding_masks(image_sizes, canvas, [(x.shape[2], x.shape[3])])
        positions = sine_positions(padding, x.shape[1]).to(x.dtype)
        padding = padding.flatten(1)
        memory = self.transformer.encode(x.flatten(2).transpose(1, 2), positions, padding)
        queries = self.queries.weight.expand(len(x), -1, -1)
        states = self.transformer.decode(queries, memory, positions, padding)
        return DETROutput(
            tuple(self.class_logits(state) for state in states),
            tuple(self.box_mlp(state).float().sigmoid() for state in states),
            image_sizes,
            canvas,
        )

    def loss(self, raw: DETROutput, targets: list[Target]) -> dict[str, Tensor]:
        """Cross entropy of every query, L1 and GIoU of those that have an object, for every decoder layer.

        Unmatched queries learn "no object" at a tenth of the weight; the sum is divided by the sum of the weights, and
        the box terms by the number of objects, both as means over the processes.
        """
        with torch.autocast(raw.image_sizes.device.type, enabled=False):
            log_p = torch.stack(raw.cls_logits).float().log_softmax(-1)
            boxes = torch.stack(raw.boxes).float()
            matches = match_objects(-log_p.exp(), boxes, targets, raw.image_sizes)
            wanted = torch.full(log_p.shape[:-1], self.num_classes, device=log_p.device)
            wanted = matches.fill(wanted, matches.labels)
            weight = torch.where(wanted == self.num_classes, self.no_object_weight, 1.0)
            entropy = -log_p.gather(-1, wanted[..., None]).squeeze(-1)
            loss_cls = (entropy * weight).sum((1, 2)) / mean_over_ranks(weight[0].sum()).clamp(min=1)
            return loss_terms(loss_cls, *box_losses(boxes, matches))

    def decode_tensors(self, raw: DETROutput) -> DetectionTensors:
        """The best class of each query of the last layer, without "no object"; boxes in pixels of the canvas."""
        scores, labels = raw.cls_logits[-1].float().softmax(-1)[..., : self.num_classes].max(-1)
        return query_detections(
            raw.boxes[-1],
            scores,
            labels,
            raw.image_sizes,
            score_threshold=self.score_threshold,
            max_detections=self.max_detections,
        )


@register_family("detr")
def detr(name: str, pretrained: bool, user: dict[str, Any], **defaults: Any) -> Detector:
    """DETR; ``_dyhead<N>`` puts DyHead before the encoder."""
    defaults = {"strides": (32,), "proj_norm": defaults.pop("fpn_norm", False), **defaults}
    return build_detector(DETRHead, name, pretrained, user, neck_cls=ProjectionNeck, **defaults)


_OFFICIAL_URL = "https://dl.fbaipublicfiles.com/detr"
_OFFICIAL = PretrainedCfg(
    source="detr",
    license="apache-2.0",
    origin_url="https://github.com/facebookresearch/detr",
    paper_ids=("arXiv:2005.12872",),
    reported_by="facebookresearch/detr README, COCO val2017",
    rounding="floor",
    pad_divisor=1,
    arch={"freeze_norm": True, "frozen_stages": 1, "pad_to_cells": False, "unused_rows": 11},
)
_DC5 = {**_OFFICIAL.arch, "output_stride": 16, "strides": (16,)}
_SMALL = SMALL.replace(paper_ids=_OFFICIAL.paper_ids)
_LITE_ARCH = {"proj_norm": True, "encoder_layers": 3, "decoder_layers": 3, "feedforward": 384, "dropout": 0.0}
_LITE = LITE.replace(paper_ids=_OFFICIAL.paper_ids, arch=_LITE_ARCH)
_TINY = _SMALL.replace(
    arch={"proj_norm": True, "encoder_layers": 1, "decoder_layers": 2, "feedforward": 64, "dropout": 0.0}
)

cfgs = {
    "detr_resnet50.official_500e_coco": _OFFICIAL.replace(
        url=f"{_OFFICIAL_URL}/detr-r50-e632da11.pth", hash_prefix="e632da11", reported={"AP": 42.0}
    ),
    "detr_resnet50.official_dc5_500e_coco": _OFFICIAL.replace(
        url=f"{_OFFICIAL_URL}/detr-r50-dc5-f0fb7ef5.pth", hash_prefix="f0fb7ef5", arch=_DC5, reported={"AP": 43.3}
    ),
    "detr_resnet50.mmdet_150e_coco": _OFFICIAL.replace(
        source="mmdet",
        url="https://download.openmmlab.com/mmdetection/v3.0/detr/detr_r50_8xb2-150e_coco/"
        "detr_r50_8xb2-150e_coco_20221023_153551-436d03e8.pth",
        hash_prefix="436d03e8",
        origin_url="https://github.com/open-mmlab/mmdetection",
        antialias=False,
        rounding="half_up",
        arch={**_OFFICIAL.arch, "unused_rows": 0},
        reported={"AP": 39.9},
        reported_by="mmdetection's model zoo, COCO val2017",
    ),
    "detr_resnet50.mmdet2_150e_coco": _OFFICIAL.replace(
        source="mmdet",
        url="https://download.openmmlab.com/mmdetection/v2.0/detr/detr_r50_8x2_150e_coco/"
        "detr_r50_8x2_150e_coco_20201130_194835-2c4b8974.pth",
        hash_prefix="2c4b8974",
        origin_url="https://github.com/open-mmlab/mmdetection",
        antialias=False,
        rounding="half_up",
        arch={**_OFFICIAL.arch, "unused_rows": 0},
        reported={"AP": 40.1},
        reported_by="mmdetection's model zoo (version 2), COCO val2017",
    ),
    "detr_resnet101.official_500e_coco": _OFFICIAL.replace(
        url=f"{_OFFICIAL_URL}/detr-r101-2c7b67e5.pth", hash_prefix="2c7b67e5", reported={"AP": 43.5}
    ),
    "detr_resnet101.official_dc5_500e_coco": _OFFICIAL.replace(
        url=f"{_OFFICIAL_URL}/detr-r101-dc5-a2e86def.pth", hash_prefix="a2e86def", arch=_DC5, reported={"AP": 44.9}
    ),
    "detr_lite0": _LITE,
    "detr_lite0_dyhead2": _LITE,
    "test_detr": _TINY,
    "test_detr_dyhead1": _TINY,
}
"""Weights by ``name.tag``, the default tag of a name first."""


@register_detector
def detr_resnet50(pretrained: bool = False, **kwargs: Any) -> Detector:
    """DETR, ResNet-50."""
    return detr("detr_resnet50", pretrained, kwargs, backbone="resnet50")


@register_detector
def detr_resnet50_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """DETR, ResNet-50, six DyHead blocks on its one level before the encoder."""
    return detr("detr_resnet50_dyhead6", pretrained, kwargs, backbone="resnet50", dyhead=6)


@register_detector
def detr_resnet101(pretrained: bool = False, **kwargs: Any) -> Detector:
    """DETR, ResNet-101."""
    return detr("detr_resnet101", pretrained, kwargs, backbone="resnet101")


@register_detector
def detr_lite0(pretrained: bool = False, **kwargs: Any) -> Detector:
    """DETR, EfficientNet-Lite0, three layers of 96 channels each way."""
    return detr("detr_lite0", pretrained, kwargs, backbone="lite0", channels=96)


@register_detector
def detr_lite0_dyhead2(pretrained: bool = False, **kwargs: Any) -> Detector:
    """DETR, EfficientNet-Lite0, two DyHead blocks of 96 channels before the encoder."""
    return detr("detr_lite0_dyhead2", pretrained, kwargs, backbone="lite0", channels=96, dyhead=2)


@register_detector
def test_detr(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny DETR, for tests."""
    return detr("test_detr", pretrained, kwargs, backbone="test_resnet", channels=32)


@register_detector
def test_detr_dyhead1(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny DETR with one DyHead block, for tests."""
    return detr("test_detr_dyhead1", pretrained, kwargs, backbone="test_efficientnet", channels=32, dyhead=1)
