"""RepPoints: objects as nine points, which say where features are read and whose extent is the box.

Paper: Yang et al., "RepPoints: Point Set Representation for Object Detection", ICCV 2019, arXiv:1904.11490. The
variants and their figures are those of mmdetection (Apache-2.0). The paper of DyHead puts it under RepPoints without
saying how; here it takes the place of the towers, and all points are learned from its output.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_zoo.detector import Detector
from dyhead_zoo.factory import build_detector
from dyhead_zoo.layers.anchors import grid_points
from dyhead_zoo.layers.assigners import BACKGROUND, IGNORED, max_iou_assign, point_assign
from dyhead_zoo.layers.losses import mean_over_ranks, sigmoid_focal_loss
from dyhead_zoo.layers.postprocess import by_place, dense_detections, take_rows
from dyhead_zoo.layers.targets import Assignment, cells_inside, matched_objects
from dyhead_zoo.layers.tower import ConvTower, prior_bias
from dyhead_zoo.models.sources import DYHEAD_PAPER, LITE, MMDET, MMDET_URL, SMALL
from dyhead_zoo.ops import modulated_deform_conv2d
from dyhead_zoo.ops.deform_conv import Backend
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.registry import register_detector, register_family
from dyhead_zoo.structures import DetectionTensors, Target
from dyhead_zoo.weights import ClassRows

POINTS = 9
"""Points of an object: the taps of a 3x3 convolution."""
POINTS_GRADIENT = 0.1
"""Share of the gradient that the points get from what is read at them."""
MOMENT_GRADIENT = 0.01
"""Share of the gradient that the two scales of the moment transform get."""
BOX_SCALE = 4.0
"""Box losses are in units of this many strides, which is also the size of objects that a level is made for."""

Transform = Literal["moment", "minmax", "partial_minmax"]


class RepPointsOutput(NamedTuple):
    """Raw outputs, one tensor per level, fine to coarse.

    Points and boxes are float32, in strides, relative to the corner of their cell (its first pixel).

    Attributes:
        cls_logits: (B, C, H_l, W_l).
        init_points: (B, 18, H_l, W_l), (y, x) pairs, of the first step, where the features are read.
        init_boxes: (B, 4, H_l, W_l) xyxy of these points.
        points, boxes: the same of the second step; these boxes are the result.
        image_sizes: (B, 2) int64, (height, width) of each picture within the canvas.
        canvas: (height, width) of the padded batch.
    """

    cls_logits: tuple[Tensor, ...]
    init_points: tuple[Tensor, ...]
    init_boxes: tuple[Tensor, ...]
    points: tuple[Tensor, ...]
    boxes: tuple[Tensor, ...]
    image_sizes: Tensor
    canvas: tuple[int, int]


def scale_gradient(x: Tensor, share: float) -> Tensor:
    """The tensor itself, through which only this share of the gradient flows back."""
    return share * x + (1 - share) * x.detach()


class PointConv(nn.Module):
    """Deformable 3x3 convolution (DCNv1, arXiv:1703.06211) whose taps are the points, without bias.

    Shapes: x (B, C, H, W), points (B, 18, H, W) in cells, relative to their own cell, (y, x) pairs -> (B, C, H, W).

    ``backend`` is that of ``modulated_deform_conv2d``.
    """

    taps: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.backend: Backend = "auto"
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.normal_(self.weight, std=0.01)
        steps = torch.arange(-1.0, 2.0)
        self.register_buffer("taps", torch.cartesian_prod(steps, steps).view(1, 2 * POINTS, 1, 1), persistent=False)

    def forward(self, x: Tensor, points: Tensor) -> Tensor:
        return modulated_deform_conv2d(x, points - self.taps, None, self.weight, padding=1, backend=self.backend)


class RepPointsHead(nn.Module):
    """Points in two steps, and classes, from each pyramid level, with weights shared over the levels.

    The first step places nine points around each cell. The features read there give the classes and shifts of the
    points to their final places.

    Args:
        in_channels, strides: of the pyramid.
        num_classes: C.
        towers: conv-ReLU layers before the predictions of each branch; 0 on top of DyHead.
        tower_norm: GroupNorm in them.
        transform: how points become a box (section 3.2): ``'moment'``: mean and standard deviation of the points, the
            latter times a learned factor; ``'minmax'``: their smallest and largest coordinates;
            ``'partial_minmax'``: those of the first four points.
        pad_divisor: cells beyond a picture's own size rounded up to it take no part in training.
        score_threshold, pre_nms, nms_threshold, max_detections: see ``dense_detections``.
    """

    def __init__(
        self,
        in_channels: int,
        strides: tuple[int, ...],
        num_classes: int,
        *,
        towers: int = 3,
        tower_norm: bool = True,
        transform: Transform = "moment",
        pad_divisor: int = 32,
        score_threshold: float = 0.05,
        pre_nms: int = 1000,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        if transform not in ("moment", "minmax", "partial_minmax"):
            raise ValueError(f"transform={transform!r}: use 'moment', 'minmax' or 'partial_minmax'")
        self.num_classes, self.strides, self.pad_divisor = num_classes, strides, pad_divisor
        self.transform = transform
        self.score_threshold, self.pre_nms = score_threshold, pre_nms
        self.nms_threshold, self.max_detections = nms_threshold, max_detections
        self.cls_tower = ConvTower(in_channels, towers, tower_norm)
        self.box_tower = ConvTower(in_channels, towers, tower_norm)
        self.init_conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.init_out = nn.Conv2d(in_channels, 2 * POINTS, 1)
        self.refine_conv = PointConv(in_channels)
        self.refine_out = nn.Conv2d(in_channels, 2 * POINTS, 1)
        self.cls_conv = PointConv(in_channels)
        self.cls_logits = nn.Conv2d(in_channels, num_classes, 1)
        for conv in (self.init_conv, self.init_out, self.refine_out, self.cls_logits):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.cls_logits.bias, prior_bias(0.01))  # type: ignore[arg-type]
        if transform == "moment":
            self.moment_transfer = nn.Parameter(torch.zeros(2))

    def class_rows(self) -> dict[str, ClassRows]:
        """Parameters with one row per class."""
        return {"cls_logits.weight": ClassRows(), "cls_logits.bias": ClassRows()}

    def forward(self, features: list[Tensor], image_sizes: Tensor, canvas: tuple[int, int]) -> RepPointsOutput:
        """Pyramid L x (B, C, H_l, W_l), fine to coarse -> ``RepPointsOutput``."""
        levels = [self._level(x) for x in features]
        cls_logits, init_points, init_boxes, points, boxes = zip(*levels, strict=True)
        return RepPointsOutput(cls_logits, init_points, init_boxes, points, boxes, image_sizes, canvas)

    def _level(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first five fields of the output, for one level."""
        cls, box = self.cls_tower(x), self.box_tower(x)
        init_points = self.init_out(F.relu(self.init_conv(box))).float()
        places = scale_gradient(init_points, POINTS_GRADIENT)
        logits = self.cls_logits(F.relu(self.cls_conv(cls, places)))
        points = self.refine_out(F.relu(self.refine_conv(box, places))).float() + init_points.detach()
        return logits, init_points, self.box_of(init_points), points, self.box_of(points)

    def box_of(self, points: Tensor) -> Tensor:
        """The box of each point set: (B, 18, H, W), (y, x) pairs -> (B, 4, H, W) xyxy (section 3.2)."""
        xy = points.unflatten(1, (POINTS, 2)).flip(2)  # (B, 9, 2, H, W)
        if self.transform == "moment":
            factor = scale_gradient(self.moment_transfer.float(), MOMENT_GRADIENT).exp()
            centre, half = xy.mean(1), xy.std(1) * factor[:, None, None]
            return torch.cat((centre - half, centre + half), dim=1)
        if self.transform == "partial_minmax":
            xy = xy[:, :4]
        return torch.cat((xy.amin(1), xy.amax(1)), dim=1)

    def corners(self, raw: RepPointsOutput) -> list[Tensor]:
        """Corner of each cell, which points and boxes are relative to: L x (H_l * W_l, 2), x first, in pixels."""
        levels = zip(raw.cls_logits, self.strides, strict=True)
        return [grid_points((x.shape[-2], x.shape[-1]), stride, 0.0, x) for x, stride in levels]

    def pixel_boxes(self, raw: RepPointsOutput, boxes: tuple[Tensor, ...]) -> list[Tensor]:
        """Boxes of the output in pixels of the canvas: L x (B, H_l * W_l, 4) xyxy."""
        levels = zip(boxes, self.strides, self.corners(raw), strict=True)
        return [by_place(x, 4) * stride + corner.repeat(1, 2) for x, stride, corner in levels]

    def assign(self, raw: RepPointsOutput, targets: list[Target]) -> Assignment:
        """Which object each cell's first box learns; that of its class and second box depends on the first one."""
        corners = self.corners(raw)
        points, sizes = torch.cat(corners), [len(level) for level in corners]
        owners = []
        for size, target in zip(raw.image_sizes.tolist(), targets, strict=True):
            inside = self._inside(raw, size)
            counts = [int(part.sum()) for part in inside.split(sizes)]
            owner = torch.full((len(points),), BACKGROUND, dtype=torch.int64, device=points.device)
            owner[inside] = point_assign(points[inside], counts, self.strides, target["boxes"].to(points), BOX_SCALE)
            owners.append(owner)
        return Assignment(corners, torch.stack(owners))

    def _inside(self, raw: RepPointsOutput, size: list[int]) -> Tensor:
        """Cells of all levels (P,) that a picture of (height, width) ``size`` reaches."""
        levels = zip(raw.cls_logits, self.strides, strict=True)
        return torch.cat([cells_inside(x, stride, size, self.pad_divisor) for x, stride in levels])

    def targets(self, raw: RepPointsOutput, targets: list[Target]) -> tuple[Tensor, Tensor]:
        """What each cell learns (section 4).

        Returns:
            The object of its first box, the nearest to one object (B, P), ``BACKGROUND`` for most; and the object of
            its class and second box, by the overlap of the first one (B, P), ``BACKGROUND`` or ``IGNORED``. Cells
            beyond a picture's own padded size learn nothing.
        """
        init_boxes = torch.cat(self.pixel_boxes(raw, raw.init_boxes), dim=1).detach()
        init_owner = self.assign(raw, targets).owner
        owner = torch.full_like(init_owner, IGNORED)
        for i, (size, target) in enumerate(zip(raw.image_sizes.tolist(), targets, strict=True)):
            inside, boxes = self._inside(raw, size), init_boxes[i]
            owner[i, inside] = max_iou_assign(boxes[inside], target["boxes"].to(boxes), positive=0.5, negative=0.4)
        return init_owner, owner

    def loss(self, raw: RepPointsOutput, targets: list[Target]) -> dict[str, Tensor]:
        """Focal loss on classes, smooth L1 on the corners of both boxes, the first with half the weight.

        Each is divided by its number of positives, at least one per picture, as a mean over the processes.
        """
        with torch.autocast(raw.image_sizes.device.type, enabled=False):
            init_owner, owner = self.targets(raw, targets)
            logits = torch.cat([by_place(x, self.num_classes) for x in raw.cls_logits], dim=1).float()
            image, place = (owner >= 0).nonzero(as_tuple=True)
            _, labels = matched_objects(targets, image, owner[image, place])
            wanted = torch.zeros_like(logits)
            wanted[image, place, labels] = 1
            loss_cls = (sigmoid_focal_loss(logits, wanted) * (owner != IGNORED)[..., None]).sum() / _count(owner)
            return {
                "loss_cls": loss_cls,
                "loss_init_box": 0.5 * self._box_loss(raw, raw.init_boxes, init_owner, targets),
                "loss_refine_box": self._box_loss(raw, raw.boxes, owner, targets),
            }

    def _box_loss(
        self, raw: RepPointsOutput, boxes: tuple[Tensor, ...], owner: Tensor, targets: list[Target]
    ) -> Tensor:
        """Smooth L1 between the boxes of the positive cells and their objects; ``owner`` is (B, P)."""
        predicted = self.pixel_boxes(raw, boxes)
        strides = torch.cat([x.new_full((x.shape[1],), s) for x, s in zip(predicted, self.strides, strict=True)])
        image, place = (owner >= 0).nonzero(as_tuple=True)
        wanted, _ = matched_objects(targets, image, owner[image, place])
        unit = BOX_SCALE * strides[place, None]
        terms = F.smooth_l1_loss(
            torch.cat(predicted, dim=1)[image, place] / unit, wanted / unit, reduction="sum", beta=0.11
        )
        return terms / _count(owner)

    def decode_tensors(self, raw: RepPointsOutput) -> DetectionTensors:
        """Detections in pixels of the canvas, clipped to each picture; score = class probability."""
        boxes = self.pixel_boxes(raw, raw.boxes)
        return dense_detections(
            [by_place(x, self.num_classes) for x in raw.cls_logits],
            None,
            lambda level, rows: take_rows(boxes[level], rows),
            raw.image_sizes,
            score_threshold=self.score_threshold,
            pre_nms=self.pre_nms,
            nms_threshold=self.nms_threshold,
            max_detections=self.max_detections,
        )


