"""Reading weight files safely, and loading them strictly: every key accounted for, classifier rows matched by name."""

from __future__ import annotations

import json
import os
import pickle
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dyhead_zoo.convert import CheckpointError, Conversion, detectron2, listing, mmdet, unwrap
from dyhead_zoo.data.label_space import COCO_80, LabelSpace
from dyhead_zoo.download import fetch, sha256_of

if TYPE_CHECKING:
    from dyhead_zoo.detector import Detector, Head

__all__ = [
    "CheckpointError",
    "ClassRows",
    "LoadReport",
    "fetch",
    "load_checkpoint",
    "read_state_dict",
    "sha256_of",
    "write_safetensors",
]

# --- files ------------------------------------------------------------------------------------------------------------


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors from a file without running anything that is in it.

    Args:
        path: ``.safetensors``; ``.pth``, ``.pt`` or ``.bin`` (PyTorch, ``weights_only=True``); ``.pkl`` (detectron2,
            by an unpickler that admits numpy arrays and nothing else).

    Returns:
        Tensors by name, on the CPU; metadata: the header's of a safetensors file, ``meta`` of mmengine's, else empty.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: for a damaged file, one that holds more than tensors, or an unknown suffix.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}" + (": it is a directory" if path.is_dir() else ""))
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise CheckpointError(f"{path}: unknown suffix {path.suffix!r}; weights are read from {', '.join(_READERS)}")
    try:
        return reader(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


_AGAIN = "Delete it and fetch it again"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > size - 8:
        raise CheckpointError(
            f"not a safetensors file, or a truncated one: it has {size} bytes, its header alone would need {header}. "
            f"{_AGAIN}"
        )
    try:
        with safe_open(path, "pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"damaged or truncated safetensors file ({_first_line(error)}). {_AGAIN}") from error


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with path.open("rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # zip archive, or the plain pickle of PyTorch before 1.6
        raise CheckpointError(f"not a PyTorch file (a web page saved under its name?). {_AGAIN}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"it holds {refused[1]} beside tensors, and to load that could run code: refused. If you trust whoever "
                "made it, save its tensors alone, in a process where you accept that risk: "
                "torch.save({'state_dict': torch.load(path, weights_only=False)['state_dict']}, new_path)"
            ) from error
        raise CheckpointError(f"damaged or truncated PyTorch file ({_first_line(error)}). {_AGAIN}") from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"expected a dictionary of tensors, found {type(checkpoint).__name__}")
    return unwrap(checkpoint)


class _Refused(pickle.UnpicklingError):
    """Something in a pickle that is neither an array nor made of plain Python values."""


def _encode_latin1(text: str, encoding: str) -> bytes:
    """What protocol 2 pickles of Python 3 call to restore bytes; other codecs are refused."""
    if encoding != "latin1":
        raise _Refused(f"codec {encoding!r}")
    return text.encode("latin1")


def _number_type(code: str, align: bool = False, copy: bool = True) -> np.dtype[Any]:
    """``numpy.dtype`` for plain numbers; others could hold objects, or sizes that do not agree with their data."""
    if not isinstance(code, str) or np.dtype(code).kind not in "biuf":
        raise _Refused(f"an array of {code!r}")
    return np.dtype(code, align=align, copy=copy)


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_FROM_BUFFER = np.empty(0).__reduce_ex__(5)[0]
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # numpy 1
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # numpy 2
    ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _number_type,
    ("_codecs", "encode"): _encode_latin1,
    ("collections", "OrderedDict"): dict,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Admits dictionaries, lists, numbers, strings and numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with path.open("rb") as file:
            checkpoint = _ArrayUnpickler(file, encoding="latin1").load()
    except _Refused as error:
        raise CheckpointError(
            f"refused: only numpy arrays are read from a pickle, this one asks for {error}"
        ) from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"damaged pickle ({_first_line(error)}). {_AGAIN}") from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"expected a dictionary of arrays, found {type(checkpoint).__name__}")
    arrays = checkpoint["model"] if isinstance(checkpoint.get("model"), Mapping) else checkpoint
    return unwrap({key: _as_tensor(key, value) for key, value in arrays.items()})


