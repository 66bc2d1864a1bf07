"""Foreign state dicts to ours: tables of key templates, applied strictly, and the few steps that tables cannot say.

One file per source holds the tables. A key that no table knows is an error, so a converter never loses a weight in
silence; what it leaves out on purpose, and what it adds, is on record in the ``Conversion``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_FIELDS = {
    "i": r"\d+",
    "j": r"\d+",
    "k": r"\d+",
    "branch": "high|mid|low",
    "wb": "weight|bias",
    "bn": "weight|bias|running_mean|running_var|num_batches_tracked",
    "any": ".+",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, converted or loaded; the message lists the keys and says what to do."""


@dataclass
class Conversion:
    """A state dict in our layout.

    Attributes:
        tensors: our keys to tensors.
        dropped: foreign keys left out on purpose, with the reason.
        created: our keys that the source does not have, with the reason for their value.
    """

    tensors: dict[str, Tensor]
    dropped: dict[str, str] = field(default_factory=dict)
    created: dict[str, str] = field(default_factory=dict)


class Rename:
    """One row of a table: foreign keys of one form, and ours.

    Args:
        source: template such as ``neck.lateral_convs.{i}.conv.{wb}``; the fields are those of ``_FIELDS``.
        target: our key with the same fields; ``{next}`` and ``{previous}`` are ``{i}`` plus and minus one.
        transform: applied to the tensor.
    """

    def __init__(self, source: str, target: str, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.pattern = _compile(source)
        self.target = target
        self.transform = transform

    def __call__(self, match: re.Match[str]) -> str:
        fields = match.groupdict()
        if "i" in fields:
            number = int(fields["i"])
            fields |= {"next": str(number + 1), "previous": str(number - 1)}
        return self.target.format(**fields)


class Drop:
    """One row of a table: foreign keys that our models have no use for, and why."""

    def __init__(self, source: str, reason: str) -> None:
        self.pattern = _compile(source)
        self.reason = reason


def tower_rows(source: str, target: str, depth: int = 8) -> tuple[Rename, ...]:
    """Rows for a ``Sequential`` of convolution, norm and activation in turn, to our towers of such blocks."""
    parts = [(3 * i + offset, i, part) for i in range(depth) for offset, part in enumerate(("conv", "norm"))]
    return tuple(Rename(f"{source}{place}.{{wb}}", f"{target}{i}.{part}.{{wb}}") for place, i, part in parts)


def _compile(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", lambda m: f"(?P<{m[1]}>{_FIELDS[m[1]]})", re.escape(template)))


def apply_table(state_dict: Mapping[str, Tensor], table: Iterable[Rename | Drop], layout: str) -> Conversion:
    """Rename every tensor by the first row that fits its whole key.

    Args:
        state_dict: foreign keys to tensors; not changed.
        table: rows.
        layout: name of the source, for messages.

    Raises:
        CheckpointError: for keys that no row fits, or two that become the same key.
    """
    table = tuple(table)
    result = Conversion({})
    origin: dict[str, str] = {}
    unknown = []
    for key, tensor in state_dict.items():
        for row in table:
            if match := row.pattern.fullmatch(key):
                break
        else:
            unknown.append(f"{key} {tuple(tensor.shape)}")
            continue
        if isinstance(row, Drop):
            result.dropped[key] = row.reason
            continue
        target = row(match)
        if target in origin:
            raise CheckpointError(f"both {origin[target]!r} and {key!r} of this {layout} checkpoint become {target!r}")
        origin[target] = key
        result.tensors[target] = row.transform(tensor) if row.transform else tensor
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of {len(state_dict)} keys are not known to the {layout} converter:\n"
            f"{listing(unknown)}\nIs it a checkpoint of an architecture that dyhead_zoo does not have?"
        )
    return result


def unwrap(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint, and what describes them.

    Args:
        checkpoint: a state dict, or one inside ``{'state_dict': ..., 'meta': ...}`` (mmengine) or ``{'model': ...}``
            (detectron2), or under any other name if there is but one (``{'ema': ..., 'epoch': 3}``). The optimizer
            and other entries are left behind.

    Returns:
        The state dict, and ``meta`` where there is one.

    Raises:
        CheckpointError: if there is none, or more than one, or if something in it is not a tensor.
    """
    inner = next((checkpoint[key] for key in ("state_dict", "model") if isinstance(checkpoint.get(key), Mapping)), None)
    if inner is None:
        inside = [key for key, value in checkpoint.items() if _is_state_dict(value)]
        if len(inside) > 1:
            raise CheckpointError(
                f"it holds {len(inside)} state dicts, {', '.join(map(repr, inside))}: save the one that is meant alone"
            )
        inner = checkpoint[inside[0]] if inside else None
    meta = checkpoint.get("meta") if inner is not None else None
    tensors = dict(checkpoint if inner is None else inner)
    others = [
        f"{key!r}: {type(value).__name__}"
        for key, value in tensors.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if others or not tensors:
        raise CheckpointError(
            f"no state dict: expected tensors by name, or those under 'state_dict' or 'model', but found\n"
            f"{listing(others) or '  nothing'}"
        )
    return {key: tensor.detach() for key, tensor in tensors.items()}, dict(meta) if isinstance(meta, Mapping) else {}


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(item, Tensor) for item in value.values())


def listing(lines: Iterable[str], limit: int = 20) -> str:
    """Indented lines, at most ``limit`` of them, then how many more there are."""
    lines = list(lines)
    rest = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join(f"  {line}" for line in lines[:limit] + rest)


def as_linear(weight: Tensor) -> Tensor:
    """The weight of a 1x1 convolution (C_out, C_in, 1, 1) as that of a linear layer (C_out, C_in)."""
    return weight.flatten(1)


def renumber(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Replace the number that follows ``prefix`` by its rank: levels 3, 4, 5 become 0, 1, 2."""
    numbers = sorted({_number(key, prefix) for key in tensors if key.startswith(prefix)})
    rank = {number: str(i) for i, number in enumerate(numbers)}

    def renamed(key: str) -> str:
        if not key.startswith(prefix):
            return key
        number = _number(key, prefix)
        return prefix + rank[number] + key[len(prefix) + len(str(number)) :]

    return {renamed(key): tensor for key, tensor in tensors.items()}


def _number(key: str, prefix: str) -> int:
    return int(key[len(prefix) :].split(".")[0])


def stack_scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather ``head.scales.{level}``, one number each, into the single parameter ``head.scales`` (num_levels,)."""
    prefix = "head.scales."
    keys = sorted((key for key in tensors if key.startswith(prefix)), key=lambda key: _number(key, prefix))
    if not keys:
        return tensors
    rest = {key: tensor for key, tensor in tensors.items() if key not in keys}
    return rest | {"head.scales": torch.cat([tensors[key].reshape(-1) for key in keys])}


def add_batch_counters(conversion: Conversion) -> None:
    """Give every BatchNorm a ``num_batches_tracked`` of 0 where the source was saved from frozen layers without one."""
    suffix = "running_mean"
    for key in [key for key in conversion.tensors if key.endswith(suffix)]:
        counter = key.removesuffix(suffix) + "num_batches_tracked"
        if counter not in conversion.tensors:
            conversion.tensors[counter] = torch.zeros((), dtype=torch.int64)
            conversion.created[counter] = "0: the source has frozen BatchNorm, which does not count"


def add_deform_conv_biases(conversion: Conversion) -> None:
    """Give the deformable convolutions of DyHead a bias of 0 where the source has none (mmdet)."""
    pattern = re.compile(r"(neck\.dyhead\.blocks\.\d+\.spatial\.conv_(?:high|mid|low)\.)weight")
    for key, weight in list(conversion.tensors.items()):
        match = pattern.fullmatch(key)
        if match and (bias := match[1] + "bias") not in conversion.tensors:
            conversion.tensors[bias] = weight.new_zeros(weight.shape[0])
            conversion.created[bias] = "0: the source has deformable convolutions without bias"