def _count(owner: Tensor) -> Tensor:
    """Positives of an assignment (B, P), at least one per picture; mean over the processes."""
    return mean_over_ranks((owner >= 0).sum(1).clamp(min=1).sum().float())


@register_family("reppoints")
def reppoints(name: str, pretrained: bool, user: dict[str, Any], **defaults: Any) -> Detector:
    """RepPoints with conv towers, or with DyHead in their place; GroupNorm in the pyramid and P6 from C5."""
    defaults.setdefault("towers", 0 if user.get("dyhead", defaults.get("dyhead", 0)) else 3)
    defaults.setdefault("extra_from", "c5")
    defaults.setdefault("fpn_norm", True)
    return build_detector(RepPointsHead, name, pretrained, user, **defaults)


_PAPERS = ("arXiv:1904.11490",)
_DYHEAD_PAPERS = (DYHEAD_PAPER, *_PAPERS)
_MMDET_ARCH = {"frozen_stages": 1, "norm_eval": True}
_SMALL = SMALL.replace(paper_ids=_PAPERS)
_LITE = LITE.replace(
    paper_ids=_DYHEAD_PAPERS,
    arch={"score_threshold": 0.01},
)


def _mmdet(ap: float, config: str, version: str) -> PretrainedCfg:
    """Weights of mmdetection's ``reppoints_moment_<config>_coco``; those without GroupNorm say so by their name."""
    name = f"reppoints_moment_{config}_coco".replace("+", "%2B")
    plain = {} if "gn-" in config else {"fpn_norm": False, "tower_norm": False}
    return MMDET.replace(
        paper_ids=_PAPERS,
        arch={**_MMDET_ARCH, **plain},
        url=f"{MMDET_URL}/reppoints/{name}/{name}_{version}.pth",
        hash_prefix=version.rpartition("-")[2],
        reported={"AP": ap},
    )