def _as_tensor(key: str, value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    try:
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{key}: torch has no {value.dtype}") from error


_READERS: dict[str, Callable[[Path], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    ".safetensors": _read_safetensors,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
    ".pkl": _read_pickle,
}


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in one step: a reader sees the old file or the new one, never half of it.

    Args:
        path: its directory must exist.
        tensors: any device, any strides, may share memory.
        metadata: goes into the header, with ``format: pt``.

    Raises:
        TypeError: if a value of ``metadata`` is not a string.
    """
    path = Path(path)
    header = {"format": "pt", **(metadata or {})}
    if wrong := {key: value for key, value in header.items() if not isinstance(value, str)}:
        raise TypeError(f"safetensors metadata must be strings, got {wrong}: use json.dumps")
    # a copy each, because safetensors refuses shared memory
    copies = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows; safetensors would leave 0600
        save_file(copies, temporary, metadata=header)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- layouts ----------------------------------------------------------------------------------------------------------


def _keep(state_dict: Mapping[str, Tensor]) -> Conversion:
    return Conversion(dict(state_dict))


_CONVERTERS: dict[str, Callable[[Mapping[str, Tensor]], Conversion]] = {
    "native": _keep,
    "mmdet": mmdet.convert,
    "detectron2": detectron2.convert,
}


def detect_source(keys: Iterable[str]) -> str:
    """The layout of a state dict, told by its keys: ``native``, ``mmdet`` or ``detectron2``.

    Raises:
        CheckpointError: if it is none of them.
    """
    keys = list(keys)

    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    if has("backbone.bottom_up.", "backbone.backbone."):
        return "detectron2"
    if has("bbox_head.", "neck.0.", "neck.lateral_convs."):
        return "mmdet"
    if has("backbone.body.") and not has("backbone.fpn."):  # torchvision's detectors have both
        return "native"
    raise CheckpointError(
        f"layout not recognised from its {len(keys)} keys:\n{listing(keys, 5)}\n"
        "Detectors have keys such as backbone.body.* (ours), bbox_head.* (mmdet) or backbone.backbone.* (detectron2); "
        "weights of a backbone alone are no detector"
    )


# --- classes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassRows:
    """How the first dimension of a classifier's parameter is laid out.

    It has ``groups`` blocks (anchors), each of ``rows_per_class`` rows for every class in turn, then ``extra`` rows
    that belong to no class (background).
    """

    groups: int = 1
    rows_per_class: int = 1
    extra: int = 0

    def num_classes(self, rows: int) -> int | None:
        """Number of classes of a parameter with that many rows; None if no number fits."""
        per_group, odd_group = divmod(rows, self.groups)
        classes, odd_class = divmod(per_group - self.extra, self.rows_per_class)
        return classes if classes > 0 and not odd_group and not odd_class else None

    def indices(self, classes: Iterable[int], num_classes: int) -> Tensor:
        """Rows of some of ``num_classes`` classes, in the order given, and the extra rows, group after group."""
        per_group = num_classes * self.rows_per_class + self.extra
        rows = [c * self.rows_per_class + r for c in classes for r in range(self.rows_per_class)]
        rows += range(num_classes * self.rows_per_class, per_group)
        return torch.tensor([group * per_group + row for group in range(self.groups) for row in rows])


def _classes_in(tensors: Mapping[str, Tensor], rows: Mapping[str, ClassRows]) -> int | None:
    """Number of classes that the classifier of a checkpoint has; None if it has no classifier."""
    counts = {key: layout.num_classes(len(tensors[key])) for key, layout in rows.items() if key in tensors}
    if len(set(counts.values())) > 1 or None in counts.values():
        lines = (
            f"{key} {tuple(tensors[key].shape)}: {count or 'no whole number of'} classes"
            for key, count in counts.items()
        )
        raise CheckpointError(
            f"the number of classes cannot be told from the rows of its classifier:\n{listing(lines)}"
        )
    return next(iter(counts.values()), None)


def _stated_labels(metadata: Mapping[str, Any], argument: LabelSpace | None) -> LabelSpace | None:
    """Label space of a checkpoint: its own record in our files, what the caller knows, the names in mmdet's files."""
    try:
        if "label_space" in metadata:
            return LabelSpace.from_dict(json.loads(metadata["label_space"]))
        return argument or _mmdet_labels(metadata)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"its record of class names cannot be read ({error}): pass label_space=") from error


def _mmdet_labels(meta: Mapping[str, Any]) -> LabelSpace | None:
    dataset = meta.get("dataset_meta") or {}
    names = meta.get("CLASSES") or dataset.get("classes") or dataset.get("CLASSES")
    if names is None:
        return None
    labels = LabelSpace.from_names([names] if isinstance(names, str) else names)
    # mmdet 1 wrote traffic_light
    return COCO_80 if tuple(name.replace("_", " ") for name in labels.names) == COCO_80.names else labels


def _pair_classes(theirs: LabelSpace, ours: LabelSpace) -> list[tuple[int, int]]:
    """(row of the checkpoint, row of the model) of every class that both name."""
    if theirs.names != ours.names and LabelSpace.unnamed(len(theirs)).names == theirs.names:
        return []  # class_0, class_1, ... are places, not names
    position = {name: i for i, name in enumerate(theirs.names)}
    return [(position[name], i) for i, name in enumerate(ours.names) if name in position]


def _rehead(
    tensors: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    rows: Mapping[str, ClassRows],
    theirs: LabelSpace,
    ours: LabelSpace,
) -> tuple[str, ...]:
    """Replace the classifier in ``tensors`` by one for our classes; returns the names of those that were copied."""
    pairs = _pair_classes(theirs, ours)
    for key, layout in rows.items():
        if key not in tensors or key not in expected or tensors[key].shape[1:] != expected[key].shape[1:]:
            continue  # left for the comparison of keys and shapes to report
        result = expected[key].detach().clone()
        if pairs:
            source = layout.indices((p[0] for p in pairs), len(theirs))
            target = layout.indices((p[1] for p in pairs), len(ours))
            result[target.to(result.device)] = tensors[key][source].to(result)
        tensors[key] = result
    return tuple(ours.names[i] for _, i in pairs)


# --- loading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What became of every key of a checkpoint, and of every key and class of the model.

    Attributes:
        source: layout of the checkpoint.
        loaded: keys of the model that were set.
        missing: keys of the model that the checkpoint does not have (``strict=False`` only); they kept their values.
        unused: keys that the model does not have (``strict=False`` only).
        dropped: foreign keys left out on purpose, with the reason.
        created: keys that the source does not have, with the reason for their value.
        copied_classes: names of classes whose rows were copied.
        fresh_classes: names of classes that kept the model's initial rows.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    created: Mapping[str, str] = field(default_factory=dict)
    copied_classes: tuple[str, ...] = ()
    fresh_classes: tuple[str, ...] = ()

    def summary(self) -> str:
        """A few lines for a log."""
        lines = [f"{len(self.loaded)} tensors loaded from a {self.source} checkpoint"]
        lines += [f"{len(keys)} {what}" for what, keys in (("missing", self.missing), ("unused", self.unused)) if keys]
        for what, reasons in (("dropped", self.dropped), ("created", self.created)):
            by_reason: dict[str, int] = defaultdict(int)
            for reason in reasons.values():
                by_reason[reason] += 1
            lines += [f"{count} {what}: {reason}" for reason, count in by_reason.items()]
        if self.fresh_classes:
            copied = ", ".join(self.copied_classes) or "none, no class name is shared"
            lines += [f"classes copied: {copied}", f"classes that start fresh: {', '.join(self.fresh_classes)}"]
        return "\n".join(lines)


def load_checkpoint(
    model: Detector,
    checkpoint: str | Path | Mapping[str, Tensor],
    source: str = "auto",
    *,
    label_space: LabelSpace | None = None,
    strict: bool = True,
) -> LoadReport:
    """Load weights into a detector; if that fails, the detector is as it was.

    Rows of the classifier are matched by class name: those of classes that both label spaces name are copied, wherever
    they stand; the others keep the detector's initialisation.

    Args:
        model: a detector, built for the architecture of the checkpoint.
        checkpoint: a file (see ``read_state_dict``) or a state dict.
        source: ``native``, ``mmdet``, ``detectron2``, or ``auto``: told from the keys.
        label_space: of the checkpoint. A record in one of our files comes first; without either, the names in mmdet's
            ``meta``, else the detector's own label space if the number of classes agrees.
        strict: whether missing and unused keys are errors. A wrong shape always is.

    Raises:
        CheckpointError: with the keys that do not fit.
        FileNotFoundError: if there is no such file.
    """
    if isinstance(checkpoint, Mapping):
        name, (tensors, metadata) = "state dict", unwrap(checkpoint)
    else:
        name, (tensors, metadata) = str(checkpoint), read_state_dict(checkpoint)
    try:
        return _load(model, tensors, metadata, source, label_space, strict)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _load(
    model: Detector,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    source: str,
    label_space: LabelSpace | None,
    strict: bool,
) -> LoadReport:
    layout = detect_source(tensors) if source == "auto" else source
    if layout not in _CONVERTERS:
        raise ValueError(f"source={source!r}: expected auto, {', '.join(_CONVERTERS)}")
    conversion = _CONVERTERS[layout](tensors)
    new, expected, ours = conversion.tensors, model.state_dict(), model.label_space
    rows = {f"head.{key}": value for key, value in cast("Head", model.head).class_rows().items()}
    copied: tuple[str, ...] = ()
    if count := _classes_in(new, rows):
        theirs = _agreed_labels(_stated_labels(metadata, label_space), count, ours)
        copied = _rehead(new, expected, rows, theirs, ours)
    missing = tuple(key for key in expected if key not in new)
    unused = tuple(key for key in new if key not in expected)
    wrong = [key for key in expected if key in new and new[key].shape != expected[key].shape]
    if wrong or (strict and (missing or unused)):
        raise CheckpointError(_mismatch(new, expected, missing, unused, wrong))
    loaded = {key: new[key] for key in expected if key in new}
    model.load_state_dict(loaded, strict=False)
    return LoadReport(
        layout,
        tuple(loaded),
        missing,
        unused,
        conversion.dropped,
        conversion.created,
        copied,
        tuple(name for name in ours.names if name not in copied),
    )


def _agreed_labels(stated: LabelSpace | None, count: int, ours: LabelSpace) -> LabelSpace:
    if stated is None and count == len(ours):
        return ours
    if stated is None:
        raise CheckpointError(
            f"it has {count} classes without names and the detector has {len(ours)}: pass label_space= with the names "
            "of the checkpoint's classes, so that rows are copied by name"
        )
    if len(stated) != count:
        raise CheckpointError(f"its classifier has rows for {count} classes, but its label space names {len(stated)}")
    return stated


def _mismatch(
    new: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    missing: Iterable[str],
    unused: Iterable[str],
    wrong: Iterable[str],
) -> str:
    groups = {
        "missing from the checkpoint": [f"{key} {tuple(expected[key].shape)}" for key in missing],
        "unknown to the detector": [f"{key} {tuple(new[key].shape)}" for key in unused],
        "of another shape": [
            f"{key} {tuple(new[key].shape)}, the detector has {tuple(expected[key].shape)}" for key in wrong
        ],
    }
    parts = [f"{len(lines)} keys {what}:\n{listing(lines)}" for what, lines in groups.items() if lines]
    theirs, ours = _describe(new), _describe(expected)
    if theirs == ours:
        advice = f"Both look like {ours}: another tag's arguments (pred_kernel, for one), or a damaged checkpoint?"
    else:
        advice = f"The checkpoint looks like {theirs}, the detector is {ours}: create the detector that it belongs to"
    return "\n".join(["it does not fit this detector; nothing was loaded.", *parts, advice])


def _describe(keys: Iterable[str]) -> str:
    """The architecture as far as keys tell it, for error messages."""
    keys = list(keys)

    def numbers(pattern: str) -> set[tuple[str, ...]]:
        return {match.groups() for key in keys if (match := re.match(pattern, key))}

    blocks: dict[str, int] = defaultdict(int)
    for stage, _ in numbers(r"backbone\.body\.(\D+\d+)\.(?:blocks\.)?(\d+)\."):
        blocks[stage] += 1
    depths = "-".join(str(blocks[stage]) for stage in sorted(blocks))
    dyhead, tower = (len(numbers(prefix + r"\.(\d+)")) for prefix in (r"neck\.dyhead\.blocks", r"head\.cls_tower"))
    return f"({depths or 'no known'} backbone blocks, {dyhead} DyHead blocks, {tower} tower convolutions)"
