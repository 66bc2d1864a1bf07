"""Folding BatchNorm changes the modules, not what they compute."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_zoo import create_detector, save_for_hub
from dyhead_zoo.detector import Detector, TrainStep
from dyhead_zoo.engine.checkpoint import write_weights
from dyhead_zoo.layers.backbone import Backbone
from dyhead_zoo.layers.fusion import fuse_activations, fuse_batch_norms
from dyhead_zoo.layers.packing import PackedConv2d, _SummingBlock, _SummingStage, pack_convolutions


def shaken(module: nn.Module) -> nn.Module:
    """Statistics and weights of norms as if it had been trained."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, centre in (
                (part.running_mean, 0.0),
                (part.running_var, 1.0),
                (part.weight, 1.0),
                (part.bias, 0.0),
            ):
                tensor.data = centre + torch.rand(tensor.shape, generator=generator) * 0.2
    return module.eval()


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050", "regnetx_002"])
def test_backbones_give_the_same(name: str) -> None:
    backbone = shaken(Backbone(name)).double()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        before = backbone(images)
        count = fuse_batch_norms(backbone, torch.zeros_like(images))
        after = backbone(images)
    assert count > 10
    assert not any(isinstance(part, nn.BatchNorm2d) for part in backbone.modules())
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


class _Odd(nn.Module):
    """A convolution whose output two norms read, a convolution used twice, and a norm of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.twice, self.single = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norms
        y = self.shared(x)
        y = n[0](y) + n[1](y)
        y = n[2](self.twice(y)) + n[3](self.twice(2 * y))
        return n[4](self.single(y)) + n[5](x)


def test_what_cannot_be_folded_is_left_alone() -> None:
    odd = shaken(_Odd())
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = odd(x)
        assert fuse_batch_norms(odd, x) == 1
        torch.testing.assert_close(odd(x), before, atol=1e-5, rtol=1e-5)
    assert isinstance(odd.norms[4], nn.Identity)


def test_norms_in_training_mode_are_left_alone() -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
    assert fuse_batch_norms(module, torch.randn(2, 3, 4, 4)) == 0


def test_a_fused_detector_finds_the_same() -> None:
    detector = create_detector("test_atss_dyhead1", pretrained=True, score_threshold=0.0).double()
    images = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (before,) = detector.decode(detector(images))
        (after,) = detector.fuse().decode(detector(images))
    assert len(before) and not any(isinstance(part, nn.BatchNorm2d) for part in detector.backbone.modules())
    torch.testing.assert_close(after.scores, before.scores)
    torch.testing.assert_close(after.boxes, before.boxes)


def packed_detector() -> Detector:
    return create_detector("fcos_resnet18_dyhead1", num_classes=3).eval().fuse()


def images_of(height: int, width: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def test_packed_convolutions_give_the_same_for_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = packed_detector()
    convs = [part for part in detector.modules() if isinstance(part, PackedConv2d)]
    assert len(convs) > 20 and not any(isinstance(part, PackedConv2d) for part in detector.neck.dyhead.modules())
    for images in (images_of(64, 96), images_of(160, 64, 3), images_of(64, 96)):
        with torch.inference_mode():
            ours = detector.backbone(detector.normalise(images, None))
        assert all(conv._packed is not None for conv in convs if conv in set(detector.backbone.modules()))
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(PackedConv2d, "_applies", lambda *_: False)
            reference = detector.backbone(detector.normalise(images, None))
        for a, b in zip(ours, reference, strict=True):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_packed_convolutions_follow_their_weights_and_stand_aside() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    assert pack_convolutions(conv) == 1
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = F.conv2d(x, conv[0].weight, conv[0].bias, padding=1)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), expected)
        copied = copy.deepcopy(conv)
        conv[0].weight.mul_(2)
        torch.testing.assert_close(conv(x) - conv[0].bias[:, None, None], 2 * (expected - conv[0].bias[:, None, None]))
        torch.testing.assert_close(copied(x), expected)
        rounded = conv.half().float()
        torch.testing.assert_close(rounded(x), F.conv2d(x, conv[0].weight, conv[0].bias, padding=1))
        assert conv.double()(x.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert copied(x).dtype == torch.bfloat16
        assert copied(x[:0]).shape == (0, 4, 8, 8)
        assert torch.export.export(copied, (x,)).module()(x).shape == expected.shape
        torch.testing.assert_close(torch.vmap(copied)(x[:, None])[:, 0], expected)
    assert copied(x).requires_grad


def fused(backbone: Backbone) -> Backbone:
    """As ``Detector.fuse`` does it."""
    backbone = copy.deepcopy(backbone).eval()
    blank = torch.zeros(1, 3, 64, 64)
    fuse_batch_norms(backbone, blank)
    fuse_activations(backbone, blank)
    pack_convolutions(backbone.to(memory_format=torch.channels_last))
    return backbone


def count(module: nn.Module, kind: type) -> int:
    return sum(isinstance(part, kind) for part in module.modules())


def close(ours: list[Tensor], reference: list[Tensor]) -> None:
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "activations", "sums"),
    [
        ("resnet18", 9, 8),
        ("resnet50", 33, 16),
        ("resnet26d", 19, 8),  # a deep stem; its downsampling starts with a mean
        ("resnetblur50", 33, 16),  # blurs between activation and convolution
        ("resnext50_32x4d", 17, 16),  # its convolutions of groups are left alone
        ("seresnet33ts", None, 0),
        ("seresnext26t_32x4d", None, 0),
        ("tf_efficientnet_lite0", 15, 0),
        ("regnetx_002", None, 0),
        ("mobilenetv3_small_050", None, 0),
        ("convnext_atto", 0, 0),
    ],
)
def test_whole_levels_stay_the_same(name: str, activations: int | None, sums: int) -> None:
    backbone = shaken(Backbone(name, strides=(4, 8, 16, 32), drop_path=0.1 if "resnet" in name else 0.0))
    ours = fused(backbone)
    acts = sum(type(part.act) is not nn.Identity for part in ours.modules() if isinstance(part, PackedConv2d))
    assert acts == activations if activations is not None else acts > 4
    assert count(ours, _SummingBlock) == sums
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    given = images.clone()
    with torch.no_grad():
        reference = backbone(images)
        levels = ours(images)
        kept = [level.clone() for level in levels]
        close(levels, reference)
        close(ours(images), reference)
        with torch.inference_mode():
            close(ours(images), reference)
        close(ours(images.contiguous(memory_format=torch.channels_last)), reference)
    for now, then in zip((*levels, images), (*kept, given), strict=True):
        assert torch.equal(now, then)
    close(ours(images), reference)  # with gradients


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet26", {"output_stride": 16, "strides": (8, 16)}),
        ("resnet26", {"caffe": True}),
        ("hrnet_w18_small", {"strides": (4, 8, 16, 32)}),
    ],
    ids=["dilated", "caffe", "branches"],
)
def test_levels_of_other_layouts_stay_the_same(name: str, arguments: dict[str, Any]) -> None:
    backbone = shaken(Backbone(name, **arguments))
    ours = fused(backbone)
    assert count(ours, _SummingBlock) > 0
    for side in (32, 72):  # the smaller one has a last level of 1 x 1
        images = torch.randn(2, 3, 32, side, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = backbone(images)
            for _ in range(2):
                close(ours(images), expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet26"])
def test_what_hooks_keep_is_not_overwritten(name: str) -> None:
    backbone = shaken(Backbone(name))
    ours = fused(backbone)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    parts = ["body.maxpool", "body.layer1", "body.layer1.0", "body.layer1.1.conv1", "body.layer2.0.downsample"]

    def seen(module: nn.Module, name: str, before: bool) -> Tensor:
        kept: list[Tensor] = []
        part = module.get_submodule(name)
        if before:
            handle = part.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        else:
            handle = part.register_forward_hook(lambda _, args, out: kept.append(out))
        module(images)
        handle.remove()
        return kept[0]

    with torch.no_grad():
        for part in parts:
            for before in (True, False):
                if (part, before) != ("body.layer1.1.conv1", False):  # which now gives what follows its norm
                    close([seen(ours, part, before)], [seen(backbone, part, before)])


@pytest.mark.parametrize("name", ["resnet18", "resnet26"])
def test_parts_of_a_stage_do_not_overwrite_their_input(name: str) -> None:
    ours = fused(shaken(Backbone(name)))
    stage = ours.body.layer1
    assert isinstance(stage, _SummingStage)
    x = torch.randn(1, 64 if name == "resnet18" else 256, 8, 8).contiguous(memory_format=torch.channels_last)
    given = x.clone()
    with torch.no_grad():
        for part in (stage[1], stage[1:]):
            part(x)
            assert torch.equal(x, given)


class _Activated(nn.Module):
    """Convolutions whose output an activation reads, and in some cases something else."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(6))
        self.acts = nn.ModuleList(nn.SiLU(inplace=inplace) for _ in range(5))
        self.alias = self.acts[4]

    def forward(self, x: Tensor) -> list[Tensor]:
        a, b, c, d, e, f = (conv(x) for conv in self.convs)
        summed = self.acts[0](a) + a
        viewed = b[:, :1]
        seen = self.acts[1](b)
        shared = self.acts[2](c) * self.acts[2](d)
        return [summed, viewed, seen, shared, self.acts[3](e), e, self.acts[4](f)]


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_are_fused_where_nothing_else_reads_the_sums(inplace: bool) -> None:
    module = _Activated(inplace).eval()
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = module(x)
        # in place, what reads the tensor later reads the activation
        assert fuse_activations(module, x) == (3 if inplace else 1)
        left = [type(act) is not nn.Identity for act in module.acts]
        assert left == [not inplace, True, True, not inplace, False] and isinstance(module.alias, nn.Identity)
        close(module(x), before)
    close(module(x), before)