cfgs = {
    "reppoints_resnet50.mmdet_gn_2x_coco": _mmdet(38.6, "r50_fpn_gn-neck+head_2x", "20200329-91babaa2"),
    "reppoints_resnet50.mmdet_gn_1x_coco": _mmdet(38.1, "r50_fpn_gn-neck+head_1x", "20200329_145952-3e51b550"),
    "reppoints_resnet50.mmdet_1x_coco": _mmdet(37.0, "r50_fpn_1x", "20200330-b73db8d1"),
    "reppoints_resnet101.mmdet_gn_2x_coco": _mmdet(40.5, "r101_fpn_gn-neck+head_2x", "20200329-4fbc7310"),
    "reppoints_resnet50_dyhead6": PretrainedCfg(license="apache-2.0", paper_ids=_DYHEAD_PAPERS),
    "reppoints_swin_dyhead6": PretrainedCfg(license="apache-2.0", paper_ids=_DYHEAD_PAPERS, arch={"drop_path": 0.2}),
    "reppoints_lite0_dyhead2": _LITE,
    "test_reppoints": _SMALL,
    "test_reppoints_dyhead1": _SMALL.replace(paper_ids=_DYHEAD_PAPERS),
}
"""Weights by ``name.tag``, the default tag of a name first."""


@register_detector
def reppoints_resnet50(pretrained: bool = False, **kwargs: Any) -> Detector:
    """RepPoints with its three-convolution towers, ResNet-50."""
    return reppoints("reppoints_resnet50", pretrained, kwargs, backbone="resnet50")


