"""Any timm backbone as the bottom of a detector: NCHW levels at the strides that the neck asks for.

``Backbone.body`` has exactly the parameter names of ``timm.create_model(name, num_classes=0)`` (a subset where stages
beyond the last level are pruned), so that any timm checkpoint drops in and a fine-tuned body goes back into timm.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from timm.layers.non_local_attn import BilinearAttnTransform
from timm.models import adapt_input_conv, group_parameters
from timm.models.crossvit import CrossVit
from timm.models.hrnet import HighResolutionNet
from timm.models.resnet import Bottleneck
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from dyhead_zoo.weights import read_state_dict

ALIASES = {
    "swin": "swin_tiny_patch4_window7_224",
    "swin_large": "swin_large_patch4_window12_384",
    "lite0": "tf_efficientnet_lite0",
    "lite2": "tf_efficientnet_lite2",
}
"""Short backbone names that detectors use."""

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_MIN_INPUT = 32  # pixels; smaller canvases have no cell left at the coarse levels of most bodies


class _DetectionSwinBlock(SwinTransformerBlock):
    """Swin block as detectors use it: the map is padded to whole windows before it is rolled, not after.

    The two orders differ wherever a map is not a multiple of the window. Detection Swins (and their published weights)
    pad first; timm rolls first. Padding here leaves timm nothing to pad.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        pad_h, pad_w = -height % self.window_size[0], -width % self.window_size[1]
        out: Tensor = super()._attn(F.pad(x, (0, 0, 0, pad_w, 0, pad_h)))
        return out[:, :height, :width]


def resolve_backbone_name(name: str) -> str:
    """timm's name for a backbone, with its tag if one was given; aliases of ``ALIASES`` are replaced.

    Raises:
        ValueError: if timm has no such model; the message proposes similar names.
    """
    arch, _, tag = name.partition(".")
    arch = ALIASES.get(arch, arch)
    if not timm.is_model(arch):
        close = difflib.get_close_matches(arch, [*timm.list_models(), *ALIASES], n=3, cutoff=0.6)
        hint = f" Did you mean {', '.join(close)}?" if close else " See timm.list_models()."
        raise ValueError(f"timm has no backbone named {arch!r}.{hint}")
    return f"{arch}.{tag}" if tag else arch


def backbone_data_config(name: str) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation (in units of 0..255) that timm's weights of this backbone expect."""
    cfg = timm.get_pretrained_cfg(resolve_backbone_name(name), allow_unregistered=False)
    if cfg is None:
        return {}
    return {key: tuple(255 * v for v in getattr(cfg, key)) for key in ("mean", "std") if len(getattr(cfg, key)) == 3}


