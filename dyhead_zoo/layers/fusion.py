"""BatchNorm folded into the convolution before it, for inference."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


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
