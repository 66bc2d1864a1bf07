"""The detector: backbone, neck and head behind four pure steps, ``forward``, ``loss``, ``decode`` and ``predict``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn

from dyhead_zoo.data.label_space import LabelSpace
from dyhead_zoo.layers.backbone import Backbone
from dyhead_zoo.layers.dyhead import BlockAttention, pack_weights
from dyhead_zoo.layers.fpn import DyHeadNeck
from dyhead_zoo.layers.fusion import fuse_activations, fuse_batch_norms
from dyhead_zoo.layers.packing import pack_convolutions
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.structures import Detections, DetectionTensors, Target
from dyhead_zoo.weights import ClassRows

FORMAT_VERSION = 1
"""Of ``Detector.config()``."""


class RawOutput(Protocol):
    """What every family's raw output carries besides its own tensors."""

    @property
    def image_sizes(self) -> Tensor: ...

    @property
    def canvas(self) -> tuple[int, int]: ...


class Head(Protocol):
    """What ``Detector`` asks of a head."""

    def __call__(self, features: list[Tensor], image_sizes: Tensor, canvas: tuple[int, int]) -> RawOutput: ...

    def loss(self, raw: Any, targets: list[Target]) -> dict[str, Tensor]: ...

    def decode_tensors(self, raw: Any) -> DetectionTensors: ...

    def class_rows(self) -> dict[str, ClassRows]: ...


