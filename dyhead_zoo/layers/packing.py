"""For inference on a CPU: convolutions whose weights are packed once, with what follows them in the same oneDNN call.

What follows is an activation, or the end of a ResNet block, ``relu(conv(x) + shortcut)``. The operators are the private
ones that torch.compile's CPU code uses; each is tried before it is relied on.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, cast

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from dyhead_zoo.layers.dyhead import DyHead
from dyhead_zoo.ops.trial import tensors_are_plain, undisturbed

POST_OPS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}
"""What oneDNN calls them, and their numbers."""


class PackedConv2d(nn.Conv2d):
    """A convolution that keeps its weight as oneDNN lays it out, which ``nn.Conv2d`` does anew at every call.

    Without gradients, in float32 on a CPU; otherwise, and after the weight has changed, it is an ``nn.Conv2d``. Packed
    at the first call, for the size of the input then; others are possible. Copies are packed anew. Made of an
    ``nn.Conv2d`` by ``pack``.

    Attributes:
        act: what is done to the sums. oneDNN's ReLU, unlike PyTorch's, makes 0 of what is not a number.
    """

    act: nn.Module
    _packed: tuple[int, Tensor, Tensor] | None = None

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._applies(input):
            out: Tensor = self.act(super()._conv_forward(input, weight, bias))
            return out
        return _convolve(self, input, self._pack(input), self.act)

    def _applies(self, input: Tensor) -> bool:
        if type(input) is not Tensor or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or self.weight.is_inference():
            return False
        if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in (input, self.weight)):
            return False
        return input.dim() == 4 and input.numel() > 0 and type(self.act) in POST_OPS and tensors_are_plain(input)

    def _pack(self, input: Tensor) -> Tensor:
        """The weight as it is now: it may have changed in place, or been put elsewhere as by ``half().float()``."""
        weight, kept = self.weight, self._packed
        if kept is None or kept[0] != weight._version or kept[1].data_ptr() != weight.data_ptr():
            # the weight that was packed is kept too, since its address must not become another one's
            kept = self._packed = (weight._version, weight.detach(), _reorder(self, input))
        return kept[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


def pack(conv: nn.Module, act: Any = nn.Identity) -> bool:
    """Make a convolution and this type of activation after it a ``PackedConv2d``, in place, if that works and pays."""
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if conv.groups > 1 or act not in POST_OPS or not _works(act):  # weights of groups are small
        return False
    conv.__class__ = PackedConv2d
    cast(PackedConv2d, conv).act = act().train(conv.training)
    return True


def pack_convolutions(module: nn.Module) -> int:
    """Make ordinary convolutions of a module ``PackedConv2d``, in place; not those of DyHead, which has its own way.

    Blocks of ResNets that end in one, and stages of them, become what adds without memory of its own.

    Returns:
        How many convolutions were made so now.
    """
    if isinstance(module, DyHead):
        return 0
    count = int(pack(module)) or sum(map(pack_convolutions, module.children()))
    if _sums_plainly(module):
        module.__class__ = _SUMMING[type(module)]
    elif type(module) is nn.Sequential and any(isinstance(block, _SummingBlock) for block in module):
        module.__class__ = _SummingStage
    return count


# -- blocks of ResNets -------------------------------------------------------------------------------------------------


class _SummingBlock(nn.Module):
    """A block whose last convolution adds to the shortcut where that lies, and applies the ReLU.

    The sum needs no map of its own, whose fresh memory costs page faults. That destroys the shortcut, so it must be one
    that nobody else can read: what ``downsample`` made, or an input that the caller says is ``owned``.
    """

    downsample: Any
    end: str  # in the names of the last convolution, its norm, and the activation after the sum

    def forward(self, x: Tensor, owned: bool = False) -> Tensor:
        last = getattr(self, f"conv{self.end}")
        if not (owned or _ends_packed(self.downsample)) or self.training or not last._applies(x) or _watched(self):
            out: Tensor = super().forward(x)
            return out
        inner: Any = x
        for part in itertools.takewhile(lambda part: part is not last, self._modules.values()):  # in timm's order
            inner = part(inner)  # type: ignore[misc]
        return _add_convolved(x if self.downsample is None else self.downsample(x), last, inner, last._pack(inner))


class _SummingBasicBlock(_SummingBlock, BasicBlock):
    end = "2"


class _SummingBottleneck(_SummingBlock, Bottleneck):
    end = "3"


_SUMMING: dict[type[nn.Module], type[Any]] = {BasicBlock: _SummingBasicBlock, Bottleneck: _SummingBottleneck}


def _sums_plainly(block: nn.Module) -> bool:
    """Whether it ends as in a plain ResNet, its norms folded."""
    kind = _SUMMING.get(type(block))
    if kind is None or block.se is not None:
        return False
    conv, norm, act = (getattr(block, name + kind.end) for name in ("conv", "bn", "act"))
    plain = type(conv) is PackedConv2d and type(conv.act) is type(norm) is nn.Identity and type(act) is nn.ReLU
    return plain and _works(None)


class _SummingStage(nn.Sequential):
    """Blocks in a row: what one gives is the next one's own, unless a hook on either may have kept it."""

    def forward(self, input: Tensor) -> Tensor:
        owned = False
        for block in self:
            unseen = isinstance(block, _SummingBlock) and not torch.compiler.is_compiling() and not _watched(block)
            input = block(input, owned=True) if owned and unseen else block(input)
            owned = unseen
        return input


