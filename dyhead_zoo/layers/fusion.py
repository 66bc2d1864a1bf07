"""For inference: BatchNorm and activations become part of the convolution before them, if nothing else reads that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyhead_zoo.layers.packing import POST_OPS, pack

_CONVS = (nn.Conv2d, Conv2dSame)
_NORMS = (nn.BatchNorm2d, BatchNormAct2d)


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
    feeds = _feeds(module, inputs, _NORMS)
    feeds = [(conv, norm) for conv, norm in feeds if not norm.training and norm.running_mean is not None]
    for conv, norm in feeds:
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    _replace(module, {norm: _successor(norm) for _, norm in feeds})
    return len(feeds)


@torch.no_grad()
def fuse_activations(module: nn.Module, *inputs: Any) -> int:
    """Make convolutions do the activation that follows them, in place, where ``packing`` knows how.

    Found as ``fuse_batch_norms`` finds norms, and best after it. The activation gives way to an identity.

    Returns:
        How many activations.
    """
    feeds = [(conv, act) for conv, act in _feeds(module, inputs, POST_OPS) if pack(conv, type(act))]
    _replace(module, {act: nn.Identity().eval() for _, act in feeds})
    return len(feeds)


def _feeds(module: nn.Module, inputs: tuple[Any, ...], kinds: Collection[type]) -> list[tuple[Any, Any]]:
    """(convolution, reader) pairs: a module of one of these kinds reads a convolution's output, and nothing else does.

    Seen by running the module once. Only exact types count, since their subclasses may compute something else, and only
    modules that are called once. What reads the tensor after an activation in place reads the activation.
    """
    readings = _Readings()
    handles = []
    for part in module.modules():
        if type(part) in _CONVS:
            handles.append(part.register_forward_hook(readings.made))
        elif type(part) in kinds:
            handles += (part.register_forward_pre_hook(readings.enter), part.register_forward_hook(readings.leave))
    try:
        with readings:
            result = module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    readings.note(result)
    pairs = []
    for _, conv, readers in readings.outputs.values():
        reader = readers[0] if readers else None
        if reader is not None and (getattr(reader, "inplace", False) or set(readers) == {reader}):
            pairs.append((conv, reader))
    return [pair for pair in pairs if all(readings.calls[part] == 1 for part in pair)]


class _Readings(TorchDispatchMode):
    """Which operations read the outputs of convolutions.

    Attributes:
        outputs: by id, the tensor, its convolution, and for each operation that got it, in order, the module at work,
            if it is one of those asked about.
        calls: of convolutions and of those modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, tuple[Tensor, nn.Module, list[nn.Module | None]]] = {}
        self.calls: Counter[nn.Module] = Counter()
        self._at_work: list[nn.Module] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note((args, kwargs))
        return func(*args, **(kwargs or {}))

    def note(self, arguments: Any) -> None:
        for argument in tree_leaves(arguments):
            if id(argument) in self.outputs:
                self.outputs[id(argument)][2].append(self._at_work[-1] if self._at_work else None)

    def made(self, conv: nn.Module, arguments: Any, output: Tensor) -> None:
        self.calls[conv] += 1
        self.outputs[id(output)] = (output, conv, [])

    def enter(self, module: nn.Module, arguments: Any) -> None:
        self.calls[module] += 1
        self._at_work.append(module)

    def leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._at_work.pop()


def _replace(module: nn.Module, successors: Mapping[Any, nn.Module]) -> None:
    """Put the successors in, under every name that leads to what they succeed."""
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in successors:
                setattr(parent, name, successors[child])


def _successor(norm: nn.Module) -> nn.Module:
    """What remains of a norm without its affine map."""
    remains = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
    return remains.eval()