class Resample(nn.Module):
    """A level that a body lacks, made from its nearest one: resized, then a 1x1 convolution.

    Follows the simple feature pyramid of ViTDet (Li et al., arXiv:2203.16527) with resizing in place of strided and
    transposed convolutions, so that any pair of strides (14 to 8, 16 to 32) works.

    Shapes: (B, C, H, W) -> (B, C, H * factor, W * factor), rounded down.
    """

    def __init__(self, channels: int, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = [max(1, int(side * self.factor)) for side in x.shape[-2:]]
        exact = all(side * self.factor == out for side, out in zip(x.shape[-2:], size, strict=True))
        if exact or 1 in size:
            return self.proj(F.interpolate(x, size=size, mode="bilinear", antialias=self.factor < 1))
        # the factor, not the rounded size, decides where the new cells lie
        return self.proj(F.interpolate(x, scale_factor=self.factor, mode="bilinear", antialias=self.factor < 1))


class Backbone(nn.Module):
    """A timm model that returns one (B, C_k, ceil(H / s_k), ceil(W / s_k)) map for each stride s_k.

    Args:
        name: timm name, with or without a tag (``convnext_tiny.fb_in22k``), or an alias.
        in_chans: channels of the image.
        strides: of the levels wanted, fine to coarse. Where several feature maps of the body have a stride, the deepest
            is taken; a stride that the body lacks is resampled from its nearest level.
        read_from: for each stride, the module of the body whose output is the level, if not the deepest; it must have
            that stride and end in a convolution (torchvision's MobileNets: two levels of stride 32).
        pretrained: ``True`` for timm's weights (downloaded), a file in timm's layout, or a state dict.
        image_size: (height, width) of the canvas for bodies that work at one size only; by default the one of their
            weights. Smaller images are padded to it, larger ones are an error. Others take any size.
        output_stride: of the deepest stage, by dilated convolutions in place of strides (16: DETR's DC5), for bodies
            that timm can dilate; ``strides`` must not go beyond it.
        pad_to_cells: images are padded to whole cells of the coarsest map, which many bodies need. ResNets do not, and
            DETR's weights were trained without.
        caffe: ResNet with the stride of a bottleneck in its first 1x1 convolution (weights of caffe origin).
        out_norm: LayerNorm on each level; by default for bodies whose norms are LayerNorms.
        frozen_stages: stem and stages up to this one are not trained; 0 freezes the stem, -1 nothing.
        norm_eval: BatchNorm layers keep their running statistics in training.
        freeze_norm: BatchNorm's weight and bias are not trained either (implies ``norm_eval``).
        norm_eps: of the BatchNorm layers; by default timm's. 0 in torchvision's oldest detectors.
        drop_path: stochastic depth rate.
        full_precision: stay in float32 under autocast; on CPUs the backward pass of depthwise convolutions is slower in
            bfloat16 than in float32.

    Attributes:
        channels, strides: of the levels returned.
        image_size: the canvas of a body that works at one size only; None for others.

    Raises:
        ValueError: for a name, stride or weight file that does not fit.
    """

    def __init__(
        self,
        name: str,
        *,
        in_chans: int = 3,
        strides: Sequence[int] = (8, 16, 32),
        read_from: Sequence[str | None] = (),
        pretrained: bool | str | Path | Mapping[str, Tensor] = False,
        image_size: tuple[int, int] | None = None,
        output_stride: int | None = None,
        pad_to_cells: bool = True,
        caffe: bool = False,
        out_norm: bool | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        freeze_norm: bool = False,
        norm_eps: float | None = None,
        drop_path: float = 0.0,
        full_precision: bool = False,
    ) -> None:
        super().__init__()
        self.full_precision = full_precision
        self.name = resolve_backbone_name(name)
        self.strides = tuple(strides)
        if not self.strides or not all(isinstance(s, int) and s > 0 for s in self.strides):
            raise ValueError(f"strides={strides!r}: give whole numbers of pixels, such as (8, 16, 32)")
        if list(self.strides) != sorted(self.strides):
            raise ValueError(f"strides={strides!r}: give them from fine to coarse")
        kwargs: dict[str, Any] = {"in_chans": in_chans, "num_classes": 0}
        if drop_path:
            kwargs["drop_path_rate"] = drop_path
        if output_stride:
            kwargs["output_stride"] = output_stride
        sizes, self.image_size = _size_arguments(self.name, image_size, kwargs)
        try:
            body: Any = timm.create_model(self.name, pretrained=pretrained is True, **kwargs, **sizes)
        except (OSError, RuntimeError) as error:
            if pretrained is not True:
                raise
            raise OSError(
                f"timm's weights of {self.name} could not be had ({str(error).splitlines()[0]}): pass "
                "pretrained_backbone=FILE with a timm checkpoint, or go without"
            ) from error
        if hasattr(body, "pooling_kernel_size"):
            body.global_pool = ""  # Gemma 4's encoder asks for canvases that suit a pooling which is not run here
        info: list[dict[str, Any]] = list(body.feature_info)
        reductions = [int(level["reduction"]) for level in info]
        self._divisor = max(reductions) * _block_side(body) if pad_to_cells else 1
        self._sources = [_nearest_level(reductions, stride) for stride in self.strides]
        self._taps = sorted(set(self._sources))
        self._take: list[int] = body.prune_intermediate_layers(self._taps, prune_norm=True, prune_head=True)
        self.body = body
        self._modules_read = dict(enumerate(read_from))
        self.channels = tuple(
            _channels_of(body, self._modules_read.get(k)) or int(info[source]["num_chs"])
            for k, source in enumerate(self._sources)
        )
        self.pyramid = nn.ModuleDict(
            {
                str(k): Resample(self.channels[k], reductions[source] / stride)
                for k, (source, stride) in enumerate(zip(self._sources, self.strides, strict=True))
                if reductions[source] != stride
            }
        )
        if out_norm is None:
            out_norm = _is_layer_normed(body)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels) if out_norm else None
        if isinstance(body, SwinTransformer):
            for block in (b for b in body.modules() if type(b) is SwinTransformerBlock):
                block.__class__ = _DetectionSwinBlock
        if caffe:
            _stride_in_first_conv(body, self.name)
        if not isinstance(pretrained, bool):
            _load_body(body, pretrained, in_chans, self.name)
        if norm_eps is not None:
            for norm in (m for m in body.modules() if isinstance(m, _BATCH_NORMS)):
                norm.eps = norm_eps
        self.norm_eval = norm_eval or freeze_norm
        self._frozen_norms: list[nn.Module] = []
        _freeze_unread_branches(body, self._taps)
        self._freeze(body, frozen_stages, freeze_norm)

    def _freeze(self, body: Any, frozen_stages: int, freeze_norm: bool) -> None:
        if frozen_stages >= 0:
            groups = group_parameters(body, body.group_matcher(coarse=True), reverse=True)
            if frozen_stages > max(groups.values()):
                raise ValueError(f"frozen_stages={frozen_stages}, but {self.name} has stages 0..{max(groups.values())}")
            for key, parameter in body.named_parameters():
                if groups[key] <= frozen_stages:
                    parameter.requires_grad_(False)
        norms = [m for m in body.modules() if isinstance(m, _BATCH_NORMS)]
        if freeze_norm:
            for norm in norms:
                norm.requires_grad_(False)
        self._frozen_norms = [m for m in norms if self.norm_eval or not any(p.requires_grad for p in m.parameters())]

    def train(self, mode: bool = True) -> Backbone:
        """As in ``nn.Module``, but frozen BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the body's stages in the backward pass instead of keeping their activations."""
        cast(Any, self.body).set_grad_checkpointing(enable)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W), normalised -> one map per stride, fine to coarse.

        Raises:
            ValueError: for a canvas smaller than 32 pixels, or larger than a fixed-size body can take.
        """
        height, width = images.shape[-2:]
        if min(height, width) < _MIN_INPUT:
            raise ValueError(f"the canvas is {height} x {width} px: pad images to at least {_MIN_INPUT} px a side")
        images = self._pad(images)
        exact = self.full_precision and not images.is_meta  # which lacks autocast
        precision = torch.autocast(images.device.type, enabled=False) if exact else nullcontext()
        with precision, self._reading() as read:
            taps = cast(Any, self.body).forward_intermediates(
                images, indices=self._take, stop_early=True, output_fmt="NCHW", intermediates_only=True
            )
        by_level = dict(zip(self._taps, taps, strict=True))
        levels = []
        for k, (source, stride) in enumerate(zip(self._sources, self.strides, strict=True)):
            x = read.get(k, by_level[source])
            if str(k) in self.pyramid:
                x = self.pyramid[str(k)](x)
            full = [-(-side // stride) for side in images.shape[-2:]]
            if list(x.shape[-2:]) != full:  # a body without padding, or a stride that does not divide the canvas
                x = F.interpolate(x, size=full, mode="bilinear")
            if self.image_size is None:
                x = x[:, :, : -(-height // stride), : -(-width // stride)]
            if self.norms is not None:
                x = self.norms[k](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            levels.append(x)
        return levels

    @contextmanager
    def _reading(self) -> Iterator[dict[int, Tensor]]:
        """What the modules of ``read_from`` give within the block, by level."""
        read: dict[int, Tensor] = {}

        def keep(level: int, module: nn.Module, arguments: Any, output: Tensor) -> None:
            read[level] = output

        hooks = [
            self.body.get_submodule(name).register_forward_hook(partial(keep, level))
            for level, name in self._modules_read.items()
            if name
        ]
        try:
            yield read
        finally:
            for hook in hooks:
                hook.remove()

    def _pad(self, images: Tensor) -> Tensor:
        """Zeros at the right and bottom, up to what the body can take."""
        height, width = images.shape[-2:]
        if self.image_size is None:
            return F.pad(images, (0, -width % self._divisor, 0, -height % self._divisor))
        limit = self.image_size
        if height > limit[0] or width > limit[1]:
            raise ValueError(
                f"{self.name} was built for a canvas of {limit[0]} x {limit[1]} px and got {height} x {width}: "
                f"resize the images, or build it with image_size=({height}, {width})"
            )
        return F.pad(images, (0, limit[1] - width, 0, limit[0] - height))


def _size_arguments(
    name: str, image_size: tuple[int, int] | None, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Constructor arguments that let a body take the detector's input sizes, and its canvas if it has only one."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.fixed_input_size:
        return {}, None
    own = (int(cfg.input_size[-2]), int(cfg.input_size[-1]))
    if timm.model_entrypoint(name.partition(".")[0]).__module__.endswith(".swin_transformer"):
        return {"strict_img_size": False, "always_partition": True}, None
    dynamic: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})
    for sizes in dynamic:
        if _accepts(name, {**kwargs, **sizes}):
            return sizes, None
    if image_size is None or tuple(image_size) == own:
        return {}, own
    if not _accepts(name, {**kwargs, "img_size": image_size}):
        raise ValueError(f"{name} cannot be built for image_size={tuple(image_size)}: leave it out for its own, {own}")
    return {"img_size": image_size}, (image_size[0], image_size[1])


def _accepts(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether timm builds this body with these arguments; tried on the meta device, where it costs little."""
    try:
        with torch.device("meta"):
            timm.create_model(name, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError):  # timm has no common error for this
        return False
    return True