def _watched(module: nn.Module) -> bool:
    """Whether something outside may see what goes into its parts, or comes out of them."""
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return True
    parts = module.modules()
    return any(part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ for part in parts)


def _ends_packed(downsample: nn.Module | None) -> bool:
    """Whether what it gives is sure to be new."""
    if type(downsample) is not nn.Sequential:
        return False
    parts = [part for part in downsample if type(part) is not nn.Identity]
    return bool(parts) and isinstance(parts[-1], PackedConv2d)


# -- oneDNN ------------------------------------------------------------------------------------------------------------


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    return list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups


def _reorder(conv: nn.Conv2d, input: Tensor) -> Tensor:
    weight = conv.weight.detach()
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *_geometry(conv), list(input.shape))
    return packed


def _convolve(conv: nn.Conv2d, input: Tensor, packed: Tensor, act: nn.Module) -> Tensor:
    """act(conv(input)), channels-last."""
    x, post_op = input.contiguous(memory_format=torch.channels_last), POST_OPS[type(act)]
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, packed, conv.bias, *_geometry(conv), *post_op, "")
    return out


def _add_convolved(summand: Tensor, conv: nn.Conv2d, input: Tensor, packed: Tensor) -> Tensor:
    """relu(summand + conv(input)), channels-last, in place of the summand if that is."""
    total, x = (t.contiguous(memory_format=torch.channels_last) for t in (summand, input))
    add = torch.ops.mkldnn._convolution_pointwise_.binary
    out: Tensor = add(total, x, packed, conv.bias, *_geometry(conv), "add", 1.0, "relu", [], "")
    return out


@functools.cache
def _works(act: Any) -> bool:
    """Whether this build of torch does this activation after a convolution (None: the sum), with the right numbers."""

    @torch.no_grad()
    def trial() -> bool:
        conv = nn.utils.skip_init(nn.Conv2d, 3, 5, 3, stride=2, padding=1)  # random numbers belong to the caller
        for parameter in conv.parameters():
            parameter.copy_(torch.arange(float(parameter.numel())).sin().view_as(parameter))
        images = [4 * torch.arange(6.0 * h * w).cos().view(2, 3, h, w) for h, w in ((9, 8), (6, 11))]
        try:
            packed = _reorder(conv, images[0])
            for x in images:
                plain = conv(x)
                if act is None:
                    wanted, ours = (plain + plain.sin()).relu(), _add_convolved(plain.sin(), conv, x, packed)
                else:
                    wanted, ours = act()(plain.clone()), _convolve(conv, x, packed, act())
                if not torch.allclose(ours, wanted, atol=1e-5):
                    return False
        except (AttributeError, RuntimeError, TypeError):
            return False
        return True

    return undisturbed(trial)