class _Keeping(nn.Module):
    """Convolutions and norms, with what the convolutions gave read by a function, and returned."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        a, b = (conv(x) for conv in self.convs)
        return [self.norms[0](a) + F.relu(a), self.norms[1](b), b]


def test_norms_are_folded_where_nothing_else_reads_the_sums() -> None:
    module = shaken(_Keeping())
    assert fuse_batch_norms(module, torch.randn(1, 3, 8, 8)) == 0


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
def test_packed_activations(act: type[nn.Module]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), act(inplace=True)).eval()
    x = 9 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(x)
        assert fuse_activations(module, x) == 1 and type(module[0].act) is act
        close([module(x), module.double()(x.double()).float()], [expected, expected])
        assert torch.export.export(module.float(), (x,)).module()(x).shape == expected.shape
        torch.testing.assert_close(torch.vmap(module)(x[:, None])[:, 0], expected)
    assert module(x).requires_grad


def test_copies_of_a_fused_detector() -> None:
    detector = packed_detector()
    images = images_of(64, 96)
    with torch.no_grad():
        expected = detector(images)
        for twin in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
            assert count(twin, _SummingBlock) == 8
            torch.testing.assert_close(twin(images).cls_logits, expected.cls_logits)


def test_fusing_twice_is_fusing_once() -> None:
    detector = create_detector("test_atss_dyhead1", pretrained=True).train().fuse()
    assert detector.fused and not detector.training
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    assert detector.fuse() is detector
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


def test_a_fused_detector_is_neither_trained_nor_saved(tmp_path: Path) -> None:
    detector = create_detector("test_atss_dyhead1", pretrained=True)
    fused = copy.deepcopy(detector).fuse()
    for refused in (fused.train, TrainStep(fused).train):
        with pytest.raises(ValueError, match="test_atss_dyhead1 is fused.* cannot be trained.* before fuse"):
            refused()
    assert not any(part.training for part in fused.modules())
    for save in (lambda: save_for_hub(fused, tmp_path / "new"), lambda: write_weights(tmp_path / "w", fused, {})):
        with pytest.raises(ValueError, match=r"test_atss_dyhead1 is fused.* cannot be saved"):
            save()
    assert not list(tmp_path.iterdir())
    fused.eval().predict(torch.zeros(3, 40, 60, dtype=torch.uint8))
    assert save_for_hub(detector.train(), tmp_path / "new").is_dir()  # the copy that was not fused


@pytest.mark.parametrize("name", ["test_atss", "fcos_mobilenetv3_small_050", "detr_resnet18"])
def test_other_families_fuse(name: str) -> None:
    detector = create_detector(name, num_classes=3).eval()
    shaken(detector.backbone)
    images = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = detector.decode_tensors(detector(images))
        after = detector.fuse().decode_tensors(detector(images))
    assert not any(isinstance(part, nn.BatchNorm2d) for part in detector.backbone.modules())
    torch.testing.assert_close(after.scores, before.scores, atol=1e-4, rtol=1e-4)
