"""For inference: BatchNorm folded into the convolution before it, and convolutions whose weights are packed once."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dyhead_zoo.layers.dyhead import DyHead
from dyhead_zoo.ops.trial import tensors_are_plain, undisturbed


@torch.no_grad()
def fuse_batch_norms(module: nn.Module, *inputs: Any) -> int:
    """Fold BatchNorm layers in evaluation mode into the convolutions whose output they normalise, in place.

    Which convolution feeds which norm is seen by running the module once on ``inputs``. A norm gives way to an
    identity, or to its activation where it has one, and its convolution gets a bias; so the module no longer suits
    training, and its state dict has other keys: save it before.

    Normalising the image is not folded into the first convolution. The convolution pads with zeros, and the detector
    clears what lies outside each picture, both *after* normalisation; before it, the same would have to be the mean of
    each channel. Folded with plain zeros, the outermost pixels of every map would change. Filling the padding with the
    means is exact, but writes every pixel of the canvas once, and so costs what normalising does.

    Args:
        module: in evaluation mode; norms in training mode are left alone.
        inputs: what ``module`` can be called with; their values do not matter.

    Returns:
        How many norms were folded.
    """
    feeds = [(conv, norm) for conv, norm in _feeds(module, inputs) if _foldable(conv, norm)]
    seen = Counter(part for pair in feeds for part in pair)
    feeds = [pair for pair in feeds if all(seen[part] == 1 for part in pair)]  # neither is used twice
    for conv, norm in feeds:
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    successors = {norm: _successor(norm) for _, norm in feeds}
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if child in successors:
                setattr(parent, name, successors[child])
    return len(feeds)


def _feeds(module: nn.Module, inputs: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """(convolution, norm) pairs: the norm's input is the very tensor that the convolution gave."""
    makers: list[tuple[Tensor, nn.Module]] = []
    readers: list[tuple[Tensor, nn.Module]] = []
    handles = []
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            handles.append(part.register_forward_hook(lambda m, _, out: makers.append((out, m))))
        elif not list(part.children()) or isinstance(part, nn.BatchNorm2d):
            handles.append(
                part.register_forward_pre_hook(
                    lambda m, args: readers.extend((a, m) for a in args if isinstance(a, Tensor))
                )
            )
    try:
        module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    pairs = []
    for out, conv in makers:
        reading = [reader for tensor, reader in readers if tensor is out]
        if len(reading) == 1 and isinstance(reading[0], nn.BatchNorm2d):
            pairs.append((conv, reading[0]))
    return pairs


def _foldable(conv: nn.Module, norm: Any) -> bool:
    """Whether they are what they seem: their subclasses may compute something else."""
    return (
        type(conv) in (nn.Conv2d, Conv2dSame)
        and type(norm) in (nn.BatchNorm2d, BatchNormAct2d)
        and not norm.training
        and norm.running_mean is not None
    )


def _successor(norm: nn.Module) -> nn.Module:
    """What remains of a norm without its affine map."""
    remains = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
    return remains.eval()


# -- packed convolutions -----------------------------------------------------------------------------------------------


class PackedConv2d(nn.Conv2d):
    """A convolution that keeps its weight as oneDNN lays it out, which ``nn.Conv2d`` does anew at every call.

    Without gradients, in float32 on a CPU; otherwise, and after the weight has changed, it is an ``nn.Conv2d``. Packed
    at the first call, for the size of the input then; others are possible. Copies are packed anew.
    """

    _packed: tuple[tuple[int, int], Tensor] | None = None

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._applies(input):
            return super()._conv_forward(input, weight, bias)
        state = (weight._version, weight.data_ptr())  # changed in place, or put elsewhere as by half().float()
        if self._packed is None or self._packed[0] != state:
            self._packed = (state, _pack(self, input))
        return _convolve(self, input.contiguous(memory_format=torch.channels_last), self._packed[1])

    def _applies(self, input: Tensor) -> bool:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or self.weight.is_inference():
            return False
        if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in (input, self.weight)):
            return False
        return input.dim() == 4 and input.numel() > 0 and tensors_are_plain(input)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


def pack_convolutions(module: nn.Module) -> int:
    """Make ordinary convolutions of a module ``PackedConv2d``, in place; not those of DyHead, which has its own way.

    Returns:
        How many.
    """
    if isinstance(module, DyHead) or not _packing_works():
        return 0
    plain = type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"
    if plain and not isinstance(module.padding, str):
        module.__class__ = PackedConv2d
        return 1
    return sum(map(pack_convolutions, module.children()))


def _pack(conv: nn.Conv2d, input: Tensor) -> Tensor:
    sizes = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups, list(input.shape))
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *sizes)
    return packed


def _convolve(conv: nn.Conv2d, input: Tensor, packed: Tensor) -> Tensor:
    sizes = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(input, packed, conv.bias, *sizes, "none", [], "")
    return out


@functools.cache
def _packing_works() -> bool:
    """Whether this build of torch has the private operators of torch.compile's CPU code, and they give what we want."""

    @torch.no_grad()
    def trial() -> bool:
        conv = nn.utils.skip_init(nn.Conv2d, 3, 5, 3, stride=2, padding=1)  # random numbers belong to the caller
        for parameter in conv.parameters():
            parameter.copy_(torch.arange(float(parameter.numel())).sin().view_as(parameter))
        numbers = (torch.arange(6.0 * h * w).cos().view(2, 3, h, w) for h, w in ((9, 8), (6, 11)))
        images = [x.contiguous(memory_format=torch.channels_last) for x in numbers]
        try:
            packed = _pack(conv, images[0])
            return all(torch.allclose(_convolve(conv, x, packed), conv(x), atol=1e-5) for x in images)
        except (AttributeError, RuntimeError, TypeError):
            return False

    return undisturbed(trial)