@register_detector
def reppoints_resnet101(pretrained: bool = False, **kwargs: Any) -> Detector:
    """RepPoints with its three-convolution towers, ResNet-101."""
    return reppoints("reppoints_resnet101", pretrained, kwargs, backbone="resnet101")


@register_detector
def reppoints_resnet50_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """RepPoints, ResNet-50, six DyHead blocks."""
    return reppoints("reppoints_resnet50_dyhead6", pretrained, kwargs, backbone="resnet50", dyhead=6)


@register_detector
def reppoints_swin_dyhead6(pretrained: bool = False, **kwargs: Any) -> Detector:
    """RepPoints, Swin-T, six DyHead blocks."""
    return reppoints("reppoints_swin_dyhead6", pretrained, kwargs, backbone="swin", dyhead=6)


@register_detector
def reppoints_lite0_dyhead2(pretrained: bool = False, **kwargs: Any) -> Detector:
    """RepPoints, EfficientNet-Lite0, two DyHead blocks of 96 channels: trains and runs on a CPU."""
    return reppoints("reppoints_lite0_dyhead2", pretrained, kwargs, backbone="lite0", channels=96, dyhead=2)


@register_detector
def test_reppoints(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny RepPoints with one tower layer, for tests."""
    return reppoints("test_reppoints", pretrained, kwargs, backbone="test_resnet", channels=32, towers=1)


@register_detector
def test_reppoints_dyhead1(pretrained: bool = False, **kwargs: Any) -> Detector:
    """Tiny RepPoints with one DyHead block, for tests."""
    return reppoints("test_reppoints_dyhead1", pretrained, kwargs, backbone="test_efficientnet", channels=32, dyhead=1)