def _block_side(body: nn.Module) -> int:
    """Cells of the coarsest map that a canvas must be a multiple of, for attention within blocks."""
    kinds = (HaloAttn, BilinearAttnTransform)
    return math.lcm(*(int(m.block_size) for m in body.modules() if isinstance(m, kinds)))


def _freeze_unread_branches(body: nn.Module, taps: Sequence[int]) -> None:
    """Freeze what makes outputs that no level reads: it gets no gradient, which DistributedDataParallel refuses.

    HRNet's branches end together. CrossViT's last block ends with an exchange between the class tokens of its branches.
    """
    if isinstance(body, HighResolutionNet):
        for branch in set(range(len(body.stage4[-1].fuse_layers))) - {tap - 1 for tap in taps}:
            body.stage4[-1].fuse_layers[branch].requires_grad_(False)
            if body.incre_modules is not None and branch < len(body.incre_modules):
                body.incre_modules[branch].requires_grad_(False)
    if isinstance(body, CrossVit):
        *_, before, last = (cast(Any, block) for block in body.blocks)
        for exchange in (last.projs, last.fusion, last.revert_projs):
            exchange.requires_grad_(False)
        for branch in set(range(body.num_branches)) - {tap // len(body.blocks) for tap in taps}:
            for unread in (before.projs, before.fusion, before.revert_projs, last.blocks):
                unread[branch].requires_grad_(False)


def _nearest_level(reductions: Sequence[int], stride: int) -> int:
    """Index of the deepest feature map at ``stride``, or else of the one nearest to it (the finer of two)."""
    distance = [abs(math.log2(r / stride)) for r in reductions]
    best = min(distance)
    near = [i for i, d in enumerate(distance) if d == best]
    finest = min(reductions[i] for i in near)
    return max(i for i in near if reductions[i] == finest)


def _channels_of(body: nn.Module, name: str | None) -> int | None:
    """Channels of what the last convolution of a part of a body gives.

    Raises:
        ValueError: if the body has no such part.
    """
    if name is None:
        return None
    try:
        part = body.get_submodule(name)
    except AttributeError as error:
        known = ", ".join(child for child, _ in body.named_children())
        raise ValueError(f"read_from names {name!r}, which {type(body).__name__} lacks; it has {known}") from error
    convs = [module for module in part.modules() if isinstance(module, nn.Conv2d)]
    return convs[-1].out_channels


def _is_layer_normed(body: nn.Module) -> bool:
    kinds = [isinstance(m, nn.LayerNorm) for m in body.modules() if isinstance(m, (nn.LayerNorm, *_BATCH_NORMS))]
    return bool(kinds) and all(kinds)


def _stride_in_first_conv(body: nn.Module, name: str) -> None:
    """Move the stride of each bottleneck from its 3x3 to its first 1x1 convolution."""
    blocks = [m for m in body.modules() if isinstance(m, Bottleneck)]
    if not blocks:
        raise ValueError(f"caffe=True is for ResNets with bottlenecks; {name} has none")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


def _load_body(body: nn.Module, source: str | Path | Mapping[str, Tensor], in_chans: int, name: str) -> None:
    """Load a classification checkpoint in timm's layout; every parameter of the body must be in it."""
    where = "the state dict given" if isinstance(source, Mapping) else str(source)
    state = dict(source) if isinstance(source, Mapping) else read_state_dict(Path(source))[0]
    if in_chans != 3:
        first = body.pretrained_cfg["first_conv"]  # type: ignore[index]
        for conv in (first,) if isinstance(first, str) else first:
            state[f"{conv}.weight"] = adapt_input_conv(in_chans, state[f"{conv}.weight"])
    wanted = body.state_dict()
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    wrong = [
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    if missing or wrong:
        raise ValueError(
            f"{where} does not fit timm's {name}: {len(missing)} missing keys {missing[:5]}, "
            f"{len(wrong)} of another shape {wrong[:5]}. It must be a timm checkpoint of that architecture"
        )
    body.load_state_dict({k: state[k] for k in wanted if k in state}, strict=False)