class Detector(nn.Module):
    """Backbone, neck and head with the input protocol and the labels of its weights.

    Build one with ``create_detector``.

    Attributes:
        name: the registered or grammar name.
        arch: the arguments that built it, JSON-able.
        pretrained_cfg: input protocol, label space and provenance.
        fused: whether ``fuse`` has made it one for inference only.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        head: nn.Module,
        *,
        name: str,
        arch: Mapping[str, Any],
        pretrained_cfg: PretrainedCfg,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.name, self.arch, self.pretrained_cfg, self.in_chans = name, dict(arch), pretrained_cfg, in_chans
        self.backbone, self.neck, self.head = backbone, neck, head
        self.fused = False
        for key in ("mean", "std"):
            values = torch.tensor(getattr(pretrained_cfg, key), dtype=torch.float32)
            if len(values) != in_chans:
                values = values.mean().repeat(in_chans)  # no statistics are known for other channels
            self.register_buffer(key, values.view(1, -1, 1, 1), persistent=False)

    @property
    def label_space(self) -> LabelSpace:
        """Names and COCO ids of the labels."""
        return self.pretrained_cfg.label_space

    @property
    def wants_masks(self) -> bool:
        """Whether targets must have masks for ``loss``."""
        return bool(getattr(self.head, "wants_masks", False))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.mean.device

    def config(self) -> dict[str, Any]:
        """JSON-able record that, with the state dict, gives the same detector again; every way to save it needs it.

        Raises:
            ValueError: for a fused detector, whose state dict no other detector could load.
        """
        self._check_unfused("saved")
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "arch": self.arch,
            "pretrained_cfg": self.pretrained_cfg.to_dict(),
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade computation for memory in training: backbone stages and DyHead blocks are recomputed."""
        for part in (self.backbone, self.neck):
            part.set_grad_checkpointing(enable)  # type: ignore[operator]

    def fuse(self) -> Self:
        """Make inference faster: the backbone's BatchNorm goes into its convolutions, memory becomes channels-last.

        Convolutions keep their weights a second time, laid out for products on a CPU; those of the backbone do the
        activation that follows, and in ResNets the sum, in the same pass. In place, like the ``fuse`` of timm's models;
        a second call does nothing. Results stay the same up to rounding, but NaN may come out of a ReLU as 0. What was
        folded cannot be told apart again, so a fused detector cannot be trained or saved: it belongs at the end of what
        loads the weights. ``copy.deepcopy`` first keeps one that can.
        """
        self.eval()
        if not self.fused:
            backbone = cast(Backbone, self.backbone)
            height, width = backbone.image_size or (64, 64)
            blank = self.mean.new_zeros(1, self.in_chans, height, width)
            fuse_batch_norms(backbone, blank)
            fuse_activations(backbone, blank)
            self.fused = True
        self.to(memory_format=torch.channels_last)
        pack_weights(self)
        pack_convolutions(self)
        return self

    def train(self, mode: bool = True) -> Self:
        """Training mode, or with ``mode=False`` evaluation mode.

        Raises:
            ValueError: if a fused detector is to train.
        """
        if mode:
            self._check_unfused("trained")
        return super().train(mode)

    def _check_unfused(self, verb: str) -> None:
        if self.fused:
            raise ValueError(
                f"{self.name} is fused, which makes it fit for inference only: it cannot be {verb}. "
                "Use the detector as it was before fuse(), or create it anew"
            )

    def normalise(self, images: Tensor, image_sizes: Tensor | None) -> Tensor:
        """Images (B, C, H, W) in 0..255 -> normalised float images, zero outside each picture."""
        if self.pretrained_cfg.channel_order == "bgr" and self.in_chans == 3:
            images = images.flip(1)
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        if image_sizes is not None:
            inside_y = torch.arange(x.shape[2], device=x.device)[None] < image_sizes[:, :1]
            inside_x = torch.arange(x.shape[3], device=x.device)[None] < image_sizes[:, 1:]
            x = x * (inside_y[:, None, :, None] & inside_x[:, None, None, :])
        return x

    def forward(self, images: Tensor, image_sizes: Tensor | None = None) -> RawOutput:
        """Images to the family's raw output.

        Args:
            images: (B, in_chans, H, W), RGB, uint8 or float in 0..255, padded at the right and bottom.
            image_sizes: (B, 2) int64, (height, width) of each picture in the canvas; the whole canvas by default.

        Raises:
            ValueError: for images of another shape or dtype.
        """
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: expected (batch, {self.in_chans}, height, width) in 0..255"
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images of dtype {images.dtype}: use uint8, or floats in 0..255")
        canvas = (images.shape[2], images.shape[3])
        sizes = image_sizes
        if sizes is None:
            sizes = torch.tensor([canvas], device=images.device).expand(len(images), 2)
        x = self.normalise(images, image_sizes)
        return cast(Head, self.head)(self.neck(self.backbone(x)), sizes, canvas)

    @torch.no_grad()
    def attention(self, images: Tensor, image_sizes: Tensor | None = None) -> list[BlockAttention]:
        """What the three attentions of each DyHead block compute for these images (see ``forward``).

        Raises:
            ValueError: for a detector without DyHead.
        """
        neck = cast(DyHeadNeck, self.neck)
        if neck.dyhead is None:
            raise ValueError(f"{self.name} has no DyHead: its name would end in '_dyhead<N>'")
        return neck.attention(self.backbone(self.normalise(images, image_sizes)))

    def loss(self, raw: RawOutput, targets: list[Target]) -> dict[str, Tensor]:
        """Loss terms of a raw output; their sum is the loss. The same in train and eval mode.

        Args:
            raw: from ``forward``.
            targets: one per image, boxes and masks in pixels of the images given to ``forward``; may have no objects.

        Raises:
            ValueError: for targets that do not fit the images or the label space.
        """
        self._check_targets(raw, targets)
        return cast(Head, self.head).loss(raw, targets)

    def _check_targets(self, raw: RawOutput, targets: Sequence[Target]) -> None:
        if len(targets) != len(raw.image_sizes):
            raise ValueError(f"{len(targets)} targets for {len(raw.image_sizes)} images: give one each")
        classes = len(self.label_space)
        for i, target in enumerate(targets):
            boxes, labels = target["boxes"], target["labels"]
            if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
                raise ValueError(
                    f"target {i}: boxes {tuple(boxes.shape)} and labels {tuple(labels.shape)}, expected (N, 4) and (N,)"
                )
            if not boxes.isfinite().all():
                raise ValueError(
                    f"target {i}: boxes that are not finite: {boxes[~boxes.isfinite().all(1)][:3].tolist()}"
                )
            if (boxes[:, 2:] < boxes[:, :2]).any():
                wrong = boxes[(boxes[:, 2:] < boxes[:, :2]).any(1)]
                raise ValueError(f"target {i}: boxes that end before they begin, expected xyxy: {wrong[:3].tolist()}")
            if labels.dtype != torch.int64:
                raise ValueError(f"target {i}: labels of {labels.dtype}, expected torch.int64")
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise ValueError(f"target {i}: labels {labels.min()}..{labels.max()}, expected 0..{classes - 1}")
            if "masks" in target:
                self._check_masks(i, target["masks"], (len(boxes), *raw.image_sizes[i].tolist()))

    @staticmethod
    def _check_masks(number: int, masks: Tensor, shape: tuple[int, ...]) -> None:
        if masks.shape != shape or masks.dtype not in (torch.bool, torch.uint8):
            raise ValueError(
                f"target {number}: masks {tuple(masks.shape)} of {masks.dtype}, expected {shape} of torch.bool: one "
                f"for each box, of the height and width of the picture without padding"
            )

    def decode_tensors(self, raw: RawOutput) -> DetectionTensors:
        """Detections in fixed-size tensors, in pixels of the images given to ``forward``."""
        return cast(Head, self.head).decode_tensors(raw)

    def decode(self, raw: RawOutput) -> list[Detections]:
        """Detections of each image, best first, in pixels of the images given to ``forward``."""
        out = self.decode_tensors(raw)
        masks = [None] * len(out.boxes) if out.masks is None else out.masks
        return [
            Detections(out.boxes[i, :n], out.scores[i, :n], out.labels[i, :n], m if m is None else m[:n])
            for i, (n, m) in enumerate(zip(out.count.tolist(), masks, strict=True))
        ]

    @torch.inference_mode()
    def predict(self, images: Any, *, score_threshold: float = 0.0, batch_size: int = 1) -> list[Detections]:
        """Detect objects in photos: resize, pad, forward, decode, and move the boxes back.

        Args:
            images: a path, PIL image, array or tensor (H, W, 3) / (3, H, W), or a list of such.
            score_threshold: leave out detections below it.
            batch_size: images per forward pass; only images of equal canvas share one.

        Returns:
            One ``Detections`` per image, in pixels of the image given, on the CPU.
        """
        from dyhead_zoo.data import prepare_images, read_image

        inputs = list(images) if isinstance(images, (list, tuple)) else [images]
        results: list[Detections] = [None] * len(inputs)  # type: ignore[list-item]
        with eval_mode(self):
            for indices, batch in prepare_images([read_image(x) for x in inputs], self.pretrained_cfg, batch_size):
                sizes = batch.image_sizes.to(self.device)
                found = self.decode(self(batch.images.to(self.device), sizes))
                for k, (index, detections) in enumerate(zip(indices, found, strict=True)):
                    source, target = (tuple(s[k].tolist()) for s in (batch.image_sizes, batch.original_sizes))
                    results[index] = detections.cpu().above(score_threshold).rescale(source, target)
        return results


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode within the block; every submodule's own mode comes back afterwards (frozen norms stay in eval)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


class TrainStep(nn.Module):
    """Forward and loss in one module, so that DDP, FSDP, autocast and compile see everything that holds parameters."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, image_sizes: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        """Loss terms of a batch, see ``Detector.loss``."""
        return self.detector.loss(self.detector(images, image_sizes), targets)
